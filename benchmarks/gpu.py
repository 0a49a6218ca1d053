"""A GPU against its own ceilings and against peers: one table of floor, ours, peer and ratio, and the same as JSON.

    python benchmarks/gpu.py --platform nvidia                  on a GPU
    TRITON_INTERPRET=1 python benchmarks/gpu.py --smoke         the same program on small inputs, without a GPU

Ceilings are measured in the same run: bytes per second of a large copy, operations per second of a large product.
Kernels are timed with the device's events over two sets of inputs that take turns, each larger than its caches; the
median of rounds counts. The physics: decoding, norms, rotations and sampling move bytes, so their floor is bytes over
bandwidth; prompts multiply, so theirs is operations over the rate of products. A step of a model moves all weights
once, and the keys and values of its requests.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from zif import LLM, SamplingParams
from zif.contract import AttentionBatch, AttentionParams, Device, FullAttentionSpec, KVArena, KVGroup, Workload
from zif.kernels.greedy import greedy
from zif.kernels.launch import Launcher
from zif.kernels.norms import add_rms_norm
from zif.kernels.rotary import Angles, KVTarget, ProjectedHeads, rotate_and_write
from zif.plugins import PlatformRegistry

HEADS, KV_HEADS, HEAD_DIM, BLOCK, HIDDEN, INNER = 32, 8, 128, 16, 4096, 14336
Work = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """What to measure. `prompts` x `prompt_len` is the prefill, `requests` x `context` the decoding."""

    requests: int = 64
    context: int = 8192
    prompts: int = 16
    prompt_len: int = 4096
    rows: int = 16384
    vocab: int = 128256
    copy_bytes: int = 4 << 30
    product: int = 8192
    layers: int = 4
    hidden: int = HIDDEN
    inner: int = INNER
    batches: tuple[int, ...] = (1, 32, 256)
    new_tokens: int = 64
    rounds: int = 15


SMOKE = Sizes(2, 64, 1, 32, 8, 512, 1 << 20, 64, 1, 256, 512, (1, 2), 2, 2)


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds. `goal` is the least share of the floor, or of the peer's speed, to reach."""

    name: str
    floor_s: float
    ours_s: float
    peer: str = ""
    peer_s: float = 0.0
    goal: float = 0.0

    def line(self) -> str:
        """Print the row."""
        peer = f"{self.peer} {self.peer_s * 1e6:.1f} us, {self.peer_s / self.ours_s:.2f} x" if self.peer else ""
        share = f"{self.floor_s / self.ours_s:7.1%}" if self.floor_s else "      -"
        return f"{self.name:34} {self.floor_s * 1e6:12.1f} {self.ours_s * 1e6:12.1f} {share}  {peer}"


