"""Grammars of answers that may call tools: in every family they take what its parser reads, and nothing else."""

import contextlib
import json
import time

import pytest
from llguidance import LLMatcher, LLTokenizer

from serving.fakes import CHECKPOINT
from zif.contract import StructuredOutput
from zif.errors import RequestError
from zif.parsing.events import TextPiece, ToolCallArguments, ToolCallBegin, ToolCallEnd
from zif.parsing.formats import format_names, load_format
from zif.parsing.parser import Parser
from zif.parsing.writing import WrittenCall, write_answer
from zif.serving.tools.forced import required_calls_form
from zif.serving.tools.form_or_calls import FormOrCalls
from zif.serving.tools.grammar import CallableTools, CallGrammar
from zif.structured.notation import grammar_text

CITY = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"$ref": "#/$defs/city"},
            "days": {"type": "integer"},
            "note": {"type": ["string", "null"], "description": "anything"},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"city": {"enum": ["Paris", "Rome"], "type": "string"}},
    },
}
FIND = {"name": "find", "parameters": {"type": "object", "properties": {"query": {"type": "string"}}}}
STRICT = CallableTools([CITY, FIND], frozenset({"get_weather"}))
GOOD = '{"city": "Rome", "days": 2}'
BAD = [
    '{"city": "Bonn", "days": 2}',
    '{"city": "Rome", "days": "two"}',
    '{"city": "Rome"}',
    '{"days": 2, "city": "Rome"}',
]
FORM = StructuredOutput(json={"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]})
FAMILIES = [name for name in format_names() if load_format(name).has_calls]
EOS = "<|call|>"
# What stands before an answer of families whose prompt begins the message.
PROMPTS = {"harmony": "<|start|>assistant"}


def markers_of(name):
    """Return the markers of a family that its models may have as tokens."""
    found = {marker for state in load_format(name).states.values() for marker in state.markers.targets}
    extra = {"<|constrain|>", EOS} if name == "harmony" else set()
    return sorted(marker for marker in found | extra if marker[0] in "<[" and marker[-1] in ">]" and len(marker) > 2)


class Vocabulary:
    """The embedded model's vocabulary, with a family's markers as tokens, or without."""

    def __init__(self, markers):
        definition = json.loads((CHECKPOINT / "tokenizer.json").read_text())
        first = 1 + max(*definition["model"]["vocab"].values(), *(one["id"] for one in definition["added_tokens"]))
        self.ids = {marker: first + index for index, marker in enumerate(markers)}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        definition["added_tokens"] += [
            {"id": token_id, "content": marker, "special": True, **flags} for marker, token_id in self.ids.items()
        ]
        eos = [0, self.ids[EOS]] if EOS in self.ids else [0]
        self.eos_ids = frozenset(eos)
        self.tokenizer = LLTokenizer(json.dumps(definition), eos_token=eos)

    def tokens(self, text):
        return self.tokenizer.tokenize_str(text)

    def spelled(self, text):
        """Return the tokens of a text of which none is a marker."""
        return [token for character in text for token in self.tokenizer.tokenize_bytes(character.encode())]

    def takes(self, grammar, tokens):
        """Say whether a whole answer is what a grammar allows; where an end token comes last it need not say so."""
        if tokens and tokens[-1] in self.eos_ids:
            tokens = tokens[:-1]
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0)
        assert not matcher.get_error()
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.fixture(scope="module", params=[(name, known) for name in FAMILIES for known in (True, False)], ids=str)
def family(request):
    name, known = request.param
    vocabulary = Vocabulary(markers_of(name) if known else [])
    return load_format(name), vocabulary, CallGrammar(load_format(name), vocabulary.ids.get, vocabulary.eos_ids)


def written(form, calls=(), text="", reasoning=""):
    """Return an answer as the family writes it after its prompt."""
    return write_answer(form, text, reasoning, [WrittenCall(*call) for call in calls]).removeprefix(
        PROMPTS.get(form.name, "")
    )


def read(form, text, tools=STRICT):
    """Return the text and the calls that the family's parser finds."""
    parser = Parser(form, {function["name"]: function.get("parameters") or {} for function in tools.functions})
    events = parser.feed(text) + parser.finish()
    calls = [event.name for event in events if isinstance(event, ToolCallBegin)]
    return "".join(event.text for event in events if isinstance(event, TextPiece)).strip(), calls


def test_among_text_a_strict_call_keeps_its_schema_and_others_are_free(family):
    form, vocabulary, syntax = family
    grammar = LLMatcher.grammar_from_lark(syntax.among_text(STRICT, in_reasoning=False))
    free = '{"query": "x"}' if form.written.parameter else '{"query": ["x", 1], "more": {}}'
    text = "" if form.states[form.start].bare else "Look: <b> {1}"
    for calls in ([("get_weather", GOOD)], [("find", free)], []):
        answer = written(form, calls, text)
        assert vocabulary.takes(grammar, vocabulary.tokens(answer)), answer
        assert read(form, answer) == (text if calls or text else "", [name for name, _ in calls])
    for arguments in BAD:
        answer = written(form, [("get_weather", arguments)], text)
        assert not vocabulary.takes(grammar, vocabulary.tokens(answer)), answer
    assert not vocabulary.takes(grammar, vocabulary.tokens(written(form, [("unknown", "{}")], text)))


def test_a_marker_in_other_tokens_is_a_marker_too(family):
    form, vocabulary, syntax = family
    grammar = LLMatcher.grammar_from_lark(syntax.among_text(STRICT, in_reasoning=False))
    if form.name != "harmony":  # whose text without a marker is no answer
        answer = written(form, [("get_weather", BAD[0])], "" if form.states[form.start].bare else "Look.")
        assert not vocabulary.takes(grammar, vocabulary.spelled(answer))


def test_reasoning_may_hold_what_looks_like_a_call(family):
    form, vocabulary, syntax = family
    if form.written.reasoning is None or vocabulary.ids:
        return
    thoughts = written(form, [("get_weather", BAD[0])]) if form.name != "harmony" else "hm"
    answer = written(form, [("get_weather", GOOD)], reasoning=thoughts)
    grammar = LLMatcher.grammar_from_lark(syntax.among_text(STRICT, in_reasoning=False))
    assert vocabulary.takes(grammar, vocabulary.tokens(answer)), answer
    begun = LLMatcher.grammar_from_lark(syntax.among_text(STRICT, in_reasoning=True))
    rest = answer[answer.index(thoughts) :]
    assert vocabulary.takes(begun, vocabulary.tokens(rest)), rest
    assert not vocabulary.takes(begun, vocabulary.tokens(rest.replace(GOOD, BAD[1]))) or form.written.parameter


def test_instead_of_a_form_there_are_calls_and_nothing_else(family):
    form, vocabulary, syntax = family
    calls = syntax.only_calls(STRICT, "user:" + PROMPTS.get(form.name, ""))
    grammar = grammar_text(StructuredOutput(json=FORM.json, or_grammar=calls))
    assert vocabulary.takes(grammar, vocabulary.tokens('{"sum": 3}'))
    assert vocabulary.takes(grammar, vocabulary.tokens(written(form, [("get_weather", GOOD)])))
    two = written(form, [("get_weather", GOOD), ("find", "{}")])
    assert vocabulary.takes(grammar, vocabulary.tokens(two)) == (EOS not in vocabulary.ids)
    one = CallGrammar(form, vocabulary.ids.get, vocabulary.eos_ids).only_calls(
        CallableTools(STRICT.functions, STRICT.strict, parallel=False), PROMPTS.get(form.name, "")
    )
    single = grammar_text(StructuredOutput(json=FORM.json, or_grammar=one))
    assert not vocabulary.takes(single, vocabulary.tokens(two))
    refused = ["", "text", '{"sum": "x"}', written(form, [("get_weather", BAD[0])]), written(form, [("other", "{}")])]
    for answer in [*refused, '{"sum": 3}' + written(form, [("find", "{}")]), written(form, [("find", "{}")]) + "text"]:
        assert not vocabulary.takes(grammar, vocabulary.tokens(answer)), answer


def test_calls_without_a_marker_stand_beside_every_object():
    vocabulary = Vocabulary(markers_of("llama3"))
    syntax = CallGrammar(load_format("llama3"), vocabulary.ids.get, vocabulary.eos_ids)
    call = '{"name": "get_weather", "parameters": %s}'
    grammar = grammar_text(StructuredOutput(json=FORM.json, or_grammar=syntax.only_calls(STRICT, "")))
    for answer in (call % GOOD, f"{call % GOOD}; {call % GOOD}", '{"sum": 1, "name": "get_weather"}', '{ "sum": 1}'):
        assert vocabulary.takes(grammar, vocabulary.tokens(answer)), answer
    assert not vocabulary.takes(grammar, vocabulary.tokens(call % BAD[0]))
    among = LLMatcher.grammar_from_lark(syntax.among_text(STRICT, in_reasoning=False))
    assert vocabulary.takes(among, vocabulary.tokens(call % GOOD))
    assert not vocabulary.takes(among, vocabulary.tokens(call % BAD[0]))
    assert not vocabulary.takes(among, vocabulary.tokens(f"{call % GOOD}; {call % BAD[0]}"))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_a_form_and_calls_are_told_apart_however_they_are_cut(name, cut):
    form = load_format(name)
    schemas = {function["name"]: function["parameters"] for function in STRICT.functions}

    def events(answer):
        parser = FormOrCalls(Parser(form, schemas))
        pieces = [answer[at : at + cut] for at in range(0, len(answer), cut)]
        return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()

    call = written(form, [("get_weather", GOOD)])
    tricky = json.dumps({"sum": call})
    found = events(tricky)
    assert all(isinstance(event, TextPiece) for event in found)
    assert "".join(event.text for event in found) == tricky
    found = events(call)
    assert isinstance(found[0], ToolCallBegin)
    arguments = "".join(event.text for event in found if isinstance(event, ToolCallArguments))
    assert json.loads(arguments) == json.loads(GOOD)
    assert any(isinstance(event, ToolCallEnd) for event in found)
    assert not any(isinstance(event, TextPiece) for event in found)


def test_a_family_without_calls_is_refused_beside_a_form():
    with pytest.raises(RequestError, match=r"tools: .* has no calls"):
        CallGrammar(load_format("plain"), lambda text: None, frozenset({0})).only_calls(STRICT, "")


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "x"}}}, "'f' is strict.* 'a': pattern cannot"),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"type": "string", "maxLength": 3}}}, "maxLength"),
        ({"properties": {"a": {"enum": ["x", "\n"]}}}, "enum cannot"),
        ({"properties": {"a>": {}}}, "'a>', a name"),
        ({"anyOf": [{"properties": {"a": {}}}]}, "'anyOf'"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "leads to no definition"),
        ({"properties": ["a"]}, "'f' is strict.* 'properties', which must be"),
        ({"$defs": 5}, r"'f' is strict.* '\$defs', which must be"),
        ({"required": 5}, "'f' is strict.* 'required', which must be"),
        ({"required": [1]}, "'f' is strict.* 'required', which must be"),
        ({"properties": {"a": 5}}, "'f' is strict.* 'a' is or refers to '5'"),
        ({"properties": {"a": {"$ref": 5}}}, "'f' is strict.* 'a': the reference '5'"),
        ({"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": None}}, "'f' is strict.* 'a' is or refers to"),
        ({"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"$ref": "#/$defs/x"}}}, "'a' refers to .* end"),
        ({"properties": {"a": {"type": "string", "anyOf": 5}}}, "'f' is strict.* 'a' has an anyOf"),
        (
            {"properties": {"a": {"type": "string", "enum": ["x", "y"], "anyOf": [{"const": "x"}]}}},
            "const, enum cannot",
        ),
        ({"properties": {"a": {"type": "string", "anyOf": [{"pattern": "x"}] * 129}}}, "'a' has more than 128"),
        ({"properties": {f"a{n}": {} for n in range(257)}}, "'f' is strict.* are 257; at most 256"),
    ],
)
def test_what_parameters_one_by_one_cannot_keep_is_refused_by_name(schema, complaint):
    tools = CallableTools([{"name": "f", "parameters": schema}], frozenset({"f"}))
    with pytest.raises(RequestError, match=complaint):
        CallGrammar(load_format("qwen3_coder"), lambda text: None, frozenset({0})).among_text(tools, False)


