"""SOCI zTOC: the index beside an unchanged tar layer, gzip or uncompressed (formats.md 5.2).

A gzip layer is cut into *spans*, each of which can be inflated on its own from a checkpoint. A checkpoint lies between two bits,
and the byte in which it lies belongs to both spans: the digest of either covers it. The blob that the rest of Shoal sees is
therefore spliced (see `model`): the gzip header, then every span's bytes, with each shared byte twice. So a piece is a span, and
the piece's digest is the one that the zTOC names.

Trust. File metadata come from the zTOC, and so do the span digests, which is all that vouches for data: chunks have no digest of
their own (32 zero bytes), and may be taken only out of a piece whose digest was right. Nothing in a zTOC is believed beyond that:
places ascend, spans lie inside the blob, and none claims to inflate to more than deflate can hold.

Sparse files are refused. The builder notes the size that they have when unpacked and the place of what is stored, without the
map from one to the other.
"""

import struct
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import chain, islice, pairwise
from typing import Final

import attrs

from agent.formats.flatbuffer import FlatBuffer, Table
from agent.formats.layout import round_up
from agent.formats.model import (
    PRIME_IN_MEMBER,
    BlobPart,
    ChunkTable,
    Digest,
    FormatError,
    Inode,
    InodeKind,
    LayerIndex,
    MemberTable,
    PieceTable,
    parse_digest,
)
from agent.formats.tar import TarEntry, apply_pax
from agent.formats.toc import NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_NAME, parse_rfc3339
from agent.formats.tree import MAX_INODES, TreeBuilder, check_xattrs, walk

MAX_ZTOC_BYTES: Final = 48 << 20
"""Cap on a zTOC: that of a 6 GiB layer at the default span; its windows are held three times while it is read and stored."""
MAX_UNCOMPRESSED: Final = 1 << 40
CHUNK_BYTES: Final = 4 << 20
"""A chunk is no larger, so that readers need not wait for the end of a long span."""
MAX_RECORDS: Final = 10_000
"""Most pax records of one entry."""

MAX_SPAN_BYTES: Final = 32 << 20
"""Most of a span in the blob: it is in memory until its digest is known. Usual ones have a few megabytes; one is much larger
only where deflate blocks are, or where a builder did not look behind the first of several gzip members."""

_WINDOW: Final = 32 << 10
_HEAD: Final = struct.Struct("<iq")
_POINT: Final = struct.Struct("<qqB")
_POINT_BYTES: Final = _POINT.size + _WINDOW
_TAR_HEAD: Final = struct.Struct("<iqq")
_GZIP, _UNCOMPRESSED = 1, 2
_MAX_SPANS: Final = 1 << 16
_MAX_PARTS: Final = 1 << 12
"""What the store keeps of one layer."""
_MAX_RATIO: Final = 1032
"""What one byte of deflate can become at most (zlib's technical notes)."""
_RATIO_SLACK: Final = 64 << 10
_MAX_U32: Final = 0xFFFFFFFF
_NO_TIME: Final = "1970-01-01T00:00:00Z"
"""For a time that the builder could not write."""
_XATTR_RECORDS: Final = (b"SCHILY.xattr.", b"LIBARCHIVE.xattr.", b"SCHILY.acl.")
_HIDDEN: Final = {name.encode() for name in (TOC_NAME, PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK)}
_KINDS: Final = {
    b"reg": InodeKind.FILE,
    b"dir": InodeKind.DIRECTORY,
    b"symlink": InodeKind.SYMLINK,
    b"char": InodeKind.CHAR,
    b"block": InodeKind.BLOCK,
    b"fifo": InodeKind.FIFO,
}


@attrs.frozen
class _Spans:
    """Span i is bytes [start[i], stop[i]) of the layer's blob, [base[i], base[i + 1]) of the spliced one, and [out[i], out[i + 1])
    of the tar; `parts` as in `LayerIndex`."""

    start: "array[int]"
    stop: "array[int]"
    base: "array[int]"
    out: "array[int]"
    parts: tuple[BlobPart, ...] = ()
    bits: bytes = b""
    points: memoryview = memoryview(b"")
    points_missing: int = 0

    def __len__(self) -> int:
        return len(self.start)

    def window(self, span: int) -> memoryview:
        """What comes before the span in the tar, as far as deflate can refer to it."""
        if span < self.points_missing:
            return memoryview(b"")
        stop = _HEAD.size + (span - self.points_missing + 1) * _POINT_BYTES
        return self.points[stop - min(_WINDOW, self.out[span]) : stop]


