import pytest

from agent.errors import SettingsError
from agent.swarm.bootstrap import BootstrapAddress, Target, parse_bootstrap, resolve_bootstrap
from agent.swarm.swarm import closest, seen_addresses

PEER = "12D3KooWD5ru2w9V1zxCRy5DH4qkkzYEtttPypGKucAx7LEMa378"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/ip4/10.0.0.7/tcp/4405", BootstrapAddress("ip4", "10.0.0.7", 4405)),
        (f"/ip6/fd00::7/tcp/4405/p2p/{PEER}", BootstrapAddress("ip6", "fd00::7", 4405, PEER)),
        ("/dns4/shoal.kube-system/tcp/4405", BootstrapAddress("dns4", "shoal.kube-system", 4405)),
        ("/dns/_shoal._tcp.example.org", BootstrapAddress("dns", "_shoal._tcp.example.org", 0)),
        ("/dnsaddr/example.org", BootstrapAddress("dnsaddr", "example.org", 0)),
    ],
)
def test_parse(text: str, expected: BootstrapAddress) -> None:
    assert parse_bootstrap(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    ["", "/", "10.0.0.7:4405", "/ip4/10.0.0.7", "/ip4/x/tcp/1", "/ip6/10.0.0.7/tcp/1", "/ip4/10.0.0.7/tcp/0",
     "/ip4/10.0.0.7/tcp/65536", "/ip4/10.0.0.7/udp/1", "/ip4/10.0.0.7/tcp/1/ws/x", "/ip4/10.0.0.7/tcp/1/tcp/2", "/onion/x/tcp/1"],
)  # fmt: skip
def test_refuse(text: str) -> None:
    with pytest.raises(SettingsError):
        parse_bootstrap(text)


async def test_resolve_plain_and_named_addresses() -> None:
    assert await resolve_bootstrap(parse_bootstrap("/ip4/10.0.0.7/tcp/1")) == [Target("/ip4/10.0.0.7/tcp/1")]
    named = await resolve_bootstrap(parse_bootstrap(f"/dns4/localhost/tcp/4405/p2p/{PEER}"))
    assert named == [Target("/ip4/127.0.0.1/tcp/4405", PEER)]


def test_wildcard_addresses_become_the_host_a_peer_is_seen_under() -> None:
    listen = ["/ip4/0.0.0.0/tcp/1", "/ip4/10.0.0.1/tcp/2", "rubbish", "/dns4/evil/tcp/1", "/ip6/::/tcp/3"]
    assert seen_addresses(listen, "192.0.2.1") == (
        "/ip4/192.0.2.1/tcp/1",
        "/ip4/10.0.0.1/tcp/2",
        "/ip4/192.0.2.1/tcp/3",
    )
    assert seen_addresses(listen, "") == ("/ip4/10.0.0.1/tcp/2",)
    assert len(seen_addresses([f"/ip4/10.0.0.1/tcp/{port}" for port in range(1, 100)], "")) == 8


def test_closest_does_not_depend_on_the_order() -> None:
    ids = [f"peer{number}" for number in range(50)]
    found = closest(b"\x12" * 32, ids, 8)
    assert len(set(found)) == 8
    assert closest(b"\x12" * 32, reversed(ids), 8) == found
    assert closest(b"\x77" * 32, ids, 8) != found
