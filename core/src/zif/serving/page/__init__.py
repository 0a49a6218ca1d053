"""The playground at `/`: three files that are served as they are. No build, and no request to any other host."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from zif.serving.http.exchange import AuthScope, Request, Response
from zif.serving.http.registry import Route, ServerContext

_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
"""Content Security Policy, level 3 (W3C): only our own files run, and they talk to this server only."""

_HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}


@dataclass(frozen=True, slots=True)
class _PageFile:
    """One file of the page, read once. Browsers ask whether it is still the one that they have (RFC 9110, 13.1.2)."""

    body: bytes
    content_type: str
    tag: str

    async def answer(self, request: Request[None], context: ServerContext) -> Response:
        """Answer with the file, or with 304 when the browser has it."""
        headers = {**_HEADERS, "etag": self.tag}
        known = request.headers.get("if-none-match") or ""
        if self.tag in (entry.strip().removeprefix("W/") for entry in known.split(",")):
            return Response(b"", 304, self.content_type, headers)
        return Response(self.body, content_type=self.content_type, headers=headers)


def page_routes() -> list[Route]:
    """Return the routes of the page. They are public: what the page asks for is not."""
    return [_route(path, *described) for path, described in _FILES.items()]


def _route(path: str, name: str, content_type: str) -> Route:
    body = files(__package__).joinpath(name).read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    handler = _PageFile(body, content_type, tag).answer
    return Route(path, "GET", AuthScope.PUBLIC, handler, summary=f"The web page: {name}", hidden=True)
