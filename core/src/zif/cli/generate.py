"""`zif generate`: complete prompts, streaming one or working through many."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zif.cli.opening import open_llm
from zif.cli.prompts import Prompt, add_prompt_options, read_prompts
from zif.cli.sampling_options import add_sampling_options, sampling_of
from zif.cli.setting_options import add_setting_options, print_config_if_asked, settings_of
from zif.cli.terminal import Tally, note
from zif.errors import ConfigError

if TYPE_CHECKING:
    from zif.contract import SamplingParams
    from zif.engine.llm import LLM
    from zif.engine.outputs import RequestOutput

_DEFAULT_MAX_TOKENS = 128
_EXIT_ERROR, _EXIT_INTERRUPTED = 1, 130

Write = Callable[[int, "RequestOutput"], None]


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("generate", help="complete one or more prompts", allow_abbrev=False)
    add_prompt_options(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write results as JSON lines instead of text")
    add_sampling_options(parser, _DEFAULT_MAX_TOKENS)
    add_setting_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Interrupted, it keeps what is finished and returns 130."""
    if print_config_if_asked(arguments):
        return 0
    settings, sampling, prompts = settings_of(arguments), sampling_of(arguments), read_prompts(arguments)
    if sampling.logprobs is not None and arguments.output is None:
        raise ConfigError("log-probabilities are written to JSON lines only; give --output FILE with --logprobs")
    tally = Tally()
    with _writer(arguments.output) as write, open_llm(settings) as llm:
        begin = time.perf_counter()
        if len(prompts) == 1 and sampling.n == 1 and arguments.output is None:
            _stream(llm, prompts[0], sampling, tally)
        else:
            _work_through(llm, prompts, sampling, tally, write)
        note(tally.summary(time.perf_counter() - begin))
    return _exit_code(tally)


def _stream(llm: "LLM", prompt: Prompt, sampling: "SamplingParams", tally: Tally) -> None:
    """Print the text of one request as it comes; Ctrl-C ends it."""
    last: RequestOutput | None = None
    num_shown = 0
    with contextlib.suppress(KeyboardInterrupt):
        for last in llm.stream(prompt, sampling):
            text = last.outputs[0].text
            print(text[num_shown:], end="", flush=True)
            num_shown = len(text)
    print(flush=True)
    if last is None:
        tally.interrupted = True
    else:
        tally.add(last)


def _work_through(llm: "LLM", prompts: list[Prompt], sampling: "SamplingParams", tally: Tally, write: Write) -> None:
    """Answer many prompts, writing each answer once those before it are written. Ctrl-C keeps what is finished."""
    from tqdm import tqdm

    with tqdm(total=len(prompts), unit="prompt", disable=not sys.stderr.isatty()) as bar:
        try:
            for index, output in enumerate(llm.generate(iter(prompts), sampling)):
                tally.add(output)
                if any(sample.finish_reason != "abort" for sample in output.outputs):
                    write(index, output)
                bar.update()
        except KeyboardInterrupt:
            tally.interrupted = True


def _exit_code(tally: Tally) -> int:
    """Report what failed or was interrupted."""
    for error in tally.errors:
        note(f"error: {error}")
    if tally.interrupted:
        note("interrupted")
        return _EXIT_INTERRUPTED
    return _EXIT_ERROR if tally.errors else 0


@contextlib.contextmanager
def _writer(path: Path | None) -> Iterator[Write]:
    """Open where results go: a file of JSON lines, or text on standard output."""
    if path is None:
        yield _print_text
        return
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the output file {str(path)!r}: {error.strerror}; choose another") from error
    with file:
        yield lambda index, output: print(json.dumps(_as_json(index, output), ensure_ascii=False), file=file)


def _print_text(index: int, output: "RequestOutput") -> None:
    for sample in output.outputs:
        label = f"{index}" if len(output.outputs) == 1 else f"{index}.{sample.index}"
        prompt = f"{len(output.prompt_token_ids)} token ids" if output.prompt is None else repr(output.prompt)
        sys.stdout.write(f"[{label}] {prompt}\n{sample.text}\n")
    sys.stdout.flush()


def _as_json(index: int, output: "RequestOutput") -> dict[str, Any]:
    return {
        "index": index,
        "prompt": output.prompt,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "outputs": [_sample_as_json(sample) for sample in output.outputs],
    }


def _sample_as_json(sample: Any) -> dict[str, Any]:
    entry = {
        "text": sample.text,
        "token_ids": list(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
    }
    if sample.error is not None:
        entry["error"] = sample.error
    if sample.logprobs is not None:
        entry["logprobs"] = [
            {str(token_id): value.logprob for token_id, value in position.items()} for position in sample.logprobs
        ]
    return entry
