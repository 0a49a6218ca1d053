"""Embeddings and scores of real models on this platform, against what transformers makes of the same checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from support.checkpoints import build_checkpoint, edit_config
from support.tiny_tokenizer import PAD_ID
from zif import LLM
from zif.errors import ModelError, RequestError

LENGTHS = (1, 2, 15, 16, 17, 33, 48, 48)
TOLERANCE = 2e-5
"""Of vectors of length 1 and of logits about as large."""


def prompts() -> list[list[int]]:
    """Mixed lengths around block borders; the last two begin alike."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(5, 120, (n,), generator=generator).tolist() for n in LENGTHS]
    drawn[-1] = drawn[-2][:40] + drawn[-1][40:]
    return drawn


def opened(folder: Path, **changes: object) -> LLM:
    values: dict[str, Any] = {"platform": "cpu", "max_model_len": 48, "max_num_seqs": 4, "dtype": "float32"}
    return LLM(folder, **(values | changes))


def embedded(llm: LLM, given: list[list[int]], **options: Any) -> torch.Tensor:
    """Return the vectors, [N, C]."""
    outputs = llm.embed([{"prompt_token_ids": ids} for ids in given], use_tqdm=False, **options)
    llm.engine.check_integrity()
    assert [output.error for output in outputs] == [None] * len(given)
    return torch.tensor([output.outputs.embedding for output in outputs if output.outputs])


