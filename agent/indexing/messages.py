"""What the agent and an index process say to each other, as bytes. Both ends are ours, of one version, and of one moment.

A frame is a u32 and a u64 (little-endian): the lengths of a head and of a body; then the head, a msgpack map, and the body,
bytes as they are. The agent says `{"facts": ...}`; from then on the process asks (`want_head`) and the agent answers with a
body and an empty head, until the process ends it: with `{"index": ...}` and the tables and the metadata image as body, with
`{"no_index": text}` or `{"format_error": text}` if the image has none for the layer or the bytes are not what the format
promises, or with `{"defect": text}`.
"""

import struct
from collections.abc import Mapping
from typing import Any, Final

import attrs
import msgpack

from agent.formats.model import BlobPart, ChunkTable, Digest, FormatError, Inode, InodeKind, LayerIndex, MemberTable, PieceTable
from agent.formats.opening import AttachedBlob, BlobRange, LayerFacts, ManifestBytes, ReferrersOf, Want

HEAD: Final = struct.Struct("<IQ")
MAX_HEAD: Final = 64 << 20
"""Facts have the annotations of all layers; an index has a hint for each piece and warnings."""
MAX_BODY: Final = 2 << 30

Head = dict[str, Any]

_WANTS: Final[dict[str, type[Want]]] = {
    "range": BlobRange,
    "manifest": ManifestBytes,
    "attached": AttachedBlob,
    "referrers": ReferrersOf,
}
_NAMES: Final = {kind: name for name, kind in _WANTS.items()}


def pack_head(head: Head, body_size: int) -> bytes:
    """Everything of a frame that comes before its body."""
    packed: bytes = msgpack.packb(head, unicode_errors="surrogatepass")
    return HEAD.pack(len(packed), body_size) + packed


def unpack_head(packed: bytes) -> Head:
    """The head of a frame."""
    head: Head = msgpack.unpackb(packed, unicode_errors="surrogatepass", strict_map_key=False)
    return head


def lengths(prefix: bytes) -> tuple[int, int]:
    """The lengths of head and body.

    Raises:
        ValueError: more than either may have; whatever is at the other end, it is not ours.
    """
    head, body = HEAD.unpack(prefix)
    if head > MAX_HEAD or body > MAX_BODY:
        raise ValueError(f"a frame of {head} and {body} bytes")
    return head, body


def facts_head(facts: LayerFacts) -> Head:
    """What is known of a layer."""
    return attrs.asdict(facts)


def facts_of(head: Mapping[str, Any]) -> LayerFacts:
    """Undoes `facts_head`."""
    return LayerFacts(**{**head, "siblings": tuple(facts_of(sibling) for sibling in head["siblings"])})


def want_head(want: Want) -> Head:
    """What a format wants to know."""
    return {"want": _NAMES[type(want)], **attrs.asdict(want, recurse=False)}


def want_of(head: Head) -> Want:
    """Undoes `want_head`."""
    return _WANTS[head.pop("want")](**head)


def index_frame(index: LayerIndex, meta: bytes | bytearray) -> tuple[Head, list[bytes | bytearray]]:
    """Head and parts of the body for an index (without its tree, which `meta`, the metadata image, has) and that image."""
    parts = [
        index.chunks.to_bytes(),
        index.pieces.to_bytes(),
        index.members.to_bytes() if index.members is not None else b"",
        meta,
    ]
    head = {
        "format": index.format,
        "codec": index.codec,
        "volume_size": index.volume_size,
        "entry_count": index.entry_count,
        "prefetch_stop": index.prefetch_stop,
        "warnings": list(index.warnings),
        "prefetch_pieces": list(index.prefetch_pieces),
        "parts": [(part.digest, part.size, part.start, part.blob_size) for part in index.parts],
        "has_members": index.members is not None,
        "lengths": [len(part) for part in parts],
    }
    return head, parts


def index_of(head: Head, body: bytearray) -> tuple[LayerIndex, bytearray]:
    """Undoes `index_frame`; the index's root is bare. Two copies: into the tables, and of the image.

    Raises:
        FormatError: the body is not what the head says.
    """
    view, parts, at = memoryview(body), [], 0
    for length in head["lengths"]:
        parts.append(view[at : at + length])
        at += length
    if at != len(view) or len(parts) != 4:
        raise FormatError(f"an index of {at} bytes came in {len(view)}")
    chunks, pieces, members, meta = parts
    index = LayerIndex(
        head["format"],
        head["codec"],
        Inode(InodeKind.DIRECTORY),
        ChunkTable.from_bytes(chunks),
        PieceTable.from_bytes(pieces),
        head["volume_size"],
        head["entry_count"],
        head["prefetch_stop"],
        tuple(head["warnings"]),
        MemberTable.from_bytes(bytes(members)) if head["has_members"] else None,
        tuple(head["prefetch_pieces"]),
        tuple(BlobPart(Digest(digest), size, start, blob_size) for digest, size, start, blob_size in head["parts"]),
    )
    return index, bytearray(meta)
