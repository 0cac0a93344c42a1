"""The same image in every format: cold start, start from a peer, and bytes fetched, each beside eStargz in the same turn."""

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from agent.formats import estargz
from agent.lab.processes import run_command
from agent.lab.publish import BuiltImage

if TYPE_CHECKING:
    from tests.benchmarks.__main__ import Bench

CONVERTED: Final = {"estargz": "sample:by-estargz", "zstd-chunked": "sample:by-zstd-chunked", "nydus": "sample:by-nydus"}
PLAIN: Final = "sample:gzip"
FORMS: Final = (*CONVERTED, "plain")
TRUST: Final = ("--trust-fleet-indexes",)


def wanted_first(image: BuiltImage) -> list[str]:
    """The files before the landmark of each layer of an eStargz image, in order: what the sample's start reads."""
    found: list[str] = []
    for layer in image.layers:
        data = layer.path.read_bytes()
        footer = estargz.parse_footer(data[-estargz.FOOTER_SIZE :], len(data))
        assert footer is not None
        toc = json.loads(estargz.unpack_toc(data[footer.toc_offset : len(data) - footer.footer_size]))
        names = [entry["name"] for entry in toc["entries"] if entry["type"] in {"reg", "hardlink"}]
        if estargz.PREFETCH_LANDMARK in names:
            found += names[: names.index(estargz.PREFETCH_LANDMARK)]
    return found


async def convert_all(bench: "Bench") -> None:
    """Convert the plain image with `shoal convert`, every format with the same files first."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "first"
        listed.write_text("\n".join(wanted_first(bench.esgz)) + "\n")
        for form, name in CONVERTED.items():
            source, target = bench.lab.pushed(PLAIN), bench.lab.pushed(name)
            command = ("convert", source, target, "--to", form, "--prefetch", listed, "--quiet")
            await run_command([sys.executable, "-m", "agent.cli", *command], timeout_s=300)


async def formats(bench: "Bench") -> None:
    """Rows of the group `formats`."""
    cold = bench.row("pull to first output by format, cold", "s", "estargz", **{"zstd-chunked": 1.15, "nydus": 1.15})
    warm = bench.row("pull to first output by format, from a peer", "s", "estargz", **{"plain, fleet's index": 1.3})
    fetched = bench.row("compressed bytes fetched until then, cold", "MB", "estargz")
    plain = bench.row("plain image, first node", "s", "full pull", shoal=0.7)
    await convert_all(bench)
    images = {**CONVERTED, "plain": PLAIN}
    # One peer for each format: a node that has the same files in another one copies them, and has no pieces to give then.
    peers = {form: await bench.fresh(f"peer-{form}", flags=TRUST) for form in images}
    for form, name in images.items():
        await peers[form].pull_and_run(bench.lab.image(name))
        await peers[form].wait_complete(len(bench.gzip.layers))
    for _turn in range(bench.options.repeat):
        baseline = await bench.fresh("baseline", with_agent=False)
        timed = await baseline.pull_and_run(bench.lab.image(PLAIN), lazy=False)
        bench.check(timed.output, "full pull")
        plain.add("full pull", timed.first_output_s)
        plain.add("the link alone", await bench.link_alone(baseline, bench.gzip))
        for form, name in images.items():
            node = await bench.fresh("cold", flags=TRUST)
            timed = await node.pull_and_run(bench.lab.image(name))
            counted = (await node.status())["bytes"]
            bench.check(timed.output, form)
            cold.add(form, timed.first_output_s)
            fetched.add(form, counted["registry"] / 1e6)
            if form == "plain":
                plain.add("shoal", timed.first_output_s)
            await node.wipe()
            node = await bench.fresh("joiner", bootstrap=(peers[form].multiaddr(),), flags=TRUST)
            timed = await node.pull_and_run(bench.lab.image(name))
            bench.check(timed.output, f"{form} from a peer")
            warm.add("plain, fleet's index" if form == "plain" else form, timed.first_output_s)
            await node.wipe()
    for peer in peers.values():
        await peer.wipe()
