"""Routes: none without a scope, none twice, and only plain paths."""

import pytest

from serving.fakes import FakeEngine
from serving.http.apis import Ask, make_app
from zif.serving.http.exchange import AuthScope
from zif.serving.http.registry import Registry, Route


async def handler(request, context):
    raise AssertionError


def make(path="/a", method="GET", scope=AuthScope.PUBLIC, **more):
    return Route(path, method, scope, handler, **more)


def test_a_route_needs_a_scope():
    with pytest.raises(TypeError):
        Route("/a", "GET", handler=handler)
    for scope in (None, "", "public"):
        with pytest.raises(TypeError, match="scope"):
            Route("/a", "GET", scope, handler)


@pytest.mark.parametrize(
    "path", ["", "a", "//a", "/a//b", "/../a", "/a/./b", "/a?b", "/a%20b", "/{x}/a", "/a{x}", "/é"]
)
def test_only_plain_paths(path):
    with pytest.raises(ValueError, match="plain path"):
        make(path)


@pytest.mark.parametrize("path", ["/", "/a", "/v1/a-b_c.json", "/v1/models/{model}"])
def test_plain_paths(path):
    assert make(path).path == path


def test_a_route_is_declared_once():
    with pytest.raises(ValueError, match="twice"):
        Registry([make(), make()])
    assert len(Registry([make(), make(method="POST")]).routes()) == 2


def test_a_get_has_no_body():
    with pytest.raises(ValueError, match="body"):
        make(request_type=Ask)


def test_what_has_no_effect_is_a_field_or_a_part_of_one():
    make(method="POST", request_type=Ask, no_effect={"user": "x", "parts.a": "x"})
    with pytest.raises(ValueError, match="nobody"):
        make(method="POST", request_type=Ask, no_effect={"nobody": "x"})


def test_exact_paths_come_before_those_with_a_value():
    registry = Registry([make("/a/{x}"), make("/a/b")])
    assert registry.find("/a/b", "GET").route.path == "/a/b"
    assert registry.find("/a/c/d", "GET").path_value == "c/d"
    assert registry.find("/a/", "GET") is None
    assert registry.find("/a/b", "POST") is None
    assert registry.find("/a/b", "HEAD").route.path == "/a/b"
    assert (registry.methods("/a/b"), registry.methods("/a/zz"), registry.methods("/b")) == (["GET"], ["GET"], [])


def test_every_route_of_a_server_has_a_scope_and_public_ones_are_known():
    routes = make_app(FakeEngine()).context.registry.routes()
    public = {route.path for route in routes if route.scope is AuthScope.PUBLIC}
    assert public == {"/livez", "/readyz", "/health", "/version", "/openapi.json"}
