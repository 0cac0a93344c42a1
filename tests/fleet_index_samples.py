"""A layer whose index a fleet may share: random access, a digest for each piece, a tree."""

import hashlib
from typing import Any

import attrs

from agent.formats.model import ChunkTable, Digest, Inode, InodeKind, MemberTable, PieceTable
from agent.store.layout import check_members
from fsmount.erofs import write_image
from tests.store_samples import Sample, make_sample

FLEET = b"k" * 32
DIFF_ID = "sha256:" + "d1" * 32


@attrs.frozen
class Shared:
    """What `fleet_index.encode` needs of a layer."""

    digest: Digest
    chunks: ChunkTable
    pieces: PieceTable
    members: MemberTable | None
    volume_size: int
    meta: bytes
    format: str = "tar (gzip)"
    codec: str = "deflate"
    entry_count: int = 4
    extra: dict[str, str | int] = attrs.field(factory=lambda: {"diff_id": DIFF_ID})


def image(volume_size: int) -> bytes:
    """A small tree, with a file that has the volume's first block."""
    root = Inode(InodeKind.DIRECTORY)
    root.children[b"folder"] = folder = Inode(InodeKind.DIRECTORY)
    folder.children[b"link"] = Inode(InodeKind.SYMLINK, target=b"../file")
    root.children[b"file"] = Inode(InodeKind.FILE, size=min(4096, volume_size), volume_offset=0)
    return bytes(write_image(root, volume_size=volume_size, user_markers=False))


def with_digests(sample: Sample) -> Sample:
    """The sample, with a digest for each piece and a real image of a tree."""
    pieces = sample.index.pieces
    digests = b"".join(hashlib.sha256(sample.blob_of(piece)).digest() for piece in range(len(pieces)))
    index = attrs.evolve(sample.index, format="tar (gzip)", pieces=attrs.evolve(pieces, index_piece=-1, digests=digests))
    return attrs.evolve(sample, index=index, meta=image(index.volume_size))


def make_shared(**changes: Any) -> Shared:
    """A layer of some chunks; its members are as a plain gzip layer's would be, and nobody decodes them here."""
    sample = with_digests(make_sample([[4096, 4096, 100], [5000], [4096, 7]], piece_bytes=4096))
    members = MemberTable()
    for number, offset in enumerate(sorted(set(sample.index.chunks.blob_offset))):
        members.append(offset, bits=number % 8, prime=number, window=bytes([number]) * 100 * number)
    check_members(sample.index.chunks, members, "deflate")
    made = Shared(sample.digest, sample.index.chunks, sample.index.pieces, members, sample.index.volume_size, sample.meta)
    return attrs.evolve(made, **changes)
