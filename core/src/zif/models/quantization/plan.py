"""What is quantized and how: from a checkpoint's configuration and the user's wish to the scheme of each matrix.

Which tensors a file holds decides whether a matrix is read as codes; the configuration says what codes mean, and is
refused by name before any weight is read where that is not served. No array library. Used by `zif.models.layout`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from zif.contract import WeightScheme
from zif.errors import ConfigError, ModelError
from zif.models.checkpoint import StoredTensor
from zif.models.config import ConfigReader
from zif.models.held import HeldTensor, Piece
from zif.models.quantization import awq, compressed_tensors, gptq
from zif.models.quantization.schemes import StoredCodes, StoredMatrix
from zif.models.spec import DecoderSpec

GROUP_SIZE = 32
"""Inputs that share a scale where weights are rounded to 4 bits on load: the smallest group, and the most accurate."""

_MIN_GROUP_SIZE = 8
_OUTER = ("embedding", "lm_head")
"""Held in 8 bits whatever is asked for: what they lose shows in every token."""
_UNROUNDED = ("router", "router_bias", "gate_up_bias", "down_bias")
"""Axes of two and more, and yet left in the model dtype: small, and a wrong choice of experts costs more than a sum."""

BITS_8 = WeightScheme(8, dynamic_activations=True)

ROUNDINGS = ("int8", "int4")
"""What weights may be rounded to on load."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the matrices of one model become what is held: `codes` of the checkpoint, else `rounding` on load."""

    codes: StoredCodes | None = None
    rounding: str | None = None

    def held(self, plain: Iterable[HeldTensor], stored: Mapping[str, StoredTensor]) -> tuple[HeldTensor, ...]:
        """Return tensors as they are held, given how they would be without quantization. Raises `ModelError`."""
        if self.codes is not None:
            held = tuple(_from_codes(tensor, self.codes, stored) for tensor in plain)
            if not any(tensor.scheme for tensor in held):
                raise ModelError(
                    "config.json has a quantization_config, but the file holds no codes of that kind; use the files "
                    "that belong together, or remove quantization_config from config.json"
                )
            _check_experts(held)
            return held
        if self.rounding is not None:
            return tuple(replace(tensor, scheme=rounded_scheme(tensor, self.rounding)) for tensor in plain)
        return tuple(plain)


def read_quantization(config: Mapping[str, Any], rounding: str | None, spec: DecoderSpec) -> Quantization:
    """Read what `config.json` says of quantization.

    Raises `ModelError` that names what is not served, `ConfigError` where weights that are codes are to be rounded.
    """
    values = config.get("quantization_config") or config.get("compression_config")
    if not values:
        return Quantization(rounding=rounding)
    method = values.get("quant_method") if isinstance(values, Mapping) else values
    if method == "mxfp4" and spec.interleaves_experts:
        return Quantization(rounding=rounding)
    readers = {"awq": awq.read, "compressed-tensors": compressed_tensors.read, "gptq": gptq.read}
    if method not in readers:
        raise ModelError(
            f"config.json: quantization method {method!r} is not implemented for this architecture; it may be "
            f"{', '.join(readers)}, or 'mxfp4' for the experts of GptOssForCausalLM: use a checkpoint of one of these, "
            "or one that is not quantized, which quantization='int8' or 'int4' rounds on load"
        )
    codes = readers[method](ConfigReader(values, "config.json quantization_config"))
    if rounding is not None:
        raise ConfigError(
            f"quantization={rounding!r} rounds weights that are numbers, and those of this checkpoint are codes "
            f"already ({method}): leave it out, or use the checkpoint that was not quantized"
        )
    return Quantization(codes)


def rounded_scheme(held: HeldTensor, rounding: str) -> WeightScheme | None:
    """Choose the scheme that a tensor is rounded to; None where it stays in the model dtype.

    Groups of 4 bits that do not divide the inputs are halved until they do; where even the smallest does not, the
    matrix is held in 8 bits.
    """
    own_name = held.name.rsplit(".", 1)[-1]
    if len(held.shape) < 2 or own_name in _UNROUNDED:
        return None
    group_size = gcd(held.shape[-1], GROUP_SIZE)
    if rounding == "int8" or own_name in _OUTER or group_size < _MIN_GROUP_SIZE:
        return BITS_8
    return WeightScheme(4, group_size)


def _from_codes(plain: HeldTensor, codes: StoredCodes, stored: Mapping[str, StoredTensor]) -> HeldTensor:
    """Let the pieces of a matrix be codes where the file holds them so. All pieces must be alike."""
    found = [_stored_matrix(piece, codes, stored) for piece in plain.pieces]
    schemes = {matrix.scheme if matrix else None for matrix in found}
    if schemes == {None}:
        return plain
    if plain.name == "embedding":
        raise ModelError("embeddings that are stored as codes are not implemented; use a checkpoint of plain ones")
    if len(schemes) > 1:
        names = ", ".join(piece.sources[0].name.removesuffix(".weight") for piece in plain.pieces[:3])
        kinds = " and ".join(sorted(scheme.name if scheme else "not quantized" for scheme in schemes))
        raise ModelError(
            f"{names} are multiplied as one matrix ({plain.name!r}) and must be quantized alike, but they are {kinds}; "
            "use a checkpoint that quantizes them together"
        )
    pieces = tuple(
        Piece(matrix.sources, piece.offset, matrix.arrangement)
        for piece, matrix in zip(plain.pieces, found, strict=True)
        if matrix
    )
    return replace(plain, pieces=pieces, scheme=schemes.pop())


def _check_experts(held: Iterable[HeldTensor]) -> None:
    """Raise unless both matrices of a layer's experts are codes, or neither is."""
    experts = {tensor.name: tensor.scheme for tensor in held if len(tensor.shape) > 2}
    for name, scheme in experts.items():
        down = name.removesuffix("gate_up") + "down"
        if name.endswith("gate_up") and (scheme is None) != (experts[down] is None):
            raise ModelError(
                f"of the experts of {name.removesuffix('.gate_up')!r} one matrix is quantized and one is not, which is "
                "not implemented; use a checkpoint that quantizes them alike"
            )


def _stored_matrix(piece: Piece, codes: StoredCodes, stored: Mapping[str, StoredTensor]) -> StoredMatrix | None:
    source = piece.sources[0]
    if len(source.shape) != 2 or not source.name.endswith(".weight"):
        return None
    num_outputs, num_inputs = source.shape
    return codes.matrix(source.name.removesuffix(".weight"), (num_outputs, num_inputs), stored)
