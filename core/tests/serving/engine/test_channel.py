"""The channel between two processes: private, gone from the disk once it stands, and closed on nonsense."""

import asyncio
import os
import subprocess
import sys
import threading

import pytest

from support.embedded_model import MODEL
from zif.serving.engine.channel import MAX_SOCKET_PATH, ClientEnd, EngineEnd, new_folder, remove_folder
from zif.serving.engine.child import EngineChild
from zif.serving.engine.lifetime import read_line
from zif.serving.engine.limits import ProcessOptions
from zif.serving.engine.messages import Abort, Hello, MessageError, Ready, Starting
from zif.settings import EngineSettings

SETTINGS = EngineSettings(model=str(MODEL), platform="null", max_model_len=64, kv_bytes=1 << 20)
PATIENCE_S = 20.0


class Client:
    """A client's end that remembers what it hears."""

    def __init__(self, folder):
        self.heard, self.faults = [], []
        self.end = ClientEnd(folder, self.heard.append, self.faults.append)


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def folder():
    folder = new_folder()
    yield folder
    assert not folder.exists()


def test_the_socket_is_private_while_it_is_there_and_messages_flow_without_it(folder):
    async def body():
        client = Client(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
        engine = EngineEnd(folder)
        assert engine.send(Hello(1))
        await until(lambda: client.heard)
        client.end.remove_folder()
        assert not folder.exists()
        assert client.end.send(Abort(5))
        assert engine.wait(PATIENCE_S)
        assert engine.receive() == [Abort(5)]
        for count in range(1000):
            while not engine.send(Starting("x", count, 1000)):
                await asyncio.sleep(0)
        await until(lambda: len(client.heard) == 1001)
        assert [message.done for message in client.heard[1:]] == list(range(1000))
        engine.close()
        client.end.close()
        client.end.close()

    asyncio.run(body())


def test_an_engine_is_held_back_by_a_client_that_does_not_read(folder):
    async def body():
        client = Client(folder)
        engine = EngineEnd(folder)
        assert engine.send(Hello(1))
        await until(lambda: client.heard)
        payload = "x" * 100_000
        num_sent = 0
        while engine.can_send() and engine.send(Starting(payload, 0, 1)):
            num_sent += 1
            assert num_sent < 2000, "nothing holds the engine back"
        await until(lambda: len(client.heard) == 1 + num_sent)
        assert engine.send(Starting("", 0, 1))
        engine.close()
        client.end.close()

    asyncio.run(body())


def test_a_second_peer_is_not_let_in(folder):
    async def body():
        client = Client(folder)
        first = EngineEnd(folder)
        first.send(Hello(1))
        await until(lambda: client.heard)
        second = EngineEnd(folder)
        second.send(Hello(2))
        first.send(Starting("x", 0, 1))
        await until(lambda: len(client.heard) == 2)
        assert Hello(2) not in client.heard
        first.close()
        second.close()
        client.end.close()

    asyncio.run(body())


def test_nonsense_closes_the_clients_end(folder):
    async def body():
        client = Client(folder)
        engine = EngineEnd(folder)
        engine._socket.send(b"\xff\xff")
        await until(lambda: client.faults)
        assert isinstance(client.faults[0], MessageError)
        assert not client.end.send(Abort(1))
        engine.close()

    asyncio.run(body())


def test_nonsense_ends_the_engine_in_good_order():
    async def body():
        heard = []
        child = EngineChild(SETTINGS, ProcessOptions(), heard.append)
        async with asyncio.timeout(PATIENCE_S):
            await until(lambda: any(isinstance(message, Ready) for message in heard))
            child._channel._socket.send(b"\xff nonsense")
            reason = await child.ended
        assert "no message of this direction" in reason
        assert child._process.returncode == 70

    asyncio.run(body())


def test_a_folder_that_exists_is_not_used(folder):
    async def body():
        folder.mkdir()
        with pytest.raises(FileExistsError):
            ClientEnd(folder, print, print)
        remove_folder(folder)

    asyncio.run(body())


def test_a_path_that_no_socket_can_have_is_refused():
    with pytest.raises(OSError, match="set TMPDIR"):
        new_folder("/tmp/" + "x" * MAX_SOCKET_PATH)


def test_the_first_line_is_read_and_nothing_after_it():
    reader, writer = os.pipe()
    os.write(writer, b"first\nsecond\n")
    assert read_line(reader, 100) == b"first\n"
    assert os.read(reader, 100) == b"second\n"
    os.write(writer, b"x" * 200)
    with pytest.raises(ValueError, match="longer than 100"):
        read_line(reader, 100)
    os.read(reader, 200)
    closing = threading.Timer(0.01, os.close, [writer])
    closing.start()
    assert read_line(reader, 100) == b""
    closing.join()
    os.close(reader)


@pytest.mark.parametrize("line", [b"", b"\n", b"{}\n", b'{"folder": 1}\n', b"\xff\n"])
def test_a_process_that_is_told_nothing_sensible_ends(line):
    command = [sys.executable, "-P", "-m", "zif.serving.engine.process"]
    done = subprocess.run(command, input=line, capture_output=True, timeout=PATIENCE_S, check=False)
    assert done.returncode != 0


def test_the_side_of_http_loads_no_array_library():
    script = "import sys, zif.serving.engine.client; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
