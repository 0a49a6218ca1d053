"""What bounds an engine process: queue, silence, restarts and waiting. The command line fills these in."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from zif.serving.telemetry.kv_events import KVEventSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Limits of an engine process.

    `max_queued` samples may wait beside those that run, with `max_queued_tokens` prompt tokens beside those that KV
    memory holds. An engine with work that finishes no step, or any that says nothing, for `step_limit_s` is hung; it
    reports every `report_s`. One that stays hung for `kill_hung_s` more is killed and started again, 0: never.
    `close_s` is how long it may take to end before it is killed.
    """

    max_queued: int = 1024
    max_queued_tokens: int = 2**20
    step_limit_s: float = 8.0
    kill_hung_s: float = 60.0
    report_s: float = 0.5
    close_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartLimits:
    """When a crashed engine is started again: after `first_delay_s`, doubled with every crash of the last `window_s`.

    More than `max_restarts` crashes within the window are a crash loop: it stays down.
    """

    max_restarts: int = 3
    window_s: float = 300.0
    first_delay_s: float = 0.2
    max_delay_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessOptions:
    """How an engine process is run.

    `name` is the served model's, its folder's by default. `kv_events` says where changes of the prefix cache are
    published, None: nowhere. `command` is the program that serves, None: zif's own.
    """

    limits: EngineLimits = field(default_factory=EngineLimits)
    restarts: RestartLimits = field(default_factory=RestartLimits)
    name: str | None = None
    kv_events: KVEventSettings | None = None
    command: Sequence[str] | None = None
