"""The lab does what benchmarks and fleet tests believe of it: latency, rate, honest counts, and nothing left behind."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import trio

from agent.lab.fleet import Lab, open_lab
from agent.lab.leftovers import LABS, lab_name, lab_processes, own_lab_folder
from agent.lab.processes import LabError, run_command
from agent.lab.registry import NODE_REGISTRY

ROOT = Path(__file__).resolve().parents[3]

_GET = """
import sys, time, urllib.request
began = time.perf_counter()
with urllib.request.urlopen(sys.argv[1]) as answer:
    first = len(answer.read(1))
    to_first = time.perf_counter() - began
    size = first
    while data := answer.read(1 << 18):
        size += len(data)
print(to_first, time.perf_counter() - began, size)
"""


async def _get(lab: Lab, name: str, path: str) -> tuple[float, float, int]:
    done = await run_command([*lab.hosts[name].enter(), sys.executable, "-c", _GET, f"http://{NODE_REGISTRY}{path}"])
    to_first, total, size = done.stdout.split()
    return float(to_first), float(total), int(size)


async def _push_blob(lab: Lab, data: bytes) -> str:
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    async with httpx.AsyncClient(base_url=f"http://{lab.registry.address}", trust_env=False) as client:
        opened = await client.post("/v2/test/blobs/uploads/")
        place = httpx.URL(opened.headers["Location"]).copy_add_param("digest", digest)
        done = await client.put(place, content=data)
        assert done.status_code == 201
    return f"/v2/test/blobs/{digest}"


async def test_link_delays_limits_and_counts() -> None:
    data = os.urandom(20_000_000)
    async with open_lab(["a", "b"], round_trip_s=0.05, rate_bps=200e6) as lab:
        path = await _push_blob(lab, data)
        to_first, total, size = await _get(lab, "a", path)
        assert size == len(data)
        # A handshake and a request: two round trips; 20 MB at 25 MB/s: 0.8 s.
        assert 0.1 <= to_first < 0.3
        assert 0.8 <= total < 1.6

        # Two nodes share the rate.
        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_get, lab, "a", path)
            nursery.start_soon(_get, lab, "b", path)
        assert time.monotonic() - began >= 1.6

        assert lab.registry_log_bytes() == {"a": 2 * len(data), "b": len(data)}
        stats = lab.link.command("stats")
        for name, times in (("a", 2), ("b", 1)):
            assert times * len(data) < stats[name]["down"] < times * len(data) + 4096


async def test_link_can_be_cut_and_mended() -> None:
    async with open_lab(["a"]) as lab:
        path = await _push_blob(lab, b"x" * 1000)
        lab.link.command("down")
        with pytest.raises(LabError):
            await _get(lab, "a", path)
        lab.link.command("up")
        assert (await _get(lab, "a", path))[2] == 1000
        await lab.registry.stop()
        with pytest.raises(LabError):
            await _get(lab, "a", path)
        await lab.registry.start()
        assert (await _get(lab, "a", path))[2] == 1000


async def test_nodes_see_each_other_and_run_containerd() -> None:
    async with open_lab(["a", "b"]) as lab:
        node = await lab.start_node("a", with_agent=False)
        await lab.start_node("b", with_agent=False)
        assert b"SERVER" in (await run_command(node.ctr("version"))).stdout.upper()
        probe = "import socket; print(socket.socket().connect_ex(('10.66.0.2', 1)))"
        refused = await run_command([*lab.hosts["a"].enter(), sys.executable, "-c", probe])
        assert int(refused.stdout) == 111  # ECONNREFUSED: the other node is there, and nobody listens


def _left(lab: Path) -> dict[str, list[str]]:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return {
        "processes": [str(pid) for pid in lab_processes(lab)],
        "mounts": [line for line in mounts if f"{lab}/" in line],
        "netns": [path.name for path in Path("/run/netns").glob(lab_name(lab, "*"))],
        "cgroups": [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/{lab_name(lab, '*')}")],
        "folder": [str(lab)] if lab.exists() else [],
    }


NOTHING: dict[str, list[str]] = {"processes": [], "mounts": [], "netns": [], "cgroups": [], "folder": []}

_VICTIM = """
import subprocess, sys, trio
from agent.lab.fleet import open_lab, until_signal

async def work():
    async with open_lab(["a"]) as lab:
        await lab.start_node("a", with_agent=False)
        place = lab.folder / "a" / "mounted"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "lab", place], check=True)
        print(lab.folder, flush=True)
        await trio.sleep_forever()

sys.exit(trio.run(until_signal, work))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(number: signal.Signals) -> None:
    victim = subprocess.Popen([sys.executable, "-c", _VICTIM], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    with victim:
        lab = Path(victim.stdout.readline().strip())
        assert lab.parent == LABS
        assert _left(lab)["netns"]
        assert _left(lab)["mounts"]
        victim.send_signal(number)
        status = victim.wait(30)
    if number == signal.SIGKILL:
        # Nobody could clean up; the next lab does.
        assert _left(lab)["netns"]
        with own_lab_folder() as other:
            assert other != lab
    else:
        assert status == 128 + number
    assert _left(lab) == NOTHING


def test_a_running_lab_is_left_alone() -> None:
    with own_lab_folder() as first:
        (first / "mine").write_text(json.dumps({}))
        with own_lab_folder():
            assert (first / "mine").exists()
        assert (first / "mine").exists()
    assert _left(first) == NOTHING