class Ztoc:
    """A zTOC, opened: what it is of is checked, its entries are not yet read."""

    def __init__(self, data: bytes, layer: Digest, blob_size: int) -> None:
        """Open the zTOC of a layer.

        Raises:
            FormatError: it is none, or another layer's.
        """
        if len(data) > MAX_ZTOC_BYTES:
            raise FormatError(f"a zTOC of {len(data)} bytes")
        root = FlatBuffer(data).root()
        toc, info = root.table(4), root.table(5)
        self._layer, self._blob_size = layer, blob_size
        self._tar_size = root.i64(3)
        if toc is None or info is None:
            raise FormatError("a zTOC without table of contents or spans")
        if root.i64(2) != blob_size:
            raise FormatError(f"the zTOC is of a blob of {root.i64(2)} bytes, the layer has {blob_size}")
        if not 0 < self._tar_size <= MAX_UNCOMPRESSED:
            raise FormatError(f"the zTOC is of a tar of {self._tar_size} bytes")
        self._toc = toc
        self._algorithm = info.i8(0, _GZIP)
        self._points = info.view(3)
        self._span_count = info.i32(1) + 1
        if not 0 < self._span_count == info.count(2) <= _MAX_SPANS:
            raise FormatError(f"a zTOC of {self._span_count} spans with {info.count(2)} digests")
        self._digests = b"".join(bytes.fromhex(parse_digest(text.decode("latin-1"))[7:]) for text in info.strings(2))

    @property
    def needs_header(self) -> bool:
        """Whether the first checkpoint is missing, as old builders had it: the blob's gzip header tells where it lies."""
        return self._algorithm == _GZIP and len(self._points) == _HEAD.size + (self._span_count - 1) * _POINT_BYTES

    def read(self, header: bytes = b"", ranges: Sequence[tuple[int, int]] = (), warnings: Sequence[str] = ()) -> LayerIndex:
        """The layer's index. `header` is the beginning of the blob if it is needed; `ranges` are spans wanted first.

        Raises:
            FormatError: anything in the zTOC cannot be true.
        """
        if self._algorithm == _GZIP:
            spans = self._gzip_spans(header)
        elif self._algorithm == _UNCOMPRESSED:
            spans = self._tar_spans()
        else:
            raise FormatError(f"a zTOC of compression algorithm {self._algorithm}")
        entries = _EntryReader(self._tar_size)
        files = entries.read(self._toc)
        chunks, first_chunk, volume_size = _cut_chunks(files, spans, is_deflate=self._algorithm == _GZIP)
        return LayerIndex(
            "soci",
            "deflate" if self._algorithm == _GZIP else "raw",
            entries.root,
            chunks,
            _cut_pieces(spans, first_chunk, self._digests),
            volume_size,
            entries.count,
            warnings=(*warnings, *entries.tree.warnings),
            members=_tabulate_members(spans, first_chunk) if self._algorithm == _GZIP else None,
            prefetch_pieces=_wanted_first(spans, ranges),
            parts=spans.parts,
        )

    def _tar_spans(self) -> _Spans:
        if len(self._points) != _TAR_HEAD.size:
            raise FormatError(f"spans of an uncompressed layer in {len(self._points)} bytes")
        _, span_size, size = _TAR_HEAD.unpack(self._points)
        if not 0 < span_size <= MAX_SPAN_BYTES:
            raise FormatError(f"spans of {span_size} bytes")
        if size != self._blob_size or self._tar_size > size or self._span_count != -(-size // span_size):
            raise FormatError(f"{self._span_count} spans of {span_size} bytes in an uncompressed layer of {self._blob_size}")
        start = array("Q", range(0, size, span_size))
        after = array("Q", [*start[1:], size])
        return _Spans(start, after, array("Q", [*start, size]), array("Q", [*start, size]))

    def _gzip_spans(self, header: bytes) -> _Spans:
        """Read the checkpoints and splice the spans together."""
        count, missing = self._span_count, 1 if self.needs_header else 0
        if len(self._points) != _HEAD.size + (count - missing) * _POINT_BYTES or _HEAD.unpack_from(self._points)[0] != count:
            raise FormatError(f"checkpoints of {len(self._points)} bytes for {count} spans")
        places, out, bits = array("Q"), array("Q"), bytearray()
        if missing:
            places.append(_gzip_header_size(header))
            out.append(0)
            bits.append(0)
        for at in range(_HEAD.size, len(self._points), _POINT_BYTES):
            place, produced, unused = _POINT.unpack_from(self._points, at)
            if not 0 < place <= self._blob_size or not 0 <= produced <= self._tar_size or unused > 7:
                raise FormatError(f"a checkpoint at {place} and {unused} bits, {produced} bytes into the tar")
            places.append(place)
            out.append(produced)
            bits.append(unused)
        if out[0] != 0 or places[0] > self._blob_size:
            raise FormatError(f"the first checkpoint is {out[0]} bytes into the tar")
        out.append(self._tar_size)
        start = array("Q", (place - (1 if unused else 0) for place, unused in zip(places, bits, strict=True)))
        stop = array("Q", [*places[1:], self._blob_size])
        in_bits = [8 * place - unused for place, unused in zip(places, bits, strict=True)]
        if any(a >= b for a, b in pairwise(in_bits)) or any(a > b for a, b in pairwise(out)) or start[-1] >= stop[-1]:
            raise FormatError("the checkpoints are not in ascending order")
        for first, after, produced in zip(start, stop, (b - a for a, b in pairwise(out)), strict=True):
            if after - first > MAX_SPAN_BYTES or produced > min(_MAX_U32, (after - first) * _MAX_RATIO + _RATIO_SLACK):
                raise FormatError(f"a span of {after - first} bytes that become {produced}")
        base, parts = self._splice(start, stop)
        return _Spans(start, stop, base, out, parts, bytes(bits), self._points, missing)

    def _splice(self, start: "array[int]", stop: "array[int]") -> tuple["array[int]", tuple[BlobPart, ...]]:
        base, parts = array("Q", [start[0]]), []
        part_start = 0
        for first, after in pairwise(zip(start, stop, strict=True)):
            base.append(base[-1] + first[1] - first[0])
            if after[0] < first[1]:
                parts.append(BlobPart(self._layer, first[1] - part_start, part_start, self._blob_size))
                part_start = after[0]
        base.append(base[-1] + stop[-1] - start[-1])
        if parts:
            parts.append(BlobPart(self._layer, self._blob_size - part_start, part_start, self._blob_size))
        if len(parts) > _MAX_PARTS:
            raise FormatError(f"{len(parts)} spans that begin within a byte")
        return base, tuple(parts)


class _EntryReader:
    """From file metadata to a tree, and the files that have data."""

    def __init__(self, tar_size: int) -> None:
        self.tree = TreeBuilder()
        self.root = self.tree.root
        self.count = 0
        self._tar_size = tar_size

    def read(self, toc: Table) -> list[tuple[int, Inode]]:
        """The files with data that are in the tree, by their place in the tar."""
        self.count = toc.count(0)
        if self.count > MAX_INODES:
            raise FormatError(f"a zTOC of {self.count} entries")
        files: list[tuple[int, Inode]] = []
        last = 0
        for entry in toc.tables(0):
            place, size = entry.i64(2), entry.i64(3)
            if not last <= place <= self._tar_size or not 0 <= size <= self._tar_size:
                raise FormatError(f"an entry of {size} bytes at {place} of the tar, where {last} was due")
            inode = self._add(entry)
            last = place
            if inode is not None and inode.kind is InodeKind.FILE and size:
                last += size
                if last > self._tar_size:
                    raise FormatError(f"a file that ends at {last} of a tar of {self._tar_size} bytes")
                inode.size = size
                files.append((place, inode))
        self.root = self.tree.finish()
        if self.tree.has_replaced:
            alive = {id(inode) for _, inode in walk(self.root)}
            files = [(place, inode) for place, inode in files if id(inode) in alive]
        return files

    def _add(self, entry: Table) -> Inode | None:
        path, kind = entry.string(0), entry.string(1)
        if kind == b"hardlink":
            self.tree.link(path, entry.string(4))
            return None
        if kind == b"reg" and path.removeprefix(b"./").removeprefix(b"/") in _HIDDEN:
            return None
        if kind not in _KINDS:
            raise FormatError(f"entry {path[:200]!r} of unknown type {kind[:20]!r}")
        uid, gid = entry.u32(6), entry.u32(7)
        if _MAX_U32 in (uid, gid):
            raise FormatError(f"owner {uid}:{gid} of {path[:200]!r}")
        inode = Inode(
            _KINDS[kind], entry.i64(5) & 0o7777, uid, gid, parse_rfc3339(entry.string(10).decode("latin-1") or _NO_TIME)
        )
        if entry.count(13):
            self._apply_records(entry, inode, path)
        if inode.kind is InodeKind.SYMLINK:
            inode.target = entry.string(4)
            inode.size = len(inode.target)
            if not 0 < inode.size < 4096 or b"\0" in inode.target:
                raise FormatError(f"symlink {path[:200]!r} has a target of {inode.size} bytes")
        elif inode.kind in (InodeKind.CHAR, InodeKind.BLOCK):
            inode.rdev = (entry.i64(11), entry.i64(12))
            if not all(0 <= number <= _MAX_U32 for number in inode.rdev):
                raise FormatError(f"device {inode.rdev} of {path[:200]!r}")
        self.tree.add(path, inode)
        return inode

    def _apply_records(self, entry: Table, inode: Inode, path: bytes) -> None:
        """What pax records say beyond the entry's own fields."""
        if entry.count(13) > MAX_RECORDS:
            raise FormatError(f"{entry.count(13)} pax records of {path[:200]!r}")
        records: dict[bytes, bytes] = {}
        for record in entry.tables(13):
            key = record.string(0)
            if key.startswith(b"GNU.sparse.") and inode.kind is InodeKind.FILE:
                raise FormatError(f"{path[:200]!r} is sparse, and a zTOC does not say where its parts are")
            if key.startswith(_XATTR_RECORDS):
                records[key] = record.string(1)
        if records:
            holder = TarEntry(path, b"0")
            apply_pax(holder, records)
            inode.xattrs = check_xattrs(holder.xattrs.items(), path, self.tree)


def _cut_chunks(files: list[tuple[int, Inode]], spans: _Spans, *, is_deflate: bool) -> tuple[ChunkTable, "array[int]", int]:
    """The chunks, the first one of each span (and their count behind it), and the size of the volume in which the files lie."""
    table, first_chunk, unknown = ChunkTable(), array("I"), bytes(32)
    out, base, cursor = spans.out, spans.base, 0
    for place, inode in files:
        inode.volume_offset, inode.first_chunk = cursor, len(table)
        at, stop = place, place + inode.size
        while at < stop:
            span = bisect_right(out, at, 0, len(spans)) - 1
            size = min(stop - at, out[span + 1] - at, CHUNK_BYTES)
            while len(first_chunk) <= span:
                first_chunk.append(len(table))
            if is_deflate:
                number = table.append(base[span], base[span + 1] - base[span], at - out[span], size, unknown)
            else:
                number = table.append(at, size, 0, size, unknown)
            table.volume_offset[number] = cursor + at - place
            at += size
        inode.chunk_count = len(table) - inode.first_chunk
        cursor += round_up(inode.size)
    while len(first_chunk) <= len(spans):
        first_chunk.append(len(table))
    return table, first_chunk, cursor


def _cut_pieces(spans: _Spans, first_chunk: "array[int]", digests: bytes) -> PieceTable:
    """A piece for each span, and one for what comes before the first."""
    if spans.base[0] == 0:
        return PieceTable(spans.base, first_chunk, -1, digests)
    return PieceTable(array("Q", [0, *spans.base]), array("I", [0, *first_chunk]), -1, bytes(32) + digests)


def _wanted_first(spans: _Spans, ranges: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    lead = 1 if spans.base[0] else 0
    named = chain.from_iterable(range(max(0, start) + lead, min(stop, len(spans)) + lead) for start, stop in ranges)
    return tuple(dict.fromkeys(islice(named, 2 * _MAX_SPANS)))  # each once, however often they are named


def _tabulate_members(spans: _Spans, first_chunk: "array[int]") -> MemberTable:
    members = MemberTable()
    for span, (first, after) in enumerate(pairwise(first_chunk)):
        if first < after:
            bits = spans.bits[span]
            size = spans.out[span + 1] - spans.out[span]
            members.append(spans.base[span], size, bits | PRIME_IN_MEMBER if bits else 0, 0, spans.window(span))
    return members


def _gzip_header_size(header: bytes) -> int:
    """Where deflate begins in a blob (RFC 1952 2.3)."""
    if len(header) < 10 or header[:3] != b"\x1f\x8b\x08":
        raise FormatError("the layer of a gzip zTOC does not begin with a gzip header")
    flags, at = header[3], 10
    if flags & 4:
        at += 2 + int.from_bytes(header[at : at + 2], "little")
    for flag in (8, 16):
        if flags & flag:
            at = header.find(b"\0", at) + 1
            if not at:
                raise FormatError("a gzip header that does not end")
    at += 2 if flags & 2 else 0
    if at > len(header):
        raise FormatError("a gzip header that does not end")
    return at
