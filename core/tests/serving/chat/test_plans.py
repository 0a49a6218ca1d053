"""Plans carried out by an engine that takes any token that is allowed: forms, calls, and nothing else come out."""

import itertools
import json

import jsonschema
import pytest

from serving.fakes import CHECKPOINT
from zif import LLM, SamplingParams, StructuredOutput
from zif.parsing.events import TextPiece, ToolCallArguments, ToolCallBegin, ToolCallEnd
from zif.parsing.formats import load_format
from zif.serving.chat.formats import ChatFormat
from zif.serving.chat.plans import plan_answer
from zif.serving.chat.turn import ChatTurn
from zif.text.tokenizer import load_tokenizer

SCHEMAS = {
    "look": {
        "type": "object",
        "properties": {"place": {"enum": ["here", "there"]}, "far": {"type": "boolean"}},
        "required": ["place", "far"],
        "additionalProperties": False,
    },
    "count": {
        "type": "object",
        "properties": {"to": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["to"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": value}} for name, value in SCHEMAS.items()]
SUM = {
    "type": "object",
    "properties": {"sum": {"enum": [1, 22]}},
    "required": ["sum"],
    "additionalProperties": False,
}
NUM_PROMPTS = 24


@pytest.fixture(scope="module")
def llm():
    with LLM(CHECKPOINT, platform="null", max_num_seqs=8, max_model_len=1024, kv_bytes=1 << 25) as llm:
        yield llm


def merged(events):
    """Return events with the pieces of one text or call joined."""
    found = []
    for (kind, _), group in itertools.groupby(events, lambda event: (type(event), getattr(event, "index", None))):
        same = list(group)
        joins = kind in (TextPiece, ToolCallArguments)
        found += [(kind, "".join(event.text for event in same))] if joins else [(kind, one) for one in same]
    return found


@pytest.mark.parametrize("family", ["hermes", "llama3", "qwen3_coder"])
def test_beside_a_form_every_answer_is_the_form_or_calls(llm, family):
    chat_format = ChatFormat(load_format(family))
    turn = ChatTurn(
        messages=[],
        sampling=SamplingParams(structured=StructuredOutput(json=SUM), max_tokens=300),
        tools=TOOLS,
        strict_tools=frozenset(SCHEMAS),
    )
    tokenizer = load_tokenizer(CHECKPOINT)
    grammar = chat_format.call_grammar(tokenizer.token_id, [tokenizer.eos_token_id])
    plan = plan_answer(turn, chat_format, grammar, "")
    num_forms = num_calls = 0
    for output in llm.generate([f"prompt {k}" for k in range(NUM_PROMPTS)], plan.sampling, use_tqdm=False):
        sample = output.outputs[0]
        assert sample.finish_reason in ("stop", "length"), sample.error
        if sample.finish_reason == "length":  # calls may follow one another for as long as there is room
            continue
        parser, streamed = plan.parser(), plan.parser()
        events = merged(parser.feed(sample.text) + parser.finish())
        assert merged([event for one in sample.text for event in streamed.feed(one)] + streamed.finish()) == events
        if events[0][0] is TextPiece:
            assert len(events) == 1
            jsonschema.validate(json.loads(events[0][1]), SUM)
            num_forms += 1
            continue
        num_calls += 1
        assert [kind for kind, _ in events] == [ToolCallBegin, ToolCallArguments, ToolCallEnd] * (len(events) // 3)
        for (_, begin), (_, arguments), _ in zip(*[iter(events)] * 3, strict=True):
            jsonschema.validate(json.loads(arguments), SCHEMAS[begin.name])
    assert num_forms > 0
    assert num_calls > 0
