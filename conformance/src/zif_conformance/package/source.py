"""Reads a plugin's source without running it: what it imports, what it rebinds, where it reads the environment."""

import ast
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from zif_conformance.package.names import module_folder

_ALLOWED_CORE = ("zif.accelerator", "zif.contract", "zif.errors", "zif.host", "zif.kernels", "zif.reference")
_TORCH_TIER = "zif.runtime"
_IMPORTERS = ("import_module", "__import__")
_GUARDED = ("zif", "torch", "numpy")
_ENVIRONMENT = {"environ", "getenv", "environb", "getenvb", "putenv", "unsetenv"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in the source, with where it stands."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class PackageSource:
    """The parsed source files of one package. `own` is its name; imports of itself are always allowed."""

    def __init__(self, package: str) -> None:
        self.own = package
        self._trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in _files(package)}

    @property
    def num_files(self) -> int:
        """Return how many source files there are."""
        return len(self._trees)

    def foreign_core_imports(self) -> list[Finding]:
        """Find imports of rooms of core that are not for plugins, and of underscored names of core."""
        return [finding for finding, name in self._imports() if _is_core(name) and not self._may_import(name)]

    def imports_of(self, packages: frozenset[str]) -> list[Finding]:
        """Find imports of these top-level packages."""
        return [finding for finding, name in self._imports() if name.partition(".")[0] in packages]

    def libraries(self) -> list[str]:
        """Return the modules of other distributions that the source names, parents before children."""
        known = (*sys.stdlib_module_names, "zif", self.own.partition(".")[0])
        names = {name for _, name in self._imports() if name.partition(".")[0] not in known}
        parts = [name.split(".") for name in names]
        return sorted({".".join(part[:end]) for part in parts for end in range(1, len(part) + 1)})

    def rebound_attributes(self) -> list[Finding]:
        """Find assignments to attributes of core or of the array library: `torch.add = ...`, `setattr(zif, ...)`."""
        found = []
        for path, tree in self._trees.items():
            guarded = _guarded_names(tree)
            for node in ast.walk(tree):
                target = next((name for name in _rebound(node) if name.partition(".")[0] in guarded), None)
                if target:
                    found.append(self._finding(path, node, f"rebinds {target}"))
        return found

    def environment_modules(self) -> list[str]:
        """Return the files that touch the process's environment."""
        return [self._name(path) for path, tree in self._trees.items() if any(map(_is_environment, ast.walk(tree)))]

    def _may_import(self, name: str) -> bool:
        if name == self.own or name.startswith(f"{self.own}."):
            return True
        private = any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
        if name.rpartition(".")[0] == _TORCH_TIER:
            return name.rpartition(".")[2] in _public_parts()
        return not private and any(name == room or name.startswith(f"{room}.") for room in _ALLOWED_CORE)

    def _imports(self) -> Iterator[tuple[Finding, str]]:
        for path, tree in self._trees.items():
            for node in ast.walk(tree):
                for name in _imported(node):
                    yield self._finding(path, node, f"imports {name}"), name

    def _finding(self, path: Path, node: ast.AST, what: str) -> Finding:
        return Finding(f"{self._name(path)}:{getattr(node, 'lineno', 0)}", what)

    def _name(self, path: Path) -> str:
        return path.relative_to(module_folder(self.own)).as_posix()


@cache
def _public_parts() -> frozenset[str]:
    """Return what the torch tier names public."""
    return frozenset(importlib.import_module(_TORCH_TIER).__all__)


def _files(package: str) -> list[Path]:
    return sorted(module_folder(package).rglob("*.py"))


def _is_core(name: str) -> bool:
    return name == "zif" or name.startswith("zif.")


def _imported(node: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a node imports, `from a import b` as a.b."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and _last_name(node.func) in _IMPORTERS and node.args:
        first = node.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield first.value


def _guarded_names(tree: ast.AST) -> set[str]:
    """Return the names under which a file knows core and the array libraries, or things out of them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                (a.asname or a.name.partition(".")[0]) for a in node.names if a.name.partition(".")[0] in _GUARDED
            }
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in _GUARDED:
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def _rebound(node: ast.AST) -> Iterator[str]:
    """Yield the dotted targets that a node assigns to or deletes."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    elif isinstance(node, ast.Call) and _last_name(node.func) in ("setattr", "delattr") and node.args:
        yield f"{_dotted(node.args[0])}."
    yield from (_dotted(target) for target in targets if isinstance(target, ast.Attribute))


def _is_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr in _ENVIRONMENT and _dotted(node.value) == "os"
    return isinstance(node, ast.ImportFrom) and node.module == "os" and any(a.name in _ENVIRONMENT for a in node.names)


def _last_name(node: ast.expr) -> str:
    return _dotted(node).rpartition(".")[2]


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return ""
