"""Tables of reports in Markdown, and what stands in their cells."""

from collections.abc import Sequence

UNKNOWN = "-"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: float | None, unit: str = "", digits: int = 1) -> str:
    """Return a number with its unit, or the sign for one that is not known."""
    return UNKNOWN if value is None else f"{value:,.{digits}f}{unit}"


def flat(text: str) -> str:
    """Return a text on one line that does not end its cell."""
    return " ".join(text.split()).replace("|", "/")
