"""Bytes between peers over mutual TLS: right ones, from the right peer, and nothing for strangers."""

import random
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from agent.errors import SettingsError, SourceRefused, SourceUnavailable
from agent.formats.model import Digest
from agent.swarm import FleetSecret, Holder, Identity, Possession, make_credentials, new_identity
from agent.transfer import DataServer, PeerBusy, PeerClient, open_data_server, open_peer_client

BLOB = Digest("sha256:" + "ab" * 32)
SECRET = FleetSecret(b"the secret of this fleet")
DATA = random.Random(1).randbytes(3 << 20)


class Reader:
    """One blob, of which the bytes before `stop` are held; `gate` holds reads back."""

    def __init__(self) -> None:
        self.stop = len(DATA)
        self.evict_at = len(DATA) + 1
        self.gate = trio.Event()
        self.gate.set()
        self.reading = trio.Event()

    def blob_size(self, blob: Digest) -> int | None:
        return len(DATA) if blob == BLOB else None

    def has_range(self, blob: Digest, start: int, stop: int) -> bool:
        return stop <= self.stop

    async def read_range(self, blob: Digest, start: int, stop: int) -> bytes | None:
        self.reading.set()
        await self.gate.wait()
        return None if stop > self.evict_at else DATA[start:stop]


class Bench:
    """A server, its reader and identity, and a client of the same fleet."""

    def __init__(self, server: DataServer, reader: Reader, identity: Identity, client: PeerClient) -> None:
        self.server, self.reader, self.identity, self.client = server, reader, identity, client

    def holder(self, **changes: Any) -> Holder:
        fields = {"peer_id": self.identity.peer_id, "data_address": self.server.address, **changes}
        return Holder(possession=Possession(BLOB, len(DATA), 3, b"\7"), **fields)

    async def get(
        self, *ranges: tuple[int, int], blob: Digest = BLOB, size: int = len(DATA), **changes: Any
    ) -> list[tuple[int, bytes]]:
        async with self.client.fetch_ranges(self.holder(**changes), blob, size, ranges) as items:
            return [item async for item in items]


@asynccontextmanager
async def open_bench(**options: Any) -> AsyncIterator[Bench]:
    identity, reader = new_identity(), Reader()
    server_side, client_side = make_credentials(SECRET, identity), make_credentials(SECRET, new_identity())
    with trio.fail_after(20):
        async with (
            open_data_server("127.0.0.1:0", server_side.server_context, reader, **options) as server,
            open_peer_client(client_side.client_context) as client,
        ):
            yield Bench(server, reader, identity, client)


def joined(items: list[tuple[int, bytes]]) -> bytes:
    at = items[0][0]
    for offset, data in items:
        assert offset == at
        assert 0 < len(data) <= 64 << 10
        at += len(data)
    return b"".join(data for _, data in items)


async def test_ranges_come_exactly() -> None:
    async with open_bench() as bench:
        for start, stop in ((0, 1), (0, len(DATA)), (len(DATA) - 1, len(DATA)), (65535, 65537), (1000, 1 << 20)):
            assert joined(await bench.get((start, stop))) == DATA[start:stop]
        items = await bench.get((100, 200), (5000, 5010), (200, 300))
        assert items == [(100, DATA[100:300]), (5000, DATA[5000:5010])]
        assert await bench.get() == []
        assert await bench.get((5, 5)) == []
        with trio.fail_after(5):
            while bench.server.active:  # noqa: ASYNC110 - the server finishes a moment after its last byte has arrived
                await trio.sleep(0.01)
        assert bench.server.served_bytes == bench.client.received_bytes


async def test_one_connection_serves_many_requests() -> None:
    async with open_bench() as bench:
        await bench.client.warm(bench.identity.peer_id, bench.server.address)
        for _ in range(5):
            await bench.get((0, 100))
        (idle,) = bench.client._idle.values()
        assert len(idle) == 1


async def test_a_connection_that_the_server_closed_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.transfer.server.KEEP_ALIVE_S", 0.1)
    async with open_bench() as bench:
        await bench.get((0, 100))
        await trio.sleep(0.3)
        assert joined(await bench.get((0, 100))) == DATA[:100]


async def test_what_is_not_held_is_refused() -> None:
    async with open_bench() as bench:
        bench.reader.stop = 1000
        assert joined(await bench.get((0, 1000))) == DATA[:1000]
        for ranges, blob, status in (
            ([(0, 1001)], BLOB, 416),
            ([(0, 10)], Digest("sha256:" + "00" * 32), 404),
        ):
            with pytest.raises(SourceRefused) as caught:
                await bench.get(*ranges, blob=blob)
            assert caught.value.status == status
            assert caught.value.source == bench.identity.peer_id


async def test_another_peer_at_the_address_is_refused_before_a_byte_is_used() -> None:
    async with open_bench() as bench:
        other = new_identity().peer_id
        with pytest.raises(SourceRefused, match=other):
            await bench.get((0, 10), peer_id=other)
        assert bench.client.received_bytes == 0


async def test_a_certificate_naming_a_foreign_peer_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member knows the CA key and signs itself a certificate with another's name: its own key gives it away."""
    victim, liar = new_identity(), new_identity()
    forged = Identity(liar.key, victim.peer_id)  # what the liar claims to be
    async with (
        open_data_server("127.0.0.1:0", make_credentials(SECRET, forged).server_context, Reader()) as server,
        open_peer_client(make_credentials(SECRET, new_identity()).client_context) as client,
    ):
        bench = Bench(server, Reader(), victim, client)
        for named in (victim.peer_id, liar.peer_id):
            with pytest.raises(SourceRefused, match="is peer None"):
                await bench.get((0, 10), peer_id=named)


