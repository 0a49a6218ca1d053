"""Metrics: the exposition as it stands in a file, and what each of them counts."""

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.telemetry.scripted_engine import ScriptedEngine, delta, stats
from zif.contract import SamplingParams
from zif.errors import RequestError
from zif.serving.answers import EnginePrompt, EngineState, EngineUnavailableError, OverloadedError
from zif.serving.telemetry import names
from zif.serving.telemetry.metered import AnswerWatch, MeteredEngine
from zif.serving.telemetry.metrics import Distribution, LabelledCounter, ServerMetrics
from zif.serving.telemetry.phases import PhaseTimes

GOLDEN = Path(__file__).with_name("exposition.txt")
PROMPT = EnginePrompt([1, 2, 3, 4, 5, 6, 7])
ROUTED_BY = ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc")


class Ticks:
    """A clock that goes on by a second at each look."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def samples(metrics: ServerMetrics, prefix: str = names.PREFIX) -> dict[str, float]:
    """Return the scraped values by name and own labels, without the prefix."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            own = [value for label, value in sample.labels.items() if label not in names.LABELS]
            if sample.name.startswith(prefix):
                found["/".join([sample.name.removeprefix(prefix), *own])] = sample.value
    return found


def answered(engine: ScriptedEngine, *, stop_after: int | None = None, sampling: SamplingParams | None = None):
    """Let one prompt be answered on a clock of ticks, and return the metrics."""
    metrics = ServerMetrics(engine)

    async def read() -> None:
        metered = MeteredEngine(engine, metrics, Ticks())
        async with aclosing(metered.generate(PROMPT, sampling or SamplingParams())) as deltas:
            num_read = 0
            async for _ in deltas:
                num_read += 1
                if num_read == stop_after:
                    return

    asyncio.run(read())
    return samples(metrics)


def test_exposition_is_the_golden_one() -> None:
    engine = ScriptedEngine(
        [delta(5, queue_s=0.5), delta(6, 7), delta(8, reason="stop")],
        stats=stats(num_running=2, num_waiting=3, kv_usage=0.25, num_steps=4, num_prompt_tokens=7, last_step_s=0.5),
    )
    metrics = ServerMetrics(engine, phases=lambda: {"loading weights": 1.5})

    async def read() -> None:
        metered = MeteredEngine(engine, metrics, Ticks())
        async for _ in metered.generate(PROMPT, SamplingParams(n=2, max_tokens=16)):
            pass

    asyncio.run(read())
    metrics.http_requests.add("/v1/completions", "POST", "200")
    metrics.rejections.add("queue_full")
    assert metrics.render().decode() == GOLDEN.read_text(), "names or labels changed: boards and routers read them"


def test_gauges_that_routers_need_are_there_before_the_engine_is() -> None:
    metrics = ServerMetrics(ScriptedEngine(known=None, state=EngineState.STARTING))
    for prefix in (names.PREFIX, names.ALIAS_PREFIX):
        assert [samples(metrics, prefix)[name] for name in ROUTED_BY] == [0.0, 0.0, 0.0]
    assert samples(metrics)["engine_state/starting"] == 1.0
    assert samples(metrics)["engine_state/ready"] == 0.0


def test_phases_of_a_start_are_timed_and_told() -> None:
    heard = []
    ticks = Ticks()
    phases = PhaseTimes(lambda *phase: heard.append(phase), ticks)
    calls = [("planning", 0, 1), ("planning", 0, 1), ("planning", 1, 1), ("loading", 0, 9), ("warming up", 0, 2)]
    for call in calls:
        phases(*call)
    assert heard == calls
    assert phases.seconds() == {"planning": 2.0, "loading": 1.0, "warming up": 0.0}
    ticks.now_s = 50.0
    phases("planning", 0, 1)
    phases("planning", 1, 1)
    assert phases.seconds() == {"planning": 1.0, "loading": 1.0, "warming up": 46.0}
    phases("planning", 1, 1)
    assert phases.seconds()["planning"] == 2.0
    for number in range(100):
        phases(str(number), 0, 1)
    assert len(phases.seconds()) == 64


def test_routers_find_the_block_size_and_number_in_labels() -> None:
    text = ServerMetrics(ScriptedEngine()).render().decode()
    line = 'vllm:cache_config_info{block_size="16",engine="0",model_name="tiny",num_gpu_blocks="100"} 1.0'
    assert sorted(re.findall(r'\w+="\w+"', line)) == sorted(
        re.findall(r'\w+="\w+"', next(row for row in text.splitlines() if row.startswith("vllm:cache_config_info{")))
    )


def test_other_names_can_be_left_out() -> None:
    text = ServerMetrics(ScriptedEngine(), with_aliases=False).render().decode()
    assert "vllm:" not in text
    assert "zif:num_requests_running" in text


def test_counters_stand_while_the_engine_is_down() -> None:
    engine = ScriptedEngine(stats=stats(num_generated_tokens=10, num_steps=5))
    metrics = ServerMetrics(engine)
    assert samples(metrics)["generation_tokens_total"] == 10
    engine.stats, engine.state = None, EngineState.RESTARTING
    assert samples(metrics)["generation_tokens_total"] == 10
    engine.stats = stats(num_generated_tokens=14, num_steps=6, num_restarts=1)
    assert samples(metrics)["generation_tokens_total"] == 14
    assert samples(metrics)["engine_restarts_total"] == 1


def test_a_hung_engine_is_told_from_one_that_starts() -> None:
    engine = ScriptedEngine()
    metrics = ServerMetrics(engine)
    assert samples(metrics)["engine_hung"] == 0.0
    engine.trouble = "finished no step"
    assert samples(metrics)["engine_hung"] == 1.0
    engine.state = EngineState.RESTARTING
    assert samples(metrics)["engine_hung"] == 0.0


