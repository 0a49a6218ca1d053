"""`zif serve`: the OpenAI, Anthropic and Responses APIs over HTTP."""

import argparse
import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zif.cli.setting_options import add_declared_options, add_setting_options, resolved_settings_of
from zif.cli.terminal import StartProgress, warn
from zif.errors import ConfigError
from zif.serving.http.settings import (
    KEY_VARIABLE,
    ResolvedServeSettings,
    ServeSettings,
    format_serve_settings,
    resolve_serve_settings,
    serve_setting_fields,
)
from zif.settings import EngineSettings, format_settings

if TYPE_CHECKING:
    from zif.serving.engine.client import ProcessEngine
    from zif.serving.telemetry.kv_events import KVEventSettings
    from zif.serving.telemetry.line_writer import LineWriter
    from zif.serving.telemetry.phases import PhaseTimes


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("serve", help="serve a model over HTTP", allow_abbrev=False)
    add_setting_options(parser)
    group = parser.add_argument_group(
        "server settings", f"also as ZIF_SERVE_NAME in the environment, or under [serve] in a --config file; "
        f"keys come from {KEY_VARIABLE} or --api-key-file only"
    )  # fmt: skip
    add_declared_options(group, serve_setting_fields())
    group.add_argument("--dry-run", action="store_true", help="check every setting, and exit")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Returns when the server was told to stop, or cannot go on."""
    engine = resolved_settings_of(arguments)
    names = {declared.name for declared in serve_setting_fields()}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    try:
        serving = resolve_serve_settings(given, toml_path=arguments.config)
        for warning in (*engine.warnings, *serving.warnings):
            warn(warning)
        if arguments.print_config:
            print(format_settings(engine))
            print(format_serve_settings(serving))
        if arguments.dry_run or arguments.print_config:
            return _check(engine.settings, serving)
        return _serve(engine.settings, serving)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == "zif":
            raise
        raise ConfigError(f"{error.name} is not installed; install what the server needs with 'zif[serve]'") from error


def _check(engine: EngineSettings, serving: ResolvedServeSettings) -> int:
    """Check what can be checked without starting anything."""
    from zif.serving.http.sockets import tls_context

    tls_context(serving.settings)
    _kv_events(serving.settings)
    _require_model(engine.model)
    return 0


def _require_model(model: str) -> None:
    if not Path(model, "config.json").is_file():
        raise ConfigError(f"model={model!r} is no folder with a config.json; name one in Hugging Face format")


def _serve(engine: EngineSettings, serving: ResolvedServeSettings) -> int:
    from zif.serving.telemetry.line_writer import LineWriter, unlocked_stderr

    _require_model(engine.model)
    lines = LineWriter(unlocked_stderr())
    # At the root, so that what libraries warn of does not wait for its reader either.
    logging.getLogger().addHandler(lines)
    logging.getLogger("zif").setLevel(logging.INFO)
    if serving.settings.insecure and not serving.keys and not serving.settings.is_local():
        warn("anybody who can reach this machine may use the model: there is no key")
    try:
        return asyncio.run(_run(engine, serving, lines))
    finally:
        logging.getLogger().removeHandler(lines)
        lines.close()


async def _run(engine: EngineSettings, serving: ResolvedServeSettings, lines: "LineWriter") -> int:
    from zif.serving.http.assembly import open_apis
    from zif.serving.http.server import ServerParts, StopSignals, serve
    from zif.serving.telemetry.phases import PhaseTimes

    stop = StopSignals()
    stop.install()
    phases = PhaseTimes(StartProgress(lines.write))
    parts = ServerParts(
        _process_engine(engine, serving, phases), open_apis, lambda text: lines.write(f"{text}\n"), stop, phases
    )
    return await serve(serving, parts)


def _process_engine(engine: EngineSettings, serving: ResolvedServeSettings, phases: "PhaseTimes") -> "ProcessEngine":
    """Return the engine's process, with the limits that the server's settings give it; `phases` hears of its start."""
    from zif.serving.engine.client import ProcessEngine
    from zif.serving.engine.limits import EngineLimits, ProcessOptions

    settings = serving.settings
    limits = EngineLimits(
        max_queued=settings.max_queued_requests,
        max_queued_tokens=settings.max_queued_tokens,
        step_limit_s=settings.hang_after_s,
        kill_hung_s=settings.kill_hung_after_s,
    )
    name = settings.model_names(Path(engine.model).resolve().name)[0]
    options = ProcessOptions(limits=limits, name=name, kv_events=_kv_events(settings))
    return ProcessEngine(engine, options, phases)


def _kv_events(settings: ServeSettings) -> "KVEventSettings | None":
    """Return where KV events go. Raises `ConfigError` for what would not work or would leak."""
    from zif.serving.telemetry.kv_events import KVEventSettings

    others = (settings.kv_events_replay_endpoint, settings.kv_events_topic, settings.kv_events_key_folder)
    if settings.kv_events_endpoint is None:
        if any(others):
            raise ConfigError("settings of KV events have no meaning without kv_events_endpoint; give one")
        return None
    folder = settings.kv_events_key_folder
    return KVEventSettings(
        settings.kv_events_endpoint,
        settings.kv_events_replay_endpoint,
        settings.kv_events_topic or "",
        None if folder is None else Path(folder),
    )
