"""Publish KV events over ZeroMQ, from the engine's process.

    publisher = KVEventPublisher(settings)
    publisher.start()                        # says "all cleared": readers forget what an earlier engine told them
    ...
    publisher.publish(journal.take())        # after each step, and after the prefix cache was reset
    ...
    publisher.close()

`publish` sends from the engine's own thread and never waits: a reader that is too slow loses messages, sees a gap in
the sequence numbers and asks the replay socket. A thread answers there: a request is the 8-byte number to begin with,
the reply one (number, payload) message per batch that is still kept, then number -1 with an empty payload.

Sockets are `ipc://` with access for the owner only. `tcp://` needs a folder of CURVE keys (ZeroMQ RFC 26):
`server.key_secret`, and `clients/*.key` for the readers that are let in; `zmq.auth.create_certificates` writes them.
"""

import contextlib
import logging
import os
import re
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from zif.errors import ConfigError
from zif.kv.journal import AllCleared, BlockEvent
from zif.serving.telemetry.kv_wire import END_OF_REPLAY, SEQUENCE_BYTES, encode_batch, encode_sequence

logger = logging.getLogger(__name__)

MAX_KEPT_BATCHES: Final = 10_000
MAX_KEPT_BYTES: Final = 64 * 2**20
MAX_QUEUED_MESSAGES: Final = 100_000
"""Messages that wait for one slow reader; what comes after them is lost to it."""

_MAX_IPC_PATH_BYTES: Final = 107
_MAX_REQUEST_BYTES: Final = 1024
"""Readers send subscriptions and numbers; CURVE's handshake takes up to 400 bytes."""

_MAX_TOPIC_BYTES: Final = 256
_TCP: Final = re.compile(r"tcp://(\*|[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}")
_SERVER_KEY: Final = "server.key_secret"
_CLIENT_KEYS: Final = "clients"
_STOP_AT: Final = "inproc://zif-kv-events-stop"


@dataclass(frozen=True, slots=True)
class KVEventSettings:
    """Where events are published. Construction raises `ConfigError` for what would not work or would leak.

    `replay_endpoint` None: no replay. `topic` is the first frame; llm-d reads pod and model from "kv@<pod>@<model>".
    """

    endpoint: str
    replay_endpoint: str | None = None
    topic: str = ""
    key_folder: Path | None = None
    rank: int = 0

    def __post_init__(self) -> None:
        if len(self.topic.encode()) > _MAX_TOPIC_BYTES:
            raise ConfigError(f"kv_events_topic={self.topic!r} has more than {_MAX_TOPIC_BYTES} bytes; shorten it")
        if self.endpoint == self.replay_endpoint:
            raise ConfigError(f"KV events and their replay cannot share the address {self.endpoint!r}; give two")
        for address in self._addresses():
            _check_address(address)
            if address.startswith("tcp://") and self.key_folder is None:
                raise ConfigError(
                    f"KV events tell the tokens of prompts, so {address!r} needs kv_events_key_folder, a folder with "
                    f"{_SERVER_KEY} and {_CLIENT_KEYS}/*.key; or publish on ipc://"
                )
        if self.key_folder is not None:
            _check_keys(self.key_folder)

    def _addresses(self) -> list[str]:
        return [address for address in (self.endpoint, self.replay_endpoint) if address is not None]


