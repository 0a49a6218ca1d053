"""How a platform's offer and a workload become a plan or a refusal: the decisions that all platforms share.

A vendor's `Platform.plan` states what its device offers and calls `negotiate`. Nothing here knows a device. The same
file cuts the KV arena into slabs, because sizing the cache and cutting it must agree.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from zif.contract.capabilities import Feature
from zif.contract.kinds import AttentionSpec
from zif.contract.kv import KVArena, KVGroup, KVLayout, KVSpec
from zif.contract.plan import Decision, MemoryPlan, Outcome, Plan, Refusal, SchedulerConstraints, Workload
from zif.contract.platform import DeviceInfo
from zif.errors import ConfigError

_MAX_SLAB_BLOCKS = 64
"""Slabs longer than this many blocks of one group bring nothing: waste is under 2 % and lending gets coarse."""


@dataclass(frozen=True, slots=True)
class KVSizing:
    """How much memory the KV cache takes when the user does not say.

    At most `max_share` of what weights and activations leave, and at most `request_multiple` times the need of
    `max_num_seqs` full-length requests (None: no such limit); never less than one full-length request.
    """

    max_share: float = 0.5
    request_multiple: int | None = 1


@dataclass(frozen=True, slots=True)
class Offer:
    """What a platform puts against a workload.

    `layout_of` is the attention backend's `kv_layout`; it is asked only about specs whose dtype, head size and block
    size the device claims. `implementations` maps ops and services to code; the entry named like a feature, or like
    its first part ("attention"), is what its decision prints. `emulated` gives features that run at a stated cost.
    """

    platform: str
    device: DeviceInfo
    layout_of: Callable[[KVSpec], KVLayout]
    implementations: tuple[tuple[str, str], ...]
    emulated: tuple[tuple[Feature, str], ...] = ()
    constraints: SchedulerConstraints = field(default_factory=SchedulerConstraints)
    notes: tuple[str, ...] = ()
    sizing: KVSizing = KVSizing()


def negotiate(workload: Workload, offer: Offer) -> Plan | Refusal:
    """Decide every feature, check shapes, dtypes and memory, and size the KV cache. A refusal has all reasons."""
    decisions = tuple(_decide(feature, offer) for feature in sorted(_features_needed(workload)))
    reasons = [f"{d.feature}: {d.detail}" for d in decisions if d.outcome is Outcome.REFUSED]
    reasons += _invariance_reasons(workload, offer)
    shape_reasons = [*_shape_reasons(workload, offer)]
    groups = () if shape_reasons or _refuses_a_kind(workload, decisions) else _groups(workload, offer)
    memory = _Budget(workload, offer, groups).plan()
    if isinstance(memory, str):
        return Refusal(offer.platform, (*reasons, *shape_reasons, memory))
    if reasons or shape_reasons:
        return Refusal(offer.platform, (*reasons, *shape_reasons))
    return Plan(
        platform=offer.platform,
        device_id=offer.device.device_id,
        decisions=decisions,
        kv_groups=groups,
        memory=memory,
        implementations=offer.implementations,
        constraints=offer.constraints,
        notes=offer.notes,
        tensor_parallel_size=workload.tensor_parallel_size,
        batch_invariant=workload.batch_invariant,
    )


def _groups(workload: Workload, offer: Offer) -> tuple[KVGroup, ...]:
    return tuple(KVGroup(spec, offer.layout_of(spec)) for spec in workload.kv_specs)


def _refuses_a_kind(workload: Workload, decisions: Sequence[Decision]) -> bool:
    """Say whether some layer group cannot be served, so that it has no layout."""
    refused = {decision.feature for decision in decisions if decision.outcome is Outcome.REFUSED}
    return any(spec.feature.value in refused for spec in workload.kv_specs)


def slab_arena(kv_bytes: int, groups: Sequence[KVGroup]) -> KVArena:
    """Cut at most `kv_bytes` into slabs, the null slab included.

    The slab size is the one that loses least: to cells that slab borders cut, to the null slab, and to the slab that
    each group holds partly filled. A lone group gets slabs of one block. Raises `ConfigError` when `kv_bytes` does not
    hold the null slab and one slab for each group.
    """
    if not groups:
        raise ConfigError("cannot cut a KV arena for no layer groups: a model without attention state needs no arena")
    arena = _cut(kv_bytes, groups)
    if arena.num_slabs < 1 + len(groups):
        raise ConfigError(
            f"kv_bytes={kv_bytes!r} holds {arena.num_slabs} slabs of {arena.slab_bytes} bytes, but {len(groups)} layer "
            f"groups and the null slab need one each: raise it to {_bytes_for(groups, [1] * len(groups))}"
        )
    return arena


def format_bytes(num_bytes: int) -> str:
    """Print a size for people, exact bytes included."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit} ({num_bytes} bytes)"
    return f"{num_bytes} bytes"


