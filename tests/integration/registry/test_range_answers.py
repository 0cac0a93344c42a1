"""Every answer that a registry may give to a range request, right or wrong, over real loopback connections."""

import gzip
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from agent.errors import SourceError, SourceLied, SourceRefused, SourceUnavailable
from agent.formats.model import digest_of
from agent.registry import Descriptor, ImageReference, RegistryClient, StallLimits, open_registry_client
from tests.registry_servers import Asked, Handler, Reply, ScriptedServer, open_scripted_server

BLOB = random.Random(3).randbytes(400_000)
DIGEST = digest_of(BLOB)
SIZE = len(BLOB)
QUICK = StallLimits(connect_s=0.3, head_s=0.2, read_s=0.3, window_s=0.4, window_bytes=1000)


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[tuple[ScriptedServer, RegistryClient, ImageReference]]:
    with trio.fail_after(20):
        async with open_scripted_server(handler) as server, open_registry_client(limits=QUICK) as client:
            yield server, client, ImageReference.parse(f"{server.host}/team/app:1")


async def read(client: RegistryClient, ref: ImageReference, ranges: list[tuple[int, int]], digest: str = DIGEST) -> None:
    """Fetch and check that just the asked bytes came, each once."""
    wanted = {at for start, stop in ranges for at in range(start, stop)}
    async with client.fetch_ranges(ref, DIGEST, SIZE, ranges) as stream:
        async for offset, part in stream:
            assert part == BLOB[offset : offset + len(part)]
            assert 0 < len(part) <= 65536
            came = set(range(offset, offset + len(part)))
            assert came <= wanted
            wanted -= came
    assert not wanted


async def take(client: RegistryClient, ref: ImageReference, ranges: list[tuple[int, int]]) -> None:
    """Fetch bytes that may be wrong, but must lie where asked."""
    async with client.fetch_ranges(ref, DIGEST, SIZE, ranges) as stream:
        async for offset, part in stream:
            assert any(start <= offset and offset + len(part) <= stop for start, stop in ranges)


def single(asked: Asked, blob: bytes = BLOB, **more: object) -> Reply:
    """A correct answer to one range, or to none."""
    span = asked.range()
    if span is None:
        return Reply(200, {}, blob, **more)  # type: ignore[arg-type]
    start, stop = span
    return Reply(206, {"Content-Range": f"bytes {start}-{stop - 1}/{SIZE}"}, blob[start:stop], **more)  # type: ignore[arg-type]


def ranges_of(asked: Asked) -> list[tuple[int, int]]:
    pairs = [part.split("-") for part in asked.headers["range"].removeprefix("bytes=").split(",")]
    return [(int(first), int(last) + 1) for first, last in pairs]


def multipart(asked: Asked, *, order: Callable[[list[tuple[int, int]]], list[tuple[int, int]]] = list) -> Reply:
    body = b""
    for start, stop in order(ranges_of(asked)):
        body += (
            b"\r\n--XX\r\nContent-Type: a/b\r\nContent-Range: bytes %d-%d/%d\r\n\r\n" % (start, stop - 1, SIZE) + BLOB[start:stop]
        )
    return Reply(206, {"Content-Type": "multipart/byteranges; boundary=XX"}, body + b"\r\n--XX--\r\n")


SPREAD = [(10, 20), (100_000, 170_000), (390_000, 400_000)]


async def test_single() -> None:
    async with serving(single) as (server, client, ref):
        await read(client, ref, [(1000, 200_000)])
        await read(client, ref, [(200_000, 200_001)])
        assert [asked.headers["range"] for asked in server.asked] == ["bytes=1000-199999", "bytes=200000-200000"]
        assert all(asked.headers["accept-encoding"] == "identity" for asked in server.asked)
        assert server.connections == 1


async def test_multipart() -> None:
    async with serving(multipart) as (server, client, ref):
        await read(client, ref, SPREAD)
        assert len(server.asked) == 1


async def test_multipart_in_another_order_and_incomplete() -> None:
    def handler(asked: Asked) -> Reply:
        if "," not in asked.headers["range"]:
            return single(asked)
        return multipart(asked, order=lambda ranges: ranges[:0:-1])

    async with serving(handler) as (server, client, ref):
        await read(client, ref, SPREAD)
        assert len(server.asked) == 2


