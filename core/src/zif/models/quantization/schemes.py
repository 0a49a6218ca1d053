"""What every way to store matrices as codes has in common. No array library.

A format is one `StoredCodes`; the checkpoint's configuration chooses it in `zif.models.quantization.plan`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from zif.contract import WeightScheme
from zif.errors import ModelError
from zif.models.checkpoint import StoredTensor
from zif.models.config import ConfigReader
from zif.models.held import Arrangement, Source


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix that a file holds as codes: their scheme, their order, and the tensors they are read from."""

    scheme: WeightScheme
    arrangement: Arrangement
    sources: tuple[Source, ...]


class StoredCodes(ABC):
    """One way to store matrices as codes, as one configuration describes it."""

    @abstractmethod
    def matrix(self, module: str, shape: tuple[int, int], stored: Mapping[str, StoredTensor]) -> StoredMatrix | None:
        """Say how the matrix [O, I] of a module ("model.layers.0.mlp.up_proj") is stored; None: as plain numbers.

        Raises `ModelError` where the file holds codes that the configuration does not explain, or not for this shape.
        """


def grouped_scheme(config: ConfigReader, bits: int, group_size: int | None, zero_points: bool) -> WeightScheme:
    """Return the scheme of codes with activations as they are. Raises `ModelError` on bits that are not served."""
    if bits not in (4, 8):
        raise ModelError(
            f"{config.owner}: weights of {bits!r} bits are not implemented; use a checkpoint of 4 or 8 bits"
        )
    if group_size is not None and group_size % 2:
        raise ModelError(f"{config.owner}: groups of {group_size!r} inputs are not implemented; use an even number")
    return WeightScheme(bits, group_size, zero_points)


def require_groups(module: str, scheme: WeightScheme, num_inputs: int, multiple: int) -> int:
    """Return the groups of an output. Raises `ModelError` unless they divide the inputs, `multiple` does as well."""
    if num_inputs % (scheme.group_size or num_inputs) or num_inputs % multiple:
        raise ModelError(
            f"{module}: {scheme.name} cannot hold {num_inputs} inputs, which must be a multiple of "
            f"{scheme.group_size or multiple}; use another checkpoint of this model"
        )
    return num_inputs // (scheme.group_size or num_inputs)


def num_words(count: int, bits: int) -> int:
    """Count the words of 32 bits that hold `count` codes one after the other."""
    return -(-count * bits // 32)
