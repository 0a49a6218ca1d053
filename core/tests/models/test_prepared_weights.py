"""Matrices that a platform holds in a form of its own: offered once, in place of the matrix, with the same results."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from support.checkpoints import build_checkpoint, build_tied_checkpoint
from support.dense_attention import DenseAttention
from support.host_memory import HostAllocator
from support.native_models import describe_native, ignore_progress, load_native
from support.quantized_checkpoints import FORMS, write_quantized
from zif.contract import Buffer, ModelDescription, QuantizedWeight
from zif.errors import CheckpointError, OutOfMemoryError
from zif.models.decoder import Decoder
from zif.models.description import ModelSource, describe_model
from zif.models.model import Model
from zif.models.weights import load_decoder
from zif.reference.ops import ReferenceOps

FAMILIES = ["llama3", "phi3", "qwen2", "qwen3", "gemma2", "qwen3_moe", "gpt_oss"]
"""Joined matrices and separate ones, with and without biases, tied and not, experts beside plain MLPs."""

FEW_BYTES = 16


class Scribbling(HostAllocator):
    """Overwrite what is given back with NaN, and remember how many bytes that was."""

    def __init__(self) -> None:
        super().__init__()
        self.freed_bytes = 0

    def _free(self, buffer: Buffer[torch.Tensor]) -> None:
        buffer.array.fill_(255)
        self.freed_bytes += buffer.num_bytes


@dataclass(frozen=True)
class Inverted:
    """A matrix whose bits are the other way round, no tensor: whoever looks into it fails."""

    memory: torch.Tensor
    dtype: torch.dtype
    shape: torch.Size

    @property
    def matrix(self) -> torch.Tensor:
        return self.memory.bitwise_not().view(self.dtype).view(self.shape)


class Inverting(ReferenceOps):
    """Prepare what `takes` says, in as much memory as `size` says; only the operators that may be given it know it."""

    def __init__(self, takes=lambda weight: True, size=lambda weight: weight.nbytes) -> None:
        self.offered = []
        self.used = set()
        self._takes = takes
        self._size = size

    def prepare_weight(self, weight, allocate):
        self.offered.append(weight)
        memory = allocate(self._size(weight))
        assert memory.dtype == torch.uint8
        assert memory.shape == (self._size(weight),)
        if not self._takes(weight):
            return None
        return Inverted(self._written(weight.view(-1).view(torch.uint8), memory), weight.dtype, weight.shape)

    def _written(self, numbers: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return memory[: numbers.nbytes].copy_(numbers.bitwise_not())

    def linear(self, x, weight, bias):
        return super().linear(x, self._unwrapped(weight), bias)

    def gated_linear(self, x, weight, bias, activation):
        return super().gated_linear(x, self._unwrapped(weight), bias, activation)

    def logits(self, hidden, weight, bias):
        weight = self._unwrapped(weight).float()
        return super().linear(hidden.float(), weight, None if bias is None else bias.float())

    def _unwrapped(self, weight):
        if not isinstance(weight, Inverted):
            return weight
        self.used.add(id(weight))
        return weight.matrix


class Small(Inverting):
    """Ask for a few bytes and keep the bits elsewhere, in place of a form that is smaller than its matrix."""

    def __init__(self, takes=lambda weight: True, size=lambda weight: FEW_BYTES) -> None:
        super().__init__(takes, size)

    def _written(self, numbers, memory):
        return numbers.bitwise_not()


class Never(Inverting):
    """The same operators, which prepare nothing."""

    def prepare_weight(self, weight, allocate):
        return None


def logits_of(model: Model) -> torch.Tensor:
    token_ids = torch.randint(0, 256, (20,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.logits(model.forward(token_ids, torch.arange(20), DenseAttention()))


def load(description: ModelDescription, ops: ReferenceOps, allocator: HostAllocator) -> Decoder:
    return load_decoder(description, ops, allocator, "cpu", ignore_progress)


def matrices(description: ModelDescription) -> list[tuple[int, ...]]:
    """Return the shapes of what only products read, as the model's configuration has them."""
    config = description.config
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    size = config.get("head_dim") or hidden // heads
    shapes = []
    for layer in range(config["num_hidden_layers"]):
        shapes += [((heads + 2 * kv_heads) * size, hidden), (hidden, heads * size)]
        experts = config.get("num_experts") or config.get("num_local_experts")
        if experts and layer not in config.get("mlp_only_layers", ()):
            shapes += [(experts, hidden)]
        else:
            shapes += [(2 * config["intermediate_size"], hidden), (hidden, config["intermediate_size"])]
    return [*shapes, (config["vocab_size"], hidden)]


def ties(description: ModelDescription) -> bool:
    return bool(description.config.get("tie_word_embeddings"))


def describe_llama(folder: Path, is_tied: bool) -> ModelDescription:
    description = describe_native((build_tied_checkpoint if is_tied else build_checkpoint)("llama3", folder))
    assert ties(description) == is_tied
    return description


