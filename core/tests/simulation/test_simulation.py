"""The simulation itself: it meets what it claims to meet, repeats exactly, and its oracle is the null platform's."""

import random
from copy import deepcopy
from dataclasses import replace

import pytest

from support.control_plane import null_model
from zif.contract import (
    CacheKey,
    EngineConfig,
    FinishReason,
    FullAttentionSpec,
    KVArena,
    KVGroup,
    Request,
    SamplingParams,
    SlidingWindowSpec,
)
from zif.errors import ConfigError
from zif.kv import PagedBlockManager
from zif.kv.tiers import TierSetup
from zif.null.platform import null_layout
from zif.null.runner import NullRunner, expected_token
from zif.scheduling import TokenBudgetScheduler
from zif.simulation import (
    Campaign,
    FaultPoint,
    FaultSchedule,
    SimulatedClock,
    SimulatedRunner,
    Simulation,
    SimulationFailure,
    Totals,
    TrafficShape,
    Words,
    draw_scenario,
    run_campaign,
    simulated_layout,
)
from zif.simulation.oracle import ExpectedText
from zif.simulation.scenario import VOCAB_SIZE

FULL = FullAttentionSpec((0,), 1, 8, 4, "float32")
SLIDING = SlidingWindowSpec((1,), 1, 8, 4, "float32", window=5)


class TestCampaign:
    def test_random_traffic_keeps_every_promise_and_meets_everything(self):
        totals = run_campaign(Campaign(seed=1000, num_steps=20_000))
        assert totals.num_steps == 20_000
        assert totals.num_cached_tokens > 2000
        assert totals.num_preemptions > 50
        assert set(totals.finished) == {"length", "stop", "abort", "error"}
        assert set(totals.strikes) == set(FaultPoint)

    def test_without_faults_every_request_gets_all_its_text(self):
        totals = run_campaign(Campaign(seed=0, num_steps=4000, faults="none"))
        assert not totals.strikes
        assert "error" not in totals.finished

    def test_the_same_seed_gives_the_same_run(self):
        assert run_campaign(Campaign(7, 2000)) == run_campaign(Campaign(7, 2000))

    @pytest.mark.slow
    def test_the_number_of_workers_changes_nothing(self):
        alone, together = (run_campaign(Campaign(7, 26_000, num_workers=workers)) for workers in (1, 2))
        assert alone == together

    def test_a_failure_names_the_command_that_repeats_it(self, monkeypatch):
        monkeypatch.setattr(PagedBlockManager, "release", lambda self, request: None)
        with pytest.raises(SimulationFailure) as caught:
            run_campaign(Campaign(40, 5000, faults="none"))
        command = str(caught.value).partition("replay with: ")[2].split()
        assert command[:2] == ["zif", "simulate"]
        options = dict(zip(command[2::2], command[3::2], strict=True))
        again = Campaign(int(options["--seed"]), int(options["--steps"]), options["--faults"])
        with pytest.raises(SimulationFailure) as repeated:
            run_campaign(again)
        assert str(repeated.value) == str(caught.value)
        run_campaign(Campaign(again.seed, again.num_steps - 1, again.faults))

    @pytest.mark.parametrize(("seed", "num_steps"), [(13, 83), (2000140, 44)])
    def test_requests_that_end_or_start_over_with_steps_under_way_are_counted_once(self, seed, num_steps):
        run_campaign(Campaign(seed, num_steps))

    def test_totals_add_up(self):
        assert Totals(1, 2) + Totals(3, 4) == Totals(4, 6)


