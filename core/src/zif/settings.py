"""The engine's settings: what can be set, in which limits, and from where.

A setting comes from the command line, from the environment (`ZIF_MAX_NUM_SEQS=8`), from a TOML file, or from its
default, in falling order of precedence. Everything is validated here and nowhere else, before any model is opened.

Not here: options of one request (`zif.contract.SamplingParams`) and what the pluggable parts see once everything is
resolved (`zif.contract.EngineConfig`). Called by the command line and by `LLM`. This module is the only place in
core that reads the environment.
"""

import difflib
import importlib.metadata
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, cast

from zif.contract import ENTRY_POINT_GROUP
from zif.errors import ConfigError
from zif.foreign_settings import FOREIGN_NAMES

ENVIRONMENT_PREFIX = "ZIF_"
SERVE_TABLE = "serve"
"""Table of a settings file, and second word of environment variables, that belong to `zif serve` alone."""
AUTO = "auto"
"""How text and TOML write None, for the options that have it: the engine chooses."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_BYTES = re.compile(r"([0-9][0-9_]{0,23}(?:\.[0-9]{1,24})?(?:e[0-9]{1,2})?)\s*([a-z]*)", re.IGNORECASE)
_SWITCH_WORDS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


class OptionKind(Enum):
    """What the value of an option is."""

    TEXT = "text"
    INTEGER = "an integer"
    BYTES = "a number of bytes such as 4294967296, '4GiB', '512MiB' or '2e9'"
    SWITCH = "true or false"


@dataclass(frozen=True, slots=True)
class Option:
    """What is known of a setting besides name and default.

    `optional` settings may be None, written "auto". `advice` is the next step after a value that is no choice.
    """

    kind: OptionKind
    help: str
    optional: bool = False
    choices: tuple[str, ...] = ()
    minimum: int = 0
    maximum: int = 2**63 - 1
    advice: str = "choose one of these"


def _text(help_text: str, default: Any = MISSING, **limits: Any) -> Any:
    return declared_setting(OptionKind.TEXT, help_text, default, **limits)


def _integer(help_text: str, default: Any, **limits: Any) -> Any:
    return declared_setting(OptionKind.INTEGER, help_text, default, **limits)


def _bytes(help_text: str, default: int | None = None) -> Any:
    return declared_setting(OptionKind.BYTES, help_text, default, minimum=1 if default is None else 0, maximum=2**60)


def _switch(help_text: str, default: bool) -> Any:
    return declared_setting(OptionKind.SWITCH, help_text, default)


def declared_setting(kind: OptionKind, help_text: str, default: Any, **limits: Any) -> Any:
    """Return the dataclass field of a setting. `limits` are those of `Option`; a default of None means auto."""
    option = Option(kind, help_text, optional=default is None, **limits)
    return field(default=default, metadata={"option": option})


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Everything that can be set on an engine. Construction validates and raises `ConfigError`."""

    model: str = _text("folder of the model, in Hugging Face format")
    tokenizer: str | None = _text("folder of the tokenizer; auto: the model's", None)
    platform: str | None = _text("platform to run on; auto: the preferred one that has a device", None)
    dtype: str = _text("type of the weights", "auto", choices=("auto", "float32", "bfloat16", "float16"))
    model_impl: str = _text(
        "who runs the model: zif's own decoder, or the Transformers library's modules", "auto",
        choices=("auto", "native", "transformers"),
    )  # fmt: skip
    max_model_len: int | None = _integer(
        "longest prompt plus output, in tokens; auto: the model's, or what KV memory holds", None,
        minimum=1, maximum=2**31 - 1,
    )  # fmt: skip
    max_num_seqs: int = _integer("most requests in one step", 256, minimum=1, maximum=2**16)
    max_num_batched_tokens: int = _integer("most tokens in one step", 2048, minimum=1, maximum=2**24)
    block_size: int | None = _integer("tokens per KV block; auto: the platform's", None, minimum=1, maximum=2**16)
    enable_prefix_caching: bool = _switch("reuse the KV of prompts that begin alike", True)
    kv_bytes: int | None = _bytes("memory for KV; auto: what fits")
    kv_cache_dtype: str = _text(
        "type of keys and values in KV; int8: scaled to 8 bits; auto: the type of the weights", "auto",
        choices=("auto", "float32", "bfloat16", "float16", "int8"),
    )  # fmt: skip
    memory_limit: int | None = _bytes("most memory to hold, weights included; auto: what the device has free")
    host_kv_bytes: int = _bytes("host memory for KV that the device has no room for", 0)
    disk_kv_bytes: int = _bytes("disk space for KV that host memory has no room for, in disk_kv_path", 0)
    disk_kv_path: str | None = _text("folder of KV on disk, found again after a restart", None)
    host_kv_bytes_per_s: int | None = _bytes("how fast KV is copied to host memory; decides who is swapped; auto: 8GB")
    prefill_tokens_per_s: int | None = _integer(
        "how fast prompts are computed; decides who is swapped; auto: 2000", None, minimum=1
    )
    scheduling_policy: str = _text(
        "order in which requests run: as they come, by priority, or in fair shares of tokens per tenant", "fcfs",
        choices=("fcfs", "priority", "fair"),
    )  # fmt: skip
    tenant_weights: str | None = _text("shares under 'fair', as in 'chat=3,batch=1'; auto: all tenants equal", None)
    tenant_cache_percent: str | None = _text(
        "most of the KV memory that cached prompts of a tenant may take, as in 'chat=50,batch=20'; auto: no limits",
        None,
    )
    max_partial_prefills: int = _integer(
        "most prompts that one step computes in part", 4, minimum=1, maximum=2**16
    )  # fmt: skip
    max_prefill_chunk: int | None = _integer(
        "most tokens of one prompt in a step while others wait for tokens; "
        "auto: max_num_batched_tokens / max_partial_prefills", None, minimum=1, maximum=2**24,
    )  # fmt: skip
    max_bypasses: int = _integer(
        "how many later requests may start before one that does not fit yet", 16, maximum=2**31 - 1
    )  # fmt: skip
    expected_output_percent: int = _integer(
        "how much of max_tokens answers are expected to use until zif has seen some; 0 admits most, 100 preempts least",
        50, maximum=100,
    )  # fmt: skip
    speculation: str = _text(
        "guess tokens ahead and check several in one step: where the text repeats itself (ngram), or never", "off",
        choices=("off", "ngram"),
    )  # fmt: skip
    max_draft_tokens: int | None = _integer(
        "most tokens guessed ahead of a request under speculation; auto: 4", None, minimum=1, maximum=64
    )  # fmt: skip
    seed: int = _integer("seed of requests that bring none", 0, minimum=0)
    trust_remote_code: bool = _switch("run Python code that comes with the model", False)
    quantization: str | None = _text(
        "round weights to integers of 8 or 4 bits while they load; auto: as the checkpoint holds them", None,
        choices=("int8", "int4"), advice="choose one of these, or leave it out: a quantized checkpoint says so itself",
    )  # fmt: skip
    batch_invariant: bool = _switch("same bits for a request whatever else runs, where the platform claims it", False)
    tensor_parallel_size: int = _integer("devices that share one model, where the platform claims it", 1, minimum=1)
    chat_template: str | None = _text("chat template, a file or the template itself; auto: the tokenizer's", None)

    def __post_init__(self) -> None:
        for declared in fields(self):
            value = checked_value(declared.name, option_of(declared), getattr(self, declared.name))
            object.__setattr__(self, declared.name, value)
        if self.kv_bytes is not None and self.memory_limit is not None and self.kv_bytes >= self.memory_limit:
            raise ConfigError(
                f"kv_bytes={self.kv_bytes!r} leaves nothing of memory_limit={self.memory_limit!r} to the weights; "
                "lower kv_bytes or raise memory_limit"
            )
        parse_tenant_percent(self.tenant_cache_percent)
        if parse_tenant_weights(self.tenant_weights) and self.scheduling_policy != "fair":
            raise ConfigError(
                f"tenant_weights={self.tenant_weights!r} have no meaning under scheduling_policy="
                f"{self.scheduling_policy!r}; choose scheduling_policy='fair' or leave them out"
            )
        self._check_tiers()
        if self.max_draft_tokens is not None and self.speculation == "off":
            raise ConfigError(
                f"max_draft_tokens={self.max_draft_tokens!r} has no meaning under speculation='off'; "
                "choose speculation='ngram' or leave it out"
            )

    def _check_tiers(self) -> None:
        """Refuse what has no meaning without a tier of KV below the device."""
        if bool(self.disk_kv_bytes) != (self.disk_kv_path is not None):
            raise ConfigError(
                f"disk_kv_bytes={self.disk_kv_bytes!r} and disk_kv_path={self.disk_kv_path!r}: give both or neither"
            )
        if self.disk_kv_bytes and not self.enable_prefix_caching:
            raise ConfigError(
                f"disk_kv_bytes={self.disk_kv_bytes!r} has no meaning with enable_prefix_caching=False: "
                "only what can be found by its prefix is kept on disk"
            )
        for name in ("host_kv_bytes_per_s", "prefill_tokens_per_s"):
            if getattr(self, name) is not None and not self.host_kv_bytes:
                raise ConfigError(f"{name}={getattr(self, name)!r} has no meaning without host_kv_bytes; leave it out")

    @classmethod
    def from_values(cls, values: Mapping[str, object]) -> "EngineSettings":
        """Build settings from loose values, as a caller's keywords give them. Refuses unknown names with advice."""
        for name in values:
            require_known(name)
        if "model" not in values:
            raise ConfigError("model is not set; name the folder of a model in Hugging Face format")
        return cls(**cast("dict[str, Any]", values))


