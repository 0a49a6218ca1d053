"""What a response says of its request: every option, with the value that was used."""

from typing import Any

import msgspec

from zif.contract import SamplingParams
from zif.serving.responses.requests import CreateResponse, FunctionTool


def echo_of(body: CreateResponse, model: str, sampling: SamplingParams, tools: list[FunctionTool]) -> dict[str, Any]:
    """Return the fields of a response that repeat the request `body`; nothing was stored of it."""
    reasoning = body.reasoning
    return {
        "model": model,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None if reasoning is None else reasoning.effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "background": False,
        "temperature": sampling.temperature,
        "text": {"format": _format(body)},
        "tool_choice": body.tool_choice or "auto",
        "tools": [_tool(tool) for tool in tools],
        "top_logprobs": 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _format(body: CreateResponse) -> Any:
    asked = None if body.text is None else body.text.format
    return {"type": "text"} if asked is None else msgspec.to_builtins(asked)


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }
