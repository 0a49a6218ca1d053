"""Pooled prompts through scheduler, blocks and engine, on the platform whose hidden states are known in advance."""

import json
from pathlib import Path

import numpy as np
import pytest

from support.embedded_model import MODEL
from zif import LLM, SamplingParams
from zif.contract import BlockManager, Request, RequestStatus, StepFuture, StepPlan
from zif.engine.pooling import PoolingParams
from zif.errors import EngineError, ModelError, RequestError
from zif.kv import PagedBlockManager
from zif.null.runner import NullRunner, expected_visible, hidden_state
from zif.scheduling import TokenBudgetScheduler

LENGTHS = (1, 15, 16, 17, 64, 90, 90)
OPTIONS = {"platform": "null", "max_model_len": 96, "max_num_seqs": 4}


def prompts() -> list[list[int]]:
    draws = [np.random.default_rng(length).integers(5, 3000, length).tolist() for length in LENGTHS]
    draws[-1] = draws[-2][:80] + draws[-1][:10]
    return draws


def hidden_states(llm: LLM, token_ids: list[int]) -> np.ndarray:
    """Return what the platform must report, [T, C]."""
    specs = tuple(group.spec for group in llm.arena.groups)
    channels = llm.model.config["hidden_size"]
    ends = range(1, len(token_ids) + 1)
    return np.stack([hidden_state(expected_visible(token_ids[:end], specs), channels) for end in ends])


def embeddings(llm: LLM, given: list[list[int]]) -> np.ndarray:
    outputs = llm.embed([{"prompt_token_ids": ids} for ids in given], use_tqdm=False)
    llm.engine.check_integrity()
    assert [output.error for output in outputs] == [None] * len(given)
    return np.array([output.outputs.embedding for output in outputs if output.outputs])


def normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def mean_model(tmp_path: Path) -> Path:
    """The embedded model, whose files ask for the mean."""
    for path in MODEL.iterdir():
        (tmp_path / path.name).symlink_to(path)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return tmp_path


class RefusingReserve:
    """Refuse blocks now and then to requests in the middle of their prompts."""

    def __init__(self) -> None:
        self._reserve = PagedBlockManager.reserve
        self.num_refused = 0
        self._calls = 0

    def __call__(self, manager: PagedBlockManager, request: Request, num_tokens: int) -> bool:
        if request.status is RequestStatus.RUNNING and request.num_computed_tokens:
            self._calls += 1
            if self._calls % 3 == 1 and self.num_refused < 5:
                self.num_refused += 1
                return False
        return self._reserve(manager, request, num_tokens)


@pytest.mark.parametrize("preempting", [False, True])
@pytest.mark.parametrize("budget", [1, 13, 512])
@pytest.mark.parametrize("mode", ["last", "mean"])
def test_vectors_are_right_however_prompts_are_cut(
    mode: str, budget: int, preempting: bool, mean_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODEL if mode == "last" else mean_model
    with LLM(model, max_num_batched_tokens=budget, **OPTIONS) as llm:
        states = [hidden_states(llm, ids) for ids in prompts()]
        pooled = [rows[-1] if mode == "last" else rows.astype(np.float64).mean(axis=0) for rows in states]
        refusing = RefusingReserve()
        if preempting:
            monkeypatch.setattr(PagedBlockManager, "reserve", lambda *args: refusing(*args))
        for _ in range(2):
            assert np.abs(embeddings(llm, prompts()) - normalized(np.array(pooled))).max() < 1e-6
        again = llm.embed({"prompt_token_ids": prompts()[-1]}, use_tqdm=False)[0]
        assert llm.engine.counts.num_generated_tokens == 0
        assert llm.engine.counts.num_prompt_tokens == 2 * sum(LENGTHS[:-1]) + 3 * LENGTHS[-1]
    assert bool(again.num_cached_tokens) == (mode == "last")
    assert bool(refusing.num_refused) == (preempting and budget < 512)


def test_pooled_and_generated_prompts_share_steps_and_prefixes() -> None:
    with LLM(MODEL, **OPTIONS) as llm:
        params, sampling = PoolingParams(), SamplingParams(max_tokens=5, ignore_eos=True, detokenize=False)
        alone = [llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)[0] for ids in prompts()]
        llm.reset_prefix_cache()
        engine = llm.engine
        checked = [engine.check_pooled({"prompt_token_ids": ids}, params) for ids in prompts()]
        pairs = [(engine.submit_pooled(p, params), engine.submit(p, sampling)) for p in checked]
        while engine.has_work():
            engine.step()
        for (pooled, generated), prompt, expected in zip(pairs, prompts(), alone, strict=True):
            assert engine.output(generated).outputs[0].token_ids == expected.outputs[0].token_ids
            assert pooled.pooled is not None
            found = pooled.pooled.vector()
            assert np.abs(found - normalized(hidden_states(llm, prompt)[-1:])[0]).max() < 1e-6
        assert any(pooled.num_cached_tokens for pooled, _ in pairs)
        engine.check_integrity()


def test_a_prompt_may_fill_the_context_and_no_more() -> None:
    with LLM(MODEL, **OPTIONS) as llm:
        full = [7] * OPTIONS["max_model_len"]
        assert len(embeddings(llm, [full])) == 1
        with pytest.raises(RequestError, match="prompt 1: the prompt has 97 tokens and the context is 96"):
            embeddings(llm, [[5], [*full, 7]])
        with pytest.raises(RequestError, match="no score head"):
            llm.classify({"prompt_token_ids": [5]}, use_tqdm=False)


