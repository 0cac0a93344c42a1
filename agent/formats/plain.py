"""A layer without an index: the whole blob goes through once, and the same `LayerIndex` comes out.

`PlainLayerParser.feed` takes the blob as it arrives and gives the runs to write into the volume, which is laid out on the fly: a
file's extent starts at the next 4 KiB boundary. A file whose content an earlier file has is found when it ends; its extent is
then used again by the next one, which is why runs must be written in the order in which they come, and why some runs are
zeros (what a dropped file had left in places that must read as zeros).

The index makes the layer one with random access like any other. Of a gzip blob the checkpoints that were met on the way are its
members (codec "deflate"); an uncompressed one needs none ("raw"). A chunk ends after 4 MiB of its file or where a member does; pieces are
runs of whole members, with the digests of their bytes, for nobody else vouches for what lies between the chunks. Only zstd, and
gzip where zlib is missing or a block is absurdly large, stays "whole". All tables depend on the blob alone, not on how it is fed.

Memory is bounded by one input block and one step of output; the index is what grows (32 KiB a checkpoint). Nothing is verified
before `finish`: the caller compares `diff_id` and `blob_digest` with what the image says, and shows the volume to nobody before that.
"""

import hashlib
from array import array
from bisect import bisect_left, bisect_right
from typing import Final, cast

import attrs

from agent.formats.checkpoints import Checkpoint, SeekableInflater, open_seekable
from agent.formats.inflate import Inflater, sniff
from agent.formats.layout import round_up
from agent.formats.model import ChunkTable, Digest, FormatError, Inode, InodeKind, LayerIndex, MemberTable, PieceTable
from agent.formats.pieces import PIECE_BYTES, cut_fixed
from agent.formats.tar import TarEntry, TarParser
from agent.formats.toc import NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_NAME
from agent.formats.tree import TreeBuilder, check_xattrs

CHUNK_BYTES: Final = 4 << 20
"""Chunks of a plain layer: the default of eStargz, so that equal files have equal chunk digests in both."""
MAX_VOLUME_BYTES: Final = 1 << 40
"""Sparse files are cheap for us: lastlog with a high uid has 876 GB."""

_ZEROS: Final = bytes(64 << 10)
_HIDDEN: Final = {name.encode() for name in (TOC_NAME, PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK)}
_MAX_ID: Final = 0xFFFFFFFE
_KINDS: Final = {
    b"2": InodeKind.SYMLINK,
    b"3": InodeKind.CHAR,
    b"4": InodeKind.BLOCK,
    b"5": InodeKind.DIRECTORY,
    b"6": InodeKind.FIFO,
}


@attrs.frozen
class PlainLayer:
    """What a whole blob turned out to be."""

    index: LayerIndex
    diff_id: Digest
    blob_digest: Digest
    blob_size: int
    uncompressed_size: int
    compression: str


