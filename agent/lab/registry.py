"""A Debian docker-registry and the link in front of it.

The registry listens on a loopback port of the host. Nodes reach it through the link, as `127.0.0.1:5000` inside their own network
namespace: loopback, so that every client speaks plain HTTP to it unasked. The link comes to the registry from a source address per
node, and so the registry's own access log (Apache's combined form: client, request, status, bytes of the body) tells how much each
node was sent. That log is the proof that our own counters are compared with.
"""

import json
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs

from agent.lab.network import Host
from agent.lab.processes import Child, LabError, running, start

NODE_REGISTRY: Final = "127.0.0.1:5000"
"""Host part of an image reference on a node."""

_CONFIG: Final = """version: 0.1
log:
  level: warn
  accesslog: {{disabled: false}}
storage:
  filesystem: {{rootdirectory: {root}}}
  delete: {{enabled: true}}
http:
  addr: {address}
  headers: {{X-Content-Type-Options: [nosniff]}}
"""

_ACCESS: Final = re.compile(r'(\S+) - \S+ \[[^\]]*\] "(\S+) (\S+) [^"]*" (\d{3}) (\d+|-)')


@attrs.frozen
class Access:
    """One line of the registry's access log. `size` is the bytes of the answer's body."""

    client: str
    method: str
    path: str
    status: int
    size: int

    @property
    def is_blob(self) -> bool:
        """Whether it read a blob (not a manifest or a tag list)."""
        return self.method == "GET" and "/blobs/" in self.path


def parse_access_log(text: str) -> list[Access]:
    """The requests in a registry's log; other lines are skipped."""
    found = []
    for line in text.splitlines():
        if match := _ACCESS.match(line):
            client, method, path, status, size = match.groups()
            found.append(Access(client, method, path, int(status), 0 if size == "-" else int(size)))
    return found


def free_port() -> int:
    """A loopback port that nobody has right now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


@attrs.define(eq=False)
class Registry:
    """A running registry; `address` is where the host itself reaches it, not through the link."""

    folder: Path
    address: str
    child: Child | None = None

    @property
    def _log(self) -> Path:
        return self.folder / "registry.log"

    async def start(self) -> None:
        """Start it (again), with what was pushed before."""
        host, _, port = self.address.rpartition(":")
        config = self.folder / "config.yml"
        config.write_text(_CONFIG.format(root=self.folder / "storage", address=self.address))
        self.child = start("docker-registry", ["docker-registry", "serve", config], self._log)

        def answers() -> bool:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
                return sock.connect_ex((host, int(port))) == 0

        await self.child.wait_ready(answers, "its port answers")

    async def stop(self) -> None:
        """Stop it; connections break."""
        if self.child is not None:
            await self.child.stop(signal.SIGKILL)

    def accesses(self, host: str | None = None) -> list[Access]:
        """What the registry says it was asked, all of it or by one node's source address."""
        try:
            text = self._log.read_text(errors="replace")
        except FileNotFoundError:
            return []
        return [access for access in parse_access_log(text) if host is None or access.client == host]

    def sent_bytes(self, host: str | None = None, digests: Collection[str] | None = None) -> int:
        """Bytes of blobs (of all, or of the given ones), counted from the registry's access log."""
        return sum(
            access.size
            for access in self.accesses(host)
            if access.is_blob and (digests is None or access.path.rpartition("/")[2].partition("?")[0] in digests)
        )


@asynccontextmanager
async def open_registry(lab: Path) -> AsyncIterator[Registry]:
    """A fresh, empty registry; ended when the block ends."""
    folder = lab / "registry"
    folder.mkdir()
    registry = Registry(folder, f"127.0.0.1:{free_port()}")
    await registry.start()
    try:
        yield registry
    finally:
        await registry.stop()  # noqa: ASYNC102 - shields itself, and is bounded by SIGKILL


def source_address(number: int) -> str:
    """The address from which the link speaks for node `number` (from 1)."""
    return f"127.0.1.{number}"


@attrs.frozen
class RegistryLink:
    """The running link; `sources` is each node's address in the registry's log."""

    child: Child
    sources: dict[str, str]
    control: Path

    def command(self, word: str) -> dict[str, dict[str, int]]:
        """Send `stats`, `down` or `up`; gives the counters by node: bytes `down` and `up`, `connections`."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(5)
            try:
                sock.connect(str(self.control))
                sock.sendall(word.encode() + b"\n")
                answer = b"".join(iter(lambda: sock.recv(65536), b""))
            except OSError as exc:
                raise LabError(f"the link does not answer: {exc}\n{self.child.tail()}") from exc
        stats: dict[str, dict[str, int]] = json.loads(answer)
        return stats


@asynccontextmanager
async def open_link(
    lab: Path,
    registry: Registry,
    hosts: Sequence[Host],
    *,
    round_trip_s: float = 0.02,
    rate_bps: float = 400e6,
    for_host: bool = False,
) -> AsyncIterator[RegistryLink]:
    """The link between all hosts and the registry. `rate_bps` is in bits a second, shared by all; 0 is unlimited.

    With `for_host` the machine itself reaches the registry through the link too, at the same address as the nodes: for programs
    that somebody else runs outside the lab.
    """
    control = lab / "link.sock"
    sources = {host.name: source_address(number) for number, host in enumerate(hosts, 1)}
    listens = [f"--listen={host.name}={host.netns},{NODE_REGISTRY},{sources[host.name]}" for host in hosts]
    if for_host:
        sources["host"] = source_address(len(hosts) + 1)
        listens.append(f"--listen=host=,{NODE_REGISTRY},{sources['host']}")
    argv = [sys.executable, "-m", "agent.lab.link", "--target", registry.address, "--control", str(control)]
    argv += ["--round-trip", str(round_trip_s), "--rate", str(rate_bps / 8), *listens]
    async with running(start("link", argv, lab / "link.log")) as child:
        await child.wait_ready(control.exists, "listening")
        yield RegistryLink(child, sources, control)
