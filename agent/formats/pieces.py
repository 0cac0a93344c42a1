"""The cut of a blob into pieces, from its index alone, so that every node of a fleet numbers them alike.

A piece begins at the start of a member and takes members while it stays within the target; a larger member is a piece of
its own. The end of the prefetch range is always a cut, with a small piece behind it, and so is the start of the index. Changing
anything here makes nodes of different versions talk past each other about possession.
"""

from array import array
from collections.abc import Sequence
from typing import Final

from agent.formats.model import ChunkTable, PieceTable

PIECE_BYTES: Final = 1 << 20
"""20 ms at 400 Mbit/s, one round trip of a usual link: less would pay for requests, more would make a reader wait."""

READ_AHEAD_BYTES: Final = 256 << 10
"""What the kernel reads ahead of the last file of the prefetch range lies in a piece of about this size, so that having it too costs
little: whoever reads that file waits for both."""


def cut_pieces(
    chunks: ChunkTable,
    blob_size: int,
    index_start: int,
    target: int = PIECE_BYTES,
    *,
    prefetch_stop: int = -1,
    cuts: Sequence[int] = (),
) -> PieceTable:
    """Cut a blob whose chunks lie before `index_start`; `index_start == blob_size` means that the index is elsewhere.

    `cuts` are places besides that no piece crosses, the boundaries of a spliced blob's parts.
    """
    starts, first_chunk = array("Q", [0]), array("I", [0])
    piece_start, last = 0, -1
    forced = sorted({prefetch_stop, *cuts}, reverse=True)
    ahead_stop = prefetch_stop + READ_AHEAD_BYTES if prefetch_stop > 0 else blob_size
    for number, (offset, length) in enumerate(zip(chunks.blob_offset, chunks.blob_length, strict=True)):
        if offset == last:
            continue
        last = offset
        while forced and forced[-1] <= offset:
            cut_at = forced.pop()
            if cut_at > piece_start:
                starts.append(cut_at)
                first_chunk.append(number)
                piece_start = cut_at
        is_full = offset + length - piece_start > target or offset >= ahead_stop
        if is_full and offset > piece_start and number > first_chunk[-1]:
            ahead_stop = ahead_stop if offset < ahead_stop else blob_size
            starts.append(offset)
            first_chunk.append(number)
            piece_start = offset
    index_piece = -1
    if index_start < blob_size:
        if index_start > piece_start:
            starts.append(index_start)
            first_chunk.append(len(chunks))
        index_piece = len(starts) - 1
    starts.append(blob_size)
    first_chunk.append(len(chunks))
    return PieceTable(starts, first_chunk, index_piece)


def cut_fixed(blob_size: int, size: int = PIECE_BYTES) -> PieceTable:
    """Cut a blob without random access into equal pieces that hold no chunks; the blob's own digest verifies them all."""
    starts = array("Q", range(0, blob_size, size)) or array("Q", [0])
    starts.append(blob_size)
    return PieceTable(starts, array("I", bytes(4 * len(starts))))
