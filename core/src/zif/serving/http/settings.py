"""The server's own settings: where it listens, whom it lets in, and how much of anything it takes.

From the command line, from the environment (`ZIF_SERVE_PORT=8080`), from the `[serve]` table of the TOML file that also
holds the engine's settings, or from defaults, in falling order of precedence. Keys of callers come from a file or from
`ZIF_SERVE_API_KEY`, never from the command line, which other users of the machine can read.

Not here: the engine's settings (`zif.settings`). This module is the only place of the server that reads the
environment.
"""

import ipaddress
import json
import os
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zif.errors import ConfigError
from zif.settings import (
    AUTO,
    ENVIRONMENT_PREFIX,
    SERVE_TABLE,
    OptionKind,
    checked_value,
    declared_setting,
    nearest,
    option_of,
    read_settings_file,
    setting_fields,
    value_of_text,
)

if TYPE_CHECKING:
    from zif.serving.http.auth import KeyRing

SERVE_PREFIX = f"{ENVIRONMENT_PREFIX}{SERVE_TABLE.upper()}_"
KEY_VARIABLE = f"{SERVE_PREFIX}API_KEY"
_MAX_KEY_FILE_BYTES = 2**20
_WITHOUT_SOCKET = {"host": "127.0.0.1", "uds": "auto", "api_key_file": "auto", "allowed_hosts": "*"}
_HOST_NAME = re.compile(r"[a-z0-9_][a-z0-9._-]{0,252}")


def _text(help_text: str, default: str | None = None, **limits: Any) -> Any:
    return declared_setting(OptionKind.TEXT, help_text, default, **limits)


def _integer(help_text: str, default: int, minimum: int = 1, maximum: int = 2**31 - 1) -> Any:
    return declared_setting(OptionKind.INTEGER, help_text, default, minimum=minimum, maximum=maximum)


def _bytes(help_text: str, default: int, minimum: int, maximum: int = 2**31 - 1) -> Any:
    return declared_setting(OptionKind.BYTES, help_text, default, minimum=minimum, maximum=maximum)


