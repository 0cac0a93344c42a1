"""Images of our nydus writer, read by our nydus reader: what went in comes out."""

import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from agent.formats.model import LayerIndex
from agent.formats.nydus_writer import BLOB_MEDIA_TYPE, BOOTSTRAP_MEDIA_TYPE, write_bootstrap
from tests.nydus_images import Repository, facts_of, read_volume
from tests.unit.formats.conftest import FixtureImages, describe, normalise
from tests.unit.formats.test_nydus_writer import MIB, Tar, noise, sparse
from tests.unit.formats.test_nydus_writer_tables import convert, source


@attrs.frozen
class Pushed:
    """A layer as the manifest has it."""

    blob: bytes
    media_type: str
    annotations: dict[str, str]


def read_back(tars: list[bytes], prefetch: tuple[bytes, ...] = (), **options: Any) -> tuple[LayerIndex, bytes]:
    layers, blobs = convert(tars, **options)
    out = io.BytesIO()
    last = write_bootstrap(layers, out, prefetch)
    pushed = [Pushed(blob, BLOB_MEDIA_TYPE, layers[0].annotations) for blob in dict.fromkeys(blobs)]
    pushed.append(Pushed(out.getvalue(), BOOTSTRAP_MEDIA_TYPE, last.annotations))
    digests = ["sha256:" + hashlib.sha256(layer.blob).hexdigest() for layer in pushed]
    repository = Repository({digest: layer.blob for digest, layer in zip(digests, pushed, strict=True)})
    index = repository.drive(facts_of(pushed, digests))
    # The bootstrap says it all: nothing else of the image is asked for.
    assert {want.blob for want in repository.wants} <= {"", last.digest}
    return index, read_volume(index, repository.splice(index))


@pytest.mark.parametrize(("tag", "key"), [("oci", "merged"), ("oci-nydus", "merged_nydus")])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 65536}, {"chunk_size": 4096, "compressor": "none"}])
def test_the_fixture_image(images: FixtureImages, shared_fixtures: Path, tag: str, key: str, options: dict[str, Any]) -> None:
    index, volume = read_back(source(images, tag), **options)
    expected = json.loads(gzip.decompress((shared_fixtures / "expected.json.gz").read_bytes()))[key]
    truth = normalise(expected, is_json=False)
    for entry in truth.values():
        if len(entry.get("hardlink_group", ())) == 1:
            del entry["hardlink_group"]
    found = describe(index.root, volume)
    assert found.keys() == truth.keys()
    for path, entry in truth.items():
        assert found[path] == entry, path
    assert index.warnings == ()
    assert index.codec == ("raw" if "compressor" in options else "zstd/raw")


def test_what_is_read_ahead_comes_first() -> None:
    tar = Tar().add("a", noise(1, 3 * MIB)).add("b", noise(2, 2 * MIB)).data()
    index, _ = read_back([tar], (b"/b",), prioritized=[b"/b"])
    assert index.prefetch_pieces[0] == 0


def test_chunks_of_an_earlier_layer() -> None:
    shared = noise(1, MIB)
    tars = [Tar().add("a", shared), Tar().add("b", shared + b"more").add(".wh.a"), Tar().folder("empty"), Tar().add("c", shared)]
    index, volume = read_back([tar.data() for tar in tars])
    found = describe(index.root, volume)
    assert found["/b"]["sha256"] == hashlib.sha256(shared + b"more").hexdigest()
    assert found["/c"]["sha256"] == hashlib.sha256(shared).hexdigest()
    assert found.keys() == {"/", "/b", "/c", "/empty"}


def test_an_image_without_data() -> None:
    index, volume = read_back([Tar().folder("etc").add("etc/empty").data()])
    assert volume == b""
    assert describe(index.root, volume).keys() == {"/", "/etc", "/etc/empty"}


def test_a_sparse_file() -> None:
    size = 20 * MIB + 5
    index, volume = read_back([sparse(size, [(0, b"head"), (9 * MIB, b"x"), (size - 1, b"!")])])
    expected = bytearray(size)
    expected[:4], expected[9 * MIB : 9 * MIB + 1], expected[-1:] = b"head", b"x", b"!"
    assert describe(index.root, volume)["/s"]["sha256"] == hashlib.sha256(expected).hexdigest()
