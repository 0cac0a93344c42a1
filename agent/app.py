"""The one place that wires the agent's parts together and owns its top nursery.

Parts are opened in the order in which they need each other and close in the reverse order: when the agent is told to end, it
first stops taking calls, then says goodbye to the swarm, and closes the store last. fsmount and its mounts stay: containers go
on reading what is here, and the next agent takes over.
"""

import gc
import os
import resource
import signal
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import attrs
import structlog
import trio

from agent.admin.server import Emit, open_admin_server
from agent.config import UNLIMITED, Settings
from agent.errors import SettingsError, ShoalError
from agent.formats.model import Digest
from agent.images.adopt import NodeChunks
from agent.images.commands import ImageCommands
from agent.images.fleet_index import FleetIndexes
from agent.images.fsmount_link import FsmountLink, open_fsmount_link
from agent.images.inspecting import Inspector
from agent.images.layers import Layers, PreparedLayer, open_layers
from agent.images.manifests import Manifests
from agent.images.records import FleetRecords
from agent.observe.logs import set_up_logging
from agent.observe.memory import trim_malloc
from agent.registry import Descriptor, ImageReference, open_registry_client
from agent.resolve import Counters, Resolver, open_resolver
from agent.resolve.sourcing import NodeSources
from agent.runtimes.containerd.client import open_containerd
from agent.runtimes.containerd.service import serve_snapshots
from agent.runtimes.containerd.snapshotter import Snapshotter, open_snapshotter
from agent.store import Store, StoredLayer, open_store
from agent.swarm import (
    FleetCredentials,
    PeerInfo,
    Possession,
    Swarm,
    load_identity,
    make_credentials,
    open_swarm,
    read_fleet_secret,
)
from agent.transfer import DataServer, PeerClient, open_data_server, open_peer_client
from fsmount.link import Link, Need

log = structlog.get_logger()

ANSWER_S: Final = 0.1
"""The resolver gives a read up so much before fsmount would, so that the reason is in the answer and in the log."""

MAX_OPEN_FILES: Final = 65536
PIN_OWNER: Final = "containerd"
TRIM_INTERVAL_S: Final = 1.0


def run_agent(settings: Settings, *, version: str) -> int:
    """Run until SIGTERM or SIGINT; gives the exit code."""
    set_up_logging(settings.log_level, settings.log_format)
    try:
        trio.run(_run, settings, version)
    except BaseExceptionGroup as group:
        reason = _reason(group)
        if reason is None:
            raise
        raise reason from group
    return 0


def _reason(group: BaseExceptionGroup[BaseException]) -> ShoalError | None:
    """The one error of ours that ended the agent, if that is what it was."""
    ours, rest = group.split(ShoalError)
    if rest is not None or ours is None:
        return None
    first: BaseException = ours
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first if isinstance(first, ShoalError) else None


class _StoreView:
    """What the swarm and the data server see of the store."""

    def __init__(self, store: Store, records: FleetRecords) -> None:
        self._store = store
        self._records = records
        self._disk = trio.CapacityLimiter(4)

    def possession(self, blob: Digest) -> Possession | None:
        """See `agent.swarm.PossessionSource`."""
        layer = self._store.layer(blob)
        if layer is None:
            return self._records.possession(blob)
        index = layer.pieces.index_piece
        start = layer.pieces.starts[index] if index >= 0 else -1
        return Possession(blob, layer.blob_size, len(layer.pieces), layer.possession(), start)

    def blobs(self) -> list[Digest]:
        """See `agent.swarm.PossessionSource`."""
        layers = [layer.digest for layer in self._store.layers() if any(layer.possession())]
        return [*layers, *self._records.indexes()]

    def blob_size(self, blob: Digest) -> int | None:
        """See `agent.transfer.BlobReader`."""
        layer = self._store.layer(blob)
        if layer is None:
            return self._records.size(blob)
        return layer.blob_size

    def has_range(self, blob: Digest, start: int, stop: int) -> bool:
        """See `agent.transfer.BlobReader`."""
        layer = self._store.layer(blob)
        if layer is None:
            return self._records.size(blob) is not None
        return all(layer.has_piece(piece) for piece in layer.pieces.covering(start, stop))

    async def read_range(self, blob: Digest, start: int, stop: int) -> bytes | None:
        """See `agent.transfer.BlobReader`. What was fetched lately is in the page cache; a thread hop costs more than the read."""
        layer = self._store.layer(blob)
        if layer is None:
            return await self._records.read(blob, start, stop)
        return await trio.to_thread.run_sync(layer.read_blob, start, stop, limiter=self._disk)