def hidden_states(folder: Path, given: list[list[int]]) -> list[torch.Tensor]:
    """Return what transformers' bare model gives for each prompt alone, [T, C] each."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids])).last_hidden_state[0] for ids in given]


def write_modules(folder: Path, pooling: dict[str, Any], *later: str) -> None:
    """Make a checkpoint one of sentence-transformers."""
    kinds = ["Transformer", "Pooling", *later]
    paths = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds[1:], start=1))]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48} | pooling))


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma2", "olmo2"])
@pytest.mark.parametrize("caching", [True, False])
def test_embeddings_are_the_last_hidden_states_of_transformers(family: str, caching: bool, tmp_path: Path) -> None:
    folder = build_checkpoint(family, tmp_path / family)
    expected = torch.stack([states[-1] for states in hidden_states(folder, prompts())])
    expected = torch.nn.functional.normalize(expected, dim=-1)
    for budget in (7, 64):
        with opened(folder, enable_prefix_caching=caching, max_num_batched_tokens=budget) as llm:
            first, second = embedded(llm, prompts()), embedded(llm, prompts())
            cached = llm.embed({"prompt_token_ids": prompts()[-1]}, use_tqdm=False)[0].num_cached_tokens
        assert (first - expected).abs().max() < TOLERANCE
        assert (second - expected).abs().max() < TOLERANCE
        assert bool(cached) == caching


@pytest.mark.parametrize("implementation", ["native", "transformers"])
@pytest.mark.parametrize("mode", ["mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean"])
def test_pooling_over_all_tokens_reuses_no_prefix(mode: str, implementation: str, tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    write_modules(folder, {"pooling_mode": mode})
    states = hidden_states(folder, prompts())
    weights = [torch.arange(1, len(s) + 1)[:, None] for s in states]
    pool = {
        "mean": lambda s, w: s.mean(0),
        "cls": lambda s, w: s[0],
        "max": lambda s, w: s.max(0).values,
        "mean_sqrt_len_tokens": lambda s, w: s.sum(0) / len(s) ** 0.5,
        "weightedmean": lambda s, w: (s * w).sum(0) / w.sum(),
    }[mode]
    expected = torch.stack([pool(s, w) for s, w in zip(states, weights, strict=True)])
    with opened(folder, max_num_batched_tokens=13, model_impl=implementation) as llm:
        for _ in range(2):
            difference = (embedded(llm, prompts()) - expected).abs().max() / expected.abs().max()
            assert difference < TOLERANCE
        output = llm.embed({"prompt_token_ids": prompts()[-1]}, use_tqdm=False)[0]
    assert output.num_cached_tokens == 0


def test_dense_layers_shortening_and_normalization_follow(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = build_checkpoint("qwen3", tmp_path)
    write_modules(folder, {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "Dense", "Normalize")
    weight, bias = torch.randn(20, 48, generator=torch.Generator().manual_seed(1)) / 7, torch.linspace(-1, 1, 20)
    (folder / "2_Dense").mkdir()
    config = {"in_features": 48, "out_features": 20, "bias": True}
    config["activation_function"] = "torch.nn.modules.activation.Tanh"
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense" / "model.safetensors")
    last = torch.stack([states[-1] for states in hidden_states(folder, prompts())])
    expected = torch.tanh(torch.nn.functional.linear(last, weight, bias))
    with opened(folder) as llm:
        whole, cut = embedded(llm, prompts()), embedded(llm, prompts(), dimensions=8)
        with pytest.raises(RequestError, match="dimensions=21 must be an integer from 1 to 20"):
            embedded(llm, prompts(), dimensions=21)
    assert (whole - torch.nn.functional.normalize(expected, dim=-1)).abs().max() < TOLERANCE
    assert (cut - torch.nn.functional.normalize(expected[:, :8], dim=-1)).abs().max() < TOLERANCE


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("family", ["qwen2", "llama3"])
def test_logits_of_score_heads_are_those_of_transformers(family: str, num_labels: int, tmp_path: Path) -> None:
    build_checkpoint(family, tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_pretrained(
            tmp_path, num_labels=num_labels, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    model.save_pretrained(tmp_path)
    # Padding behind a text is not looked at; nor is anything else where there is nothing but padding.
    given = [*prompts(), [*prompts()[3][:5], PAD_ID, 9, PAD_ID, PAD_ID], [PAD_ID] * 4]
    with torch.inference_mode():
        expected = torch.stack([model(torch.tensor([ids])).logits[0] for ids in given])
    with opened(tmp_path, max_num_batched_tokens=9) as llm:
        outputs = llm.classify([{"prompt_token_ids": ids} for ids in given], use_tqdm=False)
        with pytest.raises(RequestError, match="no output matrix"):
            llm.generate({"prompt_token_ids": [5]}, use_tqdm=False)
        with pytest.raises(RequestError, match="gives no embeddings"):
            embedded(llm, given)
    logits = torch.tensor([output.outputs.logits for output in outputs if output.outputs])
    probs = torch.tensor([output.outputs.probs for output in outputs if output.outputs])
    assert (logits - expected).abs().max() < TOLERANCE * 10
    assert torch.allclose(probs, expected.sigmoid() if num_labels == 1 else expected.softmax(-1), atol=1e-5)


@pytest.mark.parametrize("architecture", ["MistralModel", "MistralForCausalLM"])
def test_a_decoder_saved_without_a_head_gives_embeddings_and_no_text(architecture: str, tmp_path: Path) -> None:
    whole = build_checkpoint("mistral", tmp_path / "whole")
    bare = build_checkpoint("mistral", tmp_path / "bare")
    AutoModel.from_pretrained(whole, dtype=torch.float32).save_pretrained(bare)
    edit_config(bare, architectures=[architecture])
    with opened(whole) as llm:
        expected = embedded(llm, prompts())
    with opened(bare) as llm:
        assert torch.equal(embedded(llm, prompts()), expected)
        with pytest.raises(RequestError, match="ask it for embeddings"):
            llm.generate({"prompt_token_ids": [5]}, use_tqdm=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("qwen3", tmp_path_factory.mktemp("model"))


def test_scores_are_cosines_or_what_the_head_says_of_the_pair(model: Path, tmp_path: Path) -> None:
    query, documents = "one two", ["one two", "three four five", "six"]
    with opened(model) as llm:
        vectors = {
            text: torch.tensor(output.outputs.embedding)
            for text, output in zip(documents, llm.embed(documents, use_tqdm=False), strict=True)
            if output.outputs
        }
        scores = [output.outputs.score for output in llm.score(query, documents, use_tqdm=False) if output.outputs]
    assert scores == pytest.approx([float(vectors[query] @ vectors[d]) for d in documents], abs=1e-6)
    assert scores[0] == pytest.approx(1.0)
    build_checkpoint("qwen3", tmp_path)
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, dtype=torch.float32)
    head.save_pretrained(tmp_path)
    with opened(tmp_path) as llm:
        scored = [output.outputs.score for output in llm.score(query, documents, use_tqdm=False) if output.outputs]
        pair = llm.engine.vocabulary.encode_pair(query, documents[1])
    with torch.inference_mode():
        expected = head.eval()(torch.tensor([pair])).logits[0].sigmoid()
    assert scored[1] == pytest.approx(expected.item(), abs=1e-5)
    edit_config(tmp_path, id2label={"0": "a", "1": "b", "2": "c"}, num_labels=3)
    with pytest.raises(ModelError, match="names 3 labels"):
        opened(tmp_path)


def test_encoders_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    folder = build_checkpoint("qwen3", tmp_path)
    edit_config(folder, architectures=["BertModel"], model_type="bert")
    with pytest.raises(ModelError, match="no encoders"):
        opened(folder)


def test_a_prompt_out_of_range_fails_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = build_checkpoint("llama3", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    # Channel 0 is token 77's alone, and one neuron squares it beyond float32.
    tensors["model.embed_tokens.weight"][:, 0] = 0
    tensors["model.embed_tokens.weight"][77, 0] = 1
    tensors["model.layers.0.self_attn.o_proj.weight"][0] = 0
    for part in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{part}.weight"][0] = 0
        tensors[f"model.layers.0.mlp.{part}.weight"][0, 0] = 1e25
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with opened(folder) as llm:
        given = [{"prompt_token_ids": ids} for ids in ([5, 6, 7], [5, 77, 7], [5, 6, 7])]
        good, bad, same = llm.embed(given, use_tqdm=False)
    assert bad.outputs is None
    assert "not finite" in str(bad.error)
    assert good.outputs == same.outputs
