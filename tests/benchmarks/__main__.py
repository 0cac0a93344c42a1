"""`make bench`: what Shoal costs and gains, each figure beside its baseline in the same run.

Everything happens on the lab of `agent.lab`: a registry behind 20 ms and 400 Mbit/s, and nodes with their own containerd. Contestants
take turns; what is called cold starts on a wiped node after the machine's caches were dropped.

Other lazy snapshotters take part with `--snapshotter NAME=SOCKET`: their daemon must be running already, in the host's network, where
the registry answers at 127.0.0.1:5000 through the same link. They are pulled with `ctr images pull --snapshotter NAME`, which tells
a snapshotter the image only from containerd 2.0 on (`--containerd`); `--reset NAME=COMMAND` runs before each of their cold starts.
"""

import argparse
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import attrs
import trio

from agent.lab.fleet import Lab, open_lab, quiet_logs, until_signal
from agent.lab.node import Node
from agent.lab.processes import LabError, run_command
from agent.lab.publish import BuiltImage, build_image, default_cache, push_image
from tests.benchmarks.bench_index import WRITERS, measure_all
from tests.benchmarks.formats import FORMS, formats
from tests.benchmarks.harness import Row, drop_caches, fill_caches, resident_bytes, version_of, write_report

ESGZ, GZIP = "sample:esgz", "sample:gzip"

# Timed inside the container: starting one costs the same everywhere and would only blur the ratio.
WALK = ("find", "/", "-xdev", "-ls")
READ = ("find", "/", "-xdev", "-type", "f", "-exec", "cat", "{}", "+")
SETTLE_S = 3.0
"""Agents run long before somebody pulls: joining the fleet is over by then, and is not what is measured."""

TIMER = """
import subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[2:], stdout=subprocess.DEVNULL, check=True)
if sys.argv[1] == "warm":
    began = time.perf_counter()
    subprocess.run(sys.argv[2:], stdout=subprocess.DEVNULL, check=True)
print(time.perf_counter() - began, flush=True)
"""
FETCH = """
import sys, threading, time, urllib.request
def get(url):
    with urllib.request.urlopen(url) as answer:
        while answer.read(1 << 20):
            pass
threads = [threading.Thread(target=get, args=(url,)) for url in sys.argv[1:]]
began = time.perf_counter()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(time.perf_counter() - began)
"""


@attrs.frozen
class Options:
    """What the command line says."""

    repeat: int
    json_path: Path | None
    rows: frozenset[str]
    snapshotters: dict[str, Path]
    resets: dict[str, str]
    containerd: Path | None
    size: int
    round_trip_s: float
    rate_bps: float
    cache: Path
    agent_flags: tuple[str, ...]


