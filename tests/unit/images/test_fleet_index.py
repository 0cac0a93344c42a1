"""The document by which a fleet shares the index of a plain layer: what it says comes out, and nothing else is believed."""

from array import array
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import zstandard
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from agent.formats.model import ChunkTable, Digest, FormatError, Inode, InodeKind, MemberTable, PieceTable
from agent.images import fleet_index
from agent.images.fleet_index import decode, encode, seal, unseal
from agent.swarm import FleetSecret, make_credentials, new_identity
from fsmount.erofs import write_image
from tests.fleet_index_samples import DIFF_ID, FLEET, Shared, make_shared

ME = new_identity()


def sealed(layer: Shared) -> bytes:
    return encode(layer, layer.meta, ME, FLEET)


def read(raw: bytes, layer: Shared) -> fleet_index.FleetIndex:
    return decode(raw, layer.digest, layer.pieces.blob_size, FLEET)


def test_what_was_signed_is_read() -> None:
    layer = make_shared()
    found = read(sealed(layer), layer)
    index = found.index
    assert (found.signer, found.diff_id, found.meta) == (ME.peer_id, DIFF_ID, layer.meta)
    assert (index.format, index.codec, index.volume_size, index.entry_count) == ("tar (gzip)", "deflate", layer.volume_size, 4)
    assert index.chunks.to_bytes() == layer.chunks.to_bytes()
    assert index.pieces.to_bytes() == layer.pieces.to_bytes()
    assert index.members is not None
    assert layer.members is not None
    assert index.members.to_bytes() == layer.members.to_bytes()
    assert index.root.children == {}


def test_a_layer_without_files_is_shared_too() -> None:
    empty = PieceTable(array("Q", [0, 5]), array("I", [0, 0]), digests=b"d" * 32)
    meta = bytes(write_image(Inode(InodeKind.DIRECTORY), volume_size=0))
    layer = make_shared(chunks=ChunkTable(), pieces=empty, members=None, codec="raw", volume_size=0, meta=meta, extra={})
    found = read(sealed(layer), layer)
    assert (len(found.index.chunks), found.index.members, found.diff_id) == (0, None, "")


def test_every_flipped_byte_is_noticed() -> None:
    layer = make_shared()
    raw = sealed(layer)
    for at in range(len(raw)):
        spoilt = bytearray(raw)
        spoilt[at] ^= 1 << at % 8
        with pytest.raises(FormatError):
            read(bytes(spoilt), layer)


def test_every_cut_is_noticed() -> None:
    layer = make_shared()
    raw = sealed(layer)
    for stop in range(len(raw)):
        with pytest.raises(FormatError):
            read(raw[:stop], layer)
    with pytest.raises(FormatError):
        read(raw + b"\0", layer)


def test_another_blob_is_refused() -> None:
    layer = make_shared()
    raw = sealed(layer)
    with pytest.raises(FormatError, match="a layer index of sha256:"):
        decode(raw, Digest("sha256:" + "00" * 32), layer.pieces.blob_size, FLEET)
    with pytest.raises(FormatError, match="a layer index of sha256:"):
        decode(raw, layer.digest, layer.pieces.blob_size + 1, FLEET)


def test_another_fleet_is_refused() -> None:
    layer = make_shared()
    stranger = new_identity()
    keys = [
        make_credentials(FleetSecret(secret), stranger).seal_key
        for secret in (b"one secret of a fleet", b"another one of a fleet")
    ]
    raw = encode(layer, layer.meta, stranger, keys[0])
    assert decode(raw, layer.digest, layer.pieces.blob_size, keys[0]).signer == stranger.peer_id
    with pytest.raises(FormatError, match="another fleet"):
        decode(raw, layer.digest, layer.pieces.blob_size, keys[1])


def test_a_member_cannot_sign_for_another() -> None:
    layer = make_shared()
    frame, _ = unseal(sealed(layer), FLEET)
    other = new_identity().key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    raw = seal(bytes(frame), ME, FLEET)
    signature = raw[40:104]
    forged = b"SHOALIX1" + other + signature
    mac = fleet_index._mac(FLEET, other, signature, fleet_index._message(frame))
    with pytest.raises(FormatError, match="a signature that is not right"):
        read(forged + mac + bytes(frame), layer)


@pytest.mark.parametrize("codec", ["whole", "nonsense"])
def test_what_is_not_read_at_random_is_not_shared(codec: str) -> None:
    with pytest.raises(FormatError, match="of no use"):
        sealed(make_shared(codec=codec))


def test_pieces_without_digests_are_not_shared() -> None:
    layer = make_shared()
    for digests in (b"", layer.pieces.digests[:-32] + bytes(32)):
        with pytest.raises(FormatError, match="of no use"):
            sealed(attrs.evolve(layer, pieces=attrs.evolve(layer.pieces, digests=digests)))


