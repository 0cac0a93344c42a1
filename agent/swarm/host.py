"""The libp2p host of a fleet member: the one module that touches libp2p.

What it hides: a private network (pre-shared key) over TCP, Noise and Yamux; Kademlia; and that libp2p insists on knowing a
peer's id before it dials, while our bootstrap addresses may leave it out. `dial` therefore drives libp2p's own upgrade
steps itself: connect, private network, Noise (which proves the id), compare if one was expected, multiplex, register.

Set against py-libp2p 0.8.1: no resource manager (its rate limits refuse a fleet behind one address), no automatic
connections, no limit of peers a subnet, Noise only (the default also offers plaintext, where a member could claim any id).
Its Kademlia answers on a fixed protocol name whatever prefix it is given; the private network is what separates fleets.
"""

import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import structlog
import trio

from agent.errors import SettingsError, SourceUnavailable
from agent.swarm.errors import DialError, SelfDialError
from agent.swarm.identity import Identity
from agent.swarm.libp2p_import import import_libp2p
from agent.swarm.session import ByteStream

log = structlog.get_logger()

DIAL_S: Final = 5.0
"""Longest a dial may take: several round trips between continents, and a member answers in milliseconds."""
_MAX_CONNECTIONS: Final = 512
_PROVIDES_A_WINDOW: Final = 1000
"""ADD_PROVIDER messages taken from one peer in ten seconds (default 10): a node that starts announces all its layers."""
_CHUNK: Final = 64 << 10


class HostStream:
    """A byte stream to a peer whose id libp2p has proven."""

    def __init__(self, stream: Any) -> None:  # libp2p's INetStream, untyped here
        self._stream = stream
        self.peer_id = str(stream.muxed_conn.peer_id)
        address = stream.get_remote_address()
        self.remote_host: str = address[0] if address else ""

    async def read(self) -> bytes:
        """Some bytes; none at the end or when the peer is gone."""
        try:
            return bytes(await self._stream.read(_CHUNK))
        except Exception as exc:  # noqa: BLE001 - libp2p raises a dozen unrelated classes for "the peer is gone"
            log.debug("swarm_stream_ended", peer=self.peer_id, reason=f"{type(exc).__name__}: {exc}")
            return b""

    async def write(self, data: bytes) -> None:
        """Send all of `data`.

        Raises:
            SourceUnavailable: the peer is gone.
        """
        try:
            await self._stream.write(data)
        except Exception as exc:
            raise SourceUnavailable(f"peer {self.peer_id} is gone: {exc}", source=self.peer_id) from exc

    async def close(self) -> None:
        """End the stream; never raises and takes at most a second, also when cancelled."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            try:
                await self._stream.close()
            except Exception as exc:  # noqa: BLE001 - see read()
                log.debug("swarm_stream_close_failed", peer=self.peer_id, reason=str(exc))


def expand_wildcard(addresses: list[str]) -> list[str]:
    """Addresses others can dial: a wildcard host becomes this machine's addresses, loopback only if there is no other."""
    import psutil  # type: ignore[import-untyped]  # noqa: PLC0415 - comes with libp2p; not needed by a node without a fleet

    found: dict[int, list[str]] = {socket.AF_INET: [], socket.AF_INET6: []}
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family in found and "%" not in entry.address:
                found[entry.family].append(entry.address)
    result: list[str] = []
    for address in addresses:
        parts = address.split("/")
        if len(parts) < 3 or parts[2] not in {"0.0.0.0", "::"}:
            result.append(address)
            continue
        hosts = found[socket.AF_INET if parts[1] == "ip4" else socket.AF_INET6]
        others = [host for host in hosts if not ipaddress.ip_address(host).is_loopback]
        result += ["/".join([*parts[:2], host, *parts[3:]]) for host in others or hosts]
    return result


