"""How the index of a layer is read, whatever its format: the conversation between a format and whoever can do I/O.

A format is a module with a `Format` in it. `read_index` is a generator: it yields what it wants to know (`Want`), is sent the
bytes, and returns the `LayerIndex`. So formats stay pure, and fetching from peers, retries and threads are written once, in
`agent.images`. `catalogue.find_format` says which format a layer has.
"""

from collections.abc import Generator, Mapping
from typing import Protocol

import attrs

from agent.formats.model import Digest, LayerIndex


@attrs.frozen
class LayerFacts:
    """What is known of a layer before anything of it is read.

    `siblings` are all layers of the image's manifest, lowest first, this one included, each without siblings of its own; empty
    if the manifest is not known. `manifest_annotations` are those of the manifest itself. `manifest_digest` and `diff_id` are empty
    if not known.
    """

    digest: Digest
    size: int
    media_type: str = ""
    annotations: Mapping[str, str] = attrs.field(factory=dict)
    siblings: tuple["LayerFacts", ...] = ()
    manifest_annotations: Mapping[str, str] = attrs.field(factory=dict)
    diff_id: str = ""
    manifest_digest: Digest = Digest("")


@attrs.frozen
class BlobRange:
    """Bytes [start, stop) of a blob of the image's repository; `blob` empty means the layer's own.

    `is_guess`: the format does not know yet how much it needs. The answer may then be shorter and only the end of the range, if
    that is what somebody near has at hand.
    """

    start: int
    stop: int
    blob: Digest = Digest("")
    blob_size: int = 0
    is_guess: bool = False


@attrs.frozen
class ManifestBytes:
    """A manifest of the same repository, by its digest; the answer is verified, and empty if there is none."""

    digest: Digest


@attrs.frozen
class AttachedBlob:
    """The first layer of which `annotation` is `value` in another image: the one whose tag is this image's with `tag_suffix`.

    The answer is the whole blob, verified by its own digest; empty if there is no such image or layer.
    """

    tag_suffix: str
    annotation: str
    value: str


@attrs.frozen
class ReferrersOf:
    """The manifests of `artifact_type` that refer to `subject` (empty: this image's own manifest), as the registry lists them.

    The answer is an image index in JSON, vouched for by nobody; empty, or an index of nothing, if nothing refers to it.
    """

    artifact_type: str
    subject: Digest = Digest("")


Want = BlobRange | ManifestBytes | AttachedBlob | ReferrersOf
IndexReader = Generator[Want, bytes, LayerIndex]
"""Raises FormatError when the bytes are not what the format promises, NoIndex when the image has none for the layer."""


class Format(Protocol):
    """The one entry point of a format's module."""

    name: str
    is_only_form: bool
    """Whether the layer is nothing but its index and data; false for one that can be read as a plain tar layer as well."""

    def recognises(self, facts: LayerFacts) -> bool:
        """Whether the layer claims to be of this format, and is vouched for by the manifest as the format demands."""

    def read_index(self, facts: LayerFacts) -> IndexReader:
        """Read the layer's index. May compute for long between two wants: run it in a worker thread."""
