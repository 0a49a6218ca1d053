"""Gloo collectives between two processes: right results, and errors within the deadline."""

import multiprocessing
import socket
import subprocess
import sys
import threading
import time
import traceback

import pytest
import torch

from zif.contract import CommunicatorError, CommunicatorGroup
from zif.host.gloo import GlooCommunicator

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
)


def _group(rendezvous, rank, deadline_s=30.0):
    return CommunicatorGroup("test", rank, 2, rendezvous, deadline_s)


def _run_rank(function, rendezvous, rank, outcomes):
    torch.set_num_threads(1)
    try:
        function(rendezvous, rank)
        outcomes.put((rank, ""))
    except BaseException:
        outcomes.put((rank, traceback.format_exc()))


def _run_ranks(function, rendezvous):
    """Run `function(rendezvous, rank)` in two processes and fail with what either raised."""
    context = multiprocessing.get_context("spawn")
    outcomes = context.Queue()
    ranks = [context.Process(target=_run_rank, args=(function, rendezvous, rank, outcomes)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        results = dict(outcomes.get(timeout=60) for _ in ranks)
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
    assert results == {0: "", 1: ""}


def _all_collectives(rendezvous, rank):
    communicator = GlooCommunicator(_group(rendezvous, rank))
    for dtype in DTYPES:
        _check_dtype(communicator, rank, dtype)
    strided = (torch.arange(6.0) + rank).view(2, 3).t()
    assert torch.equal(communicator.all_reduce(strided), (2 * torch.arange(6.0) + 1).view(2, 3).t())
    with pytest.raises(ValueError, match="does not divide"):
        communicator.reduce_scatter(torch.zeros(3))
    communicator.barrier()
    assert not torch.distributed.is_initialized()
    communicator.close()
    communicator.close()
    with pytest.raises(CommunicatorError, match="closed"):
        communicator.barrier()


def _check_dtype(communicator, rank, dtype):
    mine = (torch.arange(8) + 10 * rank).view(4, 2).to(dtype)
    other = (torch.arange(8) + 10 * (1 - rank)).view(4, 2).to(dtype)
    kept = mine.clone()
    both = [mine, other] if rank == 0 else [other, mine]
    half = slice(2 * rank, 2 * rank + 2)
    results = {
        "all_reduce": (communicator.all_reduce(mine), mine + other),
        "all_gather": (communicator.all_gather(mine), torch.cat(both)),
        "reduce_scatter": (communicator.reduce_scatter(mine), (mine + other)[half]),
        "all_to_all": (communicator.all_to_all(mine), torch.cat([both[0][half], both[1][half]])),
        "broadcast 0": (communicator.broadcast(mine, 0), both[0]),
        "broadcast 1": (communicator.broadcast(mine, 1), both[1]),
    }
    if rank == 0:
        communicator.send(mine, 1)
        results["receive"] = (communicator.receive(mine, 1), other)
    else:
        results["receive"] = (communicator.receive(mine, 0), other)
        communicator.send(mine, 0)
    for name, (got, expected) in results.items():
        assert got.dtype is dtype, name
        assert torch.equal(got, expected), (name, dtype, got, expected)
    assert torch.equal(mine, kept)


def _late_rank(rendezvous, rank):
    # Long enough for two processes that start some seconds apart on a busy machine.
    communicator = GlooCommunicator(_group(rendezvous, rank, deadline_s=6.0))
    if rank == 1:
        return  # gone: its process ends without taking part
    start = time.monotonic()
    with pytest.raises(CommunicatorError, match="rank 0 of 2"):
        communicator.all_reduce(torch.ones(4))
    assert time.monotonic() - start < 12
    start = time.monotonic()
    with pytest.raises(CommunicatorError, match="all_reduce"):
        communicator.barrier()
    assert time.monotonic() - start < 0.5
    communicator.close()


def _aborted_rank(rendezvous, rank):
    communicator = GlooCommunicator(_group(rendezvous, rank, deadline_s=20))
    communicator.barrier()
    if rank == 0:
        start = time.monotonic()
        threading.Timer(0.2, communicator.abort).start()
        with pytest.raises(CommunicatorError, match="aborted"):
            communicator.receive(torch.ones(4), 1)
        assert time.monotonic() - start < 5
        communicator.abort()
    with pytest.raises(CommunicatorError, match="aborted" if rank == 0 else "rank 1 of 2"):
        communicator.broadcast(torch.ones(4), 0)


def test_all_collectives():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _run_ranks(_all_collectives, f"tcp://127.0.0.1:{port}")


def test_a_rank_that_is_gone_raises_within_the_deadline(tmp_path):
    _run_ranks(_late_rank, f"file://{tmp_path}/store")


def test_abort_ends_a_pending_call(tmp_path):
    _run_ranks(_aborted_rank, f"file://{tmp_path}/store")


def test_a_rank_that_never_comes_raises_at_joining(tmp_path):
    start = time.monotonic()
    with pytest.raises(CommunicatorError, match="could not join"):
        GlooCommunicator(_group(f"file://{tmp_path}/store", 0, deadline_s=1.0))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("rendezvous", ["tcp://host", "file://", "nonsense", "http://host:1"])
def test_a_wrong_rendezvous_is_named(rendezvous):
    with pytest.raises(CommunicatorError, match="must be tcp"):
        GlooCommunicator(_group(rendezvous, 0))


def test_a_group_of_one_works(tmp_path):
    communicator = GlooCommunicator(CommunicatorGroup("alone", 0, 1, f"file://{tmp_path}/store", 10.0))
    array = torch.arange(4.0)
    for result in (communicator.all_reduce(array), communicator.all_gather(array), communicator.all_to_all(array)):
        assert torch.equal(result, array)
    communicator.close()


def test_a_process_may_end_right_after_its_last_call(tmp_path):
    """A thread that let go of gloo's objects while Python ends would take the process down."""
    code = """if True:
        import sys
        import torch
        from zif.contract import CommunicatorGroup
        from zif.host.gloo import GlooCommunicator
        communicator = GlooCommunicator(CommunicatorGroup("alone", 0, 1, sys.argv[1], 20.0))
        communicator.all_reduce(torch.ones(2))
        communicator.close()
    """
    for repeat in range(3):
        command = [sys.executable, "-c", code, f"file://{tmp_path}/store{repeat}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
