"""Lists of calls that compute each row by itself: made token by token, they give what they give one after the other."""

import ctypes
from struct import Struct

import pytest
import torch

from zif_cpu.library import DTYPE_CODES, INT8_CODE, RowsCall
from zif_cpu.recording import address_of

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 16, 8, 64, 16
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
NORM, ROTATION, GATING = Struct("5P5q2fi").pack, Struct("6P7q2i").pack, Struct("2P3q2i").pack


class Entry(ctypes.Structure):
    """`zif_cpu_entry` of the C ABI."""

    _fields_ = (("function", ctypes.c_void_p), ("call", ctypes.c_void_p))


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(library, calls):
    """Make calls, (name, struct), as one list."""
    structs = [ctypes.create_string_buffer(struct, len(struct)) for _, struct in calls]
    functions = [address_of(getattr(library.raw, f"zif_cpu_{name}")) for name, _ in calls]
    addresses = [ctypes.addressof(struct) for struct in structs]
    library.raw.zif_cpu_run((Entry * len(calls))(*zip(functions, addresses, strict=True)), len(calls))


def run_apart(library, calls):
    """Make the same calls, each alone."""
    for name, struct in calls:
        getattr(library.raw, f"zif_cpu_{name}")(struct)


def code_of(x):
    return DTYPE_CODES[str(x.dtype).removeprefix("torch.")]


def norm(x, weight, y, rows, heads=1, stride=None):
    channels = len(weight)
    sizes = stride or heads * channels, 0, rows, heads, channels
    return "rms_norm", NORM(x.data_ptr(), 0, weight.data_ptr(), 0, y.data_ptr(), *sizes, 1e-5, 0.0, code_of(x))


def add_norm(x, residual, weight, total, y):
    rows, channels = x.shape
    arrays = [array.data_ptr() for array in (x, residual, weight, total, y)]
    return "add_rms_norm", NORM(*arrays, channels, channels, rows, 1, channels, 1e-5, 1.0, code_of(x))


class Layer:
    """What lies between the projection of a layer and its attention. dtype: of activations; cache: of the cache."""

    def __init__(self, num_tokens, dtype, cache, interleaved):
        self.num_tokens, self.interleaved = num_tokens, interleaved
        self.qkv = random(num_tokens, QKV, dtype=dtype)
        self.weights = random(2, HEAD_DIM, seed=1, dtype=dtype)
        self.cos, self.sin = random(2, num_tokens, HEAD_DIM // 2, seed=2, dtype=torch.float32)
        # The normed and the rotated heads; the latter lie where a slab would put them: beside the former.
        self.normed, self.rotated = torch.zeros(2, num_tokens * (HEADS + KV_HEADS) * HEAD_DIM, dtype=dtype)
        row = HEAD_DIM + 4 if cache is torch.int8 else HEAD_DIM
        self.num_blocks = num_tokens + 1
        self.cache = torch.zeros(2, self.num_blocks, KV_HEADS, BLOCK_SIZE, row, dtype=cache)
        generator = torch.Generator().manual_seed(3)
        self.slots = torch.randperm(self.num_blocks * BLOCK_SIZE, generator=generator)[:num_tokens]
        self.slots[num_tokens // 2 :: 5] = -1

    def calls(self):
        tokens, key = self.num_tokens, HEADS * HEAD_DIM
        value = key + KV_HEADS * HEAD_DIM
        queries, keys, values = (self.qkv[:, begin:] for begin in (0, key, value))
        normed, rotated = ((x, x[tokens * key :]) for x in (self.normed, self.rotated))
        arrays = [array.data_ptr() for array in (*normed, self.cos, self.sin, *rotated)]
        sizes = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, tokens, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM // 2
        store = RowsCall(
            key=rotated[1].data_ptr(),
            value=values.data_ptr(),
            keys=self.cache[0].data_ptr(),
            values=self.cache[1].data_ptr(),
            slots=self.slots.data_ptr(),
            key_stride=KV_HEADS * HEAD_DIM,
            value_stride=QKV,
            block_stride=self.cache[0, 0].numel(),
            tokens=tokens,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            block_size=BLOCK_SIZE,
            dtype=code_of(self.qkv),
            cache=INT8_CODE if self.cache.dtype is torch.int8 else code_of(self.cache),
        )
        return [
            norm(queries, self.weights[0], normed[0], tokens, HEADS, QKV),
            norm(keys, self.weights[1], normed[1], tokens, KV_HEADS, QKV),
            ("rotate", ROTATION(*arrays, *sizes, self.interleaved, code_of(self.qkv))),
            ("store_kv", bytes(store)),
        ]

    def results(self):
        return self.normed, self.rotated, self.cache


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 32, 64])
@pytest.mark.parametrize(
    ("dtype", "cache", "interleaved"),
    [
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.int8, True),
        (torch.float32, torch.float32, True),
        (torch.float16, torch.float16, False),
    ],
    ids=str,
)
def test_a_list_gives_the_bits_of_calls_alone(library, dtype, cache, interleaved, num_tokens, num_threads):
    library.raw.zif_cpu_use_threads(num_threads)
    expected, layer = (Layer(num_tokens, dtype, cache, interleaved) for _ in range(2))
    run_apart(library, expected.calls())
    for _ in range(5):
        run(library, layer.calls())
        assert_equal(layer.results(), expected.results())
    assert layer.cache.view(torch.uint8).any() == bool((layer.slots >= 0).any())


