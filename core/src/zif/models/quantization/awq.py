"""AWQ checkpoints, version "gemm": codes of 4 bits packed along the outputs.

`X.qweight` [I, O / 8] and `X.qzeros` [G, O / 8] are words of 32 bits that hold the outputs 0, 2, 4, 6, 1, 3, 5, 7 of
eight, the first lowest; `X.scales` [G, O]. Format of AutoAWQ. Lin et al., 2024.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from zif.contract import WeightScheme
from zif.errors import ModelError
from zif.models.checkpoint import StoredTensor
from zif.models.config import ConfigReader
from zif.models.held import FLOATS, Arrangement, Source
from zif.models.quantization.schemes import StoredCodes, StoredMatrix, grouped_scheme, num_words, require_groups


@dataclass(frozen=True, slots=True)
class AwqCodes(StoredCodes):
    """Matrices whose module has a `qweight`."""

    scheme: WeightScheme

    def matrix(self, module: str, shape: tuple[int, int], stored: Mapping[str, StoredTensor]) -> StoredMatrix | None:
        if f"{module}.qweight" not in stored:
            return None
        num_outputs, num_inputs = shape
        num_groups = require_groups(module, self.scheme, num_inputs, multiple=2)
        words = num_words(num_outputs, self.scheme.bits)
        sources = (
            Source(f"{module}.qweight", (num_inputs, words), ("int32",)),
            Source(f"{module}.scales", (num_groups, num_outputs), FLOATS),
            Source(f"{module}.qzeros", (num_groups, words), ("int32",)),
        )
        return StoredMatrix(self.scheme, Arrangement.AWQ_CODES, sources)


def read(config: ConfigReader) -> AwqCodes:
    """Read a `quantization_config`. Raises `ModelError` that names what is not served."""
    version = config.text("version", "gemm").lower()
    if version != "gemm":
        raise ModelError(
            f"{config.owner}: AWQ version {version!r} is not implemented, 'gemm' is; use a checkpoint of version 'gemm'"
        )
    if not config.flag("zero_point", default=True):
        raise ModelError(
            f"{config.owner}: zero_point=False is not implemented for AWQ; use a checkpoint with zero_point=True"
        )
    bits = config.count("bits", config.count("w_bit", 4))
    if bits != 4:
        raise ModelError(f"{config.owner}: AWQ of {bits!r} bits is not implemented; use a checkpoint of 4 bits")
    group_size = config.values.get("group_size", config.values.get("q_group_size", 128))
    if type(group_size) is not int or group_size < -1 or group_size == 0:
        raise config.wrong("group_size", "-1 or a positive integer")
    return AwqCodes(grouped_scheme(config, bits, None if group_size == -1 else group_size, zero_points=True))
