"""The server's metrics: what was counted, and how Prometheus reads it.

Counting happens on the event loop, by attribute: no label is looked up for a token. The registry is the server's own,
and `render` makes the text of a scrape. Each metric is kept once and written under both prefixes (`names.py`).
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from zif.serving.answers import EngineState, EngineStats, EngineUnavailableError, ModelInfo
from zif.serving.telemetry import names
from zif.serving.telemetry.names import Name

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MAX_LABEL_SETS = 1000
"""Label values are ours and few; this holds if one day they are not."""


class WatchedEngine(Protocol):
    """What of an `EngineClient` is read at a scrape."""

    @property
    def info(self) -> ModelInfo:
        """Return what is served. Raises `EngineUnavailableError` before the first start has ended."""
        ...

    @property
    def state(self) -> EngineState:
        """Return where the engine stands."""
        ...

    @property
    def stats(self) -> EngineStats | None:
        """Return the last counts that the engine sent, those of its earlier processes included."""
        ...

    def problem(self) -> str | None:
        """Return why the engine is not ready to answer, None when it is."""
        ...


class Distribution:
    """A histogram with fixed bounds. Upper bounds belong to their bucket."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value, or several equal ones."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    @property
    def sum(self) -> float:
        """Return the sum of all values."""
        return self._sum

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, values up to it) for every bucket, as the exposition has them."""
        total, buckets = 0, []
        for bound, count in zip((*map(_bound_text, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets


class LabelledCounter:
    """A counter with labels. Bind a child once where it is counted often."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[tuple[str, ...], int] = {}

    def add(self, *labels: str) -> None:
        """Count one more. Beyond a thousand sets of labels all new ones are counted as "other"."""
        counts = self._counts
        if labels not in counts and len(counts) >= _MAX_LABEL_SETS:
            labels = ("other",) * len(labels)
        counts[labels] = counts.get(labels, 0) + 1

    def items(self) -> Iterable[tuple[tuple[str, ...], int]]:
        """Return (labels, count) pairs, in the order of first sight."""
        return self._counts.items()


class ServerMetrics:
    """All metrics of one server.

    `with_aliases` writes shared ones under the other prefix too. `phases` gives the seconds of the phases of the start.
    """

    def __init__(
        self,
        engine: WatchedEngine,
        *,
        with_aliases: bool = True,
        phases: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self._engine = engine
        self._phases = phases
        self._with_aliases = with_aliases
        self._totals = dict.fromkeys(names.FROM_ENGINE, 0)
        distributions = {name: Distribution(name.bounds) for name in names.HISTOGRAMS}
        self._distributions = distributions
        self._counters = {name: LabelledCounter() for name in names.COUNTED_BY_LABEL}
        self.first_token_s = distributions[names.FIRST_TOKEN_S]
        self.inter_token_s = distributions[names.INTER_TOKEN_S]
        self.per_token_s = distributions[names.PER_TOKEN_S]
        self.e2e_s = distributions[names.E2E_S]
        self.queue_s = distributions[names.QUEUE_S]
        self.prefill_s = distributions[names.PREFILL_S]
        self.decode_s = distributions[names.DECODE_S]
        self.inference_s = distributions[names.INFERENCE_S]
        self.prompt_tokens = distributions[names.REQUEST_PROMPT]
        self.generation_tokens = distributions[names.REQUEST_GENERATION]
        self.params_n = distributions[names.PARAMS_N]
        self.params_max_tokens = distributions[names.PARAMS_MAX_TOKENS]
        self.successes = self._counters[names.SUCCESSES]
        self.rejections = self._counters[names.REJECTIONS]
        self.http_requests = self._counters[names.HTTP_REQUESTS]
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)  # type: ignore[arg-type, unused-ignore]

    def render(self) -> bytes:
        """Return the text of a scrape."""
        return bytes(generate_latest(self._registry))

    def collect(self) -> Iterator[Any]:
        """Yield every metric family; called by the registry."""
        self._follow_engine()
        shared = self._shared_labels()
        prefixes = (names.PREFIX, names.ALIAS_PREFIX) if self._with_aliases else (names.PREFIX,)
        for prefix in prefixes:
            for name, family in self._families(prefix, shared):
                if name.is_shared or prefix == names.PREFIX:
                    yield family

    def _follow_engine(self) -> None:
        """Take over the engine's counts. While it is down there are none, and the last ones stand."""
        stats = self._engine.stats
        if stats is not None:
            self._totals = {name: getattr(stats, stat) for name, stat in names.FROM_ENGINE.items()}

    def _shared_labels(self) -> tuple[str, ...]:
        info = self._info()
        return (info.name if info else "", "0")

    def _info(self) -> ModelInfo | None:
        try:
            return self._engine.info
        except EngineUnavailableError:
            return None

    def _families(self, prefix: str, shared: tuple[str, ...]) -> Iterator[tuple[Name, Any]]:
        for name, samples in self._gauges().items():
            gauge = GaugeMetricFamily(prefix + name.name, name.help, labels=(*names.LABELS, *name.labels))
            for labels, value in samples:
                gauge.add_metric((*shared, *labels), value)
            yield name, gauge
        for name, counted in self._counts().items():
            counter = CounterMetricFamily(prefix + name.name, name.help, labels=(*names.LABELS, *name.labels))
            for labels, count in counted:
                counter.add_metric((*shared, *labels), count)
            yield name, counter
        for name, distribution in self._distributions.items():
            histogram = HistogramMetricFamily(prefix + name.name, name.help, labels=names.LABELS)
            histogram.add_metric(shared, distribution.buckets(), distribution.sum)
            yield name, histogram

    def _gauges(self) -> "dict[Name, list[tuple[tuple[str, ...], float]]]":
        """Return the samples of every gauge. Routers need them from the start on: before the first counts all are 0."""
        stats, info, state = self._engine.stats, self._info(), self._engine.state
        config: list[tuple[tuple[str, ...], float]] = []
        if info is not None:
            config = [((str(info.block_size), str(info.num_kv_blocks)), 1.0)]
        return {
            names.NUM_RUNNING: [((), float(stats.num_running if stats else 0))],
            names.NUM_WAITING: [((), float(stats.num_waiting if stats else 0))],
            names.WAITING_BY_REASON: [(("capacity",), float(stats.num_waiting if stats else 0)), (("deferred",), 0.0)],
            names.KV_USAGE: [((), stats.kv_usage if stats else 0.0)],
            names.LAST_STEP_S: [((), stats.last_step_s if stats else 0.0)],
            names.CACHE_CONFIG: config,
            names.STARTUP_S: [((phase,), seconds) for phase, seconds in self._phases().items()],
            names.ENGINE_HUNG: [((), float(state is EngineState.READY and self._engine.problem() is not None))],
            names.ENGINE_STATE: [((known.value,), float(known is state)) for known in EngineState],
        }

    def _counts(self) -> "dict[Name, Iterable[tuple[tuple[str, ...], int]]]":
        from_engine = {name: [((), total)] for name, total in self._totals.items()}
        by_label = {name: counter.items() for name, counter in self._counters.items()}
        return {**from_engine, **by_label}


def _bound_text(bound: float) -> str:
    return str(float(bound))
