"""A proxy in front of a registry or a peer that spoils what passes through it, in the way a test says.

In front of a registry it understands just enough HTTP to tell blobs from manifests: every request goes out on a connection of its
own, from a source address of the test's choice, so that the registry's access log tells the nodes apart. In front of a peer, whose
traffic is encrypted, it passes bytes on as they are.
"""

import enum

import attrs
import trio

BLOCK = 16 << 10
"""Read and passed on at once; small, so that little is between the ends when one of them dies."""


class Harm(enum.Enum):
    """What happens to bodies of blobs (in front of a registry) or to everything from the server (in front of a peer)."""

    NONE = "passed on"
    FLIP = "one bit in every KiB is flipped: no chunk of any size comes through by luck"
    STALL = "nothing more comes, the connection stays"
    CUT = "the connection is reset"


@attrs.define(eq=False)
class Proxy:
    """A running proxy. `harm` may change at any time; `skip` bytes of each body pass unharmed. `rate` is bytes a second.
    `passed` counts bytes handed to clients, `broken` the connections that an end left in the middle of something."""

    target: tuple[str, int]
    is_http: bool
    source: str
    port: int = 0
    harm: Harm = Harm.NONE
    skip: int = 0
    rate: float = 0.0
    is_refusing: bool = False
    passed: int = 0
    harmed: int = 0
    broken: int = 0
    _free: float = 0.0
    _was_harmed: trio.Event = attrs.field(factory=trio.Event)
    _open: set[trio.SocketStream] = attrs.field(factory=set)

    @property
    def address(self) -> str:
        """Where clients reach it."""
        return f"127.0.0.1:{self.port}"

    async def wait_harmed(self) -> None:
        """Until the first block is harmed (again, after `harmed` was set to zero)."""
        while not self.harmed:
            await self._was_harmed.wait()

    async def refuse(self) -> None:
        """Be gone: reset what is open and every connection that comes."""
        self.is_refusing = True
        for stream in list(self._open):
            _reset(stream)
        await trio.lowlevel.checkpoint()

    def accept_again(self) -> None:
        """Be back."""
        self.is_refusing = False

    async def serve(self, client: trio.SocketStream) -> None:
        """One client's connection."""
        if self.is_refusing:
            _reset(client)
            await trio.lowlevel.checkpoint()
            return
        self._open.add(client)
        try:
            async with client:
                await (self._serve_http(client) if self.is_http else self._serve_bytes(client))
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            self.broken += 1  # one of the ends went away: what these tests are about
        finally:
            self._open.discard(client)

    async def _connect(self) -> trio.SocketStream:
        sock = trio.socket.socket()
        try:
            # What the registry has written counts as sent in its log: no more than this may wait here.
            sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 64 << 10)
            # Loopback segments are 64 KiB, and the sender's buffer grows by them to megabytes; with these it stays near 256 KiB.
            sock.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_MAXSEG, 1400)
            await sock.bind((self.source, 0))
            await sock.connect(self.target)
        except BaseException:
            sock.close()
            raise
        return trio.SocketStream(sock)

    async def _pass(self, client: trio.SocketStream, data: bytes) -> None:
        if self.rate:
            now = trio.current_time()
            self._free = max(now, self._free) + len(data) / self.rate
            await trio.sleep(self._free - now)  # this is the link's own slowness
        await client.send_all(data)
        self.passed += len(data)

    async def _spoil(self, client: trio.SocketStream, data: bytes, at: int) -> bytes:
        if self.harm is Harm.NONE or at + len(data) <= self.skip:
            return data
        self.harmed += 1
        self._was_harmed.set()
        self._was_harmed = trio.Event()
        if self.harm is Harm.FLIP:
            spoilt = bytearray(data)
            for place in range(min(len(spoilt) // 2, 512), len(spoilt), 1024):
                spoilt[place] ^= 0x10
            return bytes(spoilt)
        if self.harm is Harm.STALL:
            while self.harm is Harm.STALL and await client.receive_some(BLOCK):
                pass  # until the client gives up
        _reset(client)
        raise trio.ClosedResourceError

    async def _serve_bytes(self, client: trio.SocketStream) -> None:
        async with await self._connect() as server, trio.open_nursery() as nursery:

            async def upwards() -> None:
                while data := await client.receive_some(BLOCK):
                    await server.send_all(data)
                await server.send_eof()

            async def downwards() -> None:
                at = 0
                while data := await server.receive_some(BLOCK):
                    await self._pass(client, await self._spoil(client, data, at))
                    at += len(data)
                nursery.cancel_scope.cancel()

            nursery.start_soon(_quietly, upwards, nursery.cancel_scope)
            nursery.start_soon(_quietly, downwards, nursery.cancel_scope)

    async def _serve_http(self, client: trio.SocketStream) -> None:
        buffer = bytearray()
        while True:
            while b"\r\n\r\n" not in buffer:
                data = await client.receive_some(BLOCK)
                if not data:
                    return
                buffer += data
            head, _, rest = bytes(buffer).partition(b"\r\n\r\n")
            buffer = bytearray(rest)  # requests of these tests have no body
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
            is_blob = lines[0].startswith(b"GET ") and b"/blobs/" in lines[0]
            async with await self._connect() as server:
                await server.send_all(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n")
                await self._answer(client, server, is_blob=is_blob)

    async def _answer(self, client: trio.SocketStream, server: trio.SocketStream, *, is_blob: bool) -> None:
        answer = bytearray()
        while b"\r\n\r\n" not in answer:
            data = await server.receive_some(BLOCK)
            if not data:
                return
            answer += data
        head, _, body = bytes(answer).partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        await client.send_all(b"\r\n".join(lines) + b"\r\n\r\n")
        at, data = 0, body
        while data or (data := await server.receive_some(BLOCK)):
            await self._pass(client, await self._spoil(client, data, at) if is_blob else data)
            at += len(data)
            data = b""


async def _quietly(work: object, scope: trio.CancelScope) -> None:
    assert callable(work)
    try:
        await work()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        scope.cancel()


def _reset(stream: trio.SocketStream) -> None:
    """Close so that the other end sees a reset."""
    if stream.socket.fileno() >= 0:
        stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        stream.socket.close()


async def start_proxy(
    nursery: trio.Nursery, target: str, *, is_http: bool, source: str = "127.0.0.1", rate: float = 0.0
) -> Proxy:
    """A proxy to HOST:PORT on a free loopback port, gone with the nursery."""
    host, _, port = target.rpartition(":")
    proxy = Proxy((host, int(port)), is_http, source, rate=rate)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    proxy.port = listener.socket.getsockname()[1]
    nursery.start_soon(trio.serve_listeners, proxy.serve, [listener])
    return proxy