def test_times_of_an_answer() -> None:
    script = [delta(5, queue_s=0.25), delta(6), delta(7, 8), delta(9, reason="length")]
    found = answered(ScriptedEngine(script), sampling=SamplingParams(max_tokens=50))
    assert found["time_to_first_token_seconds_sum"] == 1.0
    assert (found["inter_token_latency_seconds_count"], found["inter_token_latency_seconds_sum"]) == (4, 3.0)
    assert found["request_time_per_output_token_seconds_sum"] == 0.75
    assert found["request_queue_time_seconds_sum"] == 0.25
    assert found["request_prefill_time_seconds_sum"] == 0.75
    assert found["request_decode_time_seconds_sum"] == 3.0
    assert found["request_inference_time_seconds_sum"] == 3.75
    assert found["e2e_request_latency_seconds_sum"] == 4.0
    assert found["request_prompt_tokens_sum"] == 7
    assert found["request_generation_tokens_sum"] == 5
    assert found["request_params_max_tokens_sum"] == 50
    assert found["request_success_total/length"] == 1


def test_parallel_samples_are_timed_each_by_its_own_tokens() -> None:
    script = [delta(5), delta(6, index=1), delta(7), delta(8, index=1, reason="stop")]
    found = answered(ScriptedEngine(script), sampling=SamplingParams(n=2))
    assert found["time_to_first_token_seconds_count"] == 1
    assert (found["inter_token_latency_seconds_count"], found["inter_token_latency_seconds_sum"]) == (2, 4.0)
    assert found["request_params_n_sum"] == 2
    assert found["request_generation_tokens_sum"] == 4


def test_an_answer_nobody_waits_for_is_an_abort_and_is_closed() -> None:
    engine = ScriptedEngine([delta(5), delta(6), delta(7, reason="stop")])
    found = answered(engine, stop_after=2)
    assert found["request_success_total/abort"] == 1
    assert found["request_generation_tokens_sum"] == 2
    assert engine.closed == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OverloadedError("full", 1.0), "queue_full"),
        (EngineUnavailableError("starting"), "engine_unavailable"),
        (RequestError("too long"), "invalid"),
    ],
)
def test_refused_prompts_are_rejections_and_have_no_times(error: Exception, reason: str) -> None:
    metrics = ServerMetrics(engine := ScriptedEngine([error]))
    with pytest.raises(type(error)):
        asyncio.run(anext(MeteredEngine(engine, metrics).generate(PROMPT, SamplingParams())))
    found = samples(metrics)
    assert found[f"admission_rejections_total/{reason}"] == 1
    assert found["e2e_request_latency_seconds_count"] == 0
    assert not any(name.startswith("request_success_total") for name in found)


def test_who_is_turned_away_before_the_prompt_is_read_is_counted_too() -> None:
    metrics = ServerMetrics(engine := ScriptedEngine([OverloadedError("full", 1.0)]))
    with pytest.raises(OverloadedError):
        MeteredEngine(engine, metrics).check_room()
    assert samples(metrics)["admission_rejections_total/queue_full"] == 1


def test_an_engine_that_goes_away_while_it_answers_is_an_error() -> None:
    metrics = ServerMetrics(engine := ScriptedEngine([delta(5), EngineUnavailableError("it was restarted")]))

    async def read() -> None:
        async for _ in MeteredEngine(engine, metrics).generate(PROMPT, SamplingParams()):
            pass

    with pytest.raises(EngineUnavailableError):
        asyncio.run(read())
    assert samples(metrics)["request_success_total/error"] == 1
    assert not any(name.startswith("admission_rejections") for name in samples(metrics))


def test_the_metered_engine_passes_everything_else_on() -> None:
    engine = ScriptedEngine(stats=stats(num_steps=1), state=EngineState.DRAINING)
    metered = MeteredEngine(engine, ServerMetrics(engine))
    assert (metered.info, metered.state, metered.stats) == (engine.info, engine.state, engine.stats)
    assert metered.problem() == "draining"
    asyncio.run(metered.reset_prefix_cache())
    assert engine.resets == 1


def test_buckets_hold_their_upper_bounds() -> None:
    distribution = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        distribution.add(value)
    distribution.add(1.5, times=2)
    assert distribution.buckets() == [("1.0", 2.0), ("2.0", 6.0), ("+Inf", 7.0)]
    assert distribution.sum == 11.0


def test_labels_are_bounded() -> None:
    counter = LabelledCounter()
    for number in range(3000):
        counter.add(str(number), "POST")
    counts = dict(counter.items())
    assert len(counts) == 1001
    assert counts["other", "other"] == 2000


def table() -> Iterator[names.Name]:
    return (value for value in vars(names).values() if isinstance(value, names.Name))


def test_every_name_of_the_table_is_exposed_once_and_has_help() -> None:
    metrics = ServerMetrics(ScriptedEngine())
    text = metrics.render().decode()
    for name in table():
        suffix = "_total" if name.kind is names.Kind.COUNTER else ""
        assert text.count(f"# TYPE zif:{name.name}{suffix} {name.kind.value}\n") == 1
        assert (f"# TYPE vllm:{name.name}{suffix} " in text) == name.is_shared
        assert name.help


def test_a_token_costs_little() -> None:
    """A loose bound: the reports hold the measured figure. It fails when a label is looked up for each token."""
    watch = AnswerWatch(ServerMetrics(ScriptedEngine()), 0.0, 7)
    token = delta(5)
    watch.add(token, 1.0)
    rounds = []
    for _ in range(5):
        began = time.perf_counter_ns()
        for _ in range(2000):
            watch.add(token, 2.0)
        rounds.append((time.perf_counter_ns() - began) / 2000)
    assert min(rounds) < 10_000
