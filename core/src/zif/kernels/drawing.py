"""The stages of `zif.kernels.sampling`, in the order in which it goes through them: survey, keep, draw.

A token's key is the bits of how far its score is below the best one: a positive float32, so keys order as integers,
0 being the most likely token. Its weight is `floor(2**40 * p / p_max)`, as in `zif.runtime.drawing`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from zif.contract import ChosenTokens
from zif.kernels.launch import Argument, Launcher

_INFINITY = tl.constexpr(float("inf"))
_INFINITE_KEY = tl.constexpr(0x7F800000)
_NO_KEY = tl.constexpr(0x7FFFFFFF)
_WEIGHT_SCALE = tl.constexpr(2.0**40)
_FRACTION_SCALE = tl.constexpr(2.0**62)
_LOW = tl.constexpr(2**31 - 1)


@triton.jit
def _keys_of(logits, peak, temperature):
    # The maximum goes to zero first: dividing large logits by a small temperature would overflow.
    score = tl.math.div_rn(logits.to(tl.float32) - peak, temperature)
    return tl.abs(score).to(tl.int32, bitcast=True)


@triton.jit
def _weights_of(keys, min_p):
    likelihood = tl.exp(-keys.to(tl.float32, bitcast=True))
    return (tl.where(likelihood >= min_p, likelihood, 0.0) * _WEIGHT_SCALE).to(tl.int64)


@triton.jit
def _fraction_of(total, fraction):
    """Return floor(total * fraction / 2**62): schoolbook multiplication with digits of 31 bits."""
    middle = (total >> 31) * (fraction & _LOW) + (total & _LOW) * (fraction >> 31)
    carry = ((total & _LOW) * (fraction & _LOW)) >> 31
    return (total >> 31) * (fraction >> 31) + ((middle + carry) >> 31)


@triton.jit
def _share_of(total, top_p):
    return _fraction_of(total, (top_p * _FRACTION_SCALE).to(tl.int64))


@triton.jit
def _key_at(keys, units, goal):
    """Return the lowest key down to which, it included, the units sum to the goal; all bits set where none is."""
    found = tl.full((), 0, tl.int32)
    for step in range(31):
        trial = found | (1 << (30 - step))
        found = tl.where(tl.sum(tl.where(keys < trial, units, 0), axis=0) < goal, trial, found)
    return found


@triton.jit
def _survey_tiles(
    logits, peaks, temperatures, min_ps, top_ks, top_ps, masses, best, row_stride, vocab_size, num_tiles,
    GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Weigh each tile of a row, and find the best key of each of its LANES groups of GROUP tokens."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        place = tl.arange(0, GROUP)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        token = tile * (GROUP * LANES) + place
        values = tl.load(logits + row * row_stride + token, mask=token < vocab_size, other=-_INFINITY)
        keys = _keys_of(values, tl.load(peaks + row), temperature)
        weights = _weights_of(keys, tl.load(min_ps + row))
        tl.store(masses + row * num_tiles + tile, tl.sum(tl.sum(weights, axis=1), axis=0))
        if (tl.load(top_ks + row) < vocab_size) | (tl.load(top_ps + row) < 1):
            lane = tile * LANES + tl.arange(0, LANES)
            tl.store(best + row * num_tiles * LANES + lane, tl.min(keys, axis=0))


@triton.jit
def _keep_likely(
    logits, peaks, temperatures, min_ps, top_ks, top_ps, masses, best, keys, ids, counts,
    row_stride, vocab_size, num_tiles, num_groups,
    TILE: tl.constexpr, STEPS: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Write the tokens that may pass a row's filters, by rising id, and how many they are; KEPT at most are written."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    peak = tl.load(peaks + row)
    if (temperature > 0) & (tl.abs(peak) < _INFINITY) & ((top_k < vocab_size) | (top_p < 1)):
        min_p = tl.load(min_ps + row)
        index = tl.arange(0, TILES)
        total = tl.sum(tl.load(masses + row * num_tiles + index, mask=index < num_tiles, other=0), axis=0)
        group = tl.arange(0, GROUPS)
        inside = group < num_groups
        best_keys = tl.load(best + row * num_groups + group, mask=inside, other=_INFINITE_KEY)
        # The best of groups are some of the tokens: where they reach the goal, all tokens do.
        by_count = top_k < vocab_size
        goal = tl.where(by_count, top_k, _share_of(total, top_p))
        units = tl.where(by_count, inside.to(tl.int64), _weights_of(best_keys, min_p))
        last_key = _key_at(best_keys, units, goal)
        # Otherwise: tokens so light that all of them together would not be missed. No token is, of a count.
        too_light = tl.where(by_count, -1, (total - goal) // vocab_size)
        reached = last_key <= _INFINITE_KEY
        count = tl.full((), 0, tl.int32)
        for step in range(STEPS):
            token = step * TILE + tl.arange(0, TILE)
            valid = token < vocab_size
            values = tl.load(logits + row * row_stride + token, mask=valid, other=-_INFINITY)
            token_keys = _keys_of(values, peak, temperature)
            kept = valid & (token_keys <= last_key)
            if not reached:
                kept = valid & (_weights_of(token_keys, min_p) > too_light)
            ones = kept.to(tl.int32)
            place = count + tl.cumsum(ones, axis=0) - 1
            kept = kept & (place < KEPT)
            tl.store(keys + row * KEPT + place, token_keys, mask=kept)
            tl.store(ids + row * KEPT + place, token, mask=kept)
            count += tl.sum(ones, axis=0)
        tl.store(counts + row, count)


@triton.jit
def _draw_from_kept(
    peaks, temperatures, min_ps, top_ks, top_ps, masses, keys, ids, fractions, counts, token_ids, vocab_size, num_tiles,
    KEPT: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Draw for rows that have filters and not too many tokens kept."""
    row = tl.program_id(0).to(tl.int64)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    count = tl.load(counts + row)
    if (
        (tl.load(temperatures + row) > 0)
        & (tl.abs(tl.load(peaks + row)) < _INFINITY)
        & ((top_k < vocab_size) | (top_p < 1))
        & (count <= KEPT)
    ):
        place = tl.arange(0, KEPT)
        inside = place < count
        kept_keys = tl.load(keys + row * KEPT + place, mask=inside, other=_INFINITE_KEY)
        weights = tl.where(inside, _weights_of(kept_keys, tl.load(min_ps + row)), 0)
        index = tl.arange(0, TILES)
        total = tl.sum(tl.load(masses + row * num_tiles + index, mask=index < num_tiles, other=0), axis=0)
        if top_k < vocab_size:
            last_key = _key_at(kept_keys, inside.to(tl.int32), top_k)
            weights = tl.where(kept_keys <= last_key, weights, 0)
            total = tl.sum(weights, axis=0)
        if top_p < 1:
            last_key = _key_at(kept_keys, weights, _share_of(total, top_p))
            weights = tl.where(kept_keys <= last_key, weights, 0)
            total = tl.sum(weights, axis=0)
        goal = _fraction_of(total, tl.load(fractions + row))
        drawn = tl.sum((tl.cumsum(weights, axis=0) <= goal).to(tl.int32), axis=0)
        drawn = tl.minimum(drawn, count - 1)
        tl.store(token_ids + row, tl.load(ids + row * KEPT + drawn).to(tl.int64))


