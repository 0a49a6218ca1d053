"""What one simulation is made of: layer groups, arena, limits and traffic, all drawn from one seed."""

import random
from dataclasses import dataclass, field

from zif.contract import (
    ChunkedLocalSpec,
    CrossAttentionSpec,
    EngineConfig,
    FullAttentionSpec,
    KVArena,
    KVGroup,
    KVSpec,
    LatentAttentionSpec,
    RecurrentStateSpec,
    SchedulerConstraints,
    SlidingWindowSpec,
    StateTensor,
)
from zif.kv.tiers import TierSetup
from zif.simulation.runner import WORD_BYTES, simulated_layout

VOCAB_SIZE = 97
"""Small, so that equal tokens meet by chance too."""

_TOKEN_BUDGETS = (1, 7, 16, 64)
_DTYPE = "float32"
_MAX_ENCODER_TOKENS = 10


@dataclass(frozen=True, slots=True)
class TrafficShape:
    """How requests arrive, per step with `arrival_rate` chances each, and how long they are, in tokens.

    A prompt is up to `max_stem` tokens of one of `num_stems` stems, or (`continued_share` of the prompts) of what an
    earlier request ended with, and up to `max_tail` tokens of its own. While `max_live` requests live, none arrives.
    """

    num_arrivals: int = 24
    arrival_rate: float = 0.5
    num_stems: int = 3
    max_stem: int = 20
    max_tail: int = 5
    max_output: int = 33
    continued_share: float = 0.25
    sample_counts: tuple[int, ...] = (1, 1, 1, 3)
    salts: tuple[str, ...] = ("", "", "x")
    num_priorities: int = 3
    tenants: tuple[str, ...] = ("", "a", "b")
    deadlines_s: tuple[float | None, ...] = (None,) * 9 + (0.3,)
    max_live: int | None = None

    @property
    def max_total_tokens(self) -> int:
        """Bound prompt plus output; a continued conversation is cut to this."""
        return self.max_stem + self.max_tail + self.max_output


@dataclass(frozen=True, slots=True)
class Scenario:
    """One simulation before it runs."""

    seed: int
    arena: KVArena
    config: EngineConfig
    traffic: TrafficShape
    constraints: SchedulerConstraints = field(default_factory=SchedulerConstraints)
    max_steps_in_flight: int = 1
    tiers: TierSetup = field(default_factory=TierSetup)

    @property
    def specs(self) -> tuple[KVSpec, ...]:
        """The layer groups' kinds."""
        return tuple(group.spec for group in self.arena.groups)


def draw_scenario(seed: int, traffic: TrafficShape | None = None) -> Scenario:
    """Draw a scenario: seeds next to each other differ in kinds, budget, policy and caching."""
    chance = random.Random(f"scenario:{seed}")
    traffic = traffic or _draw_traffic(chance)
    shapes = _shapes()
    specs = shapes[seed % len(shapes)]
    policy = chance.choice(("fcfs", "priority", "fair"))
    config = EngineConfig(
        max_model_len=traffic.max_total_tokens,
        max_num_seqs=chance.choice((1, 6, 6, 8)),
        max_num_batched_tokens=chance.choice(_TOKEN_BUDGETS),
        enable_prefix_caching=chance.randrange(6) != 0,
        scheduling_policy=policy,
        seed=seed,
        max_partial_prefills=chance.choice((1, 2, 4)),
        max_prefill_chunk=chance.choice((None, None, 5)),
        max_bypasses=chance.choice((0, 2, 16)),
        expected_output_percent=chance.choice((0, 0, 50, 100)),
        tenant_weights=(("a", 3),) if policy == "fair" else (),
        max_draft_tokens=chance.choice((0, 0, 0, 1, 4)),
        tenant_cache_percent=chance.choice(((), (), (("a", 10),))),
    )
    constraints = SchedulerConstraints(
        token_alignment=min(chance.choice((1, 1, 1, 4)), config.max_num_batched_tokens),
        separate_prefill=chance.randrange(6) == 0,
    )
    arena = _draw_arena(chance, specs, config)
    return Scenario(
        seed,
        arena,
        config,
        traffic,
        constraints,
        max_steps_in_flight=chance.choice((1, 1, 2, 3)),
        tiers=_draw_tiers(chance, arena),
    )


