"""Whatever a member of the fleet signs as a layer index, FormatError is the only answer that is not a sound index."""

import attrs
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from agent.formats.model import FormatError
from agent.images.fleet_index import decode, encode, seal, unseal
from agent.store.layout import check_members, check_pieces
from agent.store.presence import find_firsts
from agent.swarm import new_identity
from tests.fleet_index_samples import FLEET, make_shared

ME = new_identity()
LAYER = make_shared()
RAW = encode(LAYER, LAYER.meta, ME, FLEET)
BODY = zstandard.ZstdDecompressor().decompress(unseal(RAW, FLEET)[0])


def check(raw: bytes) -> None:
    try:
        found = decode(raw, LAYER.digest, LAYER.pieces.blob_size, FLEET)
    except FormatError:
        return
    index = found.index
    check_pieces(index.chunks, index.pieces, index.codec)
    check_members(index.chunks, index.members, index.codec)
    find_firsts(index.chunks, index.volume_size)
    assert all(index.pieces.digest(piece) for piece in range(len(index.pieces)))
    assert index.pieces.blob_size == LAYER.pieces.blob_size


@given(st.lists(st.tuples(st.integers(0, len(BODY) - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_a_body_with_other_bytes(changes: list[tuple[int, bytes]]) -> None:
    body = bytearray(BODY)
    for at, part in changes:
        body[at : at + len(part)] = part
    check(seal(zstandard.ZstdCompressor(level=1).compress(bytes(body)), ME, FLEET))


@given(st.integers(0, len(BODY)), st.binary(max_size=64))
def test_a_body_that_ends_otherwise(stop: int, rest: bytes) -> None:
    check(seal(zstandard.ZstdCompressor(level=1).compress(BODY[:stop] + rest), ME, FLEET))


@given(st.integers(0, len(RAW) - 137), st.binary(min_size=1, max_size=8))
def test_a_frame_with_other_bytes(at: int, part: bytes) -> None:
    frame = bytearray(RAW[136:])
    frame[at : at + len(part)] = part
    check(seal(bytes(frame), ME, FLEET))


@given(st.binary(max_size=300))
def test_garbage(raw: bytes) -> None:
    check(raw)
    check(seal(raw, ME, FLEET))


@given(st.binary(min_size=32, max_size=32))
def test_another_key(key: bytes) -> None:
    raw = encode(attrs.evolve(LAYER), LAYER.meta, ME, key)
    if key != FLEET:
        try:
            decode(raw, LAYER.digest, LAYER.pieces.blob_size, FLEET)
        except FormatError:
            return
        raise AssertionError("a document of another fleet was taken")
