"""The transformers backend gives transformers' own logits, says what a model needs, and refuses by name.

Parity is teacher-forced: two requests share every step, and each step continues both, as the engine does.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import FAMILIES, build_checkpoint, build_tied_checkpoint, edit_config
from support.history_attention import HistoryAttention
from support.host_memory import HostAllocator
from support.native_models import describe_native, ignore_progress, transformers_logits
from zif.contract import Feature, FullAttentionSpec, ModelDescription, SlidingWindowSpec
from zif.errors import CheckpointError, ConfigError, OutOfMemoryError, UnknownArchitectureError
from zif.models.description import ModelSource
from zif.models.model import Model
from zif.models.transformers_backend import describe, load_transformers_model

TOLERANCE = 1e-4
VOCAB_SIZE = 128
WINDOW = 6
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
GPT2: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
WINDOWED: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}

# Architectures that the native decoder does not know, or knows in another form. What is particular is said after each.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ApertusForCausalLM": SMALL,
    "Cohere2ForCausalLM": SMALL | WINDOWED | {"logit_scale": 0.3},
    "DeepseekV3ForCausalLM": SMALL
    | EXPERTS
    | LATENT
    | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "Exaone4ForCausalLM": SMALL | WINDOWED,
    "GPT2LMHeadModel": GPT2,
    "GPTNeoXForCausalLM": SMALL,
    "Gemma3ForConditionalGeneration": {},
    "Glm4ForCausalLM": SMALL | {"head_dim": 8},
    "Glm4MoeForCausalLM": SMALL | EXPERTS | {"n_routed_experts": 4, "head_dim": 8, "n_group": 1, "topk_group": 1},
    "GraniteMoeForCausalLM": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0},
    "HunYuanDenseV1ForCausalLM": SMALL | {"head_dim": 8},
    "Ministral3ForCausalLM": SMALL | {"head_dim": 8},
    "ModernBertDecoderForCausalLM": SMALL | {"local_attention": WINDOW, "layer_types": WINDOWED["layer_types"]},
    "OPTForCausalLM": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Olmo3ForCausalLM": SMALL | WINDOWED,
    "PhiForCausalLM": SMALL,
    "Qwen2MoeForCausalLM": SMALL | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 24},
    "StableLmForCausalLM": SMALL,
    "Starcoder2ForCausalLM": SMALL | {"sliding_window": WINDOW},
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_model(architecture: str, options: dict[str, Any]) -> torch.nn.Module:
    """Build a tiny model of `architecture` with weights that make every part matter."""
    import transformers

    model_class = getattr(transformers, architecture)
    if architecture == "Gemma3ForConditionalGeneration":
        text = SMALL | WINDOWED | {"head_dim": 8, "query_pre_attn_scalar": 8}
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        options = {"text_config": text, "vision_config": vision | {"image_size": 28, "patch_size": 14}}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.6 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def write_model(architecture: str, folder: Path, **options: Any) -> Path:
    """Write a tiny checkpoint of `architecture`; `options` add to its row of ARCHITECTURES."""
    build_model(architecture, ARCHITECTURES.get(architecture, {}) | options).save_pretrained(folder)
    return folder


def write_config(folder: Path, **config: Any) -> Path:
    """Write a configuration beside a weight file that has nothing of the model."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"unused": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def describe_folder(folder: Path, **options: Any) -> ModelDescription:
    options = {"dtype": "float32", "implementation": "transformers"} | options
    return describe(ModelSource(folder, **options), json.loads((folder / "config.json").read_text()))


def load(description: ModelDescription, allocator: HostAllocator | None = None) -> Model:
    return load_transformers_model(description, allocator or HostAllocator(), "cpu", ignore_progress)


def layer_kinds(description: ModelDescription) -> dict[int, int | None]:
    """Map each layer to its window, None for full attention."""
    return {
        layer: spec.window if isinstance(spec, SlidingWindowSpec) else None
        for spec in description.kv_specs
        for layer in spec.layers
    }


def run_together(model: Model, requests: list[torch.Tensor], steps: list[list[int]]) -> list[torch.Tensor]:
    """Return each request's logits [T, V] when `steps` gives the tokens that each request adds in each step."""
    attention = HistoryAttention()
    done = [0] * len(requests)
    logits: list[list[torch.Tensor]] = [[] for _ in requests]
    for chunks in steps:
        attention.chunks = chunks
        ids = [r[d : d + c] for r, d, c in zip(requests, done, chunks, strict=True)]
        positions = [torch.arange(d, d + c) for d, c in zip(done, chunks, strict=True)]
        hidden = model.forward(torch.cat(ids), torch.cat(positions), attention)
        for request, rows in enumerate(hidden.split(chunks)):
            logits[request].append(model.logits(rows))
        done = [d + c for d, c in zip(done, chunks, strict=True)]
    return [torch.cat(rows) for rows in logits]


