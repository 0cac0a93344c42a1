"""Connections to registries and the stores behind them: one HTTP exchange, with its stall limits and its errors mapped.

httpx' transport is used without its client: no cookies, no `.netrc`, no automatic redirects, no log lines with signed URLs in
them, and three generators less for every 64 KiB. A body passes through with no copy of ours; httpx and h11 make two.

Nothing here waits for ever: connecting, one read or write, and the time to the response's head are bounded, and a body must
keep up a minimum rate. How long the whole may take is the caller's deadline.
"""

import ssl
import zlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Final, cast

import attrs
import httpcore  # noqa: F401 - httpx imports it at the first request, which then waits 0.1 s
import httpx
import structlog
import trio

from agent.errors import SourceRefused, SourceUnavailable
from agent.registry.hosts import TlsSettings
from agent.registry.ranges import BLOCK_BYTES

log = structlog.get_logger()

_USER_AGENT: Final = "shoal/0.1"
_DRAIN_BYTES: Final = 64 << 10
"""Read up to this much of a body that nobody wants, to keep its connection; for more a new connection is cheaper."""


@attrs.frozen
class StallLimits:
    """How long a server may be silent."""

    connect_s: float = 10.0
    head_s: float = 20.0
    """From the request's last byte to the end of the response's head."""
    read_s: float = 10.0
    """Without a byte of a body."""
    window_s: float = 10.0
    """Time spent waiting for a body after which `window_bytes` must have come, else the server counts as stalled."""
    window_bytes: int = 64 << 10


@attrs.define
class Answer:
    """The head of a response, and its body to be read once or left."""

    status: int
    headers: httpx.Headers
    host: str
    url: str = attrs.field(repr=False)
    _response: httpx.Response = attrs.field(repr=False)
    _limits: StallLimits = attrs.field(repr=False)

    @property
    def content_length(self) -> int | None:
        """Bytes of the body as the head names them, None if it does not."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None

    async def body(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes, at most 64 KiB at once.

        Raises:
            SourceUnavailable: the connection broke, stalled, or ended before the length that the head named.
        """
        limits = self._limits
        waited, window = 0.0, 0
        # the transport hands out async streams only; its type says both kinds
        stream = aiter(cast(AsyncIterable[bytes], self._response.stream))
        is_idle = False
        try:
            while True:
                began = trio.current_time()
                is_idle = False
                try:
                    data = await anext(stream)
                except StopAsyncIteration:
                    return
                except httpx.HTTPError as exc:
                    raise _unavailable(exc, self.host, "while it sent a body") from exc
                is_idle = True
                waited += trio.current_time() - began
                window += len(data)
                if waited > limits.window_s:
                    if window < limits.window_bytes:
                        raise SourceUnavailable(f"{self.host} sent only {window} bytes in {waited:.0f} s", source=self.host)
                    waited, window = 0.0, 0
                if len(data) <= BLOCK_BYTES:
                    yield data
                else:
                    for at in range(0, len(data), BLOCK_BYTES):
                        yield data[at : at + BLOCK_BYTES]
        finally:
            if is_idle:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await self._abandon(stream)

    async def _abandon(self, stream: AsyncIterator[bytes]) -> None:
        """Close the connection in the middle of a body. The library's generators do not close one another, so they are made
        to run into the closed socket; left to the garbage collector they would end at a random moment."""
        await self._response.aclose()
        try:
            while True:
                await anext(stream)
        except (StopAsyncIteration, httpx.HTTPError):
            return

    async def read(self, max_bytes: int) -> bytes:
        """The whole body, decoded if the server compressed it although it was asked not to.

        Raises:
            SourceUnavailable: as `body`.
            SourceRefused: it is longer than `max_bytes`.
        """
        parts, size = [], 0
        async with aclosing(unpacked(self, max_bytes)) as body:
            async for data in body:
                size += len(data)
                if size > max_bytes:
                    raise SourceRefused(f"{self.host} sent more than {max_bytes} bytes", source=self.host, status=self.status)
                parts.append(data)
        return b"".join(parts)

    async def drain(self) -> bytes:
        """Read a short body to its end so that the connection can be used again; gives what came of it, for messages."""
        parts, size = [], 0
        try:
            if (self.content_length or 0) <= _DRAIN_BYTES:
                async with aclosing(self.body()) as body:
                    async for data in body:
                        parts.append(data)
                        size += len(data)
                        if size > _DRAIN_BYTES:
                            break
        except SourceUnavailable as exc:
            log.debug("registry_body_dropped", host=self.host, reason=str(exc))
        finally:
            await self.aclose()
        return b"".join(parts)

    async def aclose(self) -> None:
        """Give the connection back if the body was read to its end, else close it."""
        await self._response.aclose()


