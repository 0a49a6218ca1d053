"""Copies of blocks in memory, on disk and remote: what was saved comes back, or nothing does."""

import logging
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.tiers import FINGERPRINT, FlakyRemote
from zif.contract import BlockLoad, BlockSave, KVLayout, Transfers, carry_out
from zif.kv.stores import DiskStore, EntryFormat, HostStore, RemoteStore, TieredStore

LAYOUT = KVLayout(64, ("token", "byte"), (4, 16), "uint8")
FORMATS = [EntryFormat(FINGERPRINT, 0, LAYOUT), EntryFormat(FINGERPRINT, 1, KVLayout(32, ("byte",), (32,), "uint8"))]
ENTRY = FORMATS[0].num_bytes


def name(index):
    return bytes([index]) * 32


def block(index, group=0):
    return bytes([index]) * FORMATS[group].layout.block_bytes


def disk(folder, max_bytes=1 << 20, formats=FORMATS):
    return DiskStore(folder, max_bytes, formats)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def total_bytes(folder):
    return sum(path.stat().st_size for path in files(folder))


def test_an_entry_has_the_documented_form():
    entry = FORMATS[0].encode(name(1), block(7))
    assert entry[:8] == b"zif.kv\x00\x01"
    header_bytes = int.from_bytes(entry[8:12], "little")
    assert (12 + header_bytes) % 64 == 0
    header = entry[12 : 12 + header_bytes].decode()
    for part in (
        FINGERPRINT.hex(),
        name(1).hex(),
        '"block_bytes": 64',
        '"axes": ["token", "byte"]',
        '"dtype": "uint8"',
    ):
        assert part in header
    assert entry[12 + header_bytes :] == block(7)
    assert len(entry) == ENTRY


@given(st.integers(0, ENTRY - 1), st.integers(1, 255))
def test_a_wrong_bit_anywhere_is_noticed(position, flip):
    entry = bytearray(FORMATS[0].encode(name(1), bytes(range(64))))
    entry[position] ^= flip
    assert FORMATS[0].decode(name(1), bytes(entry)) is None


@given(st.integers(0, ENTRY - 1))
def test_a_truncated_entry_is_noticed(length):
    assert FORMATS[0].decode(name(1), FORMATS[0].encode(name(1), block(3))[:length]) is None


@pytest.mark.parametrize(
    "other",
    [
        EntryFormat(bytes(32), 0, LAYOUT),
        EntryFormat(FINGERPRINT, 1, LAYOUT),
        EntryFormat(FINGERPRINT, 0, KVLayout(64, ("byte", "token"), (16, 4), "uint8")),
        EntryFormat(FINGERPRINT, 0, KVLayout(64, ("token", "byte"), (4, 16), "int8")),
    ],
    ids=["model", "group", "layout", "dtype"],
)
def test_what_was_saved_by_others_is_not_taken_for_ours(other):
    assert FORMATS[0].decode(name(1), other.encode(name(1), block(3))) is None
    assert FORMATS[0].decode(name(2), FORMATS[0].encode(name(1), block(3))) is None


def test_host_memory_refuses_to_exceed_its_bound():
    host = HostStore(100)
    host.put(1, 0, b"", block(1))
    with pytest.raises(AssertionError, match="128 bytes in a host tier of 100"):
        host.put(2, 0, b"", block(2))


def test_a_restart_finds_what_was_written_oldest_first(tmp_path):
    store = disk(tmp_path)
    for index in (3, 1, 2):
        store.put(index, index % 2, name(index), block(index, index % 2))
        os.utime(store._path(index % 2, name(index)), ns=(index * 10**9, index * 10**9))
    again = disk(tmp_path)
    kept = again.kept()
    assert [(k.group, k.name) for k in kept] == [(1, name(1)), (0, name(2)), (1, name(3))]
    assert [again.get(k.handle) for k in kept] == [block(1, 1), block(2), block(3, 1)]
    assert sum(k.num_bytes for k in kept) == total_bytes(tmp_path)


def test_a_restart_keeps_within_the_bound_whatever_the_model(tmp_path):
    other = [EntryFormat(bytes(32), 0, LAYOUT)]
    for age, (formats, index) in enumerate([(other, 1), (FORMATS, 2), (other, 3), (FORMATS, 4)]):
        store = disk(tmp_path, formats=formats)
        store.put(100 + index, 0, name(index), block(index))
        os.utime(store._path(0, name(index)), ns=(age * 10**9, age * 10**9))
    again = disk(tmp_path, 2 * ENTRY)
    assert [k.name for k in again.kept()] == [name(4)]
    assert total_bytes(tmp_path) <= 2 * ENTRY
    again.put(9, 0, name(9), block(9))
    assert [k.name for k in disk(tmp_path, 2 * ENTRY).kept()] == [name(4), name(9)]