class TestFaults:
    def test_every_point_can_be_written_and_read(self):
        text = ",".join(f"{point}@{number}" for number, point in enumerate(FaultPoint, start=1))
        assert [point for point, _ in FaultSchedule.parse(text, 0).nth] == list(FaultPoint)
        assert FaultSchedule.parse("abort@3+", 0).lasting == ((FaultPoint.ABORT, 3),)

    @pytest.mark.parametrize("text", ["", "abort", "abort@0", "abort@x", "fire@1", "abort@1,", "abort@1;step@2"])
    def test_what_is_no_fault_is_refused_by_name(self, text):
        with pytest.raises(ConfigError, match="POINT@N"):
            FaultSchedule.parse(text, 0)

    @pytest.mark.parametrize("seed", range(10))
    def test_if_no_block_is_ever_given_every_request_fails_and_nothing_hangs(self, seed):
        totals = Simulation(draw_scenario(seed), FaultSchedule.parse("allocation@1+", 0)).run(2000)
        assert set(totals.finished) <= {"error", "abort"}
        assert totals.finished["error"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("point", [*FaultPoint])
def test_a_fault_at_any_call_fails_its_request_at_most_and_leaks_nothing(point):
    words = Words(VOCAB_SIZE)
    scenario = _copying_scenario() if point is FaultPoint.TRANSFER else _long_scenario()
    undisturbed = _ends(scenario, FaultSchedule(), words)
    assert {reason for _, reason in undisturbed.values()} == {FinishReason.LENGTH, FinishReason.STOP}
    for nth in range(1, 201):
        ends = _ends(scenario, FaultSchedule(nth=((point, nth),)), words)
        assert set(ends) == set(undisturbed)
        changed = {reason for number, (text, reason) in ends.items() if (text, reason) != undisturbed[number]}
        struck = [number for number, (_, reason) in ends.items() if reason in (FinishReason.ERROR, FinishReason.ABORT)]
        if point is FaultPoint.CRASH:
            assert changed <= {FinishReason.ERROR}
        elif point in (FaultPoint.STEP, FaultPoint.NONSENSE, FaultPoint.RAISE, FaultPoint.ABORT):
            assert len(struck) <= 1
            assert changed <= {FinishReason.ERROR, FinishReason.ABORT}
        else:
            assert ends == undisturbed


def _long_scenario():
    """Return a scenario with a tight arena in which every point is reached more than 200 times."""
    shape = TrafficShape(num_arrivals=40, arrival_rate=0.15, continued_share=0.0, deadlines_s=(None,))
    return replace(draw_scenario(52, shape), max_steps_in_flight=2)


def _copying_scenario():
    """Return a scenario that loads more than 200 blocks from host memory, swapped-out requests among them."""
    shape = TrafficShape(num_arrivals=130, arrival_rate=0.3, continued_share=0.0, deadlines_s=(None,))
    scenario = draw_scenario(57, shape)
    host_bytes = 4 * scenario.arena.num_bytes
    tiers = TierSetup(host_bytes=host_bytes, host_bytes_per_s=1_000_000, prefill_tokens_per_s=1_000)
    return replace(scenario, max_steps_in_flight=2, tiers=tiers)


def _ends(scenario, faults, words):
    """Run a scenario; return the text and the reason of every request by number."""
    simulation = Simulation(scenario, faults, words)
    simulation.run()
    assert simulation.done
    assert sum(simulation.totals().strikes.values()) == len(faults.nth), "the call was never made"
    return {r.request_id: (tuple(r.token_ids), r.finish_reason) for r in simulation.requests}


class TestClock:
    def test_it_moves_only_when_told_to_and_never_back(self):
        clock = SimulatedClock(5.0)
        clock.advance(1.5)
        assert clock.now() == 6.5
        with pytest.raises(ValueError, match="cannot advance"):
            clock.advance(-1)


class TestOracle:
    @pytest.mark.parametrize("specs", [(FULL,), (SLIDING,), (FULL, SLIDING)], ids=["full", "sliding", "both"])
    def test_it_says_what_the_null_platform_says(self, specs):
        words, tokens = Words(VOCAB_SIZE), [3, 1, 4]
        text = ExpectedText(specs, words, tokens)
        for _ in range(30):
            tokens.append(text.next_token(len(tokens)))
            assert tokens[-1] == expected_token(tokens[:-1], specs, VOCAB_SIZE)

    def test_the_runner_says_what_the_null_runner_says_even_about_trampled_blocks(self):
        for seed in range(20):
            ours, theirs = _texts_of_trampled_run(seed)
            assert ours == theirs


def _texts_of_trampled_run(seed):
    """Run random plans, with blocks mixed up on purpose, through both runners."""
    chance = random.Random(seed)
    specs = (FULL, SLIDING)
    arena = KVArena(4 * 8, 60, tuple(KVGroup(spec, null_layout(spec)) for spec in specs))
    config = EngineConfig(64, 4, 12)
    blocks = PagedBlockManager(arena, enable_prefix_caching=True, max_step_tokens=12)
    scheduler = TokenBudgetScheduler(config, blocks)
    words = Words(VOCAB_SIZE)
    runners = []
    for request_id in range(4):
        prompt = [chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(1, 15))]
        scheduler.add(
            Request(request_id, prompt, len(prompt), SamplingParams(), len(prompt) + 20, cache_key=CacheKey())
        )
    for kind in (lambda: SimulatedRunner(words), lambda: NullRunner(config)):
        runner = kind()
        runner.load(null_model(specs), lambda done, total: None)
        runner.start(_own_arena(runner, arena))
        runners.append(runner)
    texts = ([], [])
    while scheduler.has_requests():
        plan = scheduler.schedule()
        for update in plan.block_updates:
            if chance.random() < 0.2:
                update.block_ids[0] = chance.randrange(1, 50)
        results = [runner.submit(deepcopy(plan)).result() for runner in runners]
        for text, result in zip(texts, results, strict=True):
            text.append(result.sampled)
        scheduler.update(plan, results[1])
    return texts


def _own_arena(runner, arena):
    """Return the same blocks in the layout that the runner wants."""
    if isinstance(runner, NullRunner):
        return arena
    groups = tuple(KVGroup(group.spec, simulated_layout(group.spec)) for group in arena.groups)
    return KVArena(arena.slab_bytes, arena.num_slabs, groups)