def assert_matches_transformers(folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    requests = [torch.randint(1, VOCAB_SIZE, (n,), generator=generator) for n in (15, 11)]
    model = load(describe_folder(folder))
    ours = run_together(model, requests, [[9, 6], [5, 1], [1, 4]])
    for request, logits in zip(requests, ours, strict=True):
        theirs = transformers_logits(folder, request)
        assert logits.dtype == torch.float32
        assert theirs.std() > 0.05, "flat logits would hide differences"
        torch.testing.assert_close(logits, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_gives_the_logits_of_transformers_for_native_families(family, tmp_path):
    assert_matches_transformers(build_checkpoint(family, tmp_path))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gives_the_logits_of_transformers_for_other_architectures(architecture, tmp_path):
    assert_matches_transformers(write_model(architecture, tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_describes_native_families_as_the_native_decoder_does(family, tmp_path):
    folder = build_checkpoint(family, tmp_path)
    generic, native = describe_folder(folder), describe_native(folder, dtype="float32")
    assert generic.implementation == "transformers"
    assert generic.kv_specs == native.kv_specs
    assert generic.features - native.features == {Feature.TRANSFORMERS_BACKEND}
    assert native.features - generic.features <= {Feature.MIXTURE_OF_EXPERTS}
    assert (generic.architecture, generic.vocab_size) == (native.architecture, native.vocab_size)
    assert generic.max_model_len == native.max_model_len


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["Glm4MoeForCausalLM", "GPT2LMHeadModel", "Gemma3ForConditionalGeneration"])
def test_ledger_holds_exactly_the_described_weight_bytes(architecture, dtype, tmp_path):
    description = describe_folder(write_model(architecture, tmp_path), dtype=dtype)
    allocator, seen = HostAllocator(), []
    load_transformers_model(description, allocator, "cpu", lambda done, total: seen.append((done, total)))
    assert allocator.stats().by_tag == (("weights", description.weight_bytes),)
    assert seen[0] == (0, description.weight_bytes)
    assert seen[-1] == (description.weight_bytes, description.weight_bytes)
    assert seen == sorted(seen)


def test_tied_weights_are_held_once(tmp_path):
    tied = describe_folder(build_tied_checkpoint("llama2", tmp_path / "tied"))
    free = describe_folder(build_checkpoint("llama2", tmp_path / "free"))
    assert free.weight_bytes - tied.weight_bytes == tied.vocab_size * tied.config["hidden_size"] * 4
    allocator = HostAllocator()
    load(tied, allocator)
    assert allocator.stats().allocated_bytes == tied.weight_bytes
    assert_matches_transformers(tmp_path / "tied")


def test_image_towers_take_no_memory(tmp_path):
    folder = write_model("Gemma3ForConditionalGeneration", tmp_path)
    stored = load_file(folder / "model.safetensors")
    vision = sum(t.nbytes for name, t in stored.items() if "vision" in name or "projector" in name)
    assert vision > 0
    allocator = HostAllocator()
    load(describe_folder(folder), allocator)
    buffers = 1024  # rotary frequencies and embedding scales, which are not stored
    assert allocator.stats().allocated_bytes <= sum(t.nbytes for t in stored.values()) - vision + buffers


def test_refuses_to_exceed_the_allocators_limit(tmp_path):
    description = describe_folder(build_checkpoint("llama2", tmp_path))
    with pytest.raises(OutOfMemoryError, match="weights"):
        load(description, HostAllocator(description.weight_bytes - 1))


def test_describes_layers_by_the_mask_they_attend_with(tmp_path):
    description = describe_folder(write_model("Olmo3ForCausalLM", tmp_path), block_size=32, dtype="bfloat16")
    assert description.kv_specs == (
        FullAttentionSpec((2,), 2, 8, 32, "bfloat16"),
        SlidingWindowSpec((0, 1), 2, 8, 32, "bfloat16", WINDOW),
    )
    assert description.features == {
        Feature.ATTENTION_FULL,
        Feature.ATTENTION_SLIDING_WINDOW,
        Feature.TRANSFORMERS_BACKEND,
    }


def test_keys_and_values_of_different_sizes_share_the_larger(tmp_path):
    description = describe_folder(write_model("DeepseekV3ForCausalLM", tmp_path))
    assert [(spec.num_kv_heads, spec.head_dim) for spec in description.kv_specs] == [(4, 16)]


def test_passes_scale_softcap_and_window_of_each_layer(tmp_path):
    description = describe_folder(build_checkpoint("gemma2", tmp_path))
    attention = HistoryAttention([4])
    load(description).forward(torch.arange(4), torch.arange(4), attention)
    assert [layer for layer, _ in attention.calls] == [0, 1, 2, 3]
    assert {params.softcap for _, params in attention.calls} == {5.0}
    assert {params.scale for _, params in attention.calls} == {24**-0.5}
    assert {layer: params.window for layer, params in attention.calls} == layer_kinds(description)


def test_estimates_activations_of_the_order_of_the_layers_size(tmp_path):
    small = describe_folder(write_model("StableLmForCausalLM", tmp_path / "small"))
    wide = describe_folder(write_model("StableLmForCausalLM", tmp_path / "wide", intermediate_size=480))
    assert wide.token_activation_bytes - small.token_activation_bytes >= 2 * (480 - 48) * 4
    assert small.token_activation_bytes >= (32 + 2 * 48) * 4
    assert VOCAB_SIZE * 4 <= small.sample_activation_bytes <= VOCAB_SIZE * 16


def test_a_longer_max_model_len_than_the_positions_is_a_config_error(tmp_path):
    folder = write_model("StableLmForCausalLM", tmp_path)
    assert describe_folder(folder).max_model_len == 64
    assert describe_folder(folder, max_model_len=20).max_model_len == 20
    with pytest.raises(ConfigError, match="max_model_len=65"):
        describe_folder(folder, max_model_len=65)


def test_longrope_is_served_up_to_its_original_length(tmp_path):
    folder = build_checkpoint("phi3_longrope", tmp_path, max_position_embeddings=512)
    assert describe_folder(folder).max_model_len == 64
    with pytest.raises(ConfigError, match="max_model_len=65 exceeds 64"):
        describe_folder(folder, max_model_len=65)


def test_dynamic_rope_is_described_and_matches_within_its_length(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = write_model("StableLmForCausalLM", tmp_path, partial_rotary_factor=1.0, rope_parameters=rope)
    assert_matches_transformers(folder)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "MiniMaxForCausalLM": (
        {"num_hidden_layers": 4},
        "2 of 4 layers do not go through transformers' attention interface, the first is layer 1 .*linear_attention",
    ),
    "Zamba2ForCausalLM": (
        {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
        "Zamba2",
    ),
    "BloomForCausalLM": ({"n_layer": 2}, "2 of 2 layers do not go through transformers' attention interface"),
    "FalconForCausalLM": ({"alibi": True}, "do not go through transformers' attention interface"),
    "T5ForConditionalGeneration": ({}, "encoder-decoder"),
    "BertLMHeadModel": ({}, "mask of layer 0 is neither causal nor a sliding window"),
    "Llama4ForCausalLM": ({"num_hidden_layers": 4}, "layer 0 .type 'chunked_attention'. is neither causal"),
    "DiffLlamaForCausalLM": ({"num_hidden_layers": 2}, "attends more than once as layer 0"),
    "DogeForCausalLM": ({"num_hidden_layers": 2}, "layer 0 makes an attention mask of its own"),
    "DeepseekV32ForCausalLM": ({"num_hidden_layers": 4}, "passes indices to attention"),
    "Gemma4ForCausalLM": ({"num_kv_shared_layers": 2}, "makes an attention mask of its own"),
    "RecurrentGemmaForCausalLM": ({"num_hidden_layers": 3}, "RecurrentGemma"),
    "RwkvForCausalLM": ({"num_hidden_layers": 2}, "no decoder apart from its head"),
    "XGLMForCausalLM": ({"num_layers": 2}, "2 of 2 layers do not go through"),
}


@pytest.mark.parametrize("architecture", REFUSALS)
def test_refuses_what_it_cannot_serve_with_the_reason(architecture, tmp_path):
    import transformers

    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    options, reason = REFUSALS[architecture]
    config = getattr(transformers, architecture).config_class(**options).to_dict()
    folder = write_config(tmp_path, **{**config, "architectures": [architecture]})
    with pytest.raises(UnknownArchitectureError, match=f"{architecture}.*{reason}"):
        describe_folder(folder)


def test_refuses_a_model_type_that_transformers_does_not_know(tmp_path):
    folder = write_config(tmp_path, model_type="nonesuch", architectures=["NonesuchForCausalLM"])
    with pytest.raises(UnknownArchitectureError, match="does not know the model type 'nonesuch'"):
        describe_folder(folder)


def test_refuses_models_that_are_not_causal_language_models(tmp_path):
    folder = write_config(tmp_path, model_type="vit", architectures=["ViTForImageClassification"])
    with pytest.raises(UnknownArchitectureError, match="no causal language model for ViTConfig"):
        describe_folder(folder)


def test_refuses_quantized_weights(tmp_path):
    folder = write_model("StableLmForCausalLM", tmp_path)
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnknownArchitectureError, match="quantized"):
        describe_folder(folder)


def test_refuses_a_configuration_that_transformers_rejects(tmp_path):
    folder = write_model("StableLmForCausalLM", tmp_path)
    edit_config(folder, hidden_size="wide")
    with pytest.raises(UnknownArchitectureError, match=r"rejects its config\.json.*hidden_size"):
        describe_folder(folder)


def test_names_the_package_when_it_is_not_installed(tmp_path, monkeypatch):
    folder = write_model("StableLmForCausalLM", tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnknownArchitectureError, match=r"pip install 'zif\[transformers\]'"):
        describe_folder(folder)


def test_names_the_version_when_the_package_is_too_old(tmp_path, monkeypatch):
    import transformers

    folder = write_model("StableLmForCausalLM", tmp_path)
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(UnknownArchitectureError, match=r"5\.10 or later, 4\.57\.1 is installed"):
        describe_folder(folder)


def damage(folder: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite the weights: None drops a tensor, anything else replaces or adds it."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"1 missing tensors \(model\.norm\.weight\)"),
        ({"model.surplus": torch.ones(2)}, r"1 tensors that the model does not have \(model\.surplus\)"),
        ({"model.norm.weight": torch.ones(7)}, r"model\.norm\.weight is \[7\], not \[32\]"),
    ],
)
def test_names_tensors_that_do_not_fit(changes, message, tmp_path):
    folder = write_model("StableLmForCausalLM", tmp_path)
    description = describe_folder(folder)
    damage(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(description)


def test_a_truncated_file_is_a_checkpoint_error(tmp_path):
    folder = write_model("StableLmForCausalLM", tmp_path)
    description = describe_folder(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        load(description)
    with pytest.raises(CheckpointError):
        describe_folder(folder)


REMOTE_CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class CustomConfig(LlamaConfig):
    model_type = "zif-custom"


class ShiftedMLP(torch.nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.inner = mlp

    def forward(self, x):
        return self.inner(x + SHIFT * x.roll(1, dims=1)) if SHIFT else self.inner(x)


class CustomForCausalLM(LlamaForCausalLM):
    config_class = CustomConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].mlp = ShiftedMLP(self.model.layers[1].mlp)
"""


@pytest.fixture
def remote_code(tmp_path, monkeypatch):
    """Write a checkpoint that brings its own code; in it, tokens meet outside attention if `shift` is not zero."""
    from transformers import dynamic_module_utils

    modules = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(modules)

    def write(shift: float) -> Path:
        folder = write_model("LlamaForCausalLM", tmp_path / f"custom{int(shift)}", **SMALL)
        (folder / "modeling_custom.py").write_text(REMOTE_CODE.replace("SHIFT", repr(shift)))
        auto_map = {
            "AutoConfig": "modeling_custom.CustomConfig",
            "AutoModelForCausalLM": "modeling_custom.CustomForCausalLM",
        }
        edit_config(folder, model_type="zif-custom", architectures=["CustomForCausalLM"], auto_map=auto_map)
        tensors = load_file(folder / "model.safetensors")
        renamed = {name.replace("layers.1.mlp.", "layers.1.mlp.inner."): t for name, t in tensors.items()}
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


def test_code_of_a_checkpoint_runs_only_on_trust(remote_code):
    folder = remote_code(shift=0.0)
    with pytest.raises(UnknownArchitectureError, match="trust_remote_code=True"):
        describe_folder(folder)
    description = describe_folder(folder, trust_remote_code=True)
    assert description.trust_remote_code
    tokens = torch.arange(1, 9)
    logits = run_together(load(description), [tokens], [[8]])[0]
    assert logits.shape == (8, VOCAB_SIZE)
    assert logits.isfinite().all()


def test_refuses_models_whose_tokens_meet_outside_attention(remote_code):
    description = describe_folder(remote_code(shift=1.0), trust_remote_code=True)
    with pytest.raises(UnknownArchitectureError, match=r"CustomForCausalLM.*outside attention"):
        load(description)


def test_importing_the_backend_does_not_import_transformers():
    script = "import sys, zif.models.transformers_backend; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
