"""Where files and chunks lie in a layer's volume: the layout that `model` describes."""

from collections.abc import Sequence
from typing import Final

from agent.formats.model import BLOCK_SIZE, ChunkTable, FormatError, Inode

MAX_VOLUME_BYTES: Final = 8 << 40
"""What EROFS with 4 KiB blocks and 32-bit block numbers can address is 16 TiB, and so is ext4's largest file; half of it."""


def round_up(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK_SIZE) * BLOCK_SIZE


def lay_out(files: Sequence[Inode], chunks: ChunkTable, file_offset: Sequence[int] | None = None) -> int:
    """Give every file its extent and every chunk its place; returns the volume's size, whole blocks.

    `files` are the non-empty files in blob order, each once, with chunks that follow one another without gaps, or lie at
    `file_offset[chunk]` of their file where a format has holes. A file whose chunks all have the digests, sizes and offsets of an
    earlier one's gets that one's extent.

    Raises:
        FormatError: the volume would be larger than a file system can address.
    """
    sizes, places, digests = chunks.size, chunks.volume_offset, bytes(chunks.digests)
    known: dict[bytes, int] = {}
    end = 0
    for inode in files:
        first, count = inode.first_chunk, inode.chunk_count
        stop = first + count
        key = digests[32 * first : 32 * stop] + sizes[first:stop].tobytes()
        if file_offset is not None:
            key += repr((inode.size, file_offset[first:stop])).encode()
        start = known.setdefault(key, end)
        inode.volume_offset = start
        if file_offset is not None:
            for number in range(first, stop):
                places[number] = start + file_offset[number]
        elif count == 1:
            places[first] = start
        else:
            at = start
            for number in range(first, stop):
                places[number] = at
                at += sizes[number]
        if start == end:
            end += -(-inode.size // BLOCK_SIZE) * BLOCK_SIZE
    if end > MAX_VOLUME_BYTES:
        raise FormatError(f"the layer's files have {end} bytes, more than {MAX_VOLUME_BYTES}")
    return end
