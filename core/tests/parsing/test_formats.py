"""Formats as files: those of zif are small and sound, and what is wrong in a new one is said by its place."""

import subprocess
import sys
from pathlib import Path

import pytest

import zif.parsing
from parsing.answers import FORMATS, parse
from zif.errors import ConfigError
from zif.parsing.detection import detect_format
from zif.parsing.events import ToolCallArguments, ToolCallBegin, ToolCallEnd
from zif.parsing.formats import FOLDER, load_format, read_format
from zif.parsing.markers import Markers
from zif.parsing.parser import Parser

ROOM = Path(zif.parsing.__file__).parent
MAX_ENGINE_LINES = 1500
MAX_FORMAT_LINES = 60

SOUND = """
description = "A test."
start = "text"
text = "text"
broken = "broken"
templates = ["<call>"]
[states.text]
reads = "text"
markers = { "<call>" = "name" }
[states.name]
reads = "name"
markers = { "(" = "arguments" }
[states.arguments]
reads = "arguments"
then = "end"
[states.end]
reads = "space"
markers = { ")" = "text" }
else = "text"
[states.broken]
reads = "rest"
markers = { ")" = "text" }
[written]
call = "<call>$name($arguments)"
"""


def read(tmp_path, source):
    path = tmp_path / "mine.toml"
    path.write_text(source, encoding="utf-8")
    return read_format(path)


def test_a_new_family_needs_a_file_and_no_code(tmp_path):
    parser = Parser(read(tmp_path, SOUND), ["f"])
    events = parser.feed('<call>f({"a": 1})') + parser.finish()
    assert events == [ToolCallBegin(0, "f"), ToolCallArguments(0, '{"a": 1}'), ToolCallEnd(0)]


# what is replaced, by what, what the error says
MISTAKES = [
    ('start = "text"', "", "mine.toml has no key 'start'"),
    ('start = "text"', 'start = "begin"', "start = 'begin' is none of the states"),
    ('start = "text"', "start = 3", "start = 3 must be a string"),
    ('start = "text"', 'start = "name"', "start = 'name' must name a state that reads"),
    ('\ntext = "text"', '\ntext = "end"', "names a state that reads 'space'; it must read 'text'"),
    ('broken = "broken"', "", "broken is missing"),
    ('broken = "broken"', 'broken = "broken"\nstop = "x"', "mine.toml has the key 'stop'"),
    ('templates = ["<call>"]', 'templates = "<call>"', "templates = '<call>' must be a list of strings"),
    ('templates = ["<call>"]', "templates = [1]", r"templates = \[1\] must be a list of strings"),
    ('templates = ["<call>"]', 'reasoning_prompt = "x"', "reasoning_prompt = 'x' needs reasoning"),
    ('reads = "name"', 'reads = "names"', "states.name: reads = 'names' must be one of"),
    ('reads = "name"', "", "states.name has no key 'reads'"),
    ('reads = "name"', 'reads = "name"\ntrim = true', "states.name has the key 'trim'"),
    ('{ "(" = "arguments" }', '{ "(" = "argument" }', "states.name: leads to 'argument', which is none"),
    ('{ "(" = "arguments" }', '{ "(" = 1 }', "states.name: markers = .* must give a string for each key"),
    ('{ "(" = "arguments" }', '{ "" = "arguments" }', "states.name: markers: an empty marker"),
    ('{ "(" = "arguments" }', '{ "(" = "arguments", "((" = "arguments" }', r"marker '\(\(' contains marker '\('"),
    ('markers = { "(" = "arguments" }', "", "states.name: markers is empty"),
    ('markers = { "(" = "arguments" }', 'markers = "("', "states.name: markers = '\\(' must be a table"),
    ('then = "end"', "", "states.arguments has no key 'then'"),
    ('{ ")" = "text" }\nelse', '{ " )" = "text" }\nelse', "states.end: a marker begins with a blank"),
    ('else = "text"', 'else = "end"', "states.end leads back to itself without taking any text"),
    ('[written]\ncall = "<call>$name($arguments)"', "", "has no table 'written'"),
    ('call = "<call>$name($arguments)"', "", "call must be given for a family that writes calls"),
    ("$name($arguments)", "$name", r"call = '<call>\$name' must have \$arguments and \$name"),
    ("$name($arguments)", "$name($arguments) $", "must have"),
    ("[states.text]", "[states.text", "mine.toml cannot be read as TOML"),
    ("[states.broken]", '[states.idle]\nreads = "text"\n[states.broken]', "states.idle is reached from no state"),
]


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES)
def test_a_mistake_is_said_by_file_and_key(tmp_path, old, new, message):
    assert old in SOUND
    source = SOUND.replace(old, new, 1)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, source)


