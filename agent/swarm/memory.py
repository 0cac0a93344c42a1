"""A network of hosts in memory: for tests and simulations of many nodes, and for the node that has no fleet.

`MemoryHost` passes the same contract as the libp2p host; everything above it is the real swarm.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from agent.errors import SourceUnavailable
from agent.swarm.errors import DialError, SelfDialError
from agent.swarm.session import ByteStream


class MemoryStream:
    """One end of a stream between two hosts."""

    def __init__(self, stream: trio.StapledStream, peer_id: str, remote_host: str) -> None:
        self._stream = stream
        self.peer_id = peer_id
        self.remote_host = remote_host

    async def read(self) -> bytes:
        """Some bytes; none at the end."""
        try:
            return bytes(await self._stream.receive_some())
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    async def write(self, data: bytes) -> None:
        """Send all of `data`."""
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise SourceUnavailable(f"peer {self.peer_id} is gone", source=self.peer_id) from exc

    async def close(self) -> None:
        """End the stream."""
        await trio.aclose_forcefully(self._stream)


class MemoryNetwork:
    """Hosts that can reach each other; `secret` stands for the private network's key."""

    def __init__(self) -> None:
        self.hosts: dict[str, MemoryHost] = {}
        self.records: dict[bytes, set[str]] = {}


class MemoryHost:
    """A host of a `MemoryNetwork`; made by `open_memory_host`."""

    def __init__(self, network: MemoryNetwork, nursery: trio.Nursery, peer_id: str, address: str, secret: str) -> None:
        self._network = network
        self._nursery = nursery
        self._address = address
        self._secret = secret
        self._handlers: dict[str, Callable[[ByteStream], Awaitable[None]]] = {}
        self._streams: list[MemoryStream] = []
        self.peer_id = peer_id

    @property
    def addresses(self) -> list[str]:
        """Its one address, none if it has no network."""
        return [self._address] if self._address else []

    @property
    def listen_addresses(self) -> list[str]:
        """The same."""
        return self.addresses

    def serve(self, protocol: str, handler: Callable[[ByteStream], Awaitable[None]]) -> None:
        """Call `handler` for each incoming stream."""
        self._handlers[protocol] = handler

    async def dial(self, address: str, expected_peer: str | None = None) -> str:
        """Find the host at `address`."""
        await trio.lowlevel.checkpoint()
        if address == self._address:
            raise SelfDialError(f"{address} is this node itself")
        other = self._network.hosts.get(address)
        if other is None or other._secret != self._secret:
            raise DialError(f"cannot reach {address}", source=address)
        if expected_peer not in {None, other.peer_id}:
            raise DialError(f"{address} is peer {other.peer_id}, not {expected_peer}")
        return other.peer_id

    async def open_stream(self, peer_id: str, protocol: str) -> MemoryStream:
        """Open a stream to a host of the network."""
        await trio.lowlevel.checkpoint()
        other = next((host for host in self._network.hosts.values() if host.peer_id == peer_id), None)
        if other is None or protocol not in other._handlers:
            raise DialError(f"cannot open a stream to peer {peer_id}", source=peer_id)
        from trio.testing import memory_stream_pair  # noqa: PLC0415 - imports pytest where that is installed: 10 MB

        near, far = memory_stream_pair()
        mine, theirs = MemoryStream(near, peer_id, "127.0.0.1"), MemoryStream(far, self.peer_id, "127.0.0.1")
        self._streams.append(mine)
        other._streams.append(theirs)
        other._nursery.start_soon(other._handlers[protocol], theirs)
        return mine

    async def disconnect(self, peer_id: str) -> None:
        """Close all streams to a peer."""
        for stream in [stream for stream in self._streams if stream.peer_id == peer_id]:
            self._streams.remove(stream)
            await stream.close()

    async def add_route(self, peer_id: str, addresses: tuple[str, ...]) -> None:  # noqa: ARG002 - the seam's signature
        """Nothing to route."""
        await trio.lowlevel.checkpoint()

    async def provide(self, key: bytes) -> bool:
        """Publish in the network's one table."""
        await trio.lowlevel.checkpoint()
        self._network.records.setdefault(key, set()).add(self._address)
        return True

    def stop_providing(self, key: bytes) -> None:
        """Take the record back."""
        self._network.records.get(key, set()).discard(self._address)

    async def find_providers(self, key: bytes, count: int) -> list[tuple[str, tuple[str, ...]]]:
        """Read the network's one table."""
        await trio.lowlevel.checkpoint()
        found = [a for a in sorted(self._network.records.get(key, set())) if a in self._network.hosts and a != self._address]
        return [(self._network.hosts[address].peer_id, (address,)) for address in found[:count]]


@asynccontextmanager
async def open_memory_host(
    network: MemoryNetwork, peer_id: str, address: str = "", secret: str = ""
) -> AsyncIterator[MemoryHost]:
    """A host in `network` at `address` (a multiaddr; none: nobody reaches it). Leaving the block is a crash, not a goodbye."""
    async with trio.open_nursery() as nursery:
        host = MemoryHost(network, nursery, peer_id, address, secret)
        if address:
            network.hosts[address] = host
        try:
            yield host
        finally:
            network.hosts.pop(address, None)
            nursery.cancel_scope.cancel()
            for stream in host._streams:
                with trio.CancelScope(shield=True):
                    await stream.close()
