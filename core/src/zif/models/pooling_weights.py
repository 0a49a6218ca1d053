"""The matrices behind the pooling, a score head or dense layers, as arrays in host memory.

They multiply one row a request, so no device holds them. Called by the engine when it opens a model.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zif.errors import CheckpointError
from zif.models.checkpoint import Checkpoint, open_checkpoint
from zif.models.checksums import verify_files
from zif.models.layout import SCORE_HEAD
from zif.models.pooling import Activation, DenseSpec, PoolingSpec
from zif.models.tensor_files import TensorFiles

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """A matrix, [O, I], with its bias, [O], and what follows."""

    weight: Float32
    bias: Float32 | None = None
    activation: Activation = Activation.IDENTITY

    def apply(self, vector: Float32) -> Float32:
        """Multiply, add and activate. vector: [I]. Returns [O]."""
        product: Float32 = self.weight @ vector
        if self.bias is not None:
            product = product + self.bias
        return activate(product, self.activation)


@dataclass(frozen=True, slots=True)
class PoolingWeights:
    """The dense layers of embeddings, or the score head, [num_labels, C]."""

    dense: tuple[DenseLayer, ...] = ()
    score: DenseLayer | None = None


def activate(values: Float32, activation: Activation) -> Float32:
    """Apply an activation to each value."""
    result = values
    if activation is Activation.TANH:
        result = np.tanh(values)
    elif activation is Activation.SIGMOID:
        result = np.float32(0.5) * (np.float32(1) + np.tanh(np.float32(0.5) * values))  # exp would overflow
    return result


def load_pooling(folder: Path, spec: PoolingSpec, hidden_size: int | None) -> PoolingWeights:
    """Read what `spec` names, behind hidden states of `hidden_size` channels (None: not known).

    Raises `CheckpointError`, which names the file or the tensor.
    """
    if spec.labels:
        checkpoint = open_checkpoint(folder)
        weight = _matrix(checkpoint, SCORE_HEAD)
        if weight.ndim != 2 or len(weight) != len(spec.labels):
            raise CheckpointError(
                f"{SCORE_HEAD!r} of {str(folder)!r} has the shape {list(weight.shape)}, and config.json names "
                f"{len(spec.labels)} labels; use the config.json that belongs to these weights"
            )
        _check_inputs(f"{SCORE_HEAD!r} of {str(folder)!r}", weight.shape[1], hidden_size)
        return PoolingWeights(score=DenseLayer(weight))
    num_channels = hidden_size
    for layer in spec.dense:
        _check_inputs(f"the layer in {str(layer.folder)!r}", layer.num_inputs, num_channels)
        num_channels = layer.num_outputs
    return PoolingWeights(tuple(_dense(layer) for layer in spec.dense))


def _check_inputs(layer: str, num_inputs: int, num_channels: int | None) -> None:
    if num_channels is not None and num_inputs != num_channels:
        raise CheckpointError(
            f"{layer} takes {num_inputs} channels, and what comes before it gives {num_channels}; use files that "
            "belong together"
        )


def _dense(spec: DenseSpec) -> DenseLayer:
    checkpoint = open_checkpoint(spec.folder)
    verify_files({tensor.file for tensor in checkpoint.tensors.values()})
    weight = _matrix(checkpoint, "linear.weight")
    bias = _matrix(checkpoint, "linear.bias") if spec.bias else None
    shapes = weight.shape, None if bias is None else bias.shape
    expected = (spec.num_outputs, spec.num_inputs), (spec.num_outputs,) if spec.bias else None
    if shapes != expected:
        raise CheckpointError(
            f"the layer in {str(spec.folder)!r} has the shapes {shapes}, and its config.json says {expected}"
        )
    return DenseLayer(weight, bias, spec.activation)


def _matrix(checkpoint: Checkpoint, name: str) -> Float32:
    """Read a whole tensor as float32."""
    if name not in checkpoint.tensors:
        raise CheckpointError(f"{str(checkpoint.folder)!r} holds no tensor {name!r}; download its files again")
    with TensorFiles(checkpoint) as files:
        array: Float32 = files.read_all(name).float().numpy()
    return array
