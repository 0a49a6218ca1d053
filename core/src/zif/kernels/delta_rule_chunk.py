"""The gated delta rule over packed prompts, in chunks (arXiv:2412.06464, section 3.3, after arXiv:2406.06484).

Inside a chunk of tokens let c_i be the sum of g up to and with token i. The changes d_i = beta_i (v_i - ...), which
each token makes to the state along its key, follow from the state S before the chunk:

    A_ij = beta_i exp(c_i - c_j) k_i.k_j for i > j, else 0        T = (I + A)^-1
    U = T (beta v),  W = T (beta exp(c) k),  D = U - W S
    o_i = scale * (exp(c_i) q_i S + sum_{j <= i} exp(c_i - c_j) q_i.k_j d_j)
    S' = exp(c_last) S + sum_j exp(c_last - c_j) k_j d_j^T

The first kernel makes T, U and W of all chunks at once; the second walks along each request, its state in registers.
A NaN input spoils its chunk and what follows in its request, no other request.

T is computed by halves: the inverse of [[P, 0], [X, Q]] is [[P', 0], [-Q' X P', Q']], so pairs of diagonal blocks grow
from 1 to the chunk with two products each, all blocks at once. Unlike the series I - A + A^2 ..., whose terms grow as
binomials where keys repeat, nothing cancels that is not small.
"""

import torch
import triton
import triton.language as tl

from zif.kernels.delta_rule import NORM_EPS, DeltaInputs, example
from zif.kernels.launch import Launcher
from zif.kernels.state_slots import StateSlots


