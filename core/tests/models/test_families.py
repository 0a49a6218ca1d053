"""What a configuration asks for and is not implemented is refused by name; wrong values are named."""

from typing import Any

import pytest

from zif.errors import ModelError, UnknownArchitectureError
from zif.models.families import decoder_spec
from zif.models.spec import Llama3Scaling, LongRopeScaling, YarnScaling

SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def llama(**changes: Any) -> Any:
    return decoder_spec("LlamaForCausalLM", SMALL | changes)


@pytest.mark.parametrize("kind", ["dynamic", "proportional", "mrope", "ntk"])
def test_unknown_rope_scaling(kind: str) -> None:
    with pytest.raises(UnknownArchitectureError, match=f"rope_type='{kind}' is not implemented.*'llama3'"):
        llama(rope_scaling={"rope_type": kind, "factor": 2.0})


def test_unknown_activation() -> None:
    with pytest.raises(UnknownArchitectureError, match="hidden_act='relu2' is not implemented"):
        llama(hidden_act="relu2")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_bidirectional_attention", True),
        ("attention_chunk_size", 8192),
        ("alibi", True),
        ("clip_qkv", 8.0),
        ("logit_scale", 0.25),
        ("partial_rotary_factor", 0.5),
        ("rope_interleaved", True),
    ],
)
def test_features_that_are_not_implemented(key: str, value: object) -> None:
    with pytest.raises(ModelError, match=f"{key}={value!r} is not implemented"):
        llama(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_bidirectional_attention", False),
        ("attention_chunk_size", None),
        ("logit_scale", 1.0),
        ("partial_rotary_factor", 1.0),
        ("rope_interleaved", False),
        ("pretraining_tp", 2),
    ],
)
def test_the_same_switched_off_changes_nothing(key: str, value: object) -> None:
    assert llama(**{key: value}) == llama()


def test_attention_that_is_not_causal() -> None:
    with pytest.raises(ModelError, match="is_causal=False"):
        llama(is_causal=False)


def test_layer_types_that_are_not_implemented() -> None:
    kinds = ["full_attention", "linear_attention", "full_attention", "full_attention"]
    with pytest.raises(UnknownArchitectureError, match="layer type 'linear_attention'"):
        decoder_spec("Qwen3ForCausalLM", SMALL | {"layer_types": kinds})


def test_layer_types_that_contradict_the_architecture() -> None:
    with pytest.raises(ModelError, match="contradicts what this architecture computes"):
        llama(layer_types=["sliding_attention"] * 4, sliding_window=8)


def test_layer_types_of_another_length() -> None:
    with pytest.raises(ModelError, match="num_hidden_layers=4 entries"):
        decoder_spec("Qwen3ForCausalLM", SMALL | {"layer_types": ["full_attention"]})


def test_window_layers_without_a_window() -> None:
    with pytest.raises(ModelError, match="sliding_window=None"):
        decoder_spec("Gemma2ForCausalLM", SMALL | {"sliding_window": None})


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, [8]])
def test_sizes_that_are_none(key: str, value: object) -> None:
    with pytest.raises(ModelError, match=f"{key}=.* must be a positive integer"):
        llama(**{key: value})


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"])
def test_sizes_that_are_missing(key: str) -> None:
    with pytest.raises(ModelError, match=f"{key} is missing"):
        llama(**{key: None})


@pytest.mark.parametrize("value", [0, -1e-6, float("nan"), float("inf"), "1e-6", False])
def test_numbers_that_are_none(value: object) -> None:
    with pytest.raises(ModelError, match=r"rms_norm_eps=.* must be a positive number"):
        llama(rms_norm_eps=value)


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(ModelError, match="num_key_value_heads=3 must be a divisor of num_attention_heads=4"):
        llama(num_key_value_heads=3)
    with pytest.raises(ModelError, match="num_attention_heads=6 must be a divisor of hidden_size=64"):
        llama(num_attention_heads=6)
    with pytest.raises(ModelError, match="even for rotary positions"):
        llama(head_dim=15)


def test_flags_and_sections_of_the_wrong_kind() -> None:
    with pytest.raises(ModelError, match="tie_word_embeddings=1 must be true or false"):
        llama(tie_word_embeddings=1)
    with pytest.raises(ModelError, match="rope_scaling='linear' must be an object"):
        llama(rope_scaling="linear")


def test_swiglu_constants_other_than_those_implemented() -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(ModelError, match=r"swiglu_limit=5\.0 must be 7\.0"):
        decoder_spec("GptOssForCausalLM", SMALL | experts | {"swiglu_limit": 5.0})


def test_soft_cap_that_gemma3_does_not_apply() -> None:
    with pytest.raises(ModelError, match=r"attn_logit_softcapping=50\.0"):
        decoder_spec("Gemma3ForCausalLM", SMALL | {"head_dim": 16, "attn_logit_softcapping": 50.0})


def test_longrope_lists_must_fit_the_head() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 7, "long_factor": [1.0] * 8}
    with pytest.raises(ModelError, match=r"short_factor=.*list of 8 positive numbers"):
        decoder_spec("Phi3ForCausalLM", SMALL | {"rope_scaling": scaling})


def test_rope_scaling_that_phi3_does_not_have() -> None:
    with pytest.raises(UnknownArchitectureError, match=r"'linear'.*not implemented for this architecture"):
        decoder_spec("Phi3ForCausalLM", SMALL | {"rope_scaling": {"type": "linear", "factor": 2.0}})


def test_forms_of_rope_parameters_agree() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = llama(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    new = llama(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert old == new
    assert isinstance(old.ropes[0].scaling, Llama3Scaling)


def test_defaults_of_gpt_oss_are_the_published_ones() -> None:
    spec = decoder_spec("GptOssForCausalLM", SMALL | {"head_dim": 64, "max_position_embeddings": 131072})
    (rope,) = spec.ropes
    assert rope.base == 150000.0
    assert isinstance(rope.scaling, YarnScaling)
    assert (rope.scaling.factor, rope.scaling.truncate) == (32.0, False)
    assert rope.scaling.attention_factor == pytest.approx(1.3465735902799727)
    assert [layer.attention.window for layer in spec.layers] == [128, None, 128, None]


def test_gemma3_has_one_rope_per_layer_type() -> None:
    spec = decoder_spec("Gemma3ForCausalLM", SMALL | {"head_dim": 16, "num_hidden_layers": 6, "sliding_window": 32})
    assert [layer.attention.rope.base for layer in spec.layers if layer.attention.rope] == [10000.0] * 5 + [1e6]


def test_longrope_limits_what_is_served_unless_asked() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = SMALL | {"original_max_position_embeddings": 128, "rope_scaling": {"type": "longrope", **factors}}
    spec = decoder_spec("Phi3ForCausalLM", config)
    assert isinstance(spec.ropes[0].scaling, LongRopeScaling)
    assert (spec.default_max_len, spec.max_position) == (128, 256)


@pytest.mark.parametrize(("first", "num_windowed"), [(0, 4), (3, 1), (4, 0), (None, 0)])
def test_windows_of_qwen_start_at_a_layer(first: int | None, num_windowed: int) -> None:
    config = SMALL | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": first}
    windows = [layer.attention.window for layer in decoder_spec("Qwen2ForCausalLM", config).layers]
    assert windows == [None] * (4 - num_windowed) + [8] * num_windowed


def test_first_window_layer_that_is_none() -> None:
    with pytest.raises(ModelError, match="max_window_layers='2' must be a positive integer"):
        decoder_spec("Qwen2ForCausalLM", SMALL | {"max_window_layers": "2"})