async def test_multipart_cut() -> None:
    def handler(asked: Asked) -> Reply:
        if "," not in asked.headers["range"]:
            return single(asked)
        reply = multipart(asked)
        if len(server.asked) == 1:
            reply.cut = 50_000
        return reply

    async with serving(handler) as (server, client, ref):
        await read(client, ref, SPREAD)
        assert len(server.asked) == 2
        assert not server.asked[1].headers["range"].startswith("bytes=10-")


@pytest.mark.parametrize("chunked", [False, True])
async def test_whole_blob_is_not_fetched_twice(chunked: bool) -> None:
    async with serving(lambda asked: Reply(200, {}, BLOB, is_chunked=chunked)) as (server, client, ref):
        await read(client, ref, [(100_000, 150_000)])
        await read(client, ref, SPREAD)
        await read(client, ref, [(0, SIZE)])
        assert len(server.asked) == 3
        assert "range" not in server.asked[2].headers


async def test_whole_blob_is_cut_off_behind_the_last_range() -> None:
    blob = bytes(20_000_000)

    async with serving(lambda asked: Reply(200, {}, blob)) as (server, client, ref):
        async with client.fetch_ranges(ref, digest_of(blob), len(blob), [(10, 70_000)]) as stream:
            assert sum([len(part) async for _, part in stream]) == 69_990
        with trio.fail_after(5):
            while not server.aborted:
                await trio.lowlevel.checkpoint()
        assert server.sent < 15_000_000


async def test_whole_blob_for_many_ranges_but_one_range_works() -> None:
    """As S3 and Google do: it would cost the bytes in between."""
    blob = random.Random(5).randbytes(4_000_000)

    def handler(asked: Asked) -> Reply:
        if "," in asked.headers["range"]:
            return Reply(200, {}, blob)
        start, stop = ranges_of(asked)[0]
        return Reply(206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(blob)}"}, blob[start:stop])

    async with serving(handler) as (server, client, ref):
        for _ in range(2):
            spans = [(at, at + 10) for at in (0, 2_000_000, 3_999_990)]
            async with client.fetch_ranges(ref, digest_of(blob), len(blob), spans) as stream:
                got = {offset: part async for offset, part in stream}
            assert got == {at: blob[at : at + 10] for at in (0, 2_000_000, 3_999_990)}
        assert ["," in asked.headers["range"] for asked in server.asked] == [True] + [False] * 6


@pytest.mark.parametrize("status", [400, 416, 501])
async def test_many_ranges_refused(status: int) -> None:
    def handler(asked: Asked) -> Reply:
        return Reply(status, body=b"no") if "," in asked.headers["range"] else single(asked)

    async with serving(handler) as (server, client, ref):
        await read(client, ref, SPREAD)
        await read(client, ref, SPREAD)
        assert ["," in asked.headers["range"] for asked in server.asked] == [True] + [False] * 6
        assert server.connections == 1


@pytest.mark.parametrize("status", [400, 404, 405, 410, 416, 451, 501])
async def test_refused(status: int) -> None:
    body = b'{"errors": [{"code": "NOPE", "message": "go\\naway"}]}'
    async with serving(lambda asked: Reply(status, body=body)) as (server, client, ref):
        with pytest.raises(SourceRefused, match=rf"answered {status} \(NOPE: go away\)") as caught:
            await read(client, ref, [(0, 10)])
        assert (caught.value.status, caught.value.source) == (status, server.host)
        assert len(server.asked) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_busy_and_then_not(status: int) -> None:
    def handler(asked: Asked) -> Reply:
        return Reply(status, {"Retry-After": "0"}) if len(server.asked) < 3 else single(asked)

    async with serving(handler) as (server, client, ref):
        await read(client, ref, [(0, 10)])
        assert len(server.asked) == 3


async def test_busy_for_long_is_said_at_once() -> None:
    async with serving(lambda asked: Reply(429, {"Retry-After": "600"})) as (server, client, ref):
        with pytest.raises(SourceUnavailable, match="429") as caught:
            await read(client, ref, [(0, 10)])
        assert caught.value.retry_after_s == 600
        assert len(server.asked) == 1