@attrs.frozen
class _PinnedLayers:
    """What containerd's snapshotter sees of the layers: those that it serves are kept from eviction."""

    layers: Layers
    store: Store

    async def prepare(
        self, image: ImageReference | None, layer: Descriptor, neighbours: Sequence[Descriptor] = ()
    ) -> PreparedLayer:
        """See `agent.runtimes.containerd.snapshotter.LayerService`."""
        prepared = await self.layers.prepare(image, layer, neighbours)
        await self.store.pin(Digest(layer.digest), PIN_OWNER)
        return prepared

    async def restore(self, name: str) -> Path:
        """See `agent.runtimes.containerd.snapshotter.LayerService`."""
        path = await self.layers.restore(name)
        await self.store.pin(Digest(f"sha256:{name}"), PIN_OWNER)
        return path

    async def release(self, name: str) -> None:
        """See `agent.runtimes.containerd.snapshotter.LayerService`. What `shoal mount` shows stays mounted."""
        digest = Digest(f"sha256:{name}")
        await self.store.unpin(digest, PIN_OWNER)
        if not self.store.pins(digest):
            await self.layers.release(name)

    def cached_bytes(self, name: str) -> int:
        """See `agent.runtimes.containerd.snapshotter.LayerService`."""
        return self.layers.cached_bytes(name)


@attrs.define(eq=False)
class _Agent:
    """The parts that calls need."""

    settings: Settings
    version: str
    store: Store
    swarm: Swarm
    server: DataServer | None
    resolver: Resolver
    link: FsmountLink
    layers: Layers
    commands: ImageCommands
    snapshotter: Snapshotter | None
    problems: list[str]
    started: float

    async def status(self, _args: dict[str, Any], _emit: Emit) -> dict[str, Any]:
        """What `shoal status --json` prints."""
        counters, info = self.resolver.counters, self.link.info
        await trio.lowlevel.checkpoint()
        return {
            "version": self.version,
            "uptime_s": round(time.monotonic() - self.started, 3),
            "peer_id": self.swarm.peer_id,
            "addresses": list(self.swarm.addresses),
            "data_address": self.server.address if self.server else "",
            "fleet": "member" if self.server else "none (no fleet secret): this node works alone",
            "peers": len(self.swarm.peers()),
            "pids": {"agent": os.getpid(), "fsmount": info.pid if info else 0, "holder": info.holder_pid if info else 0},
            "presentation": info.presentations[0] if info and info.presentations else "",
            "bytes": {"registry": counters.registry_bytes, "peers": counters.peer_bytes, "cache": counters.cache_bytes},
            "abandoned_bytes": counters.abandoned_bytes,
            "served_bytes": self.server.served_bytes if self.server else 0,
            "chunks_verified": counters.chunks_verified,
            "bad_chunks": counters.bad_chunks,
            "demand_waits": counters.demand_waits,
            "failed_reads": counters.failed_reads,
            "cache_disk_bytes": self.store.usage(),
            "cache_quota": self.settings.cache_quota,
            "layers": [_describe(layer) for layer in self.store.layers()],
            "degraded": self.snapshotter.degraded() if self.snapshotter else {},
            "problems": [*self.problems, *([self.link.problem] if self.link.problem else [])],
        }

    async def peers(self, _args: dict[str, Any], _emit: Emit) -> list[dict[str, Any]]:
        """What `shoal peers --json` prints."""
        await trio.lowlevel.checkpoint()
        return [
            {
                "peer_id": peer.peer_id,
                "addresses": list(peer.addresses),
                "data_address": peer.data_address,
                "rtt_ms": None if peer.rtt_ms is None else round(peer.rtt_ms, 2),
                "zone": peer.zone,
                "load": round(peer.load, 3),
                "version": peer.version,
                "blobs": peer.blobs,
            }
            for peer in self.swarm.peers()
        ]


