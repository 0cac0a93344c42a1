"""Bootstrap addresses: multiaddrs whose host may be a name and whose peer id may be missing.

/ip4/10.0.0.7/tcp/4405                    /ip6/fd00::7/tcp/4405/p2p/12D3Koo…
/dns4/shoal.kube-system/tcp/4405          all A records (a headless service); /dns6/, /dns/ (both)
/dns4/_shoal._tcp.example.org             no port: SRV records name hosts and ports
/dnsaddr/example.org                      TXT records `dnsaddr=<multiaddr>` of _dnsaddr.example.org
"""

import ipaddress
import socket
from typing import Final

import attrs
import trio

from agent.errors import SettingsError

MAX_TARGETS: Final = 64
"""Addresses taken of one name: a fleet is joined through a few members, the others are learnt from them."""
_DNS_FAMILY: Final = {"dns": socket.AF_UNSPEC, "dns4": socket.AF_INET, "dns6": socket.AF_INET6}


@attrs.frozen
class BootstrapAddress:
    """One parsed entry of `--bootstrap-peers`. `kind` is ip4, ip6, dns, dns4, dns6 or dnsaddr; `port` 0 asks for SRV."""

    kind: str
    host: str
    port: int
    peer_id: str | None = None

    def __str__(self) -> str:
        text = f"/{self.kind}/{self.host}"
        if self.port:
            text += f"/tcp/{self.port}"
        return text + (f"/p2p/{self.peer_id}" if self.peer_id else "")


@attrs.frozen
class Target:
    """A dialable address, and the peer id expected there, if one is."""

    address: str
    peer_id: str | None = None


def parse_bootstrap(text: str) -> BootstrapAddress:
    """Read one address.

    Raises:
        SettingsError: it is not one of the forms above.
    """
    parts = text.split("/")
    wrong = SettingsError(f"bootstrap peer {text!r} is not of the form /ip4/ADDRESS/tcp/PORT or /dns4/NAME/tcp/PORT")
    if len(parts) < 3 or parts[0] or len(parts) % 2 == 0 or not all(parts[1:]):
        raise wrong
    pairs = list(zip(parts[1::2], parts[2::2], strict=True))
    kind, host = pairs.pop(0)
    port, peer_id = 0, None
    for name, value in pairs:
        if name == "tcp" and not port and value.isdecimal() and 0 < int(value) < 1 << 16:
            port = int(value)
        elif name == "p2p" and peer_id is None:
            peer_id = value
        else:
            raise wrong
    if kind in {"ip4", "ip6"}:
        try:
            is_right = ipaddress.ip_address(host).version == int(kind[2])
        except ValueError:
            is_right = False
        if not is_right or not port:
            raise wrong
    elif kind not in {*_DNS_FAMILY, "dnsaddr"}:
        raise wrong
    return BootstrapAddress(kind, host, port, peer_id)


def _multiaddr(host: str, port: int) -> str:
    return f"/ip{ipaddress.ip_address(host).version}/{host}/tcp/{port}"


async def _lookup(name: str, port: int, family: int) -> list[str]:
    answers = await trio.socket.getaddrinfo(name, port, family, socket.SOCK_STREAM)
    return list(dict.fromkeys(_multiaddr(str(answer[4][0]).partition("%")[0], port) for answer in answers))


async def _query(name: str, kind: str) -> list[str]:
    import dns.asyncresolver  # noqa: PLC0415 - only few addresses need it
    import dns.exception  # noqa: PLC0415

    try:
        answer = await dns.asyncresolver.resolve(name, kind)
    except dns.exception.DNSException as exc:
        raise OSError(f"no {kind} record of {name}: {exc}") from exc
    if kind == "TXT":
        return [b"".join(record.strings).decode("ascii", "replace") for record in answer]
    return [f"{record.target.to_text(omit_final_dot=True)} {record.port}" for record in answer]


async def resolve_bootstrap(entry: BootstrapAddress) -> list[Target]:
    """Where to dial for one entry, at most `MAX_TARGETS` addresses.

    Raises:
        OSError: a name does not resolve now.
    """
    if entry.kind in {"ip4", "ip6"}:
        await trio.lowlevel.checkpoint()
        return [Target(f"/{entry.kind}/{entry.host}/tcp/{entry.port}", entry.peer_id)]
    if entry.kind == "dnsaddr":
        targets: list[Target] = []
        for text in await _query(f"_dnsaddr.{entry.host}", "TXT"):
            if not text.startswith("dnsaddr="):
                continue
            try:
                found = parse_bootstrap(text.removeprefix("dnsaddr="))
            except SettingsError:
                continue  # another transport than ours, or rubbish: the record is not ours to complain about
            if found.kind != "dnsaddr" and entry.peer_id in {None, found.peer_id}:
                targets += await resolve_bootstrap(found)
        return targets[:MAX_TARGETS]
    family = _DNS_FAMILY[entry.kind]
    hosts = [f"{entry.host} {entry.port}"] if entry.port else await _query(entry.host, "SRV")
    addresses: list[str] = []
    for host in hosts[:MAX_TARGETS]:
        name, _, port = host.rpartition(" ")
        addresses += await _lookup(name, int(port), family)
    return [Target(address, entry.peer_id) for address in addresses[:MAX_TARGETS]]