def test_an_aborted_prompt_has_no_vector_and_holds_nothing() -> None:
    with LLM(MODEL, max_num_batched_tokens=8, **OPTIONS) as llm:
        engine, params = llm.engine, PoolingParams()
        generation = engine.submit_pooled(engine.check_pooled({"prompt_token_ids": [5] * 40}, params), params)
        engine.step()
        engine.abort(generation)
        while engine.has_work():
            engine.step()
        engine.check_integrity()
        assert generation.pooling_error == "it was aborted before its end"


@pytest.mark.parametrize("part", [NullRunner, TokenBudgetScheduler])
def test_parts_that_serve_no_hidden_states_are_named(part: type, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "reports_hidden" if part is NullRunner else "serves_hidden"
    monkeypatch.setattr(part, name, property(lambda self: False))
    with LLM(MODEL, **OPTIONS) as llm:
        with pytest.raises(RequestError, match=part.__name__):
            llm.embed({"prompt_token_ids": [5]}, use_tqdm=False)
        assert llm.generate({"prompt_token_ids": [5]}, use_tqdm=False)[0].finished


def test_a_block_manager_that_may_share_every_prefix_serves_the_last_hidden_state_only(
    mean_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PagedBlockManager, "serves_hidden", BlockManager.serves_hidden)
    with LLM(MODEL, **OPTIONS) as llm:
        assert len(embeddings(llm, [[5, 6]])) == 1
    with LLM(mean_model, **OPTIONS) as llm, pytest.raises(RequestError, match="PagedBlockManager does not"):
        embeddings(llm, [[5, 6]])


def test_what_was_computed_before_the_engine_failed_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(MODEL, max_num_batched_tokens=8, **OPTIONS) as llm:
        submit = NullRunner.submit

        def failing(self: NullRunner, step: StepPlan) -> StepFuture:
            if any(step.num_computed):
                raise ValueError("a bit fell over")
            return submit(self, step)

        monkeypatch.setattr(NullRunner, "submit", failing)
        with pytest.raises(EngineError, match=r"a bit fell over.*in \.outputs") as caught:
            llm.score("a", ["b", "c" * 40], use_tqdm=False)
        assert [output.error is None for output in caught.value.outputs] == [True, False]
        assert caught.value.outputs[1].outputs is None


def test_a_model_that_only_pools_is_refused_where_nothing_can_be_pooled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    config = json.loads((MODEL / "config.json").read_text())
    family = config["architectures"][0].removesuffix("ForCausalLM")
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [f"{family}Model"]}))
    tensors = load_file(MODEL / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if not name.startswith("lm_head")}
    save_file(bare, tmp_path / "model.safetensors")
    with LLM(tmp_path, **OPTIONS) as llm:
        assert len(embeddings(llm, [[5, 6]])) == 1
    monkeypatch.setattr(NullRunner, "reports_hidden", property(lambda self: False))
    with pytest.raises(ModelError, match="generates no text, and cannot be pooled: NullRunner"):
        LLM(tmp_path, **OPTIONS)


def test_layers_that_do_not_fit_the_hidden_states_refuse_what_needs_them(mean_model: Path) -> None:
    from safetensors.numpy import save_file

    num_channels = json.loads((MODEL / "config.json").read_text())["hidden_size"]
    modules = json.loads((mean_model / "modules.json").read_text())
    modules[2] = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (mean_model / "modules.json").write_text(json.dumps(modules))
    (mean_model / "2_Dense").mkdir()
    for num_inputs, fits in ((num_channels, True), (num_channels + 1, False)):
        config = {"in_features": num_inputs, "out_features": 2, "bias": False}
        (mean_model / "2_Dense" / "config.json").write_text(json.dumps(config))
        weight = np.ones((2, num_inputs), dtype=np.float32)
        save_file({"linear.weight": weight}, mean_model / "2_Dense" / "model.safetensors")
        with LLM(mean_model, **OPTIONS) as llm:
            assert llm.generate({"prompt_token_ids": [5]}, use_tqdm=False)[0].finished
            if fits:
                assert embeddings(llm, [[5, 6]]).shape == (1, 2)
                continue
            with pytest.raises(RequestError, match="the log has the reason"):
                llm.embed({"prompt_token_ids": [5]}, use_tqdm=False)


def test_rows_that_never_came_are_a_fault_of_the_request_only(
    monkeypatch: pytest.MonkeyPatch, mean_model: Path
) -> None:
    complete = NullRunner.submit

    def forgetful(self: NullRunner, step):
        future = complete(self, step)
        if step.step == 0:
            future.result().hidden.clear()
        return future

    monkeypatch.setattr(NullRunner, "submit", forgetful)
    with LLM(mean_model, max_num_batched_tokens=32, **OPTIONS) as llm:
        first, second = llm.embed([{"prompt_token_ids": [5] * 40}, {"prompt_token_ids": [6] * 40}], use_tqdm=False)
    assert first.outputs is None
    assert "hidden states of" in str(first.error)
    assert second.error is None or second.outputs is None