def _describe(layer: StoredLayer) -> dict[str, Any]:
    # Nobody ever fetches a piece that holds nothing: of a nydus image's data blobs as layers, or of one with whiteouts alone.
    table = layer.pieces
    wanted = [n for n in range(len(table)) if layer.codec == "whole" or table.chunks_of(n) or n == table.index_piece]
    return {
        "digest": layer.digest,
        "image": str(layer.extra.get("image", "")),
        "format": layer.format,
        "blob_size": layer.blob_size,
        "volume_size": layer.volume_size,
        "pieces": len(wanted),
        "pieces_held": sum(layer.has_piece(number) for number in wanted),
        "complete": layer.complete,
        "disk_bytes": layer.disk_bytes(),
    }


async def _run(settings: Settings, version: str) -> None:
    _check_directories(settings)
    _raise_file_limit()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve, settings, version)
            async for number in signals:
                log.info("agent_ending", signal=signal.Signals(number).name)
                nursery.cancel_scope.cancel()
                break


def _check_directories(settings: Settings) -> None:
    if os.geteuid() != 0:
        raise SettingsError("the agent mounts file systems and therefore runs as root")
    for path in (settings.state_dir, settings.run_dir):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise SettingsError(f"cannot make {path}: {exc.strerror}") from exc


