"""`zif batch`: a file of requests in OpenAI's form, answered by the handlers of `zif serve` without a socket."""

import argparse
import asyncio
import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import Field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from zif.cli.setting_options import add_declared_options, add_setting_options, resolved_settings_of
from zif.cli.terminal import StartProgress, note, warn
from zif.errors import ConfigError
from zif.serving.http.settings import (
    ResolvedServeSettings,
    ServeSettings,
    format_serve_settings,
    resolve_api_settings,
    serve_setting_fields,
)
from zif.settings import EngineSettings, format_settings

if TYPE_CHECKING:
    from zif.serving.batch.journal import Journal
    from zif.serving.batch.run import Survey
    from zif.serving.engine.client import ProcessEngine

_API_SETTINGS = (
    "served_model_name",
    "answer_format",
    "strict",
    "max_body_bytes",
    "max_body_bytes_in_flight",
    "max_json_depth",
    "max_json_values",
    "hang_after_s",
    "kill_hung_after_s",
)
_STANDARD_STREAM = "-"
_EXIT_FAILED, _EXIT_INTERRUPTED, _EXIT_TERMINATED = 1, 130, 143
_MAX_CRASHES, _CRASH_WINDOW_S = 9, 3600.0
"""Each request that the engine does not outlive takes three crashes to be found."""


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("batch", help="answer a file of requests", allow_abbrev=False)
    group = parser.add_argument_group(
        "files", "JSON lines in the form of OpenAI's batch files; -: standard input, output"
    )
    group.add_argument("--input", required=True, metavar="FILE", help="requests")
    group.add_argument(
        "--output", required=True, metavar="FILE", help="answers; what is in the file already is not asked again"
    )
    group.add_argument("--errors", metavar="FILE", help="answers to requests that failed (default: with the others)")
    group.add_argument("--ordered", action="store_true", help="write answers in the order of the requests")
    group.add_argument("--fail-on-error", action="store_true", help="exit code 1 when any request failed")
    add_setting_options(parser)
    add_declared_options(
        parser.add_argument_group("API settings", "those of zif serve, from the same places"), _api_setting_fields()
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Interrupted, it keeps what is answered and returns 130."""
    try:
        engine, serving = resolved_settings_of(arguments), _serving_of(arguments)
        for warning in (*engine.warnings, *serving.warnings):
            warn(warning)
        if arguments.print_config:
            print(format_settings(engine))
            print(format_serve_settings(serving))
            return 0
        return _Command(arguments, engine.settings, serving.settings).run()
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == "zif":
            raise
        raise ConfigError(f"{error.name} is not installed; install what batches need with 'zif[serve]'") from error


def _api_setting_fields() -> "list[Field[Any]]":
    return [declared for declared in serve_setting_fields() if declared.name in _API_SETTINGS]


def _serving_of(arguments: argparse.Namespace) -> ResolvedServeSettings:
    given = {name: value for name, value in vars(arguments).items() if name in _API_SETTINGS}
    return resolve_api_settings(given, toml_path=arguments.config)


class _Command:
    """One run of the command."""

    def __init__(self, arguments: argparse.Namespace, engine: EngineSettings, serving: ServeSettings) -> None:
        from zif.serving.batch.run import Tally

        self._arguments = arguments
        self._engine = engine
        self._serving = serving
        self._tally = Tally()
        self._terminated = False

    def run(self) -> int:
        """Look over the files, answer what is not answered, and return the exit code."""
        from zif.serving.batch.journal import Journal
        from zif.serving.batch.requests import read_requests
        from zif.serving.batch.run import survey

        if not Path(self._engine.model, "config.json").is_file():
            raise ConfigError(
                f"model={self._engine.model!r} is no folder with a config.json; name one in Hugging Face format"
            )
        with (
            _opened(self._arguments.input) as requests,
            contextlib.closing(Journal(self._arguments.output, self._arguments.errors)) as journal,
        ):
            found = survey(read_requests(requests, self._serving.max_body_bytes), journal)
            if found.num_done:
                note(f"{found.num_done} of {found.num_requests} requests are answered already")
            code = 0
            try:
                if found.num_done < found.num_requests:
                    code = self._answer(requests, journal, found)
            finally:
                self._conclude()
            failed = self._tally.num_failed + journal.num_failed
            return _EXIT_FAILED if not code and failed and self._arguments.fail_on_error else code

    def _conclude(self) -> None:
        """Say what came of it."""
        if unknown := self._tally.unknown_fields:
            warn(f"fields that are not known were passed over: {', '.join(unknown)}; --strict refuses them")
        note(self._tally.summary())

    def _answer(self, requests: BinaryIO, journal: "Journal", found: "Survey") -> int:
        try:
            asyncio.run(self._run(requests, journal, found))
        except (KeyboardInterrupt, asyncio.CancelledError):
            note("stopped: answers so far are kept, and the same command goes on from there")
            return _EXIT_TERMINATED if self._terminated else _EXIT_INTERRUPTED
        return 0

    async def _run(self, requests: BinaryIO, journal: "Journal", found: "Survey") -> None:
        from tqdm import tqdm

        from zif.errors import EngineError
        from zif.serving.answers import EngineUnavailableError
        from zif.serving.batch.app_calls import AppCaller
        from zif.serving.batch.patience import PatientEngine
        from zif.serving.batch.requests import read_requests
        from zif.serving.batch.run import BatchRun, RunLimits
        from zif.serving.engine.admission import capacity_of
        from zif.serving.http.app import build_app
        from zif.serving.http.assembly import open_apis

        self._hear_terminate()
        settings = self._serving
        async with self._process_engine() as started:
            try:
                await started.wait_ready()
            except EngineUnavailableError as error:
                raise EngineError(str(error)) from error
            capacity = capacity_of(started.info, settings.max_queued_requests, settings.max_queued_tokens)
            engine = PatientEngine(started, capacity)
            async with open_apis(engine, settings) as routes:
                caller = AppCaller(build_app(engine, settings, routes))
                remaining = found.num_requests - found.num_done
                with tqdm(total=remaining, unit="request", disable=not sys.stderr.isatty()) as bar:
                    self._tally.begin()

                    def on_answer() -> None:
                        bar.set_postfix_str(
                            f"{self._tally.num_failed} failed, {self._tally.rate():.1f} tokens/s", False
                        )
                        bar.update()

                    # Twice what runs: as many are ready as may end together.
                    limits = RunLimits(
                        max_running=min(2 * started.info.max_num_seqs, capacity.max_samples),
                        max_body_bytes=settings.max_body_bytes_in_flight,
                        ordered=self._arguments.ordered,
                    )
                    given = read_requests(requests, settings.max_body_bytes)
                    await BatchRun(caller, engine, journal, self._tally, on_answer).run(given, limits)

    def _process_engine(self) -> "ProcessEngine":
        from zif.serving.engine.client import ProcessEngine
        from zif.serving.engine.limits import EngineLimits, ProcessOptions, RestartLimits

        settings = self._serving
        limits = EngineLimits(
            max_queued=settings.max_queued_requests,
            max_queued_tokens=settings.max_queued_tokens,
            step_limit_s=settings.hang_after_s,
            kill_hung_s=settings.kill_hung_after_s,
        )
        restarts = RestartLimits(max_restarts=_MAX_CRASHES, window_s=_CRASH_WINDOW_S)
        name = settings.model_names(Path(self._engine.model).resolve().name)[0]
        return ProcessEngine(self._engine, ProcessOptions(limits=limits, restarts=restarts, name=name), StartProgress())

    def _hear_terminate(self) -> None:
        """End as on Ctrl-C when told to by SIGTERM."""
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"

        def stop() -> None:
            self._terminated = True
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)


@contextlib.contextmanager
def _opened(name: str) -> Iterator[BinaryIO]:
    """Open a file of requests. What cannot be read twice is kept in a temporary file. Raises `ConfigError`."""
    with contextlib.ExitStack() as stack:
        try:
            source = sys.stdin.buffer if name == _STANDARD_STREAM else stack.enter_context(Path(name).open("rb"))
            if name == _STANDARD_STREAM or not source.seekable():
                kept = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(source, kept)
                source = kept
        except OSError as error:
            raise ConfigError(f"cannot read the file {name!r}: {error.strerror}; check the path") from error
        yield source
