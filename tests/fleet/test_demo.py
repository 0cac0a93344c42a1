"""`shoal demo` as a user runs it: what it shows is true, and nothing of it stays."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent.lab.leftovers import LABS

ROOT = Path(__file__).resolve().parents[2]
SHOAL = Path(sys.executable).with_name("shoal")
SIZE = "--size=80"
"""Megabytes uncompressed; the full size proves no more and takes a minute to compress."""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """One run of the demo; its JSON."""
    target = tmp_path_factory.mktemp("demo") / "result.json"
    done = subprocess.run(
        [SHOAL, "demo", SIZE, "--json", target, "--logs", target.parent / "logs"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "node4" in done.stdout
    told: dict[str, object] = json.loads(target.read_text())
    return told


@pytest.mark.timeout(240)
def test_every_container_ran_and_was_timed(result: dict) -> None:
    assert [node["name"] for node in result["nodes"]] == ["node1", "node2", "node3", "node4"]
    for node in result["nodes"]:
        assert node["output_ok"] is True
        assert 0 < node["pull_s"] < node["first_output_s"]
        assert node["chunks_verified"] > 0


def test_only_the_first_node_asked_the_registry(result: dict) -> None:
    logged = result["registry_log_bytes"]
    for node in result["nodes"]:
        fetched = node["bytes"]
        # The log also has what was under way when node1 gave a request up for a read that could not wait.
        most = fetched["registry"] + node["bytes_abandoned"]
        assert fetched["registry"] <= logged[node["name"]] <= most, "our counters and the registry's log disagree"
        if node["name"] == "node1":
            assert fetched["peers"] == 0
            assert result["image_bytes"] <= fetched["registry"] < 1.05 * result["image_bytes"]
        else:
            assert logged[node["name"]] == 0
            assert result["image_bytes"] * 0.95 < fetched["peers"] + fetched["cache"] < 1.05 * result["image_bytes"]


def _leftovers() -> list[str]:
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(LABS) in line]
    netns = [path.name for path in Path("/run/netns").glob("shoal-*")] if Path("/run/netns").exists() else []
    return [*mounts, *netns, *(str(path) for path in LABS.glob("[!.]*"))]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_cleans_up(number: signal.Signals, result: dict) -> None:
    # On a terminal, as somebody watches it who presses Ctrl-C in the middle of the second node.
    before = _leftovers()
    ours, theirs = pty.openpty()
    process = subprocess.Popen([SHOAL, "demo", SIZE], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    seen = b""
    try:
        while b"node2 joins" not in seen:
            seen += os.read(ours, 65536)
        process.send_signal(number)
        while True:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # EIO: the last writer is gone
                break
        assert process.wait(60) == 128 + number, seen.decode(errors="replace")[-2000:]
    finally:
        os.close(ours)
        process.kill()
        process.wait()
    assert set(_leftovers()) <= set(before)
