"""Which tuning serves an architecture: the tables of the folder that its entry names, then the default."""

import json
from pathlib import Path

from zif.kernels.tuning import Tuning
from zif_amd.architectures import ARCHITECTURES, Architecture

_FOLDER = Path(__file__).parent / "tuning"
_WAVES = "waves_per_eu"


def read_tuning(architecture: str) -> Tuning:
    """Read the tables for an architecture such as "gfx942"."""
    folder = tuning_folder(ARCHITECTURES[architecture])
    return Tuning.read(*([folder] if folder else []))


def tuning_folder(architecture: Architecture) -> Path | None:
    """Return the folder of tables that are laid over the default ones, None where none are shipped."""
    folder = _FOLDER / architecture.tuning
    return folder if folder.is_dir() else None


def waves_per_eu(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return how many waves per execution unit the tables ask of the compiler, by kernel, for those that ask."""
    found: dict[str, tuple[int, ...]] = {}
    folder = tuning_folder(architecture)
    for path in sorted(folder.glob("*.json")) if folder else ():
        for kernel, rules in json.loads(path.read_text(encoding="utf-8")).items():
            if asked := {rule["options"][_WAVES] for rule in rules if _WAVES in rule.get("options", {})}:
                found[kernel] = tuple(sorted(asked))
    return found
