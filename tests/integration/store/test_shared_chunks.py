"""Equal chunks of a node's layers, of whatever format, are fetched once and copied from then on."""

import gzip
import hashlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random

import attrs
import pytest
import trio

from agent.errors import StoreError
from agent.formats.model import ChunkTable, Digester, Inode, InodeKind, LayerIndex, digest_of, hash_chunk
from agent.formats.pieces import cut_pieces
from agent.images.adopt import NodeChunks, adopt_chunks, has_donors
from agent.resolve import Counters, Resolver
from agent.resolve.resolver import open_resolver
from agent.resolve.sources import Source
from agent.store import Store, StoredLayer, open_store
from agent.store.sparse import clone_range
from tests.store_samples import Sample, make_sample


def other_sample(contents: Sequence[bytes], *, digester: Digester = "sha256", name: str = "other") -> Sample:
    """A layer of another make than `make_sample`'s: other members, other pieces, each chunk on a block of its own."""
    chunks = ChunkTable(digester)
    blob, top = bytearray(), 0
    for content in contents:
        member = gzip.compress(name.encode() + content, 6, mtime=0)
        number = chunks.append(len(blob), len(member), len(name), len(content), hash_chunk(digester, content))
        chunks.volume_offset[number] = top
        blob += member
        top += -(-len(content) // 4096) * 4096
    pieces = cut_pieces(chunks, len(blob), len(blob), 16 << 10)
    index = LayerIndex(name, "gzip", Inode(InodeKind.DIRECTORY), chunks, pieces, top, 1)
    return Sample(digest_of(blob), bytes(blob), tuple(contents), index, b"meta" * 2048)


def contents_of(seed: int, sizes: Sequence[int] = (20_000, 8192, 30_000, 4096, 17)) -> list[bytes]:
    random = Random(seed)
    return [random.randbytes(size) for size in sizes]


@attrs.define
class Shelf:
    """A source and the choice of it: gives the blobs it was told of, and notes the ranges it was asked for."""

    blobs: dict[str, bytes] = attrs.field(factory=dict)
    asked: list[tuple[str, int, int]] = attrs.field(factory=list)
    name: str = "shelf"
    kind: str = "registry"

    @asynccontextmanager
    async def fetch(
        self, blob: str, blob_size: int, ranges: Sequence[tuple[int, int]]
    ) -> AsyncIterator[AsyncIterator[tuple[int, bytes]]]:
        async def stream() -> AsyncIterator[tuple[int, bytes]]:
            for start, stop in ranges:
                self.asked.append((blob, start, stop))
                await trio.lowlevel.checkpoint()
                yield start, self.blobs[blob][start:stop]

        yield stream()

    def candidates(self, layer: StoredLayer, first: int, stop: int, excluded: Collection[str]) -> list[tuple[Source, int]]:
        return [] if excluded else [(self, stop - first)]

    def report(self, source: Source, layer: StoredLayer, error: Exception) -> None:
        raise AssertionError(f"{source.name}: {error}")

    def piece_held(self, layer: StoredLayer, piece: int) -> None:
        pass


@attrs.frozen
class Node:
    store: Store
    resolver: Resolver
    shelf: Shelf

    async def add(self, sample: Sample, image: str = "one") -> StoredLayer:
        layer = await self.store.create_layer(sample.digest, sample.index, sample.meta, {"image": image})
        self.shelf.blobs[sample.digest] = sample.blob
        self.resolver.add_layer(layer, image)
        with trio.fail_after(10):
            await self.store.filed(layer.digest)
        return layer

    async def read(self, layer: StoredLayer, sample: Sample) -> None:
        await self.resolver.need(layer.digest, 0, layer.volume_size, 10)
        assert [layer.read_chunk(number) for number in range(len(layer.chunks))] == list(sample.contents)


@asynccontextmanager
async def open_node(path: Path) -> AsyncIterator[Node]:
    async def rebuild(layer: StoredLayer) -> None:
        raise AssertionError(layer)

    shelf = Shelf()
    async with open_store(path, quota_bytes=None) as store, open_resolver(shelf, Counters(), rebuild) as resolver:
        resolver.node = NodeChunks(store, trio.CapacityLimiter(2))
        yield Node(store, resolver, shelf)


@pytest.fixture(params=["here", "btrfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory where blocks can be shared between files, and one where (most often) they cannot."""
    if request.param == "here":
        yield tmp_path / "store"
        return
    mountpoint = tmp_path / "disk"
    mountpoint.mkdir()
    with (tmp_path / "image").open("wb") as file:
        file.truncate(256 << 20)
    try:
        subprocess.run(["mkfs.btrfs", "-q", str(tmp_path / "image")], check=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("mkfs.btrfs is not installed")
    subprocess.run(["mount", "-o", "loop", str(tmp_path / "image"), str(mountpoint)], check=True, timeout=30)
    try:
        yield mountpoint / "store"
    finally:
        subprocess.run(["umount", "-l", str(mountpoint)], check=True, timeout=30)


@pytest.mark.parametrize("digester", ["sha256", "blake3"])
async def test_another_format_takes_equal_chunks_without_fetching(disk: Path, digester: Digester) -> None:
    contents = contents_of(1)
    one = other_sample(contents, digester=digester, name="one")
    two = other_sample(contents[::-1], digester=digester, name="two")
    async with open_node(disk) as node:
        layer, other = await node.add(one), await node.add(two)  # the other is mounted before there is anything to take
        await node.read(layer, one)
        node.shelf.asked.clear()
        await node.read(other, two)
        assert node.shelf.asked == []
        assert node.resolver.counters.cache_bytes == len(two.blob)


async def test_a_piece_with_other_chunks_is_fetched(disk: Path) -> None:
    one = make_sample([[20_000], [8192], [65536, 65536, 5]], seed=3)
    other_contents = contents_of(9)
    two = other_sample([*one.contents, *other_contents])
    async with open_node(disk) as node:
        layer = await node.add(one)
        await node.read(layer, one)
        node.shelf.asked.clear()
        other = await node.add(two)
        await node.read(other, two)
        first_other = two.index.chunks.blob_offset[len(one.contents)]
        piece = two.index.pieces.piece_of_chunk(len(one.contents))
        assert node.shelf.asked
        assert min(start for _blob, start, _stop in node.shelf.asked) == two.index.pieces.starts[piece] <= first_other


async def test_what_is_here_at_mount_is_copied(disk: Path) -> None:
    contents = contents_of(4)
    one, two = other_sample(contents, name="one"), other_sample(contents[1:], name="two")
    async with open_node(disk) as node:
        layer = await node.add(one)
        assert not has_donors(node.store, layer)
        await node.read(layer, one)
        other = await node.add(two, "two")
        assert has_donors(node.store, other)
        saved = await adopt_chunks(node.store, other, node.resolver, trio.CapacityLimiter(1))
        assert saved == len(two.blob)
        assert other.complete
        await node.store.evict(1 << 30)  # of a shared block the other owner keeps its bytes
        assert not layer.complete


async def test_a_copy_survives_its_donor(disk: Path) -> None:
    contents = contents_of(5)
    one, two = other_sample(contents, name="one"), other_sample(contents, name="two")
    async with open_node(disk) as node:
        layer = await node.add(one)
        await node.read(layer, one)
        other = await node.add(two)
        await node.store.pin(other.digest, "test")
        await adopt_chunks(node.store, other, node.resolver, trio.CapacityLimiter(1))
        await node.store.evict(1 << 30)
        assert not layer.complete
        await node.read(other, two)
        await node.store.remove_layer(layer.digest)
        await node.read(other, two)


async def test_bad_bytes_of_a_donor_are_not_taken(disk: Path) -> None:
    contents = contents_of(6)
    one, two = other_sample(contents, name="one"), other_sample(contents, name="two")
    async with open_node(disk) as node:
        layer = await node.add(one)
        await node.read(layer, one)
        with layer.data_path.open("r+b") as file:
            file.write(b"\xff" * 100)
        other = await node.add(two)
        await node.read(other, two)
        assert other.has_chunk(0)


async def test_a_chunk_at_two_places_of_a_layer_is_copied(disk: Path) -> None:
    contents = contents_of(7)
    sample = other_sample([*contents, *contents])
    async with open_node(disk) as node:
        layer = await node.add(sample)
        for number, content in enumerate(contents):
            layer.write_chunk(number, content)
        await node.read(layer, sample)
        assert node.shelf.asked == []


def test_blocks_are_shared_where_they_can_be(disk: Path) -> None:
    disk.mkdir()
    content = Random(1).randbytes(16384)
    (disk / "one").write_bytes(content)
    with (disk / "one").open("rb") as source, (disk / "two").open("w+b") as target:
        target.truncate(1 << 20)
        is_shared = clone_range(source.fileno(), 4096, 8192, target.fileno(), 65536)
        assert is_shared or disk.parent.name != "disk"
        assert os.pread(target.fileno(), 8192, 65536) == (content[4096:12288] if is_shared else bytes(8192))
        assert not clone_range(source.fileno(), 1, 100, target.fileno(), 1)


async def test_the_other_digest_is_another_chunk(tmp_path: Path) -> None:
    contents = contents_of(8)
    one, two = other_sample(contents), other_sample(contents, digester="blake3", name="two")
    async with open_node(tmp_path) as node:
        layer, other = await node.add(one), await node.add(two)
        await node.read(layer, one)
        assert not any(node.store.is_shared(other, number) for number in range(len(contents)))
        await node.read(other, two)


async def test_found_again_after_a_restart(tmp_path: Path) -> None:
    contents = contents_of(10)
    one, two = other_sample(contents, name="one"), other_sample(contents, name="two")
    async with open_node(tmp_path) as node:
        layer = await node.add(one)
        await node.read(layer, one)
        await node.add(two)
    async with open_node(tmp_path) as node:
        other = await node.add(two)
        await node.read(other, two)
        assert node.shelf.asked == []


async def test_two_layers_copy_from_each_other_while_both_are_evicted(tmp_path: Path) -> None:
    contents = contents_of(11, [4096] * 40)
    one, two = other_sample(contents, name="one"), other_sample(contents, name="two")
    async with open_node(tmp_path) as node:
        layer, other = await node.add(one), await node.add(two)

        def work(to: StoredLayer, source: StoredLayer) -> None:
            for _ in range(20):
                for number, content in enumerate(contents):
                    source.write_chunk(number, content)
                    if source.has_chunk(number):
                        with suppress(StoreError):  # evicted meanwhile
                            assert to.copy_chunk(source, number, number)

        def evict(of: StoredLayer) -> None:
            for _ in range(200):
                of.evict_data()

        calls: list[Callable[[], None]] = [
            lambda: work(layer, other),
            lambda: work(other, layer),
            lambda: evict(layer),
            lambda: evict(other),
        ]
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for call in calls:
                    nursery.start_soon(trio.to_thread.run_sync, call)
        for which in (layer, other):
            assert all(hashlib.sha256(which.read_chunk(n)).digest() == which.chunks.digest(n) for n in which.present_chunks())
