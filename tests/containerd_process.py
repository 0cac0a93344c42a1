"""Real containerds, each with a private root, state and socket."""

import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import grpc
import trio

from agent.runtimes.containerd.client import open_containerd
from agent.runtimes.containerd.configuration import config_snippet

START_S = 30


@attrs.frozen
class ContainerdBinaries:
    """Where one version lies: the machine's own (1.x) or the one built by tests/conformance/build.sh (2.x)."""

    major: int
    folder: Path


@attrs.frozen
class RunningContainerd:
    """A containerd to talk to. `ctr` runs its own client."""

    binaries: ContainerdBinaries
    address: str
    log: Path

    async def ctr(self, *arguments: str, namespace: str = "default", check: bool = True) -> str:
        command = [str(self.binaries.folder / "ctr"), "--address", self.address, "--namespace", namespace, *arguments]
        done = await trio.run_process(
            command, capture_stdout=True, capture_stderr=True, check=False, env=_environment(self.binaries)
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: {done.stderr.decode()}\n{self.log.read_text()[-6000:]}")
        return done.stdout.decode()


@asynccontextmanager
async def run_containerd(
    binaries: ContainerdBinaries, folder: Path, socket: Path, state_dir: Path
) -> AsyncIterator[RunningContainerd]:
    """A containerd with the snapshotter at `socket`, set up by exactly the text that `shoal doctor` prints."""
    folder.mkdir(exist_ok=True)
    config = folder / "config.toml"
    snippet = config_snippet(binaries.major, socket, state_dir)
    head, rest = snippet.split("\n", 1)
    address = folder / "c.sock"
    config.write_text(f'{head}\nroot = "{folder}/root"\nstate = "{folder}/state"\n[grpc]\n  address = "{address}"\n{rest}')
    log = folder / "log"
    command = [binaries.folder / "containerd", "--config", config, "--address", address, "--log-level", "debug"]
    with log.open("ab") as output:
        async with trio.open_nursery() as nursery:
            run = partial(trio.run_process, command, stdout=output, stderr=output, check=False, env=_environment(binaries))
            process: trio.Process = await nursery.start(run)
            running = RunningContainerd(binaries, str(address), log)
            try:
                await _wait(running, process)
                yield running
            finally:
                process.terminate()
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
                    await process.wait()
                nursery.cancel_scope.cancel()


async def _wait(running: RunningContainerd, process: trio.Process) -> None:
    with trio.move_on_after(START_S):
        while process.poll() is None:
            if Path(running.address).exists():
                async with open_containerd(running.address) as client:
                    try:
                        await client.version()
                    except Exception:
                        await trio.sleep(0.05)  # it tells nobody when it is ready
                        continue
                return
            await trio.sleep(0.05)
    raise AssertionError(f"containerd did not start:\n{running.log.read_text()[-6000:]}")


async def pull_through_cri(containerd: RunningContainerd, ref: str) -> None:
    """What kubelet does: `runtime.v1.ImageService/PullImage`. Two nested fields, so the message is written by hand."""
    spec = b"\x0a" + bytes([len(ref)]) + ref.encode()
    request = b"\x0a" + bytes([len(spec)]) + spec

    def call() -> None:
        with grpc.insecure_channel(f"unix:{containerd.address}", options=[("grpc.default_authority", "localhost")]) as channel:
            pull = channel.unary_unary("/runtime.v1.ImageService/PullImage", bytes, bytes)
            try:
                pull(request, timeout=30, wait_for_ready=True)
            except grpc.RpcError as exc:
                raise AssertionError(f"{exc}\n{containerd.log.read_text()[-6000:]}") from exc

    await trio.to_thread.run_sync(call)


def _environment(binaries: ContainerdBinaries) -> dict[str, str]:
    return {**os.environ, "PATH": f"{binaries.folder}:{os.environ['PATH']}"}


def system_containerd() -> ContainerdBinaries | None:
    """The machine's containerd, None if it has none of version 1."""
    path = shutil.which("containerd")
    if path is None:
        return None
    text = subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout
    version = text.split()[2].lstrip("v")
    return ContainerdBinaries(1, Path(path).resolve().parent) if version.startswith("1.") else None
