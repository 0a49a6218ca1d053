"""A connection until its TLS handshake is done: counted and timed like those that follow.

asyncio tells a server of a TLS connection only after the handshake, so that any number of clients could stay in it,
each for a minute, outside of every limit. Here a connection is plain until `TlsGate` has counted it.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, cast

from zif.serving.http.settings import ServeSettings


class TlsGate(asyncio.Protocol):
    """Makes the handshake, then hands the connection to a protocol of HTTP. Attributes are set by `tls_protocol`.

    Stands in uvicorn's set of connections meanwhile, for which it has `transport` and `shutdown`.
    """

    then: Callable[..., asyncio.Protocol]
    context: ssl.SSLContext
    limits: ServeSettings
    max_connections: int

    transport: asyncio.Transport

    def __init__(self, **given: Any) -> None:
        self._given = given
        self._connections: set[Any] = given["server_state"].connections
        self._early: list[bytes] = []
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if len(self._connections) >= self.max_connections:
            self.transport.abort()
            return
        self._connections.add(self)
        self.transport.pause_reading()  # until TLS reads
        self._task = asyncio.get_running_loop().create_task(self._shake_hands())

    def data_received(self, data: bytes) -> None:
        """Keep what came in one piece with the end of the handshake."""
        self._early.append(data)

    def shutdown(self) -> None:
        """End the connection; nothing has been asked yet."""
        if self._task is not None:
            self._task.cancel()
        self.transport.abort()

    async def _shake_hands(self) -> None:
        limits = self.limits
        try:
            encrypted = await asyncio.get_running_loop().start_tls(
                self.transport,
                self,
                self.context,
                server_side=True,
                ssl_handshake_timeout=limits.header_timeout_s,
                ssl_shutdown_timeout=limits.write_timeout_s,
            )
        except OSError:  # no TLS, too slow, or gone: nobody is there who could be told
            return
        finally:
            self._connections.discard(self)
        if encrypted is None or encrypted.is_closing():
            return
        protocol = self.then(**self._given)
        encrypted.set_protocol(protocol)
        protocol.connection_made(encrypted)
        for data in self._early:
            protocol.data_received(data)


def tls_protocol(
    then: type[asyncio.Protocol], context: ssl.SSLContext, settings: ServeSettings, max_connections: int
) -> type[asyncio.Protocol]:
    """Return the protocol class of connections that become `then` after their handshake."""
    bound = {"then": then, "context": context, "limits": settings, "max_connections": max_connections}
    return type("BoundTlsGate", (TlsGate,), bound)
