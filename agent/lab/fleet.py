"""A whole lab: network, registry behind its link, and nodes that come and go."""

import logging
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM

import attrs
import structlog
import trio

from agent.lab.leftovers import own_lab_folder
from agent.lab.network import Host, make_network
from agent.lab.node import Node, open_node
from agent.lab.registry import NODE_REGISTRY, Registry, RegistryLink, open_link, open_registry


@attrs.define(eq=False)
class Lab:
    """A running lab; `nodes` are those started so far."""

    folder: Path
    hosts: dict[str, Host]
    registry: Registry
    link: RegistryLink
    secret: Path
    containerd_binary: Path | None
    snapshotters: Mapping[str, Path]
    stack: AsyncExitStack
    nodes: dict[str, Node] = attrs.field(factory=dict)

    def image(self, name: str) -> str:
        """The reference of an image as a node writes it."""
        return f"{NODE_REGISTRY}/{name}"

    def pushed(self, name: str) -> str:
        """The same image's reference as the host writes it, past the link."""
        return f"{self.registry.address}/{name}"

    async def start_node(
        self, name: str, *, with_agent: bool = True, bootstrap: Sequence[str] | None = None, extra: Sequence[str] = ()
    ) -> Node:
        """Bring up a node; its agent joins the fleet through `bootstrap`, by default all nodes that run already."""
        if bootstrap is None:
            bootstrap = [node.multiaddr() for node in self.nodes.values() if node.agent is not None and node.agent.is_running()]
        node = await self.stack.enter_async_context(
            open_node(self.folder, self.hosts[name], containerd_binary=self.containerd_binary, snapshotters=self.snapshotters)
        )
        self.nodes[name] = node
        if with_agent:
            await node.start_agent(secret=self.secret, bootstrap=bootstrap, extra=extra)
        return node

    def registry_log_bytes(self, digests: Collection[str] | None = None) -> dict[str, int]:
        """Bytes of blobs (of all, or of the given ones) sent to each node, from the registry's own access log."""
        return {name: self.registry.sent_bytes(self.link.sources[name], digests) for name in self.hosts}


@asynccontextmanager
async def open_lab(
    names: Sequence[str],
    *,
    round_trip_s: float = 0.02,
    rate_bps: float = 400e6,
    containerd_binary: Path | None = None,
    snapshotters: Mapping[str, Path] | None = None,
) -> AsyncIterator[Lab]:
    """Network, registry and link for nodes of the given names; all of it is removed when the block ends, however it ends."""
    with own_lab_folder() as folder:
        hosts = make_network(folder, list(names))
        secret = folder / "fleet-secret"
        secret.touch(mode=0o600)
        secret.write_text(secrets.token_hex(32) + "\n")
        async with (
            open_registry(folder) as registry,
            open_link(folder, registry, hosts, round_trip_s=round_trip_s, rate_bps=rate_bps, for_host=bool(snapshotters)) as link,
            AsyncExitStack() as stack,
        ):
            by_name = {host.name: host for host in hosts}
            yield Lab(folder, by_name, registry, link, secret, containerd_binary, snapshotters or {}, stack)


async def until_signal(work: Callable[[], Awaitable[int]]) -> int:
    """Run `work`; a signal cancels it, so that every `async with` cleans up. Gives its result, or 128 + the signal's number.

    The handlers stay until the clean-up is over: a second Ctrl-C does not cut it short.
    """
    status = 0
    with trio.open_signal_receiver(SIGINT, SIGTERM, SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal status
                async for number in signals:
                    status = 128 + number
                    nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            done = await work()
            status = status or done
            nursery.cancel_scope.cancel()
    return status


def quiet_logs() -> None:
    """Warnings only, on stderr: what the parts used in this process log in detail is not for who watches a lab."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
