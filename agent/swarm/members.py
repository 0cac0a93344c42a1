"""What a node knows about the others: who they are, what they hold, who wants what. Pure state; the clock is passed in."""

import math
from collections.abc import Iterable
from typing import Final, Protocol

import attrs

from agent.formats.model import Digest
from agent.swarm.possession import Delta, Have, Hello, Load, PossessionError

MAX_BLOBS_A_PEER: Final = 4096
"""Blobs of one peer that are remembered: what one node may make another keep in memory."""
STRIKE_S: Final = 600.0
"""A peer that sent wrong bytes is not asked again for this long, for any blob."""
FAILURE_HALF_LIFE_S: Final = 10.0
"""Failures are forgotten by half in this time: long against a hiccup, short against a restart."""


@attrs.frozen
class Possession:
    """What a node holds of a blob: bit i of `held` (bit 0 of byte 0 first) is piece i.

    `index_start` is the blob offset where the piece with the layer's index begins, -1 where it is not known.
    """

    blob: Digest
    blob_size: int
    pieces: int
    held: bytes
    index_start: int = -1

    def has_piece(self, piece: int) -> bool:
        """Whether piece number `piece` is held."""
        return 0 <= piece < self.pieces and bool(self.held[piece >> 3] >> (piece & 7) & 1)

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all is held."""
        return not any(self.held)

    @property
    def is_complete(self) -> bool:
        """Whether every piece is held."""
        return self.pieces > 0 and int.from_bytes(self.held, "little") == (1 << self.pieces) - 1


class PossessionSource(Protocol):
    """What this node holds; asked whenever another node wants to know."""

    def possession(self, blob: Digest) -> Possession | None:
        """What is held of `blob` now; None if it is not known here."""

    def blobs(self) -> list[Digest]:
        """All blobs of which something is held."""


@attrs.frozen
class PeerInfo:
    """Another node of the fleet, as `shoal peers` shows it. `load` is its upload slots in use, 0 to 1."""

    peer_id: str
    addresses: tuple[str, ...]
    data_address: str
    rtt_ms: float | None
    zone: str
    load: float
    version: str
    blobs: int = 0


@attrs.frozen
class Holder:
    """A peer that holds pieces of one blob, and what is known about asking it. `failures` decays with time."""

    peer_id: str
    data_address: str
    possession: Possession
    load: float = 0.0
    failures: float = 0.0
    zone: str = ""
    rtt_ms: float | None = None


@attrs.define(eq=False)
class _Holding:
    blob_size: int
    pieces: int
    held: bytearray
    index_start: int


@attrs.define(eq=False)
class PeerState:
    """One connected peer."""

    peer_id: str
    data_address: str
    zone: str
    version: str
    addresses: tuple[str, ...]
    rtt_ms: float | None = None
    load: float = 0.0
    interests: set[Digest] = attrs.field(factory=set)
    told: dict[Digest, int] = attrs.field(factory=dict)
    """Blobs of which a Have with pieces was sent, and of how many pieces: Delta suffices from then on."""
    holdings: dict[Digest, _Holding] = attrs.field(factory=dict)


def blob_key(blob: Digest) -> bytes:
    """The digest's 32 bytes, as the wire has it."""
    return bytes.fromhex(blob.removeprefix("sha256:"))


def blob_of(key: bytes) -> Digest:
    """The digest that 32 bytes from the wire mean."""
    return Digest("sha256:" + key.hex())