class KVEventPublisher:
    """Number, keep and send batches of events. One thread may call it; `clock` gives seconds since 1970."""

    def __init__(self, settings: KVEventSettings, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._clock = clock
        self._kept = _KeptBatches()
        self._next_number = 0
        self._topic = settings.topic.encode()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._events: zmq.Socket[bytes] | None = None
        self._stop: zmq.Socket[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._doorkeeper: ThreadAuthenticator | None = None
        self.endpoint = ""
        self.replay_endpoint: str | None = None

    def start(self) -> None:
        """Bind the sockets; `endpoint` and `replay_endpoint` then say where. Raises `ConfigError` when that fails."""
        self._context = zmq.Context()
        try:
            if self._settings.key_folder is not None:
                self._doorkeeper = ThreadAuthenticator(self._context)
                self._doorkeeper.start()
                self._doorkeeper.configure_curve(domain="*", location=self._settings.key_folder / _CLIENT_KEYS)
            self._events = self._bound(zmq.PUB, self._settings.endpoint, MAX_QUEUED_MESSAGES)
            self.endpoint = _address_of(self._events)
            if self._settings.replay_endpoint is not None:
                self._start_replay(self._settings.replay_endpoint)
        except BaseException:
            self.close()
            raise
        self.publish([AllCleared()])

    def publish(self, events: Sequence[BlockEvent]) -> None:
        """Send what happened in one step; nothing for no events. Never waits for a reader."""
        if not events or self._events is None:
            return
        payload = encode_batch(events, self._clock(), self._settings.rank)
        number = self._next_number
        self._next_number += 1
        self._kept.add(number, payload)
        # A PUB socket drops for readers that are full; "again" can only mean that it is being closed.
        with contextlib.suppress(zmq.Again):
            self._events.send_multipart((self._topic, encode_sequence(number), payload), zmq.NOBLOCK)

    def close(self) -> None:
        """Close the sockets and remove their files. Idempotent."""
        context, self._context = self._context, None
        if context is None:
            return
        if self._stop is not None:
            self._stop.send(b"")
        if self._thread is not None:
            self._thread.join()
        if self._doorkeeper is not None:
            self._doorkeeper.stop()
        for socket in (self._stop, self._events):
            if socket is not None:
                socket.close(linger=0)
        self._events = self._stop = self._thread = self._doorkeeper = None
        context.term()
        for address in (self._settings.endpoint, self._settings.replay_endpoint):
            if address is not None and address.startswith("ipc://"):
                Path(address.removeprefix("ipc://")).unlink(missing_ok=True)

    def _start_replay(self, address: str) -> None:
        assert self._context is not None, "the publisher was not started"
        # No limit of its own: what can be queued for one reader is bounded by what is kept.
        replay = self._bound(zmq.ROUTER, address, MAX_KEPT_BATCHES + 1)
        self.replay_endpoint = _address_of(replay)
        stop = self._context.socket(zmq.PAIR)
        stop.bind(_STOP_AT)
        self._stop = self._context.socket(zmq.PAIR)
        self._stop.connect(_STOP_AT)
        self._thread = threading.Thread(
            target=_answer_replays, args=(replay, stop, self._kept), name="zif-kv-replay", daemon=True
        )
        self._thread.start()

    def _bound(self, kind: int, address: str, max_queued: int) -> "zmq.Socket[bytes]":
        assert self._context is not None, "the publisher was not started"
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.sndhwm = max_queued
        socket.maxmsgsize = _MAX_REQUEST_BYTES
        if self._settings.key_folder is not None and address.startswith("tcp://"):
            public, secret = zmq.auth.load_certificate(self._settings.key_folder / _SERVER_KEY)
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = public, secret
        try:
            socket.bind(address)
            if address.startswith("ipc://"):
                os.chmod(address.removeprefix("ipc://"), stat.S_IRUSR | stat.S_IWUSR)
        except (zmq.ZMQError, OSError) as error:
            socket.close()
            raise ConfigError(f"KV events cannot be published on {address!r}: {error}; choose another") from error
        return socket


class _KeptBatches:
    """The last batches, for readers that missed some. Written by the engine's thread, read by the one that replays."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._batches: deque[tuple[int, bytes]] = deque()
        self._num_bytes = 0

    def add(self, number: int, payload: bytes) -> None:
        """Keep a batch, and drop the oldest ones beyond the limits."""
        with self._lock:
            self._batches.append((number, payload))
            self._num_bytes += len(payload)
            while len(self._batches) > MAX_KEPT_BATCHES or self._num_bytes > MAX_KEPT_BYTES:
                self._num_bytes -= len(self._batches.popleft()[1])

    def since(self, number: int) -> list[tuple[int, bytes]]:
        """Return the kept batches from this number on."""
        with self._lock:
            return [batch for batch in self._batches if batch[0] >= number]


def _answer_replays(replay: "zmq.Socket[bytes]", stop: "zmq.Socket[bytes]", kept: _KeptBatches) -> None:
    """Answer requests until told to stop. What is no request is not answered."""
    poller = zmq.Poller()
    poller.register(replay, zmq.POLLIN)
    poller.register(stop, zmq.POLLIN)
    while stop not in dict(poller.poll()):
        frames = replay.recv_multipart()
        if len(frames) != 3 or frames[1] or len(frames[2]) != SEQUENCE_BYTES:
            logger.warning("a replay request of %d frames is not understood; it is not answered", len(frames))
            continue
        reader, number = frames[0], int.from_bytes(frames[2], "big")
        for kept_number, payload in kept.since(number):
            replay.send_multipart((reader, b"", encode_sequence(kept_number), payload))
        replay.send_multipart((reader, b"", END_OF_REPLAY, b""))
    replay.close(linger=0)
    stop.close(linger=0)


def _address_of(socket: "zmq.Socket[bytes]") -> str:
    address = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(address, bytes), "an address is bytes"
    return address.rstrip(b"\0").decode()


def _check_address(address: str) -> None:
    if address.startswith("ipc:///"):
        num_bytes = len(os.fsencode(address.removeprefix("ipc://")))
        if num_bytes > _MAX_IPC_PATH_BYTES:
            raise ConfigError(
                f"{address!r}: a socket's path has at most {_MAX_IPC_PATH_BYTES} bytes; use a shorter one"
            )
    elif not _TCP.fullmatch(address):
        raise ConfigError(f"{address!r} is no address for KV events; give ipc:///absolute/path or tcp://host:port")


def _check_keys(folder: Path) -> None:
    if not zmq.has("curve"):
        raise ConfigError("this build of ZeroMQ has no CURVE; publish KV events on ipc://")
    if not (folder / _SERVER_KEY).is_file() or not (folder / _CLIENT_KEYS).is_dir():
        raise ConfigError(
            f"kv_events_key_folder={str(folder)!r} needs a file {_SERVER_KEY} and a folder {_CLIENT_KEYS}; "
            "zmq.auth.create_certificates writes keys"
        )