@dataclass(frozen=True, slots=True)
class ResolvedSettings:
    """Settings with where each came from, and what looked odd on the way."""

    settings: EngineSettings
    origins: Mapping[str, str]
    warnings: tuple[str, ...] = ()


def setting_fields() -> "tuple[Field[Any], ...]":
    """Return the declared settings in order; `option_of` gives what is known of each."""
    return fields(EngineSettings)


def option_of(declared: "Field[Any]") -> Option:
    """Return what is known of a declared setting."""
    return cast("Option", declared.metadata["option"])


def parse_bytes(text: str) -> int:
    """Read "4GiB", "512 MiB", "2e9" or "4294967296". Raises `ValueError` on anything else."""
    match = _BYTES.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is no number of bytes")
    number = match[1].replace("_", "")
    return int(number) * unit if number.isdigit() else int(float(number) * unit)


def parse_tenant_weights(text: str | None) -> tuple[tuple[str, int], ...]:
    """Read "chat=3,batch=1"; nothing when None. Raises `ConfigError` on anything else."""
    return _parse_tenants("tenant_weights", text, range(1, 10**6), "a weight of 1 to 999999, as in 'chat=3,batch=1'")


def parse_tenant_percent(text: str | None) -> tuple[tuple[str, int], ...]:
    """Read "chat=50,batch=20"; nothing when None. Raises `ConfigError` on anything else."""
    return _parse_tenants(
        "tenant_cache_percent", text, range(101), "a percentage of 0 to 100, as in 'chat=50,batch=20'"
    )