def _raise_file_limit() -> None:
    """Two files stay open for each stored layer, and a connection for each peer: the usual soft limit of 1,024 is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(MAX_OPEN_FILES, hard) if hard != resource.RLIM_INFINITY else MAX_OPEN_FILES
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _credentials(settings: Settings) -> tuple[Any, FleetCredentials | None]:
    identity = load_identity(settings.state_dir / "identity")
    if settings.fleet_secret_file is None:
        return identity, None
    return identity, make_credentials(read_fleet_secret(settings.fleet_secret_file), identity)


def _data_address(settings: Settings, server: DataServer | None) -> str:
    if settings.data_advertise:
        return settings.data_advertise
    if server is None:
        return ""
    host = settings.data_listen.rpartition(":")[0]
    return f"{host}:{server.port}"


async def _serve(settings: Settings, version: str) -> None:
    started = time.monotonic()
    counters = Counters()
    problems: list[str] = []
    async with AsyncExitStack() as stack:
        pieces_changed: list[NodeSources] = []

        def on_pieces(blob: Digest, pieces: Sequence[int], held: bool) -> None:
            for sources in pieces_changed:
                sources.pieces_changed(blob, pieces, held=held)

        quota = None if settings.cache_quota == UNLIMITED else settings.cache_quota
        store = await stack.enter_async_context(open_store(settings.state_dir / "store", quota_bytes=quota, on_pieces=on_pieces))
        docker_config = settings.docker_config or Path.home() / ".docker" / "config.json"
        registry = await stack.enter_async_context(
            open_registry_client(settings.registry_hosts_dir, docker_config, insecure=settings.insecure_registries)
        )
        identity, credentials = await trio.to_thread.run_sync(_credentials, settings)
        records = FleetRecords(store)
        await records.load()
        view = _StoreView(store, records)
        server: DataServer | None = None
        client: PeerClient | None = None
        if credentials is not None:
            server = await stack.enter_async_context(open_data_server(settings.data_listen, credentials.server_context, view))
            client = await stack.enter_async_context(open_peer_client(credentials.client_context))

        async def warm(peer: PeerInfo) -> None:
            if client is not None and peer.data_address:
                await client.warm(peer.peer_id, peer.data_address)

        swarm = await stack.enter_async_context(
            open_swarm(
                identity,
                credentials,
                listen=settings.listen,
                bootstrap=settings.bootstrap_peers,
                source=view,
                data_address=_data_address(settings, server),
                zone=settings.zone,
                version=version,
                load=server.load if server else lambda: (0, 1),
                on_peer=warm,
            )
        )
        sources = NodeSources(registry, swarm, client, zone=settings.zone)
        pieces_changed.append(sources)

        async def rebuild(layer: StoredLayer) -> None:
            await layers.rebuild(layer)

        resolver = await stack.enter_async_context(open_resolver(sources, counters, rebuild))
        resolver.node = NodeChunks(store, trio.CapacityLimiter(1))

        async def on_need(need: Need) -> None:
            digest = Digest("sha256:" + need.volume)
            layer = store.layer(digest)
            if layer is not None:
                # Readers that waited for an agent are told of as soon as one connects, before it has taken its volumes over.
                resolver.add_layer(layer, str(layer.extra.get("image", digest)))
            await resolver.need(digest, need.offset, need.offset + need.length, need.deadline_s - ANSWER_S)

        async def on_connected(link: Link) -> None:
            await _take_over(link, store, resolver, sources)

        manifests = Manifests(registry, records, swarm, client, counters)
        link = await stack.enter_async_context(
            open_fsmount_link(
                settings.run_dir,
                on_need,
                on_connected,
                read_deadline_s=settings.read_deadline,
                presentation=settings.presentation,
            )
        )
        layers = await stack.enter_async_context(
            open_layers(
                store,
                manifests,
                sources,
                resolver,
                link.current,
                FleetIndexes(
                    records,
                    swarm,
                    client,
                    identity,
                    credentials.seal_key if credentials else None,
                    counters,
                    settings.trust_fleet_indexes,
                ),
                presentation=settings.presentation,
                prefetch=settings.prefetch,
                background=settings.background_fetch,
                soci_v1=settings.soci_v1,
            )
        )
        snapshotter: Snapshotter | None = None
        if settings.snapshotter:
            snapshotter = await stack.enter_async_context(open_snapshotter(settings.state_dir, _PinnedLayers(layers, store)))
            await stack.enter_async_context(serve_snapshots(snapshotter, settings.run_dir / "containerd.sock"))
        containerd = await stack.enter_async_context(open_containerd(str(settings.containerd_address)))
        commands = ImageCommands(store, manifests, layers, resolver, link, containerd, records, swarm, client)
        agent = _Agent(settings, version, store, swarm, server, resolver, link, layers, commands, snapshotter, problems, started)
        with trio.move_on_after(30) as waiting:
            await link.current()
        if waiting.cancelled_caught:
            problems.append(f"fsmount does not answer: {link.problem or 'see ' + str(settings.run_dir / 'fsmount.log')}")
            log.error("fsmount_does_not_answer", reason=link.problem)
        handlers = {
            "status": agent.status,
            "peers": agent.peers,
            "pull": commands.pull,
            "mount": commands.mount,
            "unmount": commands.unmount,
            "scrub": commands.scrub,
            "inspect": Inspector(store, manifests, layers, resolver, swarm).inspect,
        }
        await stack.enter_async_context(open_admin_server(settings.run_dir / "agent.sock", handlers))
        print(f"shoal agent is ready: peer {swarm.peer_id}, run directory {settings.run_dir}", flush=True)
        log.info("agent_ready", peer_id=swarm.peer_id, addresses=swarm.addresses, elapsed_s=round(time.monotonic() - started, 3))
        await _keep_small(resolver)


async def _keep_small(resolver: Resolver) -> None:
    """Give memory back after start-up and after each burst of fetching."""
    gc.collect()
    gc.freeze()  # modules stay for ever: no later collection need look at them
    trimmed_at = -1
    while True:
        await trio.sleep(TRIM_INTERVAL_S)
        verified = resolver.counters.chunks_verified
        if verified != trimmed_at and not resolver.is_busy():
            await trio.to_thread.run_sync(trim_malloc)
            trimmed_at = verified


async def _take_over(link: Link, store: Store, resolver: Resolver, sources: NodeSources) -> None:
    """fsmount may have outlived the last agent: whatever it serves must find its chunks again."""
    for volume in (await link.list())["volumes"]:
        layer = store.layer(Digest(f"sha256:{volume['name']}"))
        if layer is None:
            log.warning("volume_without_layer", volume=volume["name"], consequence="reads of what is not cached fail")
            continue
        resolver.add_layer(layer, str(layer.extra.get("image", layer.digest)))
        await sources.announce(layer)
