"""Makes a plugin of the reference platform's sources: names changed, packaging, a test and a README added.

Called by the action `new-plugin`. Installs nothing and runs nothing.
"""

import ast
import importlib.util
import keyword
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zif.errors import ConfigError
from zif.plugins import PlatformRegistry

_SOURCES = Path(__file__).parents[1] / "reference_platform"
_SOURCE_PACKAGE = "zif_conformance.reference_platform"
_LEGAL_NAME = re.compile(r"[a-z][a-z0-9_]{0,29}")


@dataclass(frozen=True, slots=True)
class PluginNames:
    """The names of a plugin for the platform called `platform`."""

    platform: str

    @classmethod
    def checked(cls, name: str) -> "PluginNames":
        """Return the names. Raises `ConfigError` when `name` cannot be one or is taken here."""
        if not _LEGAL_NAME.fullmatch(name) or keyword.iskeyword(name):
            raise ConfigError(
                f"platform name {name!r} cannot be used: give a lower-case identifier of at most 30 letters, digits "
                "and underscores that is no word of Python, as in 'acme'"
            )
        names = cls(name)
        registry = PlatformRegistry.discover()
        if name in registry.platforms:
            owner = registry.platforms[name].distribution
            raise ConfigError(f"platform name {name!r} is taken by {owner}; choose another name")
        if importlib.util.find_spec(names.package) is not None:
            raise ConfigError(f"platform name {name!r} makes a package {names.package!r}, which exists; choose another")
        return names

    @property
    def package(self) -> str:
        """Return the name to import."""
        return f"zif_{self.platform}"

    @property
    def distribution(self) -> str:
        """Return the name to install."""
        return f"zif-{self.platform.replace('_', '-')}"

    @property
    def platform_class(self) -> str:
        """Return the name of the class derived from `Platform`."""
        return "".join(part.capitalize() for part in self.platform.split("_")) + "Platform"

    @property
    def environment_prefix(self) -> str:
        """Return what the plugin's environment variables begin with."""
        return f"ZIF_{self.platform.upper()}_"


def write_plugin(names: PluginNames, folder: Path) -> list[Path]:
    """Write the package into `folder` and return its files.

    Raises `ConfigError` when the folder holds anything or cannot be written; then nothing was changed or what could not
    be written is named.
    """
    files = plugin_files(names)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{str(folder)!r} is not empty; name a new folder with --into")
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {error.filename!r}: {error.strerror}; name another folder with --into"
        ) from error
    return [folder / name for name in files]


def plugin_files(names: PluginNames) -> dict[str, str]:
    """Return the text of every file by its path in the package's folder."""
    modules = {path.name: _renamed(path.read_text(encoding="utf-8"), names) for path in sorted(_SOURCES.glob("*.py"))}
    modules["__init__.py"] = _package_docstring(names)
    room = f"src/{names.package}"
    return {
        "pyproject.toml": _pyproject(names),
        "README.md": _readme(names, modules),
        **{f"{room}/{name}": text for name, text in modules.items()},
        f"{room}/py.typed": "",
        "tests/test_conformance.py": _test(names),
    }


def _renamed(text: str, names: PluginNames) -> str:
    for old, new in (
        (_SOURCE_PACKAGE, names.package),
        ("ReferencePlatform", names.platform_class),
        ("ZIF_REFERENCE_", names.environment_prefix),
        ('NAME = "reference"', f'NAME = "{names.platform}"'),
        ('vendor = "zif"', f'vendor = "{names.platform}"'),
    ):
        text = text.replace(old, new)
    return text


def _package_docstring(names: PluginNames) -> str:
    return f'"""The {names.platform} platform of zif. `plugin` is the entry point, `platform` the claims."""\n'


def _pyproject(names: PluginNames) -> str:
    return textwrap.dedent(f"""\
        [build-system]
        requires = ["setuptools>=77"]
        build-backend = "setuptools.build_meta"

        [project]
        name = "{names.distribution}"
        version = "0.1.0"
        description = "zif platform {names.platform}"
        readme = "README.md"
        requires-python = ">=3.11"
        dependencies = ["torch>=2.8", "zif"]

        [project.optional-dependencies]
        test = ["pytest>=8.4", "zif-conformance"]

        [project.entry-points."zif.v1"]
        {names.platform} = "{names.package}.plugin"

        [tool.setuptools.packages.find]
        where = ["src"]

        [tool.setuptools.package-data]
        "*" = ["py.typed", "*.toml"]
        """)


def _test(names: PluginNames) -> str:
    return textwrap.dedent(f'''\
        """The platform keeps the contract of zif."""

        import subprocess
        import sys


        def test_conforms_to_core(tmp_path):
            command = [sys.executable, "-m", "zif.cli", "conform", "--platform", "{names.platform}"]
            subprocess.run([*command, "--profile", "core", "--bundle", str(tmp_path / "bundle")], check=True)
        ''')


def _readme(names: PluginNames, modules: Mapping[str, str]) -> str:
    rows = "\n".join(
        f"| `{name}` | {_first_sentence(text)} |" for name, text in modules.items() if name != "__init__.py"
    )
    head = textwrap.dedent(f"""\
        # {names.distribution}

        Platform `{names.platform}` of zif. It begins as a copy of the suite's reference platform: the whole contract in
        plain torch, on virtual devices in the host's memory. Replace it part by part, and run the suite after each:

            pip install --editable . zif-conformance
            zif conform --platform {names.platform} --profile core --bundle out

        Settings are the variables `{names.environment_prefix}...` that `settings.py` lists.

        | file of `src/{names.package}` | what it is |
        |---|---|
        """)
    tail = textwrap.dedent("""\

        A good order: `platform.py` (probe and claims: claim only what works), `memory.py`, `device.py`, then
        `attention.py`, `operators.py` and, for several devices, `collectives.py`. `faults.py` can go.
        """)
    return f"{head}{rows}\n{tail}"


def _first_sentence(source: str) -> str:
    text = " ".join((ast.get_docstring(ast.parse(source)) or "").split())
    return text.partition(". ")[0].removesuffix(".").replace("|", "/")
