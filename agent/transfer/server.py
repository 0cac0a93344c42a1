"""Serves blob bytes to the fleet: HTTP/1.1 ranges over mutual TLS 1.3.

hypercorn's trio worker owns sockets, keep-alive and header limits; the application behind it is the function below. Who may
connect is decided by TLS: a client without a certificate of the fleet CA never reaches the application.

Bytes leave in 64 KiB writes, each awaited, so that one transfer never holds the event loop (0.4 to 0.8 ms of
loop delay at 64 KiB, up to 3.5 at 256 KiB). A slow client cannot hold a slot for ever: hypercorn shields its writes from
cancellation, so it is the kernel that ends a connection which took nothing for `STALL_S` (TCP_USER_TIMEOUT).
"""

import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol, cast

import structlog
import trio

from agent.errors import SettingsError
from agent.formats.model import Digest
from agent.transfer.http import MAX_HEAD_BYTES, PEERS_HEADER, PING, Request, content_range, parse_request

log = structlog.get_logger()

WRITE_BYTES: Final = 64 << 10
READ_BYTES: Final = 512 << 10
"""What is read at once: a read is a hop to a thread and back, which costs as much as writing 64 KiB."""
STALL_S: Final = 15
KEEP_ALIVE_S: Final = 120
"""Peers keep connections open to save the TLS handshake (2 round trips and about 1 ms of CPU on each side)."""
HANDSHAKE_S: Final = 5
SLOTS: Final = 32
"""Uploads at a time. More share the same link and the same core, and each only gets slower; they are sent elsewhere."""
SLOTS_A_HOST: Final = 16
"""Uploads to one address at a time, so that one node's background fetch does not take every slot."""
RETRY_AFTER_S: Final = 1
_HINTS: Final = 8
_BACKLOG: Final = 128

_Send = Callable[[dict[str, Any]], Awaitable[None]]
_Receive = Callable[[], Awaitable[dict[str, Any]]]


class BlobReader(Protocol):
    """Where served bytes come from; verified before they were kept."""

    def blob_size(self, blob: Digest) -> int | None:
        """Bytes of the whole blob; None if nothing of it is here."""

    def has_range(self, blob: Digest, start: int, stop: int) -> bool:
        """Whether all of [start, stop) is held now."""

    async def read_range(self, blob: Digest, start: int, stop: int) -> bytes | None:
        """The bytes; None if they are not (any more) all held. At most `READ_BYTES` are asked at a time."""


class DataServer:
    """The running server; made by `open_data_server`."""

    def __init__(self, reader: BlobReader, slots: int, slots_a_host: int, hint: Callable[[Digest], list[str]]) -> None:
        self._reader = reader
        self._hint = hint
        self._slots_a_host = slots_a_host
        self._hosts: dict[str, int] = {}
        self.slots = slots
        self.active = 0
        self.served_bytes = 0
        self.refused_busy = 0
        self.address = ""
        self.port = 0

    def load(self) -> tuple[int, int]:
        """(uploads now, upload slots), for the swarm to tell others."""
        return self.active, self.slots

    async def __call__(self, scope: dict[str, Any], receive: _Receive, send: _Send) -> None:
        """The ASGI application."""
        if scope["type"] == "lifespan":
            await _run_lifespan(receive, send)
        elif scope["type"] == "http":
            try:
                await self._serve(scope, send)
            except _Aborted:
                raise  # hypercorn closes the connection: the client sees a short body
            except Exception:
                log.exception("upload_failed", path=scope["path"][:100])
                raise

    async def _serve(self, scope: dict[str, Any], send: _Send) -> None:
        if scope["method"] != "GET":
            await _answer(send, 405, [(b"allow", b"GET")])
            return
        if scope["path"] == PING:
            await _answer(send, 204)
            return
        request = parse_request(scope["path"], scope["headers"])
        if isinstance(request, int):
            await _answer(send, request)
            return
        size = self._reader.blob_size(request.blob)
        if size is None:
            await _answer(send, 404)
            return
        stop = min(size, request.stop or size)
        if request.start >= stop or not self._reader.has_range(request.blob, request.start, stop):
            await _answer(send, 416, [(b"content-range", f"bytes */{size}".encode())])
            return
        host = (scope.get("client") or ("", 0))[0]
        if self.active >= self.slots or self._hosts.get(host, 0) >= self._slots_a_host:
            self.refused_busy += 1
            peers = ",".join(self._hint(request.blob)[:_HINTS]).encode()
            await _answer(send, 503, [(b"retry-after", str(RETRY_AFTER_S).encode()), (PEERS_HEADER.encode(), peers)])
            return
        self.active += 1
        self._hosts[host] = self._hosts.get(host, 0) + 1
        try:
            await self._upload(request, stop, size, send)
        finally:
            self.active -= 1
            self._hosts[host] -= 1
            if not self._hosts[host]:
                del self._hosts[host]

    async def _upload(self, request: Request, stop: int, size: int, send: _Send) -> None:
        at = request.start
        data = await self._reader.read_range(request.blob, at, min(stop, at + READ_BYTES))
        if data is None:
            await _answer(send, 416, [(b"content-range", f"bytes */{size}".encode())])
            return
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"content-length", str(stop - at).encode()),
            (b"content-range", content_range(at, stop, size)),
        ]
        await send({"type": "http.response.start", "status": 206, "headers": headers})
        while True:
            if data is None or len(data) != min(stop - at, READ_BYTES):
                log.info("upload_cut_short", blob=request.blob, offset=at)  # evicted meanwhile
                raise _Aborted
            for start in range(0, len(data), WRITE_BYTES):
                part = data[start : start + WRITE_BYTES]
                at += len(part)
                await send({"type": "http.response.body", "body": part, "more_body": at < stop})
                self.served_bytes += len(part)
                await trio.lowlevel.checkpoint()
            if at >= stop:
                break
            data = await self._reader.read_range(request.blob, at, min(stop, at + READ_BYTES))
        log.debug("upload_done", blob=request.blob, start=request.start, stop=stop)


