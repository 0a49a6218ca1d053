"""Writes the must-pass lists anew from the suite: `python -m zif_conformance.freeze`. Only on purpose.

A test that joins or leaves a list changes what a profile means; the difference of the files is what is reviewed.
"""

from collections.abc import Sequence
from pathlib import Path

from zif_conformance.outcomes import TestCase
from zif_conformance.profiles import PROFILE_NAMES, profile_text
from zif_conformance.supervisor import RunOptions, collect

FOLDER = Path(__file__).parent / "data"


def frozen_texts(cases: Sequence[TestCase]) -> dict[str, str]:
    """Return what each list would be for a suite of these tests, by file name."""
    return {f"{name}.txt": profile_text(name, cases) for name in PROFILE_NAMES}


def main() -> None:
    """Write the files."""
    for name, text in frozen_texts(collect(RunOptions("null", ()))).items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
