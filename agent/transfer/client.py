"""Fetches blob bytes from peers: HTTP/1.1 ranges over mutual TLS, connections kept per peer.

Written on a TLS stream of our own and not on httpx, for three reasons. The peer id that the server's certificate proves is compared
with the holder's before even a request is sent: an address that now belongs to another node, or a node that answers for
another, never learns what is wanted. Bytes go from the TLS stream to the caller without further layers, at about half of
httpx's CPU time. And a caller may stop early, which leaves httpx's nested generators behind.
"""

import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Final

import structlog
import trio

from agent.errors import SourceRefused, SourceUnavailable
from agent.formats.model import Digest
from agent.swarm.fleet import peer_id_in
from agent.swarm.members import Holder
from agent.transfer.http import (
    BLOBS,
    MAX_HEAD_BYTES,
    PEERS_HEADER,
    PING,
    Answer,
    join_ranges,
    parse_answer,
    parse_content_range,
    request_head,
)
from agent.transfer.tls import TlsStream

log = structlog.get_logger()

CHUNK: Final = 64 << 10
CONNECT_S: Final = 3.0
IDLE_S: Final = 10.0
"""A peer that sends nothing for this long is given up; the resolver hedges much earlier."""
KEEP_ALIVE_S: Final = 100.0
"""Less than the server's, so that a connection is rarely used just when the server closes it."""
IDLE_A_PEER: Final = 8
"""Connections kept open to one peer: about what a node has in flight to it."""
IDLE_CONNECTIONS: Final = 128
_MAX_RETRY_AFTER_S: Final = 60.0
_BROKEN: Final = (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError, OSError, EOFError)


class PeerBusy(SourceUnavailable):
    """All upload slots of the peer are taken; `peers` have been served lately and may be free."""

    def __init__(self, message: str, *, source: str, retry_after_s: float, peers: tuple[str, ...]) -> None:
        super().__init__(message, source=source, retry_after_s=retry_after_s)
        self.peers = peers


class _Connection:
    """A TLS connection to a peer whose id is proven."""

    def __init__(self, stream: TlsStream) -> None:
        self._stream = stream
        self._buffer = b""
        self.idle_since = 0.0

    async def ask(self, head: bytes) -> Answer:
        """Send a request and read the answer's head.

        Raises:
            EOFError: the other end closed without a word.
        """
        await self._stream.send_all(head)
        received = self._buffer
        while (end := received.find(b"\r\n\r\n")) < 0:
            if len(received) > MAX_HEAD_BYTES:
                raise SourceRefused("the answer's head is too long")
            received += await self._stream.receive(CHUNK)
        self._buffer = received[end + 4 :]
        answer = parse_answer(received[:end])
        if answer is None:
            raise SourceRefused("the answer is not HTTP as a data server speaks it")
        return answer

    async def read(self, most: int) -> bytes:
        """Some bytes of the body.

        Raises:
            EOFError: the other end closed.
        """
        if self._buffer:
            data, self._buffer = self._buffer[:most], self._buffer[most:]
            await trio.lowlevel.checkpoint()
            return data
        # What follows costs more for each block than for each byte: a little patience makes whole ones of those that trickle in.
        data = await self._stream.receive(most)
        while len(data) < most:
            try:
                data += await self._stream.receive(most - len(data))
            except EOFError:
                break
        return data

    async def close(self) -> None:
        """Drop the connection."""
        await self._stream.close()