def simulated_arena(specs: tuple[KVSpec, ...], num_slabs: int, slab_words: int) -> KVArena:
    """Cut an arena of `num_slabs` usable slabs of `slab_words` words, laid out for `SimulatedRunner`."""
    groups = tuple(KVGroup(spec, simulated_layout(spec)) for spec in specs)
    return KVArena(slab_words * WORD_BYTES, num_slabs + 1, groups)


def num_slabs_for(specs: tuple[KVSpec, ...], slab_words: int, num_tokens: int, max_step_tokens: int) -> int:
    """Count the slabs that hold one request of `num_tokens`, alone, wherever its slabs lie."""
    arena = simulated_arena(specs, 1, slab_words)
    needs = (spec.peak_blocks(num_tokens, max_step_tokens) for spec in specs)
    return sum(-(-need // arena.min_slab_blocks(group)) for group, need in enumerate(needs))


def _draw_traffic(chance: random.Random) -> TrafficShape:
    """Draw mixed traffic, or mostly conversations that go on with several samples of each turn."""
    return chance.choice((TrafficShape(),) * 2 + (TrafficShape(continued_share=0.75, sample_counts=(1, 3, 3)),))


def _draw_arena(chance: random.Random, specs: tuple[KVSpec, ...], config: EngineConfig) -> KVArena:
    """Cut an arena that holds little more than one request of the longest kind, or several, or all."""
    largest = max(simulated_layout(spec).shape[0] for spec in specs)
    slab_words = chance.choice((largest, 2 * largest, 2 * largest + 3))
    if not all(map(simulated_arena(specs, 1, slab_words).min_slab_blocks, range(len(specs)))):
        slab_words *= 2
    least = num_slabs_for(specs, slab_words, config.max_model_len, config.max_num_batched_tokens)
    share = chance.choice((1.0, 1.0, 1.5, 2.5, 10.0))
    return simulated_arena(specs, int(least * share), slab_words)


def _draw_tiers(chance: random.Random, arena: KVArena) -> TierSetup:
    """Draw none, host memory, or host memory and disk, smaller or larger than the device; copying pays, or does not."""
    host_bytes = int(arena.num_bytes * chance.choice((0, 0, 0.3, 1.0, 4.0)))
    return TierSetup(
        host_bytes=host_bytes,
        disk_bytes=int(host_bytes * chance.choice((0, 0.5, 2.0))),
        host_bytes_per_s=chance.choice((1, 1_000_000)),
        prefill_tokens_per_s=1_000,
    )


def _shapes() -> list[tuple[KVSpec, ...]]:
    return [
        (_full(4),),
        (_full(4), _sliding(5, 4)),
        (_full(4), _recurrent(8)),
        (_full(4), _sliding(9, 2)),
        (_full(4), _chunked(8, 4)),
        (_full(4), _sliding(3, 4), _sliding(12, 8)),
        (_latent(4),),
        (_sliding(7, 4),),
        (_latent(2), _chunked(6, 4), _recurrent(4)),
        (_full(8), _sliding(6, 4), _recurrent(4)),
        (_full(4), _cross(4)),
    ]


def _full(block_size: int) -> KVSpec:
    return FullAttentionSpec((0,), 1, 8, block_size, _DTYPE)


def _sliding(window: int, block_size: int) -> KVSpec:
    return SlidingWindowSpec((1,), 1, 8, block_size, _DTYPE, window=window)


def _chunked(chunk: int, block_size: int) -> KVSpec:
    return ChunkedLocalSpec((2,), 1, 8, block_size, _DTYPE, chunk=chunk)


def _latent(block_size: int) -> KVSpec:
    return LatentAttentionSpec((3,), 8, 4, block_size, _DTYPE)


def _cross(block_size: int) -> KVSpec:
    return CrossAttentionSpec((5,), 1, 8, block_size, _DTYPE, max_encoder_tokens=_MAX_ENCODER_TOKENS)


def _recurrent(block_size: int) -> KVSpec:
    return RecurrentStateSpec((4,), (StateTensor("state", (8,), _DTYPE),), block_size, _DTYPE)
