"""The swarm of a fleet: who is in it, who holds what, whom to ask.

`open_swarm` runs it; without a fleet secret it gives a swarm of one, which asks and tells nobody. libp2p is imported only
when there is a fleet.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from agent.swarm.fleet import FleetCredentials, FleetSecret, make_credentials, peer_id_in, read_fleet_secret
from agent.swarm.identity import Identity, load_identity, new_identity
from agent.swarm.interface import Swarm
from agent.swarm.members import Holder, PeerInfo, Possession, PossessionSource
from agent.swarm.memory import MemoryNetwork, open_memory_host
from agent.swarm.policy import Assignment, choose, rank
from agent.swarm.swarm import run_swarm

__all__ = [
    "Assignment",
    "FleetCredentials",
    "FleetSecret",
    "Holder",
    "Identity",
    "PeerInfo",
    "Possession",
    "PossessionSource",
    "Swarm",
    "choose",
    "load_identity",
    "make_credentials",
    "new_identity",
    "open_swarm",
    "peer_id_in",
    "rank",
    "read_fleet_secret",
]


@asynccontextmanager
async def open_swarm(
    identity: Identity,
    credentials: FleetCredentials | None,
    *,
    listen: str,
    bootstrap: Sequence[str],
    source: PossessionSource,
    data_address: str,
    zone: str = "",
    version: str = "",
    load: Callable[[], tuple[int, int]] = lambda: (0, 1),
    on_peer: Callable[[PeerInfo], Awaitable[None]] | None = None,
) -> AsyncIterator[Swarm]:
    """Join the fleet of `credentials` (None: stay alone) and keep to it until the block ends; then say goodbye.

    Args:
        identity: this node's key.
        credentials: from `make_credentials`.
        listen: multiaddr of the control plane, `/ip4/0.0.0.0/tcp/4405`; port 0 takes any.
        bootstrap: multiaddrs of nodes to join by; see `agent.swarm.bootstrap`.
        source: what this node holds.
        data_address: `HOST:PORT` where this node serves pieces; an empty or wildcard host: the address others see.
        zone: where this node is.
        version: the agent's version, for people.
        load: gives (uploads now, upload slots).
        on_peer: called in a task of its own for each peer that joins, for instance to open connections to it.

    Raises:
        SettingsError: an address is malformed or cannot be used.
    """
    if credentials is None:
        async with open_memory_host(MemoryNetwork(), identity.peer_id) as alone:
            async with run_swarm(
                alone, bootstrap=(), source=source, data_address=data_address, zone=zone, version=version
            ) as swarm:
                yield swarm
        return
    from agent.swarm.host import open_host  # noqa: PLC0415 - brings libp2p: only for a node that has a fleet

    async with open_host(identity, credentials.network_key, listen) as host:
        async with run_swarm(
            host,
            bootstrap=bootstrap,
            source=source,
            data_address=data_address,
            zone=zone,
            version=version,
            load=load,
            on_peer=on_peer,
        ) as swarm:
            yield swarm
