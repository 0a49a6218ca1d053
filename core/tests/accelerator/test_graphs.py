"""Bucketed graphs with a capture that repeats the call: what is padded, when it is captured, and what is given up."""

import gc
from dataclasses import dataclass

import pytest
import torch

from zif.accelerator.graphs import BucketedGraphs, Capture, TorchCapture
from zif.errors import DeviceLostError


@dataclass(frozen=True)
class Prepared:
    """What attention prepared for one group: its lengths, padded to the bucket."""

    lengths: torch.Tensor
    bucket: int | None


class Attend:
    def __init__(self, *prepared):
        self.prepared = dict(enumerate(prepared))


class RepeatedCall(Capture):
    """Call the function again on the buffers that stay, into an output that stays, as a graph does."""

    def __init__(self, error=None):
        self.error, self.num_captures, self.num_replays = error, 0, 0

    def capture(self, function):
        self.num_captures += 1
        if self.error is not None:
            raise self.error
        with torch.inference_mode(False):
            output = torch.empty_like(function())

        def replay():
            self.num_replays += 1
            return output.copy_(function())

        return replay


class Model:
    """forward(token_ids, positions, attend): a row for each token, from its id, its position and its length."""

    def __init__(self):
        self.shapes = []

    def forward(self, token_ids, positions, attend, *states):
        self.shapes.append(len(token_ids))
        lengths = attend.prepared[0].lengths[: len(token_ids)] if hasattr(attend, "prepared") else 0
        return torch.stack([token_ids, positions, torch.zeros_like(positions) + lengths], dim=1)


class Steps:
    """A wrapped model and the buffers of attention; `decode` runs one step of single tokens."""

    def __init__(self, capture=None, **options):
        self.capture = capture or RepeatedCall()
        self.graphs = BucketedGraphs(self.capture, **options)
        self.model = Model()
        self.wrapped = self.graphs.wrap(self.model.forward)
        self.buffers = {}

    def decode(self, *token_ids, bucket=4):
        tokens = torch.tensor(token_ids)
        with torch.inference_mode(False):
            lengths = self.buffers.setdefault(bucket, torch.zeros(bucket, dtype=torch.int64))
        lengths[: len(tokens)] = tokens + 100
        rows = self.wrapped(tokens, tokens + 10, Attend(Prepared(lengths, bucket), Prepared(lengths, bucket)))
        assert torch.equal(rows, torch.stack([tokens, tokens + 10, tokens + 100], dim=1))
        return rows


def test_steps_of_a_bucket_are_captured_after_the_warm_ones_and_replayed():
    steps = Steps()
    for tokens in ((1, 2, 3), (4, 5), (6, 7, 8), (9, 8, 7, 6), (5,)):
        steps.decode(*tokens)
    assert steps.model.shapes[:2] == [3, 2], "the first two run as they are"
    assert set(steps.model.shapes[2:]) == {4}, "later ones are padded to the bucket"
    assert (steps.capture.num_captures, steps.capture.num_replays) == (1, 3)
    assert steps.graphs.num_graphs == 1
    assert steps.graphs.notes == ()


def test_each_bucket_has_its_graph():
    steps = Steps(warm_steps=0)
    for tokens, bucket in (((1,), 1), ((1, 2), 2), ((3, 4), 4), ((5, 6, 7), 4), ((8,), 1)):
        steps.decode(*tokens, bucket=bucket)
    assert steps.graphs.num_graphs == steps.capture.num_captures == 3


def test_a_result_is_the_callers():
    steps = Steps(warm_steps=0)
    first = steps.decode(1, 2, 3)
    kept = first.clone()
    steps.decode(4, 5, 6)
    assert torch.equal(first, kept)


def test_rows_behind_the_step_are_zero():
    steps = Steps(warm_steps=0)
    seen = []
    forward = steps.graphs.wrap(lambda token_ids, positions, attend: seen.append(token_ids.tolist()) or token_ids + 0)
    prepared = Attend(Prepared(torch.zeros(4), 4))
    for tokens in ([7, 8, 9], [5]):
        forward(torch.tensor(tokens), torch.tensor(tokens), prepared)
    assert seen[-1] == [5, 0, 0, 0]


@pytest.mark.parametrize("case", ["no bucket", "two buckets", "no group", "states", "too many rows", "other arguments"])
def test_other_steps_run_as_they_are(case):
    steps = Steps(warm_steps=0)
    tokens, lengths, more = torch.arange(3), torch.arange(8), ()
    attend = Attend(Prepared(lengths, 4))
    match case:
        case "no bucket":
            attend = Attend(Prepared(lengths, None))
        case "two buckets":
            attend = Attend(Prepared(lengths, 4), Prepared(lengths, 8))
        case "no group":
            attend = object()
        case "states":
            more = (object(),)
        case "too many rows":
            attend = Attend(Prepared(lengths, 2))
        case "other arguments":
            attend = torch.zeros(3)
    for _ in range(4):
        assert len(steps.wrapped(tokens, tokens, attend, *more)) == 3
    assert steps.capture.num_captures == 0
    assert steps.model.shapes == [3] * 4


