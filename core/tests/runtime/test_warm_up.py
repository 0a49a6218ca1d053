"""Warm-up: it leaves steps nothing to compile and changes no token; and what becomes of its failures."""

import logging
import random
from dataclasses import replace

import pytest
import torch

from support.checkpoints import build_checkpoint
from zif import LLM, SamplingParams
from zif.contract import (
    Device,
    EngineConfig,
    FullAttentionSpec,
    KVGroup,
    RecurrentStateSpec,
    SchedulerConstraints,
    SlidingWindowSpec,
    StateTensor,
    slab_arena,
)
from zif.engine import llm as llm_module
from zif.engine.planning import plan_model
from zif.errors import DeviceLostError, OutOfMemoryError
from zif.host.device import HostDevice
from zif.host.layout import kv_layout
from zif.kernels.attention import PagedAttention
from zif.kernels.launch import Recorder
from zif.kernels.ops import KernelOps
from zif.kernels.tuning import INTERPRETER_FOLDER, Tuning
from zif.runtime.runner import TorchRunner
from zif.runtime.warm_up import WarmUpSteps
from zif.settings import EngineSettings

SMALL = {"platform": "cpu", "max_num_seqs": 8, "max_model_len": 400, "max_num_batched_tokens": 256, "kv_bytes": 1 << 23}
TUNINGS = {"interpreter": (INTERPRETER_FOLDER,), "default": ()}
SAMPLINGS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_k": 20},
    {"top_p": 0.8},
    {"min_p": 0.1, "top_k": 3, "top_p": 0.5},
    {"logprobs": 2},
    {"repetition_penalty": 1.2},
]


class RecordingLauncher(Recorder):
    """Runs nothing, and keeps every kind of kernel that a compiler would have had to compile.

    Results are what memory holds: zeros here, which are tokens, logits and hidden states like any others.
    """

    def take(self):
        """Return what was recorded since the last call."""
        found, self.recorded = self.recorded, []
        return found


class RecordingPlatform:
    """Opens the host with a launcher, and is the platform that it was made of in all else."""

    def __init__(self, platform, launch):
        self._platform = platform
        self._launch = launch

    def __getattr__(self, name):
        return getattr(self._platform, name)

    def open(self, plan, rank):
        attention = PagedAttention(self._launch, "cpu")
        device = HostDevice(plan, rank, 1, attention=attention, ops=KernelOps(self._launch))
        device.compiles_on_first_use = True
        return device


def open_recording(monkeypatch, folder, launch, **settings):
    """Open a model whose device records what it would compile."""
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)

    def plan(resolved):
        planned = plan_model(resolved)
        groups = tuple(replace(group, layout=kv_layout(group.spec)) for group in planned.arena.groups)
        arena = slab_arena(planned.plan.memory.kv_bytes, groups)
        return replace(planned, platform=RecordingPlatform(planned.platform, launch), arena=arena)

    monkeypatch.setattr(llm_module, "plan_model", plan)
    return LLM(str(folder), **{**SMALL, **settings})