def test_what_is_too_large_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_shared()
    raw = sealed(layer)
    monkeypatch.setattr(fleet_index, "MAX_BODY_BYTES", 5000)
    with pytest.raises(FormatError, match="too many to be shared"):
        sealed(layer)
    monkeypatch.undo()
    for limit in ("MAX_CHUNKS", "MAX_PIECES", "MAX_MEMBERS", "MAX_META_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(fleet_index, limit, 1)
            with pytest.raises(FormatError, match="too large"):
                sealed(layer)
            with pytest.raises(FormatError, match="too large"):
                read(raw, layer)


def _change_chunks(change: Callable[[ChunkTable], None]) -> Callable[[Shared], Shared]:
    def changed(layer: Shared) -> Shared:
        chunks = ChunkTable.from_bytes(layer.chunks.to_bytes())
        change(chunks)
        return attrs.evolve(layer, chunks=chunks)

    return changed


def _set(column: str, row: int, value: int) -> Callable[[Shared], Shared]:
    def change(chunks: ChunkTable) -> None:
        getattr(chunks, column)[row] = value

    return _change_chunks(change)


def _pieces(layer: Shared, **changes: Any) -> Shared:
    return attrs.evolve(layer, pieces=attrs.evolve(layer.pieces, **changes))


LIES: dict[str, Callable[[Shared], Shared]] = {
    "a chunk outside the volume": _set("volume_offset", 0, 1 << 40),
    "chunks that overlap": _set("volume_offset", 1, 1),
    "an empty chunk": _set("size", 0, 0),
    "a chunk that is too large": lambda layer: attrs.evolve(
        _set("size", 5, 1 << 30)(layer), volume_size=1 << 36, meta=_empty_image(1 << 36)
    ),
    "a chunk before the one in front of it": _set("blob_offset", 1, 0),
    "a chunk in another piece": _set("blob_offset", 5, 20_000),
    "a member beyond the blob": _set("blob_length", 5, 1 << 20),
    "no member table": lambda layer: attrs.evolve(layer, members=None),
    "a chunk in no member": lambda layer: attrs.evolve(layer, members=_one_member()),
    "chunks left out": lambda layer: _pieces(layer, first_chunk=array("I", [0] * (len(layer.pieces) + 1))),
    "pieces out of order": lambda layer: _pieces(layer, starts=array("Q", reversed(layer.pieces.starts))),
    "a volume beyond all bounds": lambda layer: attrs.evolve(layer, volume_size=1 << 50),
    "a format that is no word": lambda layer: attrs.evolve(layer, format="tar\n"),
    "a long format": lambda layer: attrs.evolve(layer, format="t" * 100),
    "a diff_id that is none": lambda layer: attrs.evolve(layer, extra={"diff_id": "sha256:0"}),
    "no image": lambda layer: attrs.evolve(layer, meta=b""),
    "an image that is none": lambda layer: attrs.evolve(layer, meta=bytes(8192)),
    "an image of another volume": lambda layer: attrs.evolve(layer, meta=_empty_image(1 << 30)),
    "an image that was cut off": lambda layer: attrs.evolve(layer, meta=_wide_image(layer.volume_size)[:4096]),
}


def _one_member() -> MemberTable:
    members = MemberTable()
    members.append(0)
    return members


def _wide_image(volume_size: int) -> bytes:
    children = {b"%0100d" % number: Inode(InodeKind.DIRECTORY) for number in range(100)}
    return bytes(write_image(Inode(InodeKind.DIRECTORY, children=children), volume_size=volume_size))


def _empty_image(volume_size: int) -> bytes:
    return bytes(write_image(Inode(InodeKind.DIRECTORY), volume_size=volume_size))


@pytest.mark.parametrize("lie", LIES)
def test_what_a_member_made_wrong_is_refused(lie: str) -> None:
    layer = LIES[lie](make_shared())
    raw = sealed(layer)
    with pytest.raises(FormatError):
        read(raw, layer)


def _frame(body: bytes, **options: Any) -> bytes:
    return seal(zstandard.ZstdCompressor(**options).compress(body), ME, FLEET)


def test_a_bomb_is_not_unpacked() -> None:
    layer = make_shared()
    with pytest.raises(FormatError, match="uncompressed"):
        read(_frame(bytes(fleet_index.MAX_BODY_BYTES + 1)), layer)
    with pytest.raises(FormatError, match="uncompressed"):
        read(_frame(bytes(100_000), write_content_size=False), layer)


@pytest.mark.parametrize("body", [b"", b"\0" * 4, b"\xff" * 4, b"\1\0\0\0\x80", b"\2\0\0\0\x81\x80", b"\1\0\0\0\xc1" + b"x" * 9])
def test_a_head_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(FormatError):
        read(_frame(body), make_shared())
