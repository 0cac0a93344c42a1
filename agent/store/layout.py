"""The files of one stored layer, how they come into being and how they are checked when they are opened.

`layers/<64 hex digits>/` holds::

    header        msgpack map, see `Header`; its `version` is 2
    chunks.table  ChunkTable.to_bytes        pieces.table  PieceTable.to_bytes
    members.table MemberTable.to_bytes, only if the format has one
    meta.erofs    metadata image
    data          the volume, sparse         blob          the compressed bytes, sparse
    blocks.map    what fsmount may serve     chunks.map    chunks that are here     pieces.map    pieces that are held
    chunks.doubt  pieces.doubt               the same, of what an unclean boot has put in doubt
    chunks.learnt digests of chunks, only if the index lacks some (`agent.store.learnt`)
    chunks.saved  pieces.saved               checkpoint: magic SHOALCP1, u64 bits, u32 CRC-32 of the bits, bits; little-endian

The directory is made under `temporary/` and renamed, so that it is complete or absent. The header has the SHA-256 of the
tables and of the metadata image: after a power cut, what a file system lost behind the rename is noticed.
"""

import contextlib
import hashlib
import mmap
import os
import shutil
import struct
import time
import zlib
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final, Self

import attrs
import msgpack

from agent.formats.model import (
    BLOCK_SIZE,
    BlobPart,
    ChunkTable,
    Digest,
    FormatError,
    LayerIndex,
    MemberTable,
    PieceTable,
    parse_digest,
)
from agent.store.learnt import LearntDigests
from agent.store.presence import Presence, blocks_of, find_firsts
from fsmount.bitmap import Bitmap, BitmapError

VERSION: Final = 2
MAX_HEADER: Final = 1 << 20
MAX_TABLE: Final = 1 << 30
MAX_VOLUME: Final = 1 << 40
"""A block map of 32 MiB."""
MAX_PREFETCH: Final = 1 << 16
MAX_PARTS: Final = 1 << 12
"""Most pieces wanted first and most parts of a blob; together they fit the header."""
_SAVED: Final = struct.Struct("<8sQI")
_SAVED_MAGIC: Final = b"SHOALCP1"
_CODECS: Final = frozenset({"gzip", "zstd", "zstd/raw", "lz4/raw", "gzip/raw", "raw", "deflate", "whole"})


class BrokenLayer(Exception):
    """A stored layer is not what it should be; its text says how."""


