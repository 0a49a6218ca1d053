"""Rotary positions, alone and fused with the writing of keys and values into KV pages.

One program takes some heads of one token. What is not rotated passes through, so that writing alone is the same
kernel with nothing to rotate.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from zif.contract import RotatedHeads
from zif.kernels.launch import Argument, Launcher
from zif.kernels.tuning import LaunchConfig

_FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3fn", torch.float8_e4m3fnuz: "e4m3fnuz"}
_ROUNDS_TO_INTEGERS = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding it leaves no bit for a fraction."""


@triton.jit
def _e4m3_bits(values, FORMAT: tl.constexpr):
    """Round float32 to the nearest e4m3, ties to even, beyond its range to its largest; as integers.

    By hand, because not every compiler knows the type. "fn" has the bias 7 and ends at 448; "fnuz" has 8 and ends
    at 240, has no negative zero, and its place is NaN.
    """
    BIAS: tl.constexpr = 7 if FORMAT == "e4m3fn" else 8
    LARGEST: tl.constexpr = 448.0 if FORMAT == "e4m3fn" else 240.0
    SMALLEST_NORMAL: tl.constexpr = 2.0 ** (1 - BIAS)
    # One unit in the last place of this is the smallest subnormal, 2 ** (-2 - BIAS).
    ALIGNER: tl.constexpr = 2.0 ** (21 - BIAS)
    ALIGNER_BITS: tl.constexpr = (21 - BIAS + 127) << 23
    size = tl.abs(values)
    size = tl.where(size > LARGEST, LARGEST, size)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - BIAS) << 3)
    subnormal = (size + ALIGNER).to(tl.int32, bitcast=True) - ALIGNER_BITS
    code = tl.where(size < SMALLEST_NORMAL, subnormal, normal)
    sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
    if FORMAT == "e4m3fn":
        return tl.where(values != values, 0x7F, code | sign)
    return tl.where(values != values, 0x80, tl.where(code == 0, 0, code | sign))


@triton.jit
def _store_heads(target, values, mask, scale, FORMAT: tl.constexpr):
    """Store float32 values as they are or quantized with a scale."""
    if FORMAT == "plain":
        tl.store(target, values.to(target.dtype.element_ty), mask=mask)
    elif FORMAT == "int8":
        scaled = tl.math.div_rn(values, scale)
        # Written so that a NaN, which int8 does not have, becomes zero.
        scaled = tl.where(scaled > 127.0, 127.0, tl.where(scaled >= -128.0, scaled, tl.where(scaled < 0, -128.0, 0.0)))
        rounded = (scaled + _ROUNDS_TO_INTEGERS) - _ROUNDS_TO_INTEGERS
        tl.store(target, rounded.to(tl.int8), mask=mask)
    else:
        tl.store(target, _e4m3_bits(tl.math.div_rn(values, scale), FORMAT).to(tl.uint8), mask=mask)