def mixed_traffic(llm, num_steps, seed=0):
    """Send prompts of 1 to 150 tokens at random moments, 1 to 8 at once, until the engine has made so many steps."""
    chance, engine = random.Random(seed), llm._engine
    vocabulary = llm.model.vocab_size
    for step in range(num_steps):
        wanted = 1 + (step // 40) % 8
        while len(engine._samples) < wanted and chance.random() < 0.6:
            options = chance.choice(SAMPLINGS)
            sampling = SamplingParams(**options, max_tokens=chance.randint(1, 40), ignore_eos=True, seed=step)
            tokens = [
                chance.randrange(vocabulary) for _ in range(chance.choice([1, 2, 5, 9, 30, chance.randint(1, 150)]))
            ]
            engine.submit(engine.check({"prompt_token_ids": tokens}, sampling), sampling)
        engine.step()


def compiled_late(llm, launch, traffic):
    """Return how kinds of kernels that a step has asked for differ from those of warm-up."""
    compiled = launch.take()
    assert len(compiled) > 10
    traffic(llm)
    return [nearest_difference(kind, compiled) for kind in launch.take() if kind not in compiled]


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("family", ["llama3", "gemma3", "mixtral", "gpt_oss"])
def test_no_step_compiles_what_warm_up_has_not(monkeypatch, tmp_path, family, tuning):
    launch = RecordingLauncher(Tuning.read(*TUNINGS[tuning]))
    llm = open_recording(monkeypatch, build_checkpoint(family, tmp_path), launch)
    missed = compiled_late(llm, launch, lambda llm: mixed_traffic(llm, 200))
    assert not missed, "\n".join(missed)
    llm.close()


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_no_context_is_too_long_for_warm_up(monkeypatch, tmp_path, family):
    """Keys are split in the more parts, the more there are and the fewer requests there are beside."""
    launch = RecordingLauncher(Tuning.read())
    folder = build_checkpoint(family, tmp_path, max_position_embeddings=4096)
    llm = open_recording(monkeypatch, folder, launch, max_model_len=4096, kv_bytes=1 << 25)

    def traffic(llm):
        for length, count in ((4000, 1), (2100, 1), (1100, 2), (600, 3), (1030, 1), (3000, 2), (520, 5)):
            prompts = [{"prompt_token_ids": [(i * place) % 90 for i in range(length)]} for place in range(1, count + 1)]
            llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)

    missed = compiled_late(llm, launch, traffic)
    assert not missed, "\n".join(missed)
    llm.close()


@pytest.mark.parametrize("family", ["llama3", "gemma3", "mixtral", "gpt_oss", "qwen3_next", "mamba2", "kimi_linear"])
def test_every_kind_of_layer_is_warmed_up_and_no_token_changes(monkeypatch, tmp_path, caplog, family):
    folder = build_checkpoint(family, tmp_path)
    prompts = [{"prompt_token_ids": [(7 * i) % 90 + 1 for i in range(length)]} for length in (3, 20, 41)]
    sampling = SamplingParams(max_tokens=12, seed=5, ignore_eos=True)
    answers = []
    for warms_up in (False, True):
        monkeypatch.setattr(Device, "compiles_on_first_use", warms_up)
        with caplog.at_level(logging.WARNING, "zif.runtime"), LLM(str(folder), **SMALL) as llm:
            answers.append([output.outputs[0].token_ids for output in llm.generate(prompts, sampling, use_tqdm=False)])
            llm._engine.check_integrity()
    assert answers[0] == answers[1]
    assert [record.message for record in caplog.records if "warming up" in record.message] == []


@pytest.mark.parametrize("family", ["llama3", "qwen3_next"])
def test_the_transformers_backend_is_warmed_up(monkeypatch, tmp_path, caplog, family):
    monkeypatch.setattr(Device, "compiles_on_first_use", True)
    folder = build_checkpoint(family, tmp_path)
    with caplog.at_level(logging.WARNING, "zif.runtime"), LLM(str(folder), model_impl="transformers", **SMALL):
        pass
    assert [record.message for record in caplog.records if "warming up" in record.message] == []


class TestFailures:
    @pytest.fixture
    def runner(self, monkeypatch, tmp_path):
        monkeypatch.setattr(Device, "compiles_on_first_use", True)
        planned = plan_model(EngineSettings.from_values({"model": str(build_checkpoint("llama3", tmp_path)), **SMALL}))
        device = planned.platform.open(planned.plan, rank=0)
        runner = TorchRunner(planned.config, device)
        runner.load(planned.model, lambda done, total: None)
        runner.start(planned.arena)
        yield runner
        runner.close()
        device.close()

    def test_a_step_that_fails_is_told_and_the_others_go_on(self, monkeypatch, runner, caplog):
        forward, calls, reports = TorchRunner._forward, [], []

        def failing(runner, batch):
            calls.append(len(batch.rows))
            if len(calls) == 3:
                raise OutOfMemoryError("no room for this step")
            return forward(runner, batch)

        monkeypatch.setattr(TorchRunner, "_forward", failing)
        with caplog.at_level(logging.WARNING, "zif.runtime"):
            runner.warm_up(lambda done, total: reports.append((done, total)))
        (record,) = caplog.records
        assert "no room for this step" in record.message
        assert reports == [(done, len(calls)) for done in range(len(calls) + 1)]
        assert not runner._book._state._row_of

    def test_a_lost_device_is_not_hidden(self, monkeypatch, runner):
        def lose(*_):
            raise DeviceLostError("gone")

        monkeypatch.setattr(TorchRunner, "_forward", lose)
        with pytest.raises(DeviceLostError, match="gone"):
            runner.warm_up(lambda done, total: None)