class Host:
    """A running host; made by `open_host`."""

    def __init__(self, basic_host: Any, dht: Any, peer_id: str) -> None:
        self._host = basic_host
        self._network = basic_host.get_network()
        self._dht = dht
        self._dialled: list[tuple[str, Any]] = []
        self.peer_id = peer_id

    @property
    def addresses(self) -> list[str]:
        """Multiaddrs where this host can be dialled, without the peer id."""
        from multiaddr import Multiaddr  # noqa: PLC0415 - libp2p is imported by open_host

        suffix = Multiaddr(f"/p2p/{self.peer_id}")
        return [str(address.decapsulate(suffix)) for address in self._host.get_addrs()]

    @property
    def listen_addresses(self) -> list[str]:
        """Multiaddrs as bound, wildcards included."""
        return [str(address) for address in self._host.get_transport_addrs()]

    def serve(self, protocol: str, handler: Callable[[ByteStream], Awaitable[None]]) -> None:
        """Call `handler` for each stream that a peer opens with `protocol`; the stream ends when it returns."""

        async def on_stream(stream: Any) -> None:
            wrapped = HostStream(stream)
            try:
                await handler(wrapped)
            except Exception:
                # Raised further it would end libp2p's service and with it the agent.
                log.exception("swarm_stream_handler_failed", peer=wrapped.peer_id, protocol=protocol)
            finally:
                await wrapped.close()

        self._host.set_stream_handler(protocol, on_stream)

    async def dial(self, address: str, expected_peer: str | None = None) -> str:
        """Connect to a multiaddr (`/ip4/…/tcp/…`) and give the peer's proven id. An existing connection is used.

        Raises:
            DialError: nobody answers, it is not of this fleet, or not `expected_peer`.
            SelfDialError: the address leads back here.
        """
        from libp2p.security.pnet.protector import new_protected_conn  # noqa: PLC0415 - see open_host
        from multiaddr import Multiaddr  # noqa: PLC0415

        if expected_peer and self.is_connected(expected_peer):
            return expected_peer
        network, raw = self._network, None
        try:
            with trio.fail_after(DIAL_S):
                target = Multiaddr(address)
                raw = new_protected_conn(await network.transport_manager.transport_for_dialing(target).dial(target), network.psk)
                secured = await network.upgrader.security_multistream.secure_outbound(raw, None)
                remote = secured.get_remote_peer()
                peer_id = str(remote)
                if peer_id == self.peer_id:
                    raise SelfDialError(f"{address} is this node itself")
                if expected_peer is not None and peer_id != expected_peer:
                    raise DialError(f"{address} is peer {peer_id}, not {expected_peer}")
                network.peerstore.add_addrs(remote, [target], 3600)
                if not self.is_connected(peer_id):
                    muxed = await network.upgrader.upgrade_connection(secured, remote)
                    await network.add_conn(muxed, direction="outbound")
                    self._dialled = [(other, conn) for other, conn in self._dialled if self.is_connected(other)]
                    self._dialled.append((peer_id, raw))
                    raw = None  # it is the network's now
                return peer_id
        except trio.TooSlowError as exc:
            raise DialError(
                f"{address} did not answer within {DIAL_S:.0f} s, or has another fleet secret", source=address
            ) from exc
        except DialError:
            raise
        except Exception as exc:
            # Another fleet secret shows as garbage in the first handshake message, in whatever class parses it.
            raise DialError(
                f"cannot reach {address}: {type(exc).__name__} {exc} (no such node, or it has another fleet secret)",
                source=address,
            ) from exc
        finally:
            if raw is not None:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await raw.close()

    async def close_dialled(self) -> None:
        """Close the sockets that `dial` opened: when libp2p is cancelled it says goodbye first, and never gets to them."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            for _, conn in self._dialled:
                await conn.close()

    def is_connected(self, peer_id: str) -> bool:
        """Whether there is a connection to the peer."""
        return bool(self._network.get_connections(_id(peer_id)))

    async def disconnect(self, peer_id: str) -> None:
        """Close the connection to a peer and take it out of the routing table; never raises."""
        try:
            self._dht.routing_table.remove_peer(_id(peer_id))
            with trio.move_on_after(1):
                await self._host.disconnect(_id(peer_id))
        except Exception as exc:  # noqa: BLE001 - the connection is broken already, or libp2p tripped over that
            log.debug("swarm_disconnect_failed", peer=peer_id, reason=str(exc))

    async def open_stream(self, peer_id: str, protocol: str) -> HostStream:
        """Open a stream to a connected peer.

        Raises:
            DialError: the peer is gone or does not speak the protocol.
        """
        try:
            with trio.fail_after(DIAL_S):
                return HostStream(await self._host.new_stream(_id(peer_id), [protocol]))
        except Exception as exc:
            raise DialError(f"cannot open a stream to peer {peer_id}: {type(exc).__name__} {exc}", source=peer_id) from exc

    async def add_route(self, peer_id: str, addresses: tuple[str, ...]) -> None:
        """Tell the DHT that a connected peer takes part, and where it listens."""
        from multiaddr import Multiaddr  # noqa: PLC0415

        try:
            remote = _id(peer_id)
            self._network.peerstore.add_addrs(remote, [Multiaddr(address) for address in addresses], 3600)
            await self._dht.add_peer(remote, skip_server_mode_check=True)
        except Exception as exc:  # noqa: BLE001 - a peer's malformed address fails in libp2p's parser
            log.debug("swarm_route_refused", peer=peer_id, reason=str(exc))

    async def provide(self, key: bytes) -> bool:
        """Publish that this node has `key`; whether at least one other node took the record."""
        try:
            return bool(await self._dht.provide(key.hex()))
        except Exception as exc:  # noqa: BLE001 - the DHT is a convenience; the caller tries again later
            log.debug("dht_provide_failed", key=key.hex(), reason=str(exc))
            return False

    def stop_providing(self, key: bytes) -> None:
        """Do not renew the record of `key`; the one that is out expires."""
        self._dht.provider_store.providing_keys.discard(key)

    async def find_providers(self, key: bytes, count: int) -> list[tuple[str, tuple[str, ...]]]:
        """(peer id, addresses) of nodes that published `key`."""
        try:
            found = await self._dht.find_providers(key.hex(), count)
        except Exception as exc:  # noqa: BLE001 - see provide()
            log.debug("dht_lookup_failed", key=key.hex(), reason=str(exc))
            return []
        return [(str(info.peer_id), tuple(str(address) for address in info.addrs)) for info in found]


def _id(peer_id: str) -> Any:
    from libp2p.peer.id import ID  # noqa: PLC0415 - see open_host

    return ID.from_base58(peer_id)


def _check_port_free(listen: str) -> None:
    # libp2p binds with SO_REUSEPORT, so a second agent on the same port would silently get half of the connections.
    parts = listen.split("/")
    if len(parts) != 5 or parts[1] not in {"ip4", "ip6"} or parts[3] != "tcp" or not parts[4].isdecimal():
        raise SettingsError(f"--listen {listen} is not of the form /ip4/ADDRESS/tcp/PORT")
    with socket.socket(socket.AF_INET6 if parts[1] == "ip6" else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((parts[2], int(parts[4])))
        except OSError as exc:
            raise SettingsError(f"cannot listen on {listen}: {exc.strerror}; choose another with --listen") from exc


@asynccontextmanager
async def open_host(identity: Identity, network_key: str, listen: str) -> AsyncIterator[Host]:
    """Run a libp2p host in the private network of `network_key`, listening on the multiaddr `listen` (port 0: any).

    Raises:
        SettingsError: the address cannot be used.
    """
    _check_port_free(listen)
    await trio.to_thread.run_sync(import_libp2p, limiter=trio.CapacityLimiter(1))

    # Only importable after import_libp2p(), and only wanted in a fleet: 28 MB.
    from libp2p.crypto.ed25519 import create_new_key_pair  # noqa: PLC0415
    from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair  # noqa: PLC0415
    from libp2p.custom_types import TProtocol  # noqa: PLC0415
    from libp2p.host.basic_host import BasicHost  # noqa: PLC0415
    from libp2p.kad_dht.kad_dht import DHTMode, KadDHT  # noqa: PLC0415
    from libp2p.network.config import ConnectionConfig  # noqa: PLC0415
    from libp2p.network.swarm import Swarm  # noqa: PLC0415
    from libp2p.peer.id import ID  # noqa: PLC0415
    from libp2p.peer.peerstore import PeerStore  # noqa: PLC0415
    from libp2p.security.noise.transport import PROTOCOL_ID as NOISE  # noqa: PLC0415
    from libp2p.security.noise.transport import Transport as NoiseTransport  # noqa: PLC0415
    from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX  # noqa: PLC0415
    from libp2p.stream_muxer.yamux.yamux import Yamux  # noqa: PLC0415
    from libp2p.tools.anyio_service import background_trio_service  # noqa: PLC0415
    from libp2p.transport.tcp.tcp import TCP  # noqa: PLC0415
    from libp2p.transport.upgrader import TransportUpgrader  # noqa: PLC0415
    from multiaddr import Multiaddr  # noqa: PLC0415

    keys = create_new_key_pair(identity.raw_key)
    peer = ID.from_pubkey(keys.public_key)
    peerstore = PeerStore()
    peerstore.add_key_pair(peer, keys)
    noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
    config = ConnectionConfig(
        max_connections=_MAX_CONNECTIONS,
        high_watermark=_MAX_CONNECTIONS,
        min_connections=0,
        low_watermark=0,
    )
    # Whom to connect to is decided here, but the library dials the peers it knows until it has as many connections as the
    # middle between its watermarks; its own check of the settings has passed already.
    config.low_watermark = -_MAX_CONNECTIONS
    network = Swarm(
        peer,
        peerstore,
        TransportUpgrader({NOISE: noise}, {TProtocol(YAMUX): Yamux}),
        transports=[TCP()],
        psk=network_key,
        connection_config=config,
    )
    basic_host = BasicHost(
        network,
        disable_identify_address_discovery=True,
        addrs_factory=lambda addresses: [Multiaddr(text) for text in expand_wildcard([str(a) for a in addresses])],
    )
    async with basic_host.run([Multiaddr(listen)]):
        dht = KadDHT(
            basic_host,
            DHTMode.SERVER,
            max_peers_per_subnet=0,
            enable_values=False,
        )
        dht._provider_rate_max = _PROVIDES_A_WINDOW
        async with background_trio_service(dht):
            host = Host(basic_host, dht, identity.peer_id)
            try:
                yield host
            finally:
                await host.close_dialled()