class PeerClient:
    """Talks to the data servers of peers; made by `open_peer_client`."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._idle: dict[tuple[str, str], list[_Connection]] = {}
        self._proven: dict[bytes, str | None] = {}
        self.received_bytes = 0

    @asynccontextmanager
    async def fetch_ranges(
        self, holder: Holder, blob: Digest, blob_size: int, ranges: Sequence[tuple[int, int]]
    ) -> AsyncIterator[AsyncIterator[tuple[int, bytes]]]:
        """Stream the half-open `ranges` of a blob as (blob offset, at most 64 KiB), in ascending order.

        The first request is made on entry, so a refusal is raised there; touching ranges are one request.

        Raises:
            SourceUnavailable: no answer, broken off, or `PeerBusy`.
            SourceRefused: another node than the holder, not held, or an answer that is not the asked range.
        """
        joined = join_ranges(list(ranges))
        if not joined:
            await trio.lowlevel.checkpoint()
            async with aclosing(_nothing()) as items:
                yield items
            return
        connection = await self._request(holder, blob, blob_size, joined[0])
        transfer = _Transfer(connection)
        try:
            async with aclosing(self._stream(transfer, holder, blob, blob_size, joined)) as items:
                yield items
        finally:
            if transfer.is_done:
                await self._keep(holder.peer_id, holder.data_address, transfer.connection)
            else:
                await transfer.connection.close()

    async def _stream(
        self, transfer: "_Transfer", holder: Holder, blob: Digest, blob_size: int, extents: list[tuple[int, int]]
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        for number, (start, stop) in enumerate(extents):
            if number:
                with _naming(holder):
                    with trio.fail_after(IDLE_S):
                        answer = await transfer.connection.ask(_head(holder, blob, (start, stop)))
                _check_answer(answer, holder.peer_id, blob, blob_size, (start, stop))
            at = start
            while at < stop:
                with _naming(holder):
                    with trio.fail_after(IDLE_S):
                        data = await transfer.connection.read(min(CHUNK, stop - at))
                self.received_bytes += len(data)
                yield at, data
                at += len(data)
        transfer.is_done = True

    async def _request(self, holder: Holder, blob: Digest, blob_size: int, extent: tuple[int, int]) -> _Connection:
        """A connection on which the answer to a request for `extent` begins."""
        with _naming(holder):
            head = _head(holder, blob, extent)
            while True:
                connection, is_used = self._take(holder.peer_id, holder.data_address), True
                if connection is None:
                    connection, is_used = await self._connect(holder.peer_id, holder.data_address), False
                try:
                    with trio.fail_after(IDLE_S):
                        answer = await connection.ask(head)
                except _BROKEN:
                    await connection.close()
                    if is_used:
                        continue  # the server had closed it meanwhile; at the latest a new connection decides
                    raise
                except BaseException:
                    await connection.close()
                    raise
                break
            try:
                _check_answer(answer, holder.peer_id, blob, blob_size, extent)
            except (SourceUnavailable, SourceRefused):
                if answer.length:
                    await connection.close()
                else:
                    await self._keep(holder.peer_id, holder.data_address, connection)
                raise
            return connection

    def _take(self, peer_id: str, data_address: str) -> _Connection | None:
        idle = self._idle.get((peer_id, data_address), [])
        return idle.pop() if idle else None

    async def _keep(self, peer_id: str, data_address: str, connection: _Connection) -> None:
        connection.idle_since = trio.current_time()
        self._idle.setdefault((peer_id, data_address), []).append(connection)
        await self._drop_old()

    async def _drop_old(self) -> None:
        """Close connections that are idle for too long, or too many."""
        now, total, dropped = trio.current_time(), 0, list[_Connection]()
        for key, idle in list(self._idle.items()):
            keep = [connection for connection in idle if now - connection.idle_since < KEEP_ALIVE_S][-IDLE_A_PEER:]
            keep = keep if total + len(keep) <= IDLE_CONNECTIONS else []
            total += len(keep)
            dropped += [connection for connection in idle if connection not in keep]
            self._idle[key] = keep
            if not keep:
                del self._idle[key]
        for connection in dropped:
            await connection.close()

    async def _connect(self, peer_id: str, data_address: str) -> _Connection:
        host, _, port = data_address.rpartition(":")
        if not port.isdecimal() or int(port) >= 1 << 16:
            raise OSError(f"{data_address!r} is not HOST:PORT")
        with trio.fail_after(CONNECT_S):
            tcp = await trio.open_tcp_stream(host.strip("[]"), int(port))
            stream = TlsStream(tcp, self._context)
            try:
                await stream.handshake()
                self._check_peer(stream, peer_id, data_address)
            except BaseException:
                await stream.close()
                raise
        return _Connection(stream)

    def _check_peer(self, stream: TlsStream, peer_id: str, data_address: str) -> None:
        certificate = stream.certificate
        if certificate is None:
            raise SourceRefused(f"the node at {data_address} shows no certificate", source=peer_id)
        if certificate not in self._proven:
            if len(self._proven) > IDLE_CONNECTIONS:
                self._proven.clear()
            self._proven[certificate] = peer_id_in(certificate)
        if self._proven[certificate] != peer_id:
            proven = self._proven[certificate]
            raise SourceRefused(f"the node at {data_address} is peer {proven}, not {peer_id}", source=peer_id)

    async def warm(self, peer_id: str, data_address: str) -> None:
        """Open a connection to a peer, so that the first fetch does not wait for a TLS handshake. Failure is no matter."""
        try:
            connection = await self._connect(peer_id, data_address)
            with trio.fail_after(IDLE_S):
                await connection.ask(request_head(PING, data_address))
            await self._keep(peer_id, data_address, connection)
        except (*_BROKEN, trio.TooSlowError, UnicodeError, SourceRefused) as exc:
            log.debug("peer_not_warmed", peer=peer_id, data_address=data_address, reason=str(exc))

    async def aclose(self) -> None:
        """Close all idle connections."""
        for idle in self._idle.values():
            for connection in idle:
                await connection.close()
        self._idle.clear()


class _Transfer:
    """One use of a connection; `is_done` when the last byte was read, so that the connection can serve again."""

    def __init__(self, connection: _Connection) -> None:
        self.connection = connection
        self.is_done = False


class _naming:  # noqa: N801 - used like a function
    """Turns what breaks while talking to a peer into `SourceUnavailable` that names it."""

    def __init__(self, holder: Holder) -> None:
        self._holder = holder

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, exc: BaseException | None, _trace: object) -> None:
        name = f"peer {self._holder.peer_id} at {self._holder.data_address}"
        if isinstance(exc, trio.TooSlowError):
            raise SourceUnavailable(f"{name} does not answer", source=self._holder.peer_id) from exc
        if isinstance(exc, (*_BROKEN, UnicodeError)):
            what = f"{type(exc).__name__} {exc}".strip()
            raise SourceUnavailable(f"{name} failed: {what}", source=self._holder.peer_id) from exc


async def _nothing() -> AsyncGenerator[tuple[int, bytes], None]:
    items: tuple[tuple[int, bytes], ...] = ()
    for item in items:
        yield item


def _head(holder: Holder, blob: Digest, extent: tuple[int, int]) -> bytes:
    return request_head(f"{BLOBS}{blob}", holder.data_address, extent)


def _check_answer(answer: Answer, peer_id: str, blob: Digest, blob_size: int, extent: tuple[int, int]) -> None:
    status = answer.status
    if status == 206:
        given = parse_content_range(answer.headers.get("content-range", ""))
        if given != (*extent, blob_size) or answer.length != extent[1] - extent[0]:
            raise SourceRefused(f"peer {peer_id} answers another range of {blob} than asked", source=peer_id, status=status)
        return
    if status == 503:
        text = answer.headers.get("retry-after", "1")
        wait_s = min(float(text), _MAX_RETRY_AFTER_S) if text.isdecimal() and len(text) < 6 else 1.0
        peers = tuple(name for name in answer.headers.get(PEERS_HEADER, "")[:1024].split(",") if name)
        raise PeerBusy(f"peer {peer_id} is busy", source=peer_id, retry_after_s=wait_s, peers=peers)
    if status in {404, 416}:
        raise SourceRefused(f"peer {peer_id} does not hold the asked range of {blob}", source=peer_id, status=status)
    raise SourceRefused(f"peer {peer_id} answers {status}", source=peer_id, status=status)


@asynccontextmanager
async def open_peer_client(context: ssl.SSLContext) -> AsyncIterator[PeerClient]:
    """A client with `FleetCredentials.client_context`; its connections are closed when the block ends."""
    client = PeerClient(context)
    try:
        yield client
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await client.aclose()