class TestPlans:
    def steps(self, specs, **changes):
        constraints = changes.pop("constraints", SchedulerConstraints())
        config = EngineConfig(**{"max_model_len": 300, "max_num_seqs": 12, "max_num_batched_tokens": 100, **changes})
        groups = tuple(KVGroup(spec, kv_layout(spec)) for spec in specs)
        return WarmUpSteps(config, constraints, slab_arena(1 << 20, groups), 50), groups

    def test_they_keep_to_the_limits(self):
        constraints = SchedulerConstraints(token_buckets=(16, 64), batch_buckets=(1, 5), separate_prefill=True)
        spec = FullAttentionSpec(layers=(0,), block_size=16, dtype="float32", num_kv_heads=1, head_dim=8)
        steps, _ = self.steps([spec], constraints=constraints)
        kinds = steps.kinds()
        assert len(kinds) == len(set(kinds)) > 20
        for rows in kinds:
            plan = steps.plan(rows)
            assert len(plan.request_ids) <= 5
            assert plan.total_tokens == sum(plan.num_tokens) <= 64
            assert all(c + n <= 300 for c, n in zip(plan.num_computed, plan.num_tokens, strict=True))
            assert max(max(start.token_ids) for start in plan.started) < 50
            assert len({row.num_computed > 0 for row in rows}) == 1, "prompts and single tokens are kept apart"

    def test_no_two_groups_share_bytes_and_nobody_takes_the_null_block(self):
        wide = FullAttentionSpec(layers=(0, 1), block_size=16, dtype="float32", num_kv_heads=2, head_dim=8)
        narrow = SlidingWindowSpec(layers=(2,), block_size=16, dtype="float32", num_kv_heads=1, head_dim=12, window=20)
        steps, groups = self.steps([wide, narrow])
        taken = []
        for index, group in enumerate(groups):
            plans = [steps.plan(rows) for rows in steps.kinds()]
            ids = {block for plan in plans for start in plan.started for block in start.block_ids[index]}
            assert 0 not in ids
            size = group.layout.block_bytes
            taken.append({byte for block in ids for byte in range(block * size, (block + 1) * size)})
        assert not taken[0] & taken[1]

    def test_a_state_after_a_draft_has_a_block_of_its_own(self):
        spec = RecurrentStateSpec(
            layers=(0,), block_size=16, dtype="float32", tensors=(StateTensor("s", (4,), "float32"),)
        )
        steps, _ = self.steps([spec])
        drafted = [plan for plan in map(steps.plan, steps.kinds()) if plan.drafts]
        assert drafted
        for plan in drafted:
            (draft,) = plan.drafts.values()
            assert draft.state_blocks[0] not in (0, plan.started[0].block_ids[0][0])


def traits(kind):
    """Return what a compiler tells kinds of one kernel apart by."""
    passed = {(name, f"{value!r}") for name, value in (*kind.signature, *kind.constants, *kind.config.tiles)}
    return passed | {(name, "aligned") for name in kind.aligned}


def nearest_difference(missed, compiled):
    """Say how a kind differs from the one of the same kernel that is most like it."""
    same = [traits(kind) for kind in compiled if kind.kernel is missed.kernel]
    differences = sorted((traits(missed) ^ other for other in same), key=len) or ["another kernel"]
    return f"{missed.name}: {sorted(differences[0])}"
