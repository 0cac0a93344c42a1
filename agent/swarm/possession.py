"""The possession protocol: what members of a fleet tell each other over one long-lived stream a pair. Pure framing.

A stream carries frames both ways: u32 little-endian length, then that many bytes of MessagePack: an array whose first
element is the message's number, followed by its fields in the order below. The first frame each way is `Hello`; a version
that is not ours ends the stream. Digests are 32 raw bytes (SHA-256), piece bitmaps have bit 0 of byte 0 for piece 0.

    1 Hello      version, agent version, data address, zone, listen addresses     (empty host in an address: the one you see)
    2 Want       digests                        asks for a Have on each now, and for Delta, Have and Withdraw from now on
    3 Unwant     digests                        no more of these
    4 Have       digest, blob size, pieces, bitmap, index start, members          pieces 0: I hold none of it
    5 Delta      digest, piece numbers got, piece numbers lost
    6 Withdraw   digests                        I hold none of these any more; an empty list: I am leaving
    7 Peers      members                        peer exchange
    8 Load       uploads now, upload slots
    9 Ping       number      10 Pong       number

Everything here came from another machine: each length is bounded before anything of that length is made, and what does
not fit raises `PossessionError`, which ends the stream.
"""

import struct
from collections.abc import Callable
from typing import Any, Final

import attrs
import msgpack

from fsmount.errors import ShoalError

PROTOCOL: Final = "/shoal/possession/1"
VERSION: Final = 1

MAX_FRAME: Final = 256 << 10
"""Longest frame: the bitmap of `MAX_PIECES` is half of it."""
MAX_PIECES: Final = 1 << 20
"""Pieces of the largest blob spoken about: 1 TiB at 1 MiB a piece."""
MAX_DIGESTS: Final = 256
MAX_DELTA: Final = 8192
MAX_MEMBERS: Final = 64
MAX_ADDRESSES: Final = 8
MAX_TEXT: Final = 256
_MAX_BLOB: Final = 1 << 50
_DIGEST_BYTES: Final = 32


class PossessionError(ShoalError):
    """The other end broke the possession protocol."""


@attrs.frozen
class Member:
    """A node somebody knows: its peer id and the multiaddrs where it listens."""

    peer_id: str
    addresses: tuple[str, ...]


@attrs.frozen
class Hello:
    """First message each way."""

    version: int
    agent_version: str
    data_address: str
    zone: str
    listen: tuple[str, ...]


@attrs.frozen
class Want:
    """The sender is interested in these blobs."""

    blobs: tuple[bytes, ...]


@attrs.frozen
class Unwant:
    """The sender is no longer interested in these blobs."""

    blobs: tuple[bytes, ...]


@attrs.frozen
class Have:
    """What the sender holds of a blob, and others that hold or want it."""

    blob: bytes
    blob_size: int
    pieces: int
    held: bytes
    index_start: int
    members: tuple[Member, ...] = ()


@attrs.frozen
class Delta:
    """Pieces that the sender got or lost since its last Have or Delta."""

    blob: bytes
    got: tuple[int, ...]
    lost: tuple[int, ...] = ()


@attrs.frozen
class Withdraw:
    """The sender holds none of these any more; an empty list says that it leaves."""

    blobs: tuple[bytes, ...]


@attrs.frozen
class Peers:
    """Other nodes of the fleet."""

    members: tuple[Member, ...]


@attrs.frozen
class Load:
    """How busy the sender's data server is."""

    active: int
    slots: int


@attrs.frozen
class Ping:
    """Asks for a Pong with the same number."""

    number: int


@attrs.frozen
class Pong:
    """Answers a Ping."""

    number: int


Message = Hello | Want | Unwant | Have | Delta | Withdraw | Peers | Load | Ping | Pong


def _int(value: Any, stop: int, start: int = 0) -> int:
    if type(value) is not int or not start <= value < stop:
        raise PossessionError(f"a number in a message is {value!r:.40}, not in [{start}, {stop})")
    return value


def _text(value: Any) -> str:
    # len() first: encoding a string costs its length
    if type(value) is not str or len(value) > MAX_TEXT or not value.isprintable():
        raise PossessionError("a text in a message is too long or not printable")
    return value


def _list(value: Any, most: int) -> list[Any]:
    if type(value) is not list or len(value) > most:
        raise PossessionError(f"a list in a message is no list or has more than {most} items")
    return value


def _digest(value: Any) -> bytes:
    if type(value) is not bytes or len(value) != _DIGEST_BYTES:
        raise PossessionError("a digest in a message is not 32 bytes")
    return value


def _digests(value: Any) -> tuple[bytes, ...]:
    return tuple(_digest(item) for item in _list(value, MAX_DIGESTS))


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(_int(item, MAX_PIECES) for item in _list(value, MAX_DELTA))


