"""Fetches blob bytes from peers: HTTP/1.1 ranges over mutual TLS, connections kept per peer.

Before any byte is used the peer id that the server's certificate proves is compared with the holder's: an address that now
belongs to another node, or a node that answers for another, is refused.
"""

import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, nullcontext
from typing import Final

import httpx
import structlog
import trio

from agent.errors import SourceRefused, SourceUnavailable
from agent.formats.model import Digest
from agent.swarm.fleet import peer_id_in
from agent.swarm.members import Holder
from agent.transfer.http import BLOBS, PEERS_HEADER, PING, join_ranges, parse_content_range, range_header

log = structlog.get_logger()

CHUNK: Final = 64 << 10
CONNECT_S: Final = 3.0
IDLE_S: Final = 10.0
"""A peer that sends nothing for this long is given up; the resolver hedges much earlier."""
KEEP_ALIVE_S: Final = 100.0
"""Less than the server's, so that a connection is never used just when the server closes it."""
CONNECTIONS: Final = 256
IDLE_CONNECTIONS: Final = 64
_MAX_RETRY_AFTER_S: Final = 60.0


class PeerBusy(SourceUnavailable):
    """All upload slots of the peer are taken; `peers` have been served lately and may be free."""

    def __init__(self, message: str, *, source: str, retry_after_s: float, peers: tuple[str, ...]) -> None:
        super().__init__(message, source=source, retry_after_s=retry_after_s)
        self.peers = peers


class PeerClient:
    """Talks to the data servers of peers; made by `open_peer_client`."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
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
            yield _nothing()
            return
        async with self._open(holder, blob, blob_size, joined[0]) as first:

            async def stream() -> AsyncGenerator[tuple[int, bytes], None]:
                for number, extent in enumerate(joined):
                    opened = nullcontext(first) if number == 0 else self._open(holder, blob, blob_size, extent)
                    async with opened as response:
                        async for item in self._body(holder, response, extent):
                            yield item

            async with aclosing(stream()) as items:
                yield items

    @asynccontextmanager
    async def _open(self, holder: Holder, blob: Digest, blob_size: int, extent: tuple[int, int]) -> AsyncIterator[httpx.Response]:
        url = f"https://{holder.data_address}{BLOBS}{blob}"
        try:
            async with self._client.stream("GET", url, headers={"Range": range_header(*extent)}) as response:
                self._check_peer(response, holder.peer_id)
                _check_answer(response, holder.peer_id, blob, blob_size, extent)
                yield response
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, OSError) as exc:
            raise _unavailable(holder, exc) from exc

    async def _body(self, holder: Holder, response: httpx.Response, extent: tuple[int, int]) -> AsyncIterator[tuple[int, bytes]]:
        at, stop = extent
        try:
            async for data in response.aiter_raw():
                for start in range(0, len(data), CHUNK):
                    part = data[start : start + CHUNK]
                    if at + len(part) > stop:
                        raise SourceRefused(f"peer {holder.peer_id} sends more than it was asked for", source=holder.peer_id)
                    self.received_bytes += len(part)
                    yield at, part
                    at += len(part)
        except (httpx.HTTPError, ssl.SSLError, OSError) as exc:
            raise _unavailable(holder, exc) from exc
        if at != stop:
            raise SourceUnavailable(f"peer {holder.peer_id} ended {stop - at} bytes early", source=holder.peer_id)

    def _check_peer(self, response: httpx.Response, peer_id: str) -> None:
        stream = response.extensions["network_stream"]
        certificate = stream.get_extra_info("ssl_object").getpeercert(binary_form=True)
        if certificate not in self._proven:
            if len(self._proven) > CONNECTIONS:
                self._proven.clear()
            self._proven[certificate] = peer_id_in(certificate)
        proven = self._proven[certificate]
        if proven != peer_id:
            raise SourceRefused(f"the node at {response.url.netloc.decode()} is peer {proven}, not {peer_id}", source=peer_id)

    async def warm(self, peer_id: str, data_address: str) -> None:
        """Open a connection to a peer, so that the first fetch does not wait for a TLS handshake. Failure is no matter."""
        try:
            response = await self._client.get(f"https://{data_address}{PING}")
            self._check_peer(response, peer_id)
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, OSError, SourceRefused) as exc:
            log.debug("peer_not_warmed", peer=peer_id, data_address=data_address, reason=str(exc))


async def _nothing() -> AsyncIterator[tuple[int, bytes]]:
    items: tuple[tuple[int, bytes], ...] = ()
    for item in items:
        yield item


def _unavailable(holder: Holder, exc: Exception) -> SourceUnavailable:
    what = f"{type(exc).__name__} {exc}".strip()
    return SourceUnavailable(f"peer {holder.peer_id} at {holder.data_address} failed: {what}", source=holder.peer_id)


def _check_answer(response: httpx.Response, peer_id: str, blob: Digest, blob_size: int, extent: tuple[int, int]) -> None:
    status = response.status_code
    if status == 206:
        if parse_content_range(response.headers.get("content-range", "")) != (*extent, blob_size):
            raise SourceRefused(f"peer {peer_id} answers another range of {blob} than asked", source=peer_id, status=status)
        return
    if status == 503:
        text = response.headers.get("retry-after", "1")
        wait_s = min(float(text), _MAX_RETRY_AFTER_S) if text.isdecimal() and len(text) < 6 else 1.0
        peers = tuple(name for name in response.headers.get(PEERS_HEADER, "")[:1024].split(",") if name)
        raise PeerBusy(f"peer {peer_id} is busy", source=peer_id, retry_after_s=wait_s, peers=peers)
    if status in {404, 416}:
        raise SourceRefused(f"peer {peer_id} does not hold the asked range of {blob}", source=peer_id, status=status)
    raise SourceRefused(f"peer {peer_id} answers {status}", source=peer_id, status=status)


@asynccontextmanager
async def open_peer_client(context: ssl.SSLContext) -> AsyncIterator[PeerClient]:
    """A client with `FleetCredentials.client_context`; its connections are closed when the block ends."""
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=IDLE_CONNECTIONS, keepalive_expiry=KEEP_ALIVE_S)
    timeout = httpx.Timeout(IDLE_S, connect=CONNECT_S)
    # trust_env: peers are never behind an HTTP proxy, and a proxy variable must not send them there.
    async with httpx.AsyncClient(verify=context, limits=limits, timeout=timeout, trust_env=False) as client:
        yield PeerClient(client)
