"""From a bootstrap and the blobs' own tables to the one shape of all formats: the spliced blob, its members, the volume.

The spliced blob has, of each data blob in the order of the blob table, the bytes from its first used chunk to its last; then the
bootstrap's own layer. What lies behind the chunks in a blob (tables, a bootstrap that nobody reads) is not fetched.

An original gzip layer (zran) is resumed at its contexts, and those overlap: a context goes on until its last chunk ends, while the
next one begins at a block of deflate before its first chunk. So contexts are joined to members of about a piece, and each member
is a part of its own: the bytes that two members need are spliced in twice, a few per cent.
"""

from array import array
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

from agent.formats.layout import MAX_VOLUME_BYTES, round_up
from agent.formats.model import (
    MAX_CHUNK_BYTES,
    BlobPart,
    ChunkTable,
    Digest,
    FormatError,
    Inode,
    InodeKind,
    LayerIndex,
    MemberTable,
    PieceTable,
)
from agent.formats.nydus.blob_meta import INFO_BATCH, INFO_ZRAN, BlobMeta, ZranContext
from agent.formats.nydus.bootstrap import (
    CHUNK_BATCH,
    CHUNK_COMPRESSED,
    COMPRESSORS,
    FEATURE_BATCH,
    MAX_COMPRESSED,
    BlobEntry,
    Bootstrap,
)
from agent.formats.nydus.packaging import BlobPlace
from agent.formats.pieces import PIECE_BYTES, cut_pieces

_MAX_MEMBER_OUTPUT: Final = 16 << 20
"""Most output of joined contexts: what has to be inflated for the last byte of a member."""
_MOST_PARTS: Final = 2048
"""Aim for the parts of one zran image: each is kept with the layer, as far as the contexts allow."""
_MAX_PREFETCH: Final = 1 << 16


@attrs.define
class _Members:
    """Per chunk row: the member's place in the spliced blob, its length, the chunk's place in it. Besides, sizes and windows."""

    offset: "array[int]"
    length: "array[int]"
    inner: "array[int]"
    parts: list[BlobPart] = attrs.field(factory=list)
    cuts: list[int] = attrs.field(factory=list)
    batches: dict[int, int] = attrs.field(factory=dict)
    zran: list[tuple[int, int, ZranContext, BlobMeta]] = attrs.field(factory=list)
    end: int = 0

    def add_part(self, digest: Digest, start: int, stop: int, blob_size: int) -> int:
        """Splice in bytes of a blob; gives where they begin."""
        base = self.end
        if not 0 <= start <= stop <= blob_size:
            raise FormatError(f"chunks lie in bytes [{start}, {stop}) of blob {digest}, which has {blob_size}")
        self.parts.append(BlobPart(digest, stop - start, start, blob_size))
        self.cuts.append(base)
        self.end += stop - start
        return base


@attrs.frozen
class Volume:
    """Where files lie: (chunk row, place in the volume) of every chunk, and which blobs they are in, ascending."""

    size: int
    placed: list[tuple[int, int]]
    blobs: tuple[int, ...]


def lay_out(bootstrap: Bootstrap) -> Volume:
    """Give every file its extent; files of equal content share one, and of theirs only one's chunks are used.

    Raises:
        FormatError: the volume would be larger than a file system can address.
    """
    chunks, refs, offsets = bootstrap.chunks, bootstrap.ref_chunk, bootstrap.ref_offset
    blobs, in_blob, sizes, digests = chunks.blob, chunks.offset, chunks.size, bytes(chunks.digests)
    known: dict[object, int] = {}
    placed: list[tuple[int, int]] = []
    end = 0

    def position(inode: Inode) -> tuple[int, int]:
        if not inode.chunk_count:
            return -1, 0
        row = refs[inode.first_chunk]
        return blobs[row], in_blob[row]

    for inode in sorted(bootstrap.files, key=position):
        first, stop = inode.first_chunk, inode.first_chunk + inode.chunk_count
        key: object
        if stop == first + 1:
            row = refs[first]
            key = (digests[32 * row : 32 * row + 32], sizes[row], offsets[first], inode.size)
        else:
            parts = tuple((digests[32 * row : 32 * row + 32], sizes[row]) for row in refs[first:stop])
            key = (parts, tuple(offsets[first:stop]), inode.size)
        start = known.setdefault(key, end)
        inode.volume_offset = start
        inode.first_chunk = inode.chunk_count = 0
        if start == end:
            end += round_up(inode.size)
            placed.extend((refs[number], start + offsets[number]) for number in range(first, stop))
    if end > MAX_VOLUME_BYTES:
        raise FormatError(f"the layer's files have {end} bytes, more than {MAX_VOLUME_BYTES}")
    return Volume(end, placed, tuple(sorted({blobs[row] for row, _ in placed})))


