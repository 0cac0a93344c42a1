"""One possession stream to a peer: a bounded queue out, messages in, liveness by pings."""

from collections.abc import Callable
from typing import Final, Protocol

import trio

from agent.errors import SourceUnavailable
from agent.swarm.possession import FrameReader, Hello, Message, Ping, Pong, PossessionError, encode

QUEUE: Final = 512
"""Messages waiting for one peer. A peer that lets them pile up is cut off: it reconnects and asks for fresh bitmaps."""
PING_S: Final = 2.0
"""The end that opened the stream pings; the other measures its own round trip at every `_ANSWERER_PINGS`th only, because
pings are all that an idle fleet costs (about 1 ms of CPU each, both ends together)."""
_ANSWERER_PINGS: Final = 10
SILENCE_S: Final = 6.0
"""A peer that said nothing for this long, with a ping every `PING_S`, is gone."""
HELLO_S: Final = 5.0


class ByteStream(Protocol):
    """What a session runs over; see `agent.swarm.host.HostStream`."""

    peer_id: str
    remote_host: str

    async def read(self) -> bytes:
        """Some bytes; none at the end."""

    async def write(self, data: bytes) -> None:
        """Send all."""

    async def close(self) -> None:
        """End the stream."""


class Session:
    """A stream to a peer, alive while `run` runs."""

    def __init__(self, stream: ByteStream, hello: Hello, *, is_outbound: bool) -> None:
        self._stream = stream
        self._reader = FrameReader()
        self._send, self._receive = trio.open_memory_channel[bytes](QUEUE)
        self._heard = trio.current_time()
        self._pings: dict[int, float] = {}
        self._written = trio.Event()
        self._is_finishing = False
        self._scope = trio.CancelScope()
        self.peer_id = stream.peer_id
        self.remote_host = stream.remote_host
        self.is_outbound = is_outbound
        self.rtt_ms: float | None = None
        self.end_reason = "the peer closed the stream"
        self.is_greeted = False
        self.is_violated = False
        self.is_over = False
        self._send_now(encode(hello))

    def send(self, message: Message) -> None:
        """Queue a message; never blocks. A full queue ends the session."""
        self._send_now(encode(message))

    def _send_now(self, frame: bytes) -> None:
        if self._is_finishing or self.is_over:
            return
        try:
            self._send.send_nowait(frame)
        except trio.WouldBlock:
            self.end("the peer does not read")

    def end(self, reason: str) -> None:
        """Stop the session soon."""
        self.end_reason = reason
        self._scope.cancel()

    async def finish(self) -> None:
        """Take no more messages and wait until those queued are written; the caller bounds the time."""
        self._is_finishing = True
        self._send.close()
        await self._written.wait()

    async def run(self, on_message: Callable[[Message], None]) -> None:
        """Run until the peer is gone, breaks the protocol, or `end` is called. `on_message` must not block; it may raise
        `PossessionError`, which ends the session like a malformed frame does."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._ping)
                    await self._read(on_message)
                    nursery.cancel_scope.cancel()
        finally:
            self.is_over = True
            self._written.set()
            self._receive.close()
            await self._stream.close()

    async def _read(self, on_message: Callable[[Message], None]) -> None:
        while data := await self._stream.read():
            self._heard = trio.current_time()
            try:
                for message in self._reader.feed(data):
                    self._take(message, on_message)
            except PossessionError as exc:
                self.end_reason = str(exc)
                self.is_violated = True
                return

    def _take(self, message: Message, on_message: Callable[[Message], None]) -> None:
        if isinstance(message, Ping):
            self.send(Pong(message.number))
        elif isinstance(message, Pong):
            sent = self._pings.pop(message.number, None)
            if sent is not None:
                self.rtt_ms = (self._heard - sent) * 1000
        else:
            self.is_greeted = True
            on_message(message)

    async def _write(self) -> None:
        async for frame in self._receive:
            batch = bytearray(frame)
            # Join what is waiting: each write of libp2p is a Yamux frame, a Noise record and a system call.
            while len(batch) < 32 << 10:
                try:
                    batch += self._receive.receive_nowait()
                except (trio.WouldBlock, trio.EndOfChannel):
                    break
            try:
                await self._stream.write(bytes(batch))
            except SourceUnavailable as exc:
                self.end(str(exc))
                break
        self._written.set()

    async def _ping(self) -> None:
        number = 0
        while True:
            number += 1
            if self.is_outbound or number % _ANSWERER_PINGS == 1:
                self._pings = {number: trio.current_time()}
                self.send(Ping(number))
            await trio.sleep(PING_S)
            if number * PING_S > HELLO_S and not self.is_greeted:
                self.end("the peer did not say hello")
            if trio.current_time() - self._heard > SILENCE_S:
                self.end(f"the peer was silent for {SILENCE_S:.0f} s")
