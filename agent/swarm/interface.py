"""What the rest of the agent sees of a swarm, and what a swarm needs of a host."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from agent.formats.model import Digest
from agent.swarm.members import Holder, PeerInfo
from agent.swarm.session import ByteStream


class Swarm(Protocol):
    """Knows which nodes of the fleet hold which pieces."""

    @property
    def peer_id(self) -> str:
        """This node's peer id."""

    @property
    def addresses(self) -> list[str]:
        """Multiaddrs under which others reach this node, peer id included; none without a fleet."""

    def peers(self) -> list[PeerInfo]:
        """The nodes this one is connected to."""

    async def want(self, blob: Digest) -> None:
        """Ask who holds pieces of `blob`, and be told of every change until `forget`. Returns when the questions are out."""

    def holders(self, blob: Digest) -> list[Holder]:
        """Peers that hold pieces of a wanted blob, as known now."""

    async def wait_holders(self, blob: Digest, timeout_s: float) -> list[Holder]:
        """The holders of a wanted blob, as soon as there is one, everybody asked has answered, or `timeout_s` is over."""

    def possession_changed(self, blob: Digest, pieces: Iterable[int] = ()) -> None:
        """This node got `pieces` of `blob`: tell those who want to know, soon."""

    def possession_lost(self, blob: Digest, pieces: Iterable[int]) -> None:
        """This node evicted `pieces` of `blob`, and still has others."""

    async def withdraw(self, blob: Digest) -> None:
        """This node holds nothing of `blob` any more."""

    def report_failure(self, peer_id: str) -> None:
        """A transfer from the peer broke or timed out."""

    def report_liar(self, peer_id: str, blob: Digest) -> None:
        """The peer sent bytes that do not match their digest: it holds nothing for us for a while."""

    def forget(self, blob: Digest) -> None:
        """Nobody here reads `blob` any more: no more news about it."""


class SwarmHost(Protocol):
    """A place in a network of proven peer ids; see `agent.swarm.host.Host` (libp2p) and `agent.swarm.memory`."""

    peer_id: str

    @property
    def addresses(self) -> list[str]:
        """Multiaddrs to dial this host at."""

    @property
    def listen_addresses(self) -> list[str]:
        """Multiaddrs as bound, wildcards included."""

    def serve(self, protocol: str, handler: Callable[[ByteStream], Awaitable[None]]) -> None:
        """Call `handler` for each incoming stream."""

    async def dial(self, address: str, expected_peer: str | None = None) -> str:
        """Connect; gives the proven peer id. Raises `agent.swarm.errors.DialError`."""

    async def open_stream(self, peer_id: str, protocol: str) -> ByteStream:
        """Open a stream to a connected peer. Raises `DialError`."""

    async def disconnect(self, peer_id: str) -> None:
        """Drop the connection to a peer; never raises."""

    async def add_route(self, peer_id: str, addresses: tuple[str, ...]) -> None:
        """A connected peer takes part in the DHT and listens there."""

    async def provide(self, key: bytes) -> bool:
        """Publish a provider record; whether another node took it."""

    def stop_providing(self, key: bytes) -> None:
        """Do not renew the record."""

    async def find_providers(self, key: bytes, count: int) -> list[tuple[str, tuple[str, ...]]]:
        """(peer id, addresses) of nodes that published `key`."""
