"""Stop strings in growing text."""

from hypothesis import example, given
from hypothesis import strategies as st

from zif.text.stop_strings import StopStrings


def first_match(text, stops):
    """Return (start, end) of the match that ends first, the longest of those, by trying every end."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts), end
    return None


@given(
    chunks=st.lists(st.text(alphabet="abc", max_size=5), max_size=10),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
)
@example(chunks=["aa", "b"], stops=["ab", "aab", "b"], include=False)
@example(chunks=["ab", "abc"], stops=["ababd", "bc"], include=True)
def test_any_cut_gives_what_the_whole_text_gives(chunks, stops, include):
    scanner, shown = StopStrings(tuple(stops), include), ""
    text = "".join(chunks)
    for chunk in chunks:
        shown += scanner.append(chunk)
        assert text.startswith(shown)
        if scanner.matched is not None:
            break
    shown += scanner.finish()
    match = first_match(text, stops)
    if match is None:
        assert scanner.matched is None
        assert shown == text
    else:
        start, end = match
        assert scanner.matched == text[start:end]
        assert shown == text[: end if include else start]


@given(text=st.text(alphabet="ab", max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1))
def test_no_more_is_held_back_than_could_begin_a_stop_string(text, stops):
    scanner = StopStrings(tuple(stops))
    shown = "".join(scanner.append(letter) for letter in text if scanner.matched is None)
    if scanner.matched is None:
        held = text[len(shown) :]
        assert text == shown + held
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
        longest = max(
            (n for n in range(5) for stop in stops if stop[:n] != stop and text.endswith(stop[:n])), default=0
        )
        assert len(held) == longest


def test_text_that_cannot_begin_a_stop_string_is_shown_at_once():
    scanner = StopStrings(("\n\nUser:",))
    assert scanner.append("Hello\n") == "Hello"
    assert scanner.append("there") == "\nthere"
    assert scanner.append("\n\nUse") == ""
    assert scanner.append("r: x") == ""
    assert scanner.matched == "\n\nUser:"


def test_included_stop_strings_hold_nothing_back():
    scanner = StopStrings(("END",), include=True)
    assert [scanner.append(text) for text in ("abE", "N", "Dxyz")] == ["abE", "N", "D"]
    assert scanner.matched == "END"
    assert scanner.finish() == ""


def test_without_stop_strings_text_passes():
    scanner = StopStrings(())
    assert scanner.append("any") == "any"
    assert scanner.finish() == ""
    assert scanner.matched is None