@attrs.define
class Bench:
    """A run in progress."""

    options: Options
    lab: Lab
    esgz: BuiltImage
    gzip: BuiltImage
    rows: list[Row] = attrs.field(factory=list)

    def row(self, name: str, unit: str, baseline: str, **limits: float) -> Row:
        """A new row of the report."""
        self.rows.append(Row(name, unit, baseline, limits))
        return self.rows[-1]

    async def fresh(
        self, name: str, *, with_agent: bool = True, bootstrap: tuple[str, ...] = (), flags: tuple[str, ...] = ()
    ) -> Node:
        """A node as new: nothing on its disk, nothing of it in the machine's caches; its agent has been up for `SETTLE_S`.

        The registry's files and those of a peer are in the page cache: they stand for other machines, which are not measured.
        """
        node = self.lab.nodes.get(name)
        flags = (*self.options.agent_flags, *flags)
        if node is None:
            node = await self.lab.start_node(name, with_agent=with_agent, bootstrap=bootstrap, extra=flags)
        else:
            await node.wipe()
            await node.start_containerd()
            if with_agent:
                await node.start_agent(secret=self.lab.secret, bootstrap=bootstrap, extra=flags)
        if with_agent:
            await trio.sleep(SETTLE_S)
        await trio.to_thread.run_sync(drop_caches)
        for folder in (
            self.lab.registry.folder,
            *(node.state_dir for name, node in self.lab.nodes.items() if name.startswith("peer") and node.state_dir.exists()),
        ):
            await trio.to_thread.run_sync(fill_caches, folder)
        return node

    def check(self, output: str, who: str) -> None:
        """A fast wrong answer is no result."""
        if output != self.esgz.expected_output:
            raise LabError(f"{who}: the container printed {output!r}, not {self.esgz.expected_output!r}")

    async def inside(self, node: Node, how: str, command: tuple[str, ...], *, snapshotter: str, image: str) -> float:
        """Seconds of a command inside a container, `cold` (the first run) or `warm` (the second)."""
        script = (self.esgz.command[0], "-c", TIMER, how, *command)
        done = await node.run(self.lab.image(image), script, snapshotter=snapshotter)
        return float(done.stdout)

    async def link_alone(self, node: Node, image: BuiltImage) -> float:
        """Seconds that the link takes for all layers at once: no puller that waits for the last byte can be faster."""
        urls = [f"http://{self.lab.image('v2/sample/blobs')}/{layer.digest}" for layer in image.layers]
        return float((await run_command([*node.host.enter(), sys.executable, "-c", FETCH, *urls])).stdout)

    # -- rows -----------------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """From the pull to the container's first output: full pull, cold, and from a peer that has everything."""
        row = self.row("pull to first output, cold", "s", "full pull", shoal=0.2, **{"shoal from a peer": 0.14})
        fetched = self.row("compressed bytes fetched until then", "MB", "full pull")
        peer = await self.fresh("peer")
        await peer.pull_and_run(self.lab.image(ESGZ))
        await peer.wait_complete(len(self.esgz.layers))
        for _turn in range(self.options.repeat):
            baseline = await self.fresh("baseline", with_agent=False)
            timed = await baseline.pull_and_run(self.lab.image(GZIP), lazy=False)
            self.check(timed.output, "full pull")
            row.add("full pull", timed.first_output_s)
            fetched.add("full pull", self.gzip.size / 1e6)
            for name in self.options.snapshotters:
                await self._other(name, row)
            for label, node_name, bootstrap in (("shoal", "cold", ()), ("shoal from a peer", "joiner", (peer.multiaddr(),))):
                node = await self.fresh(node_name, bootstrap=bootstrap)
                timed = await node.pull_and_run(self.lab.image(ESGZ))
                counted = (await node.status())["bytes"]
                self.check(timed.output, label)
                row.add(label, timed.first_output_s)
                fetched.add(label, (counted["registry"] + counted["peers"]) / 1e6)
                await node.wipe()
        await peer.wipe()

    async def _other(self, name: str, row: Row) -> None:
        baseline = self.lab.nodes["baseline"]
        if name in self.options.resets:
            await trio.to_thread.run_sync(partial(subprocess.run, self.options.resets[name], shell=True, check=True))
        drop_caches()
        began = time.monotonic()
        await baseline.full_pull(self.lab.image(ESGZ), snapshotter=name)
        done = await baseline.run(self.lab.image(ESGZ), snapshotter=name)
        row.add(name, time.monotonic() - began - done.elapsed_s + done.first_output_s)
        self.check(done.stdout.decode().strip(), name)
        await baseline.remove_image(self.lab.image(ESGZ))

    async def files(self) -> None:
        """Walking and reading everything inside a container: warm against overlayfs, cold against the link alone."""
        walk = self.row("find / -ls, warm", "s", "overlayfs", shoal=1.2)
        warm = self.row("all files read, warm", "s", "overlayfs", shoal=1.2)
        cold = self.row("all files read, cold", "s", "link", shoal=1.5)
        whole = self.row("pull and all files read, cold", "s", "link")
        rss = self.row("memory of agent, fsmount and holder after it", "MB", "", resident=150)
        baseline = await self.fresh("baseline", with_agent=False)
        await baseline.full_pull(self.lab.image(GZIP))
        for _turn in range(self.options.repeat):
            node = await self.fresh("cold")
            link_s = await self.link_alone(node, self.esgz)
            for row in (cold, whole):
                row.add("link", link_s)
            await trio.to_thread.run_sync(drop_caches)
            began = time.monotonic()
            await run_command(node.shoal("pull", self.lab.image(ESGZ)))
            cold.add("shoal", await self.inside(node, "cold", READ, snapshotter="shoal", image=ESGZ))
            whole.add("shoal", time.monotonic() - began)
            for row, command in ((walk, WALK), (warm, READ)):
                row.add("overlayfs", await self.inside(baseline, "warm", command, snapshotter="overlayfs", image=GZIP))
                row.add("shoal", await self.inside(node, "warm", command, snapshotter="shoal", image=ESGZ))
            pids = (await node.status())["pids"]
            resident, proportional = resident_bytes([pid for pid in pids.values() if pid])
            rss.add("resident", resident / 1e6)
            rss.add("proportional", proportional / 1e6)
            await node.wipe()