@triton.jit
def _draw_from_all(
    logits, peaks, temperatures, min_ps, top_ks, top_ps, masses, fractions, counts, token_ids,
    row_stride, vocab_size,
    TILE: tl.constexpr, NUM_TILES: tl.constexpr, TILES: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Draw for the other rows: those without filters but min_p, and those of which too many tokens were kept."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    peak = tl.load(peaks + row)
    filters = (top_k < vocab_size) | (top_p < 1)
    if (temperature > 0) & (tl.abs(peak) < _INFINITY) & ((tl.load(counts + row) > KEPT) | (not filters)):
        min_p = tl.load(min_ps + row)
        lane = tl.arange(0, TILE)
        index = tl.arange(0, TILES)
        logits += row * row_stride
        mass = tl.load(masses + row * NUM_TILES + index, mask=index < NUM_TILES, other=0)
        last_key = tl.full((), _NO_KEY, tl.int32)
        if filters:
            # First top_k, which counts; then top_p, which weighs what top_k left.
            for WEIGHS in tl.static_range(2):
                goal = _share_of(tl.sum(mass, axis=0), top_p) if WEIGHS else top_k
                limits = top_p < 1 if WEIGHS else top_k < vocab_size
                if limits:
                    found = tl.full((), 0, tl.int32)
                    for step in range(31):
                        trial = found | (1 << (30 - step))
                        reached = tl.full((), 0, tl.int64)
                        for tile in range(NUM_TILES):
                            token = tile * TILE + lane
                            valid = token < vocab_size
                            values = tl.load(logits + token, mask=valid, other=-_INFINITY)
                            keys = _keys_of(values, peak, temperature)
                            passes = valid & (keys < trial)
                            units = tl.where(passes, _weights_of(keys, min_p), 0) if WEIGHS else passes.to(tl.int32)
                            reached += tl.sum(units, axis=0)
                        found = tl.where(reached < goal, trial, found)
                    last_key = found
                    for tile in range(NUM_TILES):
                        token = tile * TILE + lane
                        values = tl.load(logits + token, mask=token < vocab_size, other=-_INFINITY)
                        keys = _keys_of(values, peak, temperature)
                        weights = tl.where(keys <= last_key, _weights_of(keys, min_p), 0)
                        mass = tl.where(index == tile, tl.sum(weights, axis=0), mass)
        goal = _fraction_of(tl.sum(mass, axis=0), tl.load(fractions + row))
        tile = tl.minimum(tl.sum((tl.cumsum(mass, axis=0) <= goal).to(tl.int32), axis=0), NUM_TILES - 1)
        goal -= tl.sum(tl.where(index < tile, mass, 0), axis=0)
        token = tile * TILE + lane
        values = tl.load(logits + token, mask=token < vocab_size, other=-_INFINITY)
        keys = _keys_of(values, peak, temperature)
        weights = tl.where(keys <= last_key, _weights_of(keys, min_p), 0)
        drawn = tile * TILE + tl.sum((tl.cumsum(weights, axis=0) <= goal).to(tl.int32), axis=0)
        tl.store(token_ids + row, tl.minimum(drawn, vocab_size - 1).to(tl.int64))


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """Options of S rows, on the device of their logits.

    temperature: [S], float32; 0: the most likely token. min_p: [S], float32. top_k: [S], int64, at least V: no limit.
    top_p: [S], float64, 1: no limit. fractions: [S], int64, random numerators over 2**62.
    """

    temperature: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    fractions: torch.Tensor


@dataclass(frozen=True, slots=True)
class DrawingRows:
    """What every stage reads. logits: [S, V]. chosen: the most likely tokens, of which `draw` replaces some."""

    logits: torch.Tensor
    chosen: ChosenTokens
    options: SamplingColumns

    @property
    def filters(self) -> tuple[torch.Tensor, ...]:
        """Return the kernels' arguments from the peaks on."""
        options = self.options
        return self.chosen.peaks, options.temperature, options.min_p, options.top_k, options.top_p

    def empty(self, num_columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Return memory for some numbers per row."""
        return torch.empty(self.logits.shape[0], num_columns, dtype=dtype, device=self.logits.device)


@dataclass(frozen=True, slots=True)
class Survey:
    """masses: [S, tiles], int64, the weight of each tile. best: [S, groups], int32, the best key of each group.

    tile: the number of tokens in a tile. Rows that do not draw have nothing there, rows without filters no best keys.
    """

    masses: torch.Tensor
    best: torch.Tensor
    tile: int


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """keys, ids: [S, most], int32, of the tokens that may pass the filters. counts: [S, 1], int32.

    A count above most means that tokens are missing. Rows without filters have nothing there.
    """

    keys: torch.Tensor
    ids: torch.Tensor
    counts: torch.Tensor


def survey(launch: Launcher, rows: DrawingRows) -> Survey:
    """Look at all tokens once."""
    num_rows, vocab_size = rows.logits.shape
    config = launch.tuning.config("survey_tiles", vocab_size=vocab_size)
    tile = config["LANES"] * config["GROUP"]
    num_tiles = triton.cdiv(vocab_size, tile)
    surveyed = Survey(rows.empty(num_tiles, torch.int64), rows.empty(num_tiles * config["LANES"], torch.int32), tile)
    sizes = (rows.logits.stride(0), vocab_size, num_tiles)
    arguments: tuple[Argument, ...] = (rows.logits, *rows.filters, surveyed.masses, surveyed.best, *sizes)
    launch(_survey_tiles, (num_rows, num_tiles), arguments, config)
    return surveyed


def keep_likely(launch: Launcher, rows: DrawingRows, surveyed: Survey) -> KeptTokens:
    """Write down the tokens that may pass the filters, where rows have any."""
    num_rows, vocab_size = rows.logits.shape
    most = launch.tuning.config("draw_from_kept", vocab_size=vocab_size)["KEPT"]
    kept = KeptTokens(*(rows.empty(columns, torch.int32) for columns in (most, most, 1)))
    config = launch.tuning.config("keep_likely", vocab_size=vocab_size)
    num_tiles, num_groups = surveyed.masses.shape[1], surveyed.best.shape[1]
    arguments: tuple[Argument, ...] = (
        *(rows.logits, *rows.filters, surveyed.masses, surveyed.best, kept.keys, kept.ids, kept.counts),
        *(rows.logits.stride(0), vocab_size, num_tiles, num_groups),
    )
    sizes = {"TILES": triton.next_power_of_2(num_tiles), "GROUPS": triton.next_power_of_2(num_groups), "KEPT": most}
    launch(_keep_likely, (num_rows,), arguments, config, STEPS=triton.cdiv(vocab_size, config["TILE"]), **sizes)
    return kept


def draw(launch: Launcher, rows: DrawingRows, surveyed: Survey, kept: KeptTokens) -> None:
    """Write the tokens of rows that draw, each row by the one or the other of two kernels."""
    num_rows, vocab_size = rows.logits.shape
    num_tiles = surveyed.masses.shape[1]
    tiles = triton.next_power_of_2(num_tiles)
    drawn = (rows.options.fractions, kept.counts, rows.chosen.token_ids)
    config = launch.tuning.config("draw_from_kept", vocab_size=vocab_size)
    by_kept: tuple[Argument, ...] = (*rows.filters, surveyed.masses, kept.keys, kept.ids, *drawn, vocab_size, num_tiles)
    launch(_draw_from_kept, (num_rows,), by_kept, config, TILES=tiles)
    config = launch.tuning.config("draw_from_all", vocab_size=vocab_size)
    arguments: tuple[Argument, ...] = (
        rows.logits,
        *rows.filters,
        surveyed.masses,
        *drawn,
        rows.logits.stride(0),
        vocab_size,
    )
    sizes = {"TILE": surveyed.tile, "NUM_TILES": num_tiles, "TILES": tiles, "KEPT": kept.keys.shape[1]}
    launch(_draw_from_all, (num_rows,), arguments, config, **sizes)