def test_named_arguments_run_as_they_are():
    assert BucketedGraphs(RepeatedCall()).wrap(lambda first, *, second: first - second)(3, second=1) == 2


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted\nwhen capturing"), MemoryError("out of it")])
def test_a_capture_that_fails_leaves_its_bucket_as_it_is_and_says_so_once(error):
    steps = Steps(RepeatedCall(error), warm_steps=0)
    for _ in range(4):
        steps.decode(1, 2)
    assert steps.capture.num_captures == 1
    assert steps.graphs.notes == (f"steps of 4 requests are not captured: {str(error).splitlines()[0]}",)
    steps.capture.error = None
    steps.decode(1, bucket=1)
    assert steps.graphs.num_graphs == 1


def test_a_lost_device_is_no_reason_to_go_on():
    steps = Steps(RepeatedCall(DeviceLostError("gone")), warm_steps=0)
    with pytest.raises(DeviceLostError):
        steps.decode(1)


def test_there_are_no_more_graphs_than_allowed():
    steps = Steps(warm_steps=0, max_graphs=2)
    for bucket in (1, 2, 4, 8, 4):
        steps.decode(1, bucket=bucket)
    assert steps.graphs.num_graphs == 2


def test_a_graph_whose_arrays_moved_is_captured_anew():
    steps = Steps(warm_steps=1)
    steps.decode(1, 2)
    steps.decode(3, 4)
    steps.buffers.clear()
    kept = torch.zeros(4)  # so that the new buffer lies elsewhere
    for tokens in ((5, 6), (7, 8), (9, 1)):
        steps.decode(*tokens)
    assert steps.capture.num_captures == 2
    del kept


def test_arrays_that_never_stay_are_given_up():
    steps, keep = Steps(warm_steps=0), []
    for _ in range(30):
        steps.decode(1, 2)
        keep.append(steps.buffers.pop(4))
    assert steps.capture.num_captures < 12
    assert steps.graphs.notes == ("steps of 4 requests are not captured: their arrays do not stay in place",)


def test_forgetting_drops_all_graphs_and_steps_go_on():
    steps = Steps(warm_steps=0)
    steps.decode(1)
    steps.graphs.forget()
    assert steps.graphs.num_graphs == 0
    steps.decode(2)
    assert steps.graphs.num_graphs == 1


def test_what_is_no_longer_wrapped_holds_no_graphs():
    steps = Steps(warm_steps=0)
    steps.decode(1)
    del steps.wrapped
    gc.collect()
    assert steps.graphs.num_graphs == 0


def test_errors_of_the_function_reach_the_caller():
    def fail(token_ids, positions, attend):
        raise ValueError("wrong")

    wrapped = BucketedGraphs(RepeatedCall(), warm_steps=0).wrap(fail)
    with pytest.raises(ValueError, match="wrong"):
        wrapped(torch.arange(2), torch.arange(2), Attend(Prepared(torch.zeros(2), 2)))


def test_buffers_can_be_filled_in_and_out_of_inference_mode():
    steps = Steps(warm_steps=0)
    with torch.inference_mode():
        steps.decode(1, 2)
    steps.decode(3)
    with torch.inference_mode():
        steps.decode(4, 5, 6)


class Stream:
    def wait_stream(self, other): ...


class Graph:
    def replay(self):
        module.log.append("replay")


class module:
    """A stand-in for torch's module of a device: notes what is called, in order."""

    log: list = []  # noqa: RUF012
    current = Stream()
    error = None
    FakeGraph = Graph

    @staticmethod
    def Stream(device):
        module.log.append("new stream")
        return Stream()

    @staticmethod
    def graph_pool_handle():
        return (0, 1)

    @staticmethod
    def current_stream(device):
        return module.current

    class stream:
        def __init__(self, chosen):
            self.chosen = chosen

        def __enter__(self):
            self.before, module.current = module.current, self.chosen

        def __exit__(self, *_):
            module.current = self.before

    class graph:
        def __init__(self, graph, pool, stream, capture_error_mode):
            assert (pool, capture_error_mode) == ((0, 1), "thread_local")
            self.chosen = stream

        def __enter__(self):
            module.log.append("begin")
            module.current = self.chosen

        def __exit__(self, *_):
            if module.error:  # as torch does: the stream of the capture stays the current one
                raise module.error
            module.current = module.before
            module.log.append("end")


@pytest.fixture
def torch_capture(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    module.log, module.error, module.before = [], None, module.current
    return TorchCapture("cpu", "FakeGraph")


def test_torch_captures_after_one_run_as_it_is(torch_capture):
    def function():
        module.log.append("run")
        return torch.ones(2)

    replay = torch_capture.capture(function)
    assert replay().tolist() == [1.0, 1.0]
    torch_capture.capture(function)
    one = ["run", "begin", "run", "end"]
    assert module.log == ["new stream", *one, "replay", *one]


def test_a_broken_capture_of_torch_leaves_nothing_behind(torch_capture):
    before, module.error = module.current, RuntimeError("operation failed due to a previous error during capture")
    with pytest.raises(RuntimeError, match="previous error"):
        torch_capture.capture(lambda: torch.ones(2))
    assert module.current is before
    module.error = None
    torch_capture.capture(lambda: torch.ones(2))
    assert module.log.count("new stream") == 2


def test_a_capture_that_breaks_the_context_is_a_lost_device(torch_capture):
    module.error = RuntimeError("an illegal memory access was encountered")
    with pytest.raises(DeviceLostError):
        torch_capture.capture(lambda: torch.ones(2))