async def test_busy_for_ever() -> None:
    async with serving(lambda asked: Reply(503)) as (server, client, ref):
        with pytest.raises(SourceUnavailable, match="503"):
            await read(client, ref, [(0, 10)])
        assert len(server.asked) == 4


async def test_retry_after_is_honoured(autojump_clock: trio.testing.MockClock) -> None:
    times: list[float] = []

    def handler(asked: Asked) -> Reply:
        times.append(trio.current_time())
        return Reply(429, {"Retry-After": "7"}) if len(times) == 1 else single(asked)

    autojump_clock.autojump_threshold = 0.2
    async with open_scripted_server(handler) as server, open_registry_client() as client:
        await read(client, ImageReference.parse(f"{server.host}/a:1"), [(0, 10)])
    assert times[1] - times[0] >= 7


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("whole", [False, True])
async def test_broken_off_is_taken_up_at_the_byte_reached(hangs: bool, whole: bool) -> None:
    def handler(asked: Asked) -> Reply:
        reply = single(asked)
        if len(server.asked) < 4:
            reply.cut, reply.hangs = 70_001, hangs
        return reply

    span = (0, SIZE) if whole else (10, SIZE)
    async with serving(handler) as (server, client, ref):
        await read(client, ref, [span])
        starts = [(asked.range() or (0, 0))[0] for asked in server.asked]
        assert starts == [span[0], span[0] + 70_001, span[0] + 140_002, span[0] + 210_003]


async def test_broken_off_for_ever() -> None:
    async with serving(lambda asked: single(asked, cut=0)) as (server, client, ref):
        with pytest.raises(SourceUnavailable):
            await read(client, ref, [(0, 100)])
        assert len(server.asked) == 3


async def test_a_few_bytes_each_time_end_soon() -> None:
    async with serving(lambda asked: single(asked, cut=1)) as (server, client, ref):
        with pytest.raises(SourceUnavailable):
            await read(client, ref, [(0, 1000)])
        assert len(server.asked) == 3


async def test_many_breaks_end_too() -> None:
    blob = bytes(5_000_000)

    def handler(asked: Asked) -> Reply:
        start, stop = ranges_of(asked)[0]
        return Reply(206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(blob)}"}, blob[start:stop], cut=70_000)

    async with serving(handler) as (server, client, ref):
        with pytest.raises(SourceUnavailable):
            async with client.fetch_ranges(ref, digest_of(blob), len(blob), [(1, len(blob))]) as stream:
                assert sum([len(part) async for _, part in stream]) < 0
        assert len(server.asked) == 16


def wrong(status: int = 206, content_range: str | None = None, body: bytes = b"x" * 100, **more: object) -> Reply:
    headers = {"Content-Range": content_range} if content_range else {}
    return Reply(status, headers, body, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "reply",
    [
        wrong(),
        wrong(content_range="bytes 0-99/999"),
        wrong(content_range="bytes 0-99/*", body=b"x" * 99),
        wrong(content_range="bytes 99-0/400000"),
        wrong(content_range="bytes 399950-400049/400000"),
        wrong(content_range="bytes */400000"),
        wrong(content_range="items 0-99/400000"),
        wrong(content_range="bytes 5000-5099/400000"),
        wrong(content_range="bytes 0-99/400000", body=b"x" * 200, is_chunked=True),
        wrong(200, body=b"x" * 100),
        wrong(200, body=b"x" * 400_001),
        wrong(200, body=b"x" * 400_001, is_chunked=True),
        Reply(206, {"Content-Type": "multipart/byteranges"}, b"x"),
        Reply(206, {"Content-Type": "multipart/byteranges; boundary=a"}, b"--a\r\nContent-Range: bytes 0-9/10\r\n\r\n"),
        Reply(206, {"Content-Type": "multipart/byteranges; boundary=a"}, b"--a--"),
    ],
)
async def test_contradictions(reply: Reply) -> None:
    async with serving(lambda asked: reply) as (server, client, ref):
        with pytest.raises(SourceLied, match="gave a wrong answer") as caught:
            await take(client, ref, [(0, 100), (399_000, SIZE)])
        assert caught.value.source == server.host


