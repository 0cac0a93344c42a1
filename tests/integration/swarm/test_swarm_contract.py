"""What a swarm promises, shown on real libp2p hosts on loopback and on hosts in memory: the same suite for both."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio

from agent.formats.model import Digest
from agent.swarm import FleetSecret, Holder, PeerInfo, Possession, Swarm, make_credentials, new_identity, open_swarm
from agent.swarm.host import open_host
from agent.swarm.memory import MemoryNetwork, open_memory_host
from agent.swarm.possession import PROTOCOL
from agent.swarm.swarm import run_swarm

BLOB = Digest("sha256:" + "ab" * 32)
OTHER = Digest("sha256:" + "cd" * 32)
SECRET = FleetSecret(b"the secret of this fleet")


class Source:
    """What a node of these tests holds."""

    def __init__(self) -> None:
        self.held: dict[Digest, Possession] = {}

    def hold(self, *pieces: int, blob: Digest = BLOB, count: int = 20) -> None:
        bits = sum(1 << piece for piece in pieces)
        self.held[blob] = Possession(blob, count << 20, count, bits.to_bytes((count + 7) // 8, "little"), (count - 1) << 20)

    def possession(self, blob: Digest) -> Possession | None:
        return self.held.get(blob)

    def blobs(self) -> list[Digest]:
        return list(self.held)


class Node:
    """A swarm, what it holds, and its host."""

    def __init__(self, swarm: Swarm, source: Source, host: Any, address: str) -> None:
        self.swarm, self.source, self.host, self.address = swarm, source, host, address

    def __getattr__(self, name: str) -> Any:
        return getattr(self.swarm, name)


class Fleet:
    """Starts nodes, each of which joins by the first; all end with the test."""

    def __init__(self, kind: str, nursery: trio.Nursery) -> None:
        self.kind = kind
        self.nursery = nursery
        self.network = MemoryNetwork()
        self.nodes: list[Node] = []

    @asynccontextmanager
    async def node(
        self, *, bootstrap: list[str] | None = None, secret: FleetSecret = SECRET, source: Source | None = None, **options: Any
    ) -> AsyncIterator[Node]:
        source = source or Source()
        identity = new_identity()
        if bootstrap is None:
            bootstrap = [self.nodes[0].address] if self.nodes else []
        async with AsyncExitStack() as stack:
            if self.kind == "libp2p":
                host: Any = await stack.enter_async_context(open_host(identity, secret.network_key, "/ip4/127.0.0.1/tcp/0"))
            else:
                address = f"/ip4/127.0.0.1/tcp/{1000 + len(self.network.hosts) + 100 * len(self.nodes)}"
                host = await stack.enter_async_context(
                    open_memory_host(self.network, identity.peer_id, address, secret.network_key)
                )
            data_address = options.pop("data_address", ":4406")
            swarm = await stack.enter_async_context(
                run_swarm(host, bootstrap=bootstrap, source=source, data_address=data_address, version="1.2", **options)
            )
            node = Node(swarm, source, host, host.addresses[0])
            if not self.nodes:
                self.nodes.append(node)
            yield node

    async def start(self, **options: Any) -> Node:
        async def run(task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
            async with self.node(**options) as node:
                task_status.started(node)
                await trio.sleep_forever()

        node: Node = await self.nursery.start(run)
        return node


@pytest.fixture(params=["memory", "libp2p"])
def fleet(request: pytest.FixtureRequest, nursery: trio.Nursery) -> Fleet:
    return Fleet(request.param, nursery)


async def until(condition: Callable[[], object], timeout_s: float = 5) -> None:
    """Wait for something that another node's message brings about."""
    with trio.fail_after(timeout_s):
        while not condition():  # noqa: ASYNC110 - the event is in another node
            await trio.sleep(0.002)


def pieces_of(holders: list[Holder]) -> list[list[int]]:
    return [[piece for piece in range(h.possession.pieces) if h.possession.has_piece(piece)] for h in holders]


async def test_all_meet_through_one(fleet: Fleet) -> None:
    nodes = [await fleet.start() for _ in range(4)]
    await until(lambda: all(len(node.peers()) == 3 for node in nodes))
    info: PeerInfo = nodes[1].peers()[0]
    assert info.data_address == "127.0.0.1:4406"
    assert info.version == "1.2"
    assert nodes[0].swarm.addresses == [f"{nodes[0].address}/p2p/{nodes[0].peer_id}"]


async def test_holder_is_found_and_its_pieces_known(fleet: Fleet) -> None:
    first, second = await fleet.start(), await fleet.start()
    first.source.hold(0, 3, 19)
    await second.want(BLOB)
    (holder,) = await second.wait_holders(BLOB, 5)
    assert holder.peer_id == first.peer_id
    assert pieces_of([holder]) == [[0, 3, 19]]
    assert holder.possession.index_start == 19 << 20
    assert holder.possession.blob_size == 20 << 20


