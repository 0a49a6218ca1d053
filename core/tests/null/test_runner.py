"""The null platform's oracle and runner: every visible token counts, and plans out of order are refused.

That the whole control plane keeps the oracle's text is tested in core/tests/simulation.
"""

from dataclasses import replace

import pytest

from support.control_plane import Engine, cut, expected_output, full, new_request, sliding


class TestOracle:
    def test_the_next_token_depends_on_every_visible_token_and_its_place(self):
        specs, tokens = (sliding(3),), [1, 2, 3, 4, 5]
        base = _next(tokens, specs)
        assert _next([9, 2, 3, 4, 5], specs) == base, "behind the window"
        assert (
            len({base, _next([1, 2, 9, 4, 5], specs), _next([1, 2, 4, 3, 5], specs), _next([2, 3, 4, 5], specs)}) == 4
        )
        assert _next([9, 2, 3, 4, 5], (full(),)) != _next(tokens, (full(),))

    def test_every_group_counts(self):
        assert _next([1, 2, 3], (full(), sliding(2))) != _next([1, 2, 3], (full(), sliding(1)))


def _next(tokens, specs):
    request = new_request(0, tokens)
    request.token_ids.append(0)
    return expected_output(request, specs)[0]


class TestRunner:
    def test_a_request_cannot_start_twice(self):
        stack = Engine(cut((full(),), 8))
        stack.add(new_request(0, [1, 2]))
        plan = stack.scheduler.schedule()
        stack.runner.submit(plan)
        with pytest.raises(AssertionError, match="started twice"):
            stack.runner.submit(plan)

    def test_blocks_must_follow_each_other(self):
        stack = Engine(cut((full(),), 8))
        stack.add(new_request(0, [1, 2, 3, 4]))
        stack.step()
        plan = stack.scheduler.schedule()
        plan.block_updates = [replace(update, start=2) for update in plan.block_updates]
        with pytest.raises(AssertionError, match="do not follow"):
            stack.runner.submit(plan)

    def test_closing_twice_is_closing_once(self):
        stack = Engine(cut((full(),), 8))
        stack.runner.close()
        stack.runner.close()

    def test_a_row_that_writes_into_anothers_block_changes_the_text_of_that_very_step(self):
        stack = Engine(cut((full(),), 8))
        first, second = new_request(0, [1, 2]), new_request(1, [3, 4])
        stack.add(first, second)
        plan = stack.scheduler.schedule()
        plan.started[1].block_ids[0][0] = plan.started[0].block_ids[0][0]
        result = stack.runner.submit(plan).result()
        assert result.sampled[0] != [_next([1, 2], (full(),))]
