"""The libp2p host against what comes over the wire at each of its layers: it survives, and still serves members."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from agent.errors import SettingsError
from agent.swarm import new_identity
from agent.swarm.errors import DialError, SelfDialError
from agent.swarm.host import Host, expand_wildcard, open_host
from agent.swarm.session import ByteStream

KEY = "11" * 32
LISTEN = "/ip4/127.0.0.1/tcp/0"


async def _echo(stream: ByteStream) -> None:
    while data := await stream.read():
        await stream.write(data)


@asynccontextmanager
async def open_echo() -> AsyncIterator[Host]:
    async with open_host(new_identity(), KEY, LISTEN) as host:
        host.serve("/echo", _echo)
        yield host


async def check_serves(host: Host) -> None:
    """A member can connect and be answered."""
    with trio.fail_after(5):
        async with open_host(new_identity(), KEY, LISTEN) as member:
            stream = await member.open_stream(await member.dial(host.addresses[0], host.peer_id), "/echo")
            await stream.write(b"hello")
            assert await stream.read() == b"hello"
            await stream.close()


def _port(host: Host) -> int:
    return int(host.addresses[0].rpartition("/")[2])


async def test_bytes_of_strangers_harm_nobody() -> None:
    rand = random.Random(7)
    async with open_echo() as host:
        for size in (0, 1, 7, 8, 9, 100, 5000):
            async with await trio.open_tcp_stream("127.0.0.1", _port(host)) as stream:
                await stream.send_all(rand.randbytes(size))
        await check_serves(host)


@pytest.mark.parametrize("layer", ["network", "noise", "yamux"])
async def test_bytes_of_a_hostile_member_harm_nobody(layer: str) -> None:
    from libp2p.security.pnet.protector import new_protected_conn
    from multiaddr import Multiaddr

    rand = random.Random(11)
    async with open_echo() as host, open_host(new_identity(), KEY, LISTEN) as hostile:
        network: Any = hostile._network
        target = Multiaddr(host.addresses[0])
        for size in (1, 11, 12, 13, 200, 70000):
            conn: Any = new_protected_conn(await network.transport_manager.transport_for_dialing(target).dial(target), KEY)
            raw = conn
            with trio.move_on_after(2):
                if layer != "network":
                    conn = await network.upgrader.security_multistream.secure_outbound(conn, None)
                if layer == "yamux":
                    conn = (await network.upgrader.upgrade_connection(conn, conn.get_remote_peer())).secured_conn
                try:
                    await conn.write(rand.randbytes(size))
                    await conn.read(1)
                except Exception as exc:
                    print(f"{layer} {size}: {exc!r}")
            await raw.close()
        await check_serves(host)


async def test_dial_tells_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.swarm.host.DIAL_S", 0.5)
    async with open_echo() as host, open_host(new_identity(), "22" * 32, LISTEN) as stranger:
        async with open_host(new_identity(), KEY, LISTEN) as member:
            with pytest.raises(DialError, match="fleet secret"):
                await stranger.dial(host.addresses[0])
            with pytest.raises(DialError, match="not 12D3"):
                await member.dial(host.addresses[0], stranger.peer_id)
            with pytest.raises(SelfDialError):
                await member.dial(member.addresses[0])
            with pytest.raises(DialError):
                await member.dial("/ip4/127.0.0.1/tcp/1")
            with pytest.raises(DialError):
                await member.dial("nonsense")
            peer_id = await member.dial(host.addresses[0])
            assert peer_id == host.peer_id
            with pytest.raises(DialError):
                await member.open_stream(peer_id, "/unknown")
            with pytest.raises(DialError):
                await member.open_stream(stranger.peer_id, "/echo")


@pytest.mark.parametrize("listen", ["", "127.0.0.1:4405", "/ip4/127.0.0.1/udp/1", "/ip4/192.0.2.1/tcp/0", "/dns4/x/tcp/1"])
async def test_addresses_that_cannot_be_listened_on(listen: str) -> None:
    with pytest.raises(SettingsError):
        async with open_host(new_identity(), KEY, listen):
            pass


async def test_a_handler_that_fails_does_not_end_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    async def fail(stream: ByteStream) -> None:
        raise RuntimeError("a defect")

    async with open_echo() as host:
        host.serve("/fail", fail)
        async with open_host(new_identity(), KEY, LISTEN) as member:
            stream = await member.open_stream(await member.dial(host.addresses[0]), "/fail")
            with trio.fail_after(5):
                assert await stream.read() == b""
        await check_serves(host)
    assert "swarm_stream_handler_failed" in capsys.readouterr().out


def test_wildcards_become_addresses() -> None:
    assert expand_wildcard(["/ip4/10.0.0.1/tcp/1"]) == ["/ip4/10.0.0.1/tcp/1"]
    found = expand_wildcard(["/ip4/0.0.0.0/tcp/4405"])
    assert found
    assert all(address.startswith("/ip4/") and address.endswith("/tcp/4405") and "0.0.0.0" not in address for address in found)
