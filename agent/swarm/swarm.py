"""The swarm: who of the fleet holds which pieces of the blobs that this node wants.

Theory of operation. A node keeps one possession stream to every other node it knows, up to `MESH` of them; they are learnt
from the bootstrap addresses, from each other (peer exchange) and, for a blob that no connected node holds, from the DHT.
`want` sends one message to all of them (in a larger fleet, to the `CLOSEST` nearest to the blob's key), so an answer costs
one round trip; those asked remember the interest and push every later change. What a peer holds lives exactly as long as
its stream: a process that dies closes its connections, a machine that dies stops answering pings, and either way the
peer's holdings vanish at once. Provider records in the DHT follow in the background.

All state is in `Members` (pure). This module moves messages between it and the streams.
"""

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Final

import attrs
import structlog
import trio

from agent.errors import SettingsError
from agent.formats.model import Digest
from agent.swarm.bootstrap import BootstrapAddress, parse_bootstrap, resolve_bootstrap
from agent.swarm.errors import DialError, SelfDialError
from agent.swarm.interface import SwarmHost
from agent.swarm.members import Holder, Members, PeerInfo, PeerState, PossessionSource, blob_key, blob_of
from agent.swarm.possession import (
    MAX_ADDRESSES,
    MAX_DELTA,
    MAX_DIGESTS,
    MAX_PIECES,
    PROTOCOL,
    VERSION,
    Delta,
    Have,
    Hello,
    Load,
    Member,
    Message,
    Peers,
    PossessionError,
    Unwant,
    Want,
    Withdraw,
)
from agent.swarm.session import HELLO_S, ByteStream, Session

log = structlog.get_logger()

MESH: Final = 64
"""Nodes kept connected. A stream costs a ping of some 30 bytes every two seconds, and about 30 KB."""
ASK_ALL: Final = 32
CLOSEST: Final = 8
"""Up to `ASK_ALL` connected nodes, a want goes to all of them, beyond it to the `CLOSEST` nearest to the blob's key."""
MAX_INTERESTS: Final = 4096
"""Blobs that one peer may be interested in at a time."""
BATCH_S: Final = 0.05
"""Changes within this time travel as one message; the first goes at once."""
LOAD_S: Final = 0.25
LOOKUP_DELAY_S: Final = 0.5
LOOKUP_AGAIN_S: Final = 30.0
"""The DHT is asked when the connected nodes have had their time to answer, and again while nobody holds the blob."""
PROVIDE_DELAY_S: Final = 1.5
"""Connected peers hear of a new blob at once; its provider record is for the others, and not worth disturbing a start."""
_RETRY_S: Final = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_KEEP_S: Final = 5.0
"""A bootstrap entry that is connected is looked at this often."""
_DIALS_AT_ONCE: Final = 16
_GOODBYE_S: Final = 0.5
_EXCHANGED: Final = 32


@attrs.define(eq=False)
class _Interest:
    """A blob this node wants: peers that have not answered yet, and an event that every news about it replaces."""

    pending: set[str] = attrs.field(factory=set)
    news: trio.Event = attrs.field(factory=trio.Event)

    def wake(self) -> None:
        self.news.set()
        self.news = trio.Event()


def closest(key: bytes, peer_ids: Iterable[str], count: int) -> list[str]:
    """The `count` peers whose hashed ids are nearest to `key` (XOR), the same on every node."""
    target = int.from_bytes(key, "big")
    return sorted(peer_ids, key=lambda peer_id: int.from_bytes(sha256(peer_id.encode()).digest(), "big") ^ target)[:count]


