"""Who may ask for what: keys, their scopes, and the cache salt that is derived from a key.

Keys are kept as SHA-256 digests only. A given key is compared with every digest in constant time, so that the time of
an answer tells neither which key was near nor where it differed.
"""

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from zif.errors import ConfigError
from zif.serving.http.errors import ApiError, FailureKind
from zif.serving.http.exchange import AuthScope, Caller, Headers

_KEY = re.compile(r"[!-~]{8,512}")
_TENANT = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SALT_LABEL, _TENANT_LABEL = b"zif cache salt", b"zif tenant"
_MAX_KEYS = 10_000
_MAX_CANDIDATES = 4
_DEFAULT_SCOPES = frozenset({AuthScope.INFERENCE, AuthScope.METRICS})
_WITHOUT_KEYS = frozenset({AuthScope.PUBLIC, AuthScope.INFERENCE, AuthScope.METRICS})


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key as it is kept: its SHA-256 digest, what it allows, and the caller that it makes."""

    digest: bytes = field(repr=False)
    scopes: frozenset[AuthScope]
    caller: Caller = field(repr=False)


class KeyRing:
    """The keys of a server; empty when everybody who can connect may ask."""

    def __init__(self, keys: Sequence[StoredKey] = ()) -> None:
        """Keep the keys. Raises `ConfigError` when one is there twice."""
        if len({key.digest for key in keys}) < len(keys):
            raise ConfigError("an API key is listed twice; remove one of the two")
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def authorize(self, headers: Headers, scope: AuthScope) -> Caller:
        """Return who asks. Raises `ApiError`: no key or a wrong one (401), a key that does not allow this (403)."""
        if scope is AuthScope.PUBLIC:
            return Caller()
        if not self._keys:
            if scope not in _WITHOUT_KEYS:
                raise ApiError(
                    FailureKind.PERMISSION,
                    f"this route needs a key with scope '{scope.value}', and the server has none",
                )
            return Caller()
        key = self._find(headers)
        if key is None:
            raise ApiError(
                FailureKind.AUTHENTICATION,
                "no valid API key: send one as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                code="invalid_api_key",
            )
        if scope not in key.scopes:
            raise ApiError(FailureKind.PERMISSION, f"this API key does not have the scope '{scope.value}'")
        return key.caller

    def _find(self, headers: Headers) -> StoredKey | None:
        given = [value[7:].strip() for value in headers.all("authorization") if value[:7].lower() == "bearer "]
        given += headers.all("x-api-key")
        found = None
        for candidate in given[:_MAX_CANDIDATES]:
            digest = hashlib.sha256(candidate.encode("latin-1")).digest()
            for key in self._keys:
                # No early end: each comparison is made whatever the others gave.
                if hmac.compare_digest(key.digest, digest):
                    found = key
        return found


def parse_keys(lines: Sequence[str]) -> KeyRing:
    """Read keys, one a line: `KEY`, `KEY scopes=inference,admin`, `KEY tenant=NAME`; `#` begins a comment line.

    Without scopes a key has inference and metrics. Keys of one tenant share cached prefixes, others do not. Raises
    `ConfigError` that names the line and never the key.
    """
    keys: list[StoredKey] = []
    salts: dict[str, str] = {}
    if len(lines) > _MAX_KEYS:
        raise ConfigError(f"{len(lines)} lines of API keys exceed {_MAX_KEYS}; remove some")
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if not _KEY.fullmatch(words[0]):
            raise ConfigError(f"line {number} of the API keys: a key has 8 to 512 printable ASCII characters")
        scopes, tenant = _attributes(words[1:], number)
        key = words[0].encode()
        name = tenant or "key-" + hmac.digest(key, _TENANT_LABEL, "sha256").hex()[:8]
        # A tenant's first key gives its salt, so that its other keys find the same prefixes.
        salt = salts.setdefault(name, hmac.digest(key, _SALT_LABEL, "sha256").hex()[:32])
        keys.append(StoredKey(hashlib.sha256(key).digest(), scopes, Caller(name, salt)))
    return KeyRing(keys)


def _attributes(words: Sequence[str], number: int) -> tuple[frozenset[AuthScope], str]:
    scopes, tenant = _DEFAULT_SCOPES, ""
    known = [scope.value for scope in AuthScope]
    for word in words:
        name, _, value = word.partition("=")
        if name == "scopes" and value and all(part in known for part in value.split(",")):
            scopes = frozenset(AuthScope(part) for part in value.split(","))
        elif name == "tenant" and _TENANT.fullmatch(value):
            tenant = value
        else:
            raise ConfigError(
                f"line {number} of the API keys: after a key come scopes={','.join(known[1:])} and tenant=NAME "
                "(up to 64 letters, digits, '_', '.', '-') and nothing else"
            )
    return scopes, tenant
