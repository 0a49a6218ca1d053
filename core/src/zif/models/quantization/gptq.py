"""GPTQ checkpoints: codes packed along the inputs, inputs first.

`X.qweight` [I * bits / 32, O] and `X.qzeros` [G, O * bits / 32] are words of 32 bits, the first code lowest; `X.scales`
[G, O]; `X.g_idx` [I] is the group of each input, where stored. Zeros are stored less one, but as they are in
`checkpoint_format` "gptq_v2". Format of AutoGPTQ and GPTQModel. Frantar et al., 2023.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from zif.contract import WeightScheme
from zif.errors import ModelError
from zif.models.checkpoint import StoredTensor
from zif.models.config import ConfigReader
from zif.models.held import FLOATS, Arrangement, Source
from zif.models.quantization.schemes import StoredCodes, StoredMatrix, grouped_scheme, num_words, require_groups

FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True)
class GptqCodes(StoredCodes):
    """Matrices whose module has a `qweight`. `subtracts_one`: zeros are stored less one."""

    scheme: WeightScheme
    subtracts_one: bool

    def matrix(self, module: str, shape: tuple[int, int], stored: Mapping[str, StoredTensor]) -> StoredMatrix | None:
        if f"{module}.qweight" not in stored:
            return None
        num_outputs, num_inputs = shape
        bits = self.scheme.bits
        num_groups = require_groups(module, self.scheme, num_inputs, multiple=32 // bits)
        sources = [
            Source(f"{module}.qweight", (num_words(num_inputs, bits), num_outputs), ("int32",)),
            Source(f"{module}.scales", (num_groups, num_outputs), FLOATS),
            Source(f"{module}.qzeros", (num_groups, num_words(num_outputs, bits)), ("int32",)),
        ]
        if f"{module}.g_idx" in stored:
            sources.append(Source(f"{module}.g_idx", (num_inputs,), ("int32",)))
        arrangement = Arrangement.GPTQ_CODES if self.subtracts_one else Arrangement.GPTQ_V2_CODES
        return StoredMatrix(self.scheme, arrangement, tuple(sources))


def read(config: ConfigReader) -> GptqCodes:
    """Read a `quantization_config`. Raises `ModelError` that names what is not served."""
    stated = config.text("checkpoint_format", config.text("format", "gptq"))
    if config.flag("is_marlin_format", default=False):
        stated = "marlin"
    if stated not in FORMATS:
        raise ModelError(
            f"{config.owner}: checkpoint_format {stated!r} is not implemented, {' and '.join(FORMATS)} are; use the "
            "checkpoint before it was converted"
        )
    group_size = config.values.get("group_size", -1)
    if type(group_size) is not int or group_size < -1 or group_size == 0:
        raise config.wrong("group_size", "-1 or a positive integer")
    reordered = config.flag("desc_act", default=False) and not config.flag("static_groups", default=False)
    if reordered and group_size != -1:
        raise ModelError(
            f"{config.owner}: desc_act=True spreads the inputs of a group over the matrix (act order), which is not "
            "implemented; use a checkpoint with desc_act=False or static_groups=True"
        )
    _refuse_overrides(config)
    symmetric = config.flag("sym", default=True)
    scheme = grouped_scheme(config, config.count("bits"), None if group_size == -1 else group_size, not symmetric)
    return GptqCodes(scheme, stated == "gptq")


def _refuse_overrides(config: ConfigReader) -> None:
    """Allow `dynamic` to leave modules out ("-:pattern"), which their tensors show, but nothing else."""
    dynamic = config.section("dynamic")
    overrides = [pattern for pattern in dynamic.values if not pattern.startswith("-:")] if dynamic else []
    if overrides:
        raise ModelError(
            f"{config.owner}: dynamic gives {overrides[0]!r} bits or groups of its own, which is not implemented; use "
            "a checkpoint that is quantized alike throughout"
        )
