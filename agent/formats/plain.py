"""A layer without an index: the whole blob goes through once, and the same `LayerIndex` comes out.

`PlainLayerParser.feed` takes the blob as it arrives and gives the runs to write into the volume, which is laid out on the fly: a
file's extent starts at the next 4 KiB boundary. A file whose content an earlier file has is found when it ends; its extent is
then used again by the next one, which is why runs must be written in the order in which they come, and why some runs are
zeros (what a dropped file had left in places that must read as zeros).

Memory is bounded by one input block and one step of output; the index is what grows. Nothing is verified before `finish`: the
caller compares `diff_id` and `blob_digest` with what the image says, and shows the volume to nobody before that.
"""

import hashlib
from array import array
from typing import Final

import attrs

from agent.formats.estargz import NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_NAME
from agent.formats.inflate import Inflater, open_inflater, sniff
from agent.formats.layout import round_up
from agent.formats.model import ChunkTable, Digest, FormatError, Inode, InodeKind, LayerIndex
from agent.formats.pieces import cut_fixed
from agent.formats.tar import TarEntry, TarParser
from agent.formats.tree import TreeBuilder, check_xattrs

CHUNK_BYTES: Final = 4 << 20
"""Chunks of a plain layer: the default of eStargz, so that equal files have equal chunk digests in both."""
MAX_VOLUME_BYTES: Final = 1 << 40
"""Sparse files (lastlog with a high uid is 876 GB) are cheap for us, but every 4 MiB of them is a row in the chunk table."""

_ZEROS: Final = bytes(64 << 10)
_ZERO_CHUNK: Final = hashlib.sha256(bytes(CHUNK_BYTES)).digest()
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
        self._volume = _VolumeFiller()
        self._tar = TarParser(self._volume)

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
        index = self._volume.finish(self._blob_size)
        return PlainLayer(
            index,
            Digest("sha256:" + self._diff_hash.hexdigest()),
            Digest("sha256:" + self._blob_hash.hexdigest()),
            self._blob_size,
            self._tar_size,
            self._compression,
        )

    def _start(self, head: bytes) -> None:
        self._compression = sniff(head)
        self._inflater = open_inflater(self._compression)

    def _inflate(self, data: memoryview) -> None:
        assert self._inflater is not None
        for part in self._inflater.feed(data):
            self._tar_size += len(part)
            if self._most is not None and self._tar_size > self._most:
                raise FormatError(f"the layer has more than the {self._most} bytes that were promised")
            self._diff_hash.update(part)
            self._tar.feed(part)


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
        self._hash = hashlib.sha256()

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
        inode = Inode(_KINDS.get(entry.kind, InodeKind.FILE), entry.mode, entry.uid, entry.gid, entry.mtime_ns)
        if entry.xattrs:
            inode.xattrs = check_xattrs(entry.xattrs.items(), path, self._tree)
        if inode.kind is InodeKind.SYMLINK:
            inode.target, inode.size = entry.link, len(entry.link)
            if not 0 < inode.size < 4096 or b"\0" in entry.link:
                raise FormatError(f"symlink {path[:200]!r} has a target of {inode.size} bytes")
        elif inode.kind in (InodeKind.CHAR, InodeKind.BLOCK):
            inode.rdev = entry.rdev
            if not all(0 <= number <= 0xFFFFFFFF for number in entry.rdev):
                raise FormatError(f"device {entry.rdev} of {path[:200]!r}")
        self._tree.add(path, inode)
        if inode.kind is InodeKind.FILE and entry.size:
            if self._cursor + entry.size > MAX_VOLUME_BYTES:
                raise FormatError(f"the layer's files have more than {MAX_VOLUME_BYTES} bytes")
            inode.size = entry.size
            inode.volume_offset = self._cursor
            inode.first_chunk = len(self._chunks)
            self._file, self._filled = inode, 0
            self._hash = hashlib.sha256()

    def data(self, offset: int, view: memoryview) -> None:
        inode = self._file
        if inode is None:
            return
        if offset > self._filled:
            self._fill_hole(inode, offset)
        self._runs.append((inode.volume_offset + offset, bytes(view)))
        while view:
            part = view[: CHUNK_BYTES - self._filled % CHUNK_BYTES]
            self._hash.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled % CHUNK_BYTES == 0:
                self._close_chunk(CHUNK_BYTES)

    def finish(self, blob_size: int) -> LayerIndex:
        root = self._tree.finish()
        return LayerIndex(
            "tar",
            "whole",
            root,
            self._chunks,
            cut_fixed(blob_size),
            self._cursor,
            self._entries,
            warnings=tuple(self._tree.warnings),
        )

    def _fill_hole(self, inode: Inode, stop: int) -> None:
        """The file has zeros up to `stop`; only what was written before needs a run."""
        self._blank(inode.volume_offset + self._filled, inode.volume_offset + stop)
        while self._filled < stop:
            size = min(CHUNK_BYTES - self._filled % CHUNK_BYTES, stop - self._filled)
            self._filled += size
            if size == CHUNK_BYTES:
                self._append_chunk(_ZERO_CHUNK, CHUNK_BYTES)
                continue
            for at in range(0, size, len(_ZEROS)):
                self._hash.update(_ZEROS[: size - at])
            if self._filled % CHUNK_BYTES == 0:
                self._close_chunk(CHUNK_BYTES)

    def _blank(self, start: int, stop: int) -> None:
        for at in range(start, min(stop, self._dirty), len(_ZEROS)):
            self._runs.append((at, _ZEROS[: min(stop, self._dirty) - at]))

    def _close_chunk(self, size: int) -> None:
        self._append_chunk(self._hash.digest(), size)
        self._hash = hashlib.sha256()

    def _append_chunk(self, digest: bytes, size: int) -> None:
        number = self._chunks.append(0, 0, 0, size, digest)
        inode = self._file
        assert inode is not None
        self._chunks.volume_offset[number] = inode.volume_offset + (number - inode.first_chunk) * CHUNK_BYTES

    def end(self) -> None:
        inode = self._file
        if inode is None:
            return
        if self._filled < inode.size:
            self._fill_hole(inode, inode.size)
        if self._filled % CHUNK_BYTES:
            self._close_chunk(self._filled % CHUNK_BYTES)
        self._file = None
        chunks, first = self._chunks, inode.first_chunk
        inode.chunk_count = len(chunks) - first
        stop = inode.volume_offset + inode.size
        twin = self._known.setdefault((inode.size, bytes(chunks.digests[32 * first :])), inode)
        if twin is inode:
            end = round_up(stop)
            self._blank(stop, end)
            self._cursor = end
            return
        # Written already; the next file is written over it, and what stays visible of it is blanked then.
        self._dirty = max(self._dirty, stop)
        inode.first_chunk, inode.volume_offset = twin.first_chunk, twin.volume_offset
        for column in (chunks.blob_offset, chunks.blob_length, chunks.inner_offset, chunks.size, chunks.volume_offset):
            _truncate(column, first)
        del chunks.digests[32 * first :]


def _truncate(column: "array[int]", size: int) -> None:
    del column[size:]