async def unpacked(answer: Answer, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body of an answer; one that came gzip-encoded is decoded, up to `max_bytes` and one block.

    Raises:
        SourceUnavailable: as `Answer.body`, or the encoding is broken or another one.
    """
    encoding = answer.headers.get("content-encoding", "identity").strip().lower()
    if encoding in {"identity", ""}:
        async with aclosing(answer.body()) as body:
            async for data in body:
                yield data
        return
    if encoding not in {"gzip", "x-gzip", "deflate"}:
        raise SourceUnavailable(
            f"{answer.host} encoded its answer with {encoding[:20]!r}, which nobody asked for", source=answer.host
        )
    decoder = zlib.decompressobj(47 if encoding != "deflate" else 15)
    size = 0
    try:
        async with aclosing(answer.body()) as body:
            async for data in body:
                rest = data
                while rest and not decoder.eof and size <= max_bytes:
                    block = decoder.decompress(rest, BLOCK_BYTES)
                    rest = decoder.unconsumed_tail
                    size += len(block)
                    yield block
        while not decoder.eof and size <= max_bytes and (block := decoder.decompress(decoder.unconsumed_tail, BLOCK_BYTES)):
            size += len(block)
            yield block
    except zlib.error as exc:
        raise SourceUnavailable(f"{answer.host} sent a broken {encoding} encoding", source=answer.host) from exc
    if not decoder.eof and size <= max_bytes:
        raise SourceUnavailable(f"{answer.host} sent a truncated {encoding} encoding", source=answer.host)


@attrs.define
class Connections:
    """Pools of connections, one for each way to do TLS. Made by `open_connections`."""

    limits: StallLimits
    _stack: AsyncExitStack = attrs.field(repr=False)
    _transports: dict[TlsSettings | None, httpx.AsyncHTTPTransport] = attrs.field(factory=dict, repr=False)
    _lock: trio.Lock = attrs.field(factory=trio.Lock, repr=False)
    _disk: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1), repr=False)

    async def exchange(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        tls: TlsSettings,
        connect_timeout_s: float | None = None,
        body: bytes | AsyncIterator[bytes] | None = None,
    ) -> Answer:
        """Send one request and wait for the response's head. The caller must close the answer.

        Raises:
            SourceUnavailable: no connection, or it broke or stalled.
            SourceRefused: the URL, or our own TLS files, cannot be used.
        """
        limits = self.limits
        timeouts = {
            "connect": connect_timeout_s or limits.connect_s,
            "read": limits.head_s,
            "write": limits.read_s,
            "pool": 2 * limits.head_s,
        }
        try:
            request = httpx.Request(
                method,
                url,
                headers={"User-Agent": _USER_AGENT, "Accept-Encoding": "identity", **headers},
                content=body,
                extensions={"timeout": timeouts},
            )
        except (httpx.InvalidURL, ValueError, TypeError) as exc:
            raise SourceRefused("a registry's URL cannot be used") from exc
        host = request.url.netloc.decode()
        transport = await self._transport(None if request.url.scheme == "http" else tls)
        began = trio.current_time()
        try:
            if body is None:
                # a head that comes byte by byte never trips the read limit
                with trio.fail_after(timeouts["pool"] + timeouts["connect"] + limits.head_s):
                    response = await transport.handle_async_request(request)
            else:
                response = await transport.handle_async_request(request)
        except trio.TooSlowError as exc:
            raise SourceUnavailable(f"{host} did not answer in {trio.current_time() - began:.0f} s", source=host) from exc
        except httpx.ConnectError as exc:
            reason = _reason(exc)
            if isinstance(reason, ssl.SSLCertVerificationError):
                what = reason.verify_message
                raise SourceRefused(f"{host} could not prove who it is ({what}); add its CA to hosts.toml", source=host) from exc
            raise _unavailable(exc, host, "while connecting") from exc
        except httpx.UnsupportedProtocol as exc:
            raise SourceRefused(f"{host}: {exc}", source=host) from exc
        except httpx.HTTPError as exc:
            raise _unavailable(exc, host, "before it answered") from exc
        timeouts["read"] = limits.read_s  # the transport looks it up anew for each read: from here on it is the body's limit
        log.debug(
            "registry_exchange",
            method=method,
            host=host,
            status=response.status_code,
            elapsed_s=round(trio.current_time() - began, 4),
        )
        return Answer(response.status_code, response.headers, host, url, response, limits)

    async def _transport(self, tls: TlsSettings | None) -> httpx.AsyncHTTPTransport:
        known = self._transports.get(tls)
        if known is not None:
            return known
        async with self._lock:
            if tls not in self._transports:
                if tls is None:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used; spares loading the system's CAs (10 ms)
                else:
                    context = await trio.to_thread.run_sync(_tls_context, tls, limiter=self._disk)
                transport = httpx.AsyncHTTPTransport(
                    verify=context,
                    trust_env=False,
                    limits=httpx.Limits(max_connections=64, max_keepalive_connections=32, keepalive_expiry=55.0),
                )
                self._transports[tls] = await self._stack.enter_async_context(transport)
            return self._transports[tls]


def _tls_context(tls: TlsSettings) -> ssl.SSLContext:
    context = ssl.create_default_context()
    path: Path | None = None
    try:
        for path in tls.ca_paths:
            context.load_verify_locations(path)
        for path, key in tls.client_pairs:
            context.load_cert_chain(path, key)
    except (OSError, ssl.SSLError) as exc:
        raise SourceRefused(f"cannot use the certificate file {path}: {exc}; mend hosts.toml") from exc
    if tls.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _unavailable(exc: httpx.HTTPError, host: str, when: str) -> SourceUnavailable:
    what = "stalled" if isinstance(exc, httpx.TimeoutException) else "broke the connection"
    if isinstance(exc, httpx.ConnectError):
        what = "cannot be reached"
    elif isinstance(exc, httpx.RemoteProtocolError):
        what = "broke the HTTP protocol or the connection"
    detail = str(_reason(exc))[:200]
    return SourceUnavailable(f"{host} {what} {when}" + (f": {detail}" if detail else ""), source=host)


def _reason(exc: BaseException) -> BaseException:
    """The system's or the TLS library's own error beneath the libraries' wrappings; `exc` itself if there is none."""
    at: BaseException | None = exc
    found = exc
    for _ in range(12):
        if isinstance(at, BaseExceptionGroup):
            at = at.exceptions[0]
        if at is None:
            break
        if isinstance(at, OSError):
            found = at
        at = at.__cause__ or at.__context__
    return found