class FleetSwarm:
    """The swarm over a host; made by `open_swarm`."""

    def __init__(
        self,
        host: SwarmHost,
        nursery: trio.Nursery,
        source: PossessionSource,
        hello: Hello,
        load: Callable[[], tuple[int, int]],
        on_peer: Callable[[PeerInfo], Awaitable[None]] | None,
    ) -> None:
        self._host = host
        self._nursery = nursery
        self._source = source
        self._hello = hello
        self._load = load
        self._on_peer = on_peer
        self._members = Members()
        self._sessions: dict[str, list[Session]] = {}
        self._interests: dict[Digest, _Interest] = {}
        self._dialling: set[str] = set()
        self._dials = trio.CapacityLimiter(_DIALS_AT_ONCE)
        self._got: dict[Digest, set[int]] = {}
        self._lost: dict[Digest, set[int]] = {}
        self._dirty = trio.Event()
        self._provided: set[Digest] = set()
        self._to_provide: dict[Digest, None] = {}
        self._provide_news = trio.Event()
        self._joined = trio.Event()
        self._is_closing = False

    # what the agent asks

    @property
    def peer_id(self) -> str:
        """This node's peer id."""
        return self._host.peer_id

    @property
    def addresses(self) -> list[str]:
        """Multiaddrs under which others reach this node, peer id included."""
        return [f"{address}/p2p/{self._host.peer_id}" for address in self._host.addresses]

    def peers(self) -> list[PeerInfo]:
        """The connected nodes."""
        return self._members.infos()

    async def want(self, blob: Digest) -> None:
        """See `agent.swarm.Swarm`."""
        if blob not in self._interests:
            interest = self._interests[blob] = _Interest()
            key = blob_key(blob)
            asked = list(self._sessions)
            if len(asked) > ASK_ALL:
                asked = closest(key, asked, CLOSEST)
            for peer_id in asked:
                interest.pending.add(peer_id)
                self._sessions[peer_id][0].send(Want((key,)))
            self._nursery.start_soon(self._look_up, blob, interest)
        await trio.lowlevel.checkpoint()

    def holders(self, blob: Digest) -> list[Holder]:
        """See `agent.swarm.Swarm`."""
        return self._members.holders(blob, trio.current_time())

    async def wait_holders(self, blob: Digest, timeout_s: float) -> list[Holder]:
        """See `agent.swarm.Swarm`."""
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(timeout_s):
            interest = self._interests.get(blob)
            while interest is not None and not self.holders(blob):
                if not interest.pending:
                    if self._joined.is_set():
                        break
                    await self._joined.wait()
                    continue
                await interest.news.wait()
                interest = self._interests.get(blob)
        return self.holders(blob)

    def possession_changed(self, blob: Digest, pieces: Iterable[int] = ()) -> None:
        """See `agent.swarm.Swarm`."""
        self._got.setdefault(blob, set()).update(pieces)
        self._lost.get(blob, set()).difference_update(pieces)
        self._dirty.set()

    def possession_lost(self, blob: Digest, pieces: Iterable[int]) -> None:
        """See `agent.swarm.Swarm`."""
        self._lost.setdefault(blob, set()).update(pieces)
        self._got.setdefault(blob, set()).difference_update(pieces)
        self._dirty.set()

    async def withdraw(self, blob: Digest) -> None:
        """See `agent.swarm.Swarm`."""
        self._got.pop(blob, None)
        self._lost.pop(blob, None)
        self._provided.discard(blob)
        self._to_provide.pop(blob, None)
        self._host.stop_providing(blob_key(blob))
        for peer in self._members.interested(blob):
            if peer.told.pop(blob, None) is not None:
                self._send(peer.peer_id, Withdraw((blob_key(blob),)))
        await trio.lowlevel.checkpoint()

    def report_failure(self, peer_id: str) -> None:
        """See `agent.swarm.Swarm`."""
        self._members.fail(peer_id, trio.current_time())

    def report_liar(self, peer_id: str, blob: Digest) -> None:
        """See `agent.swarm.Swarm`."""
        log.warning("peer_sent_wrong_bytes", peer=peer_id, blob=blob)
        self._members.strike(peer_id, trio.current_time())

    def forget(self, blob: Digest) -> None:
        """See `agent.swarm.Swarm`."""
        interest = self._interests.pop(blob, None)
        if interest is None:
            return
        interest.wake()
        self._members.forget(blob)
        for peer_id in self._sessions:
            self._send(peer_id, Unwant((blob_key(blob),)))

    # sessions

    def _send(self, peer_id: str, message: Message) -> None:
        sessions = self._sessions.get(peer_id)
        if sessions:
            sessions[0].send(message)

    async def accept(self, stream: ByteStream) -> None:
        """Serve a stream that a peer opened."""
        await self._run_session(Session(stream, self._hello, is_outbound=False), trio.Event())

    async def _run_session(self, session: Session, greeted: trio.Event) -> None:
        peer_id, has_left = session.peer_id, False

        def on_message(message: Message) -> None:
            nonlocal has_left
            if isinstance(message, Hello):
                self._greet(session, message)
                greeted.set()
            elif isinstance(message, Withdraw) and not message.blobs:
                has_left = True
                session.end("it leaves the fleet")
            else:
                peer = self._members.get(peer_id)
                if peer is not None:
                    peer.rtt_ms = session.rtt_ms
                    self._handle(peer, message)

        try:
            await session.run(on_message)
        finally:
            greeted.set()
            self._part(session, has_left=has_left)

    def _greet(self, session: Session, hello: Hello) -> None:
        addresses = seen_addresses(hello.listen, session.remote_host)
        is_new = session.peer_id not in self._members
        peer = self._members.join(session.peer_id, hello, session.remote_host, addresses)
        self._sessions.setdefault(session.peer_id, []).append(session)
        if not is_new:
            return
        log.info("peer_joined", peer=peer.peer_id, data_address=peer.data_address, zone=peer.zone, version=peer.version)
        self._ask_again(peer)
        others = self._known(excluding=peer.peer_id)
        if others:
            self._send(peer.peer_id, Peers(others))
        active, slots = self._load()
        self._send(peer.peer_id, Load(active, slots))
        self._nursery.start_soon(self._host.add_route, peer.peer_id, addresses)
        self._provide_news.set()
        if self._on_peer is not None:
            info = next(info for info in self._members.infos() if info.peer_id == peer.peer_id)
            self._nursery.start_soon(self._on_peer, info)

    def _ask_again(self, peer: PeerState) -> None:
        wanted = list(self._interests)
        for start in range(0, len(wanted), MAX_DIGESTS):
            blobs = wanted[start : start + MAX_DIGESTS]
            for blob in blobs:
                self._interests[blob].pending.add(peer.peer_id)
            self._send(peer.peer_id, Want(tuple(blob_key(blob) for blob in blobs)))

    def _part(self, session: Session, *, has_left: bool) -> None:
        peer_id = session.peer_id
        sessions = self._sessions.get(peer_id, [])
        if session not in sessions:
            return
        sessions.remove(session)
        peer = self._members.get(peer_id)
        if sessions and peer is not None:
            # What was on the way over the lost stream may be missing on either side: start from full bitmaps again.
            peer.told.clear()
            self._ask_again(peer)
            return
        self._sessions.pop(peer_id, None)
        self._members.leave(peer_id)
        for interest in self._interests.values():
            interest.pending.discard(peer_id)
            interest.wake()
        if self._is_closing:
            return
        tell = log.warning if session.is_violated else log.info
        tell("peer_left", peer=peer_id, reason=session.end_reason)
        self._nursery.start_soon(self._host.disconnect, peer_id)
        if peer is not None and not has_left and not session.is_violated:
            self._nursery.start_soon(self._rejoin, peer_id, peer.addresses)

    # messages

    def _handle(self, peer: PeerState, message: Message) -> None:
        match message:
            case Want():
                for key in message.blobs:
                    self._answer(peer, blob_of(key))
            case Unwant():
                for key in message.blobs:
                    peer.interests.discard(blob_of(key))
                    peer.told.pop(blob_of(key), None)
            case Have():
                interest = self._interests.get(blob_of(message.blob))
                if interest is not None:  # else it crossed our Unwant, or nobody asked: nothing is kept
                    self._members.has(peer, message)
                    interest.pending.discard(peer.peer_id)
                    interest.wake()
                    self._learn(message.members)
            case Delta():
                self._members.changed(peer, message)
                self._wake(blob_of(message.blob))
            case Withdraw():
                self._members.withdraw(peer, message.blobs)
                for key in message.blobs:
                    self._wake(blob_of(key))
            case Peers():
                self._learn(message.members)
            case Load():
                self._members.loaded(peer, message)
            case _:
                raise PossessionError(f"a {type(message).__name__} out of place")

    def _wake(self, blob: Digest) -> None:
        interest = self._interests.get(blob)
        if interest is not None:
            interest.wake()

    def _answer(self, peer: PeerState, blob: Digest) -> None:
        if blob not in peer.interests and len(peer.interests) >= MAX_INTERESTS:
            raise PossessionError(f"a peer wants more than {MAX_INTERESTS} blobs")
        peer.interests.add(blob)
        self._tell(peer, blob, members=True)

    def _tell(self, peer: PeerState, blob: Digest, *, members: bool = False) -> None:
        held = self._source.possession(blob)
        others: tuple[Member, ...] = ()
        if members:
            concerned = {p.peer_id for p in self._members.all() if blob in p.interests or blob in p.holdings}
            others = self._known(excluding=peer.peer_id, among=concerned)
        if held is None or held.is_empty or held.pieces > MAX_PIECES:
            peer.told.pop(blob, None)
            message = Have(blob_key(blob), 0, 0, b"", -1, others)
        else:
            peer.told[blob] = held.pieces
            message = Have(blob_key(blob), held.blob_size, held.pieces, bytes(held.held), held.index_start, others)
        self._send(peer.peer_id, message)

    def _known(self, *, excluding: str, among: set[str] | None = None) -> tuple[Member, ...]:
        known = [
            Member(p.peer_id, p.addresses)
            for p in self._members.all()
            if p.peer_id != excluding and p.addresses and (among is None or p.peer_id in among)
        ]
        return tuple(random.sample(known, min(len(known), _EXCHANGED)))

    async def flush_changes(self) -> None:
        """Tell interested peers what changed, the first change at once and then in batches."""
        while True:
            await self._dirty.wait()
            self._dirty = trio.Event()
            got, lost, self._got, self._lost = self._got, self._lost, {}, {}
            for blob in {**got, **lost}:
                self._flush(blob, got.get(blob, set()), lost.get(blob, set()))
            await trio.sleep(BATCH_S)

    def _flush(self, blob: Digest, got: set[int], lost: set[int]) -> None:
        if blob not in self._provided:
            self._provided.add(blob)
            self._to_provide[blob] = None
            self._provide_news.set()
        delta = None
        if (got or lost) and len(got) <= MAX_DELTA and len(lost) <= MAX_DELTA:
            delta = Delta(blob_key(blob), tuple(sorted(got)), tuple(sorted(lost)))
        for peer in self._members.interested(blob):
            if delta is not None and blob in peer.told and max(*delta.got, *delta.lost, 0, 0) < peer.told[blob]:
                self._send(peer.peer_id, delta)
            else:
                self._tell(peer, blob)

    async def tell_load(self) -> None:
        """Tell the others when this node's data server gets busier or idler."""
        last = (0, 0)
        while True:
            await trio.sleep(LOAD_S)
            now = self._load()
            if now != last:
                last = now
                for peer in self._members.all():
                    if peer.told:
                        self._send(peer.peer_id, Load(*now))

    # finding nodes

    def _learn(self, members: Iterable[Member]) -> None:
        for member in members:
            is_known = member.peer_id in self._sessions or member.peer_id in self._dialling or member.peer_id == self.peer_id
            if not is_known and len(self._sessions) + len(self._dialling) < MESH:
                self._dialling.add(member.peer_id)
                self._nursery.start_soon(self._meet_learnt, member)

    async def _meet_learnt(self, member: Member) -> None:
        try:
            for address in seen_addresses(member.addresses, ""):
                try:
                    await self._meet(address, member.peer_id)
                    return
                except DialError as exc:
                    log.debug("peer_unreachable", peer=member.peer_id, address=address, reason=str(exc))
        finally:
            self._dialling.discard(member.peer_id)

    async def _meet(self, address: str, expected_peer: str | None) -> str:
        """Make sure that there is a session with the node at `address`; gives its peer id when it has said hello."""
        async with self._dials:
            peer_id = await self._host.dial(address, expected_peer)
            if peer_id in self._sessions:
                return peer_id
            stream = await self._host.open_stream(peer_id, PROTOCOL)
        greeted = trio.Event()
        self._nursery.start_soon(self._run_session, Session(stream, self._hello, is_outbound=True), greeted)
        with trio.move_on_after(HELLO_S):
            await greeted.wait()
        if peer_id not in self._sessions:
            raise DialError(f"peer {peer_id} at {address} did not say hello", source=peer_id)
        return peer_id

    async def _rejoin(self, peer_id: str, addresses: tuple[str, ...]) -> None:
        for delay in _RETRY_S:
            await trio.sleep(delay * random.uniform(0.7, 1.3))
            if peer_id in self._sessions or peer_id in self._dialling:
                return
            self._dialling.add(peer_id)
            await self._meet_learnt(Member(peer_id, addresses))
        log.info("peer_given_up", peer=peer_id)

    async def join(self, entries: Sequence[BootstrapAddress]) -> None:
        """Keep connected to the bootstrap addresses, whatever they resolve to."""
        rounds = [trio.Event() for _ in entries]
        for entry, tried in zip(entries, rounds, strict=True):
            self._nursery.start_soon(self._keep_joined, entry, tried)
        for tried in rounds:
            await tried.wait()
        self._joined.set()
        for interest in self._interests.values():
            interest.wake()

    async def _keep_joined(self, entry: BootstrapAddress, tried: trio.Event) -> None:
        failures, ours, warned = 0, set[str](), False
        known: dict[str, str] = {}
        while True:
            reached, reason = 0, "the name has no addresses"
            try:
                for target in await resolve_bootstrap(entry):
                    if target.address in ours or known.get(target.address) in self._sessions:
                        reached += 1
                        continue
                    try:
                        known[target.address] = await self._meet(target.address, target.peer_id)
                        reached += 1
                    except SelfDialError:
                        ours.add(target.address)
                        reached += 1
                    except DialError as exc:
                        reason = str(exc)
            except OSError as exc:
                reason = f"cannot resolve {entry}: {exc}"
            tried.set()
            failures = 0 if reached else failures + 1
            if failures == 3 and not warned:
                warned = True
                log.warning("bootstrap_peer_unreachable", address=str(entry), reason=reason)
            delay = _KEEP_S if reached else _RETRY_S[min(failures, len(_RETRY_S)) - 1]
            await trio.sleep(delay * random.uniform(0.7, 1.3))

    # the DHT

    async def _look_up(self, blob: Digest, interest: _Interest) -> None:
        await trio.sleep(LOOKUP_DELAY_S)
        while self._interests.get(blob) is interest:
            if not self._members.holders(blob, trio.current_time()) and self._sessions:
                for peer_id, addresses in await self._host.find_providers(blob_key(blob), CLOSEST):
                    plain = tuple(address.partition("/p2p/")[0] for address in addresses)[:MAX_ADDRESSES]
                    self._learn([Member(peer_id, plain)])
            await trio.sleep(LOOKUP_AGAIN_S)

    async def provide(self) -> None:
        """Publish provider records, one at a time, in the background."""
        for blob in self._source.blobs():
            self._provided.add(blob)
            self._to_provide[blob] = None
        while True:
            while self._to_provide and self._sessions:
                blob = next(iter(self._to_provide))
                del self._to_provide[blob]
                if not await self._host.provide(blob_key(blob)):
                    self._to_provide[blob] = None
                    await trio.sleep(_KEEP_S)
                await trio.sleep(0.02)
            self._provide_news = trio.Event()
            if self._to_provide and self._sessions:
                continue
            await self._provide_news.wait()
            await trio.sleep(PROVIDE_DELAY_S)

    # the end

    async def leave(self) -> None:
        """Tell the others that this node goes, within `_GOODBYE_S`."""
        self._is_closing = True
        sessions = [session for several in self._sessions.values() for session in several[:1]]
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _GOODBYE_S):
            async with trio.open_nursery() as nursery:
                for session in sessions:
                    session.send(Withdraw(()))
                    nursery.start_soon(session.finish)


