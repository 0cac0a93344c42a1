"""One node of a lab: its network namespace, its containerd, its Shoal agent."""

import os
import platform
import re
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from agent.admin.client import call
from agent.lab.leftovers import lab_name, unmount_below
from agent.lab.network import Host
from agent.lab.processes import Child, Finished, LabError, run_command, socket_answers, start
from agent.lab.processes import call as call_tool

CONTROL_PORT: Final = 4405
DATA_PORT: Final = 4406

_status_calls: Final = trio.CapacityLimiter(8)
"""Threads that wait for agents' answers; more than nodes in any lab."""

_CONTAINERD: Final = """version = 2
root = "{root}"
state = "{state}"
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.nri.v1.nri",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.erofs",
  "io.containerd.internal.v1.tracing", "io.containerd.internal.v1.opt",
]
[grpc]
address = "{address}"
[ttrpc]
address = "{address}.ttrpc"
[proxy_plugins]
"""

_PROXY_PLUGIN: Final = """  [proxy_plugins.{name}]
  type = "snapshot"
  address = "{address}"
"""


# containerd 2 pulls through its transfer service, which unpacks only with what is listed here and tells a proxy the image only if
# the plugin's exports say so.
_EXPORTS: Final = """  [proxy_plugins.{name}.exports]
  enable_remote_snapshot_annotations = "true"
"""
_UNPACK: Final = """[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux/{machine}"
snapshotter = "{name}"
"""


@attrs.frozen
class Timed:
    """A pull and a start: seconds of the pull, seconds from the pull's begin to the container's first output, and that output."""

    pull_s: float
    first_output_s: float
    output: str


