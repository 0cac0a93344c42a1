"""The agent's end: dispatches calls to the functions it was given."""

import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgpack
import structlog
import trio

from agent.errors import ShoalError

log = structlog.get_logger()

MAX_REQUEST: Final = 1 << 20
MAX_CONNECTIONS: Final = 64

Emit = Callable[[dict[str, Any]], Awaitable[None]]
Handler = Callable[[dict[str, Any], Emit], Awaitable[Any]]
"""(arguments, emit a progress event) -> result; anything msgpack can hold."""


@asynccontextmanager
async def open_admin_server(path: Path, handlers: Mapping[str, Handler]) -> AsyncIterator[None]:
    """Serve `handlers` on a unix socket until the block ends. A stale socket is replaced."""
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    await sock.bind(str(temporary))
    os.chmod(temporary, 0o600)
    sock.listen(MAX_CONNECTIONS)
    temporary.replace(path)
    limiter = trio.CapacityLimiter(MAX_CONNECTIONS)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_listeners, partial(_serve, handlers, limiter), [trio.SocketListener(sock)]))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            nursery.cancel_scope.cancel()


async def _serve(handlers: Mapping[str, Handler], limiter: trio.CapacityLimiter, stream: trio.SocketStream) -> None:
    # Calls beyond the limit wait their turn; nothing is dropped.
    async with limiter, stream:
        try:
            with trio.fail_after(10):
                request = await _receive(stream)
            await _answer(handlers, request, stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, ValueError) as exc:
            log.debug("admin_connection_ended", reason=repr(exc))


async def _answer(handlers: Mapping[str, Handler], request: dict[str, Any], stream: trio.SocketStream) -> None:
    lock = trio.Lock()

    async def send(frame: dict[str, Any]) -> None:
        body = msgpack.packb(frame)
        async with lock:
            await stream.send_all(struct.pack("<I", len(body)) + body)

    async def emit(event: dict[str, Any]) -> None:
        await send({"event": event})

    name = str(request.get("call", ""))
    handler = handlers.get(name)
    if handler is None:
        await send({"error": f"this agent knows no call {name!r}; is it older than the command?"})
        return
    result: Any = None
    error = ""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_when_closed, stream, nursery.cancel_scope)
        try:
            result = await handler(request.get("args") or {}, emit)
        except ShoalError as exc:
            error = str(exc)
        except Exception as exc:  # the component's edge: the caller gets a sentence, the log the traceback
            log.exception("admin_call_failed", call=name)
            error = f"{name} failed inside the agent: {exc!r}; its log has the details"
        nursery.cancel_scope.cancel()
    await send({"error": error} if error else {"result": result})


async def _cancel_when_closed(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    try:
        if not await stream.receive_some(1):
            scope.cancel()
    except trio.BrokenResourceError:
        scope.cancel()


async def _receive(stream: trio.SocketStream) -> dict[str, Any]:
    (length,) = struct.unpack("<I", await _exactly(stream, 4))
    if length > MAX_REQUEST:
        raise ValueError(f"request of {length} bytes")
    request = msgpack.unpackb(await _exactly(stream, length))
    if not isinstance(request, dict):
        raise ValueError("request is not a map")
    return request


async def _exactly(stream: trio.SocketStream, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        block = await stream.receive_some(length - len(parts))
        if not block:
            raise ValueError("connection closed inside a request")
        parts += block
    return bytes(parts)
