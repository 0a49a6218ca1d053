"""Chat templates: messages to one prompt, as the model's authors wrote it down in Jinja.

Renders the templates that checkpoints ship, in the dialect that transformers defines for them. Not a tokenizer: the
text has its special tokens, so encode it with `add_special_tokens=False`. The engine calls it for chats.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zif.errors import ModelError, RequestError
from zif.text.tokenizer_files import read_json_object, read_tokenizer_files

if TYPE_CHECKING:
    import jinja2

MAX_PROMPT_CHARACTERS = 2**24
"""More than any context holds; a template that loops must not fill the memory."""

CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_HERE "
"""Ends the final message while rendering. The space shows whether the template strips messages."""

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """The templates of a model by name ("default", "tool_use"), and its special tokens, which templates may name."""

    sources: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def choose(self, with_tools: bool) -> str:
        """Return the template for a chat with or without tools. Raises RequestError when there is none."""
        if with_tools and "tool_use" in self.sources:
            return self.sources["tool_use"]
        if "default" in self.sources:
            return self.sources["default"]
        if self.sources:
            names = ", ".join(sorted(self.sources))
            raise RequestError(f"the model has no default chat template, only: {names}; give one of them as template")
        raise RequestError(
            "the model has no chat template: its folder has neither chat_template.jinja nor a chat_template in"
            " tokenizer_config.json; give a template, or send the prompt as text"
        )


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a chat is rendered.

    `add_generation_prompt` ends the prompt with the header of an answer; `continue_final_message` leaves the last
    message open, so that the model goes on with it. `tools` are JSON schemas. `variables` go to the template as they
    are, such as `enable_thinking`.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


def load_chat_templates(path: Path) -> ChatTemplates:
    """Read the chat templates of the model folder `path`; files of their own go before tokenizer_config.json.

    Raises ModelError for a file that cannot be read. A model without templates is no error.
    """
    named = read_tokenizer_files(path).named
    special_tokens = {name: token.content for name, token in named.items()}
    files = {"default": path / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    sources = {name: _read_text(file) for name, file in files.items() if file.is_file()}
    if not sources:
        sources = _templates_of(read_json_object(path / "tokenizer_config.json").get("chat_template"))
    return ChatTemplates(sources, special_tokens)


def render_chat(templates: ChatTemplates, messages: Sequence[Message], options: ChatOptions | None = None) -> str:
    """Render messages as the prompt of the model.

    A message has a role and a content: a string, or parts {"type": "text", "text": ...}, which become one string for
    a template that expects one. Raises RequestError for messages or options that the template does not take.
    """
    from zif.text import chat_environment

    options = options or ChatOptions()
    source = templates.choose(bool(options.tools))
    template = chat_environment.compile_template(source)
    chat = _prepare(messages, joined=not chat_environment.reads_content_parts(source))
    if options.continue_final_message:
        if options.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other: the first leaves the last"
                " message open, the second begins a new one; set add_generation_prompt=False"
            )
        final_text = _mark_final_message(chat)
    variables = {**templates.special_tokens, **chat_environment.plain(options.variables)}
    variables |= {
        "messages": chat,
        "tools": chat_environment.plain(options.tools),
        "documents": variables.get("documents"),
        "add_generation_prompt": options.add_generation_prompt,
    }
    prompt = _render(template, variables)
    return _cut_at_mark(prompt, final_text) if options.continue_final_message else prompt


def _render(template: "jinja2.Template", variables: Mapping[str, Any]) -> str:
    pieces, size = [], 0
    for piece in _pieces(template, variables):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_PROMPT_CHARACTERS:
            raise RequestError(
                f"the chat template wrote more than {MAX_PROMPT_CHARACTERS} characters; send shorter messages"
            )
    return "".join(pieces)


def _pieces(template: "jinja2.Template", variables: Mapping[str, Any]) -> Iterator[str]:
    try:
        yield from template.generate(**variables)
    except Exception as error:  # a template is a program: wrong messages make it raise anything
        raise RequestError(f"the chat template refused the messages: {type(error).__name__}: {error}") from error


def _prepare(messages: Sequence[Message], joined: bool) -> list[dict[str, Any]]:
    """Return copies of checked messages; `joined` makes one string of a list of text parts."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(f"messages={messages!r} must be a non-empty list of messages, each with role and content")
    return [_prepare_message(index, message, joined) for index, message in enumerate(messages)]


def _prepare_message(index: int, message: Message, joined: bool) -> dict[str, Any]:
    from zif.text import chat_environment

    if not isinstance(message, Mapping):
        raise RequestError(f"messages[{index}]={message!r} must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"messages[{index}] has role {role!r}; give a string such as 'user'")
    # Many templates would print None; a missing key they know.
    chat_message = {key: chat_environment.plain(value) for key, value in message.items() if value is not None}
    content = chat_message.get("content")
    if isinstance(content, list):
        texts = [_part_text(index, part) for part in content]
        chat_message["content"] = "\n".join(texts) if joined else content
    elif not isinstance(content, str) and (content is not None or not chat_message.get("tool_calls")):
        raise RequestError(f"messages[{index}] has content {content!r}; give a string or a list of text parts")
    return _with_reasoning(chat_message)


def _part_text(index: int, part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise RequestError(
            f'messages[{index}] has the content part {part!r}; only {{"type": "text", "text": "..."}} is supported'
        )
    text: str = part["text"]
    return text


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Give a message's reasoning under the names that templates read, whichever name it came under."""
    reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _mark_final_message(chat: list[dict[str, Any]]) -> str:
    """Append the mark to the text of the last message, in place, and return the text without it."""
    final = chat[-1]
    content = final.get("content")
    if isinstance(content, str):
        final["content"] = content + CONTINUE_MARK
        return content
    if not content:
        raise RequestError("continue_final_message is set, but the last message has no content to continue")
    text: str = content[-1]["text"]
    final["content"] = [*content[:-1], {**content[-1], "text": text + CONTINUE_MARK}]
    return text


def _cut_at_mark(prompt: str, final_text: str) -> str:
    at = prompt.rfind(CONTINUE_MARK.strip())
    if at < 0 or final_text.strip() not in prompt:
        raise RequestError(
            "continue_final_message is set, but the chat template leaves out or changes the last message;"
            " use add_generation_prompt with this model"
        )
    kept = prompt[:at]
    # A template that strips messages would have stripped the end of this one too.
    return kept if prompt.startswith(CONTINUE_MARK, at) else kept.rstrip()


def _templates_of(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, Mapping) and all(isinstance(source, str) for source in value.values()):
        return dict(value)
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
        return {name: source for name, source in named.items() if isinstance(name, str) and isinstance(source, str)}
    raise ModelError(f"chat_template of tokenizer_config.json is {value!r}; it must be a string or named templates")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{file.name} of {str(file.parent)!r} cannot be read: {error}; download it again") from error