@triton.jit
def _turn_heads(
    source, target, cos, sin, alive, scale,
    ROWS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, FORMAT: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotate the first 2R elements of the heads at source, to target. source, target, cos, sin: [ROWS], pointers."""
    source, target, alive = source[:, None], target[:, None], alive[:, None]
    if R > 0:
        pair = tl.arange(0, PAIRS)[None, :]
        turned_pairs = alive & (pair < R)
        cosine = tl.load(cos[:, None] + pair, mask=turned_pairs, other=0.0)
        sine = tl.load(sin[:, None] + pair, mask=turned_pairs, other=0.0)
        if INTERLEAVED:
            place = tl.arange(0, 2 * PAIRS)[None, :]
            both = alive & (place < 2 * R)
            wide = tl.load(source + place, mask=both, other=0.0).to(tl.float32)
            first, second = tl.split(tl.reshape(wide, (ROWS, PAIRS, 2)))
            turned = tl.join(first * cosine - second * sine, second * cosine + first * sine)
            _store_heads(target + place, tl.reshape(turned, (ROWS, 2 * PAIRS)), both, scale, FORMAT)
        else:
            first = tl.load(source + pair, mask=turned_pairs, other=0.0).to(tl.float32)
            second = tl.load(source + (pair + R), mask=turned_pairs, other=0.0).to(tl.float32)
            _store_heads(target + pair, first * cosine - second * sine, turned_pairs, scale, FORMAT)
            _store_heads(target + (pair + R), second * cosine + first * sine, turned_pairs, scale, FORMAT)
    if 2 * R < D:
        place = 2 * R + tl.arange(0, REST)[None, :]
        both = alive & (place < D)
        passed = tl.load(source + place, mask=both, other=0.0).to(tl.float32)
        _store_heads(target + place, passed, both, scale, FORMAT)


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate_heads(
    query, key, value, cos, sin, slots, query_out, key_out, num_tokens,
    query_stride, key_stride, value_stride, cos_stride, sin_stride,
    num_query_heads, num_kv_heads, query_blocks, block_size, first_page, pages_per_block, key_scale, value_scale,
    ROWS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, FORMAT: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # A row is one head of one token.
    block = tl.program_id(0)
    if block < query_blocks:
        row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        token, head = row // num_query_heads, row % num_query_heads
        if R > 0:
            cosines, sines = cos + token * cos_stride, sin + token * sin_stride
        else:
            cosines, sines = token, token
        _turn_heads(
            query + (token * query_stride + head * D), query_out + row * D, cosines, sines, token < num_tokens, 1.0,
            ROWS, D, R, INTERLEAVED, "plain", PAIRS, REST,
        )  # fmt: skip
    else:
        row = (block - query_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        token, head = row // num_kv_heads, row % num_kv_heads
        alive = token < num_tokens
        if R > 0:
            cosines, sines = cos + token * cos_stride, sin + token * sin_stride
        else:
            cosines, sines = token, token
        if slots is None:
            _turn_heads(
                key + (token * key_stride + head * D), key_out + row * D, cosines, sines, alive, 1.0,
                ROWS, D, R, INTERLEAVED, FORMAT, PAIRS, REST,
            )  # fmt: skip
        else:
            slot = tl.load(slots + token, mask=alive, other=-1)
            page = (slot // block_size) * pages_per_block + first_page
            target = key_out + ((page * num_kv_heads + head) * block_size + slot % block_size) * D
            _turn_heads(
                key + (token * key_stride + head * D), target, cosines, sines, slot >= 0, key_scale,
                ROWS, D, R, INTERLEAVED, FORMAT, PAIRS, REST,
            )  # fmt: skip
            # The values are on the page after, and are not rotated.
            target += num_kv_heads * block_size * D
            _turn_heads(
                value + (token * value_stride + head * D), target, cosines, sines, slot >= 0, value_scale,
                ROWS, D, 0, False, FORMAT, PAIRS, WIDTH,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ProjectedHeads:
    """What a layer's projection gives. query: [T, H, D]. key, value: [T, K, D]. First axes may be strided."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class Angles:
    """The rotation of each token. cos, sin: [T, R], float32. Pairs are (i, i + R), or (2i, 2i + 1) if interleaved."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class KVTarget:
    """Where keys and values go.

    pages: [num_pages, K, block_size, D]; layer `layer` of a block has its keys at page
    block * 2 * num_layers + 2 * layer, its values on the page after. slots: [T], int64,
    block * block_size + offset; below zero: the token writes nothing. Pages of int8 or float8 hold value / scale,
    rounded to the nearest, ties to even, and clamped to what the type has; int8 has zero for NaN.
    """

    pages: torch.Tensor
    slots: torch.Tensor
    layer: int
    num_layers: int
    key_scale: float = 1.0
    value_scale: float = 1.0


def rotate(
    launch: Launcher, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> RotatedHeads:
    """Implement `OpTable.rotate`. Raises `ValueError` where shapes do not fit."""
    angles = Angles(cos, sin, interleaved)
    _check_angles(query, angles)
    query_out, key_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key))
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    config = launch.tuning.config("rotate_heads", head_dim=head_dim)
    query_blocks, kv_blocks = (triton.cdiv(num_tokens * n, config["ROWS"]) for n in (num_heads, num_kv_heads))
    arguments = (
        *(query, key, None, cos, sin, None, query_out, key_out, num_tokens),
        *(query.stride(0), key.stride(0), 0, cos.stride(0), sin.stride(0)),
        *(num_heads, num_kv_heads, query_blocks, 0, 0, 0, 0.0, 0.0),
    )
    _start(launch, (query_blocks + kv_blocks,), arguments, config, _Rotation(head_dim, angles, "plain"))
    return RotatedHeads(query_out, key_out)


def rotate_and_write(launch: Launcher, heads: ProjectedHeads, angles: Angles, target: KVTarget) -> torch.Tensor:
    """Rotate queries and keys, write keys and values to their slots. Returns the queries: [T, H, D].

    In one launch. Raises `ValueError` where shapes, dtypes or numbers do not fit.
    """
    query = heads.query
    _check_angles(query, angles)
    query_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    config = launch.tuning.config("rotate_heads", head_dim=query.shape[2])
    num_tokens = query.shape[0]
    query_blocks = triton.cdiv(num_tokens * query.shape[1], config["ROWS"])
    arguments = (
        *(query, heads.key, heads.value, angles.cos, angles.sin, target.slots, query_out, _memory(target), num_tokens),
        *(query.stride(0), heads.key.stride(0), heads.value.stride(0), angles.cos.stride(0), angles.sin.stride(0)),
        *(query.shape[1], heads.key.shape[1], query_blocks, *_place(heads.key, heads.value, target)),
    )
    grid = (query_blocks + triton.cdiv(num_tokens * heads.key.shape[1], config["ROWS"]),)
    _start(launch, grid, arguments, config, _Rotation(query.shape[2], angles, _format(target)))
    return query_out


def write(launch: Launcher, key: torch.Tensor, value: torch.Tensor, target: KVTarget) -> None:
    """Write keys and values that have their positions already, or need none. key, value: [T, K, D]."""
    config = launch.tuning.config("rotate_heads", head_dim=key.shape[2])
    # No program is one of queries: what stands in their place only has a type.
    arguments = (
        *(key, key, value, None, None, target.slots, key, _memory(target), key.shape[0]),
        *(0, key.stride(0), value.stride(0), 0, 0),
        *(0, key.shape[1], 0, *_place(key, value, target)),
    )
    grid = (triton.cdiv(key.shape[0] * key.shape[1], config["ROWS"]),)
    _start(launch, grid, arguments, config, _Rotation(key.shape[2], None, _format(target)))


@dataclass(frozen=True, slots=True)
class _Rotation:
    """The compile-time part of a call."""

    head_dim: int
    angles: Angles | None
    format: str


def _start(
    launch: Launcher,
    grid: tuple[int, ...],
    arguments: tuple[Argument, ...],
    config: LaunchConfig,
    rotation: _Rotation,
) -> None:
    head_dim, angles = rotation.head_dim, rotation.angles
    num_pairs = 0 if angles is None else angles.cos.shape[1]
    constants = {
        "D": head_dim,
        "R": num_pairs,
        "INTERLEAVED": angles is not None and angles.interleaved,
        "FORMAT": rotation.format,
        "PAIRS": triton.next_power_of_2(max(num_pairs, 1)),
        "REST": triton.next_power_of_2(max(head_dim - 2 * num_pairs, 1)),
        "WIDTH": triton.next_power_of_2(head_dim),
    }
    launch(_rotate_heads, grid, arguments, config, **constants)


def _place(key: torch.Tensor, value: torch.Tensor, target: KVTarget) -> tuple[int, int, int, float, float]:
    """Return the kernel's arguments from the block size on."""
    pages = target.pages
    if key.shape != value.shape or pages.dim() != 4 or key.shape[1:] != (pages.shape[1], pages.shape[3]):
        shapes = tuple(key.shape), tuple(value.shape), tuple(pages.shape)
        raise ValueError(f"key, value and pages have the shapes {shapes!r}; they must be [T, K, D] twice, [N, K, B, D]")
    if not pages.is_contiguous():
        raise ValueError(f"pages have the strides {pages.stride()!r}; they must be dense")
    if pages.dtype not in (key.dtype, *_FORMATS):
        raise ValueError(f"pages of {pages.dtype!r} cannot hold {key.dtype!r}; use that, int8 or float8 e4m3")
    if not 0 <= target.layer < target.num_layers:
        raise ValueError(f"layer={target.layer!r} must be from 0 to {target.num_layers - 1}")
    if not (target.key_scale > 0 and target.value_scale > 0):
        raise ValueError(f"scales {(target.key_scale, target.value_scale)!r} must be positive")
    if target.slots.shape != key.shape[:1]:
        raise ValueError(f"{target.slots.numel()!r} slots must be one per token, {key.shape[0]}")
    scales = float(target.key_scale), float(target.value_scale)
    return pages.shape[2], 2 * target.layer, 2 * target.num_layers, *scales


def _check_angles(heads: torch.Tensor, angles: Angles) -> None:
    shape, expected = tuple(angles.cos.shape), heads.shape[0]
    if angles.cos.shape != angles.sin.shape or shape[0] != expected or not 0 < 2 * shape[1] <= heads.shape[2]:
        raise ValueError(f"cos of {shape!r} must be like sin, [{expected}, R] with R from 1 to {heads.shape[2] // 2}")


def _format(target: KVTarget) -> str:
    return _FORMATS.get(target.pages.dtype, "plain")


def _memory(target: KVTarget) -> torch.Tensor:
    """Return the pages as what the kernel stores: float8 is put together as bits."""
    return target.pages.view(torch.uint8) if _format(target).startswith("e4m3") else target.pages


def representative(launch: Launcher) -> None:
    """Start the kernels as models do: 32 heads of 128, 8 of them for keys; a part of a head; all formats of KV."""

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype in (torch.bfloat16, torch.float16):
        for interleaved, head_dim, num_pairs in ((False, 128, 64), (True, 128, 64), (False, 80, 16), (True, 96, 48)):
            fused = empty(64, 48, head_dim, dtype=dtype)
            query, key, value = fused[:, :32], fused[:, 32:40], fused[:, 40:]
            cos = empty(64, num_pairs, dtype=torch.float32)
            rotate(launch, query, key, cos, cos, interleaved)
        query, key, value = (empty(64, heads, 128, dtype=dtype) for heads in (32, 8, 8))
        cos = empty(64, 64, dtype=torch.float32)
        angles = Angles(cos, cos)
        slots = empty(64, dtype=torch.int64)
        for pages_dtype in (dtype, *_FORMATS):
            pages = empty(64, 8, 16, 128, dtype=pages_dtype)
            target = KVTarget(pages, slots, 1, 32, 0.5, 0.25)
            rotate_and_write(launch, ProjectedHeads(query, key, value), angles, target)
        write(launch, key, value, KVTarget(empty(64, 8, 16, 128, dtype=dtype), slots, 1, 32))