def assemble(
    bootstrap: Bootstrap,
    volume: Volume,
    places: Mapping[int, BlobPlace],
    metas: Mapping[int, BlobMeta],
    digest: Digest,
    size: int,
) -> LayerIndex:
    """The index of the layer `digest` of `size` bytes, which holds the bootstrap. `places` are those of the volume's blobs, `metas`
    the tables of those for which `needs_tables`.

    Raises:
        FormatError: chunks overlap, or lie outside their blobs.
    """
    codec = _find_codec([bootstrap.blobs[blob] for blob in volume.blobs])
    members = _find_members(bootstrap, volume, places, metas)
    chunks = _tabulate(bootstrap, volume, members)
    index_start = members.add_part(digest, 0, size, size)
    pieces = cut_pieces(chunks, members.end, index_start, cuts=members.cuts)
    return LayerIndex(
        "nydus-zran" if codec == "deflate" else f"nydus-v{bootstrap.version}",
        codec,
        bootstrap.root,
        chunks,
        pieces,
        volume.size,
        bootstrap.entry_count,
        -1,
        bootstrap.warnings,
        _tabulate_members(members),
        _find_prefetch(bootstrap, chunks, pieces),
        tuple(members.parts),
    )


def needs_tables(entry: BlobEntry) -> bool:
    """Whether the chunks of a blob cannot be found without its own tables."""
    return entry.is_zran or bool(entry.features & FEATURE_BATCH)


def _find_codec(used: Sequence[BlobEntry]) -> str:
    if any(entry.is_zran for entry in used):
        if not all(entry.is_zran for entry in used):
            raise FormatError("some blobs of the image are original layers, others are not")
        return "deflate"
    found = {entry.compressor for entry in used} - {0}
    if len(found) > 1:
        names = ", ".join(COMPRESSORS[number] for number in sorted(found))
        raise FormatError(f"blobs of one image with several compressors ({names}), which Shoal does not read")
    return f"{COMPRESSORS[found.pop()]}/raw" if found else "raw"


# --- where chunks are ------------------------------------------------------------------------------------------------------


