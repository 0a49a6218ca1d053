"""The Jinja dialect of chat templates, as transformers defines it: sandboxed, with a few functions of its own.

A checkpoint's template is a foreign program and messages are foreign data: the sandbox sees plain values only. Imports
Jinja, so `chat` imports it when the first chat is rendered.
"""

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from zif.errors import RequestError


class GenerationBlock(jinja2.ext.Extension):
    """The tag {% generation %} ... {% endgeneration %}: it marks what a model was trained on and prints its body."""

    tags = {"generation"}  # noqa: RUF012 - the attribute is Jinja's

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Replace the tag by its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class PlainNamespace(jinja2.utils.Namespace):
    """`namespace()` of templates, without names that lead into Python's internals."""

    def __init__(*args: Any, **attributes: Any) -> None:
        self, *rest = args
        values = dict(*rest, **attributes)
        for name in values:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


class PlainDict:
    """`dict` of templates: makes dictionaries and gives no way to the type itself."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        """Make a dictionary with one value for all keys."""
        return dict.fromkeys(keys, value)


@lru_cache(maxsize=32)
def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template. Raises RequestError for one that is not valid Jinja."""
    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise RequestError(f"the chat template is not valid Jinja: {error}; give another template") from error


@lru_cache(maxsize=32)
def reads_content_parts(source: str) -> bool:
    """Say whether a template goes through the parts of a message's content, rather than taking it as a string."""
    loops = _environment().parse(source).find_all(jinja2.nodes.For)
    return any(_names_content(loop.iter) for loop in loops)


def plain(value: Any) -> Any:
    """Rebuild a value out of plain Python types. Raises RequestError for a value that JSON has no place for."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    raise RequestError(f"a chat holds a value of type {type(value).__name__}: {value!r}; give text, numbers or lists")


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": PlainNamespace,
        "dict": PlainDict(),
    }
    environment.globals.update(functions)
    environment.filters["tojson"] = _tojson
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template must not store the name {name!r} in a namespace")


def _names_content(node: jinja2.nodes.Node | None) -> bool:
    if isinstance(node, jinja2.nodes.Filter):
        return _names_content(node.node)
    if isinstance(node, jinja2.nodes.Name):
        return node.name == "content"
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    return (
        isinstance(node, jinja2.nodes.Getitem)
        and isinstance(node.arg, jinja2.nodes.Const)
        and node.arg.value == "content"
    )
