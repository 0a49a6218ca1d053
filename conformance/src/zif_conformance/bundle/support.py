"""The support matrix of a README: drawn from bundles that verify, written between two markers."""

from collections.abc import Sequence
from pathlib import Path

from zif.errors import ConfigError
from zif_conformance.bundle.matrix import support_table
from zif_conformance.bundle.verify import read_result, verify_bundle

BEGIN = "<!-- support matrix: written by `zif conform matrix`, not by hand -->"
END = "<!-- end of the support matrix -->"


def support_matrix(folders: Sequence[Path]) -> str:
    """Return the table. Raises `ConfigError` when a bundle does not verify."""
    for folder in folders:
        if problems := verify_bundle(folder):
            raise ConfigError(f"bundle {str(folder)!r} does not verify: {problems[0]}; run the suite again")
    return support_table([read_result(folder) for folder in folders])


def write_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the markers. Raises `ConfigError` when the file does not have them, once each."""
    try:
        before = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}; give a Markdown file with the two markers") from error
    if before.count(BEGIN) != 1 or before.count(END) != 1 or before.index(BEGIN) > before.index(END):
        raise ConfigError(f"{str(path)!r} must hold {BEGIN!r} and, after it, {END!r}, once each")
    head, tail = before.split(BEGIN)[0], before.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")
