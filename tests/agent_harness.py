"""Whole agents for end-to-end tests: processes of `shoal agent` and fsmount, a real registry, and images to push to it.

Everything lives in one lab folder (`agent.lab.leftovers`), and every process names it on its command line: what a test that was
killed leaves behind is removed by the next one. Nodes share this machine's loopback; each reaches the registry through a proxy of
its own, from a source address of its own, so that the registry's access log says what it sent to whom.
"""

import json
import os
import secrets
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs
import pytest
import trio

from agent.admin.client import call
from agent.formats.model import Digest, digest_of
from agent.lab.leftovers import own_lab_folder
from agent.lab.node import shoal
from agent.lab.processes import Child, Finished, run_command, socket_answers, start
from agent.lab.publish import CONFIG_TYPE, LAYER_TYPE, MANIFEST_TYPE
from agent.lab.registry import Registry, free_port, open_registry
from agent.registry import ImageReference, open_registry_client
from tests.sample_layers import Layer
from tests.wire_proxy import Proxy, start_proxy

Result = TypeVar("Result")

READ_DEADLINE_S = 20
_threads = trio.CapacityLimiter(16)


async def in_thread(work: Callable[..., Result], *args: object) -> Result:
    """File work on a mount may wait for the network that this very process plays: never on the event loop."""
    return await trio.to_thread.run_sync(work, *args, limiter=_threads, abandon_on_cancel=True)


