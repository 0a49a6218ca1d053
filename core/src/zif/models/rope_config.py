"""Rotary position settings from a configuration, in the old form and in that of transformers 5.

Old: `rope_theta` and `rope_scaling` (with `type` or `rope_type`) beside each other. New: one `rope_parameters` object,
nested by layer type where types differ. Formulas are in `zif.models.rope`; this file only reads and refuses.
"""

import math
from collections.abc import Callable
from types import MappingProxyType

from zif.errors import UnknownArchitectureError
from zif.models.config import ConfigReader
from zif.models.spec import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)


def rope_section(config: ConfigReader) -> ConfigReader:
    """Find the one object of rotary parameters of a configuration, in either form; empty when there is none."""
    return config.section("rope_parameters") or config.section("rope_scaling") or ConfigReader({}, config.owner)


def read_rope(config: ConfigReader, section: ConfigReader, rotary_dim: int, default_base: float) -> RopeSpec:
    """Read one object of rotary parameters; what it lacks comes from `config`.

    `default_base` serves when `section` has no base. Raises `UnknownArchitectureError` on a scaling that is not
    implemented, `ModelError` on wrong values.
    """
    kind = section.text("rope_type", section.text("type", "default"))
    if kind not in _SCALINGS:
        raise UnknownArchitectureError(
            f"{section.owner}: rope_type={kind!r} is not implemented by the native decoder, which knows "
            f"{sorted(_SCALINGS)}; use implementation='transformers'"
        )
    scaling = _SCALINGS[kind](config, section, rotary_dim)
    return RopeSpec(section.number("rope_theta", default_base), rotary_dim, scaling)


def partial_rotary_dim(config: ConfigReader, section: ConfigReader, head_dim: int) -> int:
    """Return how many elements of a head are rotated, for a family that may rotate a part."""
    partial = section.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * partial)
    if partial > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise section.wrong("partial_rotary_factor", f"such that an even part of head_dim={head_dim} is rotated")
    return rotary_dim


def _default(config: ConfigReader, section: ConfigReader, rotary_dim: int) -> None:
    return None


def _linear(config: ConfigReader, section: ConfigReader, rotary_dim: int) -> RopeScaling:
    return LinearScaling(section.number("factor"))


def _llama3(config: ConfigReader, section: ConfigReader, rotary_dim: int) -> RopeScaling:
    return Llama3Scaling(
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_max_position=_original_max_position(config, section),
    )


def _yarn(config: ConfigReader, section: ConfigReader, rotary_dim: int) -> RopeScaling:
    original = _original_max_position(config, section)
    factor = section.number("factor", config.count("max_position_embeddings") / original)
    return YarnScaling(
        factor=factor,
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        original_max_position=original,
        attention_factor=section.number("attention_factor", _yarn_attention_factor(section, factor)),
        truncate=section.flag("truncate", True),
    )


def _yarn_attention_factor(section: ConfigReader, factor: float) -> float:
    """The temperature that the paper suggests, 0.1 ln(factor) + 1, or DeepSeek's ratio of two such."""
    numerator, denominator = section.optional_number("mscale"), section.optional_number("mscale_all_dim")
    log_factor = math.log(max(factor, 1.0))
    if numerator is None or denominator is None:
        return 0.1 * log_factor + 1.0
    return (0.1 * numerator * log_factor + 1.0) / (0.1 * denominator * log_factor + 1.0)


def _longrope(config: ConfigReader, section: ConfigReader, rotary_dim: int) -> RopeScaling:
    original = _original_max_position(config, section)
    factor = section.number("factor", config.count("max_position_embeddings") / original)
    suggested = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongRopeScaling(
        short_factors=section.numbers("short_factor", rotary_dim // 2),
        long_factors=section.numbers("long_factor", rotary_dim // 2),
        original_max_position=original,
        attention_factor=section.number("attention_factor", suggested),
    )


def _original_max_position(config: ConfigReader, section: ConfigReader) -> int:
    """The length of pretraining: beside the rope object where a family puts it there (Phi-3), else inside it."""
    if config.has("original_max_position_embeddings"):
        return config.count("original_max_position_embeddings")
    return section.count("original_max_position_embeddings", config.count("max_position_embeddings"))


_SCALINGS: MappingProxyType[str, Callable[[ConfigReader, ConfigReader, int], RopeScaling | None]] = MappingProxyType(
    {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope, "su": _longrope}
)