def require_known(name: str) -> None:
    """Raise `ConfigError` with advice unless `name` is a setting."""
    known = [declared.name for declared in setting_fields()]
    if name in known:
        return
    if advice := foreign_name_advice(name):
        raise ConfigError(f"{name}: {advice}")
    raise ConfigError(f"{name} is no setting of zif{nearest(name, known)}; `zif generate --help` lists them all")


def foreign_name_advice(name: str) -> str | None:
    """Return what to use instead of another engine's option, or None when `name` is not one that zif knows of."""
    return FOREIGN_NAMES.get(name)


def resolve_settings(
    cli: Mapping[str, object], environ: Mapping[str, str] | None = None, toml_path: Path | None = None
) -> ResolvedSettings:
    """Merge command line over environment over file over defaults.

    `cli` holds only what was given. `environ` None reads the process's environment. `ZIF_<PLUGIN>_...` belongs to the
    installed plugin of that name; another unknown `ZIF_` variable is a warning, because it may belong to a plugin that
    is installed elsewhere. An unknown key in the file raises `ConfigError`.
    """
    defaults = [d for d in setting_fields() if d.default is not MISSING]
    values: dict[str, object] = {d.name: d.default for d in defaults}
    origins = {d.name: "default" for d in defaults}
    variables = os.environ if environ is None else environ
    warnings = _unknown_variables(variables)
    layers = [*_read_toml(toml_path), *_read_environment(variables)]
    layers += [(name, value, "command line") for name, value in cli.items()]
    for name, value, origin in layers:
        values[name] = _parsed(name, value, origin)
        origins[name] = origin
    return ResolvedSettings(EngineSettings.from_values(values), origins, warnings)


def format_settings(resolved: ResolvedSettings) -> str:
    """Print settings as TOML that `resolve_settings` reads back, each with its origin in a comment."""
    lines = []
    for declared in setting_fields():
        value = getattr(resolved.settings, declared.name)
        text = json.dumps(AUTO if value is None else value, ensure_ascii=False).replace("\x7f", "\\u007f")
        lines.append(f"{declared.name} = {text}  # {_one_line(resolved.origins.get(declared.name, 'default'))}")
    return "\n".join(lines)


