"""Messages, tools and the choice of tools of the chat API: checked, and brought into the form of chat templates.

Keys that the API does not have are left in messages and in the calls within: templates of some models read keys of
their own. Everywhere else they are refused.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from zif.contract import StructuredOutput
from zif.serving.chat.turn import MAX_TOOLS, ToolChoice, ToolMode
from zif.serving.http.errors import ApiError
from zif.serving.openai.fields import invalid

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_PARTS = 1024
MAX_CALLS = 128
MAX_DESCRIPTION_CHARACTERS = 2**16

PART_MARKS = ("prompt_cache_breakpoint", "cache_control")
"""Keys of parts that say where a prefix to be kept ends."""

FORMAT_KEYS: Mapping[str, Sequence[str]] = {
    "text": ("type",),
    "json_object": ("type", "schema"),
    "json_schema": ("type", "json_schema"),
}
"""The types of `response_format` with their keys. A schema for any object is what other servers take there."""

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages for the template. Raises ApiError that names the message at fault."""
    if not messages:
        raise invalid("'messages' is empty; give at least one message", "messages")
    return [_checked_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _checked_message(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if role == "function":
        raise _unsupported(f"{where}.role", "functions are superseded by tools; use role 'tool'")
    if role not in ROLES:
        raise invalid(f"{where}.role is {_shown(role)}; it must be one of {', '.join(ROLES)}", f"{where}.role")
    for name in ("audio", "function_call"):
        if message.get(name) is not None:
            raise _unsupported(f"{where}.{name}", "messages are text and tool calls only")
    checked = dict(message)
    _check_text(f"{where}.name", message.get("name"), 256)
    _check_content(where, message)
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise invalid(f"{where}.tool_call_id is missing; name the call that is answered", f"{where}.tool_call_id")
    if message.get("tool_calls") is not None:
        checked["tool_calls"] = _checked_calls(f"{where}.tool_calls", role, message["tool_calls"])
    refusal = message.get("refusal")
    if refusal is not None:
        _check_text(f"{where}.refusal", refusal, None)
        # What the assistant said was the refusal: templates have no other place for it.
        checked["content"] = message.get("content") or refusal
    checked.pop("refusal", None)
    return checked


def _check_content(where: str, message: Mapping[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, str):
        return
    if content is None:
        if message["role"] == "assistant" and (message.get("tool_calls") or message.get("refusal")):
            return
        raise invalid(f"{where}.content is missing; give a string or a list of text parts", f"{where}.content")
    if not isinstance(content, list) or not 0 < len(content) <= MAX_PARTS:
        raise invalid(f"{where}.content must be a string or a list of 1 to {MAX_PARTS} text parts", f"{where}.content")
    for index, part in enumerate(content):
        _check_part(f"{where}.content[{index}]", part)


def _check_part(where: str, part: Any) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal"):
        raise _unsupported(where, f"the part's type is {_shown(kind)}, and this model takes text parts only")
    _check_text(f"{where}.{kind}", part.get(kind), None, required=True)
    _check_keys(where, part, ("type", kind, *PART_MARKS))
    if kind == "refusal":
        part["type"], part["text"] = "text", part.pop("refusal")


def _checked_calls(where: str, role: str, calls: Any) -> list[Any]:
    if role != "assistant":
        raise invalid(f"{where} belongs to messages of role 'assistant', not {_shown(role)}", where)
    if not isinstance(calls, list) or len(calls) > MAX_CALLS:
        raise invalid(f"{where} must be a list of at most {MAX_CALLS} calls", where)
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise _unsupported(f"{where}[{index}]", "a call is {'id', 'type': 'function', 'function': {...}}")
        _check_text(f"{where}[{index}].id", call.get("id"), 256)
        _check_text(f"{where}[{index}].function.name", function.get("name"), 256, required=True)
        if not isinstance(function.get("arguments"), str | dict):
            raise invalid(
                f"{where}[{index}].function.arguments must be JSON text", f"{where}[{index}].function.arguments"
            )
    return list(calls)


def checked_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return tools for the template. Raises ApiError that names the tool at fault."""
    return [_checked_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools)]


def _checked_tool(where: str, tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise _unsupported(f"{where}.type", f"it is {_shown(tool.get('type'))}, and only functions can be called")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{where}.function must be an object with name and parameters", f"{where}.function")
    _check_keys(where, tool, ("type", "function"))
    _check_keys(f"{where}.function", function, ("name", "description", "parameters", "strict"))
    check_name(f"{where}.function.name", function.get("name"))
    _check_text(f"{where}.function.description", function.get("description"), MAX_DESCRIPTION_CHARACTERS)
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise invalid(f"{where}.function.parameters must be a JSON schema", f"{where}.function.parameters")
    if not isinstance(function.get("strict"), bool | None):
        raise invalid(f"{where}.function.strict must be true or false", f"{where}.function.strict")
    shown = {key: value for key, value in function.items() if key != "strict" and value is not None}
    return {"type": "function", "function": shown}


def strict_names(tools: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Return the names of checked tools whose calls must keep their schema."""
    return frozenset(tool["function"]["name"] for tool in tools if tool["function"].get("strict"))


def chosen_tools(
    tools: list[dict[str, Any]], choice: str | Mapping[str, Any] | None, parallel: bool
) -> tuple[list[dict[str, Any]], ToolChoice]:
    """Return the tools that may be called, and whether they must. Raises ApiError for a choice that makes no sense."""
    if choice is None or choice == "auto":
        return tools, ToolChoice(ToolMode.AUTO, parallel=parallel)
    if isinstance(choice, str):
        if choice not in ("none", "required"):
            raise invalid(
                f"'tool_choice' is {_shown(choice)}; it must be none, auto, required or an object", "tool_choice"
            )
        return tools, ToolChoice(ToolMode(choice), parallel=parallel)
    if choice.get("type") == "allowed_tools":
        _check_keys("tool_choice", choice, ("type", "allowed_tools"))
        return _allowed_tools(tools, choice.get("allowed_tools"), parallel)
    if choice.get("type") != "function" or not isinstance(choice.get("function"), dict):
        raise invalid("'tool_choice' must name a function: {'type': 'function', 'function': {'name'}}", "tool_choice")
    name = choice["function"].get("name")
    _check_keys("tool_choice", choice, ("type", "function"))
    _check_keys("tool_choice.function", choice["function"], ("name",))
    check_name("tool_choice.function.name", name)
    return tools, ToolChoice(ToolMode.NAMED, name, parallel)


def _allowed_tools(
    tools: list[dict[str, Any]], allowed: Any, parallel: bool
) -> tuple[list[dict[str, Any]], ToolChoice]:
    where = "tool_choice.allowed_tools"
    entries = allowed.get("tools") if isinstance(allowed, dict) else None
    if (
        not isinstance(entries, list)
        or not 0 < len(entries) <= MAX_TOOLS
        or allowed.get("mode") not in ("auto", "required")
    ):
        raise invalid(f"{where} must have mode 'auto' or 'required' and a list of tools", where)
    _check_keys(where, allowed, ("mode", "tools"))
    names = {_allowed_name(f"{where}.tools[{index}]", entry) for index, entry in enumerate(entries)}
    known = {tool["function"]["name"] for tool in tools}
    if names - known:
        raise invalid(f"{where}.tools names {_shown(min(names - known))}, which is none of the tools", f"{where}.tools")
    kept = [tool for tool in tools if tool["function"]["name"] in names]
    return kept, ToolChoice(ToolMode(allowed["mode"]), parallel=parallel)


def _allowed_name(where: str, entry: Any) -> str:
    function = entry.get("function") if isinstance(entry, dict) and entry.get("type") == "function" else None
    if not isinstance(function, dict):
        raise invalid(f"{where} must name a function: {{'type': 'function', 'function': {{'name'}}}}", where)
    _check_keys(where, entry, ("type", "function"))
    _check_keys(f"{where}.function", function, ("name",))
    return check_name(f"{where}.function.name", function.get("name"))


def response_form(response_format: Mapping[str, Any] | None) -> StructuredOutput | None:
    """Return the form that `response_format` asks for. Raises ApiError or RequestError."""
    if response_format is None:
        return None
    kind = response_format.get("type")
    if not isinstance(kind, str) or kind not in FORMAT_KEYS:
        raise invalid(
            f"'response_format.type' is {_shown(kind)}; it must be {', '.join(FORMAT_KEYS)}", "response_format.type"
        )
    _check_keys("response_format", response_format, FORMAT_KEYS[kind])
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema")
        if not isinstance(schema, dict | None):
            raise invalid("'response_format.schema' must be a JSON schema", "response_format.schema")
        return StructuredOutput(json_object=True) if schema is None else StructuredOutput(json=schema)
    given = response_format.get("json_schema")
    if not isinstance(given, dict) or not isinstance(given.get("schema"), dict):
        raise invalid("'response_format.json_schema.schema' must be a JSON schema", "response_format.json_schema")
    _check_keys("response_format.json_schema", given, ("name", "description", "schema", "strict"))
    check_name("response_format.json_schema.name", given.get("name", "schema"))
    return StructuredOutput(json=given["schema"])


def check_name(where: str, name: Any) -> str:
    """Return a name. Raises ApiError for a value that the API does not take as one."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise invalid(f"{where} is {_shown(name)}; it must be 1 to 64 of letters, digits, '_', '-', '.'", where)
    return name


def _check_keys(where: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse keys that would be dropped. One without a value asks for nothing."""
    unknown = sorted(key for key, value in given.items() if value is not None and key not in known)
    if unknown:
        raise _unsupported(f"{where}.{unknown[0][:64]}", f"{where} has {', '.join(known)}")


def _check_text(where: str, text: Any, limit: int | None, required: bool = False) -> None:
    if text is None and not required:
        return
    if not isinstance(text, str) or (limit is not None and len(text) > limit):
        bound = "" if limit is None else f" of at most {limit} characters"
        raise invalid(f"{where} must be a string{bound}", where)


def _unsupported(where: str, reason: str) -> ApiError:
    return invalid(f"{where} is not supported: {reason}", where, "unsupported_parameter")


def _shown(value: Any) -> str:
    """Return a caller's value for a message, cut short."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