def _features_needed(workload: Workload) -> frozenset[Feature]:
    """Return what the workload names and what its KV specs imply."""
    implied = {spec.feature for spec in workload.kv_specs}
    if workload.tensor_parallel_size > 1:
        implied.add(Feature.TENSOR_PARALLEL)
    return workload.features | implied


def _decide(feature: Feature, offer: Offer) -> Decision:
    cost = dict(offer.emulated).get(feature)
    if cost is not None:
        return Decision(feature.value, Outcome.EMULATED, cost)
    if feature not in offer.device.capabilities.features:
        device = offer.device
        detail = f"device {device.device_id!r} ({device.name}) does not claim it; do without or choose another platform"
        return Decision(feature.value, Outcome.REFUSED, detail)
    served = dict(offer.implementations)
    detail = served.get(feature.value) or served.get(feature.value.split(".")[0]) or "core"
    return Decision(feature.value, Outcome.SUPPORTED, detail)


def _invariance_reasons(workload: Workload, offer: Offer) -> Iterator[str]:
    """Yield why results would depend on what else runs, where they must not."""
    if not workload.batch_invariant:
        return
    device = offer.device
    if not device.capabilities.batch_invariant:
        yield (
            f"batch_invariant: device {device.device_id!r} ({device.name}) does not claim it; turn it off or choose "
            "another platform"
        )
    if Feature.TRANSFORMERS_BACKEND in workload.features:
        yield (
            "batch_invariant: the modules of Transformers multiply with the array library, which promises no order of "
            "sums; turn it off or choose a model of zif's own decoder"
        )


def _shape_reasons(workload: Workload, offer: Offer) -> Iterator[str]:
    """Yield why dtypes, head sizes, block sizes or kinds of state are not served."""
    capabilities = offer.device.capabilities
    if capabilities.numerics(workload.dtype) is None:
        offered = ", ".join(n.storage for n in capabilities.dtypes)
        yield f"dtype {workload.dtype!r} is not offered; choose one of: {offered}"
    head_sizes = {*workload.head_sizes, *(s.head_dim for s in workload.kv_specs if isinstance(s, AttentionSpec))}
    for head_size in sorted(size for size in head_sizes if not capabilities.accepts_head_size(size)):
        accepted = ", ".join(map(str, capabilities.head_sizes)) or f"1 to {capabilities.max_head_size}"
        yield f"head size {head_size} is not served by attention, which takes {accepted}; choose another platform"
    for block_size in sorted({spec.block_size for spec in workload.kv_specs} - {*capabilities.block_sizes}):
        yield f"block size {block_size} is not one of {', '.join(map(str, capabilities.block_sizes))}; choose one"
    for dtype in sorted({spec.dtype for spec in workload.kv_specs} - {*capabilities.kv_dtypes}):
        yield f"KV dtype {dtype!r} is not offered; choose one of: {', '.join(capabilities.kv_dtypes)}"


