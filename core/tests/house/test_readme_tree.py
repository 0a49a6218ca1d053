"""The tree drawn in the README names folders that exist."""

import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[3]
_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(r"^(?P<indent>[\s│├└─]*)(?P<name>[\w.{},*/-]+/)(?=\s|$)")


def tree_folders(text):
    """Return the folders that the drawn trees of a Markdown text name, as paths from the root of each tree."""
    folders = []
    for block in _FENCE.findall(text):
        stack = []
        for entry in filter(None, map(_ENTRY.match, block.splitlines())):
            depth = len(entry["indent"])
            stack = [(d, name) for d, name in stack if d < depth] + [(depth, entry["name"])]
            folders.append("".join(name for _, name in stack))
    return folders


def test_a_tree_is_read_with_its_nesting():
    text = "```\ncore/    the engine\n  src/\n  tests/   all\nplugins/\n├── cpu/\n└── acme/x/\nmake run\n```\nno/ tree"
    assert tree_folders(text) == ["core/", "core/src/", "core/tests/", "plugins/", "plugins/cpu/", "plugins/acme/x/"]


def test_the_readme_names_real_folders():
    readme = _ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md yet")
    folders = tree_folders(readme.read_text(encoding="utf-8"))
    assert folders, "README.md draws no tree of folders"
    assert [folder for folder in folders if not (_ROOT / folder).is_dir()] == []