def test_a_state_that_needs_tools_is_not_reached_without_them(tmp_path):
    source = SOUND.replace('start = "text"', 'start = "end"').replace('else = "text"', 'else = "name"')
    with pytest.raises(ConfigError, match=r"states.name needs tools and is reached without them"):
        read(tmp_path, source)


def test_a_file_that_is_missing_or_too_long_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none.toml cannot be read"):
        read_format(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="at most"):
        read(tmp_path, SOUND + "#" * 2**16)
    (tmp_path / "bytes.toml").write_bytes(b'description = "\xff"')
    with pytest.raises(ConfigError, match=r"bytes.toml cannot be read"):
        read_format(tmp_path / "bytes.toml")


@pytest.mark.parametrize("name", ["hermse", "", "../formats/hermes", "hermes.toml"])
def test_an_unknown_format_is_refused_with_those_that_are_known(name):
    with pytest.raises(ConfigError, match=r"known are .*hermes"):
        load_format(name)


def test_markers_that_are_both_taken_and_kept_are_refused():
    with pytest.raises(ValueError, match="twice"):
        Markers({"a": "x"}, {"a": "y"})


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_file_is_short(name):
    lines = (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_FORMAT_LINES
    assert max(map(len, lines)) <= 120


def test_the_engine_is_short():
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in ROOM.glob("*.py")) <= MAX_ENGINE_LINES


def test_the_families_that_are_promised_are_there():
    assert {"hermes", "llama3", "mistral", "deepseek_v3", "harmony", "plain"} <= set(FORMATS)


# What decides, out of the templates of the families.
TEMPLATES = [
    ("", "plain"),
    ("{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}", "plain"),
    ("{{ '<tool_call>\\n{\"name\": \"' }}{{ call.name }}{{ '</tool_call>' }}", "hermes"),
    ("{{ '<think>\\n' }} {{ '</think>' }} {{ '<tool_call>' }}", "hermes"),
    ("<tool_call>\n<function=' + call.name + '>\n<parameter=' + key + '>", "qwen3_coder"),
    ("<tool_call>{{ name }}\n<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>", "glm"),
    ('Environment: ipython ... \'{"name": "\' + name + \'", "parameters": \'', "llama3"),
    ("[AVAILABLE_TOOLS] ... [TOOL_CALLS]", "mistral"),
    ("[AVAILABLE_TOOLS] ... [TOOL_CALLS] ... [ARGS]", "mistral_args"),
    ("'<\uff5ctool\u2581calls\u2581begin\uff5c>' ... '\\n' + '```json' + '\\n' ... </think>", "deepseek_v3"),
    ("'<\uff5ctool\u2581calls\u2581begin\uff5c>' + name + '<\uff5ctool\u2581sep\uff5c>' ... </think>", "deepseek_v31"),
    ("<|tool_calls_section_begin|><|tool_call_begin|>{{ id }}", "kimi_k2"),
    ("<|start|>assistant<|channel|>analysis<|message|>", "harmony"),
    ("{% set content = content.split('</think>')[-1] %}", "think"),
]


@pytest.mark.parametrize(("template", "name"), TEMPLATES)
def test_a_template_shows_its_format(template, name):
    assert detect_format(template) == name


def test_each_format_with_texts_is_found_by_them():
    for name in FORMATS:
        templates = load_format(name).templates
        assert detect_format(" ".join(templates)) == name or not templates


def test_special_tokens_count_where_there_is_no_template():
    tokens = ["<s>", "</s>", "[INST]", "[TOOL_CALLS]"]
    assert detect_format("", tokens) == "mistral"
    assert detect_format("{{ messages }}", tokens) == "plain"


def test_needs_special_tokens_is_what_the_markers_are():
    assert load_format("harmony").needs_special_tokens
    assert load_format("mistral").needs_special_tokens
    assert not load_format("hermes").needs_special_tokens


def test_parsing_imports_neither_arrays_nor_servers():
    modules = "zif.parsing.parser, zif.parsing.detection, zif.parsing.writing"
    heavy = ("torch", "transformers", "numpy", "msgspec", "zmq", "starlette")
    script = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_parse_refuses_text_after_the_end():
    parser = Parser(load_format("plain"))
    parser.finish()
    with pytest.raises(AssertionError, match="finish"):
        parser.feed("x")
    assert parse("plain", "") == []
