"""Workers: what they answer, what their limits end, and that nothing of them is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.structured_forms import HOSTILE_GRAMMARS, HOSTILE_REGEXES, HOSTILE_SCHEMAS
from zif.contract import StructuredOutput
from zif.errors import RequestError
from zif.serving.answers import EngineUnavailableError, OverloadedError
from zif.serving.workers.messages import GrammarTask, RenderTask, TaskName
from zif.serving.workers.pool import GrammarVocabulary, WorkerLimits, WorkerPool
from zif.text.chat import ChatOptions, ChatTemplates, render_chat

MODEL = Path(__file__).resolve().parents[4] / "examples" / "embedded_model" / "checkpoint"
VOCABULARY = GrammarVocabulary(str(MODEL), 3072, [0])
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ extra }}"
MESSAGES = [{"role": "user", "content": "naïve"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def with_pool(use, vocabulary=VOCABULARY, num_workers=1, **limits):
    """Run `use` with a pool that has started; the pool must be closed to its last process afterwards."""

    async def run():
        pool = WorkerPool(vocabulary, num_workers, WorkerLimits(**limits))
        await pool.start()
        try:
            return await use(pool)
        finally:
            await pool.close()
            pids = pool.worker_pids
            assert pids == []

    return asyncio.run(run())


def templates(source=TEMPLATE):
    return ChatTemplates({"default": source}, {"bos_token": "<s>"})


async def reason_of(work):
    """Return why a request was refused."""
    with pytest.raises(RequestError) as caught:
        await work
    return str(caught.value)


def is_running(pid):
    """Say whether a process runs; one that only waits for its parent to hear of its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_rendering_is_that_of_the_library():
    options = ChatOptions(add_generation_prompt=False, tools=[{"name": "f"}], variables={"extra": [1, {"a": None}]})

    async def use(pool):
        return await pool.render(templates(), MESSAGES, options)

    assert with_pool(use, None) == render_chat(templates(), MESSAGES, options)


def test_what_the_template_refuses_is_refused_with_its_reason():
    async def use(pool):
        refused = await reason_of(
            pool.render(templates("{{ raise_exception('no system role') }}"), MESSAGES, ChatOptions())
        )
        nonsense = await reason_of(pool.render(templates(), [{"role": 5}], ChatOptions()))
        return refused, nonsense, await pool.render(templates(), MESSAGES, ChatOptions())

    refused, nonsense, text = with_pool(use, None)
    assert "no system role" in refused
    assert "role" in nonsense
    assert text == "<user>naïve"


def test_a_good_form_passes_and_a_wrong_one_is_refused():
    async def use(pool):
        cost = await pool.check_grammar(StructuredOutput(json={"type": "object"}))
        return cost.compile_s, await reason_of(pool.check_grammar(StructuredOutput(regex="(a")))

    compile_s, reason = with_pool(use)
    assert 0 < compile_s < 1
    assert "unclosed group" in reason


def test_every_hostile_form_is_refused_or_cheap_and_the_pool_goes_on():
    forms = [{"json": schema} for schema in HOSTILE_SCHEMAS.values()]
    forms += [{"regex": regex} for regex in HOSTILE_REGEXES.values()]
    forms += [{"grammar": grammar} for grammar in HOSTILE_GRAMMARS.values()]

    async def use(pool):
        refused = 0
        for fields in forms:
            try:
                cost = await pool.check_grammar(StructuredOutput(**fields))
                assert cost.compile_s < 0.5
            except RequestError:
                refused += 1
        await pool.check_grammar(StructuredOutput(regex="still here"))
        return refused

    assert with_pool(use) >= len(forms) - 3


HOSTILE_TEMPLATES = {
    "loops": LOOP,
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a power": "{{ 2 ** (10 ** 9) }}",
    "a long text": "{{ 'x' * 10 ** 9 }}",
    "a wide text": "{{ 'x' | center(10 ** 9) }}",
    "a wide number": "{{ '%1000000000d' % 1 }}",
    "doubling": "{% set n = namespace(a=['x']) %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "much output": "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    "nine million characters": "{{ 'x' * 9000000 }}",
    "a class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "a file": "{% include '/etc/passwd' %}",
    "a format": "{{ '{0.__class__}'.format(1) }}",
    "an import": "{% import 'os' as os %}{{ os.environ }}",
    "a map": "{{ [1] | map(attribute='__class__') | list }}",
}
"""The one that prints nothing of interest is `a map` and `a format`: the sandbox answers them with nothing."""