def drop_caches() -> None:
    """Have the kernel forget file data and names, so that the next read asks fsmount."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def read_errno(path: Path) -> tuple[int, float]:
    """(the error of reading the file, 0 if there was none; the seconds it took)."""
    began = time.monotonic()
    try:
        path.read_bytes()
    except OSError as exc:
        return exc.errno or -1, time.monotonic() - began
    return 0, time.monotonic() - began


@attrs.define(eq=False)
class AgentNode:
    """One node: its folders, its ports, its agent process (or none, while it is dead)."""

    lab: Path
    name: str
    proxy: Proxy
    settings: tuple[str, ...]
    secret: Path | None
    control_port: int = attrs.field(factory=free_port)
    data_port: int = attrs.field(factory=free_port)
    child: Child | None = None

    @property
    def folder(self) -> Path:
        """Everything of this node."""
        return self.lab / self.name

    @property
    def run_dir(self) -> Path:
        """Sockets and mounts."""
        return self.folder / "run"

    @property
    def store(self) -> Path:
        """The store's folder."""
        return self.folder / "state" / "store"

    @property
    def log(self) -> Path:
        """What the agent says."""
        return self.folder / "agent.log"

    @property
    def address(self) -> str:
        """For other nodes' --bootstrap-peers."""
        return f"/ip4/127.0.0.1/tcp/{self.control_port}"

    def image(self, name: str) -> str:
        """An image's reference as this node writes it."""
        return f"{self.proxy.address}/{name}"

    def layer_dir(self, digest: str) -> Path:
        """Where a layer is mounted."""
        return self.run_dir / "layers" / digest.removeprefix("sha256:")

    def stored(self, digest: str) -> Path:
        """A layer's files in the store."""
        return self.store / "layers" / digest.removeprefix("sha256:")

    def launch(self, bootstrap: Sequence[str] = ()) -> Callable[[], bool]:
        """Start the agent's process; what it gives tells whether it is ready yet."""
        self.folder.mkdir(exist_ok=True)
        argv = [*shoal(), "agent", "--run-dir", str(self.run_dir), "--state-dir", str(self.folder / "state"), "--no-snapshotter"]
        argv += ["--listen", f"/ip4/127.0.0.1/tcp/{self.control_port}", "--data-listen", f"127.0.0.1:{self.data_port}"]
        argv += ["--containerd-address", str(self.folder / "no-containerd.sock"), "--log-format", "json"]
        if self.secret is not None:
            argv += ["--fleet-secret-file", str(self.secret)]
        if bootstrap:
            argv += ["--bootstrap-peers", ",".join(bootstrap)]
        seen = self.log.stat().st_size if self.log.exists() else 0
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
        self.child = start(f"agent of {self.name}", [*argv, *self.settings], self.log, env=environment, dies_with_us=False)

        def is_ready() -> bool:
            with self.log.open("rb") as stream:
                stream.seek(seen)
                return b"shoal agent is ready" in stream.read() and socket_answers(self.run_dir / "agent.sock")

        return is_ready

    async def start(self, bootstrap: Sequence[str] = ()) -> None:
        """Start the agent and wait until it says that it is ready."""
        is_ready = self.launch(bootstrap)
        assert self.child is not None
        await self.child.wait_ready(is_ready, "it says that it is ready")

    async def kill(self) -> None:
        """SIGKILL, at once."""
        assert self.child is not None
        await self.child.stop(signal.SIGKILL)

    async def stop(self) -> int:
        """SIGTERM; gives the exit status."""
        assert self.child is not None
        await self.child.stop(signal.SIGTERM)
        return self.child.popen.returncode

    async def shoal(self, *words: str | Path, check: bool = True, timeout_s: float = 60) -> Finished:
        """A client command for this node."""
        command, *rest = words
        return await run_command([*shoal(), command, "--run-dir", self.run_dir, *rest], check=check, timeout_s=timeout_s)

    async def status(self) -> dict[str, Any]:
        """What `shoal status --json` prints, without the cost of a process."""
        found: dict[str, Any] = await in_thread(call, self.run_dir, "status")
        return found

    async def mount(self, name: str, directory: str = "root", *, how: str = "") -> Path:
        """`shoal mount` of an image; gives where. `how` is the presentation that it must say it took."""
        target = self.folder / directory
        done = await self.shoal("mount", self.image(name), target)
        assert how in done.stdout.decode()
        return target

    async def wait_status(self, is_so: Callable[[dict[str, Any]], bool], what: str, timeout_s: float = 30) -> dict[str, Any]:
        """Ask until it is so. `status` is a question, not a subscription."""
        with trio.move_on_after(timeout_s):
            while True:
                found = await self.status()
                if is_so(found):
                    return found
                await trio.sleep(0.05)
        raise AssertionError(f"{self.name}: not {what} after {timeout_s} s: {await self.status()}")

    async def wait_complete(self) -> dict[str, Any]:
        """Until every byte of every known layer is here."""
        return await self.wait_status(
            lambda status: bool(status["layers"]) and all(layer["pieces_held"] == layer["pieces"] for layer in status["layers"]),
            "whole",
        )

    def events(self, name: str) -> list[dict[str, Any]]:
        """Lines of the agent's log with that event."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            if line.startswith("{"):
                record = json.loads(line)
                if record.get("event") == name:
                    found.append(record)
        return found

    async def end(self) -> None:
        """End the agent and fsmount, and whatever is mounted."""
        if self.child is not None:
            await self.child.stop(signal.SIGTERM, grace_s=5)
            await self.shoal("fsmount", "--stop", check=False, timeout_s=20)


@attrs.define(eq=False)
class Fleet:
    """The lab: a registry and the nodes so far."""

    folder: Path
    registry: Registry
    secret: Path
    nursery: trio.Nursery
    nodes: list[AgentNode] = attrs.field(factory=list)

    async def node(
        self,
        *settings: str,
        in_fleet: bool = True,
        rate: float = 0.0,
        bootstrap: Sequence[AgentNode] | None = None,
        is_started: bool = True,
    ) -> AgentNode:
        """A new node; it joins through all others unless told otherwise."""
        number = len(self.nodes) + 1
        proxy = await start_proxy(self.nursery, self.registry.address, is_http=True, source=f"127.0.2.{number}", rate=rate)
        if not any(word.startswith("--read-deadline") for word in settings):
            settings = (*settings, f"--read-deadline={READ_DEADLINE_S}s")
        node = AgentNode(self.folder, f"n{number}", proxy, settings, self.secret if in_fleet else None)
        others = self.nodes if bootstrap is None else bootstrap
        self.nodes.append(node)
        if is_started:
            await node.start([other.address for other in others] if in_fleet else [])
        return node

    async def check_registry_bytes(self, node: AgentNode) -> int:
        """The node's own count agrees with the registry's log, which also has what was under way when the node gave a request up;
        gives the node's count."""
        status = await node.status()
        counted: int = status["bytes"]["registry"]
        assert counted <= self.registry_bytes(node) <= counted + status["abandoned_bytes"]
        return counted

    def registry_bytes(self, node: AgentNode) -> int:
        """Bytes of blobs sent to the node, by the registry's own access log."""
        return self.registry.sent_bytes(node.proxy.source)