def _switch(help_text: str, default: bool) -> Any:
    return declared_setting(OptionKind.SWITCH, help_text, default)


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Everything that can be set on the server. Construction validates and raises `ConfigError`."""

    host: str = _text("address to listen on", "127.0.0.1")
    port: int = _integer("port to listen on; 0: any free one", 8000, minimum=0, maximum=65535)
    uds: str | None = _text("Unix socket to listen on, in place of host and port")
    served_model_name: str | None = _text(
        "names that requests may give the model, with commas between; auto: the folder's"
    )
    api_key_file: str | None = _text(f"file of keys, one a line; {KEY_VARIABLE} holds a single one")
    insecure: bool = _switch("allow others than this machine without a key", False)
    allowed_hosts: str | None = _text(
        "names that the header 'host' may give the server, with commas between; '*': any; auto: those of this machine "
        "where only it can connect and needs no key, else any"
    )
    public_metrics: bool = _switch("serve /metrics without a key", False)
    tls_certificate: str | None = _text("certificate chain in PEM, for HTTPS")
    tls_key: str | None = _text("private key of the certificate, in PEM")
    strict: bool = _switch("refuse requests with fields that are not known, in place of naming them in a header", False)
    max_body_bytes: int = _bytes("longest body of a request", 8 * 2**20, minimum=1024)
    max_body_bytes_in_flight: int = _bytes(
        "most bytes of the bodies of all requests under way; more are answered 503", 256 * 2**20, 1024, 2**40
    )
    max_json_depth: int = _integer("deepest nesting of a body", 64, minimum=4, maximum=256)
    max_json_values: int = _integer("most values and keys in a body", 2**18, minimum=64, maximum=2**26)
    max_header_bytes: int = _bytes("longest request line and headers together", 16 * 2**10, minimum=1024, maximum=2**20)
    max_headers: int = _integer("most headers of a request", 64, minimum=8, maximum=1024)
    max_connections: int = _integer("most connections; more are closed at once", 4096)
    max_queued_requests: int = _integer("most requests that wait for the engine; more are answered 429", 1024)
    max_queued_tokens: int = _integer("most prompt tokens that wait for the engine", 2**24)
    header_timeout_s: int = _integer("longest that the headers of a request may take", 10)
    body_timeout_s: int = _integer("longest that a body may take, and a second more for each 64 KiB of it", 10)
    idle_timeout_s: int = _integer("longest that a connection is kept without a request", 75)
    write_timeout_s: int = _integer("longest that a client may refuse to read before it is cut off", 60)
    event_keep_alive_s: int = _integer("longest silence in a stream before a comment is sent", 10)
    drain_s: int = _integer("longest that requests under way may go on after SIGTERM", 30, minimum=0)
    hang_after_s: int = _integer("time without a step, while there is work, after which the engine is not ready", 8)
    kill_hung_after_s: int = _integer(
        "time that an engine may stay so before it is killed and started again; 0: for ever", 60, minimum=0
    )
    vllm_metrics: bool = _switch("also expose metrics under the names that public boards and routers read", True)
    answer_format: str | None = _text(
        "format of tool calls and reasoning in answers; auto: what the chat template writes"
    )
    log_requests: bool = _switch("log one line for each request, without content", True)
    kv_events_endpoint: str | None = _text("where to publish KV events, as in ipc:///run/zif/events; auto: nowhere")
    kv_events_replay_endpoint: str | None = _text("where readers of KV events ask for those they missed")
    kv_events_topic: str | None = _text("topic of KV events, as in kv@pod@model; auto: empty")
    kv_events_key_folder: str | None = _text("folder of CURVE keys, which KV events over tcp:// need")

    def __post_init__(self) -> None:
        for declared in fields(self):
            value = checked_value(declared.name, option_of(declared), getattr(self, declared.name))
            object.__setattr__(self, declared.name, value)
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError(
                f"tls_certificate={self.tls_certificate!r} and tls_key={self.tls_key!r}: give both or neither"
            )
        if self.served_model_name is not None and not all(self.model_names("")):
            raise ConfigError(f"served_model_name={self.served_model_name!r} has an empty name; leave it out")
        if self.max_body_bytes > self.max_body_bytes_in_flight:
            raise ConfigError(
                f"max_body_bytes={self.max_body_bytes} is more than max_body_bytes_in_flight="
                f"{self.max_body_bytes_in_flight}, which all bodies share; lower it or raise the other"
            )
        for name in self.host_names():
            if name != "*" and not _HOST_NAME.fullmatch(name) and not _is_address(name):
                raise ConfigError(
                    f"allowed_hosts={self.allowed_hosts!r}: {name!r} is no name or address; "
                    "give them without scheme and port, as in 'llm.example.org,192.0.2.1'"
                )

    def model_names(self, default: str) -> tuple[str, ...]:
        """Return the names that requests may use, the first of which answers carry. `default`: where none is set."""
        if self.served_model_name is None:
            return (default,)
        return tuple(name.strip() for name in self.served_model_name.split(","))

    def host_names(self) -> tuple[str, ...]:
        """Return what `allowed_hosts` lists: names and addresses in lower case, or '*'."""
        if self.allowed_hosts is None:
            return ()
        return tuple(name.strip().lower() for name in self.allowed_hosts.split(","))

    def is_local(self) -> bool:
        """Say whether only this machine can connect."""
        if self.uds is not None or self.host == "localhost":
            return True
        return _is_address(self.host.strip("[]")) and ipaddress.ip_address(self.host.strip("[]")).is_loopback


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class ResolvedServeSettings:
    """The server's settings with where each came from, the keys of callers, and what looked odd on the way."""

    settings: ServeSettings
    keys: "KeyRing"
    origins: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def serve_setting_fields() -> "tuple[Field[Any], ...]":
    """Return the declared settings in order; `zif.settings.option_of` gives what is known of each."""
    return fields(ServeSettings)


def resolve_serve_settings(
    cli: Mapping[str, object], environ: Mapping[str, str] | None = None, toml_path: Path | None = None
) -> ResolvedServeSettings:
    """Merge command line over environment over the file's `[serve]` over defaults, and read the keys.

    `cli` holds only what was given. `environ` None reads the process's environment. Raises `ConfigError` on unknown
    keys of the file, values out of range, keys that cannot be read, and an open address without a key.
    """
    variables = os.environ if environ is None else environ
    values: dict[str, object] = {}
    origins = {declared.name: "default" for declared in serve_setting_fields()}
    layers = [*_read_table(toml_path), *_read_environment(variables)]
    layers += [(name, value, "command line") for name, value in cli.items()]
    for name, value, origin in layers:
        values[name] = _parsed(name, value, origin)
        origins[name] = origin
    settings = ServeSettings(**values)  # type: ignore[arg-type]
    keys = _read_keys(settings, variables)
    if not settings.is_local() and not keys and not settings.insecure:
        raise ConfigError(
            f"host={settings.host!r} can be reached from other machines and there is no key: set {KEY_VARIABLE} or "
            "--api-key-file, listen on 127.0.0.1, or allow everybody with --insecure"
        )
    return ResolvedServeSettings(settings, keys, origins, _unknown_variables(variables))


