"""Which names a server answers to: the guard against pages of other sites that reach it through a browser.

A page can point its own name at 127.0.0.1 once it is loaded (DNS rebinding). The browser then takes this server for the
page's own and lets the page read its answers; only the headers `Host` and `Origin` (RFC 9110, 7.2; RFC 6454) still show
the page's name. Where a key is asked for, such a page has none; a browser cannot open a Unix socket; and the names of
an open server are known to its owner only: there every name is answered, unless `allowed_hosts` lists some.
"""

import ipaddress
import re

from zif.serving.http.errors import ApiError, FailureKind
from zif.serving.http.exchange import Headers
from zif.serving.http.settings import ServeSettings

_HOST = re.compile(r"(\[[0-9a-f:.]{2,64}\]|[^:\[\]/@\s]{1,253})(?::[0-9]{0,5})?")
_ORIGIN = re.compile(r"https?://" + _HOST.pattern)
_ANY = "*"


class HostGuard:
    """Knows the names of one server: its own, those of the loopback interface, and those that the settings allow."""

    def __init__(self, settings: ServeSettings, *, has_keys: bool) -> None:
        allowed = settings.host_names()
        is_exposed = settings.is_local() and settings.uds is None and not has_keys
        self._is_open = _ANY in allowed or not (allowed or is_exposed)
        self._names = frozenset((*map(_plain, allowed), _plain(settings.host)))

    def check(self, headers: Headers) -> None:
        """Raise `ApiError` for a request to a name that is none of ours (421), or from a page of one (403).

        No browser leaves `Host` out; programs that do, as HTTP/1.0 allows, are let in.
        """
        if self._is_open:
            return
        if not all(self._knows(_HOST, host) for host in headers.all("host")):
            raise ApiError(
                FailureKind.MISDIRECTED,
                "this server does not answer to the name in the header 'host': ask for localhost, or list the name in "
                "the server's setting allowed_hosts",
                code="unknown_host",
            )
        if not all(self._knows(_ORIGIN, origin) for origin in headers.all("origin")):
            raise ApiError(
                FailureKind.PERMISSION,
                "pages of other sites may not ask this server: list the site's name in its setting allowed_hosts",
                code="unknown_origin",
            )

    def _knows(self, pattern: re.Pattern[str], value: str) -> bool:
        found = pattern.fullmatch(value.lower())
        if found is None:
            return False
        name = _plain(found[1])
        # Names below .localhost belong to the machine itself (RFC 6761, 6.3): nobody else can have one.
        return name in self._names or name == "localhost" or name.endswith(".localhost") or _is_loopback(name)


def _plain(name: str) -> str:
    """Return a name without the brackets of an address and the dot of the root."""
    return name.lower().strip("[]").removesuffix(".")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
