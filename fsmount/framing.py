"""Messages between agent and fsmount as bytes.

A frame is a u32 little-endian length, at most 1 MiB, and that many bytes of msgpack: one map with string keys. Which maps there
are, and who sends them, is told in `fsmount.link`. The other end is not trusted to be sane: lengths are bounded before anything
is allocated, and whatever is not such a map is a `LinkError`.
"""

import struct
from typing import Any, Final

import msgpack

from fsmount.errors import LinkError

PROTOCOL_VERSION: Final = 1
MAX_FRAME: Final = 1 << 20
_LENGTH: Final = struct.Struct("<I")

Message = dict[str, Any]


def pack(message: Message) -> bytes:
    """The frame of a message.

    Raises:
        LinkError: it is too long.
    """
    body: bytes = msgpack.packb(message, unicode_errors="surrogateescape")
    if len(body) > MAX_FRAME:
        raise LinkError(f"a message of {len(body)} bytes exceeds the link's limit of {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


class Unpacker:
    """Turns received bytes, cut anywhere, into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray) -> list[Message]:
        """The messages completed by `data`.

        Raises:
            LinkError: a frame is too long or is not a map; the connection is of no more use.
        """
        self._buffer += data
        found: list[Message] = []
        at = 0
        while len(self._buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, at)
            if length > MAX_FRAME:
                raise LinkError(f"a frame of {length} bytes exceeds the link's limit of {MAX_FRAME}")
            stop = at + _LENGTH.size + length
            if len(self._buffer) < stop:
                break
            found.append(_map(bytes(self._buffer[at + _LENGTH.size : stop])))
            at = stop
        del self._buffer[:at]
        return found


def _map(body: bytes) -> Message:
    try:
        message = msgpack.unpackb(body, unicode_errors="surrogateescape")
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise LinkError(f"a frame on the link is not msgpack: {error}") from error
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise LinkError("a frame on the link is not a map with string keys")
    return message


def text(message: Message, key: str) -> str:
    """A string of a message. Raises LinkError."""
    value = message.get(key)
    if not isinstance(value, str):
        raise LinkError(f"{key!r} of a message is {type(value).__name__}, not a string")
    return value


def number(message: Message, key: str) -> int:
    """A whole number of a message, 0 to 2^63 - 1. Raises LinkError."""
    value = message.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise LinkError(f"{key!r} of a message is {value!r}, not a whole number that fits")
    return value


def texts(message: Message, key: str) -> list[str]:
    """A list of strings of a message. Raises LinkError."""
    value = message.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise LinkError(f"{key!r} of a message is not a list of strings")
    return value
