"""The support matrix of a README: drawn from bundles that verify, written between two markers.

A repository keeps a summary of each bundle, some kilobytes instead of megabytes, from which the matrix can be drawn
again. A summary proves nothing alone: it names the digest of the bundle that it was made of.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zif.errors import ConfigError
from zif_conformance.bundle.matrix import is_simulated, support_table
from zif_conformance.bundle.verify import read_result, verify_bundle

BEGIN = "<!-- support matrix: written by `zif conform matrix`, not by hand -->"
END = "<!-- end of the support matrix -->"


_KEPT = ("schema", "suite_version", "profile", "levels", "status", "finished", "counts", "verdict", "score", "digest")


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the matrix needs of a result, without its tests."""
    device = result["device"] or {}
    return {
        **{name: result[name] for name in _KEPT},
        "platform": {name: result["platform"][name] for name in ("name", "distribution", "fingerprint")},
        "device": {
            "architecture": device.get("architecture", "none"),
            **({"simulated": True} if is_simulated(device) else {}),
        },
        "claims": [{"claim": claim["claim"], "outcome": claim["outcome"]} for claim in result["claims"]],
    }


def keep_summaries(folders: Sequence[Path], into: Path) -> None:
    """Write `PLATFORM.json` for each bundle into a folder. Raises `ConfigError` when a bundle does not verify."""
    results = _verified(folders)
    into.mkdir(parents=True, exist_ok=True)
    for result in results:
        kept = into / f"{result['platform']['name']}.json"
        if is_simulated(result["device"] or {}) and kept.exists() and not _is_kept_simulated(kept):
            raise ConfigError(
                f"{kept} is of hardware, and the new bundle of a simulated device; remove the file to replace it"
            )
        text = json.dumps(summary(result), indent=1, ensure_ascii=True)
        kept.write_text(f"{text}\n", encoding="utf-8")


def _is_kept_simulated(path: Path) -> bool:
    return is_simulated(json.loads(path.read_text(encoding="utf-8"))["device"])


def kept_matrix(folder: Path) -> str:
    """Return the table drawn from the summaries in a folder, in the order of their names."""
    return support_table([json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))])


def text_between_markers(text: str) -> str:
    """Return what stands between the markers, which occur once."""
    return text.split(BEGIN)[1].split(END)[0].strip()


def support_matrix(folders: Sequence[Path]) -> str:
    """Return the table. Raises `ConfigError` when a bundle does not verify."""
    return support_table(_verified(folders))


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


def _verified(folders: Sequence[Path]) -> list[dict[str, Any]]:
    for folder in folders:
        if problems := verify_bundle(folder):
            raise ConfigError(f"bundle {str(folder)!r} does not verify: {problems[0]}; run the suite again")
    return [read_result(folder) for folder in folders]
