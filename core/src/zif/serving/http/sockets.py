"""The one socket that a server listens on, and its TLS. Opened before anything else, so that faults are seen early."""

import contextlib
import errno
import os
import socket
import ssl
import stat
from pathlib import Path

from zif.errors import ConfigError
from zif.serving.http.settings import ServeSettings

_BACKLOG = 2048
_MAX_UNSENT_BYTES = 2**17
"""What the system takes of a connection's answer beyond what is on its way: TCP_NOTSENT_LOWAT, tcp(7)."""

_MAX_UDS_BYTES = 107
"""The longest path of a Unix socket: `sun_path` less its end, unix(7)."""


def open_socket(settings: ServeSettings) -> socket.socket:
    """Return a listening socket. Raises `ConfigError` when the address is taken, unknown or not allowed."""
    return _open_unix(settings.uds) if settings.uds is not None else _open_tcp(settings.host, settings.port)


def close_socket(listener: socket.socket, settings: ServeSettings) -> None:
    """Close a listener and remove its file where it has one."""
    listener.close()
    if settings.uds is not None:
        with contextlib.suppress(OSError):
            Path(settings.uds).unlink()


def url_of(listener: socket.socket, settings: ServeSettings) -> str:
    """Return where the server is reached, for people."""
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    host, port = listener.getsockname()[:2]
    scheme = "http" if settings.tls_certificate is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def tls_context(settings: ServeSettings) -> ssl.SSLContext | None:
    """Return the server's side of TLS, None where it has none. Raises `ConfigError` when the files cannot be used."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    for name in ("tls_certificate", "tls_key"):
        path = getattr(settings, name)
        try:
            with Path(path).open("rb"):
                pass
        except OSError as error:
            raise ConfigError(f"cannot read {name}={path!r}: {error.strerror}; check path and permissions") from error
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password=_no_password)
    except (ssl.SSLError, ConfigError) as error:
        raise ConfigError(
            f"tls_certificate={settings.tls_certificate!r} and tls_key={settings.tls_key!r} are no certificate in PEM "
            f"with its own key, without a password: {error}"
        ) from error
    return context


def _no_password() -> str:
    raise ConfigError("the key has a password")


def _open_tcp(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"host={host!r} is no address of this machine: {error.strerror or error}") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. What a client does not read would else lie in the system's memory, megabytes for each.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MAX_UNSENT_BYTES)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        advice = "choose another with --port, or 0 for any free one"
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port={port!r} of {host!r} is in use; {advice}") from error
        raise ConfigError(f"cannot listen on host={host!r} port={port!r}: {error.strerror}; {advice}") from error
    return listener


def _open_unix(path: str) -> socket.socket:
    if len(os.fsencode(path)) > _MAX_UDS_BYTES:
        raise ConfigError(f"uds={path!r} is longer than {_MAX_UDS_BYTES} bytes; choose a shorter path")
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Whoever may write to the socket may ask: its owner, until its owner says otherwise.
    mask = os.umask(0o177)
    try:
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on uds={path!r}: {error.strerror}; choose another path") from error
    finally:
        os.umask(mask)
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens on. Raises `ConfigError` for one that is in use, or another file."""
    try:
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            raise ConfigError(f"uds={path!r} is a file and no socket; choose another path")
    except OSError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink(missing_ok=True)
            return
        except OSError as error:
            raise ConfigError(f"cannot use uds={path!r}: {error.strerror}; choose another path") from error
    raise ConfigError(f"uds={path!r} is in use; choose another path")