class _Aborted(Exception):
    pass


async def _run_lifespan(receive: _Receive, send: _Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _answer(send: _Send, status: int, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [*(headers or []), (b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def split_listen(listen: str) -> tuple[str, int]:
    """(host, port) of `HOST:PORT`, `[V6]:PORT` or `:PORT`.

    Raises:
        SettingsError: it is none of them.
    """
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) >= 1 << 16:
        raise SettingsError(f"--data-listen {listen} is not of the form HOST:PORT")
    return host.strip("[]") or "0.0.0.0", int(port)


def _bind(listen: str) -> socket.socket:
    host, port = split_listen(listen)
    try:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit these.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_S * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as exc:
        listener.close()
        raise SettingsError(f"cannot listen on {listen}: {exc.strerror}; choose another with --data-listen") from exc
    return listener


@asynccontextmanager
async def open_data_server(
    listen: str,
    context: ssl.SSLContext,
    reader: BlobReader,
    *,
    slots: int = SLOTS,
    slots_a_host: int = SLOTS_A_HOST,
    hint: Callable[[Digest], list[str]] = lambda _blob: [],
) -> AsyncIterator[DataServer]:
    """Serve on `listen` (`HOST:PORT`, port 0: any) until the block ends.

    Args:
        listen: where.
        context: `FleetCredentials.server_context`.
        reader: where the bytes are.
        slots: uploads at a time.
        slots_a_host: of these, to one address.
        hint: peers to name in a busy answer, for instance the blob's other holders.

    Raises:
        SettingsError: the address cannot be used.
    """
    from hypercorn.config import Config, Sockets  # noqa: PLC0415 - 5 MB that a node without a fleet does not need
    from hypercorn.trio.run import worker_serve  # noqa: PLC0415
    from hypercorn.utils import wrap_app  # noqa: PLC0415

    class FleetConfig(Config):
        def create_ssl_context(self) -> ssl.SSLContext:
            return context

    context.set_alpn_protocols(["http/1.1"])  # HTTP/2 would only add framing to one response a connection
    listener = _bind(listen)
    config = FleetConfig()
    config.errorlog = None
    config.accesslog = None
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.keep_alive_max_requests = 1 << 30
    config.ssl_handshake_timeout = HANDSHAKE_S
    config.h11_max_incomplete_size = MAX_HEAD_BYTES
    config.graceful_timeout = 0.2
    config.include_server_header = False
    config.include_date_header = False
    server = DataServer(reader, slots, slots_a_host, hint)
    name = listener.getsockname()
    server.address, server.port = f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}", name[1]
    done = trio.Event()
    async with trio.open_nursery() as nursery:

        async def serve(task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
            await worker_serve(
                wrap_app(cast("Any", server), 0, "asgi"),  # hypercorn gives each ASGI dict a type of its own
                config,
                sockets=Sockets([listener], [], []),
                shutdown_trigger=done.wait,
                task_status=task_status,
            )

        await nursery.start(serve)
        try:
            yield server
        finally:
            done.set()
            nursery.cancel_scope.deadline = trio.current_time() + 1
    listener.close()
