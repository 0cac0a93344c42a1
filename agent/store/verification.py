"""Whether stored blob bytes still are what the index promises, by decoding them like bytes from a stranger."""

import hashlib
from collections.abc import Iterable
from typing import Protocol

from agent.formats.model import ChunkTable, FormatError, PieceTable, parse_digest


class IndexFacts(Protocol):
    """What must be known of a layer to judge its pieces."""

    codec: str
    chunks: ChunkTable
    pieces: PieceTable
    extra: dict[str, str | int]


def is_piece_good(layer: IndexFacts, number: int, parts: Iterable[bytes]) -> bool:
    """Compare the digest of the piece given as consecutive `parts`, or decode it and compare every chunk's where it has none.

    Raises:
        FormatError: the bytes cannot be decoded, or a chunk's digest differs.
    """
    if digest := layer.pieces.digest(number):
        hasher = hashlib.sha256()
        for part in parts:
            hasher.update(part)
        return hasher.digest() == digest
    from agent.formats.members import PieceDecoder  # noqa: PLC0415  # loads decoders that are rarely needed here

    if number == layer.pieces.index_piece:
        return _is_index_good(layer, b"".join(parts))
    wanted = layer.pieces.chunks_of(number)
    if not wanted:
        return True  # it holds nothing that a reader could be given
    decoder = PieceDecoder(layer.chunks, layer.codec, wanted.start, wanted.stop, layer.pieces.extent(number)[0])
    seen = sum(len(decoder.feed(part)) for part in parts)
    return seen == len(wanted) and decoder.is_complete


def _is_index_good(layer: IndexFacts, data: bytes) -> bool:
    from agent.formats import estargz  # noqa: PLC0415  # as above

    toc_digest = layer.extra.get("toc_digest")
    if not isinstance(toc_digest, str):
        return False
    start, stop = layer.pieces.extent(layer.pieces.index_piece)
    footer = estargz.parse_footer(data, stop)
    if footer is None or footer.toc_offset < start:
        raise FormatError("the blob does not end in its index any more")
    estargz.unpack_toc(data[footer.toc_offset - start : len(data) - footer.footer_size], parse_digest(toc_digest))
    return True