def test_parameters_that_refer_to_the_same_are_held_to_it_each():
    schema = {
        "type": "object",
        "properties": {
            "first": {"$ref": "#/$defs/node"},
            "second": {"$ref": "#/$defs/node"},
            "all": {"type": "array", "items": {"$ref": "#/properties/first"}},
            "any": True,
        },
        "required": ["first", "second", "all", "undeclared", "undeclared"],
        "$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}, "not_needed": {"type": "integer"}},
    }
    function = {"name": "f", "parameters": schema}
    form, vocabulary = load_format("qwen3_coder"), Vocabulary([])
    text = CallGrammar(form, {}.get, frozenset({0})).among_text(CallableTools([function], frozenset({"f"})), False)
    assert text.count("not_needed") == 1, "what only one parameter needs stands for that one"
    grammar = LLMatcher.grammar_from_lark(text)
    good = {"first": [[]], "second": [], "all": [[], [[]]], "any": "x", "undeclared": "y"}
    for arguments in [good, *({**good, key: value} for key in ("first", "second", "all") for value in (1, [2]))]:
        answer = written(form, [("f", json.dumps(arguments))])
        assert vocabulary.takes(grammar, vocabulary.tokens(answer)) == (arguments == good), answer


FIFTY_MS_OF_WORK = 1_850_000
REFERRED = {f"k{n}": {"$ref": "#/$defs/a"} for n in range(2000)}
DISTINCT = {f"k{n}": {"$ref": "#/$defs/a", "minimum": n} for n in range(256)}
LONG_TEXTS = {"type": "string", "enum": ["x"] * 10_000}
MANY_ALTERNATIVES = {"type": "string", "anyOf": [{"$ref": "#/$defs/b", "maximum": n} for n in range(60)]}


