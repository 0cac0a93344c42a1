"""From one layer's tar to its data blob and its tree.

The tar goes through once. Each file is cut into chunks of one size; a chunk that the blob has already is not stored again, and
zeros of sparse files are one chunk. In the blob's uncompressed space every chunk starts on a 4 KiB boundary, as the kernel reads
by blocks. Behind the chunks stand the parts that describe them, each with its tar header behind it: chunk infos with their
4 KiB header, digests, TOC. The blob's id is the digest of the whole.

With files to put first the tar must be seekable: their chunks are written before the tar is read in order, where they
are then found to be there already.

Memory: one chunk, and what is kept of each entry and chunk. The same input, arguments and zstd library give the same bytes.
"""

import hashlib
from array import array
from collections.abc import Sequence
from typing import BinaryIO, Final

import attrs
import zstandard

from agent.formats.model import ChunkTable, Digest, FormatError, Inode, InodeKind
from agent.formats.nydus_writer.records import (
    BLOB_FEATURES,
    BLOCK,
    CHUNK_BYTES,
    COMPRESSORS,
    MAX_CHUNKS,
    MAX_COMPRESSED,
    MAX_UNCOMPRESSED,
    META_HEADER,
    META_MAGIC,
    TOC_ENTRY,
    TOC_PLAIN,
    TOC_ZSTD,
    Compressor,
    check_chunk_size,
    encode_chunk_info,
    trailing_header,
)
from agent.formats.tar import TarEntry, TarParser
from agent.formats.toc import NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_NAME
from agent.formats.tree import TreeBuilder, check_xattrs, walk

BLOB_MEDIA_TYPE: Final = "application/vnd.oci.image.layer.nydus.blob.v1"
IMPLIED: Final = -1
"""`Inode.first_chunk` of a directory that the layer only implies: merging takes no attributes from it."""

_WHITEOUT: Final = b".wh."
_READ: Final = 1 << 20
_ZERO_STEP: Final = bytes(64 << 10)
_MAX_ID: Final = 0xFFFFFFFE
_MAX_TARGET: Final = 4095
_HIDDEN: Final = {name.encode() for name in (TOC_NAME, PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK)}
_KINDS: Final = {
    b"2": InodeKind.SYMLINK,
    b"3": InodeKind.CHAR,
    b"4": InodeKind.BLOCK,
    b"5": InodeKind.DIRECTORY,
    b"6": InodeKind.FIFO,
}


