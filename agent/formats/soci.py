"""SOCI: plain layers with a zTOC beside them, found through the image (formats.md 5.2).

Version 2: the image's manifest names the SOCI index by an annotation, so that who vouches for the image vouches for the index.
Version 1: the index refers to the image, and anybody who may push to the repository can add one; it is used only where the
operator has switched it on. Either index is a manifest whose layers are zTOCs, each with the digest of the layer that it is of,
and lists of spans to fetch first, likewise. Such a list is a hint: one that cannot be read is reported and left out.
"""

import json
from typing import Any, Final

import attrs

from agent.formats.model import Digest, FormatError, NoIndex, digest_of, parse_digest
from agent.formats.opening import BlobRange, IndexReader, LayerFacts, ManifestBytes, ReferrersOf
from agent.formats.ztoc import MAX_ZTOC_BYTES, Ztoc

INDEX_DIGEST: Final = "com.amazon.soci.index-digest"
LAYER_DIGEST: Final = "com.amazon.soci.image-layer-digest"
INDEX_V1: Final = "application/vnd.amazon.soci.index.v1+json"
PREFETCH: Final = "application/vnd.amazon.soci.prefetch.v1+json"

_MAX_MANIFEST: Final = 4 << 20
_MAX_PREFETCH: Final = 1 << 20
_MAX_RANGES: Final = 1 << 12
"""Bytes, and ranges of spans, of a list of what to fetch first."""
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
        listed = _of_layer(manifest, facts.digest)
        blob, size = _find_ztoc(listed, facts.digest)
        data = yield BlobRange(0, size, blob=blob, blob_size=size)
        if digest_of(data) != blob:
            raise FormatError(f"the zTOC of layer {facts.digest} is not what the SOCI index says")
        ztoc = Ztoc(data, facts.digest, facts.size)
        header = b""
        if ztoc.needs_header:
            header = yield BlobRange(0, min(_HEADER_GUESS, facts.size))
        ranges: list[tuple[int, int]] = []
        warnings: list[str] = []
        for descriptor in listed:
            if descriptor.get("mediaType") == PREFETCH:
                try:
                    blob, size = _locate(descriptor, _MAX_PREFETCH)
                    hints = yield BlobRange(0, size, blob=blob, blob_size=size)
                    ranges += _read_ranges(hints, blob)
                except FormatError as exc:
                    warnings.append(f"a list of spans to fetch first was left out: {exc}")
        return ztoc.read(header, ranges[:_MAX_RANGES], warnings[:10])


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
    raise NoIndex("no SOCI index refers to the image")


def _of_layer(manifest: bytes, layer: Digest) -> list[dict[str, Any]]:
    """What the SOCI index has of a layer."""
    found = []
    for descriptor in _descriptors(_load(manifest, "a SOCI index"), "layers"):
        annotations = descriptor.get("annotations")
        if isinstance(annotations, dict) and annotations.get(LAYER_DIGEST) == layer:
            found.append(descriptor)
    return found


def _find_ztoc(listed: list[dict[str, Any]], layer: Digest) -> tuple[Digest, int]:
    """Digest and size of the layer's zTOC."""
    for descriptor in listed:
        if descriptor.get("mediaType") != PREFETCH:
            return _locate(descriptor, MAX_ZTOC_BYTES)
    raise NoIndex(f"the SOCI index has no zTOC of layer {layer}")


def _locate(descriptor: dict[str, Any], most: int) -> tuple[Digest, int]:
    size = descriptor.get("size")
    if type(size) is not int or not 0 < size <= most:
        raise FormatError(f"a blob of {str(size)[:40]} bytes in the SOCI index, at most {most} are read")
    return parse_digest(str(descriptor.get("digest"))), size


def _read_ranges(raw: bytes, digest: Digest) -> list[tuple[int, int]]:
    """Half-open ranges of spans."""
    if digest_of(raw) != digest:
        raise FormatError("it is not what the SOCI index says")
    found = []
    for item in _descriptors(_load(raw, "a list of spans"), "prefetch_spans"):
        first, last = item.get("start_span"), item.get("end_span")
        if type(first) is not int or type(last) is not int:
            raise FormatError("a span that is no number")
        found.append((first, last + 1))
    return found


FORMAT: Final = SociFormat()
FORMAT_V1: Final = SociFormat(is_v1=True)
"""Not to be asked unless the operator has switched it on."""
