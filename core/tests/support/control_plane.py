"""Small arenas, requests and engines of integers for tests of block manager, scheduler and null runner."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zif.contract import (
    ChunkedLocalSpec,
    CrossAttentionSpec,
    EngineConfig,
    FullAttentionSpec,
    KVArena,
    KVGroup,
    KVSpec,
    LatentAttentionSpec,
    ModelDescription,
    RecurrentStateSpec,
    Request,
    SamplingParams,
    SchedulerConstraints,
    SlidingWindowSpec,
    StateTensor,
    StepPlan,
    StepResult,
    TokenUpdate,
)
from zif.kv import PagedBlockManager
from zif.null.platform import null_layout
from zif.null.runner import NullRunner, expected_token
from zif.scheduling import TokenBudgetScheduler

VOCAB_SIZE = 97


def full(block_size: int = 4) -> FullAttentionSpec:
    return FullAttentionSpec((0,), 1, 8, block_size, "float32")


def sliding(window: int, block_size: int = 4) -> SlidingWindowSpec:
    return SlidingWindowSpec((1,), 1, 8, block_size, "float32", window=window)


def chunked(chunk: int, block_size: int = 4) -> ChunkedLocalSpec:
    return ChunkedLocalSpec((2,), 1, 8, block_size, "float32", chunk=chunk)


def latent(block_size: int = 4) -> LatentAttentionSpec:
    return LatentAttentionSpec((3,), 8, 4, block_size, "float32")


def recurrent(block_size: int = 4) -> RecurrentStateSpec:
    return RecurrentStateSpec((4,), (StateTensor("state", (4, 4), "float32"),), block_size, "float32")


def cross(block_size: int = 4, max_encoder_tokens: int = 20) -> CrossAttentionSpec:
    return CrossAttentionSpec((5,), 1, 8, block_size, "float32", max_encoder_tokens=max_encoder_tokens)


KINDS = {
    "full": lambda reach, block_size: full(block_size),
    "latent": lambda reach, block_size: latent(block_size),
    "sliding": sliding,
    "chunked": chunked,
    "recurrent": lambda reach, block_size: recurrent(block_size),
}
"""Every kind by name: a function of its reach, where it has one, and its block size."""


def spec_of(kind: str, reach: int, block_size: int) -> KVSpec:
    return KINDS[kind](reach, block_size)


def cut(specs: tuple[KVSpec, ...], num_slabs: int, slab_words: int | None = None) -> KVArena:
    """Cut an arena of `num_slabs` usable slabs of `slab_words` tokens, by default one block of the largest."""
    groups = tuple(KVGroup(spec, null_layout(spec)) for spec in specs)
    words = slab_words or max(spec.block_size for spec in specs)
    return KVArena(words * 8, num_slabs + 1, groups)


def new_request(request_id: int, prompt: list[int], **fields: object) -> Request:
    defaults = {"sampling": SamplingParams(), "max_total_tokens": len(prompt) + 8, "arrival": request_id}
    return Request(request_id, list(prompt), len(prompt), **(defaults | fields))  # type: ignore[arg-type]


def samples_of(first_id: int, prompt: list[int], count: int, **fields: object) -> tuple[Request, ...]:
    """Return `count` parallel samples of one prompt."""
    siblings = tuple(new_request(first_id + index, prompt, **fields) for index in range(count))
    for sibling in siblings:
        sibling.siblings = siblings
    return siblings


def expected_output(request: Request, specs: tuple[KVSpec, ...]) -> list[int]:
    """Return what the null platform must have generated after the prompt, for as many tokens as there are."""
    tokens = request.token_ids[: request.num_prompt_tokens]
    while len(tokens) < request.num_tokens:
        media, num_encoder_tokens = request.cache_key.media, request.num_encoder_tokens
        tokens.append(expected_token(tokens, specs, VOCAB_SIZE, media, num_encoder_tokens))
    return tokens[request.num_prompt_tokens :]


@dataclass
class Engine:
    """Scheduler, block manager and null runner, stepped by hand.

    `limits` are further fields of the configuration. No output is expected unless they say so, so that requests are
    admitted as long as their prompts fit, and preemption is met. `now_s` is the scheduler's clock.
    """

    arena: KVArena
    budget: int = 16
    max_num_seqs: int = 8
    caching: bool = True
    policy: str = "fcfs"
    limits: dict[str, Any] = field(default_factory=dict)
    constraints: SchedulerConstraints = field(default_factory=SchedulerConstraints)
    now_s: float = 0.0
    plans: list[StepPlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.specs = tuple(group.spec for group in self.arena.groups)
        limits = {"expected_output_percent": 0} | self.limits
        self.config = EngineConfig(1024, self.max_num_seqs, self.budget, self.caching, self.policy, **limits)
        self.blocks = PagedBlockManager(self.arena, enable_prefix_caching=self.caching, max_step_tokens=self.budget)
        self.scheduler = TokenBudgetScheduler(self.config, self.blocks, self.constraints, lambda: self.now_s)
        self.runner = NullRunner(self.config)
        self.runner.load(null_model(self.specs), lambda done, total: None)
        self.runner.start(self.arena)

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)

    def step(self, faults: dict[int, str] | None = None) -> list[TokenUpdate]:
        """Schedule, compute and update once; the plan is appended to `plans`."""
        plan = self.scheduler.schedule()
        assert plan is not None, "nothing to schedule"
        self.plans.append(plan)
        result: StepResult = self.runner.submit(plan).result()
        result.faults.update(faults or {})
        updates = self.scheduler.update(plan, result)
        self.blocks.check_integrity(self.scheduler.live_requests())
        return updates

    def run(self, max_steps: int = 2000) -> None:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError(f"not done after {max_steps} steps")

    @property
    def num_owned(self) -> tuple[int, ...]:
        return tuple(usage.num_owned for usage in self.blocks.usage())

    def planned(self, request: Request) -> list[int]:
        """Return how many tokens each step so far computed for `request`, 0 where it was left out."""
        counts = (dict(zip(p.request_ids, p.num_tokens, strict=True)) for p in self.plans)
        return [count.get(request.request_id, 0) for count in counts]


def null_model(specs: tuple[KVSpec, ...]) -> ModelDescription:
    return ModelDescription(Path(), "none", "native", {}, "float32", VOCAB_SIZE, 1024, specs, frozenset(), 0, 0, 0)