def test_hostile_templates_hurt_only_themselves():
    async def use(pool):
        answers = {}
        for name, source in HOSTILE_TEMPLATES.items():
            began = time.monotonic()
            try:
                answers[name] = await pool.render(templates(source), MESSAGES, ChatOptions())
            except RequestError as error:
                answers[name] = error
            assert time.monotonic() - began < 30, name
        return answers, await pool.render(templates(), MESSAGES, ChatOptions())

    answers, text = with_pool(use, None, time_s=1.0)
    assert text == "<user>naïve"
    given = {name: answer for name, answer in answers.items() if isinstance(answer, str)}
    assert all("class" not in answer and "environ" not in answer for answer in given.values()), given
    assert set(given) <= {"a map", "a format"}


def test_what_takes_too_long_is_killed_and_replaced():
    async def use(pool):
        first = pool.worker_pids
        reason = await reason_of(pool.render(templates(LOOP), MESSAGES, ChatOptions()))
        text = await pool.render(templates(), MESSAGES, ChatOptions())
        return first, pool.worker_pids, reason, text, pool.num_killed

    first, second, reason, text, num_killed = with_pool(use, None, time_s=0.3)
    assert "longer than 0.3 s" in reason
    assert text == "<user>naïve"
    assert first != second
    assert num_killed == 1
    assert not any(map(is_running, first + second))


def test_memory_is_bounded():
    async def use(pool):
        reason = await reason_of(pool.render(templates("{{ ('x' * 70000000) | length }}"), MESSAGES, ChatOptions()))
        return reason, await pool.render(templates("{{ ('x' * 1000000) | length }}"), MESSAGES, ChatOptions())

    reason, text = with_pool(use, None, memory_bytes=64 << 20)
    assert "MemoryError" in reason or "memory" in reason or "MiB" in reason
    assert text == "1000000"


def test_what_crosses_is_bounded_in_both_directions():
    async def use(pool):
        long = await reason_of(pool.render(templates("{{ 'x' * 9000000 }}"), MESSAGES, ChatOptions()))
        big = [{"role": "user", "content": "x" * (17 << 20)}]
        return long, await reason_of(pool.render(templates(), big, ChatOptions()))

    long, big = with_pool(use, None)
    assert "the limit is 8388608" in long
    assert "the limit is 16777216" in big


def test_a_worker_that_is_killed_costs_its_request_only():
    async def use(pool):
        (pid,) = pool.worker_pids
        looping = asyncio.create_task(reason_of(pool.render(templates(LOOP), MESSAGES, ChatOptions())))
        while pool._line.idle.qsize():
            await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        return await looping, await pool.render(templates(), MESSAGES, ChatOptions())

    reason, text = with_pool(use, None, time_s=60.0)
    assert "broke its worker" in reason
    assert text == "<user>naïve"


def test_a_worker_that_dies_idle_costs_nobody_anything():
    async def use(pool):
        (pid,) = pool.worker_pids
        (worker,) = pool._workers
        os.kill(pid, signal.SIGKILL)
        while worker.is_running():
            await asyncio.sleep(0)
        return await pool.render(templates(), MESSAGES, ChatOptions())

    assert with_pool(use, None) == "<user>naïve"


def test_closing_ends_what_runs_and_what_waits():
    async def use(pool):
        tasks = [asyncio.create_task(pool.render(templates(LOOP), MESSAGES, ChatOptions())) for _ in range(3)]
        while pool._line.num_waiting < 2:
            await asyncio.sleep(0)
        await pool.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    ends = with_pool(use, None, time_s=60.0)
    assert [type(end) for end in ends] == [EngineUnavailableError] * 3
    assert all("closing" in str(end) for end in ends)


def test_a_caller_that_leaves_frees_its_worker():
    async def use(pool):
        looping = asyncio.create_task(pool.render(templates(LOOP), MESSAGES, ChatOptions()))
        while pool._line.idle.qsize():
            await asyncio.sleep(0)
        looping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looping
        return await pool.render(templates(), MESSAGES, ChatOptions())

    assert with_pool(use, None, time_s=60.0) == "<user>naïve"


def test_the_line_is_bounded():
    async def use(pool):
        tasks = [asyncio.create_task(pool.render(templates(LOOP), MESSAGES, ChatOptions())) for _ in range(4)]
        while pool._line.num_waiting < 3:
            await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as caught:
            await pool.render(templates(), MESSAGES, ChatOptions())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return caught.value.retry_after_s

    assert with_pool(use, None, time_s=60.0, max_waiting=3) > 0


