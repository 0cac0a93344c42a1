"""Fixture images as the format tests see them: blobs by tag, and the ground truth to compare a `LayerIndex` with."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from agent.formats import estargz
from agent.formats.members import PieceDecoder
from agent.formats.model import Inode, InodeKind, LayerIndex
from agent.formats.tree import walk

KINDS = {
    InodeKind.FILE: "file",
    InodeKind.DIRECTORY: "dir",
    InodeKind.CHAR: "char",
    InodeKind.BLOCK: "block",
    InodeKind.FIFO: "fifo",
    InodeKind.SYMLINK: "symlink",
}


@attrs.frozen
class Layer:
    blob: bytes
    media_type: str
    annotations: dict[str, str]
    diff_id: str

    @property
    def toc_digest(self) -> Any:
        return self.annotations["containerd.io/snapshot/stargz/toc.digest"]


@attrs.frozen
class FixtureImages:
    folder: Path

    def _blob(self, digest: str) -> bytes:
        return (self.folder / "images" / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()

    def layers(self, tag: str) -> list[Layer]:
        index = json.loads((self.folder / "images" / "index.json").read_bytes())
        (found,) = (m for m in index["manifests"] if m["annotations"]["org.opencontainers.image.ref.name"] == tag)
        manifest = json.loads(self._blob(found["digest"]))
        if "manifests" in manifest:
            manifest = json.loads(self._blob(manifest["manifests"][0]["digest"]))
        config = json.loads(self._blob(manifest["config"]["digest"]))
        diff_ids = config.get("rootfs", {}).get("diff_ids") or [""] * len(manifest["layers"])
        return [
            Layer(self._blob(layer["digest"]), layer["mediaType"], layer.get("annotations") or {}, diff_id)
            for layer, diff_id in zip(manifest["layers"], diff_ids, strict=True)
        ]

    @staticmethod
    def read_toc(blob: bytes, toc_digest: Any) -> LayerIndex:
        return read_toc(blob, toc_digest)

    @staticmethod
    def describe(index: LayerIndex, volume: bytes) -> dict[str, dict[str, Any]]:
        return describe(index.root, volume)

    @staticmethod
    def read_volume(index: LayerIndex, blob: bytes) -> bytes:
        return read_volume(index, blob)

    def truth(self, layer: int, *, is_json: bool) -> dict[str, dict[str, Any]]:
        """What a format can say of a layer's source tree."""
        return normalise(self._expected(layer), is_json=is_json)

    def _expected(self, layer: int) -> dict[str, dict[str, Any]]:
        return json.loads(gzip.decompress((self.folder / "expected.json.gz").read_bytes()))["layers"][str(layer)]


def read_toc(blob: bytes, toc_digest: Any) -> LayerIndex:
    footer = estargz.parse_footer(blob[-100:], len(blob))
    assert footer is not None
    toc = estargz.unpack_toc(blob[footer.toc_offset : len(blob) - footer.footer_size], toc_digest)
    return estargz.parse_toc(toc, blob_size=len(blob), toc_offset=footer.toc_offset, toc_digest=toc_digest)


def read_volume(index: LayerIndex, blob: bytes) -> bytes:
    """Decode every chunk through the pieces, each on its own, as nodes do."""
    volume = bytearray(index.volume_size)
    seen = 0
    for piece in range(len(index.pieces)):
        start, stop = index.pieces.extent(piece)
        chunks = index.pieces.chunks_of(piece)
        decoder = PieceDecoder(index.chunks, index.codec, chunks.start, chunks.stop, start)
        for number, data in decoder.feed(blob[start:stop]):
            place = index.chunks.volume_offset[number]
            volume[place : place + len(data)] = data
            seen += 1
        assert decoder.is_complete
    assert seen == len(index.chunks)
    return bytes(volume)


def describe(root: Inode, volume: bytes) -> dict[str, dict[str, Any]]:
    """A tree in the form of `expected.json.gz`; whiteouts and opaque marks as the archive writes them."""
    out: dict[str, dict[str, Any]] = {}
    names: dict[int, list[str]] = {}
    for path, inode in walk(root):
        key = path.decode("latin-1") or "/"
        if inode.is_opaque:
            out[key.rstrip("/") + "/.wh..wh..opq"] = {"type": "whiteout"}
        if inode.kind is InodeKind.CHAR and inode.rdev == (0, 0):
            folder, name = key.rsplit("/", 1)
            out[f"{folder}/.wh.{name}"] = {"type": "whiteout"}
            continue
        entry: dict[str, Any] = {
            "type": KINDS[inode.kind],
            "mode": inode.mode,
            "uid": inode.uid,
            "gid": inode.gid,
            "mtime_ns": inode.mtime_ns,
        }
        if inode.kind is InodeKind.FILE:
            data = volume[inode.volume_offset : inode.volume_offset + inode.size] if inode.size else b""
            entry |= {"size": inode.size, "sha256": hashlib.sha256(data).hexdigest()}
        elif inode.kind is InodeKind.SYMLINK:
            entry["target"] = inode.target.decode("latin-1")
        elif inode.kind in (InodeKind.CHAR, InodeKind.BLOCK):
            entry["rdev"] = list(inode.rdev)
        if inode.xattrs:
            entry["xattrs"] = {name.decode(): value.hex() for name, value in inode.xattrs.items()}
        names.setdefault(id(inode), []).append(key)
        out[key] = entry
    for keys in names.values():
        if len(keys) > 1:
            for key in keys:
                out[key]["hardlink_group"] = sorted(keys)
    return out


def normalise(expected: dict[str, dict[str, Any]], *, is_json: bool) -> dict[str, dict[str, Any]]:
    """Ground truth with the limits of TOC formats applied (README of the fixtures) and marks made comparable."""
    out: dict[str, dict[str, Any]] = {}
    groups: dict[str, list[str]] = {}
    for key, entry in expected.items():
        if is_json:
            key = key.encode("latin-1").decode("utf-8", "replace").encode().decode("latin-1")
            entry = {**entry, "mtime_ns": round(entry["mtime_ns"] / 1e9) * 10**9}
        if key.rsplit("/", 1)[1].startswith(".wh."):
            out[key] = {"type": "whiteout"}
            continue
        out[key] = dict(entry)
        if "hardlink_group" in entry:
            groups.setdefault(entry["hardlink_group"], []).append(key)
    for keys in groups.values():
        for key in keys:
            out[key]["hardlink_group"] = sorted(keys)
    return out


@pytest.fixture(scope="session")
def images(shared_fixtures: Path) -> FixtureImages:
    return FixtureImages(shared_fixtures)
