"""Nydus fixtures: a driver that answers what a reader wants from an OCI layout, and a decoder of every codec in a few lines."""

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import attrs
import lz4.block
import zstandard

from agent.formats.model import Digest, Inode, InodeKind, LayerIndex, MemberTable, digest_of
from agent.formats.nydus import FORMAT
from agent.formats.nydus.packaging import unpack_layer
from agent.formats.opening import BlobRange, LayerFacts
from agent.formats.tree import walk


@attrs.frozen
class Repository:
    """Blobs by digest; `wants` notes what was asked for."""

    blobs: dict[str, bytes]
    wants: list[BlobRange] = attrs.field(factory=list)

    def drive(self, facts: LayerFacts) -> LayerIndex:
        reader, answer = FORMAT.read_index(facts), None
        while True:
            try:
                want = reader.send(answer) if answer is not None else next(reader)
            except StopIteration as stop:
                index: LayerIndex = stop.value
                return index
            assert isinstance(want, BlobRange)
            self.wants.append(want)
            blob = self.blobs[want.blob or facts.digest]
            assert want.blob_size in (0, len(blob))
            assert 0 <= want.start <= want.stop <= len(blob)
            answer = blob[want.start : want.stop]

    def splice(self, index: LayerIndex) -> bytes:
        """The spliced blob."""
        out = []
        for part in index.parts:
            blob = self.blobs[part.digest]
            assert part.blob_size == len(blob)
            out.append(blob[part.start : part.start + part.size])
        return b"".join(out)


def facts_of(layers: Sequence[Any], digests: Sequence[str] = ()) -> LayerFacts:
    """The facts of an image's last layer; digests are computed if they are not given."""
    siblings = tuple(
        LayerFacts(Digest(digest), len(layer.blob), layer.media_type, layer.annotations)
        for layer, digest in zip(layers, digests or [digest_of(layer.blob) for layer in layers], strict=True)
    )
    return attrs.evolve(siblings[-1], siblings=siblings)


@attrs.frozen
class FixtureImage:
    """A fixture image taken apart."""

    tag: str
    facts: LayerFacts
    blobs: dict[str, bytes]
    bootstrap: bytes
    metas: dict[str, bytes]


def read_image(folder: Path, blobs: dict[str, bytes], tag: str) -> FixtureImage:
    """The image of a tag."""
    index = json.loads((folder / "images" / "index.json").read_bytes())
    (found,) = (m for m in index["manifests"] if m["annotations"]["org.opencontainers.image.ref.name"] == tag)
    layers = json.loads(blobs[found["digest"]])["layers"]
    siblings = tuple(LayerFacts(a["digest"], a["size"], a["mediaType"], a.get("annotations") or {}) for a in layers)
    files = unpack_layer(blobs[siblings[-1].digest])
    return FixtureImage(tag, attrs.evolve(siblings[-1], siblings=siblings), blobs, files.bootstrap, files.metas)


def read_blobs(folder: Path) -> dict[str, bytes]:
    """All blobs of an OCI layout."""
    return {f"sha256:{path.name}": path.read_bytes() for path in (folder / "images" / "blobs" / "sha256").iterdir()}


