"""The rule that applies masks to logits, on positions spelled out by hand."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from zif.contract import HostArray, RequestStart, SamplingParams, StructuredOutput
from zif.runtime.grammar_masks import GrammarMasks, _forbidden, _unset_here, _unset_there
from zif.runtime.tokens import SamplePositions, TokenTable

V = 70
FORM = StructuredOutput(regex="a")


class Recorded:
    """A state that allows, after n tokens, the token n alone, and records what it is asked."""

    def __init__(self) -> None:
        self.followed: list[int] = []
        self.guesses: list[list[int]] = []
        self.fault: str | None = None

    @property
    def num_followed(self) -> int:
        return len(self.followed)

    def follow(self, token_ids: Sequence[int]) -> None:
        self.followed += token_ids

    def fill_masks(self, guesses: Sequence[int], masks: HostArray) -> None:
        self.guesses.append(list(guesses))
        assert masks.shape == (1 + len(guesses), (V + 31) // 32)
        masks[:] = 0
        for offset in range(len(masks)):
            token = len(self.followed) + offset
            masks[offset, token // 32] = np.array(1 << token % 32, dtype=np.uint32).astype(np.int32)


class Source:
    """Hands out one state after the other."""

    def __init__(self) -> None:
        self.states: list[Recorded] = []

    def begin(self, form: StructuredOutput) -> Recorded:
        assert form is FORM
        self.states.append(Recorded())
        return self.states[-1]


def start(row: int, tokens: list[int], num_prompt: int, form: StructuredOutput | None = FORM) -> RequestStart:
    return RequestStart(row, tokens, num_prompt, (), SamplingParams(structured=form), 0)


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def rule(source: Source) -> GrammarMasks:
    rule = GrammarMasks(4, V)
    rule.attach(source)
    return rule


def allowed(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_rows_with_a_form_are_masked_and_others_left(rule: GrammarMasks, source: Source) -> None:
    table = TokenTable(4)
    for row, form in enumerate((FORM, None, FORM)):
        table.set_row(row, [7, 8, 9], 1)
        rule.add(row, start(row, [7, 8, 9], 1, form))
    logits = torch.randn(3, V)
    before = logits.clone()
    rule.apply(logits, SamplePositions(table, np.array([0, 1, 2]), np.array([3, 3, 3])))
    assert allowed(logits) == [[2], [*range(V)], [2]]
    assert torch.equal(logits[1], before[1])
    assert logits[0, 2] == before[0, 2]
    assert [state.followed for state in source.states] == [[8, 9], [8, 9]]


def test_guesses_are_told_apart_from_known_tokens(rule: GrammarMasks, source: Source) -> None:
    table = TokenTable(4)
    table.set_row(2, [7, 8], 1)
    rule.add(2, start(2, [7, 8], 1))
    table.put_draft(2, [40, 41, 42])
    logits = torch.zeros(4, V)
    rule.apply(logits, SamplePositions(table, np.array([2, 2, 2, 2]), np.array([2, 3, 4, 5])))
    assert allowed(logits) == [[1], [2], [3], [4]]
    (state,) = source.states
    assert (state.followed, state.guesses) == ([8], [[40, 41, 42]])
    table.put(np.array([2, 2]), np.array([2, 3]), [40, 60])
    rule.apply(torch.zeros(1, V), SamplePositions(table, np.array([2]), np.array([4])))
    assert (state.followed, state.guesses[1:]) == ([8, 40, 60], [[]])


def test_a_request_that_starts_again_follows_all_of_its_output(rule: GrammarMasks, source: Source) -> None:
    table = TokenTable(4)
    rule.add(0, start(0, [7], 1))
    rule.remove(0)
    table.set_row(3, [7, 20, 21, 22], 1)
    rule.add(3, start(3, [7, 20, 21, 22], 1))
    rule.apply(torch.zeros(1, V), SamplePositions(table, np.array([3]), np.array([4])))
    assert [state.followed for state in source.states] == [[], [20, 21, 22]]
    assert not rule.holds(np.array([0]))[0]


def test_a_fault_is_that_of_its_row(rule: GrammarMasks, source: Source) -> None:
    rule.add(0, start(0, [7], 1))
    rule.add(1, start(1, [7], 1))
    source.states[1].fault = "no good"
    assert [rule.fault(row) for row in range(3)] == [None, "no good", None]


@pytest.mark.parametrize("unpack", [_unset_here, lambda octets: _unset_there(octets, torch.device("cpu"))])
def test_bits_become_what_is_forbidden(unpack: Callable[[HostArray], torch.Tensor]) -> None:
    masks = np.random.default_rng(3).integers(-(2**31), 2**31, (5, 3)).astype(np.int32)
    words = masks.view(np.uint32)
    expected = [[not words[r, t // 32] >> t % 32 & 1 for t in range(96)] for r in range(5)]
    assert unpack(masks.view(np.uint8)).tolist() == expected
    assert _forbidden(masks, torch.empty(5, V)).tolist() == [row[:V] for row in expected]


def test_where_logits_are_elsewhere_so_are_the_masks() -> None:
    found = _forbidden(np.zeros((5, 3), dtype=np.int32), torch.empty(5, V, device="meta"))
    assert (found.shape, found.dtype, found.device.type) == ((5, V), torch.bool, "meta")
