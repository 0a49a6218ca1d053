"""KV events: their bytes, what a reader rebuilds from them, and who may read."""

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.auth

from support.control_plane import Engine, cut, full, new_request, sliding
from zif.contract import CacheKey
from zif.errors import ConfigError
from zif.kv import PagedBlockManager
from zif.kv.journal import AllCleared, BlockJournal, BlocksRemoved, BlocksStored
from zif.serving.telemetry import kv_events
from zif.serving.telemetry.kv_events import KVEventPublisher, KVEventSettings
from zif.serving.telemetry.kv_wire import END_OF_REPLAY, block_hash, encode_batch, encode_sequence

WAIT_MS = 10_000
DIGESTS = [bytes(24) + number.to_bytes(8, "big") for number in (1, 2, 2**63)]


def settings_in(folder: Path, **fields: object) -> KVEventSettings:
    given = {"endpoint": f"ipc://{folder}/events", "replay_endpoint": f"ipc://{folder}/replay", **fields}
    return KVEventSettings(**given)  # type: ignore[arg-type]


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[KVEventPublisher]:
    publisher = KVEventPublisher(settings_in(tmp_path, topic="kv@pod@model"), clock=lambda: 1.5)
    publisher.start()
    yield publisher
    publisher.close()


def test_bytes_of_a_batch_are_frozen() -> None:
    stored = BlocksStored(0, DIGESTS[:2], None, [5, 300, 70000, 7], 2)
    batch = [stored, BlocksRemoved(1, DIGESTS[2:]), AllCleared()]
    assert encode_batch(batch, 1.5, rank=3).hex() == (
        "93" "cb3ff8000000000000" "93"
        "9a" "ab426c6f636b53746f726564" "920102" "c0" "9405cd012cce0001117007" "02" "c0" "a3475055" "c0" "c0" "00"
        "94" "ac426c6f636b52656d6f766564" "91cf8000000000000000" "a3475055" "01"
        "91" "b0416c6c426c6f636b73436c6561726564"
        "03"
    )  # fmt: skip


def test_bytes_of_a_chain_with_parent_and_condition() -> None:
    stored = BlocksStored(0, DIGESTS[:2], DIGESTS[2], [1, 2], 1, condition=bytes(24) + b"\x01" * 8)
    decoded = msgspec.msgpack.decode(encode_batch([stored], 0.0))
    keys = [["0101010101010101"], None]
    assert decoded[1] == [["BlockStored", [1, 2], 2**63, [1, 2], 1, None, "GPU", None, keys, 0]]


def test_sequence_frames() -> None:
    assert encode_sequence(258).hex() == "0000000000000102"
    assert END_OF_REPLAY.hex() == "ffffffffffffffff"


def test_events_arrive_in_three_frames(publisher: KVEventPublisher, context) -> None:
    reader = subscribed(context, publisher, b"kv@")
    publisher.publish([BlocksRemoved(0, DIGESTS[:1])])
    topic, sequence, payload = received(reader)
    assert (topic, int.from_bytes(sequence, "big")) == (b"kv@pod@model", publisher_sequence(payload, publisher))
    assert msgspec.msgpack.decode(payload) == [1.5, [["BlockRemoved", [1], "GPU", 0]], 0]


def test_no_events_send_nothing(publisher: KVEventPublisher, context) -> None:
    before = replayed(context, publisher, 0)
    publisher.publish([])
    assert replayed(context, publisher, 0) == before


def test_a_started_publisher_says_that_all_is_cleared(publisher: KVEventPublisher, context) -> None:
    assert replayed(context, publisher, 0) == [(0, [1.5, [["AllBlocksCleared"]], 0])]


def test_replay_begins_where_it_is_asked_to(publisher: KVEventPublisher, context) -> None:
    for number in range(5):
        publisher.publish([BlocksRemoved(number, DIGESTS[:1])])
    assert [number for number, _ in replayed(context, publisher, 3)] == [3, 4, 5]
    assert replayed(context, publisher, 2**64 - 2) == []


