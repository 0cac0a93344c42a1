"""A bitmap in a file that several processes map at once.

fsmount tests the bits of a volume's blocks on every read while the agent sets them as verified data arrive, so neither asks
the other. A bit may be lost by a power cut but not by the death of a process: the map is shared file memory.

Layout, little-endian: magic `SHOALBM1` (8), u32 version 1, u32 unit in bytes that one bit stands for, u64 number of bits,
u64 generation, zeros to byte 4096; then the bits, least significant first, padded with zero bits to a whole byte.

Order of writes. The data of a unit are written before its bit is set. To take data away, `clear` first drops the bits and
raises the generation, then the caller punches the hole. A reader therefore reads the generation, tests the bits, reads the
data, and reads the generation again: if it has changed, the bytes may be those of a hole and the read must be repeated.
"""

import mmap
import os
import struct
from pathlib import Path
from typing import Final, Self

HEADER_SIZE: Final = 4096
_MAGIC: Final = b"SHOALBM1"
_HEADER: Final = struct.Struct("<8sIIQQ")
_GENERATION: Final = struct.Struct("<Q")
_GENERATION_AT: Final = 24
_WRITE_BYTES: Final = 1 << 20


class BitmapError(ValueError):
    """The file is not a bitmap of the expected size."""


class Bitmap:
    """Bits [0, `bits`), each standing for `unit` bytes of something. Not for use after `close`."""

    __slots__ = ("_map", "_view", "bits", "unit")

    def __init__(self, mapped: mmap.mmap, bits: int, unit: int) -> None:
        self._map = mapped
        self._view = memoryview(mapped)[HEADER_SIZE:]
        self.bits = bits
        self.unit = unit

    @classmethod
    def create(cls, path: Path, bits: int, unit: int) -> Self:
        """Make the file with all bits clear; it appears under `path` complete or not at all.

        Its zeros are written, not left a hole: a store to a mapped page without a disk block behind it is SIGBUS when the disk
        is full.
        """
        temporary = path.with_name(path.name + ".new")
        with temporary.open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, unit, bits, 0).ljust(HEADER_SIZE, b"\0"))
            left = max(1, (bits + 7) // 8)
            while left > 0:
                left -= file.write(bytes(min(left, _WRITE_BYTES)))
        temporary.replace(path)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map an existing file.

        Raises:
            BitmapError: bad magic, version or length.
            OSError: it cannot be opened.
        """
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            if size <= HEADER_SIZE:
                raise BitmapError(f"{path} has {size} bytes, too few for a bitmap")
            mapped = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        magic, version, unit, bits, _generation = _HEADER.unpack_from(mapped)
        if magic != _MAGIC or version != 1 or unit == 0 or size != HEADER_SIZE + max(1, (bits + 7) // 8):
            mapped.close()
            raise BitmapError(f"{path} is not a version 1 bitmap of its size")
        return cls(mapped, bits, unit)

    def close(self) -> None:
        """Unmap. Later calls fail."""
        self._view.release()
        self._map.close()

    @property
    def generation(self) -> int:
        """Rises with every `clear`; see the module's text."""
        value: int = _GENERATION.unpack_from(self._map, _GENERATION_AT)[0]
        return value

    def test(self, bit: int) -> bool:
        """Whether one bit is set."""
        return bool(self._view[bit >> 3] & (1 << (bit & 7)))

    def all_set(self, start: int, stop: int) -> bool:
        """Whether every bit of [start, stop) is set; true for an empty range."""
        return self.first_clear(start, stop) == stop

    def first_clear(self, start: int, stop: int) -> int:
        """The first clear bit of [start, stop), or `stop` if all are set."""
        if start >= stop:
            return stop
        first_byte, last_byte = start >> 3, (stop + 7) >> 3
        value = int.from_bytes(self._view[first_byte:last_byte], "little") >> (start & 7)
        inverse = ~value & ((1 << (stop - start)) - 1)
        return start + (inverse & -inverse).bit_length() - 1 if inverse else stop

    def first_set(self, start: int, stop: int) -> int:
        """The first set bit of [start, stop), or `stop` if none is set."""
        if start >= stop:
            return stop
        value = int.from_bytes(self._view[start >> 3 : (stop + 7) >> 3], "little") >> (start & 7)
        value &= (1 << (stop - start)) - 1
        return start + (value & -value).bit_length() - 1 if value else stop

    def count(self) -> int:
        """How many bits are set."""
        return int.from_bytes(self._view, "little").bit_count()

    def set(self, start: int, stop: int) -> None:
        """Set the bits of [start, stop). Only one process and thread may write a map at a time."""
        self._apply(start, stop, value=True)

    def clear(self, start: int, stop: int) -> None:
        """Clear the bits of [start, stop) and raise the generation, before the data go away."""
        self._apply(start, stop, value=False)
        _GENERATION.pack_into(self._map, _GENERATION_AT, self.generation + 1)

    def _apply(self, start: int, stop: int, *, value: bool) -> None:
        if not 0 <= start <= stop <= self.bits:
            raise IndexError(f"bits [{start}, {stop}) of a map of {self.bits}")
        view = self._view
        while start < stop:
            at, bit = start >> 3, start & 7
            if bit == 0 and stop - start >= 8:
                whole = (stop - start) >> 3
                view[at : at + whole] = (b"\xff" if value else b"\0") * whole
                start += whole << 3
                continue
            run = min(8 - bit, stop - start)
            mask = ((1 << run) - 1) << bit
            view[at] = (view[at] | mask) if value else (view[at] & ~mask & 0xFF)
            start += run

    def to_bytes(self) -> bytes:
        """The bits alone, for a message or a checkpoint."""
        return bytes(self._view[: (self.bits + 7) // 8])

    def load(self, data: bytes) -> None:
        """Set every bit that is set in `data` (the form of `to_bytes`); clears none."""
        if len(data) != (self.bits + 7) // 8:
            raise BitmapError(f"{len(data)} bytes do not hold {self.bits} bits")
        for at, byte in enumerate(data):
            if byte:
                self._view[at] |= byte

    def sync(self) -> None:
        """Write the map to the disk (msync); may take as long as the disk does."""
        self._map.flush()
