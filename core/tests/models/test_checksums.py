"""A bit that flips in the data of a weight file is found wherever a checksum was published."""

import hashlib
import threading
from pathlib import Path

import pytest

from support.checkpoints import build_checkpoint, build_sharded_checkpoint
from zif import LLM
from zif.errors import CheckpointError
from zif.models.checksums import SUMS_FILE, verify_files, verifying


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def write_sums(folder: Path) -> None:
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}" for f in sorted(folder.glob("*.safetensors"))]
    (folder / SUMS_FILE).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("build", [build_checkpoint, build_sharded_checkpoint])
@pytest.mark.parametrize("implementation", ["native", "transformers"])
def test_flipped_bit_is_found_by_the_list_of_sums(tmp_path, build, implementation):
    pytest.importorskip("zif_cpu")
    folder = build("llama3", tmp_path)
    write_sums(folder)
    LLM(folder, platform="cpu", model_impl=implementation, max_model_len=64).close()
    victim = sorted(folder.glob("*.safetensors"))[-1]
    flip_a_bit(victim)
    with pytest.raises(CheckpointError, match=f"{victim.name}.*SHA-256"):
        LLM(folder, platform="cpu", model_impl=implementation, max_model_len=64)


def test_flipped_bit_is_found_by_the_name_of_the_blob(tmp_path):
    source = build_checkpoint("llama3", tmp_path / "source") / "model.safetensors"
    blob = tmp_path / hashlib.sha256(source.read_bytes()).hexdigest()
    blob.write_bytes(source.read_bytes())
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    verify_files([link])
    flip_a_bit(blob)
    with pytest.raises(CheckpointError, match="corrupt"):
        verify_files([link])


def test_file_that_nothing_was_published_for_is_taken_as_it_is(tmp_path):
    verify_files([build_checkpoint("llama3", tmp_path) / "model.safetensors"])


def test_list_of_sums_that_is_none_is_refused(tmp_path):
    folder = build_checkpoint("llama3", tmp_path)
    (folder / SUMS_FILE).write_text("no sums here\n")
    with pytest.raises(CheckpointError, match="sha256sum"):
        verify_files([folder / "model.safetensors"])


@pytest.fixture
def corrupt(tmp_path: Path) -> list[Path]:
    """Return files whose published sums are known; a bit has flipped in the last two."""
    folder = build_sharded_checkpoint("llama3", tmp_path)
    write_sums(folder)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    for file in files[-2:]:
        flip_a_bit(file)
    return files


def test_verification_beside_reading_raises_at_its_end_and_names_the_first(corrupt: list[Path]) -> None:
    read = []
    with pytest.raises(CheckpointError, match=f"{corrupt[-2].name}.*SHA-256"), verifying(reversed(corrupt)):
        read.append("all")
    assert read == ["all"]


def test_wrong_sum_explains_what_reading_found_wrong(corrupt: list[Path]) -> None:
    with pytest.raises(CheckpointError, match="SHA-256") as caught, verifying(corrupt):
        raise CheckpointError("not finite")
    assert str(caught.value.__context__) == "not finite"


def test_file_that_cannot_be_read_is_named(corrupt: list[Path]) -> None:
    corrupt[0].unlink()
    with pytest.raises(CheckpointError, match=f"cannot read .*{corrupt[0].name}"):
        verify_files(corrupt)


def test_what_reading_found_wrong_stands_where_sums_are_right(corrupt: list[Path]) -> None:
    with pytest.raises(CheckpointError, match="not finite"), verifying(corrupt[:1]):
        raise CheckpointError("not finite")


def test_other_errors_end_the_verification(corrupt: list[Path]) -> None:
    with pytest.raises(KeyboardInterrupt), verifying(corrupt):
        raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("zif-verify")]
