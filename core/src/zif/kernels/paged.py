"""Kernels of attention over paged keys and values: one for mixed batches, and the merge of split ones.

One program takes some adjacent queries of one request with all query heads of one KV head, and walks over keys in tiles
with an online softmax (Milakov and Gimelshein, 2018; Dao et al., 2022). With splits, programs beside each other take
parts of the keys, and a second kernel merges their results in the order of the keys, so that the result does not
depend on which ends first (flash decoding: Dao et al., 2023). What is started is decided in `zif.kernels.attention`.
"""

import triton
import triton.language as tl


@triton.jit
def _find(member_start, num_members, tile, QUERIES: tl.constexpr):
    """Return which member a tile is of. The tiles of member i begin at member_start[i] // QUERIES + i, or later."""
    low, high = 0, num_members
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(member_start + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["num_members", "table_stride", "window"])
def _paged_attention(
    query, keys, values, out, partial, extremes, lse, sinks, slopes,
    members, member_start, query_start, seq_lens, block_table, scales,
    num_members, query_stride, block_stride, table_stride, num_heads, window, scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SINGLE: tl.constexpr, SPLIT_KEYS: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    LOG2E: tl.constexpr = 1.4426950408889634
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(2)
    member, first_query = tile, 0
    if not SINGLE:
        member = _find(member_start, num_members, tile, QUERIES)
        first_query = (tile - tl.load(member_start + member) // QUERIES - member) * QUERIES
    request = tl.load(members + member)
    first_row = tl.load(query_start + request)
    num_queries = tl.load(query_start + request + 1) - first_row
    seq_len = tl.load(seq_lens + request)
    # A tile beyond its request, or a request that only pads the batch.
    if (first_query >= num_queries) | (seq_len == 0):
        return
    context = seq_len - num_queries

    # Row m of the tile is query m // GROUP with head m % GROUP of this KV head.
    m = tl.arange(0, BLOCK_M)
    local_query = first_query + m // GROUP
    in_use = (m < QUERIES * GROUP) & (local_query < num_queries)
    row = (first_row + local_query).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    q = tl.load(
        query + row[:, None] * query_stride + head[:, None] * HEAD_DIM + d[None, :],
        mask=in_use[:, None] & in_head[None, :], other=0.0,
    )  # fmt: skip
    position = context + local_query

    # The keys that any query of the tile sees, and this split's share of them.
    last_key = seq_len
    if CAUSAL:
        last_key = tl.minimum(seq_len, context + first_query + QUERIES)
    first_key = 0
    if WINDOWED:
        first_key = tl.maximum(0, context + first_query - window + 1)
    origin = first_key // BLOCK_N * BLOCK_N
    if SPLIT_KEYS > 0:
        # A fixed share: how a request is split then depends on the request alone.
        share = SPLIT_KEYS
    else:
        share = tl.cdiv(tl.cdiv(last_key - origin, num_splits), BLOCK_N) * BLOCK_N
    start = origin + split * share
    end = tl.minimum(start + share, last_key)

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sinks is not None:
        if split == 0:
            peak = tl.load(sinks + head, mask=in_use, other=0.0).to(tl.float32) * LOG2E
            total = tl.full((BLOCK_M,), 1.0, tl.float32)
    weighted = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    factor = scale
    if scales is not None:
        factor = scale * tl.load(scales)
    head_start = kv_head.to(tl.int64) * (BLOCK_SIZE * HEAD_DIM)
    table = block_table + request.to(tl.int64) * table_stride
    n = tl.arange(0, BLOCK_N)
    for begin in range(start, end, BLOCK_N):
        key = begin + n
        # Entries of the table that no query sees are undefined, and what is stored there may be NaN.
        seen = (key >= first_key) & (key < end)
        block = tl.load(table + key // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        place = block * block_stride + head_start + (key % BLOCK_SIZE) * HEAD_DIM
        k = tl.load(keys + place[None, :] + d[:, None], mask=seen[None, :] & in_head[:, None], other=0.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * factor
        if CAPPED:
            # tanh, by its series where the difference of exponentials would lose digits.
            x = scores / softcap
            decayed = tl.exp(-2.0 * tl.abs(x))
            far = (1.0 - decayed) / (1.0 + decayed)
            squared = x * x
            near = x * (1.0 + squared * (-1.0 / 3.0 + squared * (2.0 / 15.0 + squared * (-17.0 / 315.0))))
            scores = softcap * tl.where(tl.abs(x) < 0.2, near, tl.where(x < 0.0, -far, far))
        if slopes is not None:
            slope = tl.load(slopes + head, mask=in_use, other=0.0)
            scores += slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
        # One comparison decides: a key that is not seen lies far ahead of every query.
        ahead = tl.where(seen, key, 1 << 30)[None, :]
        if WINDOWED:
            visible = (position[:, None] - ahead).to(tl.uint32, bitcast=True) < window.to(tl.uint32)
        elif CAUSAL:
            visible = ahead <= position[:, None]
        else:
            visible = ahead < (1 << 30)
        scores = tl.where(visible, scores * LOG2E, float("-inf"))
        raised = tl.maximum(peak, tl.max(scores, axis=1))
        # A row that has seen no key yet has the peak -inf, and -inf - -inf is no number.
        base = tl.where(raised == float("-inf"), 0.0, raised)
        decay = tl.exp2(peak - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        v = tl.load(values + place[:, None] + d[None, :], mask=seen[:, None] & in_head[None, :], other=0.0)
        weighted = tl.dot(
            weights.to(q.dtype), v.to(q.dtype), weighted * decay[:, None], input_precision="ieee"
        )  # fmt: skip
        peak = raised
    stored = in_use[:, None] & in_head[None, :]
    if partial is not None:
        part = (split.to(tl.int64) * tl.num_programs(0) + tile) * tl.num_programs(1) + kv_head
        tl.store(partial + (part * BLOCK_M + m[:, None]) * HEAD_DIM + d[None, :], weighted, mask=stored)
        tl.store(extremes + (part * BLOCK_M + m) * 2, peak, mask=in_use)
        tl.store(extremes + (part * BLOCK_M + m) * 2 + 1, total, mask=in_use)
    else:
        result = weighted / tl.where(total == 0.0, 1.0, total)[:, None]
        if scales is not None:
            result *= tl.load(scales + 1)
        target = out + row[:, None] * (num_heads * HEAD_DIM) + head[:, None] * HEAD_DIM + d[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=stored)
        if lse is not None:
            tl.store(lse + row * num_heads + head, peak / LOG2E + tl.log(total), mask=in_use)


@triton.jit(do_not_specialize=["num_members", "num_splits"])
def _merge_splits(
    partial, extremes, out, lse, members, member_start, query_start, seq_lens, scales,
    num_members, num_splits, num_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    LOG2E: tl.constexpr = 1.4426950408889634
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    member, first_query = tile, 0
    if not SINGLE:
        member = _find(member_start, num_members, tile, QUERIES)
        first_query = (tile - tl.load(member_start + member) // QUERIES - member) * QUERIES
    request = tl.load(members + member)
    first_row = tl.load(query_start + request)
    num_queries = tl.load(query_start + request + 1) - first_row
    if (first_query >= num_queries) | (tl.load(seq_lens + request) == 0):
        return
    m = tl.arange(0, BLOCK_M)
    local_query = first_query + m // GROUP
    in_use = (m < QUERIES * GROUP) & (local_query < num_queries)
    row = (first_row + local_query).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    d = tl.arange(0, BLOCK_D)
    stored = in_use[:, None] & (d < HEAD_DIM)[None, :]

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for split in range(num_splits):
        part = (split * tl.num_programs(0).to(tl.int64) + tile) * tl.num_programs(1) + kv_head
        other_peak = tl.load(extremes + (part * BLOCK_M + m) * 2, mask=in_use, other=float("-inf"))
        other_total = tl.load(extremes + (part * BLOCK_M + m) * 2 + 1, mask=in_use, other=0.0)
        other = tl.load(partial + (part * BLOCK_M + m[:, None]) * HEAD_DIM + d[None, :], mask=stored, other=0.0)
        raised = tl.maximum(peak, other_peak)
        base = tl.where(raised == float("-inf"), 0.0, raised)
        decay, other_decay = tl.exp2(peak - base), tl.exp2(other_peak - base)
        total = total * decay + other_total * other_decay
        weighted = weighted * decay[:, None] + other * other_decay[:, None]
        peak = raised
    result = weighted / tl.where(total == 0.0, 1.0, total)[:, None]
    if scales is not None:
        result *= tl.load(scales + 1)
    target = out + row[:, None] * (num_heads * HEAD_DIM) + head[:, None] * HEAD_DIM + d[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=stored)
    if lse is not None:
        tl.store(lse + row * num_heads + head, peak / LOG2E + tl.log(total), mask=in_use)


@triton.jit(do_not_specialize=["num_rows"])
def _write_kv(
    key, value, keys, values, slots, scales, num_rows, key_stride, value_stride, block_stride,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, LIMIT: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    # A row is one head of one token.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // NUM_HEADS, row % NUM_HEADS
    slot = tl.load(slots + token, mask=row < num_rows, other=-1)
    d = tl.arange(0, BLOCK_D)
    moved = (slot >= 0)[:, None] & (d < HEAD_DIM)[None, :]
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    target = (block * block_stride + (head * BLOCK_SIZE + offset) * HEAD_DIM)[:, None] + d[None, :]
    from_key = tl.load(key + (token * key_stride + head * HEAD_DIM)[:, None] + d[None, :], mask=moved, other=0.0)
    from_value = tl.load(value + (token * value_stride + head * HEAD_DIM)[:, None] + d[None, :], mask=moved, other=0.0)
    if scales is not None:
        scaled_key = from_key.to(tl.float32) / tl.load(scales)
        scaled_value = from_value.to(tl.float32) / tl.load(scales + 1)
        from_key = tl.minimum(tl.maximum(scaled_key, -LIMIT), LIMIT)
        from_value = tl.minimum(tl.maximum(scaled_value, -LIMIT), LIMIT)
        if INTEGER:
            # Adding and taking away 1.5 * 2^23 rounds to the nearest even integer.
            from_key = (from_key + 12582912.0) - 12582912.0
            from_value = (from_value + 12582912.0) - 12582912.0
    tl.store(keys + target, from_key.to(keys.dtype.element_ty), mask=moved)
    tl.store(values + target, from_value.to(values.dtype.element_ty), mask=moved)