@pytest.mark.parametrize(
    ("properties", "definitions"),
    [
        (REFERRED, {"a": {"type": "integer"}}),
        (DISTINCT, {"a": LONG_TEXTS}),
        (DISTINCT, {"a": {"enum": list(range(10_000))}}),
        (DISTINCT, {"a": MANY_ALTERNATIVES, "b": {"type": "string"} | {f"x{n}": 0 for n in range(5000)}}),
        ({f"k{n}": {"type": "integer"} for n in range(100_000)}, {}),
        ({"k": {"enum": [0] * 1_000_000}}, {}),
    ],
)
@pytest.mark.parametrize("name", ["hermes", "llama3", "qwen3_coder", "glm"])
def test_no_schema_takes_long(name, properties, definitions):
    function = {"name": "f", "parameters": {"type": "object", "properties": properties, "$defs": definitions}}
    tools, syntax = CallableTools([function], frozenset({"f"})), CallGrammar(load_format(name), {}.get, frozenset({0}))

    def seconds(make):
        began = time.process_time()
        with contextlib.suppress(RequestError):
            make()
        return time.process_time() - began

    forms = [
        lambda: syntax.among_text(tools, False),
        lambda: syntax.only_calls(tools, ""),
        lambda: required_calls_form([function], True),
    ]
    # All other requests wait meanwhile. The bound is 50 ms where this was written, and as much work anywhere else. The
    # least of a few, as other processes take caches away.
    bound_s = min(seconds(lambda: sum(number & 7 for number in range(FIFTY_MS_OF_WORK))) for _ in range(3))
    for make in forms:
        assert min(seconds(make) for _ in range(3)) < bound_s
