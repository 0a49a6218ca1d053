"""Core knows no vendor: none of their words stands in code, comments or names. Kernels are the one exception."""

import re
from pathlib import Path

import pytest

_CORE = Path(__file__).resolve().parents[2]
# Written apart, so that this file keeps the rule that it checks.
_PARTS = ["cu-da", "ro-cm", "h-ip", "x-pu", "t-pu", "nvi-dia", "a-md", "in-tel", "nc-cl", "rc-cl", "sm-90", "gfx-942"]
_WORDS = [part.replace("-", "") for part in _PARTS]
# A word ends where letters end: names join words by underscores, digits follow them ("xx0", "my_xx_call").
_PATTERN = re.compile(rf"(?<![a-z])({'|'.join(_WORDS)})(?![a-z])", re.IGNORECASE)
_SUFFIXES = {".py", ".md", ".toml", ".txt", ".lock", ".json", ".jinja"}


def vendor_words(text):
    """Return the (line number, word) pairs of vendor words in `text`."""
    lines = enumerate(text.splitlines(), start=1)
    return [(number, match[0]) for number, line in lines for match in _PATTERN.finditer(line)]


def _files():
    for room in ("src", "tests"):
        for path in sorted((_CORE / room).rglob("*")):
            kernels = (_CORE / "src" / "zif" / "kernels") in path.parents
            if path.suffix in _SUFFIXES and not kernels and not any(p.endswith(".egg-info") for p in path.parts):
                yield path


@pytest.mark.parametrize("word", _WORDS)
def test_the_search_finds_each_word(word):
    for text in (f"torch.{word}()", f"my_{word}_call", f"# {word.upper()} only", f"{word}:0", f"is_{word}"):
        assert vendor_words(text) == [(1, text[text.lower().index(word) :][: len(word)])]
    assert vendor_words(f"x{word}y") == []


def test_core_has_no_vendor_word():
    found = [
        f"{path.relative_to(_CORE)}:{n}: {word}" for path in _files() for n, word in vendor_words(path.read_text())
    ]
    assert found == []


def test_core_file_names_have_no_vendor_word():
    assert [path for path in _files() if vendor_words(str(path.relative_to(_CORE)))] == []
