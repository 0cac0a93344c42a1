"""Broken Nydus images: whatever is changed in a real one, the reader refuses it or gives an index that keeps the model's promises."""

import functools
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.formats.model import FormatError, LayerIndex
from agent.formats.nydus import parse_bootstrap
from agent.formats.nydus.blob_meta import decompress
from agent.formats.nydus.blob_toc import find_bootstrap
from agent.formats.nydus.packaging import unpack_layer
from agent.formats.opening import LayerFacts
from tests.nydus_images import FixtureImage, check_index, read_blobs, read_image, replace_bootstrap

MOST_MEMORY = 256 << 20
FULL = ["nydus-v6-zstd", "nydus-v6-batch", "nydus-v5-lz4", "nydus-zran"]


@functools.cache
def load(folder: Path, tag: str) -> FixtureImage:
    return read_image(folder, read_blobs(folder), tag)


def read(image: FixtureImage, bootstrap: bytes, metas: dict[str, bytes] | None = None) -> LayerIndex | None:
    """The index, which keeps the model's promises; None if the image was refused."""
    facts, repository = replace_bootstrap(image.facts, image.blobs, bootstrap, image.metas if metas is None else metas)
    try:
        index = repository.drive(facts)
    except FormatError:
        return None
    check_index(index)
    return index


def small(image: FixtureImage, layer: int) -> bytes:
    """The bootstrap of one data layer: a few files, so that every byte of it can be changed in turn."""
    blob = image.blobs[image.facts.siblings[layer].digest]
    part = find_bootstrap(blob[-4096:], len(blob))
    assert part is not None
    found = decompress(blob[part.offset : part.offset + part.compressed_size], part.compressor, part.size)
    digest = image.facts.siblings[layer].digest.removeprefix("sha256:")
    if image.metas and "zran" in image.tag:
        digest = image.facts.siblings[layer].annotations["containerd.io/snapshot/nydus-ref"].removeprefix("sha256:")
    return found.replace(b"x" * 64, digest.encode())


@pytest.mark.parametrize("tag", ["nydus-v6-zstd", "nydus-v6-batch", "nydus-v5-zstd", "nydus-zran"])
def test_every_byte_of_a_small_bootstrap(shared_fixtures: Path, tag: str) -> None:
    image = load(shared_fixtures, tag)
    bootstrap = small(image, 1)
    first = parse_bootstrap(bootstrap)
    assert len(first.files) == 4
    assert read(image, bootstrap) is not None
    changed = bytearray(bootstrap)
    used = {at + near for at, byte in enumerate(bootstrap) if byte for near in (-1, 0, 1, 2)}
    refused = 0
    for at in sorted(used & set(range(len(bootstrap)))):
        for mask in (0x01, 0xFF):
            changed[at] ^= mask
            refused += read(image, bytes(changed)) is None
            changed[at] ^= mask
    assert refused > 100


@pytest.mark.parametrize("tag", FULL)
def test_truncated_bootstraps(shared_fixtures: Path, tag: str) -> None:
    image = load(shared_fixtures, tag)
    for size in {0, 1, 100, 1023, 1152, 4096, 5000, 8192, 9000, *range(10_000, len(image.bootstrap), 40_000)}:
        read(image, image.bootstrap[:size])
    bootstrap = small(image, 1)
    for size in range(0, len(bootstrap), 101):
        read(image, bootstrap[:size])


@pytest.mark.parametrize("tag", FULL)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(patches=st.lists(st.tuples(st.integers(0, 1 << 30), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_patched_bootstraps(shared_fixtures: Path, tag: str, patches: list[tuple[int, bytes]]) -> None:
    image = load(shared_fixtures, tag)
    changed = bytearray(image.bootstrap)
    for at, patch in patches:
        at %= len(changed) - 8
        changed[at : at + len(patch)] = patch
    read(image, bytes(changed))


@pytest.mark.parametrize("tag", ["nydus-v6-batch", "nydus-zran"])
def test_every_byte_of_small_tables(shared_fixtures: Path, tag: str) -> None:
    image = load(shared_fixtures, tag)
    bootstrap = small(image, 1)
    name, tables = min(image.metas.items(), key=lambda item: len(item[1]))
    changed = bytearray(tables)
    for at in (*range(200), *range(len(tables) - 4096, len(tables) - 4000), *range(len(tables) - 8, len(tables))):
        for mask in (0x01, 0x80, 0xFF):
            changed[at] ^= mask
            read(image, bootstrap, {name: bytes(changed)})
            changed[at] ^= mask
    for size in range(0, len(tables), 97):
        read(image, bootstrap, {name: tables[:size]})


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(patches=st.lists(st.tuples(st.integers(0, 100_000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_patched_tables(shared_fixtures: Path, patches: list[tuple[int, bytes]]) -> None:
    image = load(shared_fixtures, "nydus-zran")
    metas = {}
    for name, tables in image.metas.items():
        changed = bytearray(tables)
        for at, patch in patches:
            at %= 62_000  # infos and contexts; what follows are windows
            changed[at : at + len(patch)] = patch
        metas[name] = bytes(changed)
    read(image, image.bootstrap, metas)


@settings(max_examples=200)
@given(tail=st.binary(max_size=200), size=st.integers(0, 4096), blob_size=st.integers(0, 1 << 40))
def test_any_toc(tail: bytes, size: int, blob_size: int) -> None:
    header = bytearray(512)
    header[124:135] = b"%011o" % size
    header[257:262] = b"ustar"
    for name in (b"rafs.blob.toc", b"image.boot"):
        header[: len(name)] = name
        try:
            find_bootstrap(tail + bytes(header), blob_size)
        except FormatError:
            continue


@settings(max_examples=200)
@given(layer=st.binary(max_size=2000))
def test_any_layer(layer: bytes) -> None:
    for head in (b"", b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd"):
        try:
            unpack_layer(head + layer)
        except FormatError:
            continue


def test_memory_of_absurd_counts(shared_fixtures: Path) -> None:
    """Numbers of the headers, tables and inodes as large as they can be."""
    for tag in ("nydus-v6-zstd", "nydus-v5-zstd"):
        bootstrap = small(load(shared_fixtures, tag), 1)
        tracemalloc.start()
        try:
            for at in range(0, len(bootstrap), 4):
                if not any(bootstrap[at : at + 4]):
                    continue
                for value in (0x7FFF_FFFF, 0xFFFF_FFF8, 0x0010_0000):
                    changed = bytearray(bootstrap)
                    struct.pack_into("<I", changed, at, value)
                    try:
                        parse_bootstrap(bytes(changed))
                    except FormatError:
                        continue
            assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
        finally:
            tracemalloc.stop()


def test_facts_without_a_manifest(shared_fixtures: Path) -> None:
    image = load(shared_fixtures, "nydus-v6-zstd")
    facts, repository = replace_bootstrap(image.facts, image.blobs, image.bootstrap)
    alone = LayerFacts(facts.digest, facts.size, facts.media_type, facts.annotations)
    with pytest.raises(FormatError, match="not among the manifest's layers"):
        repository.drive(alone)