@dataclass(frozen=True, slots=True)
class _Budget:
    """The memory side of one negotiation."""

    workload: Workload
    offer: Offer
    groups: tuple[KVGroup, ...]

    def plan(self) -> MemoryPlan | str:
        """Return the bytes by purpose, or the reason why they do not fit."""
        kv_bytes = self._kv_bytes()
        if self.groups and not self._holds(kv_bytes, self._tokens_asked):
            return self._too_small_cache(kv_bytes)
        if self._fixed_bytes + kv_bytes > self._available_bytes:
            return self._too_much(kv_bytes)
        return MemoryPlan(self._available_bytes, self.workload.weight_bytes, self.workload.activation_bytes, kv_bytes)

    @property
    def _available_bytes(self) -> int:
        limit = self.workload.memory_limit_bytes
        available = self.offer.device.available_bytes
        return available if limit is None else min(available, limit)

    @property
    def _fixed_bytes(self) -> int:
        return self.workload.weight_bytes + self.workload.activation_bytes

    @property
    def _tokens_asked(self) -> int:
        return self.workload.max_model_len

    def _kv_bytes(self) -> int:
        if self.workload.kv_bytes is not None:
            return self.workload.kv_bytes
        if not self.groups:
            return 0
        chosen = int((self._available_bytes - self._fixed_bytes) * self.offer.sizing.max_share)
        if self.offer.sizing.request_multiple is not None:
            all_requests = self.workload.max_num_seqs * self.offer.sizing.request_multiple
            chosen = min(chosen, self._bytes_for_requests(all_requests))
        one_request = self._bytes_for_requests(1)
        return chosen if chosen >= one_request and self._holds(chosen, self._tokens_asked) else one_request

    def _bytes_for_requests(self, num_requests: int) -> int:
        return _bytes_for(self.groups, [self._blocks(g.spec, self._tokens_asked, num_requests) for g in self.groups])

    def _blocks(self, spec: KVSpec, num_tokens: int, num_requests: int) -> int:
        """Bound the blocks of `num_requests` requests: they share one step's token budget."""
        batched = self.workload.max_num_batched_tokens
        apart = num_requests * spec.peak_blocks(num_tokens, batched)
        together = num_requests * (spec.peak_blocks(num_tokens, 1) + 1) + _ceil_div(batched, spec.block_size)
        return min(apart, together)

    def _holds(self, kv_bytes: int, num_tokens: int) -> bool:
        """Say whether an arena of `kv_bytes` serves one request of `num_tokens`."""
        if kv_bytes < 1:
            return False
        arena = _cut(kv_bytes, self.groups)
        return _slabs_for(arena, [self._blocks(g.spec, num_tokens, 1) for g in self.groups]) <= arena.num_slabs

    def _tokens_held(self, kv_bytes: int) -> int:
        """Return the longest request that an arena of `kv_bytes` serves, up to the length asked for."""
        low, high = 0, self._tokens_asked
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._holds(kv_bytes, middle) else (low, middle - 1)
        return low

    def _too_small_cache(self, kv_bytes: int) -> str:
        return (
            f"kv_bytes={format_bytes(kv_bytes)} cannot hold one request of max_model_len={self._tokens_asked} tokens, "
            f"which needs {format_bytes(self._bytes_for_requests(1))}; {self._tokens_held(kv_bytes)} tokens would "
            "fit: raise kv_bytes or lower max_model_len"
        )

    def _too_much(self, kv_bytes: int) -> str:
        workload = self.workload
        return (
            f"needs {format_bytes(self._fixed_bytes + kv_bytes)}: weights {format_bytes(workload.weight_bytes)}, "
            f"KV blocks {format_bytes(kv_bytes)}, activations {format_bytes(workload.activation_bytes)}; "
            f"available {format_bytes(self._available_bytes)}; {self._next_step()}"
        )

    def _next_step(self) -> str:
        left = self._available_bytes - self._fixed_bytes
        if left <= 0:
            return "use a smaller model or dtype, lower max_num_batched_tokens, or raise the memory limit"
        if not self.groups:
            return "lower kv_bytes, or raise the memory limit"
        tokens = self._tokens_held(left)
        if tokens == self._tokens_asked:
            return f"set kv_bytes to at most {left}"
        if tokens > 0:
            return f"lower max_model_len to {tokens}, use a smaller model or dtype, or raise the memory limit"
        return "use a smaller model or dtype, or raise the memory limit"


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _cut(kv_bytes: int, groups: Sequence[KVGroup]) -> KVArena:
    slab_bytes = _slab_bytes(kv_bytes, sorted({group.layout.block_bytes for group in groups}), len(groups))
    return KVArena(slab_bytes, kv_bytes // slab_bytes, tuple(groups))


def _slab_bytes(kv_bytes: int, block_bytes: Sequence[int], num_groups: int) -> int:
    """Choose the slab size with the smallest loss, the smaller one of equals."""
    if num_groups == 1:
        return block_bytes[0]
    candidates = {size * count for size in block_bytes for count in range(1, _MAX_SLAB_BLOCKS + 1)}
    candidates.add(math.lcm(*block_bytes))
    usable = [c for c in candidates if all(_blocks_in_any_slab(c, size) >= 1 for size in block_bytes)]
    return min(usable, key=lambda slab: (_loss(slab, kv_bytes, block_bytes, num_groups), slab))


def _loss(slab_bytes: int, kv_bytes: int, block_bytes: Sequence[int], num_groups: int) -> float:
    """Estimate the share of the arena that no group can use.

    The offset of a slab in a group's grid runs through the multiples of gcd(slab, block), so a slab of S bytes holds
    (S - B + gcd) / B whole cells of B bytes on average. The null slab is lost, and each group leaves half a slab
    unused on average.
    """
    cut_cells = max(size - math.gcd(slab_bytes, size) for size in block_bytes) / slab_bytes
    return cut_cells + (1 + num_groups / 2) * slab_bytes / max(kv_bytes, 1)


def _blocks_in_any_slab(slab_bytes: int, block_bytes: int) -> int:
    """Count the whole cells in the slab that lies worst in the group's grid."""
    return (slab_bytes - block_bytes + math.gcd(slab_bytes, block_bytes)) // block_bytes


def _slabs_for(arena: KVArena, num_blocks: Sequence[int]) -> int:
    """Count the slabs that surely hold `num_blocks` of each group, null slab included."""
    sizes = [group.layout.block_bytes for group in arena.groups]
    per_slab = [_blocks_in_any_slab(arena.slab_bytes, size) for size in sizes]
    return 1 + sum(map(_ceil_div, num_blocks, per_slab))


def _bytes_for(groups: Sequence[KVGroup], num_blocks: Sequence[int]) -> int:
    """Return the size of an arena that holds `num_blocks` of each group."""
    num_bytes = sum(count * group.layout.block_bytes for count, group in zip(num_blocks, groups, strict=True))
    while True:
        arena = _cut(num_bytes, groups)
        needed = _slabs_for(arena, num_blocks)
        if needed <= arena.num_slabs:
            return num_bytes
        # A larger arena may be cut into larger slabs, so the bytes are found by growing, not by a formula.
        num_bytes = max(needed * arena.slab_bytes, num_bytes + 1)
