"""Whether stored blob bytes still are what the index promises, by decoding them like bytes from a stranger."""

import hashlib
from collections.abc import Iterable
from typing import Protocol

from agent.formats.model import ChunkTable, MemberTable, PieceTable


class IndexFacts(Protocol):
    """What must be known of a layer to judge its pieces."""

    codec: str
    chunks: ChunkTable
    pieces: PieceTable
    members: MemberTable | None


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
        return False  # nobody has seen it whole
    wanted = layer.pieces.chunks_of(number)
    if not wanted:
        return True  # it holds nothing that a reader could be given
    start = layer.pieces.extent(number)[0]
    decoder = PieceDecoder(layer.chunks, layer.codec, wanted.start, wanted.stop, start, layer.members)
    seen = sum(len(decoder.feed(part)) for part in parts)
    return seen == len(wanted) and decoder.is_complete