@attrs.define(eq=False)
class Node:
    """A machine of the lab; `containerd_binary` names another containerd, its ctr and shim beside it."""

    lab: Path
    host: Host
    containerd_binary: Path | None = None
    snapshotters: dict[str, Path] = attrs.field(factory=dict)
    agent: Child | None = None
    containerd: Child | None = None
    _containers: int = 0

    @property
    def name(self) -> str:
        """Its name in tables."""
        return self.host.name

    @property
    def folder(self) -> Path:
        """Everything on this node's disk."""
        return self.lab / self.name

    @property
    def run_dir(self) -> Path:
        """The agent's run directory."""
        return self.folder / "run"

    @property
    def state_dir(self) -> Path:
        """The agent's state directory."""
        return self.folder / "state"

    @property
    def address(self) -> Path:
        """containerd's socket."""
        return self.folder / "containerd.sock"

    def _tool(self, name: str) -> str:
        return name if self.containerd_binary is None else str(self.containerd_binary.with_name(name))

    # -- containerd -----------------------------------------------------------------------------------------------------------------

    async def start_containerd(self) -> None:
        """Start containerd with the agent's and all other known snapshotters as proxy plugins."""
        self.folder.mkdir(exist_ok=True)
        config = self.folder / "containerd.toml"
        text = _CONTAINERD.format(root=self.folder / "containerd", state=self.folder / "containerd-state", address=self.address)
        has_transfer = not re.search(r" v?1\.", call_tool(self._tool("containerd"), "--version"))
        proxies = {"shoal": self.run_dir / "containerd.sock", **self.snapshotters}
        for name, socket in proxies.items():
            text += _PROXY_PLUGIN.format(name=name, address=socket) + (_EXPORTS.format(name=name) if has_transfer else "")
        if has_transfer:
            machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
            text += "".join(_UNPACK.format(name=name, machine=machine) for name in ("overlayfs", *proxies))
        config.write_text(text)
        argv: list[str | Path] = [*self.host.enter(), self._tool("containerd"), "--config", config, "--log-level", "warn"]
        env = dict(os.environ)
        if self.containerd_binary is not None:  # it looks for its shim on the PATH first, and would find the system's
            env["PATH"] = f"{self.containerd_binary.parent}:{env.get('PATH', '/usr/sbin:/usr/bin:/sbin:/bin')}"
        self.containerd = start(f"containerd of {self.name}", argv, self.folder / "containerd.log", env=env, dies_with_us=False)
        await self.containerd.wait_ready(lambda: socket_answers(self.address), "its socket answers")

    def ctr(self, *words: str | Path) -> list[str]:
        """A ctr command for this node's containerd, in its network."""
        return [*self.host.enter(), self._tool("ctr"), "--address", str(self.address), *(str(word) for word in words)]

    async def full_pull(self, image: str, *, snapshotter: str = "overlayfs") -> Finished:
        """containerd's own pull: download and unpack everything."""
        return await run_command(self.ctr("images", "pull", "--plain-http", "--snapshotter", snapshotter, image))

    async def run(self, image: str, command: Sequence[str] = (), *, snapshotter: str = "shoal", check: bool = True) -> Finished:
        """Run a container to its end; the image's own command if none is given."""
        self._containers += 1
        container = lab_name(self.lab, f"{self.name}-{self._containers}")
        # Names the cgroup: what a killed lab leaves is found by it.
        words = ["run", "--rm", "--snapshotter", snapshotter, "--cgroup", f"/shoal-labs/{container}", image, container, *command]
        return await run_command(self.ctr(*words), check=check)

    async def remove_image(self, image: str) -> None:
        """Forget an image in containerd and collect its snapshots before returning."""
        await run_command(self.ctr("images", "remove", "--sync", image))

    # -- Shoal ----------------------------------------------------------------------------------------------------------------------

    async def start_agent(self, *, secret: Path | None = None, bootstrap: Sequence[str] = (), extra: Sequence[str] = ()) -> None:
        """Start `shoal agent` (and with it fsmount) and wait until it says that it is ready."""
        self.folder.mkdir(exist_ok=True)
        argv: list[str | Path] = [*self.host.enter(), *shoal(), "agent", "--run-dir", self.run_dir, "--state-dir", self.state_dir]
        argv += ["--containerd-address", self.address]
        argv += ["--listen", f"/ip4/0.0.0.0/tcp/{CONTROL_PORT}", "--data-listen", f"0.0.0.0:{DATA_PORT}"]
        if secret is not None:
            argv += ["--fleet-secret-file", secret]
        if bootstrap:
            argv += ["--bootstrap-peers", ",".join(bootstrap)]
        log = self.folder / "agent.log"
        seen = log.stat().st_size if log.exists() else 0
        self.agent = start(f"agent of {self.name}", [*argv, *extra], log, dies_with_us=False)

        def is_ready() -> bool:
            with log.open("rb") as stream:
                stream.seek(seen)
                said = stream.read()
            return re.search(rb"\bready\b", said) is not None and socket_answers(self.run_dir / "agent.sock")

        await self.agent.wait_ready(is_ready, "it says that it is ready")

    def multiaddr(self) -> str:
        """Where other nodes reach its agent."""
        return f"/ip4/{self.host.address}/tcp/{CONTROL_PORT}"

    def shoal(self, *words: str | Path) -> list[str]:
        """A client command for this node's agent."""
        command, *rest = words
        return [*shoal(), str(command), "--run-dir", str(self.run_dir), *(str(word) for word in rest)]

    async def client(self, *words: str | Path, timeout_s: float = 300.0) -> Finished:
        """Run a client command to its end.

        Raises:
            LabError: it failed; if the agent has ended, with its status and the end of its log.
        """
        try:
            return await run_command(self.shoal(*words), timeout_s=timeout_s)
        except LabError as exc:
            if self.agent is not None and not self.agent.is_running():
                raise LabError(f"{exc}\nthe agent ended with status {self.agent.popen.returncode}:\n{self.agent.tail()}") from exc
            raise

    async def status(self) -> dict[str, Any]:
        """What `shoal status --json` says, asked without the cost of a process: views ask several times a second."""
        status: dict[str, Any] = await trio.to_thread.run_sync(call, self.run_dir, "status", limiter=_status_calls)
        return status

    async def wait_complete(self, layers: int, *, timeout_s: float = 120.0) -> float:
        """Wait until the background fetch has brought every piece of `layers` layers; gives the seconds it took.

        Raises:
            LabError: it did not.
        """
        began = time.monotonic()
        while True:
            held = (await self.status())["layers"]
            if len(held) >= layers and all(layer["pieces_held"] == layer["pieces"] for layer in held):
                return time.monotonic() - began
            if time.monotonic() - began > timeout_s:
                raise LabError(f"{self.name} does not hold the whole image after {timeout_s:.0f} s: {held}")
            await trio.sleep(0.1)  # `status` is a question, not a subscription

    async def pull_and_run(self, image: str, command: Sequence[str] = (), *, lazy: bool = True) -> Timed:
        """Pull (with `shoal pull`, or containerd's full pull) and start a container, as somebody would who waits for it."""
        began = time.monotonic()
        if lazy:
            await self.client("pull", image)
        else:
            await self.full_pull(image)
        pull_s = time.monotonic() - began
        done = await self.run(image, command, snapshotter="shoal" if lazy else "overlayfs", check=False)
        output = done.stdout.decode("utf-8", "replace").strip()
        if done.status:
            output += f"\n(status {done.status}) {done.stderr[-2000:].decode('utf-8', 'replace').strip()}"
        first = pull_s + done.first_output_s if done.first_output_s >= 0 else -1.0
        return Timed(pull_s, first, output)

    async def stop(self) -> None:
        """End containers, containerd, agent and fsmount in an order that leaves no mount behind."""
        if self.containerd is not None:
            await self.containerd.stop()
        if self.agent is not None:
            if self.agent.is_running():
                await self.agent.stop(signal.SIGTERM)
            await run_command([*shoal(), "fsmount", "--stop", "--run-dir", str(self.run_dir)], timeout_s=15, check=False)

    async def wipe(self) -> None:
        """Stop everything and forget everything: the next start is that of a new machine."""
        await self.stop()
        unmount_below(self.folder)
        await trio.to_thread.run_sync(shutil.rmtree, self.folder, True)


def shoal() -> list[str]:
    """How this very installation's `shoal` is started."""
    script = Path(sys.executable).with_name("shoal")
    return [str(script)] if script.exists() else [sys.executable, "-m", "agent.cli"]


@asynccontextmanager
async def open_node(
    lab: Path, host: Host, *, containerd_binary: Path | None = None, snapshotters: Mapping[str, Path] | None = None
) -> AsyncIterator[Node]:
    """A node with containerd running and no agent yet; everything of it is ended when the block ends."""
    node = Node(lab, host, containerd_binary, dict(snapshotters or {}))
    try:
        await node.start_containerd()
        yield node
    finally:
        with trio.CancelScope(shield=True):
            await node.stop()