def join_address(address: str, seen_host: str) -> str:
    """`HOST:PORT` as a peer says it, with the host under which it is seen where it says none, or a wildcard."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        return ""
    if host in {"", "0.0.0.0", "[::]", "::"}:
        host = f"[{seen_host}]" if ":" in seen_host else seen_host
    return f"{host}:{port}" if host else ""


class Members:
    """The table of connected peers."""

    def __init__(self) -> None:
        self._peers: dict[str, PeerState] = {}
        self._struck: dict[str, float] = {}
        self._failures: dict[str, tuple[float, float]] = {}

    def __contains__(self, peer_id: str) -> bool:
        return peer_id in self._peers

    def __len__(self) -> int:
        return len(self._peers)

    def get(self, peer_id: str) -> PeerState | None:
        """The peer, if it is connected."""
        return self._peers.get(peer_id)

    def all(self) -> list[PeerState]:
        """All connected peers."""
        return list(self._peers.values())

    def join(self, peer_id: str, hello: Hello, seen_host: str, addresses: tuple[str, ...]) -> PeerState:
        """A peer greeted us; a second greeting of the same peer keeps what it already told."""
        peer = self._peers.get(peer_id)
        data_address = join_address(hello.data_address, seen_host)
        if peer is None:
            peer = PeerState(peer_id, data_address, hello.zone, hello.agent_version, addresses)
            self._peers[peer_id] = peer
        else:
            peer.data_address, peer.zone, peer.version, peer.addresses = data_address, hello.zone, hello.agent_version, addresses
        return peer

    def leave(self, peer_id: str) -> PeerState | None:
        """A peer is gone, with everything it held."""
        return self._peers.pop(peer_id, None)

    def has(self, peer: PeerState, message: Have) -> None:
        """A peer said what it holds of a blob.

        Raises:
            PossessionError: it speaks of more blobs than one node may.
        """
        blob = blob_of(message.blob)
        if message.pieces == 0:
            peer.holdings.pop(blob, None)
            return
        if blob not in peer.holdings and len(peer.holdings) >= MAX_BLOBS_A_PEER:
            raise PossessionError(f"a peer tells of more than {MAX_BLOBS_A_PEER} blobs")
        peer.holdings[blob] = _Holding(message.blob_size, message.pieces, bytearray(message.held), message.index_start)

    def changed(self, peer: PeerState, message: Delta) -> None:
        """A peer got or lost pieces.

        Raises:
            PossessionError: pieces that the blob does not have.
        """
        holding = peer.holdings.get(blob_of(message.blob))
        if holding is None:
            return  # it crossed our Unwant
        if max((*message.got, *message.lost), default=0) >= holding.pieces:
            raise PossessionError("a Delta names a piece beyond the blob's last")
        for piece in message.got:
            holding.held[piece >> 3] |= 1 << (piece & 7)
        for piece in message.lost:
            holding.held[piece >> 3] &= ~(1 << (piece & 7))

    @staticmethod
    def loaded(peer: PeerState, message: Load) -> None:
        """A peer said how busy it is."""
        peer.load = min(1.0, message.active / message.slots) if message.slots else 1.0

    def withdraw(self, peer: PeerState, blobs: Iterable[bytes]) -> None:
        """A peer dropped blobs."""
        for key in blobs:
            peer.holdings.pop(blob_of(key), None)

    def forget(self, blob: Digest) -> None:
        """Nobody here asks about `blob` any more."""
        for peer in self._peers.values():
            peer.holdings.pop(blob, None)

    def strike(self, peer_id: str, now: float) -> None:
        """A peer lied: it is no holder of anything until `STRIKE_S` have passed."""
        self._struck[peer_id] = now + STRIKE_S

    def is_struck(self, peer_id: str, now: float) -> bool:
        """Whether a peer's strike still lasts."""
        until = self._struck.get(peer_id)
        if until is not None and until <= now:
            del self._struck[peer_id]
            return False
        return until is not None

    def fail(self, peer_id: str, now: float) -> None:
        """A transfer from a peer failed."""
        self._failures[peer_id] = (self.failures(peer_id, now) + 1.0, now)

    def failures(self, peer_id: str, now: float) -> float:
        """Recent failures, halved every `FAILURE_HALF_LIFE_S`."""
        count, at = self._failures.get(peer_id, (0.0, now))
        count *= math.pow(0.5, max(0.0, now - at) / FAILURE_HALF_LIFE_S)
        if count < 0.05:
            self._failures.pop(peer_id, None)
            return 0.0
        return count

    def holders(self, blob: Digest, now: float) -> list[Holder]:
        """Peers that hold at least one piece of `blob`, can be asked, and are not struck."""
        found = []
        for peer in self._peers.values():
            holding = peer.holdings.get(blob)
            if holding is None or not peer.data_address or not any(holding.held) or self.is_struck(peer.peer_id, now):
                continue
            possession = Possession(blob, holding.blob_size, holding.pieces, bytes(holding.held), holding.index_start)
            found.append(
                Holder(
                    peer.peer_id,
                    peer.data_address,
                    possession,
                    peer.load,
                    self.failures(peer.peer_id, now),
                    peer.zone,
                    peer.rtt_ms,
                )
            )
        return found

    def interested(self, blob: Digest) -> list[PeerState]:
        """Peers that asked to be told about `blob`."""
        return [peer for peer in self._peers.values() if blob in peer.interests]

    def infos(self) -> list[PeerInfo]:
        """All connected peers, for people."""
        return [
            PeerInfo(p.peer_id, p.addresses, p.data_address, p.rtt_ms, p.zone, p.load, p.version, len(p.holdings))
            for p in self._peers.values()
        ]