@attrs.frozen
class Header:
    """What is known of a layer besides its tables."""

    digest: Digest
    format: str
    codec: str
    blob_size: int
    volume_size: int
    prefetch_stop: int
    entry_count: int
    meta_size: int
    meta_sha256: bytes
    chunks_sha256: bytes
    pieces_sha256: bytes
    created_s: int
    extra: dict[str, str | int]
    members_sha256: bytes = b""
    """Empty if there is no members.table."""
    prefetch_pieces: tuple[int, ...] = ()
    parts: tuple[BlobPart, ...] = ()

    def to_bytes(self) -> bytes:
        """The file's content."""
        values = attrs.asdict(self, recurse=False)
        values["parts"] = [attrs.astuple(part) for part in self.parts]
        packed: bytes = msgpack.packb({"version": VERSION, **values})
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read the file's content.

        Raises:
            BrokenLayer: it is not a header of this version.
        """
        try:
            values: Any = msgpack.unpackb(data)
            if not isinstance(values, dict) or values.pop("version", None) != VERSION:
                raise BrokenLayer("its header has no known version")
            values["prefetch_pieces"] = tuple(values["prefetch_pieces"])
            values["parts"] = tuple(BlobPart(parse_digest(digest), *rest) for digest, *rest in values["parts"])
            header = cls(**values)
        except (ValueError, TypeError, KeyError, FormatError, msgpack.UnpackException) as exc:
            raise BrokenLayer(f"its header cannot be read: {exc}") from exc
        _check_header(values)
        return header


def _check_header(values: dict[str, Any]) -> None:
    numbers = [values[name] for name in ("blob_size", "volume_size", "entry_count", "meta_size", "created_s")]
    hashes = [values[name] for name in ("meta_sha256", "chunks_sha256", "pieces_sha256")]
    if (
        not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
        or type(values["prefetch_stop"]) is not int
        or not all(isinstance(item, bytes) and len(item) == 32 for item in hashes)
        or not isinstance(values["format"], str)
        or values["codec"] not in _CODECS
        or not isinstance(values["digest"], str)
        or not isinstance(values["extra"], dict)
        or not isinstance(values["members_sha256"], bytes)
        or len(values["members_sha256"]) not in {0, 32}
    ):
        raise BrokenLayer("its header has values out of range")
    try:
        parse_digest(values["digest"])
    except FormatError as exc:
        raise BrokenLayer(f"its header names no digest: {exc}") from exc


@attrs.frozen
class LayerPaths:
    """Where the files of a layer are."""

    root: Path
    header: Path
    chunk_table: Path
    piece_table: Path
    member_table: Path
    image: Path
    data: Path
    blob: Path
    block_map: Path
    chunk_map: Path
    piece_map: Path
    chunk_doubt: Path
    piece_doubt: Path
    learnt: Path
    chunk_saved: Path
    piece_saved: Path

    @classmethod
    def of(cls, root: Path) -> Self:
        """The paths below a layer's directory."""
        return cls(
            root=root,
            header=root / "header",
            chunk_table=root / "chunks.table",
            piece_table=root / "pieces.table",
            member_table=root / "members.table",
            image=root / "meta.erofs",
            data=root / "data",
            blob=root / "blob",
            block_map=root / "blocks.map",
            chunk_map=root / "chunks.map",
            piece_map=root / "pieces.map",
            chunk_doubt=root / "chunks.doubt",
            piece_doubt=root / "pieces.doubt",
            learnt=root / "chunks.learnt",
            chunk_saved=root / "chunks.saved",
            piece_saved=root / "pieces.saved",
        )


def write_layer(
    root: Path, digest: Digest, index: LayerIndex, meta_image: bytes | bytearray, extra: dict[str, str | int]
) -> None:
    """Write all files of a new layer into the empty directory `root`.

    Raises:
        FormatError: the index contradicts itself.
        OSError: the disk refused.
    """
    if index.codec not in _CODECS:
        raise FormatError(f"codec {index.codec!r} is unknown")
    if index.volume_size > MAX_VOLUME:
        raise FormatError(f"the files of the layer have {index.volume_size} bytes, more than can be presented")
    find_firsts(index.chunks, index.volume_size)
    check_pieces(index.chunks, index.pieces, index.codec)
    prefetch_pieces = index.prefetch_pieces[:MAX_PREFETCH]
    check_hints(index.pieces, prefetch_pieces, index.parts)
    member_table = index.members.to_bytes() if index.members is not None else b""
    check_members(index.chunks, MemberTable.from_bytes(member_table) if member_table else None, index.codec)
    paths = LayerPaths.of(root)
    chunk_table, piece_table = index.chunks.to_bytes(), index.pieces.to_bytes()
    header = Header(
        digest=digest,
        format=index.format,
        codec=index.codec,
        blob_size=index.pieces.blob_size,
        volume_size=index.volume_size,
        prefetch_stop=index.prefetch_stop,
        entry_count=index.entry_count,
        meta_size=len(meta_image),
        meta_sha256=hashlib.sha256(meta_image).digest(),
        chunks_sha256=hashlib.sha256(chunk_table).digest(),
        pieces_sha256=hashlib.sha256(piece_table).digest(),
        created_s=int(time.time()),
        extra=extra,
        members_sha256=hashlib.sha256(member_table).digest() if member_table else b"",
        prefetch_pieces=prefetch_pieces,
        parts=index.parts,
    )
    for path, content in (
        (paths.header, header.to_bytes()),
        (paths.chunk_table, chunk_table),
        (paths.piece_table, piece_table),
        (paths.image, meta_image),
    ):
        path.write_bytes(content)
    if member_table:
        paths.member_table.write_bytes(member_table)
    for path, size in ((paths.data, data_size(index.volume_size)), (paths.blob, header.blob_size)):
        with path.open("wb") as file:
            file.truncate(size)
    if not index.chunks.is_complete:
        LearntDigests.create(paths.learnt, len(index.chunks))
    chunks, pieces, blocks = len(index.chunks), len(index.pieces), blocks_of(index.volume_size)
    for path, bits, unit in (
        (paths.chunk_map, chunks, 1),
        (paths.chunk_doubt, chunks, 1),
        (paths.piece_map, pieces, 1),
        (paths.piece_doubt, pieces, 1),
        (paths.block_map, blocks, BLOCK_SIZE),
    ):
        Bitmap.create(path, bits, unit).close()


