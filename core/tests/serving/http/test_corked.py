"""Writes of one turn of the loop go out together, in order, and before the end."""

import asyncio

from zif.serving.http.corked import CorkedTransport


class Recorder(asyncio.Transport):
    def __init__(self):
        super().__init__()
        self.events = []
        self.closing = False

    def write(self, data):
        self.events.append(bytes(data))

    def close(self):
        self.closing = True
        self.events.append("close")

    def abort(self):
        self.closing = True
        self.events.append("abort")

    def is_closing(self):
        return self.closing

    def get_write_buffer_size(self):
        return 1000


def record(write):
    """Return what reaches the transport below when `write` has used the one above, in one turn of a loop."""

    async def run():
        below = Recorder()
        above = CorkedTransport(below, asyncio.get_running_loop())
        write(above)
        await asyncio.sleep(0)
        return below.events

    return asyncio.run(run())


def test_writes_of_a_turn_are_one():
    assert record(lambda t: [t.write(b"head"), t.write(b"body"), t.writelines([b"1", b"2"])]) == [b"headbody12"]


def test_much_is_not_held():
    assert record(lambda t: [t.write(b"a" * 70_000), t.write(b"b")]) == [b"a" * 70_000, b"b"]


def test_close_sends_first():
    assert record(lambda t: [t.write(b"a"), t.close(), t.write(b"late")]) == [b"a", "close"]


def test_abort_sends_nothing():
    assert record(lambda t: [t.write(b"a"), t.abort()]) == ["abort"]


def test_what_is_held_counts_as_buffered():
    sizes = []
    record(lambda t: [t.write(b"abc"), sizes.append(t.get_write_buffer_size())])
    assert sizes == [1003]
