"""How a Nydus image lies in a registry (formats.md 3.4): which layer is which, and where the blobs of a bootstrap are.

One bootstrap, in the last layer, is merged over all the image's layers; the others carry data only. Old images, and single layers
pushed by hand, have no bootstrap layer: each blob has a bootstrap of its own at its end.
"""

import io
from collections.abc import Sequence
from typing import Final

import attrs

from agent.formats.inflate import open_inflater, sniff
from agent.formats.model import Digest, FormatError, parse_digest
from agent.formats.nydus.bootstrap import FEATURE_SEPARATE_META, BlobEntry
from agent.formats.opening import LayerFacts
from agent.formats.tar import TarEntry, TarParser

BOOTSTRAP: Final = "containerd.io/snapshot/nydus-bootstrap"
BLOB: Final = "containerd.io/snapshot/nydus-blob"
REFERENCE: Final = "containerd.io/snapshot/nydus-ref"
ENCRYPTED: Final = "containerd.io/snapshot/nydus-encrypted-blob"
MEDIA_TYPE: Final = "application/vnd.oci.image.layer.nydus.blob.v1"
MAX_LAYER_BYTES: Final = 48 << 20
"""Most of a bootstrap layer, compressed: 100,000 files are about 7 MB."""
MAX_UNPACKED_BYTES: Final = 112 << 20
"""Most of its files, uncompressed."""

_IMAGE: Final = "image/image.boot"
_META: Final = ".blob.meta"
_SELF: Final = "x" * 64
"""The id of the blob that the bootstrap is in: its digest was not known when this was written."""
_STEP: Final = 1 << 20


def is_data_layer(facts: LayerFacts) -> bool:
    """Whether a layer is a data blob."""
    return facts.annotations.get(BLOB) == "true" or facts.media_type == MEDIA_TYPE


def is_bootstrap_layer(facts: LayerFacts) -> bool:
    """Whether a layer is a bootstrap."""
    return facts.annotations.get(BOOTSTRAP) == "true"


@attrs.frozen
class BootstrapFiles:
    """What a bootstrap layer holds: the bootstrap, and tables of blobs by the blob's id, where the writer put them beside it."""

    bootstrap: bytes
    metas: dict[str, bytes]


class _Collector:
    """Keeps the files of a bootstrap layer's tar that are wanted."""

    def __init__(self) -> None:
        self.files: dict[str, io.BytesIO] = {}
        self._file: io.BytesIO | None = None
        self._held = 0

    def entry(self, entry: TarEntry) -> None:
        name = entry.path.decode("ascii", "replace").removeprefix("./").removeprefix("/")
        self._file = None
        if entry.kind in (b"0", b"\0", b"7") and (name == _IMAGE or name.endswith(_META)):
            self._held += entry.size
            if self._held > MAX_UNPACKED_BYTES:
                raise FormatError(f"a bootstrap layer of more than {MAX_UNPACKED_BYTES} bytes")
            self._file = self.files[name] = io.BytesIO()

    def data(self, offset: int, view: memoryview) -> None:
        if self._file is not None:
            self._file.seek(offset)
            self._file.write(view)

    def end(self) -> None:
        self._file = None


def unpack_layer(blob: bytes) -> BootstrapFiles:
    """Read a bootstrap layer's archive.

    Raises:
        FormatError: it is no archive, too large, or has no bootstrap in it.
    """
    collector = _Collector()
    parser = TarParser(collector)
    inflater = open_inflater(sniff(blob[:4]))
    passed = 0
    view = memoryview(blob)
    for at in range(0, len(view), _STEP):
        for part in inflater.feed(view[at : at + _STEP]):
            passed += len(part)
            if passed > 2 * MAX_UNPACKED_BYTES:
                raise FormatError(f"a bootstrap layer of more than {2 * MAX_UNPACKED_BYTES} bytes")
            parser.feed(part)
    inflater.finish()
    parser.finish()
    files = collector.files
    found = files.pop(_IMAGE, None)
    if found is None:
        raise FormatError(f"no {_IMAGE} in the bootstrap layer")
    metas = {name.rpartition("/")[2].removesuffix(_META): data.getvalue() for name, data in files.items()}
    return BootstrapFiles(found.getvalue(), metas)  # not a copy: BytesIO gives away what it holds


@attrs.frozen
class BlobPlace:
    """Where a blob of the blob table is: the registry's blob with its data, and the one with its tables (often the same)."""

    digest: Digest
    size: int
    meta_digest: Digest
    meta_size: int


def locate(entry: BlobEntry, number: int, blobs: Sequence[BlobEntry], facts: LayerFacts) -> BlobPlace:
    """Find a blob among the layers of the manifest.

    A blob's id is its digest, as a rule. Where it is not (it may cover less than the whole blob), the data layers are taken in order,
    if there are as many of them as blobs in the table.

    Raises:
        FormatError: the manifest does not have it.
    """
    layers = [layer for layer in facts.siblings if is_data_layer(layer)]
    digest = Digest("sha256:" + entry.id)
    if entry.id == _SELF and not is_bootstrap_layer(facts):
        digest = Digest(facts.annotations.get(REFERENCE, facts.digest))
    if entry.is_zran:
        return _locate_original(entry, digest, layers)
    for layer in layers:
        if layer.digest == digest:
            return _place(layer, entry, layers)
    if facts.digest == digest:
        return _place(facts, entry, layers)
    if len(layers) == len(blobs) and not any(layer.digest == "sha256:" + blob.id for layer in layers for blob in blobs):
        return _place(layers[number], entry, layers)
    raise FormatError(f"blob {entry.id[:80]} of the bootstrap is not among the manifest's layers")


def _place(layer: LayerFacts, entry: BlobEntry, layers: Sequence[LayerFacts]) -> BlobPlace:
    if ENCRYPTED in layer.annotations:
        raise FormatError(f"blob {layer.digest} is encrypted, which Shoal does not read")
    if entry.features & FEATURE_SEPARATE_META and any(entry.meta_digest):
        meta = Digest("sha256:" + entry.meta_digest.hex())
        return BlobPlace(layer.digest, layer.size, meta, _size_of(meta, entry, layers))
    return BlobPlace(layer.digest, layer.size, layer.digest, layer.size)


def _locate_original(entry: BlobEntry, digest: Digest, layers: Sequence[LayerFacts]) -> BlobPlace:
    """An original gzip layer, which is in the repository though not in this manifest; its tables are in a layer that names it."""
    parse_digest(digest)
    if not entry.compressed_size:
        raise FormatError(f"layer {digest} has no bytes")
    for layer in layers:
        if layer.annotations.get(REFERENCE) == digest:
            return BlobPlace(digest, entry.compressed_size, layer.digest, layer.size)
    if not any(entry.meta_digest):
        raise FormatError(f"no layer of the manifest has the tables of layer {digest}")
    meta = Digest("sha256:" + entry.meta_digest.hex())
    return BlobPlace(digest, entry.compressed_size, meta, _size_of(meta, entry, layers))


def _size_of(meta: Digest, entry: BlobEntry, layers: Sequence[LayerFacts]) -> int:
    return next((layer.size for layer in layers if layer.digest == meta), entry.meta_size)
