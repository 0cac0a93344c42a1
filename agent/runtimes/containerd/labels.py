"""What the labels of a Prepare say about the layer, whoever sent them (contracts of CRI, transfer service, stargz clients)."""

from collections.abc import Mapping
from typing import Final

import attrs

from agent.formats.model import Digest, FormatError, parse_digest

SNAPSHOT_REF: Final = "containerd.io/snapshot.ref"
"""The chain ID that a layer will be known by; its presence asks whether the layer can be skipped."""

REMOTE: Final = "containerd.io/snapshot/remote"
REMOTE_VALUE: Final = "remote snapshot"
"""Marks snapshots that were never unpacked; BuildKit reads it."""

IMAGE_REF: Final = "containerd.io/snapshot/cri.image-ref"
MANIFEST_DIGEST: Final = "containerd.io/snapshot/cri.manifest-digest"
LAYER_DIGEST: Final = "containerd.io/snapshot/cri.layer-digest"
IMAGE_LAYERS: Final = "containerd.io/snapshot/cri.image-layers"
TOC_DIGEST: Final = "containerd.io/snapshot/stargz/toc.digest"

_STARGZ_REF: Final = "containerd.io/snapshot/remote/stargz.reference"
_STARGZ_DIGEST: Final = "containerd.io/snapshot/remote/stargz.digest"
_STARGZ_LAYERS: Final = "containerd.io/snapshot/remote/stargz.layers"

MAX_LABEL_BYTES: Final = 4096
"""containerd refuses a label whose key and value together are longer (pkg/labels/validate.go)."""


@attrs.frozen
class WantedLayer:
    """The layer that a Prepare is for: its blob, the image it was asked with (None if unknown), the layers above it in the
    same image, nearest first, and every label (they carry the layer's annotations)."""

    digest: Digest
    image_ref: str | None
    neighbours: tuple[Digest, ...]
    labels: Mapping[str, str]


def wanted_layer(labels: Mapping[str, str]) -> WantedLayer | None:
    """Read the labels of a Prepare; None where they do not ask for, or do not name, a layer that could be skipped."""
    if not labels.get(SNAPSHOT_REF):
        return None
    named = labels.get(LAYER_DIGEST) or labels.get(_STARGZ_DIGEST)
    try:
        digest = parse_digest(named or "")
    except FormatError:
        return None
    neighbours = []
    for text in (labels.get(IMAGE_LAYERS) or labels.get(_STARGZ_LAYERS) or "").split(","):
        try:
            neighbour = parse_digest(text)
        except FormatError:
            continue
        if neighbour != digest and neighbour not in neighbours:
            neighbours.append(neighbour)
    return WantedLayer(digest, labels.get(IMAGE_REF) or labels.get(_STARGZ_REF) or None, tuple(neighbours), labels)


def layer_labels(
    image_ref: str, manifest_digest: str, layers: list[str], at: int, annotations: Mapping[str, str]
) -> dict[str, str]:
    """The labels that containerd's own clients attach to layer `layers[at]` (AppendInfoHandlerWrapper), for our own pull."""
    labels = {
        key: value
        for key, value in annotations.items()
        # An image must not choose whom its files are mapped to (containerd's unpacker drops these two as well).
        if key.startswith("containerd.io/snapshot/") and not key.endswith(("/uidmapping", "/gidmapping"))
    }
    rest: list[str] = []
    room = MAX_LABEL_BYTES - len(IMAGE_LAYERS)
    for digest in layers[at:]:
        room -= len(digest) + 1
        if room < 0:
            break
        rest.append(digest)
    labels |= {IMAGE_REF: image_ref, MANIFEST_DIGEST: manifest_digest, LAYER_DIGEST: layers[at], IMAGE_LAYERS: ",".join(rest)}
    return {key: value for key, value in labels.items() if len(key) + len(value) <= MAX_LABEL_BYTES}
