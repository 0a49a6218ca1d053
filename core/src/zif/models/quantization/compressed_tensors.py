"""Checkpoints in the compressed-tensors format, of integer weights.

Codes of 8 bits one by one: `X.weight` [O, I], int8, with `X.weight_scale` [O, G]. Packed codes: `X.weight_packed`
[O, I * bits / 32], words of 32 bits, the first code lowest and counted from the smallest one, with `X.weight_scale`,
`X.weight_shape` (O, I), and where they are not symmetric `X.weight_zero_point`, packed along the outputs. The format is
described at https://github.com/vllm-project/compressed-tensors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from zif.contract import WeightScheme
from zif.errors import ModelError
from zif.models.checkpoint import StoredTensor
from zif.models.config import ConfigReader
from zif.models.held import FLOATS, Arrangement, Source
from zif.models.quantization.schemes import StoredCodes, StoredMatrix, grouped_scheme, num_words, require_groups

FORMATS = ("int-quantized", "pack-quantized")
_MIXED = "mixed-precision"
_PATTERN = "re:"
_EVERY_MATRIX = "Linear"


@dataclass(frozen=True, slots=True)
class TargetGroup:
    """Modules that are quantized alike: by name, by "re:pattern", or "Linear" for all."""

    targets: tuple[str, ...]
    scheme: WeightScheme


@dataclass(frozen=True, slots=True)
class CompressedCodes(StoredCodes):
    """Matrices whose module has a `weight_packed`, or a `weight` with a `weight_scale`."""

    groups: tuple[TargetGroup, ...]
    ignored: tuple[str, ...]
    owner: str

    def matrix(self, module: str, shape: tuple[int, int], stored: Mapping[str, StoredTensor]) -> StoredMatrix | None:
        if f"{module}.weight_packed" in stored:
            return self._packed(module, shape, stored)
        return self._one_by_one(module, shape) if f"{module}.weight_scale" in stored else None

    def _packed(self, module: str, shape: tuple[int, int], stored: Mapping[str, StoredTensor]) -> StoredMatrix:
        num_outputs, num_inputs = shape
        scheme = self._scheme(module)
        if scheme.dynamic_activations:
            raise ModelError(
                f"{self.owner}: packed weights with activations of 8 bits are not implemented ({module}); use a "
                "checkpoint of format 'int-quantized', or one with weights only"
            )
        num_groups = require_groups(module, scheme, num_inputs, multiple=2)
        words = Source(f"{module}.weight_packed", (num_outputs, num_words(num_inputs, scheme.bits)), ("int32",))
        scales = Source(f"{module}.weight_scale", (num_outputs, num_groups), FLOATS)
        sources = [words, scales]
        if f"{module}.weight_shape" in stored:
            sources.append(Source(f"{module}.weight_shape", (2,), ("int64", "int32")))
        if scheme.zero_points:
            zero_words = num_words(num_outputs, scheme.bits)
            sources.append(Source(f"{module}.weight_zero_point", (zero_words, num_groups), ("int32",)))
        return StoredMatrix(scheme, Arrangement.PACKED_CODES, tuple(sources))

    def _one_by_one(self, module: str, shape: tuple[int, int]) -> StoredMatrix:
        num_outputs, num_inputs = shape
        scheme = self._scheme(module)
        if scheme.bits != 8:
            raise ModelError(
                f"{self.owner}: codes of {scheme.bits} bits that are not packed are not implemented ({module}); use a "
                "checkpoint of format 'pack-quantized'"
            )
        num_groups = require_groups(module, scheme, num_inputs, multiple=1)
        sources = [
            Source(f"{module}.weight", shape, ("int8",)),
            Source(f"{module}.weight_scale", (num_outputs, num_groups), FLOATS),
        ]
        if scheme.zero_points:
            sources.append(Source(f"{module}.weight_zero_point", (num_outputs, num_groups), ("int8",)))
        return StoredMatrix(scheme, Arrangement.INT8_CODES, tuple(sources))

    def _scheme(self, module: str) -> WeightScheme:
        """Find the group of a module whose weight is codes. Names come before patterns, and these before "Linear"."""
        if any(_matches(module, name) for name in self.ignored):
            raise ModelError(f"{self.owner}: ignore lists {module!r}, but the file holds codes for it; correct one")
        for kind in (str.__eq__, _matches_pattern, _matches_class):
            for group in self.groups:
                if any(kind(target, module) for target in group.targets):
                    return group.scheme
        raise ModelError(f"{self.owner}: no config_groups target matches {module!r}, which holds codes; correct it")


def _matches(module: str, target: str) -> bool:
    return target == module or _matches_pattern(target, module) or _matches_class(target, module)


def _matches_pattern(target: str, module: str) -> bool:
    return target.startswith(_PATTERN) and re.match(target.removeprefix(_PATTERN), module) is not None


def _matches_class(target: str, module: str) -> bool:
    del module
    return target == _EVERY_MATRIX


def read(config: ConfigReader) -> CompressedCodes:
    """Read a `quantization_config`. Raises `ModelError` that names what is not served."""
    stated = config.text("format", FORMATS[0])
    if stated not in (*FORMATS, _MIXED):
        raise _not_served(config, f"format {stated!r}")
    for key in ("kv_cache_scheme", "transform_config", "moe_sparsity_config"):
        if config.values.get(key):
            raise _not_served(config, key)
    sparsity = config.section("sparsity_config")
    if sparsity and sparsity.values and sparsity.text("format", "dense") != "dense":
        raise _not_served(config, f"sparsity_config of format {sparsity.text('format')!r}")
    groups = config.section("config_groups")
    if groups is None or not groups.values:
        raise config.wrong("config_groups", "an object with a group of modules")
    ignored = _names(config, "ignore")
    return CompressedCodes(tuple(_group(groups, name) for name in groups.values), ignored, config.owner)


def _group(groups: ConfigReader, name: str) -> TargetGroup:
    group = groups.section(name)
    if group is None:
        raise groups.wrong(name, "an object")
    stated = group.text("format", FORMATS[0])
    if stated not in FORMATS:
        raise _not_served(group, f"format {stated!r}")
    if group.has("output_activations"):
        raise _not_served(group, "output_activations")
    weights = group.section("weights")
    if weights is None:
        raise group.wrong("weights", "an object")
    return TargetGroup(_names(group, "targets"), _weight_scheme(weights, _has_dynamic_activations(group)))


def _weight_scheme(weights: ConfigReader, dynamic_activations: bool) -> WeightScheme:
    if weights.text("type", "int") != "int":
        raise _not_served(weights, f"type {weights.text('type')!r}")
    if weights.values.get("dynamic"):
        raise _not_served(weights, f"dynamic={weights.values['dynamic']!r}")
    if weights.values.get("actorder") in (True, "group", "dynamic"):
        raise _not_served(weights, f"actorder={weights.values['actorder']!r} (act order)")
    group_size = weights.values.get("group_size")
    group_size = None if group_size == -1 else weights.optional_count("group_size")
    strategy = weights.text("strategy", "channel" if group_size is None else "group")
    if strategy not in ("channel", "group") or (strategy == "group") != (group_size is not None):
        raise _not_served(weights, f"strategy {strategy!r} with group_size={weights.values.get('group_size')!r}")
    scheme = grouped_scheme(
        weights, weights.count("num_bits", 8), group_size, not weights.flag("symmetric", default=True)
    )
    return WeightScheme(scheme.bits, scheme.group_size, scheme.zero_points, dynamic_activations)


def _has_dynamic_activations(group: ConfigReader) -> bool:
    """Say whether activations are rounded to 8 bits, each token by itself. Raises on any other rounding."""
    activations = group.section("input_activations")
    if activations is None:
        return False
    is_served = (
        activations.count("num_bits", 8) == 8
        and activations.text("type", "int") == "int"
        and activations.flag("symmetric", default=True)
        and activations.values.get("dynamic") is True
        and activations.text("strategy", "token") == "token"
    )
    if not is_served:
        stated = {key: activations.values.get(key) for key in ("num_bits", "type", "symmetric", "dynamic", "strategy")}
        raise ModelError(
            f"{activations.owner}: activations as {stated!r} are not implemented; they may be symmetric integers of 8 "
            "bits with dynamic=true and strategy 'token': use such a checkpoint, or one with weights only"
        )
    return True


def _names(config: ConfigReader, key: str) -> tuple[str, ...]:
    names = config.entries(key) or ()
    if not all(isinstance(name, str) for name in names):
        raise config.wrong(key, "a list of names")
    for name in names:
        if name.startswith(_PATTERN):
            try:
                re.compile(name.removeprefix(_PATTERN))
            except re.error as error:
                raise config.wrong(key, f"a list of names and patterns ({name!r}: {error})") from error
    return names


def _not_served(config: ConfigReader, what: str) -> ModelError:
    return ModelError(
        f"{config.owner}: {what} is not implemented for compressed-tensors; use a checkpoint of format "
        f"{' or '.join(map(repr, FORMATS))}, or one that is not quantized"
    )