async def test_more_than_asked_is_clipped() -> None:
    def handler(asked: Asked) -> Reply:
        start, stop = ranges_of(asked)[0]
        start, stop = start // 4096 * 4096, min(SIZE, -(-stop // 4096) * 4096)
        return Reply(206, {"Content-Range": f"bytes {start}-{stop - 1}/*"}, BLOB[start:stop])

    async with serving(handler) as (_, client, ref):
        await read(client, ref, [(5000, 9000)])


@pytest.mark.parametrize(
    "reply",
    [
        Reply(drip_s=0.05, raw=b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1000),
        Reply(hangs=True, raw=b""),
        Reply(hangs=True, raw=b"HTTP/1.1 200 OK\r\nContent-"),
        Reply(raw=b"HTTP/1.1 200 OK\r\nX: " + b"y" * 300_000 + b"\r\n\r\n"),
        Reply(raw=b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 30_000 + b"\r\n"),
        Reply(raw=b"SSH-2.0-OpenSSH_9.2\r\n"),
        Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"),
        Reply(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffffffff\r\n"),
        Reply(raw=b""),
    ],
)
async def test_no_http_ends_soon(reply: Reply) -> None:
    async with serving(lambda asked: reply) as (_, client, ref):
        with pytest.raises(SourceError):
            await client.resolve(ref)


async def test_a_body_that_trickles_is_given_up() -> None:
    async with serving(lambda asked: single(asked, drip_s=0.02)) as (server, client, ref):
        with pytest.raises(SourceUnavailable, match="sent only"):
            await read(client, ref, [(1, SIZE)])
        assert len(server.asked) == 3


@pytest.mark.parametrize("labelled", [False, True])
async def test_gzip_that_nobody_asked_for(labelled: bool) -> None:
    """Decoded if the length says that it is an encoding, taken as it is if the label only repeats what the blob is."""
    packed = gzip.compress(BLOB)
    reply = Reply(200, {"Content-Encoding": "gzip"}, BLOB if labelled else packed, is_chunked=not labelled)
    async with serving(lambda asked: reply) as (_, client, ref):
        await read(client, ref, [(0, SIZE)])
        await read(client, ref, SPREAD)
        assert await client.fetch_small(ref, Descriptor("a/b", DIGEST, SIZE), SIZE) == BLOB


@pytest.mark.parametrize("body", [gzip.compress(BLOB)[:1000], b"no gzip", gzip.compress(bytes(50_000_000))])
async def test_bad_gzip(body: bytes) -> None:
    async with serving(lambda asked: Reply(200, {"Content-Encoding": "gzip"}, body)) as (_, client, ref):
        with pytest.raises(SourceError):
            await client.fetch_small(ref, Descriptor("a/b", DIGEST, SIZE), SIZE)
        with pytest.raises(SourceError):
            await client.resolve(ref)


async def test_wrong_bytes_of_a_small_blob() -> None:
    async with serving(lambda asked: Reply(200, {}, BLOB[::-1])) as (_, client, ref):
        with pytest.raises(SourceLied, match="sent bytes with digest"):
            await client.fetch_small(ref, Descriptor("a/b", DIGEST, SIZE), SIZE)


async def test_nobody_listens() -> None:
    async with serving(single) as (_, client, ref):
        pass
    async with open_registry_client(limits=QUICK) as client:
        with pytest.raises(SourceUnavailable, match="cannot be reached"):
            await read(client, ref, [(0, 10)])


async def test_cancelled_reader_leaves_a_working_client() -> None:
    def handler(asked: Asked) -> Reply:
        return single(asked, cut=70_000, hangs=True) if len(server.asked) <= 5 else single(asked)

    async with serving(handler) as (server, client, ref):
        for _ in range(5):
            with trio.move_on_after(0.05) as scope:
                await read(client, ref, [(0, SIZE)])
            assert scope.cancelled_caught
        await read(client, ref, [(0, SIZE)])


async def test_reader_that_stops_early() -> None:
    async with serving(single) as (_server, client, ref):
        for _ in range(3):
            async with client.fetch_ranges(ref, DIGEST, SIZE, [(0, SIZE)]) as stream:
                async for _ in stream:
                    break
        await read(client, ref, [(0, SIZE)])
