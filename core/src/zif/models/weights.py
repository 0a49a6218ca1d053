"""Weights from a checkpoint's files into the allocator's memory, and the decoder on top of them.

Ranges of the files are read straight to where they are held, or through a small staging buffer where the order, the
dtype or the memory differs, and where codes are held: peak memory is the weights and one such part, or one matrix
in the form that the platform gives it. Which tensors there are, `zif.models.layout` decides; how they are filled,
`zif.models.dense_weights` and `zif.models.quantization.loading` know. Called by the torch runner.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType

import torch

from zif.contract import Allocator, Buffer, ModelDescription, OpTable, Progress, QuantizedWeight
from zif.errors import CheckpointError, OutOfMemoryError
from zif.models.checkpoint import StoredTensor, open_decoder_checkpoint
from zif.models.checksums import verifying
from zif.models.decoder import Decoder, Weight, multiplied
from zif.models.dense_weights import fill_numbers
from zif.models.families import decoder_spec
from zif.models.held import HeldTensor, Layout
from zif.models.layout import EMBEDDING, LM_HEAD, plan_layout
from zif.models.model import Model
from zif.models.quantization.loading import check_order, fill_codes
from zif.models.quantization.plan import read_quantization
from zif.models.tensor_files import CHUNK_BYTES, TensorFiles

WEIGHTS_TAG = "weights"

_SHARE_OF_COPIES = 32
"""Prepared weights may take one part in so many more than was planned: an embedding may be there in two forms. The plan
leaves room for activations beside the weights, which is more than that."""

Keep = Callable[[str, torch.Tensor], torch.Tensor]


def load_decoder(
    model: ModelDescription,
    ops: OpTable,
    allocator: Allocator[torch.Tensor],
    array_device: str,
    progress: Progress,
    keep: Keep | None = None,
) -> Model:
    """Read the weights of a native model to the device and return the decoder.

    Allocates under the tag "weights"; `progress` hears bytes held or being read. Matrices are then held as the platform
    prepares them. With `keep` none is prepared and the memory is a way station: what it returns for a name and a tensor
    becomes the weight, on `array_device`, and the memory is freed; of codes it is given each tensor by itself,
    "layers.3.qkv.scales". Raises `CheckpointError`, which names the file or the tensors, or `OutOfMemoryError`; these,
    and what the platform raises, leave nothing allocated.
    """
    spec = decoder_spec(model.architecture, model.config)
    checkpoint = open_decoder_checkpoint(model.path)
    layout = plan_layout(spec, checkpoint, read_quantization(model.config, model.quantization, spec))
    dtype = getattr(torch, model.dtype)
    files = TensorFiles(checkpoint)
    with (
        _Loader(files, allocator, dtype, keep) as loader,
        files,  # Within the loader: memory goes back once no thread reads to it.
        verifying({tensor.file for tensor in checkpoint.tensors.values()}),
    ):
        weights = loader.load(layout, progress)
        if keep is None:
            planned = layout.num_bytes(dtype.itemsize)
            loader.prepare(weights, multiplied(spec), ops, planned + planned // _SHARE_OF_COPIES)
    return Decoder(spec, weights, ops, model.max_model_len, array_device)


class _Loader(AbstractContextManager["_Loader"]):
    """The buffers lent so far, by what is in them, which an error gives back."""

    def __init__(
        self, files: TensorFiles, allocator: Allocator[torch.Tensor], dtype: torch.dtype, keep: Keep | None
    ) -> None:
        self._files = files
        self._keep = keep
        self._allocator = allocator
        self._dtype = dtype
        self._buffers: dict[str, list[Buffer[torch.Tensor]]] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            for name in [*self._buffers]:
                self._give_back(name)

    def load(self, layout: Layout, progress: Progress) -> dict[str, Weight]:
        """Fill every tensor of `layout`."""
        if layout.repeats_embedding:
            self._check_repeated_embedding()
        for name in layout.zero_biases:
            self._check_zeros(name)
        check_order(self._files, layout)
        element_bytes = self._dtype.itemsize
        total, held_before = layout.num_bytes(element_bytes), 0
        weights: dict[str, Weight] = {}
        for held in layout.tensors:
            weight, num_bytes, num_filled = self._allocate(held), held.num_bytes(element_bytes), 0
            for num_elements in self._fill(held, weight):
                num_filled += num_elements
                progress(held_before + num_bytes * num_filled // held.num_elements, total)
            held_before += num_bytes
            weights[held.name] = weight if self._keep is None else self._passed_on(held.name, weight, self._keep)
        self._files.wait()
        return weights

    def prepare(self, weights: dict[str, Weight], matrices: Mapping[str, str], ops: OpTable, max_bytes: int) -> None:
        """Put what the platform makes of matrices in their place; where memory is short they stay as they are.

        `matrices` maps names to those of tensors held. `max_bytes` bounds what all weights take in the end.
        """
        for name, source in matrices.items():
            matrix, memory = weights[source], f"{name}, prepared"
            if isinstance(matrix, QuantizedWeight):
                continue
            freed = matrix.nbytes if name == source else 0
            try:
                prepared = ops.prepare_weight(matrix, partial(self._lend_within, memory, max_bytes + freed))
            except OutOfMemoryError:
                prepared = None
            if prepared is None:
                self._give_back(memory)
            else:
                weights[name] = prepared
                self._give_back(name)  # nothing, where the tensor held has another name

    def _allocate(self, held: HeldTensor) -> Weight:
        tensor = partial(self._tensor, held.name)
        if held.scheme is None:
            return tensor(self._dtype, *held.shape)
        *lead, inputs = held.shape
        four_bits, groups = held.scheme.bits == 4, held.num_groups
        codes = tensor(torch.uint8, *lead, inputs // 2) if four_bits else tensor(torch.int8, *held.shape)
        scales = tensor(torch.float32, *lead, groups)
        zeros = tensor(torch.int16, *lead, groups) if held.scheme.zero_points else None
        return QuantizedWeight(held.scheme, codes, scales, zeros)

    def _tensor(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return self._lend(name, torch.Size(shape).numel() * dtype.itemsize).view(dtype).view(shape)

    def _lend(self, name: str, num_bytes: int) -> torch.Tensor:
        buffer = self._allocator.allocate(num_bytes, WEIGHTS_TAG)
        self._buffers.setdefault(name, []).append(buffer)
        return buffer.array

    def _lend_within(self, name: str, max_bytes: int, num_bytes: int) -> torch.Tensor:
        held = sum(buffer.num_bytes for buffers in self._buffers.values() for buffer in buffers)
        if held + num_bytes > max_bytes:
            raise OutOfMemoryError(f"cannot prepare {name!r}: {held + num_bytes} bytes of weights, not {max_bytes}")
        return self._lend(name, num_bytes)

    def _give_back(self, name: str) -> None:
        for buffer in self._buffers.pop(name, []):
            self._allocator.free(buffer)

    def _fill(self, held: HeldTensor, weight: Weight) -> Iterator[int]:
        """Fill a tensor piece by piece; yield the number of elements after each part."""
        for piece in held.pieces:
            if isinstance(weight, QuantizedWeight):
                yield from fill_codes(self._files, weight, piece)
            else:
                yield from fill_numbers(self._files, weight, piece)

    def _passed_on(self, name: str, weight: Weight, keep: Keep) -> Weight:
        """Return what is kept of a weight, whose memory goes back."""
        self._files.wait()
        if isinstance(weight, QuantizedWeight):
            zeros = None if weight.zeros is None else keep(f"{name}.zeros", weight.zeros)
            codes, scales = keep(f"{name}.codes", weight.codes), keep(f"{name}.scales", weight.scales)
            kept: Weight = QuantizedWeight(weight.scheme, codes, scales, zeros)
        else:
            kept = keep(name, weight)
        self._give_back(name)
        return kept

    def _check_zeros(self, name: str) -> None:
        """Raise unless a bias that the architecture does not have is nothing but zeros."""
        if self._files.read_all(name).any():
            raise CheckpointError(
                f"{name!r} is not zero, but the architecture has no such bias; use the config.json that belongs to "
                "these weights"
            )

    def _check_repeated_embedding(self) -> None:
        """Raise unless the output matrix, stored although it is tied, equals the embedding."""
        embedding, head = self._files.stored(EMBEDDING), self._files.stored(LM_HEAD)
        if (embedding.dtype, embedding.shape) == (head.dtype, head.shape) and self._same_bytes(embedding, head):
            return
        raise CheckpointError(
            f"config.json ties the output matrix to the embedding, but {LM_HEAD!r} is stored and differs from "
            f"{EMBEDDING!r}; set tie_word_embeddings to false if the stored one is meant"
        )

    def _same_bytes(self, first: StoredTensor, second: StoredTensor) -> bool:
        for start in range(0, first.num_bytes, CHUNK_BYTES):
            parts = torch.empty(2, min(CHUNK_BYTES, first.num_bytes - start), dtype=torch.uint8)
            self._files.read(first, start, parts[0])
            self._files.read(second, start, parts[1])
            if not torch.equal(parts[0], parts[1]):
                return False
        return True
