"""Weights held as integers: which schemes there are, and how the codes of a matrix lie in memory."""

from dataclasses import dataclass

from zif.contract.arrays import Array
from zif.contract.capabilities import Feature


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How a weight matrix is held, and what it is multiplied with.

    An element is (code - zero) * scale. `bits` is 8 or 4. `group_size` neighbouring inputs share a scale, an even
    number that divides them; None: all inputs of an output share one. With `zero_points` every scale has a zero of its
    own, else zero is 0 for 8 bits and 8 for 4 bits. With `dynamic_activations` activations are held in 8 bits too,
    each token with a scale of its own, symmetric; else they keep their dtype.
    """

    bits: int
    group_size: int | None = None
    zero_points: bool = False
    dynamic_activations: bool = False

    @property
    def feature(self) -> Feature:
        """Name what a device must claim to multiply with such weights."""
        return _FEATURES[self.bits, self.dynamic_activations]

    @property
    def name(self) -> str:
        """Name the scheme as plans print it: bits of weights and activations, the group: "W4A16 in groups of 128"."""
        grouped = "" if self.group_size is None else f" in groups of {self.group_size}"
        return f"W{self.bits}A{8 if self.dynamic_activations else 16}{grouped}"


_FEATURES = {
    (8, True): Feature.QUANTIZATION_W8A8,
    (8, False): Feature.QUANTIZATION_W8A16,
    (4, False): Feature.QUANTIZATION_W4A16,
}


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight of O outputs and I inputs, or a stack of E of them; G = I / group size, 1 without groups.

    codes: of 8 bits [..., O, I], int8; of 4 bits [..., O, I / 2], uint8, codes from 0 to 15. In a group of g codes of
    4 bits, byte j holds code j in its lower and code j + g / 2 in its upper half; without groups g is I. scales:
    [..., O, G], float32. zeros: [..., O, G], int16, given exactly when the scheme has zero points. All are dense.
    """

    scheme: WeightScheme
    codes: Array
    scales: Array
    zeros: Array | None = None


@dataclass(frozen=True, slots=True)
class QuantizedExperts:
    """Quantized weights of all experts of one layer; the counterpart of `ExpertWeights`.

    gate_up: [E, 2I, C], gate rows before up rows. down: [E, C, I]. The biases, where given, in the model dtype: [E, 2I]
    and [E, C].
    """

    gate_up: QuantizedWeight
    down: QuantizedWeight
    gate_up_bias: Array | None = None
    down_bias: Array | None = None
