"""`shoal doctor` on machines that are broken on purpose: it finds what is wrong, changes nothing, and does not hang."""

import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from agent.lab.node import shoal
from agent.observe.trial import open_trial
from agent.store.sparse import punch_hole
from tests.agent_harness import open_fleet
from tests.containerd_process import system_containerd

LIMIT_S = 20
"""The doctor gives itself two seconds and its imports; test machines are busy."""


@attrs.frozen
class Diagnosis:
    """What one run of the doctor said."""

    code: int
    findings: list[dict[str, str]]
    seconds: float

    def about(self, subject: str) -> list[dict[str, str]]:
        return [finding for finding in self.findings if finding["subject"] == subject]

    def levels(self, subject: str) -> set[str]:
        return {finding["level"] for finding in self.about(subject)}


def doctor(*flags: str | Path) -> Diagnosis:
    began = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    command = [*shoal(), "doctor", "--json", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment)
    assert done.stdout, done.stderr
    return Diagnosis(done.returncode, json.loads(done.stdout), time.monotonic() - began)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="shoal-", dir="/var/tmp") as name:
        yield Path(name)


@pytest.fixture
def tmpfs(folder: Path) -> Iterator[Path]:
    place = folder / "memory"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "shoal-test", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_machine_where_everything_is_wrong(folder: Path, tmpfs: Path, busy_port: int) -> None:
    secret = folder / "secret"
    secret.write_bytes(b"x" * 40)
    secret.chmod(0o644)
    run_dir = folder / "run"
    run_dir.mkdir()
    before = (Path("/proc/self/mounts").read_text(), sorted(tmpfs.rglob("*")))
    with socket.socket(socket.AF_UNIX) as mute:  # an agent that hangs: it takes connections and never answers
        mute.bind(str(run_dir / "agent.sock"))
        mute.listen()
        found = doctor(
            f"--state-dir={tmpfs / 'state'}",
            f"--run-dir={run_dir}",
            f"--fleet-secret-file={secret}",
            f"--data-listen=127.0.0.1:{busy_port}",
            "--listen=/ip4/127.0.0.1/tcp/0",
            f"--bootstrap-peers=/ip4/127.0.0.1/tcp/{_closed_port()}",
            f"--containerd-address={folder / 'none.sock'}",
            f"--docker-config={folder / 'none.json'}",
        )
    assert found.code == 1
    assert found.levels("fleet secret") == {"error"}
    assert found.about("fleet secret")[0]["remedy"] == f"chmod 600 {secret}"
    (port,) = found.about("--data-listen")
    assert port["level"] == "error"
    assert f"(process {os.getpid()})" in port["text"]
    assert "warning" in found.levels("state_dir")
    assert any("lost at a reboot" in finding["text"] for finding in found.about("state_dir"))
    assert found.levels("cache_quota") == {"warning"}
    assert found.levels("registry credentials") == {"error"}
    (agent,) = found.about("agent")
    assert (agent["level"], "does not answer" in agent["text"]) == ("error", True)
    (peer,) = (finding for finding in found.findings if finding["subject"].startswith("bootstrap peer "))
    assert "refused" in peer["text"]
    assert all(finding["remedy"] for finding in found.findings if finding["level"] in {"warning", "error"})
    # By trying: a real FUSE mount, a real overlay, a real layer under each presentation.
    assert found.levels("presentations") <= {"ok", "note", "warning"}
    assert "tried just now" in found.about("presentations")[0]["text"]
    assert (Path("/proc/self/mounts").read_text(), sorted(tmpfs.rglob("*"))) == before
    assert found.seconds < LIMIT_S / 2


def test_a_containerd_that_does_not_know_us(folder: Path) -> None:
    binaries = system_containerd()
    if binaries is None:
        pytest.skip("no containerd 1.x on this machine: apt-get install containerd runc")
    address = folder / "c.sock"
    config = folder / "config.toml"
    config.write_text(
        f'version = 2\nroot = "{folder}/root"\nstate = "{folder}/state"\n'
        f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\n  address = "{address}"\n'
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([binaries.folder / "containerd", "--config", config], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 20
            while not address.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)  # it tells nobody when it is ready
            found = doctor(
                f"--run-dir={folder / 'run'}", f"--state-dir={folder / 'state-dir'}", f"--containerd-address={address}"
            )
        finally:
            process.terminate()
            process.wait(10)
    assert found.levels("containerd") == {"ok"}, found.about("containerd")
    (snapshotter,) = found.about("snapshotter")
    assert snapshotter["level"] == "warning"
    assert "[proxy_plugins.shoal]" in snapshotter["remedy"]
    assert f'address = "{folder / "run" / "containerd.sock"}"' in snapshotter["remedy"]
    assert found.code == 0
    assert not (folder / "run").exists()
    assert not (folder / "state-dir").exists()


@pytest.mark.parametrize("is_alive", [False, True])
def test_an_fsmount_that_is_dead_or_hangs(folder: Path, is_alive: bool) -> None:
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(folder / "fsmount.sock"))
        if is_alive:
            mute.listen()
        found = doctor(f"--run-dir={folder}", f"--state-dir={folder}", "--no-snapshotter")
    if is_alive:
        assert found.levels("fsmount") == {"error"}
        assert "does not answer" in found.about("fsmount")[0]["text"]
    else:
        assert "tried just now" in found.about("presentations")[0]["text"]
        assert not found.about("fsmount")


async def test_a_node_that_is_well() -> None:
    async with open_fleet() as fleet:
        first = await fleet.node()
        second = await fleet.node()
        await second.wait_status(lambda status: status["peers"] == 1, "in the fleet")
        listens = (f"--listen=/ip4/127.0.0.1/tcp/{second.control_port}", f"--data-listen=127.0.0.1:{second.data_port}")
        done = await second.shoal(
            "doctor",
            "--json",
            f"--state-dir={second.folder / 'state'}",
            f"--fleet-secret-file={fleet.secret}",
            f"--bootstrap-peers={first.address}",
            "--no-snapshotter",
            *listens,
            check=False,
        )
        found = Diagnosis(done.status, json.loads(done.stdout), 0)
        assert found.code == 0, [finding for finding in found.findings if finding["level"] == "error"]
        assert found.levels("agent") == {"ok"}
        assert found.levels("--listen") == found.levels("--data-listen") == {"ok"}
        assert "held by this node's agent" in found.about("--listen")[0]["text"]
        assert "says fsmount" in found.about("presentations")[0]["text"]
        assert found.levels(f"bootstrap peer {first.address}") == {"ok"}
        assert found.levels("fleet") == {"ok"}


def test_a_trial_that_says_nothing_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "setpriv").write_text("#!/bin/sh\nexec sleep 60\n")
    (folder / "setpriv").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    with open_trial(None, with_fsmount=True) as trial:
        assert trial.wait(0.2) is False
        assert trial.attempts == {}


def test_holes_are_really_punched(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        before = os.fstat(file.fileno()).st_blocks
        assert punch_hole(file.fileno(), 0, 1 << 19)
        assert os.fstat(file.fileno()).st_blocks < before


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
