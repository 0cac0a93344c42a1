"""What refers to an image, asked once for all of its layers.

Layers are prepared at the same time, and each of them asks. One that does so while another is asking waits for that one's answer;
if the other goes away, it asks itself. An answer is good for a while, a failure too: then nothing refers to the image, its
layers are plain ones, and one warning says so.
"""

import math
from typing import Final, Protocol

import attrs
import structlog
import trio

from agent.errors import SourceError
from agent.formats.model import Digest, FormatError
from agent.registry import ImageReference

log = structlog.get_logger()

ANSWER_S: Final = 10.0
"""How long the registry has for it: somebody waits for the layer, which can be read without."""
KEPT_S: Final = 60.0
"""How long an answer is good: the layers of an image are asked for within seconds, and an index may be pushed at any time."""
MAX_KEPT: Final = 64
"""Answers, of at most 256 descriptors each; the one that was wanted longest ago goes first."""


class ReferrerSource(Protocol):
    """The registries, as this module needs them."""

    async def referrers(self, ref: ImageReference, subject: Digest, artifact_type: str) -> bytes:
        """An image index of the manifests of a type that refer to a manifest."""


@attrs.define(eq=False)
class _Known:
    """An answer; who holds `asking` may ask for a new one."""

    asking: trio.Lock = attrs.field(factory=trio.Lock)
    answer: bytes = b""
    good_until: float = -math.inf


class KnownReferrers:
    """See the module's text."""

    def __init__(self, source: ReferrerSource) -> None:
        self._source = source
        self._known: dict[tuple[str, Digest, str], _Known] = {}

    async def find(self, image: ImageReference, subject: Digest, artifact_type: str) -> bytes:
        """An image index of the manifests of a type that refer to `subject`; empty if it could not be had."""
        key = image.name, subject, artifact_type
        known = self._known[key] = self._known.pop(key, _Known())
        if len(self._known) > MAX_KEPT:
            del self._known[next(iter(self._known))]
        async with known.asking:
            if known.good_until <= trio.current_time():
                known.answer = await self._ask(image, subject, artifact_type)
                known.good_until = trio.current_time() + KEPT_S
            return known.answer

    async def _ask(self, image: ImageReference, subject: Digest, artifact_type: str) -> bytes:
        try:
            with trio.fail_after(ANSWER_S):
                return await self._source.referrers(image, subject, artifact_type)
        except trio.TooSlowError:
            reason = f"no answer in {ANSWER_S:.0f} s"
        except (SourceError, FormatError) as exc:
            reason = str(exc)
        log.warning("referrers_not_listed", image=str(image), manifest=subject, reason=reason)
        return b""