class PlainLayerParser:
    """See the module's text. `max_uncompressed` is the size that somebody promised, and more is refused."""

    def __init__(self, max_uncompressed: int | None = None) -> None:
        self._most = max_uncompressed
        self._blob_hash = hashlib.sha256()
        self._diff_hash = hashlib.sha256()
        self._blob_size = self._tar_size = 0
        self._head = b""
        self._compression = ""
        self._inflater: Inflater | None = None
        self._seekable: SeekableInflater | None = None
        self._volume = _VolumeFiller()
        self._tar = TarParser(self._volume)
        self._pieces = _PieceHasher()

    def feed(self, data: bytes | bytearray | memoryview) -> list[tuple[int, bytes]]:
        """Take the next bytes of the blob; gives (volume offset, bytes) to write, in this order.

        Raises:
            FormatError: not a layer, or larger than promised.
        """
        self._blob_hash.update(data)
        self._blob_size += len(data)
        if self._inflater is None:
            self._head += data
            if len(self._head) < 4:
                return []
            data, self._head = self._head, b""
            self._start(data)
        self._inflate(memoryview(data))
        return self._volume.take_runs()

    def finish(self) -> PlainLayer:
        """The blob has ended and all runs were taken; gives the index and the digests to compare.

        Raises:
            FormatError: the blob is cut short, or its tree is impossible.
        """
        if self._inflater is None:
            self._start(self._head)
            self._inflate(memoryview(self._head))
        assert self._inflater is not None
        self._inflater.finish()
        self._tar.finish()
        self._take_checkpoints()
        index = self._volume.finish(self._codec(), self._pieces)
        return PlainLayer(
            index,
            Digest("sha256:" + self._diff_hash.hexdigest()),
            Digest("sha256:" + self._blob_hash.hexdigest()),
            self._blob_size,
            self._tar_size,
            self._compression,
        )

    def _codec(self) -> str:
        if self._seekable is None or not self._blob_size:
            return "whole"
        return "deflate" if self._compression == "gzip" else "raw"

    def _start(self, head: bytes) -> None:
        self._compression = sniff(head)
        self._inflater = open_seekable(self._compression)
        if hasattr(self._inflater, "checkpoints"):
            self._seekable = cast("SeekableInflater", self._inflater)
            self._volume.is_raw = self._compression == "none"
        else:
            self._volume.give_up()

    def _inflate(self, data: memoryview) -> None:
        assert self._inflater is not None
        for part in self._inflater.feed(data):
            self._tar_size += len(part)
            if self._most is not None and self._tar_size > self._most:
                raise FormatError(f"the layer has more than the {self._most} bytes that were promised")
            self._take_checkpoints()
            self._diff_hash.update(part)
            self._tar.feed(part)
        self._take_checkpoints()
        self._pieces.feed(data)

    def _take_checkpoints(self) -> None:
        seekable = self._seekable
        if seekable is None:
            return
        if not seekable.is_seekable:
            self._seekable = None
            self._volume.give_up()
            return
        for checkpoint in seekable.checkpoints:
            self._volume.enter_member(checkpoint)
            self._pieces.may_cut(checkpoint.in_offset)
        seekable.checkpoints.clear()


class _PieceHasher:
    """Cuts the blob into pieces where it may, and hashes them."""

    def __init__(self) -> None:
        self.starts = array("Q", [0])
        self._digests = bytearray()
        self._hash = hashlib.sha256()
        self._at = 0
        self._cuts: list[int] = []

    def may_cut(self, offset: int) -> None:
        """A member begins at `offset`, in the bytes that are fed next or directly behind them."""
        if offset - self.starts[-1] >= PIECE_BYTES:
            self.starts.append(offset)
            self._cuts.append(offset)

    def feed(self, data: memoryview) -> None:
        """The bytes in which the last cuts were found."""
        for cut in self._cuts:
            self._hash.update(data[: cut - self._at])
            data = data[cut - self._at :]
            self._at = cut
            self._digests += self._hash.digest()
            self._hash = hashlib.sha256()
        self._cuts.clear()
        self._hash.update(data)
        self._at += len(data)

    def finish(self, chunks: ChunkTable) -> PieceTable:
        """The table, when all bytes were fed."""
        first = array("I", [bisect_left(chunks.blob_offset, start) for start in self.starts])
        return PieceTable(
            array("Q", [*self.starts, self._at]),
            array("I", [*first, len(chunks)]),
            -1,
            bytes(self._digests + self._hash.digest()),
        )

    @property
    def size(self) -> int:
        """Bytes that were fed."""
        return self._at


