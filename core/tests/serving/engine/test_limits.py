"""Admission, restarts and the judgement of progress, on a clock of the test's own."""

from itertools import pairwise

from serving.telemetry.scripted_engine import stats
from zif.serving.engine.admission import MAX_RETRY_S, MIN_RETRY_S, Admission, Capacity
from zif.serving.engine.limits import RestartLimits
from zif.serving.engine.progress import HangTimer, ProgressWatch
from zif.serving.engine.supervision import RestartPolicy
from zif.serving.engine.totals import TotalsOverRestarts


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


CAPACITY = Capacity(max_running=2, max_running_tokens=50, max_queued=3, max_queued_tokens=50)


def test_samples_fill_places_and_queue():
    admission = Admission(CAPACITY, Clock())
    for _ in range(5):
        assert admission.refusal(1, 1) is None
        admission.add(1, 1)
    assert "limit is 5" in admission.refusal(1, 1)
    admission.remove(1, 1)
    assert admission.refusal(1, 1) is None
    assert "limit is 5" in admission.refusal(2, 1)


def test_prompt_tokens_fill_memory_and_queue():
    admission = Admission(CAPACITY, Clock())
    assert admission.refusal(1, 500) is None, "an idle engine says itself what is too long"
    admission.add(1, 90)
    assert admission.refusal(1, 10) is None
    assert "limit is 100" in admission.refusal(1, 11)


def test_more_samples_than_ever_fit_are_no_matter_of_time():
    admission = Admission(CAPACITY, Clock())
    assert admission.impossible(5) is None
    assert "n=6" in admission.impossible(6)


def test_the_time_to_come_again_follows_the_pace():
    clock = Clock()
    admission = Admission(Capacity(10, 10**6, 1000, 10**6), clock)
    assert admission.retry_after_s() == MIN_RETRY_S
    admission.add(510, 510)
    for _ in range(10):
        clock.now += 0.1
        admission.remove(1, 1)
    assert 20 < admission.retry_after_s() < 30, "250 of 490 that wait, 10 a second"
    clock.now += 1000
    assert admission.retry_after_s() == MAX_RETRY_S


def test_restarts_back_off_and_stop_at_a_crash_loop():
    clock = Clock()
    policy = RestartPolicy(RestartLimits(max_restarts=3, window_s=300, first_delay_s=0.5, max_delay_s=30), clock)
    delays = [policy.delay_after_crash() for _ in range(4)]
    assert delays[3] is None
    assert all(later > earlier for earlier, later in pairwise(delays[:3]))


def test_old_crashes_are_forgotten():
    clock = Clock()
    policy = RestartPolicy(RestartLimits(max_restarts=3, window_s=300), clock)
    for _ in range(20):
        assert policy.delay_after_crash() is not None
        clock.now += 101


def test_an_idle_engine_that_reports_is_well():
    clock = Clock()
    watch = ProgressWatch(10.0, clock)
    for _ in range(100):
        clock.now += 5
        watch.heard()
        assert watch.problem(has_work=False) is None


def test_a_silent_engine_is_not():
    clock = Clock()
    watch = ProgressWatch(10.0, clock)
    clock.now += 10.5
    assert "said nothing for 10.5 s" in watch.problem(has_work=False)
    watch.heard()
    assert watch.problem(has_work=False) is None


def test_reports_without_steps_are_no_progress():
    clock = Clock()
    watch = ProgressWatch(10.0, clock)
    watch.begin()
    for _ in range(11):
        clock.now += 1
        watch.heard()
    assert "finished no step" in watch.problem(has_work=True)
    assert watch.problem(has_work=False) is None
    watch.moved()
    assert watch.problem(has_work=True) is None


def test_work_after_a_long_rest_is_given_its_time():
    clock = Clock()
    watch = ProgressWatch(10.0, clock)
    clock.now += 1000
    watch.heard()
    watch.begin()
    assert watch.problem(has_work=True) is None


def test_a_hang_is_long_when_every_look_for_long_has_seen_it():
    timer = HangTimer(limit_s=3.0, period_s=1.0)
    looks = [True, True, False, True, True, True, True, False]
    assert [timer.look(has_problem=look) for look in looks] == [False] * 6 + [True, False]
    never = HangTimer(limit_s=0.0, period_s=1.0)
    assert not any(never.look(has_problem=True) for _ in range(1000))


def test_counts_go_on_when_a_new_process_counts_from_nothing():
    totals = TotalsOverRestarts()
    totals.take(stats(num_generated_tokens=4, num_running=2))
    totals.take(stats(num_generated_tokens=10, num_steps=5, num_running=2))
    totals.begin_anew()
    # The new one has done more than the old one by the time that anybody looks: smaller counts would be no sign of it.
    seen = totals.take(stats(num_generated_tokens=12, num_steps=6, num_running=1))
    assert (seen.num_generated_tokens, seen.num_steps, seen.num_running, seen.num_restarts) == (22, 11, 1, 1)
    totals.begin_anew()
    totals.begin_anew()
    assert totals.take(stats(num_generated_tokens=1)).num_generated_tokens == 23