async def test_another_fleet_gets_no_bytes_in_either_direction() -> None:
    stranger = make_credentials(FleetSecret(b"the secret of another fleet"), new_identity())
    async with open_bench() as bench:
        async with open_peer_client(stranger.client_context) as client:
            with pytest.raises(SourceUnavailable):
                async with client.fetch_ranges(bench.holder(), BLOB, len(DATA), [(0, 10)]):
                    pass
        # a client that trusts any server still has no certificate of the fleet
        careless = ssl.create_default_context()
        careless.check_hostname = False
        careless.verify_mode = ssl.CERT_NONE
        async with open_peer_client(careless) as client:
            with pytest.raises(SourceUnavailable):
                async with client.fetch_ranges(bench.holder(), BLOB, len(DATA), [(0, 10)]):
                    pass
        assert bench.server.served_bytes == 0
        async with open_data_server("127.0.0.1:0", stranger.server_context, Reader()) as foreign:
            with pytest.raises(SourceUnavailable):
                await bench.get((0, 10), data_address=foreign.address)


async def test_plain_http_and_garbage_are_dropped() -> None:
    async with open_bench() as bench:
        for data in (b"GET /v1/ping HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 100):
            stream = await trio.open_tcp_stream("127.0.0.1", bench.server.port)
            async with stream:
                await stream.send_all(data)
                received = b""
                try:
                    while part := await stream.receive_some():
                        received += part
                except trio.BrokenResourceError:
                    pass
                assert b"HTTP/1.1 2" not in received
        assert joined(await bench.get((0, 10))) == DATA[:10]


async def test_busy_names_others_and_a_time() -> None:
    async with open_bench(slots=1, hint=lambda _blob: ["peer-a", "peer-b"]) as bench, trio.open_nursery() as nursery:
        bench.reader.gate = trio.Event()
        nursery.start_soon(bench.get, (0, 10))
        await bench.reader.reading.wait()
        assert bench.server.load() == (1, 1)
        with pytest.raises(PeerBusy) as caught:
            await bench.get((0, 10))
        assert caught.value.peers == ("peer-a", "peer-b")
        assert caught.value.retry_after_s == 1
        bench.reader.gate.set()
    assert bench.server.active == 0
    assert bench.server.refused_busy == 1


async def test_one_host_does_not_get_every_slot() -> None:
    async with open_bench(slots=8, slots_a_host=1) as bench, trio.open_nursery() as nursery:
        bench.reader.gate = trio.Event()
        nursery.start_soon(bench.get, (0, 10))
        await bench.reader.reading.wait()
        with pytest.raises(PeerBusy):
            await bench.get((0, 10))
        bench.reader.gate.set()


async def test_eviction_in_mid_transfer_is_a_short_answer() -> None:
    async with open_bench() as bench:
        bench.reader.evict_at = 1 << 20
        received = 0
        with pytest.raises(SourceUnavailable):  # noqa: PT012 - the error comes in the middle
            async with bench.client.fetch_ranges(bench.holder(), BLOB, len(DATA), [(0, len(DATA))]) as items:
                async for offset, data in items:
                    assert data == DATA[offset : offset + len(data)]
                    received += len(data)
        assert received <= 1 << 20
        assert bench.server.active == 0


async def test_a_server_that_goes_away_is_unavailable() -> None:
    async with open_bench() as bench:
        for address in ("127.0.0.1:1", "no such host:1", "", "[::1", "127.0.0.1:99999"):
            with pytest.raises(SourceUnavailable):
                await bench.get((0, 10), data_address=address)
        await bench.client.warm("peer", "127.0.0.1:1")


async def test_another_size_is_refused() -> None:
    async with open_bench() as bench:
        with pytest.raises(SourceRefused, match="another range"):
            await bench.get((0, 10), size=10)


async def test_a_reader_that_stops_early_frees_its_slot() -> None:
    async with open_bench() as bench:
        async with bench.client.fetch_ranges(bench.holder(), BLOB, len(DATA), [(0, len(DATA))]) as items:
            async for _ in items:
                break
        with trio.fail_after(5):
            while bench.server.active:  # noqa: ASYNC110 - the server has no event for it
                await trio.sleep(0.01)
        assert joined(await bench.get((0, 10))) == DATA[:10]


async def test_cancelling_a_fetch_frees_its_slot() -> None:
    async with open_bench() as bench:
        bench.reader.gate = trio.Event()
        with trio.move_on_after(0.2):
            await bench.get((0, 10))
        bench.reader.gate.set()
        with trio.fail_after(5):
            while bench.server.active:  # noqa: ASYNC110 - the server has no event for it
                await trio.sleep(0.01)


async def test_methods_and_heads() -> None:
    async with open_bench() as bench:
        for request, status in (
            (b"POST /v1/ping HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 405),
            (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404),
            (f"GET /v1/blobs/{BLOB} HTTP/1.1\r\nHost: x\r\nRange: bytes=-5\r\n\r\n".encode(), 400),
            (b"GET /v1/ping HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20000 + b"\r\n\r\n", 431),
        ):
            connection = await bench.client._connect(bench.identity.peer_id, bench.server.address)
            answer = await connection.ask(request)
            assert answer.status == status or (status == 431 and answer.status >= 400)
            await connection.close()


async def test_an_address_in_use_is_refused() -> None:
    async with open_bench() as bench:
        with pytest.raises(SettingsError, match="cannot listen"):
            async with open_data_server(bench.server.address, make_credentials(SECRET, new_identity()).server_context, Reader()):
                pass
    for listen in ("nonsense", "1.2.3.4", "1.2.3.4:x", "1.2.3.4:70000"):
        with pytest.raises(SettingsError):
            async with open_data_server(listen, make_credentials(SECRET, new_identity()).server_context, Reader()):
                pass