def test_what_is_no_replay_request_is_not_answered(publisher: KVEventPublisher, context) -> None:
    with context.socket(zmq.DEALER) as asking:
        asking.linger = 0
        asking.connect(publisher.replay_endpoint)
        for frames in ([b"x" * 8], [b"", b"short"], [b"no delimiter", encode_sequence(0)], [b"", bytes(8), b"more"]):
            asking.send_multipart(frames)
        asking.send_multipart([b"", encode_sequence(0)])
        assert asking.poll(WAIT_MS)
        assert asking.recv_multipart()[1] == encode_sequence(0)


def test_kept_batches_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, context) -> None:
    monkeypatch.setattr(kv_events, "MAX_KEPT_BATCHES", 4)
    publisher = KVEventPublisher(settings_in(tmp_path))
    publisher.start()
    try:
        for _ in range(9):
            publisher.publish([AllCleared()])
        assert [number for number, _ in replayed(context, publisher, 0)] == [6, 7, 8, 9]
        monkeypatch.setattr(kv_events, "MAX_KEPT_BYTES", 1000)
        publisher.publish([BlocksStored(0, DIGESTS[:1], None, [70000] * 180, 180)])
        assert [number for number, _ in replayed(context, publisher, 0)] == [9, 10]
    finally:
        publisher.close()


