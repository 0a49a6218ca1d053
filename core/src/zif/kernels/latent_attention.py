"""Attention over a paged cache of latents: the absorbed form of multi-head latent attention.

DeepSeek-V2 (arXiv:2405.04434, section 2.1). A token's cache row is its latent and its rotated key, which all heads
share; queries come multiplied into the space of the latents, so a latent is key and value in one and is read once:

    scores = scale * (q_latent . latent + q_rope . rope),  out = softmax(scores) latent

Decoding is split over the keys; the parts, float32, are merged in the order of the keys, so results repeat to the bit.
Each program serves heads of one query token: right for decoding and short drafts. Long prompts are better attended to
unabsorbed, with keys and values of full size.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from zif.kernels.launch import Launcher
from zif.kernels.state_slots import check_rows, token_requests


@dataclass(frozen=True, slots=True)
class LatentQueries:
    """latent: [T, H, latent], absorbed. rope: [T, H, rope], rotated. Model dtype, first axes may be strided."""

    latent: torch.Tensor
    rope: torch.Tensor


@dataclass(frozen=True, slots=True)
class LatentBatch:
    """Where each token's keys are. requests, num_visible: [T], int32. block_table: [R, max_blocks], int32; device.

    `num_visible` counts the keys at and before the token, 0 for a row of no request, whose output is zero.
    """

    requests: torch.Tensor
    num_visible: torch.Tensor
    block_table: torch.Tensor


@dataclass(frozen=True, slots=True)
class LatentOutput:
    """out: [T, H, latent], dtype of the queries. log_sum_exp: [T, H], float32, natural, -inf where no key is seen."""

    out: torch.Tensor
    log_sum_exp: torch.Tensor


def plan_latent(
    query_start: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, num_tokens: int
) -> LatentBatch:
    """Lay out a step once for all layers; nothing is read back from the device.

    query_start: [R + 1], seq_lens: [R], block_table: [R, max_blocks], int32. The last query of request r stands at
    position seq_lens[r] - 1. Entries of the table behind a sequence's end are not read.
    """
    requests = token_requests(query_start, num_tokens)
    if not seq_lens.shape[0]:
        return LatentBatch(requests, torch.zeros_like(requests), block_table)
    row = requests.clamp(max=seq_lens.shape[0] - 1).long()
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=query_start.device)
    visible = seq_lens[row] - (query_start[row + 1] - tokens) + 1
    return LatentBatch(requests, torch.where(requests < seq_lens.shape[0], visible, 0).to(torch.int32), block_table)


def splits_for(num_tokens: int, num_heads: int, max_seq_len: int, num_processors: int) -> int:
    """Return how many parts to cut the keys into so that two programs of 32 heads run on each processor.

    A part has 256 keys at least, and there are 64 parts at most: merging costs as much memory traffic as they are many.
    """
    programs = max(1, num_tokens * -(-num_heads // 32))
    wanted = -(-2 * num_processors // programs)
    return max(1, min(wanted, max_seq_len // 256, 64))


@triton.jit
def _latent_decode(
    q_latent, q_rope, cache, requests, num_visible, block_table, out, log_sum_exp,
    q_latent_stride, q_rope_stride, block_stride, table_stride, num_tokens, heads, scale_log2,
    LATENT: tl.constexpr, ROPE: tl.constexpr, LATENT_PAD: tl.constexpr, ROPE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Tiles of one token's heads are neighbors: they read the same keys at about the same time.
    tiles = tl.cdiv(heads, HEADS)
    token = (tl.program_id(0) // tiles).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    head = (tl.program_id(0) % tiles) * HEADS + tl.arange(0, HEADS)
    inside = head < heads
    place, turned = tl.arange(0, LATENT_PAD), tl.arange(0, ROPE_PAD)
    visible = tl.load(num_visible + token)
    part = tl.cdiv(tl.cdiv(visible, KEYS), SPLITS) * KEYS
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, visible)
    row = tl.load(requests + token).to(tl.int64)

    at = q_latent + token * q_latent_stride + head[:, None] * LATENT + place[None, :]
    query = tl.load(at, mask=inside[:, None] & (place < LATENT)[None, :], other=0.0)
    at = q_rope + token * q_rope_stride + head[:, None] * ROPE + turned[None, :]
    rotated = tl.load(at, mask=inside[:, None] & (turned < ROPE)[None, :], other=0.0)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, LATENT_PAD), tl.float32)
    for start in range(first, last, KEYS):
        position = start + tl.arange(0, KEYS)
        seen = position < last
        block = tl.load(block_table + row * table_stride + position // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        cell = (block * block_stride + position % BLOCK_SIZE * (LATENT + ROPE))[:, None]
        # What is not seen becomes zero, not only its weight: zero times NaN is NaN.
        known = seen[:, None]
        if LATENT_PAD != LATENT:
            known = known & (place < LATENT)[None, :]
        latent = tl.load(cache + cell + place[None, :], mask=known, other=0.0).to(query.dtype)
        known = seen[:, None]
        if ROPE_PAD != ROPE:
            known = known & (turned < ROPE)[None, :]
        rope = tl.load(cache + cell + LATENT + turned[None, :], mask=known, other=0.0).to(query.dtype)
        scores = tl.dot(rotated, tl.trans(rope), input_precision="ieee")
        scores = tl.dot(query, tl.trans(latent), scores, input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale_log2, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        sums = tl.dot(weights.to(latent.dtype), latent, sums * shrink[:, None], input_precision="ieee")
        top = higher

    line = (split * num_tokens + token) * heads + head
    # A part without keys has total 0 and top -inf: its logarithm is -inf.
    tl.store(log_sum_exp + line, (top + tl.log2(total)) * 0.6931471805599453, mask=inside)
    if (SPLITS == 1) | (first < last):
        result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        to = out + line[:, None] * LATENT + place[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=inside[:, None] & (place < LATENT)[None, :])


@triton.jit
def _latent_merge(
    parts, part_sums, out, log_sum_exp, num_rows,
    SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr, LATENT: tl.constexpr, LATENT_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    split = tl.arange(0, SPLITS_PAD)
    place = tl.arange(0, LATENT_PAD)[None, :]
    known = inside[:, None] & (split < SPLITS)[None, :]
    at = part_sums + split[None, :] * num_rows + row[:, None]
    logs = tl.load(at, mask=known, other=float("-inf"))
    top = tl.max(logs, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(logs - top[:, None]), axis=1)
    sums = tl.zeros((ROWS, LATENT_PAD), tl.float32)
    for index in range(SPLITS):
        line = index * num_rows + row
        log = tl.load(part_sums + line, mask=inside, other=float("-inf"))
        # Parts without keys were not written.
        mask = (inside & (log != float("-inf")))[:, None] & (place < LATENT)
        part = tl.load(parts + line[:, None] * LATENT + place, mask=mask, other=0.0)
        sums += part * tl.exp(log - top)[:, None]
    sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(log_sum_exp + row, top + tl.log(total), mask=inside)
    at = out + row[:, None] * LATENT + place
    tl.store(at, sums.to(out.dtype.element_ty), mask=inside[:, None] & (place < LATENT))


@triton.jit
def _write_latent(
    latent, rope, cache, slots, latent_stride, rope_stride, block_stride, num_tokens,
    BLOCK_SIZE: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    LATENT_PAD: tl.constexpr, ROPE_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + token, mask=token < num_tokens, other=-1).to(tl.int64)
    kept = (slot >= 0)[:, None]
    cell = (slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * (LATENT + ROPE))[:, None]
    token = token[:, None]
    place, turned = tl.arange(0, LATENT_PAD)[None, :], tl.arange(0, ROPE_PAD)[None, :]
    value = tl.load(latent + token * latent_stride + place, mask=kept & (place < LATENT), other=0.0)
    key = tl.load(rope + token * rope_stride + turned, mask=kept & (turned < ROPE), other=0.0)
    target = cache.dtype.element_ty
    tl.store(cache + cell + place, value.to(tl.float32).to(target), mask=kept & (place < LATENT))
    tl.store(cache + cell + LATENT + turned, key.to(tl.float32).to(target), mask=kept & (turned < ROPE))


def latent_attention(
    launch: Launcher, queries: LatentQueries, cache: torch.Tensor, batch: LatentBatch, scale: float, num_splits: int = 1
) -> LatentOutput:
    """Attend to the cached latents, causally.

    cache: [num_blocks, block_size, latent + rope], model dtype, first axis may be strided.
    `num_splits`: how many parts each token's keys are cut into, see `splits_for`. Raises `ValueError`.
    """
    _check_attention(queries, cache, batch, num_splits)
    (num_tokens, heads, latent), rope = queries.latent.shape, queries.rope.shape[2]
    device, sizes = queries.latent.device, {"LATENT": latent, "LATENT_PAD": _padded(latent)}
    out = LatentOutput(torch.empty(num_tokens, heads, latent, dtype=queries.latent.dtype, device=device),
                       torch.empty(num_tokens, heads, dtype=torch.float32, device=device))  # fmt: skip
    part = out
    if num_splits > 1:
        shape = (num_splits, num_tokens, heads)
        part = LatentOutput(torch.empty(*shape, latent, dtype=torch.float32, device=device),
                            torch.empty(shape, dtype=torch.float32, device=device))  # fmt: skip
    config = launch.tuning.config("latent_decode", heads=heads, latent=latent, bits=cache.element_size() * 8)
    arrays = (queries.latent, queries.rope, cache, batch.requests, batch.num_visible, batch.block_table)
    strides = (queries.latent.stride(0), queries.rope.stride(0), cache.stride(0), batch.block_table.stride(0))
    arguments = (*arrays, part.out, part.log_sum_exp, *strides, num_tokens, heads, float(scale) * math.log2(math.e))
    grid: tuple[int, ...] = (num_tokens * triton.cdiv(heads, config["HEADS"]), num_splits)
    constants = {**sizes, "ROPE": rope, "ROPE_PAD": _padded(rope), "BLOCK_SIZE": cache.shape[1], "SPLITS": num_splits}
    launch(_latent_decode, grid, arguments, config, **constants)
    if num_splits > 1:
        config = launch.tuning.config("latent_merge", latent=latent)
        grid = (triton.cdiv(num_tokens * heads, config["ROWS"]),)
        constants = {**sizes, "SPLITS": num_splits, "SPLITS_PAD": triton.next_power_of_2(num_splits)}
        merged = (part.out, part.log_sum_exp, out.out, out.log_sum_exp, num_tokens * heads)
        launch(_latent_merge, grid, merged, config, **constants)
    return out


def write_latent(
    launch: Launcher, latent: torch.Tensor, rope: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write tokens' rows into the cache, in its dtype; slot -1 writes nothing. Raises `ValueError`.

    latent: [T, latent]. rope: [T, rope]. cache: [num_blocks, block_size, latent + rope]. slots: [T], int32 or int64,
    block * block_size + offset.
    """
    num_tokens = slots.shape[0]
    check_rows("latent", latent, (num_tokens, latent.shape[-1]))
    check_rows("rope", rope, (num_tokens, rope.shape[-1]))
    _check_cache(cache, latent.shape[1] + rope.shape[1])
    config = launch.tuning.config("write_latent", latent=latent.shape[1])
    strides = (latent.stride(0), rope.stride(0), cache.stride(0))
    sizes = {"LATENT": latent.shape[1], "LATENT_PAD": _padded(latent.shape[1])}
    sizes |= {"ROPE": rope.shape[1], "ROPE_PAD": _padded(rope.shape[1]), "BLOCK_SIZE": cache.shape[1]}
    grid = (triton.cdiv(num_tokens, config["TOKENS"]),)
    launch(_write_latent, grid, (latent, rope, cache, slots, *strides, num_tokens), config, **sizes)