class Clock:
    """Times work on the device: with its events where it has them."""

    def __init__(self, device: Device, rounds: int) -> None:
        self._device, self._rounds = device, rounds
        self._module = None if device.array_device == "cpu" else torch.get_device_module(device.array_device)

    def seconds(self, works: Sequence[Work]) -> float:
        """Return the median time of works that take turns, after one round to warm up."""
        for work in works:
            work()
        return statistics.median(self._once(work) for _ in range(self._rounds) for work in works)

    def _once(self, work: Work) -> float:
        self._device.synchronize()
        if self._module is None:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        begin, end = (self._module.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


class Kernels:
    """The kernels' part of the table."""

    def __init__(self, device: Device, sizes: Sizes) -> None:
        self.device, self.sizes, self.place = device, sizes, device.array_device
        self.launch: Launcher = device.attention._launch  # type: ignore[attr-defined]
        self.clock = Clock(device, sizes.rounds)
        source = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=self.place)
        target = torch.empty_like(source)
        self.byte_s = self.clock.seconds([lambda: target.copy_(source)]) / (2 * sizes.copy_bytes)
        square = [self.normal(sizes.product, sizes.product) for _ in range(2)]
        self.operation_s = self.clock.seconds([lambda: square[0] @ square[1]]) / (2 * sizes.product**3)

    def normal(self, *shape: int) -> torch.Tensor:
        """Return random numbers in bfloat16."""
        return torch.randn(shape, dtype=torch.bfloat16, device=self.place)

    def rows(self) -> Iterator[Row]:
        """Measure one kernel after the other."""
        yield self.decoding()
        yield self.prompts()
        yield self.norm()
        yield self.rotation()
        yield self.sampling()

    def decoding(self) -> Row:
        """One new token each of many requests: all keys and values are read once."""
        sizes = self.sizes
        lengths = [(1, sizes.context)] * sizes.requests
        moved = sizes.requests * sizes.context * KV_HEADS * HEAD_DIM * 2 * 2
        ours = self.clock.seconds([self.attention(lengths) for _ in range(2)])
        return Row(f"decode {sizes.requests} x {sizes.context}", moved * self.byte_s, ours, goal=0.85)

    def prompts(self) -> Row:
        """Whole prompts, causal; the peer is the library's fused attention on dense arrays."""
        sizes = self.sizes
        lengths = [(sizes.prompt_len, sizes.prompt_len)] * sizes.prompts
        operations = 4 * sizes.prompts * HEADS * HEAD_DIM * sizes.prompt_len**2 / 2
        ours = self.clock.seconds([self.attention(lengths) for _ in range(2)])
        shape = sizes.prompts, HEADS, sizes.prompt_len, HEAD_DIM
        sets = [[self.normal(*shape) for _ in range(3)] for _ in range(2)]
        peer = self.clock.seconds([lambda s=s: F.scaled_dot_product_attention(*s, is_causal=True) for s in sets])
        name = f"prefill {sizes.prompts} x {sizes.prompt_len}"
        return Row(name, operations * self.operation_s, ours, "torch SDPA", peer, goal=0.7)

    def norm(self) -> Row:
        """Addition and norm: two rows read, two written."""
        sets = [[self.normal(self.sizes.rows, HIDDEN) for _ in range(2)] for _ in range(2)]
        weight = self.normal(HIDDEN)
        ours = self.clock.seconds([lambda s=s: add_rms_norm(self.launch, *s, weight, 1e-5, 0.0) for s in sets])
        return Row("add + norm", 4 * self.sizes.rows * HIDDEN * 2 * self.byte_s, ours, goal=0.8)

    def rotation(self) -> Row:
        """Rotation and the write of keys and values: everything read once and written once."""
        tokens = self.sizes.rows
        heads = HEADS + 2 * KV_HEADS
        angles = Angles(*(torch.rand(tokens, HEAD_DIM // 2, device=self.place) for _ in range(2)))
        slots = torch.arange(tokens, device=self.place)
        works: list[Work] = []
        for _ in range(2):
            parts = self.normal(tokens, heads, HEAD_DIM).split((HEADS, KV_HEADS, KV_HEADS), 1)
            pages = self.normal(2 * -(-tokens // BLOCK), KV_HEADS, BLOCK, HEAD_DIM)
            target = KVTarget(pages, slots, 0, 1)
            works.append(lambda p=parts, t=target: rotate_and_write(self.launch, ProjectedHeads(*p), angles, t))
        moved = tokens * (2 * heads * HEAD_DIM * 2 + HEAD_DIM * 4)
        return Row("rotary + KV write", moved * self.byte_s, self.clock.seconds(works), goal=0.8)

    def sampling(self) -> Row:
        """The most likely token of each row: the logits read once. The peer is the library's argmax."""
        logits = [torch.randn(256, self.sizes.vocab, device=self.place) for _ in range(2)]
        ours = self.clock.seconds([lambda x=x: greedy(self.launch, x) for x in logits])
        peer = self.clock.seconds([lambda x=x: x.argmax(-1) for x in logits])
        return Row("greedy 256 rows", logits[0].nbytes * self.byte_s, ours, "torch argmax", peer, goal=0.8)

    def attention(self, lengths: Sequence[tuple[int, int]]) -> Work:
        """Return one layer's attention over a cache of its own. lengths: new and known tokens of each request."""
        spec = FullAttentionSpec((0,), KV_HEADS, HEAD_DIM, BLOCK, "bfloat16")
        group = KVGroup(spec, self.device.attention.kv_layout(spec))
        blocks = [-(-known // BLOCK) for _, known in lengths]
        arena = KVArena(group.layout.block_bytes, 1 + sum(blocks), (group,))
        memory = self.normal(arena.num_bytes // 2).view(torch.uint8)
        cache = self.device.attention.bind(arena, 0, memory)[0]
        ids = np.random.default_rng(0).permutation(sum(blocks)) + 1
        table = np.zeros((len(lengths), max(blocks)), np.int32)
        for row, count in enumerate(blocks):
            table[row, :count], ids = ids[:count], ids[count:]
        starts = np.concatenate(([0], np.cumsum([new for new, _ in lengths]))).astype(np.int32)
        known = np.array([length for _, length in lengths], np.int32)
        batch = AttentionBatch(starts, known, table, np.full(int(starts[-1]), -1, np.int64), BLOCK, None)
        prepared = self.device.attention.prepare(batch)
        query, params = self.normal(int(starts[-1]), HEADS, HEAD_DIM), AttentionParams(HEAD_DIM**-0.5)
        return lambda: self.device.attention.attend(query, cache, prepared, params)


def checkpoint(folder: Path, sizes: Sizes) -> Path:
    """Write a Llama of random weights, with few layers: the layers of a model are alike."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=sizes.hidden, intermediate_size=sizes.inner, num_hidden_layers=sizes.layers,
        num_attention_heads=max(2, sizes.hidden // HEAD_DIM), num_key_value_heads=max(1, sizes.hidden // HEAD_DIM // 4),
        head_dim=HEAD_DIM, vocab_size=sizes.vocab, max_position_embeddings=8192, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def generation(platform: str, sizes: Sizes, byte_s: float) -> Iterator[Row]:
    """Decode with the engine, a Llama-3-8B's layers: the step's time is the difference of two lengths."""
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint(Path(folder), sizes)
        weight_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        # Every token reads the weights but the input's embeddings.
        weight_bytes -= sizes.vocab * sizes.hidden * 2
        for batch in sizes.batches:
            with LLM(str(model), platform=platform, dtype="bfloat16", max_num_seqs=batch, max_model_len=1024) as llm:
                step = _step_seconds(llm, batch, sizes)
            context = 64 + sizes.new_tokens
            moved = weight_bytes + batch * context * sizes.layers * max(1, sizes.hidden // HEAD_DIM // 4) * HEAD_DIM * 4
            yield Row(f"Llama step, {sizes.layers} layers, batch {batch}", moved * byte_s, step, goal=0.8)
        yield from _peers(model, platform, sizes)


def _step_seconds(llm: LLM, batch: int, sizes: Sizes) -> float:
    prompts = [{"prompt_token_ids": [(7 * i + j) % sizes.vocab for j in range(64)]} for i in range(batch)]

    def run(tokens: int) -> float:
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - started

    run(sizes.new_tokens)
    few = statistics.median(run(1) for _ in range(3))
    many = statistics.median(run(1 + sizes.new_tokens) for _ in range(3))
    return max(many - few, 1e-9) / sizes.new_tokens


def _peers(model: Path, platform: str, sizes: Sizes) -> Iterator[Row]:
    """Serve prompts of mixed lengths: the engine, transformers' continuous batching, and its padded generation."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    rng = np.random.default_rng(0)
    count = 4 * max(sizes.batches)
    prompts = [rng.integers(3, sizes.vocab, rng.integers(8, 512 if count > 8 else 16)).tolist() for _ in range(count)]
    limits = rng.integers(1, 4 * sizes.new_tokens, count).tolist()
    with LLM(str(model), platform=platform, dtype="bfloat16", max_num_seqs=max(sizes.batches)) as llm:
        params = [
            SamplingParams(max_tokens=limit, temperature=0.0, ignore_eos=True, detokenize=False) for limit in limits
        ]
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        llm.generate(given[:2], params[:2], use_tqdm=False)
        started = time.perf_counter()
        llm.generate(given, params, use_tqdm=False)
        ours = time.perf_counter() - started
        place = "cpu" if llm.plan.device_id == "interpreter" else llm.plan.device_id
    peer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(place)
    config = GenerationConfig(max_new_tokens=max(limits), do_sample=False, eos_token_id=-1, pad_token_id=0)
    if place != "cpu":
        started = time.perf_counter()
        peer.generate_batch(inputs=prompts, generation_config=config)
        yield Row("mixed lengths", 0.0, ours, "generate_batch", time.perf_counter() - started, goal=3.0)
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=place)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=place)
    started = time.perf_counter()
    peer.generate(padded, attention_mask=mask, generation_config=config)
    yield Row("mixed lengths", 0.0, ours, "padded generate", time.perf_counter() - started, goal=20.0)


def open_device(platform: str) -> Device:
    """Open the platform's first device for a small workload."""
    spec = FullAttentionSpec((0,), KV_HEADS, HEAD_DIM, BLOCK, "bfloat16")
    sizes = {"weight_bytes": 1 << 20, "activation_bytes": 1 << 20, "max_model_len": 256, "max_num_seqs": 4}
    workload = Workload("bfloat16", (spec,), (HEAD_DIM,), frozenset(), max_num_batched_tokens=256, **sizes)
    chosen = PlatformRegistry.discover().select(platform)
    return chosen.open(chosen.plan(workload), 0)


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", default="nvidia")
    parser.add_argument(
        "--smoke", action="store_true", help="small inputs: shows that the program runs, measures nothing"
    )
    parser.add_argument("--json", type=Path, help="write the table here, for example under benchmarks/results")
    arguments = parser.parse_args()
    sizes = SMOKE if arguments.smoke else Sizes()
    device = open_device(arguments.platform)
    kernels = Kernels(device, sizes)
    info = PlatformRegistry.discover().select(arguments.platform).probe().devices[0]
    ceilings = f"{1e-9 / kernels.byte_s:.0f} GB/s copied, {1e-12 / kernels.operation_s:.1f} TFLOP/s multiplied"
    print(f"{info.name} ({info.device_id}), torch {torch.__version__}: {ceilings}")
    print(f"{'':34} {'floor us':>12} {'ours us':>12} {'share':>7}  peer")
    rows = []
    try:
        for row in kernels.rows():
            rows.append(row)
            print(row.line(), flush=True)
    finally:
        device.close()
    for row in generation(arguments.platform, sizes, kernels.byte_s):
        rows.append(row)
        print(row.line(), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"device": info.name, "architecture": info.architecture, "ceilings": ceilings, "smoke": arguments.smoke}
        arguments.json.write_text(json.dumps({**found, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