def sync_layer(root: Path) -> None:
    """Make a layer's index files durable."""
    paths = LayerPaths.of(root)
    for path in (paths.member_table, paths.learnt):
        if path.exists():
            sync_path(path)
    for path in (paths.header, paths.chunk_table, paths.piece_table, paths.image, root, root.parent):
        sync_path(path)


def sync_path(path: Path) -> None:
    """fsync a file or directory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_durably(path: Path, content: bytes) -> None:
    """Give a small file new content; after a power cut it has the old or the new."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_path(path.parent)


def data_size(volume_size: int) -> int:
    """Size of the data file: the volume up to a whole block, so that its last block can be read like any other."""
    return blocks_of(volume_size) * BLOCK_SIZE


def check_pieces(chunks: ChunkTable, pieces: PieceTable, codec: str) -> None:
    """Check that a piece table fits a chunk table, so that nothing later needs to.

    Pieces of a layer without random access hold no chunks: its table may end at chunk 0.

    Raises:
        FormatError: it does not.
    """
    starts, first = pieces.starts, pieces.first_chunk
    if len(starts) < 2 or len(first) != len(starts) or starts[0] != 0 or first[0] != 0:
        raise FormatError("the piece table does not begin at the start of the blob")
    if any(a > b for a, b in pairwise(starts)) or any(a > b for a, b in pairwise(first)):
        raise FormatError("the piece table is not in ascending order")
    if first[-1] != len(chunks) and not (codec == "whole" and first[-1] == 0):
        raise FormatError(f"the piece table ends at chunk {first[-1]}, the chunk table has {len(chunks)}")
    if starts[-1] >= 1 << 62 or not -1 <= pieces.index_piece < len(pieces):
        raise FormatError(
            f"the piece table has values out of range: blob of {starts[-1]} bytes, index piece {pieces.index_piece}"
        )
    if len(pieces.digests) not in {0, 32 * len(pieces)}:
        raise FormatError(f"the piece table has {len(pieces.digests)} bytes of digests for {len(pieces)} pieces")
    if codec != "whole" and not chunks.is_complete:
        for piece in range(len(pieces)):
            if not pieces.digest(piece) and not all(map(chunks.is_known, pieces.chunks_of(piece))):
                raise FormatError(f"neither piece {piece} nor all of its chunks have a digest")


def check_hints(pieces: PieceTable, prefetch_pieces: Sequence[int], parts: Sequence[BlobPart]) -> None:
    """Check that what is wanted first are pieces, and that the parts of a spliced blob make it up, each of whole pieces.

    Raises:
        FormatError: it is not so.
    """
    if len(prefetch_pieces) > MAX_PREFETCH or len(parts) > MAX_PARTS:
        raise FormatError(f"{len(prefetch_pieces)} pieces wanted first and {len(parts)} parts of the blob are too many")
    if not all(type(number) is int and 0 <= number < len(pieces) for number in prefetch_pieces):
        raise FormatError("a piece that is wanted first does not exist")
    if not parts:
        return
    for part in parts:
        parse_digest(part.digest)
    for part in parts:
        if any(type(value) is not int for value in (part.size, part.start, part.blob_size)):
            raise FormatError("a part of the blob has a size that is no number")
        if not 0 <= part.start <= part.start + part.size <= part.blob_size < 1 << 62:
            raise FormatError("a part of the blob has a size out of range")
    ends = list(accumulate(part.size for part in parts))
    if ends[-1] != pieces.blob_size:
        raise FormatError(f"the parts of the blob have {ends[-1]} bytes, its pieces {pieces.blob_size}")
    starts = pieces.starts
    if any(starts[bisect_left(starts, end)] != end for end in ends):
        raise FormatError("a piece lies in two parts of the blob")