def read_truth(folder: Path) -> dict[str, dict[str, Any]]:
    """What the fixtures' source tree must look like: nydus-image keeps whole seconds only, and none before 1970."""
    raw = json.loads(gzip.decompress((folder / "expected.json.gz").read_bytes()))["merged_nydus"]
    out = {key: {**entry, "mtime_ns": max(0, entry["mtime_ns"] // 10**9 * 10**9)} for key, entry in raw.items()}
    groups: dict[str, list[str]] = {}
    for key, entry in raw.items():
        if "hardlink_group" in entry:
            groups.setdefault(entry["hardlink_group"], []).append(key)
    for keys in groups.values():
        for key in keys:
            out[key]["hardlink_group"] = sorted(keys)
    return out


def make_tar(files: dict[str, bytes]) -> bytes:
    """A plain tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def replace_bootstrap(
    last: LayerFacts, blobs: dict[str, bytes], bootstrap: bytes, metas: dict[str, bytes] | None = None
) -> tuple[LayerFacts, Repository]:
    """The image with another bootstrap, and tables of blobs beside it by the blobs' ids."""
    files = {f"image/{name}.blob.meta": meta for name, meta in (metas or {}).items()}
    return replace_layer(last, blobs, make_tar({"image/image.boot": bootstrap, **files}))


def replace_layer(last: LayerFacts, blobs: dict[str, bytes], layer: bytes) -> tuple[LayerFacts, Repository]:
    """The image with another last layer."""
    digest = digest_of(layer)
    annotations = {"containerd.io/snapshot/nydus-bootstrap": "true"}
    own = LayerFacts(digest, len(layer), "application/vnd.oci.image.layer.v1.tar+gzip", annotations)
    return attrs.evolve(own, siblings=(*last.siblings[:-1], own)), Repository({**blobs, digest: layer})


def check_index(index: LayerIndex) -> None:
    """What the model promises, whatever the image was."""
    chunks, pieces = index.chunks, index.pieces
    ends = [0, *accumulate(part.size for part in index.parts)]
    assert ends[-1] == pieces.blob_size
    assert set(ends) <= set(pieces.starts)
    assert all(0 <= part.start <= part.start + part.size <= part.blob_size for part in index.parts)
    assert list(pieces.starts) == sorted(set(pieces.starts))
    assert pieces.first_chunk[len(pieces)] == len(chunks)
    assert pieces.index_piece == len(pieces) - 1
    order = list(zip(chunks.blob_offset, chunks.inner_offset, chunks.volume_offset, strict=True))
    assert all(a < b for a, b in pairwise(order))
    for piece in range(len(pieces)):
        start, stop = pieces.extent(piece)
        for number in pieces.chunks_of(piece):
            assert start <= chunks.blob_offset[number]
            assert chunks.blob_offset[number] + chunks.blob_length[number] <= stop
            assert chunks.volume_offset[number] + chunks.size[number] <= index.volume_size
    if index.codec == "deflate":
        assert index.members is not None
        assert all(index.members.find(offset) >= 0 for offset in chunks.blob_offset)
    if index.members is not None:
        assert MemberTable.from_bytes(index.members.to_bytes()).to_bytes() == index.members.to_bytes()
    assert all(0 <= number < len(pieces) for number in index.prefetch_pieces)
    seen: dict[int, Inode] = {}
    directories: list[int] = []
    for path, inode in walk(index.root):
        assert len(path) <= 4096
        seen[id(inode)] = inode
        if inode.kind is InodeKind.DIRECTORY:
            directories.append(id(inode))
        else:
            assert not inode.children
        for name in inode.children:
            assert 0 < len(name) <= 255
            assert name not in (b".", b"..")
            assert not {b"/", b"\0"} & {name[at : at + 1] for at in range(len(name))}
    assert len(directories) == len(set(directories))
    for inode in seen.values():
        if inode.kind is InodeKind.FILE and inode.size:
            assert inode.volume_offset % 4096 == 0
            assert 0 <= inode.volume_offset <= inode.volume_offset + inode.size <= index.volume_size


def read_volume(index: LayerIndex, blob: bytes) -> bytes:
    """Decode every chunk of a spliced blob; each must lie in its piece and be right."""
    volume = bytearray(index.volume_size)
    chunks, pieces = index.chunks, index.pieces
    members: dict[int, bytes] = {}
    for number in range(len(chunks)):
        chunk = chunks[number]
        start, stop = pieces.extent(pieces.piece_of_chunk(number))
        assert start <= chunk.blob_offset < chunk.blob_offset + chunk.blob_length <= stop
        if chunk.blob_offset not in members:
            data = blob[chunk.blob_offset : chunk.blob_offset + chunk.blob_length]
            members = {chunk.blob_offset: decode(index.codec, data, chunk.blob_offset, chunk.size, index.members)}
        data = members[chunk.blob_offset][chunk.inner_offset : chunk.inner_offset + chunk.size]
        assert chunks.is_right(number, data), number
        volume[chunk.volume_offset : chunk.volume_offset + chunk.size] = data
    return bytes(volume)


def decode(codec: str, data: bytes, offset: int, size: int, members: MemberTable | None) -> bytes:
    """One member."""
    row = members.find(offset) if members else -1
    if members is not None and row >= 0:
        size = members.size[row]
    if codec == "deflate":
        assert members is not None
        return resume(data, members.bits[row], members.prime[row], members.window(row))[:size]
    if codec == "raw" or len(data) == size:
        return data
    if codec == "zstd/raw":
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    if codec == "lz4/raw":
        return bytes(lz4.block.decompress(data, uncompressed_size=size))
    assert codec == "gzip/raw"
    return zlib.decompress(data, 31)


def resume(data: bytes, bits: int, prime: int, window: bytes) -> bytes:
    """Raw deflate from a checkpoint; the odd bits are met with empty blocks in front (formats.md 5.1)."""
    stream: list[int] = []
    if bits:
        length = (8 - bits) % 8
        if length % 2:  # 93 bits: an empty dynamic block
            stream += EMPTY_DYNAMIC
        while (len(stream) + bits) % 8:
            stream += [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
        stream += [prime >> (8 - bits + bit) & 1 for bit in range(bits)]
    head = bytes(sum(stream[at + bit] << bit for bit in range(8)) for at in range(0, len(stream), 8))
    inflater = zlib.decompressobj(-15, zdict=window) if window else zlib.decompressobj(-15)
    return inflater.decompress(head + data)


def _empty_dynamic() -> list[int]:
    bits: list[int] = []

    def put(value: int, count: int) -> None:
        bits.extend(value >> bit & 1 for bit in range(count))

    put(0, 1)  # not the last block
    put(2, 2)  # dynamic
    put(0, 5)  # 257 literal codes
    put(0, 5)  # 1 distance code
    put(15, 4)  # 19 code length codes
    lengths = {18: 1, 1: 1}
    for symbol in (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15):
        put(lengths.get(symbol, 0), 3)
    one, repeat = 0, 1  # canonical codes of length 1: symbol 1 is "0", symbol 18 is "1"
    put(repeat, 1)
    put(138 - 11, 7)
    put(repeat, 1)
    put(118 - 11, 7)
    put(one, 1)  # symbol 256 has length 1
    put(one, 1)  # the one distance code has length 1
    put(0, 1)  # end of block
    return bits


EMPTY_DYNAMIC = _empty_dynamic()
