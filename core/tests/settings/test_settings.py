"""Settings: limits, sources, precedence, origins, and advice for names that zif does not have."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zif.errors import ConfigError
from zif.settings import (
    EngineSettings,
    format_settings,
    parse_bytes,
    parse_tenant_percent,
    parse_tenant_weights,
    resolve_settings,
    setting_fields,
)


def _settings(**values):
    return EngineSettings.from_values({"model": "folder", **values})


def test_defaults_are_valid_and_complete():
    settings = _settings()
    assert settings.max_num_seqs == 256
    assert settings.max_num_batched_tokens == 2048
    assert settings.enable_prefix_caching is True
    assert settings.kv_bytes is None


def test_model_may_be_a_path():
    assert _settings(tokenizer=Path("a") / "b").tokenizer == str(Path("a") / "b")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4294967296", 2**32),
        ("4GiB", 2**32),
        ("4 gib", 2**32),
        ("512MiB", 2**29),
        ("1.5KiB", 1536),
        ("2e9", 2 * 10**9),
        ("2GB", 2 * 10**9),
        ("10_000", 10_000),
        ("7B", 7),
    ],
)
def test_bytes_are_read(text, num_bytes):
    assert parse_bytes(text) == num_bytes
    assert _settings(memory_limit=text).memory_limit == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4 XB", "4GiBx", "1e", "1e999", "0x10", "٤", "nan", "1" * 5000])
def test_what_is_no_number_of_bytes_is_refused_by_name(text):
    with pytest.raises(ConfigError, match="kv_bytes"):
        _settings(kv_bytes=text)


@given(st.integers(min_value=1, max_value=2**60))
def test_every_number_of_bytes_is_read_back(num_bytes):
    assert parse_bytes(str(num_bytes)) == num_bytes


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("max_num_seqs", 0, "1 to 65536"),
        ("max_num_batched_tokens", -1, "1 to"),
        ("max_model_len", 0, "1 to"),
        ("block_size", 0, "1 to"),
        ("kv_bytes", 0, "1 to"),
        ("seed", -1, "0 to"),
        ("max_num_seqs", True, "an integer"),
        ("max_num_seqs", 1.0, "an integer"),
        ("max_num_seqs", "8", "an integer"),
        ("max_num_seqs", None, "an integer"),
        ("enable_prefix_caching", 1, "true or false"),
        ("dtype", "float61", "bfloat16"),
        ("dtype", 3, "text"),
        ("kv_cache_dtype", "fp8", "int8"),
        ("kv_cache_dtype", None, "text"),
        ("model_impl", "vendor", "transformers"),
        ("scheduling_policy", "lifo", "fcfs"),
        ("max_partial_prefills", 0, "1 to"),
        ("max_prefill_chunk", 0, "1 to"),
        ("max_bypasses", -1, "0 to"),
        ("expected_output_percent", 101, "0 to 100"),
        ("tenant_weights", "a", "chat=3"),
        ("tenant_weights", "a=0", "chat=3"),
        ("tenant_weights", "a=1,a=2", "chat=3"),
        ("tenant_weights", "=1", "chat=3"),
        ("tenant_cache_percent", "a", "chat=50"),
        ("tenant_cache_percent", "a=101", "0 to 100"),
        ("tenant_cache_percent", "a=5,a=6", "once"),
        ("tokenizer", "", "empty"),
    ],
)
def test_a_wrong_value_is_refused_with_name_value_and_limit(name, value, limit):
    with pytest.raises(ConfigError) as caught:
        _settings(**{name: value})
    message = str(caught.value)
    assert message.startswith(name)
    assert limit in message
    assert not value or repr(value) in message


@pytest.mark.parametrize("value", ["fp8", "awq"])
def test_quantization_that_is_no_choice_says_who_chooses(value):
    with pytest.raises(ConfigError, match=rf"quantization='{value}' is none of int8, int4; .*says so itself"):
        _settings(quantization=value)


def test_weights_stay_as_stored_unless_quantization_is_set():
    assert _settings().quantization is None
    assert _settings(quantization="auto").quantization is None
    assert _settings(quantization="int4").quantization == "int4"


def test_cache_larger_than_the_limit_is_refused():
    with pytest.raises(ConfigError, match=r"kv_bytes=.*memory_limit="):
        _settings(kv_bytes="2GiB", memory_limit="1GiB")


def test_weights_of_tenants_are_read_and_need_fair_shares():
    assert parse_tenant_weights(_settings(tenant_weights="a=3, b=1", scheduling_policy="fair").tenant_weights) == (
        ("a", 3),
        ("b", 1),
    )
    assert parse_tenant_weights(None) == ()
    with pytest.raises(ConfigError, match=r"tenant_weights='a=3' have no meaning .*'fcfs'"):
        _settings(tenant_weights="a=3")


def test_quotas_of_tenants_are_read_under_any_policy():
    assert parse_tenant_percent(_settings(tenant_cache_percent="a=0, b=100").tenant_cache_percent) == (
        ("a", 0),
        ("b", 100),
    )
    assert parse_tenant_percent(None) == ()


def test_missing_model_is_refused():
    with pytest.raises(ConfigError, match="model is not set"):
        resolve_settings({}, {})


def test_guesses_are_counted_only_where_there_are_any():
    assert _settings(speculation="ngram", max_draft_tokens=8).max_draft_tokens == 8
    assert _settings(speculation="ngram").max_draft_tokens is None
    with pytest.raises(ConfigError, match=r"max_draft_tokens=8 has no meaning under speculation='off'"):
        _settings(max_draft_tokens=8)
    with pytest.raises(ConfigError, match=r"out of range: give 1 to 64"):
        _settings(speculation="ngram", max_draft_tokens=0)
    with pytest.raises(ConfigError, match=r"none of off, ngram"):
        _settings(speculation="eagle")


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"max_num_seq .*did you mean max_num_seqs\?"):
        _settings(max_num_seq=4)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("gpu_memory_utilization", "kv_bytes"),
        ("enforce_eager", "captures no graphs"),
        ("swap_space", "not supported yet"),
        ("speculative_config", "speculation and max_draft_tokens"),
        ("num_speculative_tokens", "max_draft_tokens"),
        ("max_seq_len", "max_model_len"),
    ],
)
def test_names_of_other_engines_get_an_answer(name, advice, tmp_path):
    with pytest.raises(ConfigError, match=advice):
        _settings(**{name: 1})
    with pytest.raises(ConfigError, match=advice):
        resolve_settings({"model": "m"}, {f"ZIF_{name.upper()}": "1"})
    file = tmp_path / "zif.toml"
    file.write_text(f"{name} = 1\n")
    with pytest.raises(ConfigError, match=advice):
        resolve_settings({"model": "m"}, {}, file)


def test_precedence_and_origins(tmp_path):
    file = tmp_path / "zif.toml"
    file.write_text('model = "from-file"\nmax_num_seqs = 1\nmax_model_len = 10\nkv_bytes = "1MiB"\n')
    environ = {"ZIF_MAX_NUM_SEQS": "2", "ZIF_MAX_MODEL_LEN": "20", "ZIF_ENABLE_PREFIX_CACHING": "off"}
    resolved = resolve_settings({"max_num_seqs": "3"}, environ, file)
    settings, origins = resolved.settings, resolved.origins
    assert (settings.max_num_seqs, origins["max_num_seqs"]) == (3, "command line")
    assert (settings.max_model_len, origins["max_model_len"]) == (20, "environment ZIF_MAX_MODEL_LEN")
    assert (settings.kv_bytes, origins["kv_bytes"]) == (2**20, f"file {file}")
    assert (settings.seed, origins["seed"]) == (0, "default")
    assert settings.enable_prefix_caching is False
    assert settings.model == "from-file"
    assert resolved.warnings == ()


def test_auto_takes_an_option_back(tmp_path):
    file = tmp_path / "zif.toml"
    file.write_text("max_model_len = 10\n")
    assert resolve_settings({"model": "m", "max_model_len": "auto"}, {}, file).settings.max_model_len is None


@pytest.mark.parametrize(
    ("cli", "environ", "place"),
    [
        ({"max_num_seqs": "x"}, {}, "command line: max_num_seqs='x'"),
        ({}, {"ZIF_MAX_NUM_SEQS": "0"}, "environment ZIF_MAX_NUM_SEQS: max_num_seqs=0"),
        ({}, {"ZIF_TRUST_REMOTE_CODE": "maybe"}, "environment ZIF_TRUST_REMOTE_CODE: trust_remote_code='maybe'"),
        ({"max_num_seqs": "1" * 5000}, {}, "command line: max_num_seqs="),
    ],
)
def test_an_error_names_the_source(cli, environ, place):
    with pytest.raises(ConfigError) as caught:
        resolve_settings({"model": "m", **cli}, environ)
    assert str(caught.value).startswith(place)


def test_unknown_variables_are_warned_about_and_those_of_installed_plugins_are_not():
    environ = {"ZIF_MAX_NUM_SEQ": "1", "ZIF_ACME_TILES": "4", "ZIF_NULL_SPEED": "2", "HOME": "/"}
    warnings = resolve_settings({"model": "m"}, environ).warnings
    assert len(warnings) == 2
    assert "ZIF_ACME_TILES" in warnings[0]
    assert "did you mean ZIF_MAX_NUM_SEQS?" in warnings[1]


@pytest.mark.parametrize("content", ["max_num_seqs = ", "\x00", "[engine]\nmax_num_seqs = 1\n", 'max_num_seqs = "8"'])
def test_a_wrong_file_is_refused_by_name(content, tmp_path):
    file = tmp_path / "zif.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"zif\.toml"):
        resolve_settings({"model": "m"}, {}, file)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml.*check the path"):
        resolve_settings({"model": "m"}, {}, tmp_path / "absent.toml")


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), st.integers(1, 2**16))
def test_printed_settings_are_toml_that_reads_back(model, max_num_seqs):
    resolved = resolve_settings({"model": model, "max_num_seqs": str(max_num_seqs)}, {})
    table = tomllib.loads(format_settings(resolved))
    assert list(table) == [declared.name for declared in setting_fields()]
    assert EngineSettings.from_values(table) == resolved.settings