def read_settings_file(path: Path) -> dict[str, Any]:
    """Return the tables of a settings file. Raises `ConfigError` when it cannot be read or is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {str(path)!r}: {error.strerror}; check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the settings file {str(path)!r} is no valid TOML: {error}") from error


def _read_toml(path: Path | None) -> list[tuple[str, object, str]]:
    if path is None:
        return []
    return [(name, value, f"file {path}") for name, value in read_settings_file(path).items() if name != SERVE_TABLE]


def _read_environment(variables: Mapping[str, str]) -> list[tuple[str, object, str]]:
    known = {ENVIRONMENT_PREFIX + name.upper(): name for name in [d.name for d in setting_fields()] + [*FOREIGN_NAMES]}
    return [(known[v], text, f"environment {v}") for v, text in variables.items() if v in known]


def _unknown_variables(variables: Mapping[str, str]) -> tuple[str, ...]:
    known = [ENVIRONMENT_PREFIX + d.name.upper() for d in setting_fields()]
    foreign = [ENVIRONMENT_PREFIX + name.upper() for name in FOREIGN_NAMES]
    unknown = [v for v in variables if v.startswith(ENVIRONMENT_PREFIX) and v not in known and v not in foreign]
    if unknown:
        plugins = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        owners = [SERVE_TABLE, *(plugin.name for plugin in plugins)]
        reserved = tuple(f"{ENVIRONMENT_PREFIX}{owner.upper()}_" for owner in owners)
        unknown = [v for v in unknown if not v.startswith(reserved)]
    return tuple(f"environment variable {v} is no setting of zif's core{nearest(v, known)}" for v in sorted(unknown))


def _parsed(name: str, value: object, origin: str) -> object:
    """Read one value of a source, so that what is wrong is reported with the source it came from."""
    try:
        require_known(name)
        declared = next(d for d in setting_fields() if d.name == name)
        option = option_of(declared)
        if isinstance(value, str) and not origin.startswith("file"):
            value = value_of_text(name, option, value)
        return checked_value(name, option, value)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error


def value_of_text(name: str, option: Option, text: str) -> object:
    """Return what the text of a command line or an environment variable stands for, unchecked."""
    word = text.strip()
    if option.kind is OptionKind.SWITCH and word.lower() in _SWITCH_WORDS:
        return _SWITCH_WORDS[word.lower()]
    if option.kind is OptionKind.INTEGER and re.fullmatch(r"-?[0-9]{1,30}", word):
        return int(word)
    return text


def checked_value(name: str, option: Option, value: object) -> object:
    """Return the value as it is used, or raise `ConfigError` that names the setting and its limits."""
    if option.optional and (value is None or value == AUTO):
        return None
    if isinstance(value, os.PathLike) and option.kind is OptionKind.TEXT:
        value = os.fspath(value)
    if option.kind is OptionKind.BYTES and isinstance(value, str):
        value = _bytes_of(name, value)
    _check_type(name, option, value)
    if option.choices and value not in option.choices:
        expected = f"{', '.join(option.choices)}{nearest(str(value), list(option.choices))}"
        raise ConfigError(f"{name}={value!r} is none of {expected}; {option.advice}")
    return value


def _parse_tenants(name: str, text: str | None, legal: range, expected: str) -> tuple[tuple[str, int], ...]:
    if text is None:
        return ()
    entries = [entry.rpartition("=") for entry in text.split(",")]
    numbers = {tenant.strip(): number.strip() for tenant, _, number in entries}
    is_legal = all(re.fullmatch(r"[0-9]{1,6}", number) and int(number) in legal for number in numbers.values())
    if not is_legal or "" in numbers or len(numbers) < len(entries):
        raise ConfigError(f"{name}={text!r} must name each tenant once with {expected}")
    return tuple((tenant, int(number)) for tenant, number in numbers.items())


def _bytes_of(name: str, text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} must be {OptionKind.BYTES.value}, or {AUTO!r}") from None


def _check_type(name: str, option: Option, value: object) -> None:
    expected = {OptionKind.TEXT: str, OptionKind.SWITCH: bool}.get(option.kind, int)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ConfigError(f"{name}={value!r} must be {option.kind.value}{' or auto' if option.optional else ''}")
    if isinstance(value, int) and not isinstance(value, bool) and not option.minimum <= value <= option.maximum:
        raise ConfigError(f"{name}={value!r} is out of range: give {option.minimum} to {option.maximum}")
    if isinstance(value, str) and not value.strip():
        raise ConfigError(f"{name} is empty; give a value or leave it out")


def nearest(name: str, known: list[str]) -> str:
    """Return the advice " (did you mean ...?)", or nothing when no known name is near."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""


def _one_line(text: str) -> str:
    return text if text.isprintable() else repr(text)
