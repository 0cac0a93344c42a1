"""Nydus images that are broken, hostile, or of a kind that Shoal does not read."""

import gzip
import struct
from pathlib import Path
from typing import Any

import attrs
import pytest

from agent.formats.model import FormatError
from agent.formats.nydus.blob_meta import decompress
from agent.formats.nydus.packaging import unpack_layer
from agent.formats.opening import LayerFacts
from tests.nydus_images import Repository, facts_of, make_tar, read_blobs, replace_bootstrap, replace_layer

EXTENSION = 1152
BLOBS = 4096  # where the blob table of the fixtures is


@pytest.fixture(scope="module")
def blobs(shared_fixtures: Path) -> dict[str, bytes]:
    return read_blobs(shared_fixtures)


class Image:
    """A fixture image of which the bootstrap can be changed."""

    def __init__(self, images: Any, blobs: dict[str, bytes], tag: str) -> None:
        layers = images.layers(tag)
        self.facts: LayerFacts = facts_of(layers)
        self.blobs = blobs
        files = unpack_layer(blobs[self.facts.digest])
        self.boot, self.metas = bytearray(files.bootstrap), files.metas

    def patch(self, at: int, code: str, *values: int) -> "Image":
        struct.pack_into("<" + code, self.boot, at, *values)
        return self

    def read(self) -> Any:
        facts, repository = replace_bootstrap(self.facts, self.blobs, bytes(self.boot), self.metas)
        return repository.drive(facts)

    def refuse(self, match: str) -> None:
        with pytest.raises(FormatError, match=match):
            self.read()

    def get(self, at: int, code: str) -> int:
        value: int = struct.unpack_from("<" + code, self.boot, at)[0]
        return value

    def dirents(self) -> list[int]:
        """Places of the root's entries."""
        meta = self.get(1024 + 40, "I") << 12
        root = meta + 32 * self.get(1024 + 14, "H")
        size, block = self.get(root + 8, "Q"), self.get(root + 16, "I")
        assert self.get(root, "H") in (1, 5)
        start = block << 12 if size >= 4096 or self.get(root, "H") == 1 else root + 64
        return [start + 12 * number for number in range(self.get(start + 8, "H") // 12)]


@pytest.fixture
def v6(images: Any, blobs: dict[str, bytes]) -> Image:
    return Image(images, blobs, "nydus-v6-zstd")


@pytest.fixture
def v5(images: Any, blobs: dict[str, bytes]) -> Image:
    return Image(images, blobs, "nydus-v5-zstd")


@pytest.fixture
def zran(images: Any, blobs: dict[str, bytes]) -> Image:
    return Image(images, blobs, "nydus-zran")


def test_unchanged_images_are_read(v6: Image, v5: Image, zran: Image) -> None:
    for image in (v6, v5, zran):
        image.read()


def test_encrypted(v6: Image, v5: Image) -> None:
    v5.patch(16, "Q", 0x0200_00B4).refuse("encrypted, which Shoal does not read")
    v6.patch(BLOBS + 216, "I", 1).refuse("encrypted, which Shoal does not read")
    v6.patch(BLOBS + 216, "I", 0).patch(BLOBS + 84, "I", v6.get(BLOBS + 84, "I") | 0x100).refuse("encrypted")


def test_encrypted_flag_of_the_superblock(v6: Image) -> None:
    v6.patch(EXTENSION, "Q", 0x0200_01B4).refuse("encrypted, which Shoal does not read")


def test_encrypted_bootstrap_layer(images: Any, blobs: dict[str, bytes]) -> None:
    facts = attrs.evolve(
        facts_of(images.layers("nydus-v6-zstd")), media_type="application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
    )
    with pytest.raises(FormatError, match="encrypted, which Shoal does not read"):
        Repository(blobs).drive(facts)


def test_tarfs(v6: Image) -> None:
    v6.patch(EXTENSION, "Q", v6.get(EXTENSION, "Q") | 0x200).refuse("tarfs")


def test_external_storage(v6: Image) -> None:
    v6.patch(BLOBS + 84, "I", 0x800).refuse("outside the registry")


def test_two_compressors(v6: Image) -> None:
    v6.patch(BLOBS + 256 + 76, "I", 1).refuse("several compressors")


def test_a_blob_without_compression_beside_others(v6: Image) -> None:
    assert v6.patch(BLOBS + 256 + 76, "I", 0).read().codec == "zstd/raw"


def test_no_or_two_digest_algorithms(v6: Image) -> None:
    v6.patch(EXTENSION, "Q", 0x1B0).refuse("digest algorithm")
    v6.patch(EXTENSION, "Q", 0x1BC).refuse("digest algorithm")


def test_blob_that_the_manifest_lacks(v6: Image) -> None:
    v6.patch(BLOBS, "B", ord("0")).refuse("not among the manifest's layers")


def test_absurd_counts(v6: Image, v5: Image) -> None:
    for at, code in ((8, "Q"), (16, "I"), (24, "Q"), (32, "Q"), (40, "Q"), (48, "I")):
        old = v6.get(EXTENSION + at, code)
        v6.patch(EXTENSION + at, code, (1 << (8 * struct.calcsize(code))) - 16).refuse("bytes|table|entries|more than")
        v6.patch(EXTENSION + at, code, old)
    for at, code in ((32, "Q"), (40, "Q"), (48, "Q"), (56, "I"), (60, "I"), (64, "I"), (68, "I"), (72, "Q")):
        old = v5.get(at, code)
        v5.patch(at, code, (1 << (8 * struct.calcsize(code))) - 16).refuse("bytes|table|entries|more than")
        v5.patch(at, code, old)


def test_directories_in_a_circle(v6: Image) -> None:
    (place,) = [at for at in v6.dirents() if v6.get(at + 10, "B") == 2][-1:]
    v6.patch(place, "Q", v6.get(1024 + 14, "H")).refuse("two names")


def test_hard_link_to_a_directory(v6: Image) -> None:
    *_, first, second = [at for at in v6.dirents() if v6.get(at + 10, "B") == 2]
    v6.patch(first, "Q", v6.get(second, "Q")).refuse("two names")


def test_children_in_a_circle_v5(v5: Image) -> None:
    table = v5.get(32, "Q")
    offset = v5.get(table + 4, "I") << 3
    v5.patch(offset + 92, "I", 2).refuse("two places in the tree")


def test_chunks_that_overlap(v6: Image) -> None:
    table, size = v6.get(EXTENSION + 24, "Q"), v6.get(EXTENSION + 32, "Q")
    places = sorted((v6.get(at + 48, "Q"), at) for at in range(table, table + size, 80) if v6.get(at + 32, "I") == 0)
    (one, _), (_, other) = places[4:6]
    v6.patch(other + 48, "Q", one).refuse("chunks overlap")
    v6.patch(other + 48, "Q", one + 1).refuse("members overlap")


def test_chunk_outside_its_blob(v6: Image) -> None:
    table = v6.get(EXTENSION + 24, "Q")
    v6.patch(table + 48, "Q", 600_000_000).refuse("which has")
    v6.patch(table + 48, "Q", (1 << 64) - 1).refuse("a chunk of")


def test_flag_that_contradicts_the_size(v6: Image) -> None:
    """What the flags say and what the sizes say must be one, or a decoder would take the wrong one."""
    table = v6.get(EXTENSION + 24, "Q")
    v6.patch(table + 36, "I", v6.get(table + 36, "I") ^ 1).refuse("with flags")


def test_no_digests(v6: Image) -> None:
    v6.patch(EXTENSION + 24, "QQ", 0, 0).refuse("does not vouch for the digests")


def test_tables_that_contradict_the_bootstrap(zran: Image) -> None:
    for name, meta in zran.metas.items():
        zran.metas[name] = meta[:-4096] + bytes(12) + meta[-4084:]
    zran.refuse("no header|contradicts")


def test_layer_with_another_digest(images: Any, blobs: dict[str, bytes]) -> None:
    facts: LayerFacts = facts_of(images.layers("nydus-v6-zstd"))
    changed = bytearray(blobs[facts.digest])
    changed[4] ^= 1  # a time in the gzip header
    with pytest.raises(FormatError, match="the manifest says"):
        Repository({**blobs, facts.digest: bytes(changed)}).drive(facts)


def test_layer_without_bootstrap(images: Any, blobs: dict[str, bytes]) -> None:
    facts: LayerFacts = facts_of(images.layers("nydus-v6-zstd"))
    for layer, match in (
        (make_tar({"image/other": b"x"}), "no image/image.boot"),
        (make_tar({"image/image.boot": b"x" * 9000}), "neither RAFS v5 nor v6"),
        (make_tar({"image/image.boot": b""}), "neither RAFS v5 nor v6"),
        (b"", "no image/image.boot|cut short"),
        (b"\x1f\x8b\x08", "cut short"),
    ):
        changed, repository = replace_layer(facts, blobs, layer)
        with pytest.raises(FormatError, match=match):
            repository.drive(changed)


def test_decompression_bombs(images: Any, blobs: dict[str, bytes]) -> None:
    facts: LayerFacts = facts_of(images.layers("nydus-v6-zstd"))
    bomb = gzip.compress(make_tar({"image/other": b""})[:512].replace(b"00000000000\0", b"07777777777\0", 1), 1)
    zeros = gzip.compress(bytes(64 << 20), 1)
    changed, repository = replace_layer(facts, blobs, bomb + zeros * 5)
    with pytest.raises(FormatError):
        repository.drive(changed)
    for compressor in (0, 1, 2, 3):
        with pytest.raises(FormatError):
            decompress(zeros, compressor, 1000)
