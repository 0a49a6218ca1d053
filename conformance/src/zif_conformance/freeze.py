"""Writes the must-pass lists anew from the suite: `python -m zif_conformance.freeze`. Only on purpose.

A test that joins or leaves a list changes what a profile means; the difference of the files is what is reviewed.
"""

from collections.abc import Sequence
from pathlib import Path

from zif_conformance.profiles import PROFILE_NAMES, profile_text
from zif_conformance.supervisor import RunOptions, collect

FOLDER = Path(__file__).parent / "data"


def frozen_texts(test_ids: Sequence[str]) -> dict[str, str]:
    """Return what each list would be for a suite of these tests, by file name."""
    return {f"{name}.txt": profile_text(name, test_ids) for name in PROFILE_NAMES}


def main() -> None:
    """Write the files."""
    test_ids = [case.test_id for case in collect(RunOptions("null", ()))]
    for name, text in frozen_texts(test_ids).items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