async def index_cost(bench: Bench) -> None:
    """A layer of 100,000 entries in every format, from the bytes of its index to the metadata image."""
    seconds = bench.row("index of 100,000 entries", "s", "", **dict.fromkeys(WRITERS, 4.0))
    peak = bench.row("peak memory of a process that reads it", "MiB", "", **dict.fromkeys(WRITERS, 400.0))
    found = await trio.to_thread.run_sync(partial(measure_all, repeat=bench.options.repeat))
    for form, values in found.items():
        for value in values:
            seconds.add(form, value["seconds"])
            peak.add(form, value["peak_mib"])


async def run(options: Options) -> int:
    """All rows asked for; 1 if a limit was missed."""
    images = {form: await build_image(options.cache, form, size=options.size, progress=print) for form in ("esgz", "gzip")}
    hosts = ("baseline", "cold", "peer", "joiner", *(f"peer-{form}" for form in FORMS if "formats" in options.rows))
    async with open_lab(
        hosts,
        round_trip_s=options.round_trip_s,
        rate_bps=options.rate_bps,
        containerd_binary=options.containerd,
        snapshotters=options.snapshotters,
    ) as lab:
        await push_image(images["esgz"], lab.pushed(ESGZ))
        await push_image(images["gzip"], lab.pushed(GZIP))
        bench = Bench(options, lab, images["esgz"], images["gzip"])
        groups = {
            "start": bench.start,
            "files": bench.files,
            "formats": partial(formats, bench),
            "index": partial(index_cost, bench),
        }
        for name, group in groups.items():
            if name in options.rows:
                await group()
    facts = {
        "image_bytes": {form: image.size for form, image in images.items()},
        "link": {"round_trip_s": options.round_trip_s, "rate_bps": options.rate_bps},
        "containerd": version_of(str(options.containerd or "containerd")),
        "repeat": options.repeat,
        "agent_flags": options.agent_flags,
    }
    write_report(options.json_path, bench.rows, facts)
    return 1 if any(row.met(name) is False for row in bench.rows for name in row.values) else 0


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="turns (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write raw values and ratios")
    parser.add_argument(
        "--rows", default="start,files,formats,index", help="which groups: start, files, formats, index (default: all)"
    )
    parser.add_argument(
        "--snapshotter", type=_pair, action="append", default=[], metavar="NAME=SOCKET", help="another contestant"
    )
    parser.add_argument("--reset", type=_pair, action="append", default=[], metavar="NAME=COMMAND", help="empties its cache")
    parser.add_argument("--containerd", type=Path, metavar="BINARY", help="another containerd, its ctr and shim beside it")
    parser.add_argument(
        "--agent-flag", action="append", default=[], metavar="FLAG", help="passed to every agent, as --agent-flag=--X"
    )
    parser.add_argument("--size", type=int, default=315, metavar="MB", help="size of the image, uncompressed (default: 315)")
    parser.add_argument("--round-trip", type=float, default=20.0, metavar="MS")
    parser.add_argument("--rate", type=float, default=400.0, metavar="MBIT")
    args = parser.parse_args()
    options = Options(
        repeat=args.repeat,
        json_path=args.json,
        rows=frozenset(args.rows.split(",")),
        snapshotters={name: Path(socket) for name, socket in args.snapshotter},
        resets=dict(args.reset),
        containerd=args.containerd,
        size=args.size * 1_000_000,
        round_trip_s=args.round_trip / 1000,
        rate_bps=args.rate * 1e6,
        cache=default_cache(),
        agent_flags=tuple(args.agent_flag),
    )
    quiet_logs()
    try:
        return trio.run(until_signal, partial(run, options))
    except* LabError as group:
        print("bench:", *(str(exc) for exc in group.exceptions), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
