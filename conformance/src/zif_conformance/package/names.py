"""Which package a plugin lies in, and where its files are."""

import importlib.util
from pathlib import Path

from zif.errors import ContractError

_SHARED = ("zif", "zif_conformance")
"""Distributions that hold a platform among other things: there the plugin's own package is a part."""


def plugin_package(plugin: object) -> str:
    """Return the package whose code is the plugin's: the top one of its module."""
    module = str(getattr(plugin, "__name__", "") or type(plugin).__module__)
    top = module.partition(".")[0]
    return module.rpartition(".")[0] if top in _SHARED else top


def module_folder(package: str) -> Path:
    """Return the folder of a package. Raises `ContractError` when it has none that can be read."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ContractError(f"package {package!r} has no folder of source files; install the plugin as a package")
    # An editable package with compiled parts has a second folder, which holds only these.
    return Path(spec.origin).parent if spec.origin else Path(next(iter(spec.submodule_search_locations)))
