"""Nydus on disk: the numbers and records that the parts of the writer share (formats.md section 3), little-endian."""

import struct
from typing import Final, Literal

from agent.formats.model import FormatError

Compressor = Literal["zstd", "none"]
"""How chunks are stored. With "none" they lie in the blob where they lie in its uncompressed space, so that the blob itself can
be a device of the kernel's EROFS."""

BLOCK: Final = 4096
CHUNK_BYTES: Final = 1 << 20
"""The reference builder's default; sizes are powers of two from 4 KiB to 16 MiB."""
MIN_CHUNK_BYTES: Final = 4096
MAX_CHUNK_BYTES: Final = 16 << 20
MAX_CHUNKS: Final = 1 << 21
"""Chunks of one blob, and uses of chunks in one layer (2 TiB of the usual ones). The format can hold 2^24."""
MAX_BLOBS: Final = 254
MAX_COMPRESSED: Final = 1 << 40
MAX_UNCOMPRESSED: Final = 1 << 44

COMPRESSORS: Final[dict[Compressor, int]] = {"none": 0, "zstd": 3}
SHA256: Final = 1

BLOB_FEATURES: Final = 0x7000_0021
"""Chunks aligned to 4 KiB in uncompressed space, digest table in the blob; with tar headers and TOC, and able to have them."""

FLAG_SHA256: Final = 0x8
FLAG_OWNERS: Final = 0x10
FLAG_XATTRS: Final = 0x20
FLAG_DIGESTS_INLINED: Final = 0x100
FLAG_PLAIN_TEXT: Final = 0x0100_0000
COMPRESSOR_FLAGS: Final[dict[Compressor, int]] = {"none": 0x1, "zstd": 0x80}

META_MAGIC: Final = 0xB10B_B10B
META_HEADER: Final = struct.Struct("<IIIIQQQQQI4032xI")
"""magic, features, compressor of the chunk infos, their count, offset, stored and plain size, then zran's or the batch's
offset, size and count, zeros, magic again."""
CHUNK_INFO: Final = struct.Struct("<QQ")

TOC_ENTRY: Final = struct.Struct("<II16s32sQQQ48x")
"""flags (1 stored as is, 2 zstd), reserved, name, SHA-256 of the plain bytes, offset, stored and plain size."""
TOC_PLAIN: Final = 1
TOC_ZSTD: Final = 2

COMPAT_RAFS_V6: Final = 0x4000_0000
EXTENDED_SUPER_OFFSET: Final = 1152
EXTENDED_SUPER: Final = struct.Struct("<QQIIQQQI204x")
"""flags, blob table offset and size, chunk size, chunk table offset and size, prefetch table offset and size."""
DEVICES_OFFSET: Final = EXTENDED_SUPER_OFFSET + EXTENDED_SUPER.size
DEVICE_ALIGNMENT: Final = 128
"""Blocks (512 KiB) to which the address of a device in the unified space is rounded."""

BLOB_ENTRY: Final = struct.Struct("<64s6IQQ2I3Q32s32s56x")
"""id, index, chunk size, chunk count, compressor, digester, features, stored and plain size, TOC size, compressor of the chunk
infos, their offset, stored and plain size, TOC digest, digest of a separate meta blob; then nothing of ours."""

CHUNK_ROW: Final = struct.Struct("<32sIIIIQQQII")
"""digest, blob index, flags, stored and plain size, stored and plain offset, offset in the first file, number in the blob,
CRC-32."""
CHUNK_COMPRESSED: Final = 1


def encode_chunk_info(offset: int, size: int, plain_offset: int, plain_size: int) -> bytes:
    """The 16 bytes of version 1. A chunk is compressed exactly if its two sizes differ."""
    size -= 1
    plain_size -= 1
    return CHUNK_INFO.pack(
        (plain_size >> 20 & 0xF) << 8 | plain_offset | (plain_size & 0xFFFFF) << 44,
        offset | (size >> 20 & 0xF) << 40 | (size & 0xFFFFF) << 44,
    )


def trailing_header(name: bytes, size: int) -> bytes:
    """The tar header that stands behind a part of a blob and names it."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = b"%011o\0" % size
    block[136:148] = b"%011o\0" % 0
    block[148:156] = b" " * 8
    block[156:157] = b"0"
    block[257:265] = b"ustar  \0"
    block[148:156] = b"%07o\0" % sum(block)
    return bytes(block)


def check_chunk_size(size: int) -> None:
    """Refuse what readers of the format refuse.

    Raises:
        FormatError: no power of two, or out of bounds.
    """
    if not MIN_CHUNK_BYTES <= size <= MAX_CHUNK_BYTES or size & (size - 1):
        raise FormatError(f"a nydus chunk size of {size} bytes")