def seen_addresses(listen: Iterable[str], seen_host: str) -> tuple[str, ...]:
    """A peer's listen addresses as others can dial them: a wildcard becomes the host it is seen under; others are dropped."""
    result = []
    for text in listen:
        parts = text.split("/")
        if len(parts) == 5 and parts[1] in {"ip4", "ip6"} and parts[2] in {"0.0.0.0", "::"}:
            if not seen_host:
                continue
            parts[1:3] = ["ip6" if ":" in seen_host else "ip4", seen_host]
        try:
            entry = parse_bootstrap("/".join(parts))
        except SettingsError:
            continue
        if entry.kind in {"ip4", "ip6"}:
            result.append(f"/{entry.kind}/{entry.host}/tcp/{entry.port}")
    return tuple(result[:MAX_ADDRESSES])


@asynccontextmanager
async def run_swarm(
    host: SwarmHost,
    *,
    bootstrap: Sequence[str],
    source: PossessionSource,
    data_address: str,
    zone: str = "",
    version: str = "",
    load: Callable[[], tuple[int, int]] = lambda: (0, 1),
    on_peer: Callable[[PeerInfo], Awaitable[None]] | None = None,
) -> AsyncIterator[FleetSwarm]:
    """Run the swarm over a host. `load` gives (uploads now, upload slots); `on_peer` is called for each new peer.

    Raises:
        SettingsError: a bootstrap address is malformed.
    """
    entries = [parse_bootstrap(text) for text in bootstrap]
    hello = Hello(VERSION, version, data_address, zone, tuple(host.listen_addresses[:MAX_ADDRESSES]))
    async with trio.open_nursery() as nursery:
        swarm = FleetSwarm(host, nursery, source, hello, load, on_peer)
        host.serve(PROTOCOL, swarm.accept)
        nursery.start_soon(swarm.flush_changes)
        nursery.start_soon(swarm.tell_load)
        nursery.start_soon(swarm.provide)
        nursery.start_soon(swarm.join, entries)
        try:
            yield swarm
        finally:
            await swarm.leave()
            nursery.cancel_scope.cancel()