def _members(value: Any) -> tuple[Member, ...]:
    members = []
    for item in _list(value, MAX_MEMBERS):
        peer_id, addresses = _fields(item, 2)
        members.append(Member(_text(peer_id), tuple(_text(address) for address in _list(addresses, MAX_ADDRESSES))))
    return tuple(members)


def _fields(value: Any, count: int) -> list[Any]:
    if type(value) is not list or len(value) < count:
        raise PossessionError("a message has too few fields")
    return value[:count]  # a later version may add fields behind


def _hello(fields: list[Any]) -> Hello:
    version, agent_version, data_address, zone, listen = _fields(fields, 5)
    addresses = tuple(_text(address) for address in _list(listen, MAX_ADDRESSES))
    return Hello(_int(version, 1 << 16), _text(agent_version), _text(data_address), _text(zone), addresses)


def _have(fields: list[Any]) -> Have:
    blob, size, pieces, held, index_start, members = _fields(fields, 6)
    count = _int(pieces, MAX_PIECES + 1)
    if type(held) is not bytes or len(held) != (count + 7) // 8:
        raise PossessionError(f"a bitmap of {count} pieces has another length")
    if count % 8 and held[-1] >> count % 8:
        raise PossessionError("a bitmap has bits beyond its last piece")
    blob_size = _int(size, _MAX_BLOB)
    start = _int(index_start, blob_size + 1, -1)
    return Have(_digest(blob), blob_size, count, held, start, _members(members))


def _delta(fields: list[Any]) -> Delta:
    blob, got, lost = _fields(fields, 3)
    return Delta(_digest(blob), _numbers(got), _numbers(lost))


def _load(fields: list[Any]) -> Load:
    active, slots = _fields(fields, 2)
    return Load(_int(active, 1 << 20), _int(slots, 1 << 20))


_DECODERS: Final[dict[int, Callable[[list[Any]], Message]]] = {
    1: _hello,
    2: lambda fields: Want(_digests(_fields(fields, 1)[0])),
    3: lambda fields: Unwant(_digests(_fields(fields, 1)[0])),
    4: _have,
    5: _delta,
    6: lambda fields: Withdraw(_digests(_fields(fields, 1)[0])),
    7: lambda fields: Peers(_members(_fields(fields, 1)[0])),
    8: _load,
    9: lambda fields: Ping(_int(_fields(fields, 1)[0], 1 << 64)),
    10: lambda fields: Pong(_int(_fields(fields, 1)[0], 1 << 64)),
}
_NUMBERS: Final[dict[type, int]] = {
    Hello: 1, Want: 2, Unwant: 3, Have: 4, Delta: 5, Withdraw: 6, Peers: 7, Load: 8, Ping: 9, Pong: 10,
}  # fmt: skip


def encode(message: Message) -> bytes:
    """The message as one frame, length included.

    Raises:
        PossessionError: it is too long to send.
    """
    fields = attrs.astuple(message)
    body: bytes = msgpack.packb([_NUMBERS[type(message)], *fields], use_bin_type=True)
    if len(body) > MAX_FRAME:
        raise PossessionError(f"a {type(message).__name__} of {len(body)} bytes does not fit a frame")
    return struct.pack("<I", len(body)) + body


def decode(body: bytes) -> Message | None:
    """Read one frame's body; None for a message number that a later version may have added.

    Raises:
        PossessionError: it is not a message.
    """
    try:
        # No length inside can exceed the frame's own, so neither can what is allocated.
        fields = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_TEXT * 4,
            max_bin_len=MAX_PIECES // 8,
            max_array_len=MAX_DELTA,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as exc:
        raise PossessionError("a frame is not MessagePack within its limits") from exc
    number = _int(_fields(fields, 1)[0], 1 << 16)
    decoder = _DECODERS.get(number)
    return decoder(fields[1:]) if decoder else None


class FrameReader:
    """Cuts a stream of bytes into messages, however the bytes arrive; the first must be a `Hello` of our version."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._greeted = False

    def feed(self, data: bytes) -> list[Message]:
        """Add bytes; gives the messages that are complete now.

        Raises:
            PossessionError: the other end broke the protocol; nothing more can be read.
        """
        self._buffer += data
        messages: list[Message] = []
        while len(self._buffer) >= 4:
            (length,) = struct.unpack_from("<I", self._buffer)
            if not 0 < length <= MAX_FRAME:
                raise PossessionError(f"a frame of {length} bytes")
            if len(self._buffer) < 4 + length:
                break
            message = decode(bytes(self._buffer[4 : 4 + length]))
            del self._buffer[: 4 + length]
            if isinstance(message, Hello) == self._greeted:
                raise PossessionError("a Hello must come first, and once")
            if isinstance(message, Hello):
                if message.version != VERSION:
                    raise PossessionError(f"possession protocol version {message.version}; this node speaks {VERSION}")
                self._greeted = True
            if message is not None:
                messages.append(message)
        return messages