def _padded(columns: int) -> int:
    """Return the tile that holds so many columns and can be a factor of a matrix product."""
    return max(16, int(triton.next_power_of_2(columns)))


def _check_attention(queries: LatentQueries, cache: torch.Tensor, batch: LatentBatch, num_splits: int) -> None:
    if queries.latent.dim() != 3 or queries.rope.dim() != 3:
        shapes = tuple(queries.latent.shape), tuple(queries.rope.shape)
        raise ValueError(f"queries of shapes {shapes} must be [T, H, latent] and [T, H, rope]")
    num_tokens, heads, latent = queries.latent.shape
    check_rows("latent query", queries.latent, (num_tokens, heads, latent))
    check_rows("rotated query", queries.rope, (num_tokens, heads, queries.rope.shape[2]))
    _check_cache(cache, latent + queries.rope.shape[2])
    check_rows("block table", batch.block_table, tuple(batch.block_table.shape))
    if batch.requests.shape != (num_tokens,):
        raise ValueError(f"a batch of {tuple(batch.requests.shape)} tokens for {num_tokens} queries; plan it for these")
    if not 1 <= num_splits <= 256:
        raise ValueError(f"keys cannot be cut into {num_splits} parts; the limits are 1 and 256")


def _check_cache(cache: torch.Tensor, columns: int) -> None:
    if cache.dim() != 3 or cache.shape[2] != columns or (cache.numel() and not cache[0].is_contiguous()):
        found = f"{tuple(cache.shape)} with strides {cache.stride()}"
        raise ValueError(f"latent cache {found}; it must be [num_blocks, block_size, {columns}] with dense blocks")


def representative(launch: Launcher) -> None:
    """Start the kernels as models do: DeepSeek-V3, all 128 heads or the 16 of one of eight ranks."""
    for dtype in (torch.bfloat16, torch.float16):
        cache = torch.empty(1024, 64, 576, dtype=dtype, device="meta")
        indices = torch.empty(64, dtype=torch.int32, device="meta")
        batch = LatentBatch(indices, indices, torch.empty(64, 128, dtype=torch.int32, device="meta"))
        for heads in (16, 128):
            latent = torch.empty(64, heads, 512, dtype=dtype, device="meta")
            queries = LatentQueries(latent, torch.empty(64, heads, 64, dtype=dtype, device="meta"))
            latent_attention(launch, queries, cache, batch, 0.1)
            latent_attention(launch, queries, cache, batch, 0.1, num_splits=8)
        write_latent(launch, latent[:, 0].contiguous(), cache[0, :, 512:].contiguous(), cache, indices)