def test_sockets_are_the_owners_and_go_with_the_publisher(tmp_path: Path) -> None:
    publisher = KVEventPublisher(settings_in(tmp_path))
    publisher.start()
    assert [stat.S_IMODE(path.stat().st_mode) for path in sorted(tmp_path.iterdir())] == [0o600, 0o600]
    publisher.close()
    publisher.close()
    assert [*tmp_path.iterdir()] == []
    publisher.publish([AllCleared()])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"endpoint": "tcp://*:0"}, "tokens of prompts"),
        ({"replay_endpoint": "tcp://127.0.0.1:5558"}, "tokens of prompts"),
        ({"endpoint": "inproc://events"}, "no address"),
        ({"endpoint": "ipc://relative"}, "no address"),
        ({"endpoint": "tcp://host"}, "no address"),
        ({"endpoint": "ipc:///" + "x" * 120}, "107"),
        ({"endpoint": "ipc:///a", "replay_endpoint": "ipc:///a"}, "give two"),
        ({"topic": "x" * 300}, "256"),
        ({"key_folder": Path("/nowhere")}, "server.key_secret"),
    ],
)
def test_settings_that_would_not_work_or_would_leak(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_in(Path("/tmp"), **fields)


def test_an_address_that_cannot_be_bound(tmp_path: Path) -> None:
    publisher = KVEventPublisher(settings_in(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="cannot be published"):
        publisher.start()


def test_tcp_lets_only_known_keys_in(tmp_path: Path, context) -> None:
    folder = tmp_path / "keys"
    (folder / "clients").mkdir(parents=True)
    zmq.auth.create_certificates(folder, "server")
    zmq.auth.create_certificates(folder / "clients", "reader")
    zmq.auth.create_certificates(tmp_path, "stranger")
    publisher = KVEventPublisher(
        settings_in(tmp_path, endpoint="tcp://127.0.0.1:0", replay_endpoint=None, key_folder=folder)
    )
    publisher.start()
    try:
        server, _ = zmq.auth.load_certificate(folder / "server.key")
        friend, stranger = (context.socket(zmq.SUB) for _ in range(2))
        for reader, key in (
            (friend, folder / "clients/reader.key_secret"),
            (stranger, tmp_path / "stranger.key_secret"),
        ):
            reader.linger = 0
            reader.curve_serverkey = server
            reader.curve_publickey, reader.curve_secretkey = zmq.auth.load_certificate(key)
            reader.subscribe(b"")
            reader.connect(publisher.endpoint)
        assert until_heard(friend, publisher)
        assert not stranger.poll(0)
        friend.close()
        stranger.close()
    finally:
        publisher.close()


@pytest.mark.parametrize("specs", [(full(4),), (full(4), sliding(5, 4))])
def test_a_reader_with_drops_and_replays_knows_the_census(specs, publisher: KVEventPublisher, context) -> None:
    """The null platform runs prompts that share, evict and reset; the reader loses two messages of three."""
    journal = BlockJournal()
    engine = Engine(cut(specs, 40), budget=32)
    engine.blocks = PagedBlockManager(engine.arena, enable_prefix_caching=True, max_step_tokens=32, journal=journal)
    engine.scheduler = type(engine.scheduler)(engine.config, engine.blocks, engine.constraints, lambda: engine.now_s)
    model = RebuiltIndex(lambda start: replayed(context, publisher, start))
    for number in range(60):
        prompt = [number % 3, *range(9 + number % 14), number % 7]
        engine.add(new_request(number, prompt, cache_key=CacheKey(salt="tenant" * (number % 2))))
        while engine.scheduler.has_requests():
            engine.step()
            publisher.publish(journal.take())
        if number == 40:
            engine.blocks.reset_prefix_cache()
            publisher.publish(journal.take())
        for arrived, batch in replayed(context, publisher, model.next_number)[::3]:
            model.receive(arrived, batch)
        model.catch_up()
        census = [{block_hash(digest) for digest in group} for group in engine.blocks.census()]
        assert [set(model.blocks.get(group, {})) for group in range(len(specs))] == census
    assert model.num_gaps > 10, "nothing was lost, so nothing was proven"
    assert model.num_removed > 10, "nothing was evicted, so nothing was proven"
    for blocks in model.blocks.values():
        assert all(len(tokens) == 4 for tokens in blocks.values())


class RebuiltIndex:
    """What a router knows from the stream: blocks by group, each with its tokens. Gaps are filled by `replay`."""

    def __init__(self, replay: Callable[[int], list[tuple[int, list]]]) -> None:
        self._replay = replay
        self.next_number = 0
        self.num_gaps = self.num_removed = 0
        self.blocks: dict[int, dict[int, list[int]]] = {}

    def receive(self, number: int, batch: list) -> None:
        if number > self.next_number:
            self.num_gaps += 1
            self.catch_up()
        if number == self.next_number:
            self._apply(number, batch)

    def catch_up(self) -> None:
        for number, batch in self._replay(self.next_number):
            self._apply(number, batch)

    def _apply(self, number: int, batch: list) -> None:
        assert number == self.next_number
        self.next_number += 1
        for tag, *fields in batch[1]:
            if tag == "AllBlocksCleared":
                self.blocks.clear()
            elif tag == "BlockRemoved":
                self.num_removed += len(fields[0])
                for name in fields[0]:
                    del self.blocks[fields[2]][name]
            else:
                hashes, _, token_ids, size = fields[:4]
                group = self.blocks.setdefault(fields[8], {})
                assert group.keys().isdisjoint(hashes), "a block was stored twice"
                for index, name in enumerate(hashes):
                    group[name] = token_ids[index * size : (index + 1) * size]


def subscribed(context, publisher: KVEventPublisher, topic: bytes):
    """Return a reader whose subscription has reached the publisher."""
    reader = context.socket(zmq.SUB)
    reader.linger = 0
    reader.subscribe(topic)
    reader.connect(publisher.endpoint)
    assert until_heard(reader, publisher)
    while reader.poll(50):
        reader.recv_multipart()
    return reader


def until_heard(reader, publisher: KVEventPublisher) -> bool:
    """Publish until something arrives: a subscription takes a while to be known."""
    for _ in range(WAIT_MS // 20):
        if reader.poll(20):
            return True
        publisher.publish([AllCleared()])
    return False


def received(reader) -> list[bytes]:
    assert reader.poll(WAIT_MS), "no message came"
    with reader:
        return reader.recv_multipart()


def publisher_sequence(payload: bytes, publisher: KVEventPublisher) -> int:
    return next(number for number, kept in publisher._kept.since(0) if kept == payload)


def replayed(context, publisher: KVEventPublisher, start: int) -> list[tuple[int, list]]:
    """Ask for what is kept from a number on."""
    batches: list[tuple[int, list]] = []
    with context.socket(zmq.DEALER) as asking:
        asking.linger = 0
        asking.connect(publisher.replay_endpoint)
        asking.send_multipart([b"", encode_sequence(start)])
        while True:
            assert asking.poll(WAIT_MS), "the replay did not end"
            delimiter, sequence, payload = asking.recv_multipart()
            assert delimiter == b""
            if sequence == END_OF_REPLAY:
                assert payload == b""
                return batches
            batches.append((int.from_bytes(sequence, "big"), msgspec.msgpack.decode(payload)))