def plain_logits(description: ModelDescription) -> torch.Tensor:
    return logits_of(load(description, Never(), HostAllocator()))


tied_or_not = pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_products_read_is_offered_once(family: str, tmp_path: Path) -> None:
    description = describe_native(build_checkpoint(family, tmp_path, dtype="bfloat16"))
    ops = Inverting()
    load(description, ops, HostAllocator())
    assert sorted(tuple(weight.shape) for weight in ops.offered) == sorted(matrices(description))
    assert {weight.dtype for weight in ops.offered} == {torch.bfloat16}
    assert len({weight.data_ptr() for weight in ops.offered}) == len(ops.offered)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_those_of_the_matrices_which_are_overwritten(family: str, dtype: str, tmp_path: Path) -> None:
    description = describe_native(build_checkpoint(family, tmp_path), dtype=dtype)
    ops, allocator = Small() if ties(description) else Inverting(), Scribbling()
    model = load(description, ops, allocator)
    element_bytes = getattr(torch, dtype).itemsize
    sizes = [rows * columns * element_bytes for rows, columns in matrices(description)]
    freed = sum(sizes[:-1] if ties(description) else sizes)
    lent = FEW_BYTES * len(sizes) if ties(description) else freed
    assert allocator.freed_bytes == freed
    assert allocator.stats().allocated_bytes == description.weight_bytes - freed + lent
    assert torch.equal(logits_of(model), plain_logits(description))
    assert len(ops.used) == len(sizes), "each is used in place of its matrix"


@tied_or_not
def test_memory_is_all_weights_and_one_matrix_at_most(is_tied: bool, tmp_path: Path) -> None:
    description, allocator = describe_llama(tmp_path, is_tied), HostAllocator()
    load(description, Inverting(), allocator)
    in_turn = matrices(description)[:-1] if is_tied else matrices(description)
    assert allocator.stats().peak_bytes == description.weight_bytes + max(r * c for r, c in in_turn) * 4


@tied_or_not
def test_what_is_lent_for_nothing_goes_back(is_tied: bool, tmp_path: Path) -> None:
    description = describe_llama(tmp_path, is_tied)
    ops, allocator = Small(takes=lambda weight: False), Scribbling()
    model = load(description, ops, allocator)
    assert len(ops.offered) == len(matrices(description))
    assert allocator.stats().by_tag == (("weights", description.weight_bytes),)
    assert allocator.freed_bytes == FEW_BYTES * len(matrices(description))
    assert torch.equal(logits_of(model), plain_logits(description))
    assert not ops.used


def test_a_platform_may_prepare_some(tmp_path: Path) -> None:
    description = describe_native(build_checkpoint("qwen3", tmp_path))
    ops = Small(takes=lambda weight: weight.shape[0] > weight.shape[1])
    model = load(description, ops, Scribbling())
    assert torch.equal(logits_of(model), plain_logits(description))
    taken = [shape for shape in matrices(description) if shape[0] > shape[1]]
    assert 0 < len(taken) < len(matrices(description))
    assert len(ops.used) == len(taken)


def test_the_embedding_stays_where_it_is_prepared_as_the_output_matrix(tmp_path: Path) -> None:
    description, ops = describe_llama(tmp_path, is_tied=True), Small()
    model = load(description, ops, Scribbling())
    assert isinstance(model._lm_head.weight, Inverted)
    assert model._embedding is ops.offered[-1]
    assert torch.equal(model._embedding, model._lm_head.weight.matrix)


def test_an_output_matrix_that_is_the_embedding_stays_where_its_copy_is_too_large(tmp_path: Path) -> None:
    description = describe_llama(tmp_path, is_tied=True)
    ops, allocator = Inverting(), Scribbling()
    model = load(description, ops, allocator)
    assert model._lm_head.weight is model._embedding
    assert allocator.stats().by_tag == (("weights", description.weight_bytes),)
    assert torch.equal(logits_of(model), plain_logits(description))
    assert len(ops.used) == len(matrices(description)) - 1


@pytest.mark.parametrize("excess", [0, 1])
def test_a_copy_may_take_all_weights_to_a_32nd_more_than_planned(excess: int, tmp_path: Path) -> None:
    description = describe_llama(tmp_path, is_tied=True)
    room, output = description.weight_bytes // 32, matrices(description)[-1]
    assert matrices(description).count(output) == 1
    ops = Small(size=lambda weight: room + excess if weight.shape == output else weight.nbytes)
    allocator = HostAllocator()
    model = load(description, ops, allocator)
    assert allocator.stats().allocated_bytes == description.weight_bytes + (0 if excess else room)
    assert torch.equal(logits_of(model), plain_logits(description))
    assert len(ops.used) == len(matrices(description)) - excess