async def test_want_before_the_fleet_is_joined_is_answered(fleet: Fleet) -> None:
    await fleet.start()
    fleet.nodes[0].source.hold(1)
    second = await fleet.start()
    assert second.holders(BLOB) == []
    await second.want(BLOB)
    assert pieces_of(await second.wait_holders(BLOB, 5)) == [[1]]


async def test_nobody_holds_it_is_known_at_once(fleet: Fleet) -> None:
    await fleet.start()
    second = await fleet.start()
    await until(lambda: second.peers())
    await second.want(BLOB)
    with trio.fail_after(2):
        assert await second.wait_holders(BLOB, 60) == []
    lonely = await fleet.start(bootstrap=[])
    await lonely.want(BLOB)
    with trio.fail_after(2):
        assert await lonely.wait_holders(BLOB, 60) == []


async def test_pieces_are_told_as_they_come_and_go(fleet: Fleet) -> None:
    first, second = await fleet.start(), await fleet.start()
    await until(lambda: second.peers())
    await second.want(BLOB)
    assert await second.wait_holders(BLOB, 5) == []
    # nothing was known of the blob when the question came: the first piece comes with everything about it
    first.source.hold(2)
    first.possession_changed(BLOB, [2])
    await until(lambda: pieces_of(second.holders(BLOB)) == [[2]])
    for piece in range(3, 10):
        first.source.hold(*range(2, piece + 1))
        first.possession_changed(BLOB, [piece])
    await until(lambda: pieces_of(second.holders(BLOB)) == [[2, 3, 4, 5, 6, 7, 8, 9]])
    first.source.hold(*range(5, 10))
    first.possession_lost(BLOB, [2, 3, 4])
    await until(lambda: pieces_of(second.holders(BLOB)) == [[5, 6, 7, 8, 9]])


async def test_a_piece_that_is_lost_and_got_again_is_held(fleet: Fleet) -> None:
    first, second = await fleet.start(), await fleet.start()
    first.source.hold(1, 2)
    await second.want(BLOB)
    await second.wait_holders(BLOB, 5)
    first.possession_lost(BLOB, [1])
    first.possession_changed(BLOB, [1])
    first.possession_changed(BLOB, [3])
    await until(lambda: pieces_of(second.holders(BLOB)) == [[1, 2, 3]])


async def test_withdrawn_and_forgotten_blobs(fleet: Fleet) -> None:
    first, second = await fleet.start(), await fleet.start()
    for blob in (BLOB, OTHER):
        first.source.hold(1, blob=blob)
        await second.want(blob)
        assert await second.wait_holders(blob, 5)
    del first.source.held[BLOB]
    await first.withdraw(BLOB)
    await until(lambda: not second.holders(BLOB))
    assert second.holders(OTHER)
    second.forget(OTHER)
    assert second.holders(OTHER) == []
    first.possession_changed(OTHER, [2])
    await second.want(BLOB)
    await second.wait_holders(BLOB, 5)
    assert second.holders(OTHER) == []


async def test_a_node_that_leaves_says_so(fleet: Fleet) -> None:
    first = await fleet.start()
    async with fleet.node() as second:
        second.source.hold(1)
        await until(lambda: first.peers())
        await first.want(BLOB)
        assert await first.wait_holders(BLOB, 5)
    await until(lambda: not first.peers(), 1)
    assert first.holders(BLOB) == []


async def test_a_liar_is_struck_and_a_failure_shows(fleet: Fleet) -> None:
    first, second = await fleet.start(), await fleet.start()
    first.source.hold(1)
    await second.want(BLOB)
    await second.wait_holders(BLOB, 5)
    second.report_failure(first.peer_id)
    assert 0.5 < second.holders(BLOB)[0].failures <= 1
    second.report_liar(first.peer_id, BLOB)
    assert second.holders(BLOB) == []
    await second.want(OTHER)
    first.source.hold(1, blob=OTHER)
    assert await second.wait_holders(OTHER, 1) == []


