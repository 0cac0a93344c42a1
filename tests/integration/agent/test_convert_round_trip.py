"""The plain fixture image converted by us to each format, and mounted by us: not a byte, an attribute or a hole of it is lost."""

from pathlib import Path

import pytest
import trio

from agent.images.convert.writers import WRITERS
from tests.agent_harness import in_thread, open_fleet, run_command, shoal
from tests.tree_facts import Facts, differences, facts_of, fixture_truth


def in_json_names(truth: Facts) -> Facts:
    """The same tree in a format whose names must be UTF-8."""
    return {path.encode("latin-1").decode("utf-8", "replace").encode().decode("latin-1"): facts for path, facts in truth.items()}


# With a list every writer puts the entries into another order; without one zstd:chunked keeps the tar bit for bit.
@pytest.mark.parametrize(("form", "with_list"), [*((form, True) for form in sorted(WRITERS)), ("zstd-chunked", False)])
async def test_a_converted_image_is_the_image(shared_fixtures: Path, form: str, with_list: bool) -> None:
    with trio.fail_after(100):
        async with open_fleet() as fleet:
            (fleet.folder / "list").write_text("/etc/hosts\n/bigdir/entry-00007\n")
            target = f"{fleet.registry.address}/fixtures:{form}"
            more = ["--prefetch", fleet.folder / "list"] if with_list else []
            source = f"oci:{shared_fixtures}/images:oci"
            await run_command([*shoal(), "convert", source, target, "--to", form, "--work-dir", fleet.folder, *more])
            node = await fleet.node("--no-background-fetch", in_fleet=False)
            root = await node.mount(f"fixtures:{form}", form)
            _, truth = fixture_truth(shared_fixtures, "oci")
            found = await in_thread(facts_of, root)
            assert differences(found, truth if form == "nydus" else in_json_names(truth)) == []
            status = await node.status()
            assert all(layer["format"].startswith(form) for layer in status["layers"]), status["layers"]
            assert status["failed_reads"] == 0
            await node.shoal("unmount", root)