def test_many_callers_share_the_workers():
    async def use(pool):
        many = [[{"role": "user", "content": str(i)}] for i in range(100)]
        return await asyncio.gather(*(pool.render(templates(), messages, ChatOptions()) for messages in many))

    assert with_pool(use, None, num_workers=2) == [f"<user>{i}" for i in range(100)]


def test_a_pool_whose_workers_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr("zif.serving.workers.worker._COMMAND", ("-c", "raise SystemExit(3)"))

    async def start():
        pool = WorkerPool(None, 1)
        with pytest.raises(EngineUnavailableError, match="ended without an answer"):
            await pool.start()
        with pytest.raises(EngineUnavailableError, match="no worker runs"):
            await pool.render(templates(), MESSAGES, ChatOptions())
        await pool.close()

    asyncio.run(start())


def test_without_a_tokenizer_templates_are_served_and_forms_refused(tmp_path):
    async def use(pool):
        reason = await reason_of(pool.check_grammar(StructuredOutput(regex="a")))
        return reason, await pool.render(templates(), MESSAGES, ChatOptions())

    reason, text = with_pool(use, GrammarVocabulary(str(tmp_path), 3072, [0]))
    assert "not served: no tokenizer" in reason
    assert text == "<user>naïve"


def test_a_closed_pool_takes_nothing():
    async def run():
        pool = WorkerPool(None, 1)
        await pool.start()
        await pool.close()
        await pool.close()
        with pytest.raises(EngineUnavailableError, match="closing"):
            await pool.render(templates(), MESSAGES, ChatOptions())

    asyncio.run(run())


def test_without_a_vocabulary_forms_are_refused():
    async def use(pool):
        return await reason_of(pool.check_grammar(StructuredOutput(regex="a")))

    assert "not served" in with_pool(use, None)


def test_deep_data_is_refused_before_it_is_sent():
    deep = []
    for _ in range(100_000):
        deep = [deep]

    async def use(pool):
        return await reason_of(pool.render(templates(), MESSAGES, ChatOptions(variables={"deep": deep})))

    assert "RecursionError" in with_pool(use, None)


PARENT = """
import asyncio, sys
from zif.serving.workers.pool import WorkerPool
from zif.text.chat import ChatOptions, ChatTemplates
async def main():
    pool = WorkerPool(None, 2)
    await pool.start()
    loop = ChatTemplates({"default": sys.argv[1]}, {})
    task = asyncio.create_task(pool.render(loop, [{"role": "user", "content": ""}], ChatOptions()))
    while pool._line.idle.qsize() > 1:
        await asyncio.sleep(0)
    print(*pool.worker_pids, flush=True)
    await task
asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal for a parent's death is Linux's")
def test_workers_idle_and_busy_die_with_a_parent_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", PARENT, LOOP], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(is_running, pids))
        parent.kill()
    deadline = time.monotonic() + 2
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, pids))


def test_tasks_are_named_by_a_list_and_take_typed_values():
    async def use(pool):
        wrong = RenderTask({}, {}, [], True, False, None, {})
        with pytest.raises(RuntimeError, match="ValidationError"):
            await pool.run(TaskName.CHECK_GRAMMAR, wrong, str)
        with pytest.raises(RuntimeError, match="ValidationError"):
            await pool.run(TaskName.RENDER_TEMPLATE, GrammarTask(StructuredOutput(regex="a")), str)
        return await pool.render(templates(), MESSAGES, ChatOptions())

    assert [*TaskName] == ["grammar.check", "template.render"]
    assert with_pool(use) == "<user>naïve"


def test_workers_come_back_after_a_shortage(monkeypatch):
    """What keeps workers from starting, such as too many open files, may pass."""

    async def use(pool):
        async def refused(setup):
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as shortage:
            shortage.setattr("zif.serving.workers.pool.start_worker", refused)
            for worker in list(pool._workers):
                await worker.kill()
            async with asyncio.timeout(5):
                with pytest.raises(EngineUnavailableError, match="Too many open files"):
                    await pool.render(templates(), MESSAGES, ChatOptions())
        async with asyncio.timeout(30):
            return await pool.render(templates(), MESSAGES, ChatOptions())

    assert with_pool(use, None, num_workers=2)