def check_members(chunks: ChunkTable, members: MemberTable | None, codec: str) -> None:
    """Check that a layer that cannot be decoded without a member table has one, with all the members its chunks lie in.

    Raises:
        FormatError: it is not so.
    """
    if codec != "deflate":
        return
    if members is None:
        raise FormatError("a layer resumed within a deflate stream has no member table")
    if not set(chunks.blob_offset) <= set(members.blob_offset):
        raise FormatError("a chunk begins in a member that the member table lacks")


def read_saved(path: Path, bits: int) -> bytes:
    """The bitmap of a checkpoint; empty if there is none that can be trusted."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b""
    if len(data) != _SAVED.size + (bits + 7) // 8:
        return b""
    magic, saved_bits, crc = _SAVED.unpack_from(data)
    content = data[_SAVED.size :]
    return content if magic == _SAVED_MAGIC and saved_bits == bits and zlib.crc32(content) == crc else b""


def write_saved(path: Path, bits: int, content: bytes) -> None:
    """Keep a bitmap over a power cut."""
    replace_durably(path, _SAVED.pack(_SAVED_MAGIC, bits, zlib.crc32(content)) + content)


@attrs.frozen
class OpenedLayer:
    """All that `open_layer` has read and mapped."""

    header: Header
    chunks: ChunkTable
    pieces: PieceTable
    members: MemberTable | None
    presence: Presence
    piece_map: Bitmap
    piece_doubt: Bitmap
    learnt: LearntDigests | None
    data_fd: int
    blob_fd: int


def open_layer(root: Path, *, is_unclean: bool) -> OpenedLayer:
    """Open a layer's files and check every one of them.

    After an unclean boot all that was here or checkpointed is in doubt when this returns.

    Raises:
        BrokenLayer: a file is missing, has the wrong size or content.
    """
    fds: list[int] = []
    maps: list[Bitmap] = []
    try:
        opened = _open_layer(LayerPaths.of(root), fds, maps, is_unclean=is_unclean)
    except BaseException as exc:
        for fd in fds:
            os.close(fd)
        for bitmap in maps:
            bitmap.close()
        if isinstance(exc, OSError | ValueError | FormatError):
            raise BrokenLayer(str(exc)) from exc
        raise
    return opened


def _open_layer(paths: LayerPaths, fds: list[int], maps: list[Bitmap], *, is_unclean: bool) -> OpenedLayer:
    header = Header.from_bytes(_read_small(paths.header, MAX_HEADER))
    if header.digest != "sha256:" + paths.root.name:
        raise BrokenLayer(f"its header is that of {header.digest}")
    chunks = ChunkTable.from_bytes(_read_hashed(paths.chunk_table, header.chunks_sha256))
    pieces = PieceTable.from_bytes(_read_hashed(paths.piece_table, header.pieces_sha256))
    check_pieces(chunks, pieces, header.codec)
    check_hints(pieces, header.prefetch_pieces, header.parts)
    members = _map_members(paths.member_table, header.members_sha256) if header.members_sha256 else None
    check_members(chunks, members, header.codec)
    if pieces.blob_size != header.blob_size:
        raise BrokenLayer(f"its pieces cover {pieces.blob_size} bytes of a blob of {header.blob_size}")
    if is_unclean:
        _check_image(paths.image, header)
    elif paths.image.stat().st_size != header.meta_size:
        raise BrokenLayer("its metadata image has the wrong size")
    for path, size in ((paths.data, data_size(header.volume_size)), (paths.blob, header.blob_size)):
        fds.append(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
        found = os.fstat(fds[-1]).st_size
        if found != size:
            raise BrokenLayer(f"{path.name} has {found} bytes, not {size}")
    for path, bits, unit in (
        (paths.chunk_map, len(chunks), 1),
        (paths.chunk_doubt, len(chunks), 1),
        (paths.block_map, blocks_of(header.volume_size), BLOCK_SIZE),
        (paths.piece_map, len(pieces), 1),
        (paths.piece_doubt, len(pieces), 1),
    ):
        bitmap = Bitmap.open(path)
        maps.append(bitmap)
        if bitmap.bits != bits or bitmap.unit != unit:
            raise BitmapError(f"{path.name} has {bitmap.bits} bits of {bitmap.unit}, not {bits} of {unit}")
    chunk_map, chunk_doubt, block_map, piece_map, piece_doubt = maps
    learnt = LearntDigests.open(paths.learnt, chunks)
    if learnt is not None:
        fds.append(learnt.fileno())
    presence = Presence(chunks, header.volume_size, chunk_map=chunk_map, doubt_map=chunk_doubt, block_map=block_map)
    if is_unclean:
        presence.doubt_all(read_saved(paths.chunk_saved, len(chunks)))
        doubt_pieces(piece_map, piece_doubt, read_saved(paths.piece_saved, len(pieces)))
    else:
        presence.rebuild_blocks()
    return OpenedLayer(header, chunks, pieces, members, presence, piece_map, piece_doubt, learnt, *fds[:2])


def doubt_pieces(piece_map: Bitmap, piece_doubt: Bitmap, also: bytes = b"") -> None:
    """Put in doubt the pieces that are held, and those of `also` (a bitmap)."""
    piece_doubt.load(piece_map.to_bytes())
    if also:
        piece_doubt.load(also)
    piece_map.clear(0, piece_map.bits)


def _read_small(path: Path, most: int) -> bytes:
    size = path.stat().st_size
    if size > most:
        raise BrokenLayer(f"{path.name} has {size} bytes")
    return path.read_bytes()


def _read_hashed(path: Path, sha256: bytes) -> bytes:
    data = _read_small(path, MAX_TABLE)
    if hashlib.sha256(data).digest() != sha256:
        raise BrokenLayer(f"{path.name} does not match its checksum")
    return data


def _map_members(path: Path, sha256: bytes) -> MemberTable:
    """The table over the mapped file: its windows, tens of megabytes in a large layer, are page cache and not memory of ours."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not 0 < size <= MAX_TABLE:
            raise BrokenLayer(f"{path.name} has {size} bytes")
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)  # unmapped when the table's last view of it is gone
    if hashlib.sha256(mapped).digest() != sha256:
        raise BrokenLayer(f"{path.name} does not match its checksum")
    return MemberTable.from_bytes(memoryview(mapped))


def _check_image(path: Path, header: Header) -> None:
    if not is_image_good(path, header):
        raise BrokenLayer(f"{path.name} does not match its checksum")


def is_image_good(path: Path, header: Header) -> bool:
    """Whether the metadata image is still as it was made."""
    with path.open("rb") as file:
        return (
            os.fstat(file.fileno()).st_size == header.meta_size
            and hashlib.file_digest(file, "sha256").digest() == header.meta_sha256
        )


def set_aside(root: Path, quarantine: Path) -> None:
    """Move a broken layer out of the way, without the large files; its small ones tell what happened."""
    target = quarantine / root.name
    if target.is_file() or target.is_symlink():
        target.unlink()
    shutil.rmtree(target, ignore_errors=True)
    quarantine.mkdir(exist_ok=True)
    root.rename(target)
    paths = LayerPaths.of(target)
    for path in (paths.data, paths.blob):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
