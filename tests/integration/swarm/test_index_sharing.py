"""Indexes of plain layers on their way through a fleet: real stores, transfers over TLS, swarms in memory."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import attrs
import pytest
import trio

from agent.app import _StoreView
from agent.formats.model import Digest, Inode, InodeKind, LayerIndex, MemberTable, digest_of
from agent.images.fleet_index import FleetIndexes
from agent.images.records import INDEX_FILE, KIND, SMALL_BYTES, FleetRecords, index_key
from agent.resolve import Counters
from agent.store import Store, StoredLayer, open_store
from agent.swarm import FleetSecret, Identity, Swarm, make_credentials, new_identity
from agent.swarm.memory import MemoryNetwork, open_memory_host
from agent.swarm.swarm import run_swarm
from agent.transfer import PeerClient, open_data_server, open_peer_client
from tests.fleet_index_samples import DIFF_ID, Shared, make_shared

SECRET = FleetSecret(b"the secret of this fleet")
LAYER = make_shared()


@attrs.frozen
class Node:
    """A node as far as indexes go."""

    identity: Identity
    store: Store
    records: FleetRecords
    swarm: Swarm
    client: PeerClient
    indexes: FleetIndexes

    async def stream(self, layer: Shared = LAYER) -> StoredLayer:
        """As if this node had read the layer from a registry."""
        index = LayerIndex(
            layer.format,
            layer.codec,
            Inode(InodeKind.DIRECTORY),
            layer.chunks,
            layer.pieces,
            layer.volume_size,
            layer.entry_count,
            members=layer.members,
        )
        return await self.store.create_layer(layer.digest, index, layer.meta, layer.extra)

    async def find(self, layer: Shared = LAYER, diff_id: str = "") -> Any:
        return await self.indexes.find(layer.digest, layer.pieces.blob_size, diff_id)

    async def meet(self, count: int) -> None:
        """Wait until so many others are known."""
        while len(self.swarm.peers()) < count:  # noqa: ASYNC110 - the event is in another node
            await trio.sleep(0.002)


class Fleet:
    """Starts nodes, each of which joins by the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = MemoryNetwork()
        self.count = 0
        self.first = ""

    @asynccontextmanager
    async def node(self, *, trusts: bool = True, sealed_by: FleetSecret = SECRET) -> AsyncIterator[Node]:
        self.count += 1
        identity = new_identity()
        credentials = make_credentials(SECRET, identity)
        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(open_store(self.folder / f"store{self.count}", quota_bytes=None))
            records = FleetRecords(store)
            await records.load()
            view = _StoreView(store, records)
            server = await stack.enter_async_context(open_data_server("127.0.0.1:0", credentials.server_context, view))
            client = await stack.enter_async_context(open_peer_client(credentials.client_context))
            address = f"/ip4/127.0.0.1/tcp/{1000 + self.count}"
            host = await stack.enter_async_context(open_memory_host(self.network, identity.peer_id, address, "fleet"))
            bootstrap = [self.first] if self.first else []
            swarm = await stack.enter_async_context(
                run_swarm(host, bootstrap=bootstrap, source=view, data_address=server.address, version="1")
            )
            self.first = self.first or host.addresses[0]
            key = make_credentials(sealed_by, identity).seal_key
            indexes = FleetIndexes(records, swarm, client, identity, key, Counters(), is_trusting=trusts)
            yield Node(identity, store, records, swarm, client, indexes)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


async def test_what_one_node_learnt_another_takes(fleet: Fleet) -> None:
    with trio.fail_after(20):
        async with fleet.node() as maker, fleet.node() as taker, fleet.node(trusts=False) as sceptic:
            await taker.meet(2)
            await sceptic.meet(2)
            assert await taker.find() is None
            await maker.indexes.publish(await maker.stream())
            found = await taker.find(diff_id=DIFF_ID)
            assert (found.signer, found.diff_id, found.meta) == (maker.identity.peer_id, DIFF_ID, LAYER.meta)
            made = await taker.store.create_layer(LAYER.digest, found.index, found.meta, {})
            assert made.chunks.to_bytes() == LAYER.chunks.to_bytes()
            assert made.members is not None
            assert made.members.window(3) == b"\3" * 300
            assert taker.indexes.counters.peer_bytes == len(found.raw)
            assert await sceptic.find() is None
            assert sceptic.indexes.counters.peer_bytes == 0
            assert await taker.find(diff_id="sha256:" + "00" * 32) is None


async def test_an_index_outlives_its_maker(fleet: Fleet) -> None:
    with trio.fail_after(20):
        async with fleet.node() as middle, AsyncExitStack() as stack:
            maker = await stack.enter_async_context(fleet.node())
            await middle.meet(1)
            await maker.indexes.publish(await maker.stream())
            found = await middle.find()
            await stack.aclose()
            await middle.indexes.adopt(await middle.stream(), found)
            async with fleet.node() as last:
                await last.meet(1)
                again = await last.find()
                assert again.signer == maker.identity.peer_id
                assert again.raw == found.raw