def both_ways(library, make):
    """Return memory after the calls of make(memory) were made each alone, and as a list."""
    memories = []
    for way in (run_apart, run):
        memory = random(1 << 16, seed=4)
        way(library, make(memory))
        memories.append(memory)
    return [memory.view(torch.uint8) for memory in memories]


WEIGHT = random(64, seed=5)


@pytest.mark.parametrize(
    "make",
    [
        # The second call reads what the first one writes, as half as many rows.
        lambda x: [norm(x, WEIGHT, x[8192:], 64), norm(x[8192:], WEIGHT, x[16384:], 32, 2)],
        # As many rows: row i of the second one is row 2 * i of the first one.
        lambda x: [norm(x, WEIGHT, x[8192:], 32), norm(x[8192:], WEIGHT, x[16384:], 32, 1, 128)],
        # The second call writes where the rows of the first one lie that are still to be read.
        lambda x: [norm(x, WEIGHT, x[8192:], 32), norm(x[8192:], WEIGHT, x[64:], 32)],
        lambda x: [norm(x[1024:], WEIGHT, x[8192:], 32, 1, 32), norm(x[8192:], WEIGHT, x[1024:], 32)],
        # The third call does, the second one joins the first.
        lambda x: [
            norm(x, WEIGHT, x[8192:], 32),
            norm(x[8192:], WEIGHT, x[16384:], 32),
            norm(x[16384:], WEIGHT, x[64:], 32),
        ],
        # The first call writes the weight of the second one.
        lambda x: [norm(x, WEIGHT, x[8192:], 32), norm(x, x[10176:10240], x[16384:], 32)],
    ],
    ids=["fewer rows", "gaps", "shifted", "wider", "third", "weight"],
)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_calls_that_reach_into_other_rows_keep_their_order(library, make, num_threads):
    library.raw.zif_cpu_use_threads(num_threads)
    alone, listed = both_ways(library, make)
    assert torch.equal(alone, listed)


def test_other_calls_end_a_run_and_long_runs_are_cut(library):
    def make(memory):
        x, residual, total, y = memory[: 4 * 2048].view(4, 32, 64)
        gated = memory[8192 : 8192 + 1024]
        chain = [add_norm(x, residual, WEIGHT, residual, y), norm(y, WEIGHT, x, 32)] * 7
        gating = "gated_activation", GATING(y.data_ptr(), gated.data_ptr(), 64, 32, 32, 0, code_of(y))
        last = norm(gated, WEIGHT[:32], total, 32)
        return [*chain, gating, last, *chain]

    alone, listed = both_ways(library, make)
    assert torch.equal(alone, listed)


def test_an_empty_list_and_calls_of_no_rows(library):
    library.raw.zif_cpu_run(None, 0)
    memory = random(4096)
    before = memory.clone()
    run(library, [norm(memory, WEIGHT, memory[2048:], 0), norm(memory, WEIGHT, memory[2048:], 0)])
    assert torch.equal(memory, before)
