"""Indexes of plain layers, passed on within the fleet: what one node learnt by streaming a layer spares the others doing so.

Nothing in an image vouches for such an index. The node that made it signs it with its own key, and the document is sealed with a
key that only the fleet has. It is used by nodes with the setting `trust_fleet_indexes` and by nobody else, because of what that
trust means: the digest in the manifest covers the compressed layer as a whole, so **any member of the fleet (whoever has its
secret) can make the files of a plain image look different, or be different, on the nodes that switched this on**. A node that
builds its own index from the layer needs to trust nobody.

Who signed need not be who sends it, nor be there any more: the seal proves that the maker was one of the fleet, the signature
which one, and a node that only passes the document on can change neither. Were only the maker's own copy good, the index would be
gone with the one node that the registry was read from, just when it is wanted most. A node that took an index shares it as it is.

The document: magic `SHOALIX1`, the maker's Ed25519 public key (32), signature (64), HMAC-SHA256 of the fleet (32), and a zstd
frame of: u32 length of a msgpack map, the map (see `_HEAD_TYPES`; `lengths` are those of the tables), chunk table, piece table,
member table (may be empty), EROFS metadata image. Little-endian. The tables are behind the map and not in it, so that reading
them makes no copy: the windows of checkpoints are tens of megabytes.
"""

import hashlib
import hmac
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Protocol

