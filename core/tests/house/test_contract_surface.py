"""The contract's public surface: locked, and documented."""

import inspect

import zif.contract
from zif.contract import hooks
from zif.contract.surface import LOCK_PATH, surface_text

_RELABEL = """the public surface of zif.contract changed.
An addition that means "as before" by default: raise the second number of CONTRACT_VERSION in zif/contract/hooks.py.
Anything else breaks vendors: it needs a new major version and entry-point group.
Then run `make lock`, read the difference of surface.lock, and commit it with the change."""


def test_the_surface_is_what_the_lock_says():
    assert LOCK_PATH.read_text(encoding="utf-8") == surface_text(), _RELABEL


def test_the_surface_covers_every_public_name_and_hook():
    text = surface_text()
    for name in zif.contract.__all__:
        assert f" {name}" in text or f"\n{name}" in text, name
    assert text.count("@hookspec") >= 4


def test_every_public_name_and_method_has_a_docstring():
    objects = [getattr(zif.contract, name) for name in zif.contract.__all__]
    objects += [value for value in vars(hooks).values() if hasattr(value, "zif_spec")]
    own = [thing for thing in objects if (inspect.isclass(thing) or inspect.isfunction(thing)) and _of_zif(thing)]
    methods = [member for thing in own if inspect.isclass(thing) for member in _methods(thing)]
    # A method is documented once, on the interface that declares it.
    documented = {method.__name__ for method in methods if method.__doc__}
    assert [thing.__qualname__ for thing in own if not thing.__doc__] == []
    assert [method.__qualname__ for method in methods if method.__name__ not in documented] == []


def _of_zif(thing):
    return thing.__module__.startswith("zif.")


def _methods(cls):
    members = [member.fget if isinstance(member, property) else member for member in vars(cls).values()]
    return [member for member in members if inspect.isfunction(member) and not member.__name__.startswith("_")]
