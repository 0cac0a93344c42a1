"""`shoal demo`: a fleet on this machine starts a container, lazily and from its peers, while one watches."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from agent.errors import ShoalError

__all__ = ["main"]

_ABOUT = """Brings up a registry behind a slow link and four nodes, each a network namespace with its own containerd, agent and
fsmount. Node 1 starts a container of an image that only the registry has; nodes 2 and 3 start it from their peers; the registry
is stopped, and node 4 starts it all the same. Everything is removed at the end, also after Ctrl-C.

Exit codes: 0 every container printed what it should; 1 one did not, or something failed; 130 interrupted."""


def main(argv: Sequence[str]) -> int:
    """Run the demo with the words behind `shoal demo`; gives the exit code."""
    parser = argparse.ArgumentParser(prog="shoal demo", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON too")
    parser.add_argument("--size", metavar="MB", type=int, default=315, help="size of the image, uncompressed (default: 315)")
    parser.add_argument(
        "--round-trip", metavar="MS", type=float, default=20.0, help="latency of the registry's link (default: 20)"
    )
    parser.add_argument(
        "--rate", metavar="MBIT", type=float, default=400.0, help="rate of the registry's link, 0: no limit (default: 400)"
    )
    parser.add_argument(
        "--cache", metavar="DIR", type=Path, help="where the sample image is kept between runs (default: ~/.cache/shoal)"
    )
    parser.add_argument("--logs", metavar="DIR", type=Path, help="keep the logs of all processes here")
    args = parser.parse_args(list(argv))
    if os.geteuid() != 0:
        print("shoal demo: network namespaces and mounts need root; run it with sudo", file=sys.stderr)
        return 1
    try:
        return _run(args)
    except* ShoalError as group:
        for exc in _leaves(group):
            print(f"shoal demo: {exc}", file=sys.stderr)
    return 1


def _run(args: argparse.Namespace) -> int:
    # Imported here so that --help answers at once.
    import trio  # noqa: PLC0415

    from agent.demo.story import Options, tell  # noqa: PLC0415
    from agent.demo.view import open_view, print_final  # noqa: PLC0415
    from agent.lab.fleet import quiet_logs, until_signal  # noqa: PLC0415
    from agent.lab.publish import default_cache  # noqa: PLC0415

    quiet_logs()
    options = Options(
        json_path=args.json,
        cache=args.cache or default_cache(),
        logs=args.logs,
        size=args.size * 1_000_000,
        round_trip_s=args.round_trip / 1000,
        rate_bps=args.rate * 1e6,
    )

    async def work() -> int:
        with open_view() as view:
            rows, image_size = await tell(options, view)
        print_final(rows, image_size)
        return 0 if all(row.output_ok for row in rows) else 1

    return trio.run(until_signal, work)


def _leaves(group: BaseExceptionGroup[ShoalError]) -> list[ShoalError]:
    leaves: list[ShoalError] = []
    for exc in group.exceptions:
        leaves += _leaves(exc) if isinstance(exc, BaseExceptionGroup) else [exc]
    return leaves
