"""Nydus images that we made, mounted by the kernel as what they are: EROFS over the data blobs, stored uncompressed.

`fsck.erofs --extract` reads the same. What a nydus reader sees is the unit tests' business.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings

from agent.formats.model import ChunkTable, Digest, Inode, InodeKind
from agent.formats.nydus_writer import WrittenBlob, build_bootstrap, write_blob, write_bootstrap
from agent.formats.nydus_writer.merge import merge_layers
from fsmount import syscalls
from fsmount.erofs import ImageReader
from tests.erofs_trees import (
    as_kernel_shows,
    describe_image,
    describe_mount,
    describe_tree,
    make_volume,
    odd_tree,
    trees,
    walk_tree,
)
from tests.tree_facts import Facts, differences, facts_of
from tests.unit.formats.conftest import FixtureImages

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root: sudo make test")

CHUNK = 1 << 20
MIB = 1 << 20


@pytest.fixture(scope="module")
def images(shared_fixtures: Path) -> FixtureImages:
    return FixtureImages(shared_fixtures)


@contextlib.contextmanager
def presented(image: bytes | bytearray, blobs: Sequence[bytes]) -> Iterator[Path]:
    """The image mounted over its blobs as plain files; they lie beside the mount as `meta` and 0, 1, …"""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="shoal-nydus-") as name:
        folder = Path(name)
        (folder / "meta").write_bytes(image)
        for number, blob in enumerate(blobs):
            (folder / str(number)).write_bytes(blob)
        top = folder / "top"
        top.mkdir()
        devices = [("device", str(folder / str(number))) for number in range(len(blobs))]
        syscalls.mount_configured("erofs", str(top), [("source", str(folder / "meta")), *devices])
        try:
            yield top
        finally:
            syscalls.unmount(str(top))


def fsck(folder: Path, blobs: int) -> None:
    tool = shutil.which("fsck.erofs")
    if tool is None:
        pytest.skip("fsck.erofs is missing: apt-get install erofs-utils")
    devices = [f"--device={folder / str(number)}" for number in range(blobs)]
    done = subprocess.run([tool, *devices, "--extract", str(folder / "meta")], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert b"rror" not in done.stderr, done.stderr


def convert(tars: list[bytes], **options: int) -> tuple[list[WrittenBlob], list[bytes]]:
    layers, blobs = [], []
    for tar in tars:
        out = io.BytesIO()
        layers.append(write_blob(io.BytesIO(tar), out, compressor="none", **options))
        if layers[-1].digest is not None:
            blobs.append(out.getvalue())
    return layers, blobs


def truth(shared_fixtures: Path, key: str) -> Facts:
    facts: Facts = json.loads(gzip.decompress((shared_fixtures / "expected.json.gz").read_bytes()))[key]
    groups: dict[str, list[str]] = {}
    for path, entry in facts.items():
        if "hardlink_group" in entry:
            groups.setdefault(entry["hardlink_group"], []).append(path)
    for paths in groups.values():
        for path in paths:
            facts[path]["hardlink_group"] = sorted(paths)
            if len(paths) == 1:
                del facts[path]["hardlink_group"]
    return facts


@pytest.mark.parametrize(("tag", "key"), [("oci", "merged"), ("oci-nydus", "merged_nydus")])
@pytest.mark.parametrize("chunk_size", [4096, 65536, CHUNK])
def test_the_fixture_image_through_the_kernel(
    images: FixtureImages, shared_fixtures: Path, tag: str, key: str, chunk_size: int
) -> None:
    layers, blobs = convert([gzip.decompress(layer.blob) for layer in images.layers(tag)], chunk_size=chunk_size)
    image = build_bootstrap(layers, [b"/"]).image
    with presented(image, blobs) as top:
        assert differences(facts_of(top), truth(shared_fixtures, key)) == []
        fsck(top.parent, len(blobs))
        assert describe_mount(os.fsencode(top)) == as_kernel_shows(describe_image(ImageReader(image)))


def test_the_image_as_its_layer_holds_it(images: FixtureImages, shared_fixtures: Path) -> None:
    layers, blobs = convert([gzip.decompress(layer.blob) for layer in images.layers("oci")])
    out = io.BytesIO()
    write_bootstrap(layers, out)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        member = archive.extractfile("image/image.boot")
        assert member is not None
        with presented(member.read(), blobs) as top:
            assert differences(facts_of(top), truth(shared_fixtures, "merged")) == []


def over_volume(root: Inode, size: int) -> tuple[WrittenBlob, bytes]:
    """A layer of which the blob is a volume that is laid out already."""
    volume = make_volume(size)
    volume += bytes(-len(volume) % 4096)
    chunks, uses = ChunkTable(), array("I")
    for _, inode in walk_tree(root):
        if inode.kind is InodeKind.FILE and inode.size and not inode.chunk_count:
            inode.first_chunk = len(uses)
            for at in range(0, inode.size, CHUNK):
                place, length = inode.volume_offset + at, min(CHUNK, inode.size - at)
                number = chunks.append(place, length, 0, length, hashlib.sha256(b"%d" % place).digest())
                chunks.volume_offset[number] = place
                uses.append(number)
            inode.chunk_count = len(uses) - inode.first_chunk
    digest = Digest("sha256:" + hashlib.sha256(volume).hexdigest())
    return WrittenBlob(digest, len(volume), root, uses, chunks, CHUNK, "none", uncompressed_size=len(volume)), volume


def check_all(root: Inode, size: int) -> None:
    layer, volume = over_volume(root, size)
    made = build_bootstrap([layer])
    # Alone in the image a layer's whiteouts and opaque marks mean nothing.
    merged = merge_layers([root]).root
    with presented(made.image, [volume]) as top:
        shown = describe_mount(os.fsencode(top))
        expected = as_kernel_shows(describe_tree(merged))
        assert shown.keys() == expected.keys()
        for path, entry in expected.items():
            assert shown[path] == entry, path
        assert as_kernel_shows(describe_image(ImageReader(made.image))) == shown
        for path, inode in walk_tree(merged):
            if inode.kind is InodeKind.FILE and len(path) < 4000:
                data = Path(os.fsdecode(os.fsencode(top) + path)).read_bytes()
                assert data == (volume[inode.volume_offset :][: inode.size] if inode.size else b""), path
        fsck(top.parent, 1)


def test_one_of_everything() -> None:
    check_all(*odd_tree())


@given(trees())
@settings(max_examples=20)
def test_any_tree(tree: tuple[Inode, int]) -> None:
    check_all(*tree)


def test_an_image_without_data() -> None:
    root = Inode(InodeKind.DIRECTORY, children={b"pipe": Inode(InodeKind.FIFO), b"empty": Inode(InodeKind.FILE)})
    layer = WrittenBlob(None, 0, root, array("I"), ChunkTable(), CHUNK, "zstd")
    for layers in ([], [layer]):
        image = build_bootstrap(layers).image
        with presented(image, []) as top:
            assert sorted(os.listdir(top)) == (["empty", "pipe"] if layers else [])
            fsck(top.parent, 0)


def test_chunks_with_numbers_beyond_16_bits() -> None:
    """The kernel takes no notice of the chunk's number in an index, nor of its high bits beside the device's number."""
    count = (1 << 16) + 5
    chunks, uses = ChunkTable(), array("I", [count - 1, 3])
    for number in range(count):
        chunks.append(number * 4096, 4096, 0, 4096, hashlib.sha256(b"%d" % number).digest())
        chunks.volume_offset[number] = number * 4096
    file = Inode(InodeKind.FILE, size=8192, chunk_count=2)
    root = Inode(InodeKind.DIRECTORY, children={b"file": file})
    layer = WrittenBlob(Digest("sha256:" + "0" * 64), 1, root, uses, chunks, 4096, "none", uncompressed_size=count * 4096)
    with presented(build_bootstrap([layer]).image, [b""]) as top:
        with (top.parent / "0").open("r+b") as blob:
            blob.truncate(count * 4096)
            os.pwrite(blob.fileno(), b"last", (count - 1) * 4096)
            os.pwrite(blob.fileno(), b"third", 3 * 4096)
        assert (top / "file").read_bytes() == b"last".ljust(4096, b"\0") + b"third".ljust(4096, b"\0")
