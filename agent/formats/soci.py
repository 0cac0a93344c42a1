"""SOCI: plain layers with a zTOC beside them, found through the image (formats.md 5.2).

Version 2: the image's manifest names the SOCI index by an annotation, so that who vouches for the image vouches for the index.
Version 1: the index refers to the image, and anybody who may push to the repository can add one; it is used only where the
operator has switched it on. Either index is a manifest whose layers are zTOCs, each with the digest of the layer that it is of.
"""

import json
from typing import Any, Final

import attrs

from agent.formats.model import Digest, FormatError, digest_of, parse_digest
from agent.formats.opening import BlobRange, IndexReader, LayerFacts, ManifestBytes, ReferrersOf
from agent.formats.ztoc import MAX_ZTOC_BYTES, Ztoc

INDEX_DIGEST: Final = "com.amazon.soci.index-digest"
LAYER_DIGEST: Final = "com.amazon.soci.image-layer-digest"
INDEX_V1: Final = "application/vnd.amazon.soci.index.v1+json"

_MAX_MANIFEST: Final = 4 << 20
_HEADER_GUESS: Final = 4096
"""A gzip header has ten bytes and perhaps a file's name."""


@attrs.frozen
class SociFormat:
    """SOCI as `agent.formats.catalogue` lists it; `is_v1` for what is found by referrers."""

    is_v1: bool = False
    name: str = "soci"
    is_only_form: bool = False

    def recognises(self, facts: LayerFacts) -> bool:
        """A tar layer, gzip or uncompressed, of an image that names a SOCI index; of any image for version 1."""
        if not facts.media_type.endswith((".tar", ".tar+gzip", ".tar.gzip")):
            return False
        return self.is_v1 or INDEX_DIGEST in facts.manifest_annotations

    def read_index(self, facts: LayerFacts) -> IndexReader:
        """Index manifest, then the layer's zTOC. A layer may have none: builders leave small ones out."""
        if self.is_v1:
            referrers = yield ReferrersOf(INDEX_V1)
            index_digest = _first_index(referrers)
        else:
            index_digest = parse_digest(facts.manifest_annotations[INDEX_DIGEST])
        manifest = yield ManifestBytes(index_digest)
        if not manifest:
            raise FormatError(f"the image names SOCI index {index_digest}, which its repository does not have")
        if digest_of(manifest) != index_digest:
            raise FormatError(f"SOCI index {index_digest} has other bytes")
        blob, size = _find_ztoc(manifest, facts.digest)
        data = yield BlobRange(0, size, blob=blob, blob_size=size)
        if digest_of(data) != blob:
            raise FormatError(f"the zTOC of layer {facts.digest} is not what the SOCI index says")
        ztoc = Ztoc(data, facts.digest, facts.size)
        header = b""
        if ztoc.needs_header:
            header = yield BlobRange(0, min(_HEADER_GUESS, facts.size))
        return ztoc.read(header)


def _load(raw: bytes, what: str) -> dict[str, Any]:
    if len(raw) > _MAX_MANIFEST:
        raise FormatError(f"{what} of {len(raw)} bytes")
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"{what} that is no JSON: {exc}") from exc
    if not isinstance(document, dict):
        raise FormatError(f"{what} that is no object")
    return document


def _descriptors(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    listed = document.get(key)
    return [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []


def _first_index(referrers: bytes) -> Digest:
    """The first SOCI index that refers to the image."""
    if referrers:
        for descriptor in _descriptors(_load(referrers, "a list of referrers"), "manifests"):
            if descriptor.get("artifactType") == INDEX_V1:
                return parse_digest(str(descriptor.get("digest")))
    raise FormatError("no SOCI index refers to the image")


def _find_ztoc(manifest: bytes, layer: Digest) -> tuple[Digest, int]:
    """Digest and size of the layer's zTOC."""
    for descriptor in _descriptors(_load(manifest, "a SOCI index"), "layers"):
        annotations = descriptor.get("annotations")
        if not isinstance(annotations, dict) or annotations.get(LAYER_DIGEST) != layer:
            continue
        size = descriptor.get("size")
        if type(size) is not int or not 0 < size <= MAX_ZTOC_BYTES:
            raise FormatError(f"a zTOC of {str(size)[:40]} bytes")
        return parse_digest(str(descriptor.get("digest"))), size
    raise FormatError(f"the SOCI index has no zTOC of layer {layer}")


FORMAT: Final = SociFormat()
FORMAT_V1: Final = SociFormat(is_v1=True)
"""Not to be asked unless the operator has switched it on."""