def _find_members(
    bootstrap: Bootstrap, volume: Volume, places: Mapping[int, BlobPlace], metas: Mapping[int, BlobMeta]
) -> _Members:
    count = len(bootstrap.chunks)
    members = _Members(array("Q", bytes(8 * count)), array("I", bytes(4 * count)), array("I", bytes(4 * count)))
    rows_of: dict[int, list[int]] = {blob: [] for blob in volume.blobs}
    for row in sorted({row for row, _ in volume.placed}):
        rows_of[bootstrap.chunks.blob[row]].append(row)
    target = max(PIECE_BYTES, sum(places[blob].size for blob in rows_of) // _MOST_PARTS)
    for blob, rows in rows_of.items():
        if bootstrap.blobs[blob].is_zran:
            _add_zran(bootstrap, places[blob], metas[blob], rows, members, target)
        else:
            _add_blob(bootstrap, places[blob], metas.get(blob), rows, members)
    return members


def _add_blob(bootstrap: Bootstrap, place: BlobPlace, meta: BlobMeta | None, rows: Sequence[int], members: _Members) -> None:
    chunks = bootstrap.chunks
    low, high = MAX_COMPRESSED, 0
    found: list[tuple[int, int]] = []
    for row in rows:
        start, length, size, inner = chunks.compressed_offset[row], chunks.compressed_size[row], chunks.size[row], 0
        if not 0 < size <= MAX_CHUNK_BYTES or start >= MAX_COMPRESSED:
            raise FormatError(f"a chunk of {size} bytes at {start}")
        if not length or chunks.flags[row] & CHUNK_BATCH:
            start, length, inner, unpacked = _find_in_batch(meta, chunks.index[row], chunks.offset[row], size)
            if length == unpacked:  # stored as it is, so the chunk can be had without the rest
                start, length, inner = start + inner, size, 0
            else:
                found.append((start, unpacked))
        elif (length != size) != bool(chunks.flags[row] & CHUNK_COMPRESSED) or length > MAX_CHUNK_BYTES:
            raise FormatError(f"a chunk of {length} bytes holds {size}, with flags {chunks.flags[row]:#x}")
        low, high = min(low, start), max(high, start + length)
        members.offset[row], members.length[row], members.inner[row] = start, length, inner
    base = members.add_part(place.digest, low, high, place.size) - low
    for row in rows:
        members.offset[row] += base
    for start, unpacked in found:
        members.batches[base + start] = unpacked


def _find_in_batch(meta: BlobMeta | None, index: int, offset: int, size: int) -> tuple[int, int, int, int]:
    """(start, length, place in it, size uncompressed) of a chunk's batch."""
    if meta is None:
        raise FormatError(f"chunk {index} has no place in its blob")
    info = meta.info(index)
    if not info.flags & INFO_BATCH or info.offset != offset or info.size != size:
        raise FormatError(f"chunk {index} of a blob is another one in the blob's own tables")
    length, unpacked = meta.batch(info.context)
    if info.inner + size > unpacked:
        raise FormatError(f"chunk {index} does not end inside its batch of {unpacked} bytes")
    return info.compressed_offset, length, info.inner, unpacked


def _add_zran(
    bootstrap: Bootstrap, place: BlobPlace, meta: BlobMeta, rows: Sequence[int], members: _Members, target: int
) -> None:
    chunks = bootstrap.chunks
    context_of: dict[int, int] = {}
    inner_of: dict[int, int] = {}
    for row in rows:
        info = meta.info(chunks.index[row])
        if not info.flags & INFO_ZRAN or info.offset != chunks.offset[row] or info.size != chunks.size[row]:
            raise FormatError(f"chunk {chunks.index[row]} of a blob is another one in the blob's own tables")
        context_of[row], inner_of[row] = info.context, info.inner
    contexts = {number: meta.zran(number) for number in sorted(set(context_of.values()))}
    joined: dict[int, tuple[int, int, int]] = {}
    for numbers in _join(contexts, target):
        first, last = contexts[numbers[0]], contexts[numbers[-1]]
        stop = max(contexts[number].start + contexts[number].length for number in numbers)
        base = members.add_part(place.digest, first.start, stop, place.size)
        members.zran.append((base, last.out + last.size - first.out, first, meta))
        for number in numbers:
            joined[number] = base, stop - first.start, contexts[number].out - first.out
    for row in rows:
        context = contexts[context_of[row]]
        if inner_of[row] + chunks.size[row] > context.size:
            raise FormatError(f"chunk {chunks.index[row]} does not end inside its context of {context.size} bytes")
        members.offset[row], members.length[row], shift = joined[context_of[row]]
        members.inner[row] = shift + inner_of[row]


def _join(contexts: Mapping[int, ZranContext], target: int) -> list[list[int]]:
    """Runs of contexts, each of which makes one member."""
    runs: list[list[int]] = []
    first = last = None
    for number, context in contexts.items():
        if last is not None and (context.start <= last.start or context.out <= last.out):
            raise FormatError("the contexts of a layer are not in order")
        if (
            first is None
            or context.start + context.length - first.start > target
            or context.out + context.size - first.out > _MAX_MEMBER_OUTPUT
        ):
            runs.append([])
            first = context
        runs[-1].append(number)
        last = context
    return runs


# --- tables ----------------------------------------------------------------------------------------------------------------


def _tabulate(bootstrap: Bootstrap, volume: Volume, members: _Members) -> ChunkTable:
    """A row for each place of each chunk, in blob order."""
    sizes, digests = bootstrap.chunks.size, bytes(bootstrap.chunks.digests)
    offsets, lengths, inners = members.offset, members.length, members.inner
    table = ChunkTable(bootstrap.digester)
    last_offset, last_stop, last_inner, last_size, last_digest = -1, 0, 0, 0, b""
    for offset, inner, place, row in sorted((offsets[row], inners[row], place, row) for row, place in volume.placed):
        size, length, digest = sizes[row], lengths[row], digests[32 * row : 32 * row + 32]
        if offset != last_offset:
            if offset < last_stop:
                raise FormatError(f"members overlap at {offset} of the spliced blob")
        elif offset + length != last_stop or (
            inner < last_inner + last_size and (inner, size, digest) != (last_inner, last_size, last_digest)
        ):
            raise FormatError(f"chunks overlap at {offset} (inner {inner}) of the spliced blob")
        last_offset, last_stop, last_inner, last_size, last_digest = offset, offset + length, inner, size, digest
        table.append(offset, length, inner, size, digest)
        table.volume_offset[-1] = place
    return table


def _tabulate_members(members: _Members) -> MemberTable | None:
    if not members.zran and not members.batches:
        return None
    table = MemberTable()
    for base, size, context, meta in members.zran:
        table.append(base, size, context.bits, context.prime, meta.window(context))
    for base, size in sorted(members.batches.items()):
        table.append(base, size)
    return table


def _find_prefetch(bootstrap: Bootstrap, chunks: ChunkTable, pieces: PieceTable) -> tuple[int, ...]:
    """Pieces of the inodes in the prefetch table, and of all below them, in that order.

    The root is no hint: the usual converter writes it if it is told nothing, and means "everything, in the background".
    """
    found: dict[int, None] = {}
    seen = {id(bootstrap.root)}
    for wanted in bootstrap.prefetch:
        stack = [wanted]
        while stack and len(found) < _MAX_PREFETCH:
            inode = stack.pop()
            if id(inode) in seen:  # and so is all below it
                continue
            seen.add(id(inode))
            stack.extend(reversed(inode.children.values()))
            if inode.kind is InodeKind.FILE and inode.size:
                for number in chunks.overlapping(inode.volume_offset, inode.volume_offset + inode.size):
                    found[pieces.piece_of_chunk(number)] = None
    return tuple(found)[:_MAX_PREFETCH]
