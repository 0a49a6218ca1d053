"""Where requests stand, and what each change entails: queue, batch, blocks, runner, accounts and deadlines.

    add -> waiting -> take_place -> running -> end -> finished
                         ^             |
                         +-- preempt --+

Steps may be under way while the next one is planned. So the blocks of a request that ends or starts over are returned
only when no step under way can still write to them: they are *held* until the newest such step is applied.

Nothing is decided here: `planner.py` decides who goes on and who has to go, `scheduler.py` applies results.
"""

import bisect
from collections import deque
from collections.abc import Callable

from zif.contract import BlockManager, EngineConfig, FinishReason, Request, RequestStatus, TokenUpdate
from zif.scheduling.admission import Admission
from zif.scheduling.deadlines import Deadlines, overdue_error
from zif.scheduling.policies import PATIENCE_S, policy_of
from zif.scheduling.queue import RequestQueue
from zif.scheduling.trials import Trials


class Lifecycle:
    """The requests of one scheduler. Public attributes are for `planner.py` and `scheduler.py` to read.

    `running` is in policy order. `released` are the request ids that the runner must forget with the next plan,
    `ended_early` the ends that the next update reports. `loner` is a request that must run alone. `borrowers` are the
    running requests that began on blocks that they had not computed just before.
    """

    def __init__(self, config: EngineConfig, blocks: BlockManager, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.policy = policy_of(config)
        self.waiting = RequestQueue(self.policy)
        self.admission = Admission(config, blocks)
        self.running: list[Request] = []
        self.requests: dict[int, Request] = {}
        self.in_flight: deque[int] = deque()
        self.released: list[int] = []
        self.ended_early: list[TokenUpdate] = []
        self.loner: Request | None = None
        self.trials = Trials()
        self.borrowers: set[int] = set()
        self.num_ended = 0
        self.num_preemptions = 0
        self._blocks = blocks
        self._deadlines = Deadlines()
        self._held: deque[tuple[int, Request]] = deque()

    def add(self, request: Request) -> None:
        """Let a new request wait."""
        assert request.request_id not in self.requests, f"request id {request.request_id} is taken"
        self.requests[request.request_id] = request
        request.due_s = self.clock() + PATIENCE_S
        if request.deadline_s is not None:
            request.due_s = min(request.due_s, request.deadline_s)
            self._deadlines.add(request)
        self.waiting.push(request)
        self.admission.unsettle()

    def take_place(self, request: Request, step: int) -> None:
        """Move the first waiting request to the running ones; `step` is the first that computes it."""
        order = self.waiting.order_of(request)
        self.waiting.pop()
        if not request.order:
            request.order = order
            request.num_cached_tokens = request.num_computed_tokens
            num_known = request.num_tokens - request.num_computed_tokens
            self.policy.admit(request, num_known + self.admission.num_expected(request))
        bisect.insort(self.running, request, key=_order)
        if request.num_computed_tokens:
            self.borrowers.add(request.request_id)
        self.admission.start(request)
        request.status = RequestStatus.RUNNING
        request.first_step = step

    def preempt(self, request: Request) -> None:
        """Take blocks and place from a running request without steps under way; it goes on from what can be kept."""
        assert not self.in_flight, "blocks are taken while a step is under way"
        self.num_preemptions += 1
        request.num_preemptions += 1
        self._leave(request)
        self.admission.preempt()
        self._blocks.suspend(request)
        self._wait_again(request)

    def start_over(self, request: Request) -> None:
        """Take blocks and place from a running request whose blocks hold nothing that is right.

        No preemption: this says nothing of how many were admitted.
        """
        request.num_recoveries += 1
        self._leave(request)
        self.admission.give_back()
        if self.in_flight:
            self._held.append((self.in_flight[-1], request))
        else:
            self._blocks.release(request)
            self._wait_again(request)

    def end(self, request: Request, reason: FinishReason) -> None:
        """Finish a request."""
        if request.status is RequestStatus.RUNNING:
            self.released.append(request.request_id)
        else:
            self.waiting.discard(request)
        was_held = any(held is request for _, held in self._held)
        if not was_held and self.in_flight and request.num_planned_tokens != request.num_computed_tokens:
            self._held.append((self.in_flight[-1], request))
        elif not was_held:
            self._blocks.release(request)
        self.num_ended += 1
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.siblings = ()
        request.draft_token_ids = []
        if request is self.loner:
            self.loner = None
        self.borrowers.discard(request.request_id)
        del self.requests[request.request_id]
        self._deadlines.remove(request)
        self.admission.end(request)
        self.policy.end(request)
        self.waiting.reconsider(self.policy.line(request))

    def end_early(self, request: Request, reason: FinishReason, error: str) -> None:
        """Finish a request outside of a step's result; the next update reports it."""
        request.error = error
        self.end(request, reason)
        self.ended_early.append(TokenUpdate(request, []))

    def end_overdue(self) -> None:
        """Finish the requests whose deadline has passed."""
        if not self._deadlines:
            return
        now_s = self.clock()
        for request in self._deadlines.pop_passed(now_s):
            self.end_early(request, FinishReason.ABORT, overdue_error(request, now_s))
        self.drop_ended()

    def drop_ended(self) -> None:
        """Take the requests that have ended out of the batch."""
        self.running = [request for request in self.running if request.status is RequestStatus.RUNNING]

    def forget_steps(self) -> None:
        """Hear that no step under way will ever give a result: nothing writes any more, their rows are void."""
        for request in self.running:
            request.num_planned_tokens, request.num_pending_tokens = request.num_computed_tokens, 0
        if self.in_flight:
            newest = self.in_flight[-1]
            self.in_flight.clear()
            self.step_applied(newest)

    def isolate(self, request: Request) -> None:
        """Let a request run alone from an empty cache, where every slab it fills, it fills entirely."""
        self.loner = request
        self._blocks.free_cached_blocks()

    def step_applied(self, step: int) -> None:
        """Return the blocks that were held for steps up to this one."""
        if not self.running and not self.in_flight:
            # Those that found no room beside steps under way may find it alone.
            self.admission.give_back()
        if not self._held or self._held[0][0] > step:
            return
        while self._held and self._held[0][0] <= step:
            request = self._held.popleft()[1]
            self._blocks.release(request)
            if not request.finished:
                self._wait_again(request)
        self.admission.give_back()

    def holders(self) -> list[Request]:
        """Return the requests that have ended and whose blocks are held for steps under way."""
        return [request for _, request in self._held if request.finished]

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self.borrowers.discard(request.request_id)
        self.released.append(request.request_id)
        request.status = RequestStatus.PREEMPTED
        request.draft_token_ids = []

    def _wait_again(self, request: Request) -> None:
        request.num_computed_tokens = request.num_planned_tokens = request.num_pending_tokens = 0
        self.waiting.push(request)


def _order(request: Request) -> tuple[float, ...]:
    return request.order