async def test_a_wrong_index_is_passed_over_for_a_right_one(fleet: Fleet) -> None:
    with trio.fail_after(20):
        async with (
            fleet.node() as taker,
            fleet.node(sealed_by=FleetSecret(b"the secret of another")) as stranger,
            fleet.node() as broken,
        ):
            await taker.meet(2)
            await stranger.indexes.publish(await stranger.stream())
            await broken.records.keep_index(await broken.stream(), b"no index at all")
            assert await taker.find() is None
            assert taker.indexes.counters.peer_bytes > 15
            async with fleet.node() as maker:
                await taker.meet(3)
                await maker.indexes.publish(await maker.stream())
                found = await taker.find()
                assert found.signer == maker.identity.peer_id


async def test_an_index_is_told_of_as_soon_as_it_is_made(fleet: Fleet) -> None:
    key = index_key(LAYER.digest)
    with trio.fail_after(20):
        async with fleet.node() as maker, fleet.node() as taker:
            await taker.meet(1)
            await taker.swarm.want(key)
            assert await taker.swarm.wait_holders(key, 5) == []
            await maker.indexes.publish(await maker.stream())
            while not taker.swarm.holders(key):  # noqa: ASYNC110 - the event is in another node
                await trio.sleep(0.002)
            assert _StoreView(maker.store, maker.records).blobs() == [key]


async def test_a_large_index_comes_in_many_reads(fleet: Fleet) -> None:
    layer = make_shared()
    members = MemberTable()
    windows = Random(1).randbytes(32 << 10)
    offsets = sorted(set(layer.chunks.blob_offset))
    for offset in [*offsets, *range(offsets[-1] + 1, offsets[-1] + 60)]:
        members.append(offset, window=Random(offset).randbytes(len(windows)))
    layer = attrs.evolve(layer, members=members)
    with trio.fail_after(20):
        async with fleet.node() as maker, fleet.node() as taker:
            await taker.meet(1)
            await maker.indexes.publish(await maker.stream(layer))
            found = await taker.find(layer)
            assert len(found.raw) > 1 << 20
            assert found.index.members.to_bytes() == members.to_bytes()


async def test_an_index_goes_with_its_layer(fleet: Fleet) -> None:
    key = index_key(LAYER.digest)
    with trio.fail_after(20):
        async with fleet.node() as maker:
            stored = await maker.stream()
            await maker.indexes.publish(stored)
            size = (stored.root / INDEX_FILE).stat().st_size
            reopened = FleetRecords(maker.store)
            await reopened.load()
            for records in (maker.records, reopened):
                assert records.size(key) == size
                assert await records.read(key, size - 5, size) == (stored.root / INDEX_FILE).read_bytes()[-5:]
                assert await records.read(key, size - 5, size + 1) is None
            await maker.store.remove_layer(LAYER.digest)
            for records in (maker.records, reopened):
                assert await records.read(key, 0, 10) is None
                assert records.possession(key) is None


async def test_the_oldest_indexes_make_room(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.images.records.MAX_INDEX_BYTES", 2500)
    with trio.fail_after(20):
        async with fleet.node() as node:
            layers = [attrs.evolve(LAYER, digest=Digest(f"sha256:{number:064}")) for number in range(4)]
            for layer in layers:
                await node.records.keep_index(await node.stream(layer), bytes(1000))
            assert [node.records.size(index_key(layer.digest)) for layer in layers] == [None, None, 1000, 1000]
            assert not (node.store.path / "layers" / f"{0:064}" / INDEX_FILE).exists()


async def test_large_records_are_read_from_the_disk(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.images.records.MAX_LARGE_BYTES", 1 << 20)
    contents = [Random(number).randbytes(300 << 10) for number in range(4)]
    small = b"a small one"
    with trio.fail_after(20):
        async with fleet.node() as holder, fleet.node() as asker:
            await asker.meet(1)
            for content in (small, *contents):
                await holder.records.keep(digest_of(content), content)
            assert all(len(raw) < SMALL_BYTES for raw in holder.records._small.values())
            assert len(await holder.store.list_documents(KIND)) == 4
            kept = [await holder.records.get(digest_of(content)) for content in (small, *contents)]
            assert kept == [small, None, *contents[1:]]
            for content in (small, contents[3], contents[1]):
                assert await asker.records.fetch(digest_of(content), asker.swarm, asker.client) == content
            reopened = FleetRecords(holder.store)
            await reopened.load()
            assert await reopened.get(digest_of(contents[2])) == contents[2]
            assert reopened.size(digest_of(contents[0])) is None


async def test_without_a_fleet_nothing_is_made(fleet: Fleet) -> None:
    with trio.fail_after(20):
        async with fleet.node() as node:
            alone = attrs.evolve(node.indexes, fleet_key=None)
            stored = await node.stream()
            await alone.publish(stored)
            assert not (stored.root / INDEX_FILE).exists()
            assert await alone.find(LAYER.digest, LAYER.pieces.blob_size) is None
