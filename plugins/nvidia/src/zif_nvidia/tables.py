"""Which tuning serves a GPU: the tables of its architecture, else of the nearest one below it, then the default.

Tables of another architecture serve only where its thread blocks have no more shared memory than the GPU's own: what is
tuned for sm_80 (163 KiB) or sm_100 (227 KiB) may not fit sm_86, sm_89 or sm_120 (99 KiB), and the default always fits.
"""

from pathlib import Path

from zif.kernels.tuning import Tuning
from zif_nvidia.architectures import ARCHITECTURES, number

_FOLDER = Path(__file__).parent / "tuning"


def read_tuning(architecture: str) -> Tuning:
    """Read the tables for an architecture such as "sm_90"."""
    folder = tuning_folder(architecture)
    return Tuning.read(*([folder] if folder else []))


def tuning_folder(architecture: str, root: Path = _FOLDER) -> Path | None:
    """Return the folder of tables that are laid over the default ones, None where none serve."""
    own = ARCHITECTURES[architecture].shared_bytes
    shipped = {folder.name: folder for folder in root.glob("sm_*")}
    below = [name for name in shipped if number(name) <= number(architecture)]
    fitting = [name for name in below if name in ARCHITECTURES and ARCHITECTURES[name].shared_bytes <= own]
    return shipped[max(fitting, key=number)] if fitting else None