import attrs
import msgpack
import structlog
import trio
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from agent.formats.model import (
    BLOCK_SIZE,
    MAX_CHUNK_BYTES,
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
from agent.images.records import FleetRecords, index_key
from agent.resolve import Counters
from agent.store import StoredLayer
from agent.store.layout import check_members, check_pieces
from agent.store.presence import blocks_of, find_firsts
from agent.swarm import Identity, Swarm
from agent.swarm.identity import peer_id_of
from agent.transfer import PeerClient
from fsmount.erofs import ErofsError, FileKind, ImageReader

log = structlog.get_logger()

VERSION: Final = 1
MAX_DOCUMENT_BYTES: Final = 32 << 20
MAX_BODY_BYTES: Final = 96 << 20
"""Uncompressed: the checkpoints of 3 GB of gzip at one a megabyte. Larger layers are not shared; each node streams them."""
MAX_META_BYTES: Final = 32 << 20
MAX_CHUNKS: Final = 1 << 18
MAX_PIECES: Final = 1 << 17
MAX_MEMBERS: Final = 1 << 17
MAX_ENTRIES: Final = 1 << 18
"""Directory entries of the metadata image. All these are several times what layers have, and together keep a hostile document
from taking more than 256 MB."""
MAX_VOLUME_BYTES: Final = 1 << 40
FETCH_S: Final = 20.0
"""For the largest document 13 Mbit/s; a slower fleet gains little by it."""
MAX_TRIES: Final = 3

_MAGIC: Final = b"SHOALIX1"
_DOMAIN: Final = b"shoal layer index\n"
_SEAL: Final = struct.Struct("<8s32s64s32s")
_MAX_HEAD: Final = 4096
_MAX_WINDOW: Final = 8 << 20
_LEVEL: Final = 3
_CODECS: Final = frozenset({"deflate", "gzip", "gzip/raw", "raw", "zstd", "zstd/raw"})
_HEAD_TYPES: Final[dict[str, type]] = {
    "version": int,
    "blob": str,
    "blob_size": int,
    "format": str,
    "codec": str,
    "volume_size": int,
    "entry_count": int,
    "diff_id": str,
    "lengths": list,
}


class IndexedLayer(Protocol):
    """What is shared of a layer: a `StoredLayer` will do."""

    @property
    def digest(self) -> Digest:
        """Of the blob."""

    @property
    def format(self) -> str:
        """For people."""

    @property
    def codec(self) -> str:
        """See `LayerIndex`."""

    @property
    def volume_size(self) -> int:
        """Bytes of the volume."""

    @property
    def entry_count(self) -> int:
        """Entries of the tree."""

    @property
    def chunks(self) -> ChunkTable:
        """All chunks."""

    @property
    def pieces(self) -> PieceTable:
        """All pieces, each with its digest."""

    @property
    def members(self) -> MemberTable | None:
        """Checkpoints, if the codec needs them."""

    @property
    def extra(self) -> dict[str, str | int]:
        """With `diff_id`, what the layer unpacks to."""


@attrs.frozen
class FleetIndex:
    """An index that a member of the fleet made and this node has checked as far as it can be: everything fits together and lies
    within bounds. `index.root` is bare: the tree is in `meta`, the EROFS image. `raw` is the document."""

    index: LayerIndex
    meta: bytes = attrs.field(repr=False)
    diff_id: str
    signer: str
    raw: bytes = attrs.field(repr=False)


def is_shareable(layer: IndexedLayer) -> bool:
    """Whether the layer can be read at random and by pieces that can be verified one by one, with nothing but its index."""
    pieces = layer.pieces
    return layer.codec in _CODECS and pieces.index_piece < 0 and all(pieces.digest(number) for number in range(len(pieces)))


# --- the seal ------------------------------------------------------------------------------------------------------------------


def _mac(fleet_key: bytes, public: bytes, signature: bytes, message: bytes) -> bytes:
    return hmac.digest(fleet_key, _DOMAIN + public + signature + message, "sha256")


def _message(frame: bytes | memoryview) -> bytes:
    return _DOMAIN + hashlib.sha256(frame).digest()


def seal(frame: bytes, identity: Identity, fleet_key: bytes) -> bytes:
    """Sign compressed content for the fleet."""
    message = _message(frame)
    public = identity.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    signature = identity.key.sign(message)
    return _SEAL.pack(_MAGIC, public, signature, _mac(fleet_key, public, signature, message)) + frame


def unseal(raw: bytes, fleet_key: bytes) -> tuple[memoryview, str]:
    """The compressed content and the peer id of who signed it.

    Raises:
        FormatError: no document, not of this fleet, or not as it was signed.
    """
    if not _SEAL.size < len(raw) <= MAX_DOCUMENT_BYTES:
        raise FormatError(f"a layer index of {len(raw)} bytes")
    magic, public, signature, mac = _SEAL.unpack_from(raw)
    if magic != _MAGIC:
        raise FormatError("not a layer index")
    frame = memoryview(raw)[_SEAL.size :]
    message = _message(frame)
    if not hmac.compare_digest(mac, _mac(fleet_key, public, signature, message)):
        raise FormatError("a layer index that was damaged, or made by a node of another fleet")
    try:
        key = Ed25519PublicKey.from_public_bytes(public)
        key.verify(signature, message)
    except (ValueError, InvalidSignature) as exc:
        raise FormatError("a layer index with a signature that is not right") from exc
    return frame, peer_id_of(key)


# --- the document --------------------------------------------------------------------------------------------------------------


def encode(layer: IndexedLayer, meta: bytes, identity: Identity, fleet_key: bytes) -> bytes:
    """The signed document of a layer. Takes a second or so for a large one: for a worker thread.

    Raises:
        FormatError: the layer is too large, or has pieces that nothing vouches for.
    """
    import zstandard  # noqa: PLC0415 - 4 MB resident, which a node without plain layers does not need

    if not is_shareable(layer):
        raise FormatError(f"the index of {layer.digest} ({layer.codec}) is of no use to others")
    members = layer.members.to_bytes() if layer.members is not None else b""
    _check_counts(len(layer.chunks), len(layer.pieces), len(layer.members or ()), len(meta))
    tables = (layer.chunks.to_bytes(), layer.pieces.to_bytes(), members, meta)
    head: bytes = msgpack.packb(
        {
            "version": VERSION,
            "blob": layer.digest,
            "blob_size": layer.pieces.blob_size,
            "format": layer.format,
            "codec": layer.codec,
            "volume_size": layer.volume_size,
            "entry_count": layer.entry_count,
            "diff_id": str(layer.extra.get("diff_id", "")),
            "lengths": [len(table) for table in tables],
        }
    )
    size = 4 + len(head) + sum(len(table) for table in tables)
    if size > MAX_BODY_BYTES:
        raise FormatError(f"the index of {layer.digest} has {size} bytes, too many to be shared")
    compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj(size=size)
    parts = [compressor.compress(part) for part in (struct.pack("<I", len(head)), head, *tables)]
    frame = b"".join([*parts, compressor.flush()])
    if len(frame) > MAX_DOCUMENT_BYTES - _SEAL.size:
        raise FormatError(f"the index of {layer.digest} has {len(frame)} bytes, too many to be shared")
    return seal(frame, identity, fleet_key)


def decode(raw: bytes, blob: Digest, blob_size: int, fleet_key: bytes) -> FleetIndex:
    """Read a document and check everything in it; for a worker thread.

    Raises:
        FormatError: it is not one, of another blob or fleet, or contradicts itself.
    """
    frame, signer = unseal(raw, fleet_key)
    body = memoryview(_decompress(frame))
    head, at = _read_head(body)
    if head["blob"] != blob or head["blob_size"] != blob_size:
        raise FormatError(f"a layer index of {head['blob']}, {head['blob_size']} bytes, for {blob}, {blob_size} bytes")
    tables: list[memoryview] = []
    for length in head["lengths"]:
        tables.append(body[at : at + length])
        at += length
    index = _read_index(head, tables)
    meta = bytes(tables[3])
    _check_image(meta, index.volume_size)
    return FleetIndex(index, meta, head["diff_id"], signer, raw)


def _decompress(frame: memoryview) -> bytes:
    import zstandard  # noqa: PLC0415 - see above

    try:
        size = zstandard.frame_content_size(frame)
        if not 4 < size <= MAX_BODY_BYTES:
            raise FormatError(f"a layer index of {size} bytes, uncompressed")
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        return decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise FormatError(f"a layer index that cannot be decompressed: {exc}") from exc


def _read_head(body: memoryview) -> tuple[dict[str, Any], int]:
    """The map, its values of the right type and in range, and where the tables begin."""
    (length,) = struct.unpack_from("<I", body)
    if length > min(_MAX_HEAD, len(body) - 4):
        raise FormatError(f"a layer index with a head of {length} bytes")
    try:
        head: Any = msgpack.unpackb(body[4 : 4 + length])
    except (ValueError, TypeError, msgpack.UnpackException) as exc:
        raise FormatError(f"a layer index with a head that cannot be read: {exc}") from exc
    if not isinstance(head, dict) or head.get("version") != VERSION:
        raise FormatError("a layer index of no known version")
    if head.keys() != _HEAD_TYPES.keys() or any(type(head[name]) is not kind for name, kind in _HEAD_TYPES.items()):
        raise FormatError("a layer index with a head that is not one")
    lengths = head["lengths"]
    if (
        not 0 <= head["volume_size"] <= MAX_VOLUME_BYTES
        or not 0 <= head["entry_count"] < 1 << 32
        or len(head["format"]) > 64
        or not head["format"].isprintable()
        or head["codec"] not in _CODECS
        or len(lengths) != 4
        or not all(type(size) is int and 0 <= size <= MAX_BODY_BYTES for size in lengths)
        or 4 + length + sum(lengths) != len(body)
    ):
        raise FormatError("a layer index with values out of range")
    if head["diff_id"]:
        parse_digest(head["diff_id"])
    return head, 4 + length


def _check_counts(chunks: int, pieces: int, members: int, meta_size: int) -> None:
    if chunks > MAX_CHUNKS or pieces > MAX_PIECES or members > MAX_MEMBERS or meta_size > MAX_META_BYTES:
        raise FormatError("a layer index with tables that are too large")


def _read_index(head: dict[str, Any], tables: list[memoryview]) -> LayerIndex:
    # Bounded before they are read: checking a table takes several times its bytes in memory.
    member_count = struct.unpack_from("<Q", tables[2], 8)[0] if len(tables[2]) >= 16 else 0
    # A piece has 12 bytes, and 32 more of its digest.
    _check_counts((len(tables[0]) - 24) // 60, (len(tables[1]) - 24) // 44, member_count, len(tables[3]))
    chunks, pieces = ChunkTable.from_bytes(tables[0]), PieceTable.from_bytes(tables[1])
    members = MemberTable.from_bytes(tables[2]) if len(tables[2]) else None
    check_pieces(chunks, pieces, head["codec"])
    find_firsts(chunks, head["volume_size"])
    check_members(chunks, members, head["codec"])
    if pieces.blob_size != head["blob_size"]:
        raise FormatError(f"a layer index with pieces of {pieces.blob_size} bytes for a blob of {head['blob_size']}")
    if pieces.index_piece >= 0 or not all(pieces.digest(number) for number in range(len(pieces))):
        raise FormatError("a layer index with pieces that nothing vouches for")
    _check_places(chunks, pieces)
    return LayerIndex(
        format=head["format"],
        codec=head["codec"],
        root=Inode(InodeKind.DIRECTORY),
        chunks=chunks,
        pieces=pieces,
        volume_size=head["volume_size"],
        entry_count=head["entry_count"],
        members=members,
    )


def _check_places(chunks: ChunkTable, pieces: PieceTable) -> None:
    """Rows in blob order, each chunk in the piece that is said to hold it, none larger than is decoded in memory."""
    rows = zip(chunks.blob_offset, chunks.inner_offset, strict=True)
    if any(one > other for one, other in pairwise(rows)):
        raise FormatError("a layer index with chunks out of order")
    if any(size > MAX_CHUNK_BYTES for size in chunks.size):
        raise FormatError(f"a layer index with a chunk of {max(chunks.size)} bytes")
    offsets, lengths, blob_size = chunks.blob_offset, chunks.blob_length, pieces.blob_size
    for piece in range(len(pieces)):
        start, stop = pieces.extent(piece)
        for number in pieces.chunks_of(piece):
            if not start <= offsets[number] < stop or offsets[number] + lengths[number] > blob_size:
                raise FormatError(f"a layer index with chunk {number} outside of its piece")


def _check_image(meta: bytes, volume_size: int) -> None:
    """The tree of a metadata image. `ImageReader.walk` would join the paths of a hostile one for hours; nobody needs them here."""
    try:
        reader = ImageReader(meta)
        if reader.device_sizes != (blocks_of(volume_size) * BLOCK_SIZE,):
            raise FormatError(f"a metadata image with data in {reader.device_sizes}, for a volume of {volume_size} bytes")
        entries = 0
        pending, seen = [reader.root_nid], {reader.root_nid}
        while pending:
            for _name, nid, kind, _ in reader.entries(pending.pop()):
                entries += 1
                if entries > MAX_ENTRIES:
                    raise FormatError(f"a metadata image of more than {MAX_ENTRIES} entries")
                if reader.inode(nid).kind is not kind:
                    raise FormatError(f"inode {nid} of a metadata image is not of the type that its directory says")
                if kind is FileKind.SYMLINK:
                    reader.readlink(nid)
                elif kind is FileKind.DIRECTORY:
                    if nid in seen:
                        raise FormatError(f"directory {nid} of a metadata image is in the tree twice")
                    seen.add(nid)
                    pending.append(nid)
    except ErofsError as exc:
        raise FormatError(f"a metadata image that is not sound: {exc}") from exc


# --- the fleet -----------------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class FleetIndexes:
    """The indexes of plain layers that this node shares, and those it takes. Without a fleet (`fleet_key` None) it does nothing.

    Every member shares what it has; only those with the setting `trust_fleet_indexes` (`is_trusting`) take: see the module's text.
    """

    records: FleetRecords
    swarm: Swarm
    peers: PeerClient | None
    identity: Identity
    fleet_key: bytes | None = attrs.field(repr=False)
    counters: Counters
    is_trusting: bool
    _cpu: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1), init=False)

    async def publish(self, stored: StoredLayer) -> None:
        """Share the index of a layer of which this node has seen every byte. What cannot be shared is not; nothing fails."""
        fleet_key = self.fleet_key
        if fleet_key is None or not is_shareable(stored):
            await trio.lowlevel.checkpoint()
            return

        def make(fleet_key: bytes, image: Path) -> bytes:
            return encode(stored, image.read_bytes(), self.identity, fleet_key)

        try:
            raw = await trio.to_thread.run_sync(make, fleet_key, stored.image_path, limiter=self._cpu)
        except (FormatError, OSError) as exc:
            log.info("fleet_index_not_shared", layer=stored.digest, reason=str(exc))
            return
        await self._keep(stored, raw)
        log.info("fleet_index_shared", layer=stored.digest, size_bytes=len(raw))

    async def find(self, blob: Digest, blob_size: int, diff_id: str = "") -> FleetIndex | None:
        """The fleet's index of a layer, if this node takes such and somebody has one that is right.

        Args:
            blob: digest of the layer.
            blob_size: its size.
            diff_id: what the image says it unpacks to, if that is known; an index of anything else is refused.
        """
        fleet_key = self.fleet_key
        if not self.is_trusting or fleet_key is None:
            await trio.lowlevel.checkpoint()
            return None
        # Who holds the layer is asked first: those who have its index answer both, so the first piece need not come from a registry.
        await self.swarm.want(blob)
        found: list[FleetIndex] = []

        async def accept(peer_id: str, raw: bytes) -> bool:
            self.counters.count("peer", len(raw))
            try:
                index = await trio.to_thread.run_sync(decode, raw, blob, blob_size, fleet_key, limiter=self._cpu)
                if diff_id and index.diff_id != diff_id:
                    raise FormatError(f"it unpacks to {index.diff_id}, the image says {diff_id}")
            except FormatError as exc:
                # Nobody is struck for it: who sends it need not have made it, and may have kept it from before a change of secret.
                log.warning("fleet_index_refused", layer=blob, peer=peer_id, reason=str(exc))
                return False
            found.append(index)
            return True

        await self.records.ask(
            index_key(blob),
            self.swarm,
            self.peers,
            accept,
            max_bytes=MAX_DOCUMENT_BYTES,
            limit_s=FETCH_S,
            max_tries=MAX_TRIES,
            is_patient=True,
        )
        if not found:
            return None
        log.info("fleet_index_taken", layer=blob, signer=found[0].signer, size_bytes=len(found[0].raw))
        return found[0]

    async def adopt(self, stored: StoredLayer, found: FleetIndex) -> None:
        """Pass on the document by which a layer was made."""
        await self._keep(stored, found.raw)

    async def _keep(self, stored: StoredLayer, raw: bytes) -> None:
        await self.records.keep_index(stored, raw)
        self.swarm.possession_changed(index_key(stored.digest), [0])