def test_files_of_nobody_are_left_alone(tmp_path):
    mine = tmp_path / FINGERPRINT.hex() / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("x" * 5000)
    (tmp_path / "letter.txt").write_text("y" * 5000)
    store = disk(tmp_path, 2 * ENTRY)
    store.put(1, 0, name(1), block(1))
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xff"),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(EntryFormat(bytes(32), 0, LAYOUT).encode(name(1), block(1))),
    ],
    ids=["truncated", "bit", "empty", "gone", "foreign"],
)
def test_a_damaged_file_is_lost_and_removed(tmp_path, damage, caplog):
    store = disk(tmp_path)
    store.put(1, 0, name(1), block(1))
    damage(files(tmp_path)[0])
    assert store.get(1) is None
    assert files(tmp_path) == []
    assert store.get(1) is None
    assert len(caplog.records) == 1


def test_a_truncated_file_is_not_found_after_a_restart_and_makes_room(tmp_path):
    store = disk(tmp_path)
    store.put(1, 0, name(1), block(1))
    files(tmp_path)[0].write_bytes(b"zif")
    again = disk(tmp_path, ENTRY)
    assert again.kept() == []
    again.put(2, 0, name(2), block(2))
    assert total_bytes(tmp_path) == ENTRY


def test_an_unwritable_disk_loses_blocks_with_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    store = disk(tmp_path / "file")
    for index in (1, 2, 3):
        store.put(index, 0, name(index), block(index))
        assert store.get(index) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, caplog, monkeypatch):
    from pathlib import Path

    def write_bytes(path, data):
        with path.open("wb") as stream:
            stream.write(data[:10])
        raise OSError(28, "No space left on device")

    store = disk(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    store.put(1, 0, name(1), block(1))
    assert store.get(1) is None
    assert files(tmp_path) == []
    assert "No space left" in caplog.text


def test_two_engines_share_a_folder(tmp_path):
    first, second = disk(tmp_path), disk(tmp_path)
    first.put(1, 0, name(1), block(1))
    second.put(1, 0, name(1), block(1))
    second.put(2, 0, name(2), block(2))
    first.drop(1)
    assert second.get(1) is None
    assert second.get(2) == block(2)
    assert [k.name for k in disk(tmp_path).kept()] == [name(2)]


class Memory:
    """An arena of `BlockMemory` that is a dictionary."""

    def __init__(self, **blocks):
        self.blocks = {int(key[1:]): value for key, value in blocks.items()}

    def read_block(self, group, block_id):
        return self.blocks[block_id]

    def write_block(self, group, block_id, data):
        self.blocks[block_id] = bytes(data)


def test_transfers_make_room_before_they_take_it(tmp_path):
    host = HostStore(128)
    store = TieredStore(host, disk(tmp_path))
    memory = Memory(b1=block(1), b2=block(2), b3=block(3))
    saves = [BlockSave(0, index, index, name(index)) for index in (1, 2, 3)]
    assert carry_out(Transfers(saves=saves[:2]), store, memory) == []
    loads = [BlockLoad(0, 7, 1, name(1)), BlockLoad(0, 8, 3, name(3)), BlockLoad(0, 9, 99)]
    transfers = Transfers(saves=saves[2:], loads=loads, demotions=[1], drops=[2])
    assert carry_out(transfers, store, memory) == [99]
    assert memory.blocks[7] == block(1)
    assert memory.blocks[8] == block(3)
    assert len(files(tmp_path)) == 1
    assert host.num_bytes == 64


def test_demotion_goes_from_tier_to_tier(tmp_path):
    remote = FlakyRemote()
    store = TieredStore(HostStore(128), disk(tmp_path), RemoteStore(remote, FORMATS))
    store.save(BlockSave(0, 5, 1, name(1)), block(1))
    store.demote(1)
    assert len(files(tmp_path)) == 1
    store.demote(1)
    assert files(tmp_path) == []
    assert len(remote.entries) == 1
    assert store.load(BlockLoad(0, 5, 2, name(1))) == block(1)
    assert store.load(BlockLoad(1, 5, 3, name(1))) is None
    store.demote(1)
    store.drop(1)


def test_closing_moves_the_newest_to_disk(tmp_path):
    store = TieredStore(HostStore(1000), disk(tmp_path, 3 * ENTRY))
    store.save(BlockSave(0, 5, 1, name(1)), block(1))
    store.demote(1)
    for index in (2, 3, 4, 5):
        store.save(BlockSave(0, 5, index, name(index)), block(index))
    store.save(BlockSave(0, 5, 6), block(6))
    assert store.load(BlockLoad(0, 5, 2)) == block(2)
    store.close()
    store.close()
    kept = disk(tmp_path, 3 * ENTRY).kept()
    assert {k.name for k in kept} == {name(4), name(5), name(2)}
    assert total_bytes(tmp_path) == 3 * ENTRY


def test_without_host_memory_saves_go_to_disk(tmp_path):
    store = TieredStore(disk=disk(tmp_path))
    store.save(BlockSave(0, 5, 1, name(1)), block(1))
    assert store.load(BlockLoad(0, 5, 1)) == block(1)
