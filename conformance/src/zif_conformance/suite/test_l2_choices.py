"""L2: the choice of the next token, by platforms that make it; of the others a note says that they leave it to core."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from zif.contract import ChosenTokens, Device, DrawOptions
from zif_conformance.gates import GateResult, exact, guarded, hold
from zif_conformance.marks import Safety, conforms
from zif_conformance.oracle.choices import (
    ONE,
    Choices,
    RowOptions,
    draw_options,
    drawn_rows,
    kept_weights,
    min_p_that_keeps,
    top_p_that_keeps,
    zipf_logits,
)
from zif_conformance.oracle.inputs import strided

Options = Callable[[torch.Tensor], RowOptions]
"""The options of a row, for its logits, [V]."""

FILTERS: dict[str, Options] = {
    "greedy": lambda logits: RowOptions(temperature=0.0),
    "none": lambda logits: RowOptions(),
    "hot": lambda logits: RowOptions(temperature=3.0),
    "cold": lambda logits: RowOptions(temperature=0.05),
    "min-p": lambda logits: RowOptions(0.8, min_p=min_p_that_keeps(logits, 0.8, 7)),
    "min-p-one": lambda logits: RowOptions(min_p=1.0),
    "top-k": lambda logits: RowOptions(1.3, top_k=40),
    "top-k-one": lambda logits: RowOptions(4.0, top_k=1),
    "top-k-all-but-one": lambda logits: RowOptions(top_k=max(1, len(logits) - 1)),
    "top-k-all": lambda logits: RowOptions(top_k=len(logits)),
    "top-p": lambda logits: RowOptions(0.7, top_p=top_p_that_keeps(logits, 0.7, min(9, len(logits)))),
    "top-p-tiny": lambda logits: RowOptions(2.0, top_p=1e-9),
    "top-p-wide": lambda logits: RowOptions(5.0, top_p=top_p_that_keeps(logits, 5.0, 1 + 9 * len(logits) // 10)),
    "top-k-then-top-p": lambda logits: RowOptions(1.5, top_k=4, top_p=0.9),
    "all": lambda logits: RowOptions(0.9, min_p=min_p_that_keeps(logits, 0.9, 12), top_k=8, top_p=0.77),
}
SIZES = (17, 700, 5003)
NOT_FINITE = {"nan": math.nan, "infinity": math.inf, "all-excluded": -math.inf}


@conforms(level="L2", gate="G1", clause="9.5")
@pytest.mark.parametrize("vocab_size", [SIZES[0], SIZES[-1]])
@pytest.mark.parametrize("name", FILTERS)
def test_value(device: Device, name: str, vocab_size: int, record_gate: Any) -> None:
    logits = zipf_logits(12, vocab_size, seed=vocab_size)
    _holds(device, _choices(logits, [FILTERS[name](row) for row in logits]), record_gate)


@conforms(level="L2", gate="G1", clause="9.5")
@pytest.mark.parametrize("vocab_size", SIZES)
def test_rows_do_not_mix(device: Device, vocab_size: int, record_gate: Any) -> None:
    """Every kind of row in one batch gives the token that it gives alone, also in another order."""
    logits = zipf_logits(2 * len(FILTERS), vocab_size)
    choices = _choices(logits, [make(row) for row, make in zip(logits, [*FILTERS.values()] * 2, strict=True)])
    _holds(device, choices, record_gate)
    _holds(device, choices.rows([*range(len(logits))][::-1]), record_gate)
    for row in range(0, len(logits), 5):
        _holds(device, choices.rows([row]), record_gate)


@conforms(level="L2", gate="G1", clause=("9.4", "9.5"), negative=True)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_ties_go_to_the_lowest_id(device: Device, vocab_size: int, record_gate: Any) -> None:
    logits = torch.zeros(4, vocab_size)
    logits[1, [5, 9, vocab_size - 1]] = 3.0
    logits[2] = -torch.inf
    logits[2, [vocab_size - 2, vocab_size - 1]] = -7.0
    logits[3, [0, vocab_size - 1]] = math.nextafter(1.0, 2.0)
    options = draw_options([RowOptions(temperature=0.0)] * 4, [ONE - 1] * 4)
    _holds(device, Choices(logits, options, torch.tensor([0, 5, vocab_size - 2, 0])), record_gate)


@conforms(level="L2", gate="G1", clause="9.5", negative=True)
@pytest.mark.parametrize("limit", ["top-k", "top-p"])
def test_tokens_that_tie_with_the_last_one_kept_are_kept(device: Device, limit: str, record_gate: Any) -> None:
    logits = torch.full((4, 300), -20.0)
    logits[:, [7, 50, 120, 299]] = torch.tensor([1.0, 2.0, 1.0, 1.0])
    row = RowOptions(top_k=2) if limit == "top-k" else RowOptions(top_p=0.6)
    fractions = [(2 * at + 1) * ONE // 100 for at in (0, 20, 35, 49)]
    weights = kept_weights(logits[0], row)
    assert [token for token, weight in enumerate(weights) if weight] == [7, 50, 120, 299]
    wanted = torch.tensor([_at(weights, fraction) for fraction in fractions])
    assert len(set(wanted.tolist())) == 4
    _holds(device, Choices(logits, draw_options([row] * 4, fractions), wanted), record_gate)


@conforms(level="L2", gate="G1", clause="9.5", negative=True)
@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.9999999}, {"min_p": 1e-6}], ids=str)
def test_the_ends_of_the_random_numbers(device: Device, limits: dict[str, Any], record_gate: Any) -> None:
    """The first and the last token that may be drawn, and nothing that is excluded beside them."""
    logits = torch.full((2, 1300), -torch.inf)
    logits[:, [1100, 1200, 1290]] = torch.tensor([0.0, 3.0, 1.0])
    options = draw_options([RowOptions(**limits)] * 2, [0, ONE - 1])
    _holds(device, Choices(logits, options, torch.tensor([1100, 1290])), record_gate)


@conforms(level="L2", gate="G6", clause="9.5", negative=True)
@pytest.mark.parametrize("kind", NOT_FINITE)
@pytest.mark.parametrize("name", ["greedy", "none", "top-k", "top-p", "all"])
def test_broken_rows_show_in_their_peaks_alone(device: Device, name: str, kind: str, record_gate: Any) -> None:
    logits = zipf_logits(5, 700)
    choices = _choices(logits, [FILTERS[name](row) for row in logits])
    broken = logits.clone()
    if kind == "all-excluded":
        broken[2] = -torch.inf
    else:
        broken[2, 699] = NOT_FINITE[kind]
    chosen = _chosen(device, broken, choices.options)
    if chosen is None:
        _left_to_core(record_gate)
        return
    others = [0, 1, 3, 4]
    hold(record_gate, exact(chosen.token_ids[others], choices.token_ids[others], "tokens of the other rows"))
    hold(record_gate, exact(chosen.peaks, broken.amax(dim=1), "peaks"))
    assert 0 <= int(chosen.token_ids[2]) < 700, "the token of a broken row is outside the vocabulary"


@conforms(level="L2", gate="G1", clause="9.5", negative=True)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_logits_of_any_size(device: Device, size: float, record_gate: Any) -> None:
    logits = (torch.tensor([-1.0, 1.0, 0.5]) * size).repeat(6, 1)
    rows = [RowOptions(temperature) for temperature in (0.0, 0.01, 1.0, 2.0, 1e4, 1e-4)]
    _holds(device, _choices(logits, rows), record_gate)


@conforms(level="L2", gate="G1", clause=("9.2", "9.5"), negative=True, safety=Safety.MEMORY)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_nothing_around_arguments_is_written(device: Device, vocab_size: int, record_gate: Any) -> None:
    logits = zipf_logits(len(FILTERS), vocab_size)
    options = _choices(logits, [make(row) for row, make in zip(logits, FILTERS.values(), strict=True)]).options
    before = replace(options, **{name: getattr(options, name).copy() for name in options.__slots__})
    kept = guarded(logits, device.array_device)
    if device.ops.choose_tokens(kept.tensor, options) is None:
        _left_to_core(record_gate)
        return
    device.synchronize()
    hold(record_gate, kept.untouched("logits"), exact(kept.tensor, logits, "logits"))
    assert all(np.array_equal(getattr(options, name), getattr(before, name)) for name in options.__slots__)


@conforms(level="L2", gate="G1", clause=("9.3", "9.5"), negative=True)
def test_strides_do_not_matter(device: Device, record_gate: Any) -> None:
    """Rows of a wider array of NaN, on the device: a row read at the wrong place shows."""
    logits = zipf_logits(len(FILTERS), 701)
    choices = _choices(logits, [make(row) for row, make in zip(logits, FILTERS.values(), strict=True)])
    chosen = device.ops.choose_tokens(strided(logits.to(device.array_device)), choices.options)
    if chosen is None:
        _left_to_core(record_gate)
        return
    peaks = exact(chosen.peaks.cpu(), logits.amax(dim=1), "peaks")
    hold(record_gate, exact(chosen.token_ids.cpu(), choices.token_ids, "tokens"), peaks)


def _choices(logits: torch.Tensor, rows: list[RowOptions]) -> Choices:
    """Aim rows that draw at tokens; the others give the most likely one, whatever their number."""
    drawn = drawn_rows(logits, [row if row.temperature > 0 else replace(row, temperature=1.0) for row in rows])
    greedy = torch.tensor([row.temperature == 0 for row in rows])
    options = draw_options(rows, drawn.options.fractions.tolist())
    return Choices(logits, options, torch.where(greedy, logits.argmax(dim=1), drawn.token_ids))


def _at(weights: list[int], fraction: int) -> int:
    """Return the token at a fraction of all weight."""
    goal, running = sum(weights) * fraction // ONE, 0
    for token, weight in enumerate(weights):
        running += weight
        if running > goal:
            return token
    raise AssertionError("a fraction is below 1")


def _chosen(device: Device, logits: torch.Tensor, options: DrawOptions) -> ChosenTokens | None:
    chosen = device.ops.choose_tokens(logits.to(device.array_device, copy=True), options)
    device.synchronize()
    return None if chosen is None else ChosenTokens(chosen.token_ids.cpu(), chosen.peaks.cpu())


def _holds(device: Device, choices: Choices, record_gate: Any) -> None:
    chosen = _chosen(device, choices.logits, choices.options)
    if chosen is None:
        _left_to_core(record_gate)
        return
    hold(record_gate, exact(chosen.token_ids, choices.token_ids, "tokens"))
    hold(record_gate, exact(chosen.peaks, choices.logits.amax(dim=1), "peaks"))


def _left_to_core(record_gate: Any) -> None:
    """Record that the platform leaves this choice to core, which the clause allows."""
    hold(record_gate, GateResult("G1", 0.0, 0.0, "left to core: choose_tokens answers None"))