async def test_another_secret_is_another_fleet(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.swarm.host.DIAL_S", 0.5)
    first = await fleet.start()
    first.source.hold(1)
    stranger = await fleet.start(secret=FleetSecret(b"the secret of another fleet"))
    await stranger.want(BLOB)
    assert await stranger.wait_holders(BLOB, 2) == []
    assert stranger.peers() == []
    assert first.peers() == []


async def test_load_is_told(fleet: Fleet) -> None:
    now = [0]
    first, second = await fleet.start(load=lambda: (now[0], 10)), await fleet.start()
    first.source.hold(1)
    await second.want(BLOB)
    await second.wait_holders(BLOB, 5)
    now[0] = 5
    await until(lambda: second.holders(BLOB)[0].load == 0.5)


async def test_each_new_peer_is_announced_here(fleet: Fleet) -> None:
    seen: list[PeerInfo] = []

    async def on_peer(info: PeerInfo) -> None:
        seen.append(info)

    first = await fleet.start(on_peer=on_peer)
    second = await fleet.start()
    await until(lambda: seen)
    assert [info.peer_id for info in seen] == [second.peer_id]
    assert first.peer_id != second.peer_id


async def test_a_bootstrap_address_may_be_this_node_itself(fleet: Fleet) -> None:
    first = await fleet.start()
    second = await fleet.start()
    again = await fleet.start(bootstrap=[first.address, second.address, "/ip4/127.0.0.1/tcp/1"])
    await until(lambda: len(again.peers()) == 2)


async def test_provider_records_lead_to_a_node_that_is_not_connected(fleet: Fleet) -> None:
    first, second = await fleet.start(), await fleet.start()
    await until(lambda: second.peers())
    first.source.hold(1)
    first.possession_changed(BLOB, [1])
    with trio.fail_after(5):
        while not await second.host.find_providers(bytes.fromhex(BLOB[7:]), 5):  # noqa: ASYNC110 - the DHT has no event
            await trio.sleep(0.05)
    ((peer_id, addresses),) = await second.host.find_providers(bytes.fromhex(BLOB[7:]), 5)
    assert peer_id == first.peer_id
    assert [address.partition("/p2p/")[0] for address in addresses] == [first.address]


GARBAGE = {
    "garbage": b"\xff" * 300,
    "long frame": b"\xff\xff\xff\x7f",
    "no hello": b"\x03\0\0\0\x92\x09\x01",
    "hello twice": b"\x09\0\0\0\x96\x01\x01\xa0\xa0\xa0\x90\xc0\xc0"[:13],
    "piece beyond": b"",
}


@pytest.mark.parametrize("what", GARBAGE)
async def test_garbage_ends_the_stream_and_harms_nobody(fleet: Fleet, what: str) -> None:
    first, second = await fleet.start(), await fleet.start()
    first.source.hold(1)
    await second.want(BLOB)
    await second.wait_holders(BLOB, 5)
    async with AsyncExitStack() as stack:
        identity = new_identity()
        if fleet.kind == "libp2p":
            evil: Any = await stack.enter_async_context(open_host(identity, SECRET.network_key, "/ip4/127.0.0.1/tcp/0"))
        else:
            evil = await stack.enter_async_context(
                open_memory_host(fleet.network, identity.peer_id, "/ip4/127.0.0.1/tcp/9", SECRET.network_key)
            )
        stream = await evil.open_stream(await evil.dial(second.address), PROTOCOL)
        await stream.write(GARBAGE[what] or _lie())
        with trio.fail_after(10):
            while await stream.read():
                pass
        await stream.close()
    await until(lambda: [info.peer_id for info in second.peers()] == [first.peer_id])
    assert second.holders(BLOB)


def _lie() -> bytes:
    from agent.swarm.possession import Delta, Have, Hello, encode

    key = bytes.fromhex(BLOB[7:])
    messages = (Hello(1, "", ":1", "", ()), Have(key, 1, 1, b"\1", -1), Delta(key, (5,)))
    return b"".join(encode(message) for message in messages)


async def test_a_node_without_a_fleet_is_alone() -> None:
    identity, source = new_identity(), Source()
    async with open_swarm(identity, None, listen="", bootstrap=["ignored"], source=source, data_address="") as swarm:
        await swarm.want(BLOB)
        with trio.fail_after(2):
            assert await swarm.wait_holders(BLOB, 60) == []
        swarm.possession_changed(BLOB, [1])
        assert (swarm.peer_id, swarm.addresses, swarm.peers()) == (identity.peer_id, [], [])


async def test_our_peer_id_is_libp2ps() -> None:
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    identity = new_identity()
    assert str(ID.from_pubkey(create_new_key_pair(identity.raw_key).public_key)) == identity.peer_id


async def test_a_port_in_use_is_refused() -> None:
    from agent.errors import SettingsError

    identity = new_identity()
    key = make_credentials(SECRET, identity).network_key
    async with open_host(identity, key, "/ip4/127.0.0.1/tcp/0") as host:
        with pytest.raises(SettingsError, match="cannot listen"):
            async with open_host(new_identity(), key, host.addresses[0]):
                pass
