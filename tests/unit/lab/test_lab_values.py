"""The lab's pure parts: pacing of the link, reading the registry's log, ratios of a benchmark."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.demo.story import as_json
from agent.demo.view import Row as DemoRow
from agent.lab.link import Pacer
from agent.lab.publish import BuiltImage
from agent.lab.registry import parse_access_log
from tests.benchmarks.harness import Row

_LOG = """time="2026-11-24T01:00:00Z" level=warning msg="No HTTP secret provided" go.version=go1.19
127.0.1.2 - - [24/Nov/2026:01:00:01 +0000] "GET /v2/sample/blobs/sha256:aa HTTP/1.1" 206 1048576 "" "shoal/0.1"
127.0.1.2 - - [24/Nov/2026:01:00:02 +0000] "GET /v2/sample/manifests/esgz HTTP/1.1" 200 900 "" "containerd/1.6"
127.0.1.3 - - [24/Nov/2026:01:00:03 +0000] "HEAD /v2/sample/blobs/sha256:aa HTTP/1.1" 200 0 "" "x"
127.0.1.3 - - [24/Nov/2026:01:00:04 +0000] "GET /v2/sample/blobs/sha256:bb HTTP/2.0" 200 - "http://x/" "y z"
"""


def test_pacer_books_latency_and_rate() -> None:
    pacer = Pacer(rate=1000.0, delay=0.01)
    assert pacer.book(5.0, 100) == pytest.approx(5.11)
    assert pacer.book(5.0, 100) == pytest.approx(5.21)
    assert pacer.backlog(5.0) == pytest.approx(0.2)
    assert pacer.book(6.0, 0) == pytest.approx(6.01)


def test_pacer_without_a_rate_only_delays() -> None:
    assert Pacer(rate=0.0, delay=0.5).book(1.0, 1 << 40) == 1.5


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1 << 20)), max_size=50))
def test_arrivals_never_overtake(blocks: list[tuple[float, int]]) -> None:
    pacer, now, last = Pacer(50e6, 0.01), 0.0, 0.0
    for pause, size in blocks:
        now += pause
        arrival = pacer.book(now, size)
        assert arrival >= max(last, now + 0.01)
        last = arrival


def test_access_log_tells_clients_apart() -> None:
    accesses = parse_access_log(_LOG)
    assert [(access.client, access.size, access.is_blob) for access in accesses] == [
        ("127.0.1.2", 1048576, True),
        ("127.0.1.2", 900, False),
        ("127.0.1.3", 0, False),
        ("127.0.1.3", 0, True),
    ]


def test_a_row_compares_turn_by_turn() -> None:
    row = Row("start", "s", "full", {"lazy": 0.3})
    for full, lazy in ((10.0, 2.0), (20.0, 5.0), (10.0, 3.0)):
        row.add("full", full)
        row.add("lazy", lazy)
    assert row.ratios("lazy") == [0.2, 0.25, 0.3]
    assert row.met("lazy") is True
    assert row.met("full") is None
    assert row.as_json()["ratio"] == {"lazy": 0.25}
    assert any("0.250 x full" in line for line in row.lines())


def test_a_row_without_baseline_has_an_absolute_limit() -> None:
    row = Row("memory", "MiB", "", {"resident": 150})
    row.add("resident", 151.0)
    assert row.met("resident") is False


def test_the_demo_writes_what_scripts_read() -> None:
    row = DemoRow(
        "node2",
        pull_s=0.5,
        first_output_s=1.0,
        first_bytes=7,
        registry=1,
        peers=2,
        cache=3,
        abandoned=9,
        chunks_verified=4,
        output_ok=True,
    )
    told = json.loads(json.dumps(as_json([row], {"node2": 1}, 100)))
    assert told["registry_log_bytes"] == {"node2": 1}
    assert told["nodes"] == [
        {
            "name": "node2",
            "pull_s": 0.5,
            "first_output_s": 1.0,
            "bytes": {"registry": 1, "peers": 2, "cache": 3},
            "bytes_abandoned": 9,
            "bytes_until_output": 7,
            "chunks_verified": 4,
            "output_ok": True,
        }
    ]


def test_a_manifest_names_its_config_and_layers() -> None:
    image = BuiltImage((), ("/bin/true",), ("A=b",), "")
    manifest = json.loads(image.manifest())
    assert manifest["config"]["size"] == len(image.config())
    assert json.loads(image.config())["config"]["Cmd"] == ["/bin/true"]
