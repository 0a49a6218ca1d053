"""The limit of open files: raised where it may be, and told where it may not."""

import asyncio
import resource

import pytest

from serving.http.servers import answer_of, get, running
from zif.serving.http.open_files import RESERVED_FILES, raise_open_files


@pytest.fixture
def limits(monkeypatch):
    """Return a list that holds the soft and hard limit of a process of the test's own making."""
    pair = [256, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(pair))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, given: pair.__setitem__(slice(None), given))
    return pair


def test_a_limit_that_is_enough_stays(limits):
    assert raise_open_files(256 - RESERVED_FILES) == 0
    assert limits == [256, 4096]


def test_a_limit_is_raised_as_far_as_needed(limits):
    assert raise_open_files(1000) == 0
    assert limits == [1000 + RESERVED_FILES, 4096]


def test_what_the_system_does_not_allow_is_counted(limits):
    assert raise_open_files(4096) == RESERVED_FILES
    assert limits == [4096, 4096]


def test_unlimited_is_enough(limits):
    limits[:] = [resource.RLIM_INFINITY, resource.RLIM_INFINITY]
    assert raise_open_files(10**6) == 0


def test_a_kernel_that_allows_less_than_it_says(limits, monkeypatch):
    def refuse(kind, given):
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_open_files(1000) == 1000 + RESERVED_FILES - 256


def test_a_server_says_so_and_takes_no_more_than_fit(limits):
    async def serve():
        limits[:] = [RESERVED_FILES + 2, RESERVED_FILES + 2]
        async with running(max_connections=100) as server:
            assert "too low by 98 for max_connections=100, so 2 are taken" in await server.line("warning")
            kept = [await server.connect() for _ in range(2)]
            reader, _ = await server.connect()
            assert await reader.read() == b""
            reader, writer = kept[0]
            writer.write(get("/livez"))
            assert (await answer_of(reader))[0] == 200

    asyncio.run(serve())
