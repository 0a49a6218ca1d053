"""Parts of a checkpoint that several threads read: all arrive, and the first that is wrong is heard."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support.checkpoints import build_checkpoint
from support.host_memory import HostAllocator
from support.native_models import describe_native
from zif.contract import Buffer
from zif.errors import CheckpointError
from zif.models.checkpoint import Checkpoint, open_checkpoint
from zif.models.tensor_files import TensorFiles
from zif.models.weights import load_decoder
from zif.reference.ops import ReferenceOps

NUM_TENSORS = 40
SIZE = 100_000


@pytest.fixture(params=[1, 4])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("zif-read")]


class Watched(HostAllocator):
    """Counts the threads that could still read into memory that is given back."""

    num_readers: list[int]

    def _free(self, buffer: Buffer[torch.Tensor]) -> None:
        self.num_readers.append(len(readers()))


def write(folder: Path, infinite: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    tensors = {f"t{index:02d}": torch.full((SIZE,), float(index)) for index in range(NUM_TENSORS)}
    for index in infinite:
        tensors[f"t{index:02d}"][-1] = torch.inf
    save_file(tensors, folder / "model.safetensors")
    return tensors


def read_everything(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    targets = {name: torch.zeros(SIZE) for name in checkpoint.tensors}
    with TensorFiles(checkpoint) as files:
        for name in sorted(targets):
            files.read_soon(files.stored(name), 0, targets[name])
        files.wait()
    return targets


def test_everything_is_there_after_waiting(tmp_path: Path, num_threads: int) -> None:
    tensors = write(tmp_path)
    read = read_everything(open_checkpoint(tmp_path))
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_parts_of_one_tensor(tmp_path: Path, num_threads: int) -> None:
    expected = torch.arange(1 << 20, dtype=torch.float32)
    save_file({"t": expected}, tmp_path / "model.safetensors")
    target = torch.zeros(1 << 20)
    with TensorFiles(open_checkpoint(tmp_path)) as files:
        for start in range(0, 1 << 20, 1000):
            files.read_soon(files.stored("t"), 4 * start, target[start : start + 1000])
        files.wait()
    assert torch.equal(target, expected)


@pytest.mark.parametrize("infinite", [(3, 30), (NUM_TENSORS - 1,)])
def test_the_first_that_is_wrong_is_named(tmp_path: Path, num_threads: int, infinite: tuple[int, ...]) -> None:
    write(tmp_path, infinite)
    with pytest.raises(CheckpointError, match=f"'t{infinite[0]:02d}'.*not finite"):
        read_everything(open_checkpoint(tmp_path))


def test_leaving_early_ends_reads_that_wait(tmp_path: Path, num_threads: int) -> None:
    write(tmp_path)
    target = torch.zeros(NUM_TENSORS, SIZE)
    with TensorFiles(open_checkpoint(tmp_path)) as files:
        for index in range(NUM_TENSORS):
            files.read_soon(files.stored(f"t{index:02d}"), 0, target[index])
    before = target.clone()
    assert not readers()
    assert torch.equal(target, before)


def test_tensors_without_numbers(tmp_path: Path, num_threads: int) -> None:
    save_file({"t": torch.zeros(0, 5)}, tmp_path / "model.safetensors")
    with TensorFiles(open_checkpoint(tmp_path)) as files:
        files.read_soon(files.stored("t"), 0, torch.zeros(0, 5))
        files.wait()
        assert files.read_all("t").shape == (0, 5)


def test_memory_goes_back_once_no_thread_reads_to_it(
    tmp_path: Path, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    description = describe_native(build_checkpoint("llama3", tmp_path))
    preadv = os.preadv

    def read_slowly(descriptor: int, views: list[memoryview], offset: int) -> int:
        time.sleep(0.05)
        return preadv(descriptor, views, offset)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "preadv", read_slowly)
    allocator = Watched()
    allocator.num_readers = []
    with pytest.raises(KeyboardInterrupt):
        load_decoder(description, ReferenceOps(), allocator, "cpu", interrupt)
    assert allocator.num_readers == [0]
    assert allocator.stats().allocated_bytes == 0


def test_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path, num_threads: int) -> None:
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(file, file.stat().st_size - 4 * SIZE * 3)
    with pytest.raises(CheckpointError, match="ends within tensor 't37'"):
        read_everything(checkpoint)
