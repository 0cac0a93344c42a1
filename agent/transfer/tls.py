"""The client's TLS connection to a peer, on the standard library's `ssl.SSLObject`.

`trio.SSLStream` gives one record of 16 KiB a call, and a call costs more than decrypting the record. Here everything that has
arrived is decrypted in one step. One task uses a connection at a time.
"""

import ssl
from typing import Final

import trio

RECEIVE: Final = 256 << 10
"""Bytes taken from the socket at once: 16 records."""


class TlsStream:
    """A connection over which TLS is spoken; `handshake` first."""

    def __init__(self, tcp: trio.SocketStream, context: ssl.SSLContext) -> None:
        self._tcp = tcp
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing)

    async def handshake(self) -> None:
        """Prove each end to the other.

        Raises:
            ssl.SSLError: the other end is not what the context demands.
            EOFError: it closed.
            OSError, trio.BrokenResourceError: the connection broke.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLError:
                await self._flush()  # the alert says why
                raise
            else:
                await self._flush()
                return

    @property
    def certificate(self) -> bytes | None:
        """The other end's, in DER."""
        return self._tls.getpeercert(binary_form=True)

    async def send_all(self, data: bytes) -> None:
        """Send all of `data`. Raises as `handshake`."""
        self._tls.write(data)
        await self._flush()

    async def receive(self, most: int) -> bytes:
        """What has come, at least one byte and at most `most`.

        Raises:
            EOFError: the other end closed, also without TLS's own word for it: every answer says how long it is.
            ssl.SSLError, OSError, trio.BrokenResourceError: the connection broke.
        """
        parts: list[bytes] = []
        size = 0
        while True:
            try:
                while size < most:
                    data = self._tls.read(most - size)
                    if not data:
                        break
                    parts.append(data)
                    size += len(data)
            except ssl.SSLWantReadError:
                pass
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                if not parts:
                    raise EOFError("closed by the peer") from None
            if self._outgoing.pending:  # an answer to a key update
                await self._flush()
            if parts:
                await trio.lowlevel.checkpoint()
                return parts[0] if len(parts) == 1 else b"".join(parts)
            await self._fill()

    async def _fill(self) -> None:
        data = await self._tcp.receive_some(RECEIVE)
        if not data:
            raise EOFError("closed by the peer")
        self._incoming.write(data)

    async def _flush(self) -> None:
        if data := self._outgoing.read():
            await self._tcp.send_all(data)

    async def close(self) -> None:
        """Drop the connection without a word; what was asked for has a length of its own."""
        await trio.aclose_forcefully(self._tcp)
