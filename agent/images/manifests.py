"""The manifest of an image: from this node's memory if its digest is known, else from the registry, else from the fleet."""

import json
from typing import Final

import attrs
import structlog
import trio

from agent.errors import SourceUnavailable
from agent.formats.model import FormatError
from agent.formats.opening import LayerFacts
from agent.images.records import FleetRecords
from agent.registry import Descriptor, ImageReference, Manifest, RegistryClient, ResolvedManifest, parse_manifest
from agent.resolve import Counters
from agent.swarm import Swarm
from agent.transfer import PeerClient

log = structlog.get_logger()

MAX_CONFIG_BYTES: Final = 8 << 20
"""The cap containerd puts on an image configuration."""


@attrs.frozen
class Manifests:
    """See the module's text."""

    registry: RegistryClient
    records: FleetRecords
    swarm: Swarm
    peers: PeerClient | None
    counters: Counters

    async def get(self, image: ImageReference) -> ResolvedManifest:
        """The manifest for this machine's platform, remembered for the fleet.

        Raises:
            SourceError: neither the registry nor the fleet has it.
            FormatError: it is no manifest, or has nothing for this platform.
        """
        if image.digest is not None and (raw := await self.records.get(image.digest)) is not None:
            known = parse_manifest(raw)
            if isinstance(known, Manifest):
                await trio.lowlevel.checkpoint()
                return ResolvedManifest(image.digest, known.media_type, raw, known.config, known.layers)
        try:
            resolved = await self.registry.resolve(image)
        except SourceUnavailable as exc:
            found = await self.records.find_image(image, self.swarm, self.peers)
            if found is None:
                raise
            log.warning("image_from_fleet", image=str(image), digest=found.digest, reason=str(exc))
            return found
        await self.records.keep_image(image, resolved)
        return resolved

    async def config(self, image: ImageReference, resolved: ResolvedManifest) -> tuple[bytes, list[str]]:
        """The image's configuration, from a peer or the registry, and the diff IDs that it names."""
        config = await self.records.get(resolved.config.digest)
        if config is None:
            config = await self.records.fetch(resolved.config.digest, self.swarm, self.peers)
            source = "peer"
            if config is None:
                config = await self.registry.fetch_small(image, resolved.config, max_bytes=MAX_CONFIG_BYTES)
                source = "registry"
            self.counters.count(source, len(config))
            await self.records.keep(resolved.config.digest, config)
        try:
            diff_ids = list(json.loads(config)["rootfs"]["diff_ids"])
        except (ValueError, KeyError, TypeError) as exc:
            raise FormatError(f"the configuration of {image} names no layers") from exc
        if len(diff_ids) != len(resolved.layers):
            raise FormatError(f"{image} has {len(resolved.layers)} layers, but its configuration names {len(diff_ids)}")
        return config, diff_ids


def facts_of(resolved: ResolvedManifest, layer: Descriptor) -> LayerFacts:
    """What the manifest says of one of its layers; what the caller's descriptor adds to it stays.

    Raises:
        FormatError: the manifest has no such layer.
    """
    siblings = tuple(_facts(sibling) for sibling in resolved.layers)
    for sibling in siblings:
        if sibling.digest == layer.digest:
            document = parse_manifest(resolved.raw, resolved.media_type)
            return attrs.evolve(
                sibling,
                annotations={**layer.annotations, **sibling.annotations},
                siblings=siblings,
                manifest_annotations=document.annotations if isinstance(document, Manifest) else {},
                manifest_digest=resolved.digest,
            )
    raise FormatError(f"manifest {resolved.digest} has no layer {layer.digest}")


def _facts(layer: Descriptor) -> LayerFacts:
    return LayerFacts(layer.digest, layer.size, layer.media_type, layer.annotations)
