"""Chat templates against transformers' apply_chat_template, and what is refused."""

import json
import re
from datetime import datetime
from itertools import product

import pytest
from transformers import AutoTokenizer

from support.tiny_tokenizer import write_tokenizer
from zif.errors import ModelError, RequestError
from zif.text.chat import ChatOptions, ChatTemplates, load_chat_templates, render_chat

CHATML = """{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

HEADERS = """{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('unexpected role ' ~ message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

TOOLS = """{%- if tools %}
    {{- '<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n' }}
{%- endif %}
{%- set ns = namespace(calls=0) %}
{% for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if message.content is none %}{% continue %}{% endif %}
        {{- '[result ' ~ ns.calls ~ '] ' ~ message.content }}
    {%- elif message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- set ns.calls = ns.calls + 1 %}
            {{- '[call] ' ~ call.function.name ~ ' ' ~ call.function.arguments | tojson(indent=1) }}
        {%- endfor %}
    {%- else %}
        {{- '[' ~ message.role ~ '] ' ~ message.content }}
    {%- endif %}
    {%- if message.reasoning_content is defined %} ({{ message.reasoning_content }}){% endif %}
    {{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""

PARTS = """{% for message in messages %}{{ message.role }}:
{%- if message.content is string %} {{ message.content }}
{% else %}{% for part in message['content'] %} <{{ part.type }}> {{ part.text }}{% endfor %}

{% endif %}{% endfor %}"""

TEMPLATES = {"ChatML": CHATML, "headers": HEADERS, "tools": TOOLS, "parts": PARTS}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the <weather> & more, auf Wunsch für Köln",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CHATS = {
    "short": [{"role": "user", "content": "Hello!"}],
    "long": [
        {"role": "system", "content": "  Be brief.\n"},
        {"role": "user", "content": "What is <b>2 + 2</b>? "},
        {"role": "assistant", "content": " It is 4. "},
        {"role": "user", "content": "Danke schön 中文 {{ messages }} {% endif %}"},
    ],
    "open": [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one, two,  "}],
    "calls": [
        {"role": "user", "content": "Weather?", "name": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
        },
        {"role": "tool", "content": '{"degrees": 7.5}', "tool_call_id": "1"},
        {"role": "assistant", "content": "7.5 degrees", "reasoning": "look it up"},
    ],
}
MODES = {
    "prompt": {"add_generation_prompt": True},
    "no prompt": {"add_generation_prompt": False},
    "continue": {"add_generation_prompt": False, "continue_final_message": True},
    "tools": {"tools": [WEATHER], "add_generation_prompt": True},
}


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path)
    return tmp_path


def set_template(folder, template):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def render(template, messages, **options):
    return render_chat(ChatTemplates({"default": template}), messages, ChatOptions(**options))


def user(content):
    return [{"role": "user", "content": content}]


class TestEqualToTransformers:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(("template", "chat"), [*product(TEMPLATES, ["short", "long", "open"]), ("tools", "calls")])
    def test_rendering(self, folder, template, chat, mode):
        set_template(folder, TEMPLATES[template])
        expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(CHATS[chat], tokenize=False, **MODES[mode])
        assert render_chat(load_chat_templates(folder), CHATS[chat], ChatOptions(**MODES[mode])) == expected

    def test_content_parts(self, folder):
        set_template(folder, PARTS)
        chat = user([{"type": "text", "text": "a"}, {"type": "text", "text": "b "}])
        theirs = AutoTokenizer.from_pretrained(folder)
        for mode in ("no prompt", "continue"):
            expected = theirs.apply_chat_template(chat, tokenize=False, **MODES[mode])
            assert render_chat(load_chat_templates(folder), chat, ChatOptions(**MODES[mode])) == expected

    def test_variables_reach_the_template(self, folder):
        set_template(folder, CHATML)
        options = ChatOptions(variables={"enable_thinking": False})
        expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            CHATS["short"], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert render_chat(load_chat_templates(folder), CHATS["short"], options) == expected
        assert "<think>" in expected

    @pytest.mark.parametrize("with_tools", [False, True])
    @pytest.mark.parametrize("layout", ["file", "file over configuration", "files", "list", "template folder only"])
    def test_where_templates_are_kept(self, folder, layout, with_tools):
        set_template(folder, "configuration")
        if layout in ("file", "file over configuration", "files"):
            (folder / "chat_template.jinja").write_text("file {{ messages[0].content }}")
        if layout == "file":
            set_template(folder, None)
        if layout in ("files", "template folder only"):
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text("with {{ tools }}")
        if layout == "template folder only":
            (folder / "additional_chat_templates" / "default.jinja").write_text("default of the folder")
        if layout == "list":
            named = {"default": "the default", "tool_use": "with {{ tools }}", "rag": "other"}
            set_template(folder, [{"name": name, "template": template} for name, template in named.items()])
        tools = [WEATHER] if with_tools else None
        theirs = AutoTokenizer.from_pretrained(folder)
        expected = theirs.apply_chat_template(CHATS["short"], tokenize=False, tools=tools)
        ours = render_chat(
            load_chat_templates(folder), CHATS["short"], ChatOptions(add_generation_prompt=False, tools=tools)
        )
        assert ours == expected


class TestBesides:
    def test_text_parts_become_one_string_for_a_template_of_strings(self):
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        assert "user\none\ntwo<|im_end|>" in render(CHATML, user(parts))

    def test_messages_are_not_changed(self):
        chat = user([{"type": "text", "text": "a"}])
        render(PARTS, chat, add_generation_prompt=False, continue_final_message=True)
        assert chat == user([{"type": "text", "text": "a"}])

    def test_the_date_is_today(self):
        assert datetime.now().strftime("%d %b %Y") in render(HEADERS, user("a"), variables={"bos_token": ""})

    def test_a_text_with_the_words_of_the_mark_is_kept(self):
        text = "CONTINUE_FINAL_MESSAGE_HERE and more"
        rendered = render(
            "{{ messages[0].content }}!", user(text), continue_final_message=True, add_generation_prompt=False
        )
        assert rendered == text


class TestRefused:
    @pytest.mark.parametrize(
        ("messages", "what"),
        [
            ([], "non-empty list"),
            ("hello", "non-empty list"),
            (None, "non-empty list"),
            ({"role": "user", "content": "a"}, "non-empty list"),
            (["hello"], r"messages\[0\]='hello'"),
            ([{"role": "user", "content": "a"}, {"content": "b"}], r"messages\[1\] has role None"),
            ([{"role": 3, "content": "a"}], "has role 3"),
            ([{"role": "user"}], "has content None"),
            ([{"role": "user", "content": 7}], "has content 7"),
            (user([{"type": "image", "url": "x"}]), "content part .*only"),
            (user(["a"]), "content part 'a'"),
            ([{"role": "user", "content": "a", "extra": object()}], "value of type object"),
        ],
    )
    def test_messages_of_another_form(self, messages, what):
        with pytest.raises(RequestError, match=what):
            render(CHATML, messages)

    @pytest.mark.parametrize(
        ("template", "what"),
        [
            ("{% if %}", "not valid Jinja"),
            ("{{ raise_exception('only users') }}", "only users"),
            ("{{ messages[0].content + 3 }}", "TypeError"),
            ("{{ messages[5].content.x }}", "UndefinedError"),
            ("{{ messages.append(3) }}", "SecurityError"),
            ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
            ("{{ namespace(__class__=1) }}", "SecurityError"),
            ("{% set n = namespace(a=1) %}{% set n.__init__ = 1 %}", "not valid Jinja|SecurityError"),
            ("{% for i in range(10 ** 9) %}a{% endfor %}", "OverflowError"),
        ],
    )
    def test_templates_that_fail_or_reach_out(self, template, what):
        with pytest.raises(RequestError, match=what):
            render(template, user("a"))

    def test_endless_output(self, monkeypatch):
        monkeypatch.setattr("zif.text.chat.MAX_PROMPT_CHARACTERS", 1000)
        with pytest.raises(RequestError, match="more than 1000 characters"):
            render("{% for i in range(99999) %}{% for j in range(99999) %}abc{% endfor %}{% endfor %}", user("a"))

    def test_a_model_without_template(self, folder):
        set_template(folder, None)
        with pytest.raises(RequestError, match=r"no chat template.*chat_template\.jinja.*give a template"):
            render_chat(load_chat_templates(folder), CHATS["short"])

    def test_a_model_without_default(self, folder):
        set_template(folder, [{"name": "rag", "template": "x"}])
        with pytest.raises(RequestError, match="only: rag"):
            render_chat(load_chat_templates(folder), CHATS["short"])

    def test_a_broken_configuration(self, folder):
        set_template(folder, 5)
        with pytest.raises(ModelError, match=r"chat_template of tokenizer_config\.json is 5"):
            load_chat_templates(folder)
        (folder / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ModelError, match=re.escape("chat_template.jinja")):
            load_chat_templates(folder)

    def test_options_that_exclude_each_other(self):
        with pytest.raises(RequestError, match="exclude each other"):
            render(CHATML, user("a"), continue_final_message=True)

    @pytest.mark.parametrize(
        ("template", "last"),
        [
            ("nothing of the messages", {"content": "a"}),
            ("{{ messages[0].content | upper }}", {"content": "abc"}),
            (TOOLS, {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}),
        ],
    )
    def test_a_last_message_that_cannot_be_continued(self, template, last):
        chat = [{"role": "assistant", **last}]
        with pytest.raises(RequestError, match="continue_final_message is set, but"):
            render(template, chat, continue_final_message=True, add_generation_prompt=False)