class _VolumeFiller:
    """Takes what the tar parser finds: the tree, the volume's runs, the chunks."""

    def __init__(self) -> None:
        self._tree = TreeBuilder()
        self._chunks = ChunkTable()
        self._runs: list[tuple[int, bytes]] = []
        self._entries = 0
        self._cursor = 0
        self._dirty = 0
        """Below this volume offset, what no run has covered since may be what a dropped file left."""
        self._known: dict[tuple[int, bytes], Inode] = {}
        self._file: Inode | None = None
        self._filled = 0
        """Up to where the file's data have come or are a hole."""
        self._chunk_start = 0
        self._hash = hashlib.sha256()
        """Of the chunk that is growing."""
        self._file_hash: hashlib._Hash | None = None
        """Of all data of the file, once it has more than one chunk."""
        self._extents: list[int] = []
        """Start and end of each run of data in the file."""
        self.is_raw = False
        self._at = 0
        """Place in the archive of the data that come next."""
        self._chunk_at = 0
        self._members: MemberTable | None = MemberTable()
        self._member_starts = array("Q")
        self._member: Checkpoint | None = None
        self._is_listed = False

    def give_up(self) -> None:
        """There is no random access; no more is asked of the members."""
        self._members = self._member = None

    def enter_member(self, checkpoint: Checkpoint) -> None:
        """What comes next belongs to another member."""
        if self._file is not None:
            self._close_chunk()
        self._member = checkpoint
        self._is_listed = self.is_raw
        self._member_starts.append(checkpoint.in_offset)

    def take_runs(self) -> list[tuple[int, bytes]]:
        runs, self._runs = self._runs, []
        return runs

    def entry(self, entry: TarEntry) -> None:
        self._entries += 1
        path = entry.path
        if not (0 <= entry.uid <= _MAX_ID and 0 <= entry.gid <= _MAX_ID):
            raise FormatError(f"owner {entry.uid}:{entry.gid} of {path[:200]!r}")
        if entry.kind == b"1":
            self._tree.link(path, entry.link)
            return
        if entry.kind == b"0" and path.removeprefix(b"./").removeprefix(b"/") in _HIDDEN:
            return
        kind = _KINDS.get(entry.kind, InodeKind.FILE)
        inode = Inode(kind, entry.mode, entry.uid, entry.gid, entry.mtime_ns)
        if entry.xattrs:
            inode.xattrs = check_xattrs(entry.xattrs.items(), path, self._tree)
        if kind is InodeKind.SYMLINK:
            inode.target, inode.size = entry.link, len(entry.link)
            if not 0 < inode.size < 4096 or b"\0" in entry.link:
                raise FormatError(f"symlink {path[:200]!r} has a target of {inode.size} bytes")
        elif kind is InodeKind.CHAR or kind is InodeKind.BLOCK:
            inode.rdev = entry.rdev
            if not all(0 <= number <= 0xFFFFFFFF for number in entry.rdev):
                raise FormatError(f"device {entry.rdev} of {path[:200]!r}")
        self._tree.add(path, inode)
        if kind is InodeKind.FILE and entry.size:
            if self._cursor + entry.size > MAX_VOLUME_BYTES:
                raise FormatError(f"the layer's files have more than {MAX_VOLUME_BYTES} bytes")
            inode.size = entry.size
            inode.volume_offset = self._cursor
            inode.first_chunk = len(self._chunks)
            self._file, self._filled, self._chunk_start = inode, 0, 0
            self._file_hash, self._extents = None, []
            self._at = self._chunk_at = entry.data_offset
            if entry.sparse is not None:  # the map may lie in front of the data
                self._at += entry.stored_size - sum(size for _, size in entry.sparse)
                self._chunk_at = self._at

    def data(self, offset: int, view: memoryview) -> None:
        inode = self._file
        if inode is None:
            return
        if offset > self._filled:
            self._enter_hole(inode, offset)
        if self._extents and self._extents[-1] == offset:
            self._extents[-1] += len(view)
        else:
            self._extents += (offset, offset + len(view))
        self._runs.append((inode.volume_offset + offset, bytes(view)))
        while view:
            part = view[: CHUNK_BYTES - self._filled % CHUNK_BYTES]
            self._hash.update(part)
            if self._file_hash is not None:
                self._file_hash.update(part)
            self._filled += len(part)
            self._at += len(part)
            view = view[len(part) :]
            if self._filled % CHUNK_BYTES == 0:
                self._close_chunk()

    def end(self) -> None:
        inode = self._file
        if inode is None:
            return
        self._close_chunk()
        if self._filled < inode.size:
            self._enter_hole(inode, inode.size)
        self._file = None
        chunks, first = self._chunks, inode.first_chunk
        inode.chunk_count = len(chunks) - first
        stop = inode.volume_offset + inode.size
        # Chunks are cut where members are, so that equal files may have different ones.
        content = self._file_hash.digest() if self._file_hash is not None else b""
        is_dense = self._extents == [0, inode.size]
        if not is_dense:
            content = hashlib.sha256(content + array("Q", self._extents).tobytes()).digest()
        twin = self._known.setdefault((inode.size, content), inode)
        if twin is inode:
            end = round_up(stop)
            self._blank(stop, end)
            self._cursor = end
            return
        # Written already; the next file is written over it, and what stays visible of it is blanked then. Not so where there are
        # holes: no run has covered them, and to blank them would cost what nobody had to send.
        if is_dense:
            self._dirty = max(self._dirty, stop)
        else:
            for low, high in zip(self._extents[::2], self._extents[1::2], strict=True):
                self._zero(inode.volume_offset + low, inode.volume_offset + high)
        inode.first_chunk, inode.chunk_count, inode.volume_offset = twin.first_chunk, twin.chunk_count, twin.volume_offset
        for column in (chunks.blob_offset, chunks.blob_length, chunks.inner_offset, chunks.size, chunks.volume_offset):
            _truncate(column, first)
        del chunks.digests[32 * first :]

    def finish(self, codec: str, pieces: "_PieceHasher") -> LayerIndex:
        root, chunks = self._tree.finish(), self._chunks
        if codec == "whole":
            for column in (chunks.blob_offset, chunks.blob_length, chunks.inner_offset):
                column[:] = array(column.typecode, bytes(column.itemsize * len(column)))
        elif codec == "deflate":
            ends = [*self._member_starts, pieces.size]
            for number, start in enumerate(chunks.blob_offset):
                chunks.blob_length[number] = ends[bisect_right(ends, start)] - start
        return LayerIndex(
            "tar",
            codec,
            root,
            chunks,
            cut_fixed(pieces.size) if codec == "whole" else pieces.finish(chunks),
            self._cursor,
            self._entries,
            warnings=tuple(self._tree.warnings),
            members=self._members if codec == "deflate" else None,
        )

    def _enter_hole(self, inode: Inode, stop: int) -> None:
        """The file has zeros up to `stop`: no chunk covers them, and only what was written before needs a run."""
        self._close_chunk()
        self._blank(inode.volume_offset + self._filled, inode.volume_offset + stop)
        self._filled = self._chunk_start = stop

    def _blank(self, start: int, stop: int) -> None:
        self._zero(start, min(stop, self._dirty))

    def _zero(self, start: int, stop: int) -> None:
        for at in range(start, stop, len(_ZEROS)):
            self._runs.append((at, _ZEROS[: stop - at]))

    def _close_chunk(self) -> None:
        """A chunk ends here, if one has begun."""
        inode, member, size = self._file, self._member, self._filled - self._chunk_start
        if inode is None or not size:
            return
        if self.is_raw:
            number = self._chunks.append(self._chunk_at, size, 0, size, self._hash.digest())
        elif member is None or self._members is None:
            number = self._chunks.append(0, 0, 0, size, self._hash.digest())
        else:
            inner = self._chunk_at - member.out_offset
            number = self._chunks.append(member.in_offset, 0, inner, size, self._hash.digest())
            if not self._is_listed:
                self._members.append(member.in_offset, 0, member.bits, member.prime, member.window)
                self._is_listed = True
        self._chunks.volume_offset[number] = inode.volume_offset + self._chunk_start
        self._chunk_start, self._chunk_at = self._filled, self._at
        if self._file_hash is None:
            self._file_hash = self._hash
        self._hash = hashlib.sha256()


def _truncate(column: "array[int]", size: int) -> None:
    del column[size:]
