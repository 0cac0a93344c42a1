"""Making nydus images (RAFS v6): a data blob for each layer, one bootstrap for all of them.

`write_blob` may run for the layers side by side; `write_bootstrap` then takes what they gave, the lowest layer first. In the
manifest the layers that have a blob come first, in the same order, and the bootstrap's layer last.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from typing import BinaryIO, Final

import attrs

from agent.formats.model import Digest
from agent.formats.nydus_writer.blob import BLOB_MEDIA_TYPE, WrittenBlob, write_blob
from agent.formats.nydus_writer.bootstrap import Bootstrap, build_bootstrap
from agent.formats.tar import BLOCK, TarEntry
from agent.formats.tar_headers import encode_header

__all__ = [
    "BLOB_MEDIA_TYPE",
    "BOOTSTRAP_MEDIA_TYPE",
    "MANIFEST_ANNOTATIONS",
    "Bootstrap",
    "WrittenBlob",
    "WrittenBootstrap",
    "build_bootstrap",
    "write_blob",
    "write_bootstrap",
]

BOOTSTRAP_MEDIA_TYPE: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
MANIFEST_ANNOTATIONS: Final = {"containerd.io/snapshot/nydus-fs-version": "6"}

_STEP: Final = 1 << 20


@attrs.frozen
class WrittenBootstrap:
    """The bootstrap's layer. `blob_ids` are the blobs it speaks of, in order, each once."""

    digest: Digest
    size: int
    diff_id: Digest
    uncompressed_size: int
    blob_ids: tuple[str, ...]
    missing: tuple[bytes, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def annotations(self) -> dict[str, str]:
        """What the descriptor must carry, beside `BOOTSTRAP_MEDIA_TYPE`."""
        return {
            "containerd.io/snapshot/nydus-bootstrap": "true",
            "containerd.io/snapshot/nydus-fs-version": "6",
            "containerd.io/snapshot/nydus-reference-blob-ids": json.dumps(self.blob_ids, separators=(",", ":")),
        }


def write_bootstrap(layers: Sequence[WrittenBlob], out: BinaryIO, prefetch: Sequence[bytes] = ()) -> WrittenBootstrap:
    """Write the layer with the bootstrap of the merged image to `out`; `prefetch` are paths that a runtime reads ahead.

    The same layers, paths and zlib give the same bytes. Blocking; for a worker thread.

    Raises:
        FormatError: the layers do not belong together, or there is more than the format can hold.
    """
    made = build_bootstrap(layers, prefetch)
    head = encode_header(TarEntry(b"image", b"5", mode=0o755))
    head += encode_header(TarEntry(b"image/image.boot", b"0", mode=0o444, size=len(made.image)))
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    plain_hash, stored_hash, plain_size, stored_size = hashlib.sha256(), hashlib.sha256(), 0, 0
    view = memoryview(made.image)
    parts = [memoryview(head), *(view[at : at + _STEP] for at in range(0, len(view), _STEP))]
    parts.append(memoryview(bytes(-len(view) % BLOCK + 2 * BLOCK)))
    for number, part in enumerate(parts, 1):
        plain_hash.update(part)
        plain_size += len(part)
        stored = packer.compress(part)
        if number == len(parts):
            stored += packer.flush()
        stored_hash.update(stored)
        stored_size += len(stored)
        out.write(stored)
    return WrittenBootstrap(
        Digest("sha256:" + stored_hash.hexdigest()),
        stored_size,
        Digest("sha256:" + plain_hash.hexdigest()),
        plain_size,
        tuple(dict.fromkeys(layer.blob_id for layer in layers if layer.digest is not None)),
        made.missing,
        made.warnings,
    )
