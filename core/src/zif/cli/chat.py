"""`zif chat`: a conversation on the terminal, or over a pipe."""

import argparse
import contextlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zif.cli.opening import open_llm
from zif.cli.sampling_options import add_sampling_options, sampling_of
from zif.cli.setting_options import add_setting_options, print_config_if_asked, settings_of
from zif.cli.terminal import note

if TYPE_CHECKING:
    from zif.contract import SamplingParams
    from zif.engine.llm import LLM

_DEFAULT_MAX_TOKENS = 512
_HELP = "/reset forgets the conversation, /exit ends; Ctrl-C stops an answer"


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("chat", help="talk with a model", description=_HELP, allow_abbrev=False)
    parser.add_argument("--system", metavar="TEXT", help="system message that begins every conversation")
    add_sampling_options(parser, _DEFAULT_MAX_TOKENS, without={"n", "logprobs"})
    add_setting_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command until the input ends, `/exit`, or Ctrl-C while no answer is being written."""
    if print_config_if_asked(arguments):
        return 0
    settings, sampling = settings_of(arguments), sampling_of(arguments)
    with open_llm(settings) as llm:
        note(_HELP)
        with contextlib.suppress(EOFError):
            _converse(_Conversation(llm, sampling, arguments.system))
    return 0


@dataclass(slots=True)
class _Conversation:
    """The messages so far, and who answers them."""

    llm: "LLM"
    sampling: "SamplingParams"
    system: str | None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin again."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str) -> None:
        """Print the answer as it comes; an interrupted one stays in the history as far as it got."""
        self.messages.append({"role": "user", "content": text})
        shown = ""
        try:
            for output in self.llm.stream(self.llm.render_chat(self.messages), self.sampling):
                grown = output.outputs[0].text
                print(grown[len(shown) :], end="", flush=True)
                shown = grown
        except KeyboardInterrupt:
            note("\nstopped")
        finally:
            self.messages.append({"role": "assistant", "content": shown})
            print(flush=True)


def _converse(conversation: _Conversation) -> None:
    """Answer line after line. Raises `EOFError` at the end of the input."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        text = input(prompt).strip()
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
        elif text:
            conversation.answer(text)