@asynccontextmanager
async def open_fleet() -> AsyncIterator[Fleet]:
    """A registry and no node yet; everything is ended and removed when the block ends."""
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("mounting needs root and /dev/fuse: modprobe fuse")
    if shutil.which("docker-registry") is None:
        pytest.skip("no docker-registry: apt-get install docker-registry")
    with own_lab_folder() as folder:
        secret = folder / "secret"
        secret.touch(mode=0o600)
        secret.write_text(secrets.token_hex(32))
        async with open_registry(folder) as registry, trio.open_nursery() as nursery:
            fleet = Fleet(folder, registry, secret, nursery)
            try:
                yield fleet
            finally:
                with trio.CancelScope(shield=True), trio.move_on_after(60):
                    for node in reversed(fleet.nodes):
                        await node.end()
                nursery.cancel_scope.cancel()


# --- images ------------------------------------------------------------------------------------------------------------------


async def push_layers(fleet: Fleet, name: str, layers: Sequence[Layer]) -> None:
    """Put an image of these layers (bottom first) into the registry as NAME:TAG."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    config = json.dumps(
        {"architecture": machine, "os": "linux", "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]}}
    ).encode()
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": digest_of(config), "size": len(config)},
            "layers": [
                {"mediaType": LAYER_TYPE, "digest": layer.digest, "size": layer.size, "annotations": layer.annotations}
                for layer in layers
            ],
        }
    ).encode()
    target = ImageReference.parse(f"{fleet.registry.address}/{name}")
    async with open_registry_client(None, None) as registry:
        for layer in layers:
            await registry.push_blob(target, layer.path, layer.digest)
        await registry.push_blob(target, config, digest_of(config))
        await registry.push_manifest(target, manifest, MANIFEST_TYPE)


async def push_fixtures(fleet: Fleet, fixtures: Path, tags: Sequence[str]) -> dict[str, list[str]]:
    """Put fixture images into the registry as fixtures:TAG; gives each one's layers, bottom first."""
    images = fixtures / "images"

    def blob(digest: str) -> Path:
        return images / "blobs" / "sha256" / digest.removeprefix("sha256:")

    index = {
        entry["annotations"]["org.opencontainers.image.ref.name"]: entry
        for entry in json.loads((images / "index.json").read_bytes())["manifests"]
    }
    layers: dict[str, list[str]] = {}
    async with open_registry_client(None, None) as registry:

        async def push(target: ImageReference, entry: dict[str, Any]) -> list[str]:
            raw = blob(entry["digest"]).read_bytes()
            document = json.loads(raw)
            found: list[str] = []
            if "manifests" in document:
                for inner in document["manifests"]:
                    found += await push(attrs.evolve(target, tag=None, digest=inner["digest"]), inner)
            else:
                for part in (document["config"], *document["layers"]):
                    await registry.push_blob(target, blob(part["digest"]), Digest(part["digest"]))
                found = [layer["digest"] for layer in document["layers"]]
            await registry.push_manifest(target, raw, entry["mediaType"])
            return found

        for tag in tags:
            layers[tag] = await push(ImageReference.parse(f"{fleet.registry.address}/fixtures:{tag}"), index[tag])
    return layers
