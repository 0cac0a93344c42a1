"""Reading tables of a FlatBuffer without its schema compiler, safe on hostile bytes.

Layout (FlatBuffers' binary format): the buffer begins with the u32 position of its root table. A table begins with an i32: its
vtable lies that many bytes before it. A vtable is u16s: its own size, the table's size, then for each field its offset in the
table, 0 if the field is absent. Strings, vectors and tables are referred to by a u32 offset from where that u32 lies; strings
and vectors begin with a u32 count.

References may form any graph, so a small buffer could describe an endless tree. A `FlatBuffer` therefore gives out no more than
`_ALLOWANCE` times its own size in all: no writer of the formats read here shares values (vtables aside, which are free).
"""

import struct
from collections.abc import Iterator
from typing import Final, Self

from agent.formats.model import FormatError

_ALLOWANCE: Final = 2
_SLACK: Final = 4096
_MAX_FIELDS: Final = 64
"""Fields of one table that are looked at: four times what any schema read here has."""
_MAX_LAYOUTS: Final = 1 << 12
"""Vtables remembered; a writer has a few dozen, one for each choice of absent fields."""
_U16: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")
_I32: Final = struct.Struct("<i")
_I64: Final = struct.Struct("<q")


class FlatBuffer:
    """A buffer, and what may still be read of it."""

    __slots__ = ("_layouts", "_left", "data", "size")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self._left = _ALLOWANCE * len(data) + _SLACK
        self._layouts: dict[int, tuple[int, ...]] = {}

    def root(self) -> "Table":
        """The root table.

        Raises:
            FormatError: there is none.
        """
        return Table(self, self.follow(0))

    def spend(self, size: int) -> None:
        """Take note that `size` bytes are given out."""
        self._left -= size
        if self._left < 0:
            raise FormatError("a flatbuffer that uses its bytes many times over")

    def number(self, kind: struct.Struct, at: int) -> int:
        """A scalar at a position that is not negative."""
        try:
            value: int = kind.unpack_from(self.data, at)[0]
        except struct.error as exc:
            raise FormatError(f"a flatbuffer of {self.size} bytes refers to byte {at}") from exc
        return value

    def follow(self, at: int) -> int:
        """The position that the reference at `at` leads to."""
        return at + self.number(_U32, at)

    def span(self, at: int, item_size: int) -> tuple[int, int]:
        """(start, count) of the items of the string or vector at `at`."""
        count = self.number(_U32, at)
        if at + 4 + count * item_size > self.size:
            raise FormatError(f"a flatbuffer of {self.size} bytes has {count} items at byte {at}")
        self.spend(4 + count * item_size)
        return at + 4, count

    def string(self, at: int) -> bytes:
        """The string that the reference at `at` leads to."""
        # As `follow` and `span` do it, in one piece: nothing is done as often.
        data = self.data
        try:
            start = at + 4 + _U32.unpack_from(data, at)[0]
            stop = start + _U32.unpack_from(data, start - 4)[0]
        except struct.error as exc:
            raise FormatError(f"a flatbuffer of {self.size} bytes has a broken reference at byte {at}") from exc
        if stop > self.size:
            raise FormatError(f"a flatbuffer of {self.size} bytes has a string up to byte {stop}")
        self._left -= stop - start + 4
        if self._left < 0:
            self.spend(0)
        return data[start:stop]

    def layout(self, at: int) -> tuple[int, ...]:
        """Offsets of the fields of the table at `at`; of an absent one 0."""
        where = at - self.number(_I32, at)
        known = self._layouts.get(where)
        if known is None:
            if where < 0:
                raise FormatError("a flatbuffer's table has its vtable before the first byte")
            size = self.number(_U16, where)
            if size < 4 or size % 2 or where + size > self.size:
                raise FormatError(f"a flatbuffer's vtable of {size} bytes at {where}")
            if len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.clear()
            count = min(size // 2 - 2, _MAX_FIELDS)
            known = self._layouts[where] = struct.unpack_from(f"<{count}H", self.data, where + 4)
        self.spend(4)
        return known


class Table:
    """One table; fields are asked for by their number in the schema. Every method raises FormatError for broken references."""

    __slots__ = ("_at", "_buffer", "_fields")

    def __init__(self, buffer: FlatBuffer, at: int) -> None:
        self._buffer = buffer
        self._at = at
        self._fields = buffer.layout(at)

    def _place(self, field: int) -> int:
        """Where the field lies, 0 if it is absent."""
        fields = self._fields
        offset = fields[field] if field < len(fields) else 0
        return self._at + offset if offset else 0

    def _target(self, field: int) -> int:
        at = self._place(field)
        return self._buffer.follow(at) if at else 0

    def i8(self, field: int, default: int = 0) -> int:
        """A signed byte."""
        at = self._place(field)
        if not at:
            return default
        if at >= self._buffer.size:
            raise FormatError("a flatbuffer's table reaches beyond its end")
        byte = self._buffer.data[at]
        return byte - 256 if byte > 127 else byte

    def u32(self, field: int) -> int:
        """An unsigned number of 32 bits, 0 by default."""
        at = self._place(field)
        return self._buffer.number(_U32, at) if at else 0

    def i32(self, field: int) -> int:
        """A signed number of 32 bits, 0 by default."""
        at = self._place(field)
        return self._buffer.number(_I32, at) if at else 0

    def i64(self, field: int) -> int:
        """A signed number of 64 bits, 0 by default."""
        at = self._place(field)
        return self._buffer.number(_I64, at) if at else 0

    def string(self, field: int) -> bytes:
        """A string's bytes, empty by default."""
        fields = self._fields
        if field >= len(fields) or not fields[field]:
            return b""
        return self._buffer.string(self._at + fields[field])

    def view(self, field: int) -> memoryview:
        """A vector of bytes, uncopied."""
        at = self._target(field)
        if not at:
            return memoryview(b"")
        start, count = self._buffer.span(at, 1)
        return memoryview(self._buffer.data)[start : start + count]

    def table(self, field: int) -> Self | None:
        """A table."""
        at = self._target(field)
        return type(self)(self._buffer, at) if at else None

    def count(self, field: int) -> int:
        """How many items a vector of references has."""
        at = self._target(field)
        return self._buffer.number(_U32, at) if at else 0

    def strings(self, field: int) -> Iterator[bytes]:
        """The strings of a vector."""
        for at in self._items(field):
            yield self._buffer.string(at)

    def tables(self, field: int) -> Iterator[Self]:
        """The tables of a vector."""
        follow = self._buffer.follow
        for at in self._items(field):
            yield type(self)(self._buffer, follow(at))

    def _items(self, field: int) -> range:
        """Where the references of a vector lie."""
        at = self._target(field)
        if not at:
            return range(0)
        start, count = self._buffer.span(at, 4)
        return range(start, start + 4 * count, 4)
