"""What an index says beyond chunks and pieces, kept beside them: member tables, pieces wanted first, parts of a blob."""

from pathlib import Path

import attrs
import pytest

from agent.formats.model import BlobPart, Digest, FormatError, LayerIndex, MemberTable, PieceTable, digest_of
from agent.store import open_store
from tests.store_samples import Sample, usual_sample


def members_of(sample: Sample, *, windows: int = 1000) -> MemberTable:
    table = MemberTable()
    for number, offset in enumerate(sample.index.chunks.blob_offset):
        table.append(offset, size=number, bits=number % 8, prime=number, window=bytes([number]) * (windows if number else 0))
    return table


def parts_of(sample: Sample, at: int) -> tuple[BlobPart, ...]:
    cut = sample.index.pieces.starts[at]
    return BlobPart(digest_of(b"one"), cut), BlobPart(digest_of(b"two"), sample.index.pieces.blob_size - cut)


def full_index(sample: Sample) -> LayerIndex:
    pieces = sample.index.pieces
    digests = b"".join(bytes([number + 1]) * 32 for number in range(len(pieces)))
    return attrs.evolve(
        sample.index,
        codec="deflate",
        members=members_of(sample),
        pieces=attrs.evolve(pieces, digests=digests),
        prefetch_pieces=(2, 0),
        parts=parts_of(sample, 1),
    )


async def test_tables_are_the_same_after_reopening(tmp_path: Path) -> None:
    sample = usual_sample()
    index = full_index(sample)
    for _ in range(2):
        async with open_store(tmp_path, quota_bytes=None) as store:
            layer = await store.create_layer(sample.digest, index, sample.meta, {})
            assert layer.members is not None
            assert index.members is not None
            assert layer.members.to_bytes() == index.members.to_bytes()
            row = layer.members.find(index.chunks.blob_offset[3])
            assert (row, layer.members.window(row)) == (3, b"\3" * 1000)
            assert layer.pieces.digest(1) == bytes([2]) * 32
            assert (layer.codec, layer.prefetch_pieces, layer.parts) == ("deflate", (2, 0), index.parts)


async def test_a_layer_without_them_has_none(tmp_path: Path) -> None:
    sample = usual_sample()
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer = await store.create_layer(sample.digest, sample.index, sample.meta, {})
        assert (layer.members, layer.prefetch_pieces, layer.parts) == (None, (), ())
        assert not (layer.root / "members.table").exists()


async def test_a_broken_member_table_quarantines_the_layer(tmp_path: Path) -> None:
    sample = usual_sample()
    async with open_store(tmp_path, quota_bytes=None) as store:
        layer = await store.create_layer(sample.digest, full_index(sample), sample.meta, {})
        path = layer.root / "members.table"
    content = path.read_bytes()
    for broken in (content[:-1] + b"\xff", content[:-1], b"", None):
        path.unlink()
        if broken is not None:
            path.write_bytes(broken)
        async with open_store(tmp_path, quota_bytes=None) as store:
            assert store.layers() == []
            await store.create_layer(sample.digest, full_index(sample), sample.meta, {})


def gap(index: LayerIndex) -> MemberTable:
    table = MemberTable()
    for offset in index.chunks.blob_offset[:-1]:
        table.append(offset)
    return table


def backwards() -> MemberTable:
    table = MemberTable()
    for offset in (5, 3):
        table.append(offset)
    return table


def off_piece(index: LayerIndex) -> tuple[BlobPart, ...]:
    size = index.pieces.starts[1] + 1
    return BlobPart(digest_of(b""), size), BlobPart(digest_of(b""), index.pieces.blob_size - size)


async def test_an_index_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    sample = usual_sample()
    index, pieces = full_index(sample), sample.index.pieces
    wrong_digests = PieceTable(pieces.starts, pieces.first_chunk, pieces.index_piece, bytes(33))
    whole = index.pieces.blob_size
    async with open_store(tmp_path, quota_bytes=None) as store:
        for broken in (
            attrs.evolve(index, codec="rar"),
            attrs.evolve(index, members=None),
            attrs.evolve(index, members=gap(index)),
            attrs.evolve(index, members=backwards()),
            attrs.evolve(index, pieces=wrong_digests),
            attrs.evolve(index, prefetch_pieces=(len(pieces),)),
            attrs.evolve(index, prefetch_pieces=(-1,)),
            attrs.evolve(index, parts=index.parts[:1]),
            attrs.evolve(index, parts=off_piece(index)),
            attrs.evolve(index, parts=(BlobPart(digest_of(b""), whole + 5), BlobPart(digest_of(b""), -5))),
            attrs.evolve(index, parts=(BlobPart(digest_of(b""), 0),) * 5000 + index.parts),
            attrs.evolve(index, parts=(BlobPart(Digest("sha256:short"), whole),)),
        ):
            with pytest.raises(FormatError):
                await store.create_layer(sample.digest, broken, sample.meta, {})
        assert store.layers() == []
        layer = await store.create_layer(sample.digest, attrs.evolve(index, prefetch_pieces=(0,) * 70_000), sample.meta, {})
        assert len(layer.prefetch_pieces) == 1 << 16  # a hint: more than fits the header is left out
