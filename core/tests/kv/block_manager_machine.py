"""The state machine that drives a block manager and the reference model together: calls in any order that is allowed.

Not a test: `test_against_reference.py` runs it on the real manager, `test_reference_catches_faults.py` on faulty ones.
A rule for a new feature is one more method, here or in a subclass: call the manager, tell the model the answer, and
name the request that was spoken of in `self.changed`. `all_is_well` follows every rule.
"""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kv.reference_model import ReferenceModel, demand
from support.control_plane import chunked, cut, full, latent, new_request, recurrent, sliding
from zif.contract import BlockManager, CacheKey, KVArena, Request, SamplingParams
from zif.kv import PagedBlockManager

MAX_STEP_TOKENS = 9
MAX_STEPS_IN_FLIGHT = 2
MAX_LIVE = 6
SETTINGS = settings(
    max_examples=150,
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
KEYS = (CacheKey(), CacheKey(salt="tenant"), CacheKey(adapter="weights"), CacheKey(media=("picture",)))
LENGTHS = st.sampled_from([1, 4, 5, 8, 9, 12, 13, 14, 17, 20, 22, 25, 28, 30])
BRANCHES = st.sampled_from([30, 30, 30, 20, 12, 8, 0])
WHICH = st.integers(0, MAX_LIVE - 1)

ARENAS = {
    "full": [cut((full(4),), 6), cut((full(4),), 4, 12), cut((latent(3),), 8, 6), cut((full(4),), 5, 10)],
    "window": [
        cut((sliding(5, 4),), 5),
        cut((sliding(7, 2),), 4, 6),
        cut((chunked(6, 4),), 4),
        cut((chunked(8, 2),), 9),
    ],
    "state": [cut((recurrent(4),), 3), cut((recurrent(2),), 2, 4), cut((recurrent(3),), 60)],
    "tight": [
        cut((full(4), sliding(5, 4)), 9),
        cut((full(2), sliding(7, 4), chunked(6, 4)), 16),
        cut((sliding(4, 3), full(2)), 7, 8),
        cut((full(4), recurrent(4)), 9),
        cut((latent(2), recurrent(4), sliding(3, 2)), 11),
    ],
    "roomy": [
        cut((full(4),), 150),
        cut((sliding(6, 4), chunked(5, 2)), 150),
        cut((latent(4), sliding(5, 2), chunked(8, 4)), 150),
        cut((full(4), recurrent(4)), 150),
        cut((full(6), recurrent(12), sliding(5, 2)), 150),
        cut((full(2), recurrent(4)), 150),
    ],
}
"""Arenas by what they are for; "tight" ones mix groups and are too small for all that comes."""


class BlockManagerMachine(RuleBasedStateMachine):
    """Subclasses set `arenas`, and may set `manager_of` and `checks_integrity`."""

    arenas: tuple[KVArena, ...] = ()
    checks_integrity = True

    def manager_of(self, arena: KVArena, caching: bool) -> BlockManager:
        return PagedBlockManager(arena, enable_prefix_caching=caching, max_step_tokens=MAX_STEP_TOKENS)

    @initialize(which=st.integers(0, 99), caching=st.sampled_from([True, True, True, False]))
    def start(self, which, caching):
        arena = self.arenas[which % len(self.arenas)]
        self.manager = self.manager_of(arena, caching)
        self.model = ReferenceModel(arena, caching=caching, max_step_tokens=MAX_STEP_TOKENS)
        self.is_single = len(arena.groups) == 1
        if self.is_single:
            for length in range(1, 64):
                self.model.said_to_fit(length, self.manager.fits(length))
        self.live: list[Request] = []
        self.waiting: list[Request] = []
        self.planned: dict[Request, list[int]] = {}
        self.changed: Request | None = None
        self.num_requests = 0

    def _new(self, tokens, key, sampling):
        self.num_requests += 1
        return new_request(self.num_requests, tokens, cache_key=key, sampling=sampling)

    def _begin(self, request, source=None):
        self.manager.begin(request, source)
        request.num_planned_tokens = request.num_computed_tokens
        self.live.append(request)
        self.planned[request] = []
        self.changed = request
        self.model.transferred(self.manager.take_transfers())
        self.model.began(request, source)

    def _reserve(self, request, end):
        """Reserve and compare; ask before whether it will do."""
        usage, can_hold = self.manager.usage(), self.manager.can_hold(request, end)
        if self.is_single and not self.planned[request]:
            self.model.said_to_hold(request, end, can_hold)
        demand(usage == self.manager.usage(), "asking whether there is room changed something")
        done = self.manager.reserve(request, end)
        self.model.transferred(self.manager.take_transfers())
        self.model.reserved(request, end, done)
        self.changed = request
        return done

    def _plan(self, request, num_tokens, *, heeds_ends=True):
        """Plan a step of at most `num_tokens` tokens; False when there is nothing to plan or no room."""
        start = request.num_planned_tokens
        end = min(request.num_tokens, start + num_tokens)
        if end == start:
            return False
        checkpoint = self.manager.step_end(request, end)
        self.model.step_ended(request, start, end, checkpoint)
        end = checkpoint if heeds_ends else end
        if end > request.capacity and not self._reserve(request, end):
            return False
        if end not in self.model.live[request].asked:
            self.model.live[request].asked.append(end)
        self.planned[request].append(end)
        request.num_planned_tokens = end
        return True

    def _apply(self, request, *, sampled=0):
        """Compute the oldest step that is planned, and commit it as a scheduler does."""
        end = self.planned[request].pop(0)
        self.model.computed(request, end)
        request.num_computed_tokens = end
        if end == request.num_tokens:
            request.token_ids.append(sampled)
        if end >= request.next_commit:
            self.manager.commit(request)
        self.changed = request

    def _compute(self, request, num_tokens, sampled, num_steps):
        """Plan and apply up to `num_steps` steps, after those that are under way."""
        for _ in range(num_steps):
            if not self.planned[request] and not self._plan(request, num_tokens):
                return
            self.all_is_well()
            self._apply(request, sampled=sampled)
            self.all_is_well()

    def _stop(self, request, *, suspend=False):
        (self.manager.suspend if suspend else self.manager.release)(request)
        self.model.transferred(self.manager.take_transfers())
        self.model.released(request)
        request.num_computed_tokens = request.num_planned_tokens = 0
        self.live.remove(request)
        del self.planned[request]

    def _reset(self):
        self.manager.reset_prefix_cache()
        self.model.reset()
        demand(not any(count.num_cached for count in self.manager.usage()), "blocks are cached after a reset")

    @precondition(lambda self: len(self.live) < MAX_LIVE)
    @rule(
        length=LENGTHS,
        branch=BRANCHES,
        tail=st.integers(1, 2),
        key=st.sampled_from((*KEYS[:1] * 5, *KEYS)),
        logprobs=st.sampled_from([None] * 9 + [0]),
        num_steps=st.sampled_from([0, 0, 1, 4, 30]),
    )
    def begin(self, length, branch, tail, key, logprobs, num_steps):
        """Begin a request whose prompt leaves a common stem at `branch`, and compute some of it."""
        tokens = [0 if position < branch else tail for position in range(length)]
        request = self._new(tokens, key, SamplingParams(prompt_logprobs=logprobs))
        self._begin(request)
        self._compute(request, MAX_STEP_TOKENS, 0, num_steps)

    @precondition(lambda self: self.live and len(self.live) < MAX_LIVE)
    @rule(which=WHICH)
    def begin_sample(self, which):
        """Begin a sibling of a request that has computed its prompt."""
        sources = [request for request in self.live if request.num_computed_tokens >= request.num_prompt_tokens]
        if sources:
            source = sources[which % len(sources)]
            self._begin(self._new(prompt_of(source), source.cache_key, source.sampling), source)

    @precondition(lambda self: self.live)
    @rule(
        which=WHICH, num_tokens=st.integers(1, MAX_STEP_TOKENS), heeds_ends=st.sampled_from([True, True, True, False])
    )
    def plan(self, which, num_tokens, heeds_ends):
        """Plan a step, perhaps ahead of others that are under way."""
        request = self.live[which % len(self.live)]
        if len(self.planned[request]) < MAX_STEPS_IN_FLIGHT:
            self._plan(request, num_tokens, heeds_ends=heeds_ends)

    @precondition(lambda self: self.live)
    @rule(which=WHICH, sampled=st.integers(0, 2))
    def apply(self, which, sampled):
        request = self.live[which % len(self.live)]
        if self.planned[request]:
            self._apply(request, sampled=sampled)

    @precondition(lambda self: self.live)
    @rule(
        which=WHICH, num_tokens=st.integers(1, MAX_STEP_TOKENS), sampled=st.integers(0, 2), num_steps=st.integers(1, 8)
    )
    def compute(self, which, num_tokens, sampled, num_steps):
        """Compute some steps, each applied before the next."""
        self._compute(self.live[which % len(self.live)], num_tokens, sampled, num_steps)

    @precondition(lambda self: self.live)
    @rule(which=WHICH, count=st.integers(1, 9))
    def learn(self, which, count):
        """Let more tokens become known than one, as accepted guesses do."""
        self.live[which % len(self.live)].token_ids.extend([2] * count)

    @precondition(lambda self: len(self.live) > 2)
    @rule(which=WHICH)
    def finish(self, which):
        self._stop(self.live[which % len(self.live)])

    @precondition(lambda self: self.live)
    @rule(which=WHICH, is_running=st.sampled_from([True, True, False]))
    def preempt(self, which, is_running):
        """Let a request wait again; one that never ran was only refused its place."""
        request = self.live[which % len(self.live)]
        is_running = is_running or request.num_tokens > request.num_prompt_tokens
        request.num_preemptions += is_running
        self._stop(request, suspend=is_running)
        self.waiting.append(request)

    @precondition(lambda self: self.waiting and len(self.live) < MAX_LIVE)
    @rule(which=WHICH)
    def resume(self, which):
        """Begin again, from a sibling's blocks if there is one that has computed the prompt."""
        request = self.waiting.pop(which % len(self.waiting))
        wanted = request.cache_key, prompt_of(request), request.sampling
        sources = (r for r in self.live if (r.cache_key, prompt_of(r), r.sampling) == wanted)
        self._begin(request, next((r for r in sources if r.num_computed_tokens >= r.num_prompt_tokens), None))

    @precondition(lambda self: self.num_requests % 5 == 4)
    @rule()
    def reset(self):
        self._reset()

    @precondition(lambda self: self.num_requests % 4 == 3)
    @rule(length=st.integers(1, 60), num_tokens=st.integers(1, MAX_STEP_TOKENS))
    def run_alone(self, length, num_tokens):
        """Let a request run alone from an empty cache: it ends if it is said to fit."""
        for request in tuple(self.live):
            self._stop(request)
        self._reset()
        fits = self.manager.fits(length)
        request = self._new([3] * length, KEYS[0], SamplingParams())
        self._begin(request)
        while fits and request.num_computed_tokens < length:
            demand(self._plan(request, num_tokens), f"{length} tokens are said to fit and find no room alone")
            self._apply(request)
            self.all_is_well()

    @invariant()
    def all_is_well(self):
        if self.checks_integrity:
            self.manager.check_integrity(self.live + self.waiting)
        self.model.check(self.manager.usage(), self.changed)
        self.changed = None

    def teardown(self):
        for request in tuple(self.live):
            self._stop(request)
        while self.waiting:
            self.manager.release(self.waiting.pop())
        self._reset()
        self.all_is_well()
        held = [count.num_free + count.num_owned for count in self.manager.usage()]
        demand(not any(held), f"{held} blocks are held for nobody")


def prompt_of(request):
    return request.token_ids[: request.num_prompt_tokens]