def resolve_api_settings(
    cli: Mapping[str, object], environ: Mapping[str, str] | None = None, toml_path: Path | None = None
) -> ResolvedServeSettings:
    """Merge the settings as `resolve_serve_settings` does, for handlers that are called without a socket.

    Nobody connects, so nothing that guards a socket is looked at: no keys are read, and there are none.
    """
    variables = os.environ if environ is None else environ
    without_key = {name: value for name, value in variables.items() if name != KEY_VARIABLE}
    return resolve_serve_settings({**cli, **_WITHOUT_SOCKET}, without_key, toml_path)


def format_serve_settings(resolved: ResolvedServeSettings) -> str:
    """Print settings as the `[serve]` table that is read back, each with its origin. Keys are counted, not shown."""
    lines = [f"[{SERVE_TABLE}]"]
    for declared in serve_setting_fields():
        value = getattr(resolved.settings, declared.name)
        text = json.dumps(AUTO if value is None else value, ensure_ascii=False).replace("\x7f", "\\u007f")
        lines.append(f"{declared.name} = {text}  # {resolved.origins[declared.name]}")
    return "\n".join([*lines, f"# API keys: {len(resolved.keys)}"])


def _read_table(path: Path | None) -> list[tuple[str, object, str]]:
    if path is None:
        return []
    table = read_settings_file(path).get(SERVE_TABLE, {})
    if not isinstance(table, dict):
        raise ConfigError(f"file {path}: {SERVE_TABLE} must be a table, as in [{SERVE_TABLE}]")
    return [(name, value, f"file {path}") for name, value in table.items()]


def _read_environment(variables: Mapping[str, str]) -> list[tuple[str, object, str]]:
    known = {SERVE_PREFIX + declared.name.upper(): declared.name for declared in serve_setting_fields()}
    return [(known[v], text, f"environment {v}") for v, text in variables.items() if v in known]


def _unknown_variables(variables: Mapping[str, str]) -> tuple[str, ...]:
    known = [KEY_VARIABLE, *(SERVE_PREFIX + declared.name.upper() for declared in serve_setting_fields())]
    unknown = sorted(v for v in variables if v.startswith(SERVE_PREFIX) and v not in known)
    return tuple(f"environment variable {v} is no setting of zif's server{nearest(v, known)}" for v in unknown)


def _parsed(name: str, value: object, origin: str) -> object:
    declared = {d.name: d for d in serve_setting_fields()}
    if name not in declared:
        engine = name in {d.name for d in setting_fields()}
        advice = "; it is the engine's: put it above the table" if engine else nearest(name, list(declared))
        raise ConfigError(f"{origin}: {name} is no setting of the server{advice}; `zif serve --help` lists them all")
    option = option_of(declared[name])
    try:
        if isinstance(value, str) and not origin.startswith("file"):
            value = value_of_text(name, option, value)
        return checked_value(name, option, value)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error


def _read_keys(settings: ServeSettings, variables: Mapping[str, str]) -> "KeyRing":
    # Here, as every `zif` command line reads the declarations above and not all installations have the server's extra.
    from zif.serving.http.auth import parse_keys

    lines = []
    if settings.api_key_file is not None:
        lines += _key_file_lines(settings.api_key_file)
    key = variables.get(KEY_VARIABLE)
    if key is not None and (not key.strip() or key.strip().startswith("#")):
        raise ConfigError(
            f"{KEY_VARIABLE} is set and holds no key; give it one that does not begin with '#', or unset it"
        )
    lines += [] if key is None else [key]
    return parse_keys(lines)


def _key_file_lines(path: str) -> list[str]:
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_KEY_FILE_BYTES + 1)
        if len(content) > _MAX_KEY_FILE_BYTES:
            raise ConfigError(f"api_key_file={path!r} is longer than {_MAX_KEY_FILE_BYTES} bytes; name another file")
        lines = content.decode("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read api_key_file={path!r}: {error.strerror}; check path and permissions") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"api_key_file={path!r} is no text in UTF-8; write one key a line") from error
    if not any(line.strip() and not line.lstrip().startswith("#") for line in lines):
        raise ConfigError(f"api_key_file={path!r} holds no key; write one a line, or leave the setting out")
    return lines