@pytest.mark.parametrize("excess", [0, 1])
def test_forms_larger_than_their_matrices_share_that_room(excess: int, tmp_path: Path) -> None:
    description = describe_llama(tmp_path, is_tied=False)
    room = description.weight_bytes // 32
    ops, allocator = Inverting(size=lambda weight: weight.nbytes + room + excess), Scribbling()
    model = load(description, ops, allocator)
    assert len(ops.offered) == len(matrices(description))
    assert allocator.stats().allocated_bytes == description.weight_bytes + (0 if excess else room)
    assert torch.equal(logits_of(model), plain_logits(description))
    assert len(ops.used) == 1 - excess, "the first has taken all the room"


@tied_or_not
def test_memory_of_the_weights_alone_leaves_all_matrices(is_tied: bool, tmp_path: Path) -> None:
    description, ops = describe_llama(tmp_path, is_tied), Inverting()
    allocator = HostAllocator(description.weight_bytes)
    model = load(description, ops, allocator)
    assert len(ops.offered) == len(matrices(description))
    assert allocator.stats().allocated_bytes == allocator.stats().peak_bytes == description.weight_bytes
    assert torch.equal(logits_of(model), plain_logits(description))
    assert not ops.used


def test_memory_that_is_short_for_some_matrices_leaves_these(tmp_path: Path) -> None:
    description = describe_llama(tmp_path, is_tied=False)

    def take(weight: torch.Tensor) -> bool:
        if weight.shape[0] > weight.shape[1]:
            raise OutOfMemoryError("no room to work in")
        return True

    ops, allocator = Small(take), Scribbling()
    model = load(description, ops, allocator)
    taken = [rows * columns * 4 for rows, columns in matrices(description) if rows <= columns]
    assert 0 < len(taken) < len(ops.offered) == len(matrices(description))
    assert allocator.stats().allocated_bytes == description.weight_bytes - sum(taken) + FEW_BYTES * len(taken)
    assert torch.equal(logits_of(model), plain_logits(description))
    assert len(ops.used) == len(taken)


@pytest.mark.parametrize("failing", ["first", "last"])
def test_an_error_leaves_nothing_allocated(failing: str, tmp_path: Path) -> None:
    description = describe_native(build_checkpoint("llama3", tmp_path))
    last, offered = len(matrices(description)), []

    def take(weight: torch.Tensor) -> bool:
        offered.append(weight)
        if len(offered) == (1 if failing == "first" else last):
            raise RuntimeError("no kernel")
        return True

    allocator = HostAllocator()
    with pytest.raises(RuntimeError, match="no kernel"):
        load(description, Inverting(take), allocator)
    assert allocator.stats().allocated_bytes == 0


def test_a_checksum_that_differs_leaves_nothing_allocated(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    allocator = HostAllocator()
    with pytest.raises(CheckpointError):
        load(describe_native(folder), Inverting(), allocator)
    assert allocator.stats().allocated_bytes == 0


def test_codes_are_never_offered(tmp_path: Path) -> None:
    written = write_quantized(FORMS["gptq"], "qwen3_moe", tmp_path, tie_word_embeddings=False)
    description = describe_native(written.folder)
    ops = Inverting()
    model = load(description, ops, Scribbling())
    routers, head = (8, 48), (288, 48)
    assert sorted({tuple(weight.shape) for weight in ops.offered}) == [routers, head]
    assert isinstance(model._layers[0].attention.qkv.weight, QuantizedWeight)
    assert torch.equal(logits_of(model), plain_logits(description))


def test_an_embedding_in_codes_is_not_offered(tmp_path: Path) -> None:
    folder = build_checkpoint("qwen3", tmp_path)
    source = ModelSource(folder, dtype="auto", max_model_len=None, implementation="native", quantization="int8")
    ops = Inverting()
    model = load(describe_model(source), ops, Scribbling())
    assert isinstance(model._lm_head.weight, QuantizedWeight)
    assert ops.offered == []


def test_weights_that_are_kept_elsewhere_are_not_offered(tmp_path: Path) -> None:
    description, ops = describe_native(build_checkpoint("qwen3", tmp_path)), Inverting()
    kept = load_decoder(description, ops, Scribbling(), "cpu", ignore_progress, lambda name, tensor: tensor.clone())
    assert ops.offered == []
    assert torch.equal(logits_of(kept), plain_logits(description))


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    description, heard = describe_llama(tmp_path, is_tied=True), []
    load_decoder(description, Small(), HostAllocator(), "cpu", lambda done, total: heard.append((done, total)))
    assert heard == sorted(heard)
    assert heard[-1] == (description.weight_bytes, description.weight_bytes)


def test_the_reference_prepares_nothing(tmp_path: Path) -> None:
    description, allocator = describe_native(build_checkpoint("qwen3", tmp_path)), HostAllocator()
    model = load_native(description, allocator)
    assert model._lm_head.weight is model._embedding
    assert allocator.stats().peak_bytes == description.weight_bytes