@triton.jit
def _delta_prepare(
    k, v, g, beta, updates, erasures, query_start, num_requests, steps,
    k_stride, v_stride, g_stride, beta_stride, eps,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr, NORMALIZE: tl.constexpr, CHUNK: tl.constexpr,
    LEVELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # Request r's chunks are programs query_start[r] // CHUNK + r and on: enough for any lengths, known without them.
    program = tl.program_id(0)
    request, high = 0, num_requests - 1
    for _ in range(steps):
        middle = (request + high + 1) // 2
        after = tl.load(query_start + middle) // CHUNK + middle > program
        high = tl.where(after, middle - 1, high)
        request = tl.where(after, request, middle)
    first = tl.load(query_start + request)
    start = first + (program - first // CHUNK - request) * CHUNK
    last = tl.load(query_start + request + 1)
    if start >= last:
        return
    head = tl.program_id(1)
    offset = tl.arange(0, CHUNK)
    token = (start + offset).to(tl.int64)
    active = start + offset < last
    decay = tl.cumsum(tl.load(g + token * g_stride + head, mask=active, other=0.0).to(tl.float32), axis=0)
    rate = tl.load(beta + token * beta_stride + head, mask=active, other=0.0).to(tl.float32)
    place = tl.arange(0, KEY_PAD)[None, :]
    known = active[:, None] & (place < KEY)
    at = k + token[:, None] * k_stride + head // (HEADS // KEY_HEADS) * KEY + place
    key = tl.load(at, mask=known, other=0.0)
    if NORMALIZE:
        wide = key.to(tl.float32)
        key = (wide * tl.rsqrt(tl.sum(wide * wide, axis=1) + eps)[:, None]).to(key.dtype)

    earlier = offset[:, None] > offset[None, :]
    since = tl.where(earlier, decay[:, None] - decay[None, :], float("-inf"))
    mixed = tl.dot(key, tl.trans(key), input_precision="ieee") * tl.exp(since) * rate[:, None]
    apart = offset[:, None] ^ offset[None, :]
    # Blocks of one and two: the identity, and what is under the diagonal once.
    solved = tl.where(apart == 0, 1.0, tl.where(apart == 1, -mixed, 0.0))
    # Factors are float32, or cut into parts of bfloat16, which matrix units of every kind multiply; two parts of a
    # factor hold 16 bits of 24, and three products of parts all that counts.
    precision: tl.constexpr = "ieee" if PARTS == 1 else "bf16x3"
    for level in tl.static_range(LEVELS):
        # Of pairs of diagonal blocks with 2, 4, 8 .. rows, what is below the first and left of the second.
        corner = tl.where((apart >= (2 << level)) & (apart < (4 << level)), mixed, 0.0)
        product = tl.dot(solved, corner, input_precision=precision)
        solved -= tl.dot(product, solved, input_precision=precision)
    solved *= rate[None, :]

    scaled = (solved * tl.exp(decay)[None, :]).to(key.dtype)
    erased = tl.dot(scaled, key, input_precision="ieee")
    at = erasures + (token[:, None] * HEADS + head) * KEY + place
    tl.store(at, erased.to(erasures.dtype.element_ty), mask=known)
    column = tl.arange(0, VALUE_PAD)[None, :]
    known = active[:, None] & (column < VALUE)
    value = tl.load(v + token[:, None] * v_stride + head * VALUE + column, mask=known, other=0.0)
    updated = tl.dot(solved.to(value.dtype), value, input_precision="ieee")
    at = updates + (token[:, None] * HEADS + head) * VALUE + column
    tl.store(at, updated.to(updates.dtype.element_ty), mask=known)


@triton.jit
def _delta_chunk(
    q, k, g, updates, erasures, state, out, read, write, query_start,
    q_stride, k_stride, g_stride, state_stride, scale, eps,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    KEY_PAD: tl.constexpr, NORMALIZE: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    request = tl.program_id(2).to(tl.int64)
    key_place = head // (HEADS // KEY_HEADS) * KEY
    row = tl.arange(0, KEY_PAD)
    column = tl.program_id(1) * VALUES + tl.arange(0, VALUES)[None, :]
    offset = tl.arange(0, CHUNK)
    source = tl.load(read + request).to(tl.int64)
    target = tl.load(write + request).to(tl.int64)
    first = tl.load(query_start + request)
    last = tl.load(query_start + request + 1)
    cell = (head * KEY + row)[:, None] * VALUE + column
    carried = tl.zeros((KEY_PAD, VALUES), tl.float32)
    if source >= 0:
        here = (row < KEY)[:, None] & (column < VALUE)
        carried += tl.load(state + source * state_stride + cell, mask=here, other=0.0).to(tl.float32)

    for start in range(first, last, CHUNK):
        position = start + offset
        active = position < last
        token = position.to(tl.int64)
        decay = tl.load(g + token * g_stride + head, mask=active, other=0.0).to(tl.float32)
        whole = tl.sum(decay, axis=0)
        decay = tl.cumsum(decay, axis=0)
        known, inside = active[:, None], active[:, None]
        if KEY_PAD != KEY:
            known = known & (row < KEY)[None, :]
        if VALUE % VALUES:
            inside = inside & (column < VALUE)
        token = token[:, None]
        query = tl.load(q + token * q_stride + key_place + row[None, :], mask=known, other=0.0)
        key = tl.load(k + token * k_stride + key_place + row[None, :], mask=known, other=0.0)
        longer = tl.full((CHUNK,), 1.0, tl.float32)
        if NORMALIZE:
            wide = query.to(tl.float32)
            longer = tl.rsqrt(tl.sum(wide * wide, axis=1) + eps)
            wide = key.to(tl.float32)
            key = (wide * tl.rsqrt(tl.sum(wide * wide, axis=1) + eps)[:, None]).to(key.dtype)

        erased = tl.load(erasures + (token * HEADS + head) * KEY + row[None, :], mask=known, other=0.0)
        updated = tl.load(updates + (token * HEADS + head) * VALUE + column, mask=inside, other=0.0)
        held = carried.to(query.dtype)
        change = updated.to(tl.float32) - tl.dot(erased, held, input_precision="ieee")
        since = tl.where(position[:, None] >= position[None, :], decay[:, None] - decay[None, :], float("-inf"))
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * tl.exp(since)
        result = tl.dot(query, held, input_precision="ieee") * tl.exp(decay)[:, None]
        result = tl.dot(scores.to(key.dtype), change.to(key.dtype), result, input_precision="ieee")
        result *= (longer * scale)[:, None]
        to = out + (token * HEADS + head) * VALUE + column
        tl.store(to, result.to(out.dtype.element_ty), mask=inside)
        change = (change * tl.exp(whole - decay)[:, None]).to(key.dtype)
        carried = tl.dot(tl.trans(key), change, carried * tl.exp(whole), input_precision="ieee")

    if target >= 0:
        here = (row < KEY)[:, None] & (column < VALUE)
        tl.store(state + target * state_stride + cell, carried.to(state.dtype.element_ty), mask=here)


def delta_rule_chunk(
    launch: Launcher, inputs: DeltaInputs, state: torch.Tensor, slots: StateSlots, query_start: torch.Tensor
) -> torch.Tensor:
    """Advance several requests by their packed tokens, the states in place. state: [num_slots, H, K, V], float32.

    query_start: [R + 1], int32. Returns [T, H, V], dtype of v; rows behind the last request are undefined. Products of
    matrices take operands in the dtype of k and add in float32; T is computed more exactly. Raises `ValueError`.
    """
    num_requests = query_start.shape[0] - 1
    inputs.check(state, slots, num_requests)
    (num_tokens, heads, dim), device = inputs.v.shape, inputs.v.device
    out, updates = (torch.empty(inputs.v.shape, dtype=inputs.v.dtype, device=device) for _ in range(2))
    erasures = torch.empty(num_tokens, heads, state.shape[2], dtype=inputs.k.dtype, device=device)
    quantities = {"key": state.shape[2], "value": dim, "bits": inputs.k.element_size() * 8}
    walk = launch.tuning.config("delta_chunk", **quantities)
    chunk, constants = walk["CHUNK"], inputs.constants()

    config = launch.tuning.config("delta_prepare", **quantities)
    arrays = (inputs.k, inputs.v, inputs.g, inputs.beta, updates, erasures, query_start)
    sizes = (num_requests, num_requests.bit_length(), *inputs.strides()[1:], NORM_EPS)
    solving = {"CHUNK": chunk, "LEVELS": chunk.bit_length() - 2}
    padded = max(16, triton.next_power_of_2(dim))
    grid: tuple[int, ...] = (num_tokens // chunk + num_requests if num_requests else 0, heads)
    launch(_delta_prepare, grid, (*arrays, *sizes), config, **constants, **solving, VALUE_PAD=padded)

    arrays = (inputs.q, inputs.k, inputs.g, updates, erasures, state, out)
    strides = (inputs.q.stride(0), inputs.k.stride(0), inputs.g.stride(0), state.stride(0))
    arguments = (*arrays, slots.read, slots.write, query_start, *strides, float(inputs.scale), NORM_EPS)
    grid = (heads, triton.cdiv(dim, walk["VALUES"]), num_requests)
    launch(_delta_chunk, grid, arguments, walk, **constants)
    return out


def representative(launch: Launcher) -> None:
    """Start the kernels as models do: Qwen3-Next, 16 key heads and 32 value heads of 128."""
    for dtype in (torch.bfloat16, torch.float16):
        inputs, state, indices = example(dtype, num_tokens=4096)
        query_start = torch.empty(65, dtype=torch.int32, device="meta")
        delta_rule_chunk(launch, inputs, state, StateSlots(indices, indices), query_start)