@attrs.frozen(eq=False)
class WrittenBlob:
    """One layer. Without file data there is no blob: `digest` is None and nothing was written.

    `root` is the layer's own tree, whiteouts included; a file's chunks are `uses[first_chunk : first_chunk + chunk_count]`,
    numbers of rows in `chunks`. There `blob_offset` and `blob_length` are the stored extent and `volume_offset` is the place in
    the blob's uncompressed space. `data_size` is where the TOC begins. `missing` are the prioritised paths that the tar does not
    have.
    """

    digest: Digest | None
    size: int
    root: Inode
    uses: "array[int]"
    chunks: ChunkTable
    chunk_size: int
    compressor: Compressor
    data_size: int = 0
    uncompressed_size: int = 0
    info_compressor: Compressor = "none"
    info_offset: int = 0
    info_stored: int = 0
    info_size: int = 0
    toc_size: int = 0
    toc_digest: bytes = bytes(32)
    missing: tuple[bytes, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def blob_id(self) -> str:
        """The name by which a bootstrap calls the blob; empty without one."""
        return "" if self.digest is None else self.digest.removeprefix("sha256:")

    @property
    def annotations(self) -> dict[str, str]:
        """What the descriptor of the blob must carry, beside `BLOB_MEDIA_TYPE`. Its diff_id is its own digest."""
        return {"containerd.io/snapshot/nydus-blob": "true"}


def write_blob(
    tar: BinaryIO,
    out: BinaryIO,
    *,
    prioritized: Sequence[bytes] = (),
    chunk_size: int = CHUNK_BYTES,
    compressor: Compressor = "zstd",
    level: int = 3,
) -> WrittenBlob:
    """Read an uncompressed tar to its end and write the blob to `out`. Blocking; for a worker thread.

    Chunks of the `prioritized` files stand first in the blob, in this order; `tar` must then be seekable.

    Raises:
        FormatError: the input is no layer, has more than the format can hold, or the chunk size is not one that readers take.
    """
    check_chunk_size(chunk_size)
    packer = _ChunkPacker(out, chunk_size, compressor, level)
    missing: list[bytes] = []
    if prioritized:
        missing = _write_first(tar, packer, prioritized)
        tar.seek(0)
    layer = _LayerSink(packer)
    parser = TarParser(layer)
    while block := tar.read(_READ):
        parser.feed(block)
    parser.finish()
    return packer.finish(layer.finish(), tuple(missing), tuple(layer.tree.warnings))


class _ChunkPacker:
    """File data in, chunks out; then the parts behind them."""

    def __init__(self, out: BinaryIO, chunk_size: int, compressor: Compressor, level: int) -> None:
        self._out = out
        self._chunk_size = chunk_size
        self._compressor: Compressor = compressor
        self._zstd = zstandard.ZstdCompressor(level=level)
        self._hash = hashlib.sha256()
        self._size = 0
        self._plain_size = 0
        self._known: dict[bytes, int] = {}
        self._zeros = -1
        self._buffer = bytearray()
        self._at = 0
        self.chunks = ChunkTable()
        self.uses = array("I")

    # --- one file at a time -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._at = 0

    def data(self, offset: int, view: memoryview) -> None:
        """Bytes of the file at `offset`, ascending; what is left out is zeros."""
        self._fill_hole(offset)
        while view:
            room = self._chunk_size - len(self._buffer)
            part, view = view[:room], view[room:]
            self._at += len(part)
            if len(part) == self._chunk_size:
                self._use(bytes(part))
                continue
            self._buffer += part
            if len(self._buffer) == self._chunk_size:
                self._flush()

    def end(self, size: int) -> None:
        self._fill_hole(size)
        if self._buffer:
            self._flush()

    def _fill_hole(self, stop: int) -> None:
        while self._at < stop:
            if not self._buffer and stop - self._at >= self._chunk_size:
                self._use_zeros()
                self._at += self._chunk_size
                continue
            step = min(stop - self._at, self._chunk_size - len(self._buffer), len(_ZERO_STEP))
            self._buffer += _ZERO_STEP[:step]
            self._at += step
            if len(self._buffer) == self._chunk_size:
                self._flush()

    def _flush(self) -> None:
        self._use(bytes(self._buffer))
        self._buffer.clear()

    def _use_zeros(self) -> None:
        if self._zeros < 0:
            self._use(bytes(self._chunk_size))
            self._zeros = self.uses[-1]
        else:
            self._note_use(self._zeros)

    def _use(self, data: bytes) -> None:
        digest = hashlib.sha256(data).digest()
        number = self._known.get(digest)
        if number is None:
            number = self._known[digest] = self._store(data, digest)
        self._note_use(number)

    def _note_use(self, number: int) -> None:
        if len(self.uses) >= MAX_CHUNKS:
            raise FormatError(f"the layer's files have more than {MAX_CHUNKS} chunks")
        self.uses.append(number)

    def _store(self, data: bytes, digest: bytes) -> int:
        stored = data
        if self._compressor == "zstd":
            packed = self._zstd.compress(data)
            if len(packed) < len(data):
                stored = packed
        offset = self._size
        number = self.chunks.append(offset, len(stored), 0, len(data), digest)
        self.chunks.volume_offset[number] = self._plain_size
        self._plain_size += len(data) + -len(data) % BLOCK
        self._emit(stored)
        if self._compressor == "none":
            self._emit(bytes(-len(data) % BLOCK))
        if len(self.chunks) > MAX_CHUNKS or self._size >= MAX_COMPRESSED or self._plain_size >= MAX_UNCOMPRESSED:
            raise FormatError("the layer has more data than one nydus blob can hold")
        return number

    # --- what stands behind -----------------------------------------------------------------------------------------------

    def finish(self, root: Inode, missing: tuple[bytes, ...], warnings: tuple[str, ...]) -> WrittenBlob:
        chunks = self.chunks
        if not len(chunks):
            return WrittenBlob(
                None, 0, root, self.uses, chunks, self._chunk_size, self._compressor, missing=missing, warnings=warnings
            )
        toc: list[bytes] = []
        # The digest of the first entry covers its tar header too; it is the only one that does.
        data_end = self._size
        self._emit(trailing_header(b"image.blob", data_end))
        toc.append(TOC_ENTRY.pack(TOC_PLAIN, 0, b"image.blob", self._hash.digest(), 0, data_end, self._plain_size))

        infos = b"".join(map(encode_chunk_info, chunks.blob_offset, chunks.blob_length, chunks.volume_offset, chunks.size))
        info_compressor: Compressor = "none"
        stored = infos
        if self._compressor == "zstd":
            packed = self._zstd.compress(infos)
            if len(packed) < len(infos):
                stored, info_compressor = packed, "zstd"
        info_offset = self._size
        kind = TOC_PLAIN if info_compressor == "none" else TOC_ZSTD
        toc.append(self._part(kind, b"blob.meta", infos, stored))
        code = COMPRESSORS[info_compressor]
        fields = (META_MAGIC, BLOB_FEATURES, code, len(chunks), info_offset, len(stored), len(infos), 0, 0, 0, META_MAGIC)
        header = META_HEADER.pack(*fields)
        toc.append(self._part(TOC_PLAIN, b"blob.meta.header", header, header))
        self._emit(trailing_header(b"blob.meta", len(stored) + len(header)))

        digests = bytes(chunks.digests)
        toc.append(self._part(TOC_PLAIN, b"blob.digest", digests, digests))
        self._emit(trailing_header(b"blob.digest", len(digests)))

        data_size = self._size
        table = b"".join(toc)
        table += trailing_header(b"rafs.blob.toc", len(table))
        self._emit(table)
        return WrittenBlob(
            digest=Digest("sha256:" + self._hash.hexdigest()),
            size=self._size,
            root=root,
            uses=self.uses,
            chunks=chunks,
            chunk_size=self._chunk_size,
            compressor=self._compressor,
            data_size=data_size,
            uncompressed_size=self._plain_size,
            info_compressor=info_compressor,
            info_offset=info_offset,
            info_stored=len(stored),
            info_size=len(infos),
            toc_size=len(table),
            toc_digest=hashlib.sha256(table).digest(),
            missing=missing,
            warnings=warnings,
        )

    def _part(self, kind: int, name: bytes, plain: bytes, stored: bytes) -> bytes:
        """Write a part; gives its entry in the TOC."""
        offset = self._size
        self._emit(stored)
        return TOC_ENTRY.pack(kind, 0, name, hashlib.sha256(plain).digest(), offset, len(stored), len(plain))

    def _emit(self, data: bytes) -> None:
        self._hash.update(data)
        self._size += len(data)
        self._out.write(data)


class _LayerSink:
    """Takes what the tar parser finds: the tree, and for each file its chunks."""

    def __init__(self, packer: _ChunkPacker) -> None:
        self.tree = TreeBuilder()
        self._packer = packer
        self._directories: set[bytes] = set()
        self._file: Inode | None = None

    def entry(self, entry: TarEntry) -> None:
        path = entry.path
        if not (0 <= entry.uid <= _MAX_ID and 0 <= entry.gid <= _MAX_ID):
            raise FormatError(f"owner {entry.uid}:{entry.gid} of {path[:200]!r}")
        if entry.kind == b"1":
            self.tree.link(path, entry.link)
            return
        if entry.kind == b"0" and path.removeprefix(b"./").removeprefix(b"/") in _HIDDEN:
            return
        inode = Inode(_KINDS.get(entry.kind, InodeKind.FILE), entry.mode, entry.uid, entry.gid, entry.mtime_ns)
        if entry.xattrs:
            inode.xattrs = check_xattrs(entry.xattrs.items(), path, self.tree)
        if inode.kind is InodeKind.SYMLINK:
            inode.target, inode.size = entry.link, len(entry.link)
            if not 0 < inode.size <= _MAX_TARGET or b"\0" in entry.link:
                raise FormatError(f"symlink {path[:200]!r} has a target of {inode.size} bytes")
        elif inode.kind in (InodeKind.CHAR, InodeKind.BLOCK):
            inode.rdev = entry.rdev
        elif inode.kind is InodeKind.DIRECTORY:
            self._directories.add(clean(path))
        self.tree.add(path, inode)
        parent, _, name = path.rstrip(b"/").rpartition(b"/")
        if name.startswith(_WHITEOUT):
            # A directory that the layer removes and has itself is a new one, even if only implied.
            self._directories.add(clean(parent + b"/" + name.removeprefix(_WHITEOUT)))
        if inode.kind is InodeKind.FILE:
            inode.size = entry.size
            inode.first_chunk = len(self._packer.uses)
            self._file = inode
            self._packer.begin()

    def data(self, offset: int, view: memoryview) -> None:
        if self._file is not None:
            self._packer.data(offset, view)

    def end(self) -> None:
        inode = self._file
        if inode is not None:
            self._packer.end(inode.size)
            inode.chunk_count = len(self._packer.uses) - inode.first_chunk
            self._file = None

    def finish(self) -> Inode:
        root = self.tree.finish()
        for path, inode in walk(root):
            if inode.kind is InodeKind.DIRECTORY and path[1:] not in self._directories:
                inode.first_chunk = IMPLIED
        return root


# --- files that go first ----------------------------------------------------------------------------------------------------


class _Finder:
    """First reading: where each path is."""

    def __init__(self) -> None:
        self.entries: dict[bytes, TarEntry] = {}

    def entry(self, entry: TarEntry) -> None:
        self.entries[clean(entry.path)] = entry

    def data(self, offset: int, view: memoryview) -> None:
        """Not yet."""

    def end(self) -> None:
        """Nothing to close."""


class _FileSink:
    """One file's data go to the packer; there is no tree yet."""

    def __init__(self, packer: _ChunkPacker) -> None:
        self._packer = packer
        self._size = 0
        self.is_complete = False

    def entry(self, entry: TarEntry) -> None:
        self._size = entry.size
        self._packer.begin()

    def data(self, offset: int, view: memoryview) -> None:
        self._packer.data(offset, view)

    def end(self) -> None:
        self._packer.end(self._size)
        self.is_complete = True


def _write_first(tar: BinaryIO, packer: _ChunkPacker, paths: Sequence[bytes]) -> list[bytes]:
    """Write the chunks of these files; gives the paths that are not there."""
    finder = _Finder()
    parser = TarParser(finder)
    tar.seek(0)
    while block := tar.read(_READ):
        parser.feed(block)
    parser.finish()
    missing = []
    for path in paths:
        entry = finder.entries.get(clean(path))
        seen: set[int] = set()
        while entry is not None and entry.kind == b"1" and id(entry) not in seen:  # a hostile tar may have circles
            seen.add(id(entry))
            entry = finder.entries.get(clean(entry.link))
        if entry is None:
            missing.append(path)
        elif entry.kind == b"0" and entry.size:
            _write_file(tar, packer, entry)
    # Nothing of the tree uses these yet.
    del packer.uses[:]
    return missing


def _write_file(tar: BinaryIO, packer: _ChunkPacker, entry: TarEntry) -> None:
    sink = _FileSink(packer)
    parser = TarParser(sink)
    tar.seek(entry.header_offset)
    left = entry.data_offset + entry.stored_size - entry.header_offset
    while left > 0:
        block = tar.read(min(left, _READ))
        if not block:
            break
        parser.feed(block)
        left -= len(block)
    if not sink.is_complete:
        raise FormatError("the tar became shorter while it was read")


def clean(path: bytes) -> bytes:
    """A path of the tar without what does not count: "." and empty components; ".." goes up and stops at the root."""
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            parts = parts[:-1]
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)
