"""Layers for the store's tests: small, made of numbered content, in real gzip members so that pieces can be decoded."""

import gzip
import hashlib
from collections.abc import Sequence
from random import Random

import attrs

from agent.formats.model import BLOCK_SIZE, ChunkTable, Digest, Inode, InodeKind, LayerIndex, digest_of
from agent.formats.pieces import cut_pieces


@attrs.frozen
class Sample:
    """A layer with all its bytes."""

    digest: Digest
    blob: bytes
    contents: tuple[bytes, ...]
    index: LayerIndex
    meta: bytes

    def blob_of(self, piece: int) -> bytes:
        start, stop = self.index.pieces.extent(piece)
        return self.blob[start:stop]


def make_sample(
    files: Sequence[Sequence[int]], *, seed: int = 0, piece_bytes: int = 16 << 10, twins: Sequence[int] = ()
) -> Sample:
    """`files` are lists of chunk sizes; each file begins on a block. `twins` are files to have a second time, at the same place."""
    random = Random(seed)
    chunks = ChunkTable()
    contents: list[bytes] = []
    blob = bytearray()
    top = 0
    layouts: list[list[tuple[int, bytes]]] = []
    for sizes in files:
        at = top
        layout = []
        for size in sizes:
            layout.append((at, random.randbytes(size)))
            at += size
        layouts.append(layout)
        top = -(-at // BLOCK_SIZE) * BLOCK_SIZE
    for layout in [*layouts, *(layouts[number] for number in twins)]:
        for offset, content in layout:
            member = gzip.compress(content, 1, mtime=0)
            number = chunks.append(len(blob), len(member), 0, len(content), hashlib.sha256(content).digest())
            chunks.volume_offset[number] = offset
            contents.append(content)
            blob += member
    blob = blob or bytearray(b"empty")
    pieces = cut_pieces(chunks, len(blob), len(blob), piece_bytes)
    index = LayerIndex("estargz", "gzip", Inode(InodeKind.DIRECTORY), chunks, pieces, top, len(files), 0)
    return Sample(digest_of(blob), bytes(blob), tuple(contents), index, b"meta" * 2048)


def usual_sample(seed: int = 0) -> Sample:
    """Some hundred kilobytes: whole blocks, tails, shared blocks, a twin."""
    return make_sample([[4096, 4096, 100], [10_000, 10_000, 7], [5], [65536, 65536, 30_000], [8192]], seed=seed, twins=[1, 4])
