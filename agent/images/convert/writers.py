"""The formats that can be written, behind one protocol.

A writer turns one uncompressed tar at a time into a blob, in any order and several at once, each in a worker thread; where an image
needs a blob besides (the bootstrap of nydus), it is made last, from what was learnt of each layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, Final, Protocol

import attrs

from agent.formats import nydus_writer, zstd_chunked
from agent.formats.estargz import FOOTER_SIZE
from agent.formats.estargz_writer import write_estargz
from agent.formats.model import Digest
from agent.formats.zstd_chunked_writer import write_zstd_chunked
from agent.images.convert.documents import DOCKER_LAYER, OCI_LAYER, is_docker

TOC_DIGEST: Final = "containerd.io/snapshot/stargz/toc.digest"


@attrs.frozen
class Written:
    """A blob that was made, or, where the digest is None, that was not needed. `missing` are the prioritised paths that its tar
    does not have; `own` is the writer's."""

    digest: Digest | None
    size: int
    diff_id: Digest | None
    annotations: Mapping[str, str]
    missing: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    own: Any = attrs.field(default=None, repr=False)


class ImageWriter(Protocol):
    """One format."""

    name: str
    tail_bytes: int
    """How much of a blob's end `is_written` wants to see."""
    needs_oci: bool
    """Docker's media types cannot say what the format is."""
    manifest_annotations: Mapping[str, str]

    def media_type(self, old: str) -> str:
        """What a layer of type `old` becomes."""

    def may_be_written(self, media_type: str, annotations: Mapping[str, str]) -> bool:
        """Does a descriptor claim that its layer is in this format, as this writer would have made it?"""

    def is_written(self, tail: bytes) -> bool:
        """Does the end of the blob bear the claim out?"""

    def write_layer(self, tar: BinaryIO, out: BinaryIO, prioritized: Sequence[str]) -> Written:
        """Write a layer. Blocking. Raises FormatError: it is no tar, or the format cannot express it."""

    def write_last(self, layers: Sequence[Written], out: BinaryIO, prioritized: Sequence[str]) -> Written | None:
        """Write what the image needs besides its layers (bottom first), if anything. Blocking."""


class EstargzWriter:
    """eStargz: gzip, in the media family of the source."""

    name = "estargz"
    tail_bytes = FOOTER_SIZE
    needs_oci = False
    manifest_annotations: Mapping[str, str] = {}

    def media_type(self, old: str) -> str:
        """See `ImageWriter`."""
        return DOCKER_LAYER + ".gzip" if is_docker(old) else OCI_LAYER + "+gzip"

    def may_be_written(self, media_type: str, annotations: Mapping[str, str]) -> bool:
        """See `ImageWriter`."""
        return TOC_DIGEST in annotations and media_type.endswith("gzip")

    def is_written(self, tail: bytes) -> bool:
        """See `ImageWriter`. Not where the TOC is in another image: that one would not come along."""
        return len(tail) == FOOTER_SIZE and tail[:16] == b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0" and b"STARGZ" in tail

    def write_layer(self, tar: BinaryIO, out: BinaryIO, prioritized: Sequence[str]) -> Written:
        """See `ImageWriter`."""
        made = write_estargz(tar, out, prioritized=prioritized)
        return Written(made.digest, made.size, made.diff_id, made.annotations, made.missing)

    def write_last(self, layers: Sequence[Written], out: BinaryIO, prioritized: Sequence[str]) -> Written | None:
        """See `ImageWriter`."""
        del layers, out, prioritized
        return None


class ZstdChunkedWriter:
    """zstd:chunked, in OCI's media types, as Docker's do not know zstd."""

    name = "zstd-chunked"
    tail_bytes = 8
    needs_oci = True
    manifest_annotations: Mapping[str, str] = {}

    def media_type(self, old: str) -> str:
        """See `ImageWriter`."""
        del old
        return OCI_LAYER + "+zstd"

    def may_be_written(self, media_type: str, annotations: Mapping[str, str]) -> bool:
        """See `ImageWriter`. Other writers of the format leave out the tar-split, without which Podman takes layers whole."""
        keys = (zstd_chunked.CHECKSUM, zstd_chunked.POSITION, zstd_chunked.TAR_SPLIT_POSITION)
        return media_type.endswith("zstd") and all(zstd_chunked.PREFIX + key in annotations for key in keys)

    def is_written(self, tail: bytes) -> bool:
        """See `ImageWriter`."""
        return tail == zstd_chunked.MAGIC

    def write_layer(self, tar: BinaryIO, out: BinaryIO, prioritized: Sequence[str]) -> Written:
        """See `ImageWriter`."""
        made = write_zstd_chunked(tar, out, prioritized=prioritized)
        return Written(made.digest, made.size, made.diff_id, made.annotations, made.missing)

    def write_last(self, layers: Sequence[Written], out: BinaryIO, prioritized: Sequence[str]) -> Written | None:
        """See `ImageWriter`."""
        del layers, out, prioritized
        return None


class NydusWriter:
    """Nydus (RAFS v6): a data blob for each layer that has data, and the bootstrap of the merged tree. Only whole images are in
    the format, so no single layer is ever kept."""

    name = "nydus"
    tail_bytes = 0
    needs_oci = True
    manifest_annotations: Mapping[str, str] = nydus_writer.MANIFEST_ANNOTATIONS

    def media_type(self, old: str) -> str:
        """See `ImageWriter`."""
        del old
        return nydus_writer.BLOB_MEDIA_TYPE

    def may_be_written(self, media_type: str, annotations: Mapping[str, str]) -> bool:
        """See `ImageWriter`."""
        del media_type, annotations
        return False

    def is_written(self, tail: bytes) -> bool:
        """See `ImageWriter`."""
        del tail
        return False

    def write_layer(self, tar: BinaryIO, out: BinaryIO, prioritized: Sequence[str]) -> Written:
        """See `ImageWriter`."""
        made = nydus_writer.write_blob(tar, out, prioritized=[_encode(path) for path in prioritized])
        missing = tuple(_decode(path) for path in made.missing)
        # The diff ID of a data blob is its own digest: it is no compressed tar.
        return Written(made.digest, made.size, made.digest, made.annotations, missing, made.warnings, made)

    def write_last(self, layers: Sequence[Written], out: BinaryIO, prioritized: Sequence[str]) -> Written | None:
        """See `ImageWriter`."""
        blobs = [layer.own for layer in layers]
        made = nydus_writer.write_bootstrap(blobs, out, [_encode(path) for path in prioritized])
        missing = tuple(_decode(path) for path in made.missing)
        return Written(made.digest, made.size, made.diff_id, made.annotations, missing, made.warnings)


def _encode(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def _decode(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


WRITERS: Final[Mapping[str, Callable[[], ImageWriter]]] = {
    "estargz": EstargzWriter,
    "zstd-chunked": ZstdChunkedWriter,
    "nydus": NydusWriter,
}
"""By the word behind `--to`. One is made for each conversion."""
