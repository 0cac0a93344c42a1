"""Messages between members: what is sent is what is read, however it is cut; rubbish is refused, never more."""

import contextlib
import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.swarm import possession as p

digests = st.binary(min_size=32, max_size=32)
texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=p.MAX_TEXT)
numbers = st.integers(0, p.MAX_PIECES - 1)
members = st.builds(p.Member, texts, st.lists(texts, max_size=p.MAX_ADDRESSES).map(tuple))
member_lists = st.lists(members, max_size=4).map(tuple)
digest_lists = st.lists(digests, max_size=8).map(tuple)


@st.composite
def haves(draw: st.DrawFn) -> p.Have:
    pieces = draw(st.integers(0, 200))
    held = draw(st.integers(0, (1 << pieces) - 1)).to_bytes((pieces + 7) // 8, "little")
    size = draw(st.integers(0, 1 << 40))
    return p.Have(draw(digests), size, pieces, held, draw(st.integers(-1, size)), draw(member_lists))


hellos = st.builds(p.Hello, st.just(p.VERSION), texts, texts, texts, st.lists(texts, max_size=p.MAX_ADDRESSES).map(tuple))
others = st.one_of(
    st.builds(p.Want, digest_lists),
    st.builds(p.Unwant, digest_lists),
    st.builds(p.Withdraw, digest_lists),
    haves(),
    st.builds(p.Delta, digests, st.lists(numbers, max_size=50).map(tuple), st.lists(numbers, max_size=50).map(tuple)),
    st.builds(p.Peers, member_lists),
    st.builds(p.Load, st.integers(0, (1 << 20) - 1), st.integers(0, (1 << 20) - 1)),
    st.builds(p.Ping, st.integers(0, (1 << 64) - 1)),
    st.builds(p.Pong, st.integers(0, (1 << 64) - 1)),
)
HELLO = p.Hello(p.VERSION, "0.1", ":4406", "", ("/ip4/0.0.0.0/tcp/4405",))


def _body(value: object) -> bytes:
    return bytes(msgpack.packb(value, use_bin_type=True))


def _frame(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


@given(hellos, st.lists(others, max_size=6), st.data())
def test_any_cut_gives_the_same_messages(hello: p.Hello, messages: list[p.Message], data: st.DataObject) -> None:
    wire = b"".join(p.encode(message) for message in [hello, *messages])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=8)))
    reader, read = p.FrameReader(), []
    for start, stop in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        read += reader.feed(wire[start:stop])
    assert read == [hello, *messages]


@given(st.binary(max_size=300))
def test_garbage_is_refused_and_nothing_else(data: bytes) -> None:
    for prefix in (b"", p.encode(HELLO), p.encode(HELLO) + struct.pack("<I", len(data))):
        with contextlib.suppress(p.PossessionError):
            p.FrameReader().feed(prefix + data)


plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 63), (1 << 64) - 1),
        st.floats(),
        st.binary(max_size=40),
        st.text(max_size=40),
    ),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=12,
)


@given(st.integers(0, 12), st.lists(plain, max_size=8))
def test_messages_of_wrong_shape_are_refused_and_nothing_else(number: int, fields: list[object]) -> None:
    with contextlib.suppress(p.PossessionError):
        p.decode(_body([number, *fields]))


@given(others, st.data())
def test_a_flipped_byte_never_breaks_the_reader(message: p.Message, data: st.DataObject) -> None:
    wire = bytearray(p.encode(HELLO) + p.encode(message))
    at = data.draw(st.integers(0, len(wire) - 1))
    wire[at] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(p.PossessionError):
        p.FrameReader().feed(bytes(wire))


def test_a_later_version_may_add_fields_and_messages() -> None:
    reader = p.FrameReader()
    assert reader.feed(p.encode(HELLO)) == [HELLO]
    assert reader.feed(_frame(_body([9, 5, "new"]))) == [p.Ping(5)]
    assert reader.feed(_frame(_body([77, "new"]))) == []


@pytest.mark.parametrize(
    "body",
    [
        _body([2, [b"x" * 32] * (p.MAX_DIGESTS + 1)]),
        _body([2, [b"x" * 31]]),
        _body([5, b"x" * 32, [p.MAX_PIECES], []]),
        _body([5, b"x" * 32, [-1], []]),
        _body([5, b"x" * 32, [True], []]),
        _body([5, b"x" * 32, [1] * (p.MAX_DELTA + 1), []]),
        _body([4, b"x" * 32, 10, 9, b"\0", -1, []]),
        _body([4, b"x" * 32, 10, 9, b"\0\x02", -1, []]),
        _body([4, b"x" * 32, 10, 8, b"\0", 11, []]),
        _body([4, b"x" * 32, 10, p.MAX_PIECES + 1, b"\0" * (p.MAX_PIECES // 8 + 1), -1, []]),
        _body([7, [["peer", ["a"] * (p.MAX_ADDRESSES + 1)]]]),
        _body([7, [["peer", ["a" * (p.MAX_TEXT + 1)]]]]),
        _body([7, [["peer\n", []]]]),
        _body([1, 1, "", "", "", []]),
        _body({"a": 1}),
        b"\xdd\xff\xff\xff\xff",
        b"\x92\x02\xc6\xff\xff\xff\xff",
        b"\x91" * 2000 + b"\x01",
    ],
)
def test_each_limit(body: bytes) -> None:
    reader = p.FrameReader()
    reader.feed(p.encode(HELLO))
    with pytest.raises(p.PossessionError):
        reader.feed(_frame(body))


@pytest.mark.parametrize("length", [0, p.MAX_FRAME + 1, (1 << 32) - 1])
def test_frame_lengths(length: int) -> None:
    with pytest.raises(p.PossessionError, match="frame of"):
        p.FrameReader().feed(struct.pack("<I", length))


def test_hello_comes_first_once_and_in_our_version() -> None:
    with pytest.raises(p.PossessionError, match="first"):
        p.FrameReader().feed(p.encode(p.Ping(1)))
    with pytest.raises(p.PossessionError, match="once"):
        p.FrameReader().feed(p.encode(HELLO) * 2)
    with pytest.raises(p.PossessionError, match="version"):
        p.FrameReader().feed(p.encode(p.Hello(2, "", "", "", ())))


def test_what_does_not_fit_is_not_sent() -> None:
    largest = p.Have(b"x" * 32, 1 << 40, p.MAX_PIECES, b"\xff" * (p.MAX_PIECES // 8), -1)
    reader = p.FrameReader()
    assert reader.feed(p.encode(HELLO) + p.encode(largest)) == [HELLO, largest]
    with pytest.raises(p.PossessionError):
        p.encode(p.Have(b"x" * 32, 0, 0, b"x" * p.MAX_FRAME, -1))
