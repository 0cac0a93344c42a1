"""Ranges of a blob from a registry, whatever way its servers answer a range request.

How a host wants to be asked is learnt from its answers and remembered: several ranges in one request, or one at a time (a
host that answers 400, 416 or 501 to several, or sends the whole blob for them, as S3 and Google do). A host that sends the
whole blob even for one range is used as it is: the asked ranges are picked from the stream, which is cut off behind the last.
An answer that breaks off is taken up again at the byte reached.
"""

import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final

import attrs
import structlog
import trio

from agent.errors import SourceLied, SourceUnavailable
from agent.formats.model import Digest
from agent.registry.auth import Scope
from agent.registry.connections import Answer, unpacked
from agent.registry.exchange import Exchanger, Request
from agent.registry.hosts import RegistryHost
from agent.registry.multipart import MultipartParser, boundary_of
from agent.registry.ranges import RangeMismatch, WantedRanges, bridge, parse_content_range, range_header
from agent.registry.retries import backoff_s

log = structlog.get_logger()

_MAX_RANGES: Final = 32
"""Ranges in one request. Some servers refuse headers above 1 KiB or more than 100 ranges; 32 take at most 700 bytes."""
_BRIDGED_GAP: Final = 64 << 10
"""One range at a time: gaps up to this are read and dropped. At 400 Mbit/s they cost 1.3 ms, a request 20 ms."""
_TOLERATED_WASTE: Final = 1 << 20
"""Unwanted bytes before the last wanted one up to which a whole blob, sent instead of several ranges, is simply read."""
_MAX_BREAKS: Final = 16
"""Broken answers in one fetch, even if each brought some bytes."""
_MAX_FRUITLESS: Final = 3
_FRUITFUL_BYTES: Final = 64 << 10
"""An answer that broke off after less brought nothing that makes up for its round trip."""


@attrs.define
class BlobReader:
    """Reads blobs from hosts and remembers how each wants to be asked."""

    _exchanger: Exchanger
    _one_range: set[str] = attrs.field(factory=set)
    """Hosts that get one range in a request."""
    _no_ranges: set[str] = attrs.field(factory=set)
    """Hosts that were seen to ignore even one; kept to say so once."""

    async def read(
        self, host: RegistryHost, repository: str, digest: Digest, blob_size: int, wanted: WantedRanges, attempts: int
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """Stream what is wanted as (blob offset, at most 64 KiB), in the host's order; `wanted` shrinks with it.

        Raises:
            SourceError: as soon as this host cannot go on.
        """
        breaks = fruitless = 0
        while wanted:
            asked = self._next_ranges(host, wanted, blob_size)
            answer = await self._exchanger.send(host, self._request(repository, digest, asked), attempts=attempts)
            came = 0
            try:
                if self._must_ask_again(host, answer, asked, wanted):
                    if answer.status != 200:
                        await answer.drain()
                    continue
                async with aclosing(_pick(answer, wanted, blob_size)) as picked:
                    async for item in picked:
                        came += len(item[1])
                        yield item
                if not came:
                    raise RangeMismatch("it sent other bytes than were asked")
            except RangeMismatch as exc:
                raise SourceLied(f"{answer.host} gave a wrong answer for {digest}: {exc}", source=host.name) from exc
            except SourceUnavailable as exc:
                breaks += 1
                fruitless = 0 if came >= _FRUITFUL_BYTES else fruitless + 1
                if breaks >= _MAX_BREAKS or fruitless >= min(attempts, _MAX_FRUITLESS):
                    raise
                log.debug("blob_answer_broke", host=answer.host, digest=digest, breaks=breaks, reason=str(exc))
            finally:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await answer.aclose()
            if fruitless:
                await trio.sleep(backoff_s(fruitless, random.random()))

    def _next_ranges(self, host: RegistryHost, wanted: WantedRanges, blob_size: int) -> list[tuple[int, int]]:
        """The ranges to ask for now; none means the whole blob."""
        missing = wanted.missing()
        if missing == [(0, blob_size)]:
            return []
        if host.base_url in self._one_range:
            return bridge(missing, _BRIDGED_GAP)[:1]
        return missing[:_MAX_RANGES]

    def _request(self, repository: str, digest: Digest, asked: Sequence[tuple[int, int]]) -> Request:
        return Request(
            Scope(repository),
            f"{repository}/blobs/{digest}",
            headers={"Range": range_header(asked)} if asked else {},
            accepted=(200, 206, 400, 416, 501) if len(asked) > 1 else (200, 206),
            keep_url_as=digest,
        )

    def _must_ask_again(self, host: RegistryHost, answer: Answer, asked: Sequence[tuple[int, int]], wanted: WantedRanges) -> bool:
        """Is one range at a time better than this answer? Remembers it."""
        if answer.status == 206 or not asked:
            return False
        if len(asked) > 1:
            self._one_range.add(host.base_url)
            missing = wanted.missing()
            waste = wanted.stop - sum(stop - start for start, stop in missing)
            ask_again = answer.status != 200 or waste > _TOLERATED_WASTE
            log.info("registry_takes_one_range", host=answer.host, status=answer.status)
            return ask_again
        if host.base_url not in self._no_ranges:
            self._no_ranges.add(host.base_url)
            log.warning("registry_ignores_ranges", host=answer.host, consequence="lazy reads fetch the blob up to what they need")
        return False


async def _pick(answer: Answer, wanted: WantedRanges, blob_size: int) -> AsyncGenerator[tuple[int, bytes], None]:
    """The wanted bytes of one answer.

    Raises:
        RangeMismatch: the answer contradicts the request or itself.
        SourceUnavailable: it broke off.
    """
    if answer.status == 206 and answer.headers.get("content-type", "").strip().lower().startswith("multipart/"):
        parser = MultipartParser(boundary_of(answer.headers["content-type"]), blob_size)
        async with aclosing(answer.body()) as body:
            async for data in body:
                for at, part in parser.feed(data):
                    for item in wanted.take(at, part):
                        yield item
        if not parser.done and wanted:
            raise SourceUnavailable(f"{answer.host} ended a multipart answer early", source=answer.host)
        return
    length = answer.content_length
    if answer.status == 206:
        part_range = parse_content_range(answer.headers.get("content-range"), blob_size)
        offset, stop = part_range.start, part_range.stop
        if length is not None and length != stop - offset:
            raise RangeMismatch(f"its Content-Length {length} is not that of its Content-Range, {stop - offset}")
        source = answer.body()
    else:
        offset, stop = 0, blob_size
        if length == blob_size:
            source = answer.body()  # also if labelled gzip-encoded, as layers that are gzip files sometimes are
        elif length is not None and "content-encoding" not in answer.headers:
            raise RangeMismatch(f"it sends {length} bytes as the whole blob, which has {blob_size}")
        else:
            source = unpacked(answer, blob_size)
    async with aclosing(source) as body:
        async for data in body:
            if offset + len(data) > stop:
                raise RangeMismatch("it sent more bytes than it said")
            for item in wanted.take(offset, data):
                yield item
            offset += len(data)
            if not wanted and offset < stop:
                return  # the rest is not wanted; closing is cheaper than reading it
    if offset < stop:
        raise SourceUnavailable(f"{answer.host} ended its answer after {offset} of {stop} bytes", source=answer.host)
