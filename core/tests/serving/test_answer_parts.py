"""The parts of an answer: their order, their blanks, and that they do not depend on how the answer was cut."""

from hypothesis import given
from hypothesis import strategies as st

from zif.parsing.events import ReasoningPiece, TextPiece, ToolCallArguments, ToolCallBegin, ToolCallEnd
from zif.serving.answer_parts import AnswerParts, PartBegun, PartEnded, PartGrown, PartKind

CALL = [ToolCallBegin(0, "f"), ToolCallArguments(0, "{}"), ToolCallEnd(0)]


def parts_of(events, at_once=1):
    """Return kind, text and wholeness of each part, and the part events."""
    tracker = AnswerParts()
    found = []
    for begin in range(0, len(events), at_once):
        found += tracker.take(events[begin : begin + at_once])
    found += tracker.finish()
    return [(part.kind, part.text, part.whole) for part in tracker.parts], found


def test_parts_come_one_after_another():
    parts, found = parts_of([ReasoningPiece("r"), TextPiece("a"), TextPiece("b"), *CALL, TextPiece("c")])
    assert parts == [
        (PartKind.REASONING, "r", True),
        (PartKind.TEXT, "ab", True),
        (PartKind.CALL, "{}", True),
        (PartKind.TEXT, "c", True),
    ]
    open_part = None
    for event in found:
        match event:
            case PartBegun(part):
                assert open_part is None
                open_part = part
            case PartGrown(part):
                assert part is open_part
            case PartEnded(part):
                assert part is open_part
                open_part = None
    assert open_part is None


def test_blanks_between_parts_make_no_part():
    parts, _ = parts_of([TextPiece("\n"), ReasoningPiece("\n\n"), TextPiece("\n"), *CALL, TextPiece("\n"), *CALL])
    assert [kind for kind, _, _ in parts] == [PartKind.CALL, PartKind.CALL]


def test_blanks_before_text_belong_to_it():
    assert parts_of([TextPiece("\n "), TextPiece("a")])[0] == [(PartKind.TEXT, "\n a", True)]


def test_an_answer_of_blanks_keeps_them():
    assert parts_of([TextPiece(" "), TextPiece("\n")])[0] == [(PartKind.TEXT, " \n", True)]


def test_an_answer_without_anything_has_no_parts():
    assert parts_of([]) == ([], [])


def test_a_call_without_an_end_is_not_whole():
    cut = CALL[:2]
    assert parts_of(cut)[0] == [(PartKind.CALL, "{}", False)]
    assert parts_of([*cut, TextPiece("a")])[0] == [(PartKind.CALL, "{}", False), (PartKind.TEXT, "a", True)]


texts = st.text(alphabet="a \n", max_size=4)
groups = st.one_of(
    texts.map(lambda text: [TextPiece(text)] if text else []),
    texts.map(lambda text: [ReasoningPiece(text)] if text else []),
    st.just(CALL),
    st.just(CALL[:2]),
)


@given(st.lists(groups, max_size=8), st.integers(1, 5))
def test_any_cut_gives_the_same_parts(cut, at_once):
    events = [event for group in cut for event in group]
    letters = [piece for event in events for piece in _letters(event)]
    assert parts_of(letters)[0] == parts_of(events, at_once)[0]


def _letters(event):
    """Return an event cut as finely as it can be."""
    if isinstance(event, TextPiece | ReasoningPiece):
        return [type(event)(character) for character in event.text]
    return [event]
