"""The command line `shoal`.

Client commands (`pull`, `mount`, `status`, …) talk to a running agent and import next to nothing, so that they answer at once;
`agent` and `demo` import what they need when they are called.

Exit codes: 0 done; 1 it failed, the reason is on stderr; 2 the command line or a setting is wrong; 130 interrupted.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from agent import config
from agent.errors import SettingsError, ShoalError

DESCRIPTION = """Starts containers before their images are here: mounts lazy layers and gets each missing chunk from the other
nodes of the fleet first, and from the registry last."""

EPILOG = """examples:
  shoal agent --fleet-secret-file /etc/shoal/secret --bootstrap-peers /dns4/shoal.kube-system/tcp/4405
  shoal pull docker.io/library/python:3.12-esgz
  shoal mount registry.example/app:1 /mnt/app && ls /mnt/app; shoal unmount /mnt/app
  shoal status          what this node holds, serves and waits for
  shoal doctor          what this machine can do, what is misconfigured, how to mend it

`shoal COMMAND --help` tells more about each command. Client commands talk to the agent of --run-dir.

exit codes: 0 done; 1 it failed, the reason is on stderr; 2 the command line or a setting is wrong; 130 interrupted"""

# What a command's --help says behind its first sentence.
_MORE = {
    "agent": """Mounts layers, answers reads of what is not here yet, serves pieces to peers and snapshots to containerd. Prints one
line when it is ready, logs to stderr, and ends at SIGTERM or SIGINT; mounts stay and containers go on reading what is cached. Needs
root. Settings come from flags, SHOAL_… variables and the TOML file, in this order.""",
    "fsmount": """Without an option: start it if none runs, and return once it serves. It outlives the agent and this command; its log is
RUN_DIR/fsmount.log. `shoal agent` does the same by itself, so this is for upgrades, for service managers and for the end.""",
    "pull": """Returns when a container can be started from it: layer indexes are here, file data follow when they are read, or in the
background. Needs a running agent, and a containerd that knows the snapshotter `shoal` (`shoal doctor` prints what to configure).
Then, for example: ctr run --snapshotter shoal --rm IMAGE NAME.""",
    "mount": """Returns when the tree can be walked; file data follow when they are read. The mount outlives the agent. What is mounted is
never evicted from the cache.""",
    "unmount": "The layers stay cached; processes that have files open there go on reading.",
    "status": """One line each on processes, fleet, cache, and bytes got and served since the agent started, then one for each layer: the
share that is here, its size, its format, the image that brought it.""",
    "peers": "One line each: peer id, address for pieces, round trip, zone, and how many of the layers that this node wants it holds.",
    "convert": """SOURCE and TARGET are each an image reference (registry.example/app:1), an OCI image layout directory
(oci:DIRECTORY[:TAG]) or an image of containerd (containerd:NAME, in --namespace). An image index stays one: all its platforms are
converted, or those of --platform. Layers that are in the format already, and those that must not be distributed, are kept as they
are. The same input gives the same digests. Works without an agent. Plain runtimes run estargz and zstd-chunked images as well.""",
    "inspect": """Reads the indexes of its layers, if this node does not have them yet, and asks the fleet. With --verify everything is
fetched: every chunk, every blob and the tar inside it are compared with what the image says; exit code 1 if anything differs.""",
    "scrub": """Reads the whole cache, slowly enough not to disturb. Damaged chunks are never served from then on and are fetched again from
peers or the registry. Exit code 1 if some could not be replaced.""",
    "doctor": """Tries rather than guesses: mounts in namespaces of its own, looks for who holds a port, asks containerd. Changes nothing. Takes
all settings, so that it looks at what `shoal agent` with the same ones would use. Exit code 1 if anything is an error.""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["demo"]:
        # The demo has options of its own and must not be bothered with those of a node.
        from agent.demo import main as demo_main  # noqa: PLC0415 - keeps other commands fast

        return int(demo_main(arguments[1:]))
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        code: int = args.run(args)
    except SettingsError as exc:
        print(f"shoal: {exc}", file=sys.stderr)
        return 2
    except ShoalError as exc:
        print(f"shoal: {exc}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shoal", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"shoal {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Any, help_text: str, settings: Sequence[str] | None = ("run_dir",)) -> argparse.ArgumentParser:
        about = f"{help_text[0].upper()}{help_text[1:]}. {_MORE[name]}"
        command = commands.add_parser(name, help=help_text, description=about)
        command.set_defaults(run=run)
        config.add_flags(command, settings)
        return command

    add("agent", _agent, "run this node's agent in the foreground; starts fsmount where none runs", None)
    fsmount = add(
        "fsmount",
        _fsmount,
        "start, upgrade or stop the process that owns this node's mounts",
        ("run_dir", "read_deadline", "presentation"),
    )
    what = fsmount.add_mutually_exclusive_group()
    what.add_argument(
        "--upgrade",
        action="store_true",
        help="let the installed version take over from the running one; readers wait, none fails",
    )
    what.add_argument(
        "--stop", action="store_true", help="unmount everything and end it; containers that still use a layer get errors"
    )
    pull = add("pull", _pull, "bring an image into containerd lazily", ("run_dir",))
    pull.add_argument("image", metavar="IMAGE", help="image reference, for example docker.io/library/python:3.12-esgz")
    pull.add_argument("--namespace", default="default", help="containerd namespace; Kubernetes uses k8s.io (default: default)")
    pull.add_argument("--quiet", "-q", action="store_true", help="print nothing but errors")
    mount = add("mount", _mount, "mount an image's merged root, read-only, without any container runtime")
    mount.add_argument("image", metavar="IMAGE", help="image reference, for example registry.example/app:1")
    mount.add_argument("directory", metavar="DIR", help="an empty directory; it is made if it is missing")
    mount.add_argument("--quiet", "-q", action="store_true", help="print nothing but errors")
    unmount = add("unmount", _unmount, "unmount what `shoal mount` mounted")
    unmount.add_argument("directory", metavar="DIR", help="the directory given to `shoal mount`")
    _add_convert(add)
    inspect = add("inspect", _inspect, "show an image's layers: format, chunks, what is lazy and why not, what the fleet has")
    inspect.add_argument("image", metavar="IMAGE", help="image reference, for example registry.example/app:1")
    inspect.add_argument("--verify", action="store_true", help="fetch everything and compare it with its digests")
    inspect.add_argument("--json", action="store_true", help="as JSON, for scripts")
    status = add("status", _status, "show what this node holds, serves and waits for")
    status.add_argument("--json", action="store_true", help="as JSON, for scripts")
    peers = add("peers", _peers, "list the other nodes of the fleet that this node knows")
    peers.add_argument("--json", action="store_true", help="as JSON, for scripts")
    scrub = add("scrub", _scrub, "hash everything cached again, drop what is damaged and fetch it anew")
    scrub.add_argument("--json", action="store_true", help="as JSON, for scripts")
    doctor = add("doctor", _doctor, "tell what this machine can do, what is misconfigured, and how to mend it", None)
    doctor.add_argument("--json", action="store_true", help="as JSON, for scripts")
    commands.add_parser("demo", help="bring up a small fleet on this machine and start a container on it", add_help=False)
    return parser


def _add_convert(add: Any) -> None:
    settings = ("registry_hosts_dir", "docker_config", "insecure_registries", "containerd_address")
    convert = add("convert", _convert, "convert an image into a format that can be mounted lazily", settings)
    convert.add_argument("source", metavar="SOURCE", help="what to convert: IMAGE, oci:DIRECTORY[:TAG] or containerd:NAME")
    convert.add_argument("target", metavar="TARGET", help="where the result goes, in the same forms")
    convert.add_argument("--to", required=True, choices=("estargz", "zstd-chunked", "nydus"), help="the format")
    convert.add_argument(
        "--platform",
        action="append",
        default=[],
        metavar="OS/ARCH",
        help="only this platform, for example linux/arm64; may be repeated (default: all)",
    )
    convert.add_argument(
        "--prefetch",
        dest="prefetch_file",
        metavar="FILE",
        help='files to load first: one path a line, or a recorded profile ({"paths": [...]})',
    )
    convert.add_argument("--force", action="store_true", help="convert layers anew that are in the format already")
    convert.add_argument("--namespace", default="default", help="containerd namespace; Kubernetes uses k8s.io (default: default)")
    convert.add_argument(
        "--work-dir",
        metavar="DIR",
        default="/var/tmp",  # noqa: S108 - a private folder is made in it
        help="where temporary files go: the largest layers, unpacked (default: /var/tmp)",
    )
    convert.add_argument("--quiet", "-q", action="store_true", help="print nothing but errors")


def _version() -> str:
    if not any(word in sys.argv for word in ("--version", "agent", "doctor")):
        return "unknown"
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - 20 ms that few commands need

    try:
        return version("shoal")
    except PackageNotFoundError:
        return "unknown"


def _settings(args: argparse.Namespace) -> config.Settings:
    return config.load_settings(vars(args), os.environ)


def _agent(args: argparse.Namespace) -> int:
    from agent.observe.memory import limit_malloc  # noqa: PLC0415
    from agent.observe.slim_imports import without_decoration  # noqa: PLC0415

    limit_malloc()
    with without_decoration():
        from agent.app import run_agent  # noqa: PLC0415 - imports libp2p

    return run_agent(_settings(args), version=_version())


def _fsmount(args: argparse.Namespace) -> int:
    import trio  # noqa: PLC0415

    from fsmount import link  # noqa: PLC0415

    settings = _settings(args)

    async def act() -> None:
        if args.stop:
            await link.stop_fsmount(settings.run_dir)
            print(f"fsmount for {settings.run_dir} has ended")
        elif args.upgrade:
            pids = await link.upgrade_fsmount(settings.run_dir)
            print(f"fsmount {pids['new_pid']} took over from {pids['old_pid']}")
        else:
            await link.start_fsmount(settings.run_dir, read_deadline_s=settings.read_deadline, presentation=settings.presentation)
            print(f"fsmount serves {settings.run_dir}")

    trio.run(act)
    return 0


class _Progress:
    """Shows events of a long call: a bar per layer on a terminal, nothing otherwise."""

    def __init__(self, title: str, *, quiet: bool) -> None:
        self._title = title
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._shown = sys.stderr.isatty() and not quiet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        if not self._shown:
            return
        if self._bar is None:
            from rich.console import Console  # noqa: PLC0415 - only on a terminal
            from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        name = str(event.get("what", self._title))
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=event.get("total") or None, state="")
        self._bar.update(
            self._tasks[name], completed=event.get("done", 0), total=event.get("total") or None, state=str(event.get("state", ""))
        )


def _call(args: argparse.Namespace, name: str, values: dict[str, object], title: str = "") -> Any:
    from agent.admin.client import call  # noqa: PLC0415

    with _Progress(title or name, quiet=getattr(args, "quiet", False)) as progress:
        return call(_settings(args).run_dir, name, values, progress)


def _pull(args: argparse.Namespace) -> int:
    result = _call(args, "pull", {"image": args.image, "namespace": args.namespace}, args.image)
    if not args.quiet:
        print(
            f"{result['image']} is ready in containerd (namespace {args.namespace}): {result['layers']} layers, "
            f"{result['lazy']} of them lazy, in {result['seconds']:.2f} s"
        )
    return 0


def _convert(args: argparse.Namespace) -> int:
    from agent.images.convert.command import Request, convert  # noqa: PLC0415 - imports the registry client
    from agent.images.convert.prefetch_list import read_prefetch  # noqa: PLC0415

    prioritized = read_prefetch(Path(args.prefetch_file)) if args.prefetch_file else ()
    request = Request(
        args.source, args.target, args.to, tuple(args.platform), prioritized, args.force, args.namespace, Path(args.work_dir)
    )
    started = time.monotonic()
    with _Progress(args.source, quiet=args.quiet) as progress:
        report = convert(_settings(args), request, progress)
    if args.quiet:
        return 0
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    print(
        f"{args.target} is written ({args.to}; {', '.join(report.images)}): {report.converted} layers converted, "
        f"{_size(report.source_bytes)} became {_size(report.target_bytes)}, {report.kept} kept, in {time.monotonic() - started:.1f} s"
    )
    print(report.root.digest)
    return 0


def _mount(args: argparse.Namespace) -> int:
    directory = Path(args.directory).absolute()
    result = _call(args, "mount", {"image": args.image, "directory": str(directory)}, args.image)
    if not args.quiet:
        print(
            f"{result['image']} is mounted at {directory} ({result['layers']} layers, {result['presentation']}) in {result['seconds']:.2f} s"
        )
    return 0


def _unmount(args: argparse.Namespace) -> int:
    _call(args, "unmount", {"directory": str(Path(args.directory).absolute())})
    return 0


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""


def _status(args: argparse.Namespace) -> int:
    status = _call(args, "status", {})
    if args.json:
        print(json.dumps(status, indent=2, sort_keys=True))
        return 0
    fetched, pids = status["bytes"], status["pids"]
    print(
        f"agent {status['version']}, up {status['uptime_s']:.0f} s; processes: agent {pids['agent']}, fsmount {pids['fsmount']}, holder {pids['holder']}"
    )
    print(f"fleet: {status['fleet']}; peer id {status['peer_id'] or 'none'}; {status['peers']} peers connected")
    print(
        f"layers: {len(status['layers'])} known, shown as {status['presentation'] or 'nothing yet'}; cache {_size(status['cache_disk_bytes'])} of {_size(status['cache_quota']) if status['cache_quota'] else 'unlimited'}"
    )
    print(
        f"fetched: {_size(fetched['peers'])} from peers, {_size(fetched['registry'])} from registries, {_size(fetched['cache'])} found on this node; {status['chunks_verified']} chunks verified"
    )
    print(
        f"served to peers: {_size(status['served_bytes'])}; reads that had to wait: {status['demand_waits']}; reads that failed: {status['failed_reads']}"
    )
    for layer in status["layers"]:
        share = layer["pieces_held"] / max(1, layer["pieces"])
        print(
            f"  {layer['digest'][7:19]} {share:4.0%} of {_size(layer['blob_size']):>10}  {layer['format']:<12} {layer['image']}"
        )
    for problem in status["problems"]:
        print(f"problem: {problem}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    found = _call(args, "inspect", {"image": args.image, "verify": args.verify}, args.image)
    is_wrong = any(not layer.get("verified", {"ok": True})["ok"] for layer in found["layers"])
    if args.json:
        print(json.dumps(found, indent=2, sort_keys=True))
        return int(is_wrong)
    print(f"{found['image']}\n{found['digest']}, {len(found['layers'])} layers, {_size(found['size'])} compressed")
    for number, layer in enumerate(found["layers"], 1):
        lazy = "lazy" if layer["is_lazy"] else "not lazy"
        print(f"layer {number}: {layer['digest'][7:19]} {layer['format']}, {_size(layer['size'])}, {lazy}")
        if layer["reason"]:
            print(f"  not lazy: {layer['reason']}")
        if "chunks" in layer:
            print(
                f"  {layer['entries']} entries, {layer['chunks']} chunks, {_size(layer['uncompressed'])} unpacked, {_size(layer['wanted_first'])} wanted first"
            )
        print(
            f"  {layer['pieces']} pieces: {layer['pieces_here']} on this node, {layer['pieces_in_fleet']} on {layer['peers']} other nodes"
        )
        for warning in layer["warnings"]:
            print(f"  warning: {warning}")
        if "verified" in layer:
            print(f"  {'right' if layer['verified']['ok'] else 'WRONG'}: {layer['verified']['what']}")
    return int(is_wrong)


def _peers(args: argparse.Namespace) -> int:
    peers = _call(args, "peers", {})
    if args.json:
        print(json.dumps(peers, indent=2, sort_keys=True))
        return 0
    if not peers:
        print("no peers; `shoal doctor` tells why a node may be alone")
    for peer in peers:
        print(
            f"{peer['peer_id']}  data {peer['data_address'] or '?'}  {peer['rtt_ms'] or '?'} ms  zone {peer['zone'] or '-'}  holds {peer['blobs']} blobs we asked for"
        )
    return 0


def _scrub(args: argparse.Namespace) -> int:
    report = _call(args, "scrub", {}, "scrubbing")
    if args.json:
        print(json.dumps(report, indent=2, sort_keys=True))
        return 0
    print(
        f"hashed {report['chunks']} chunks ({_size(report['bytes'])}) of {report['layers']} layers: {len(report['bad'])} damaged, {report['replaced']} replaced"
    )
    for bad in report["bad"]:
        print(f"  {bad}")
    return 0 if report["replaced"] == len(report["bad"]) else 1


def _doctor(args: argparse.Namespace) -> int:
    from agent.observe.doctor import examine  # noqa: PLC0415

    findings = examine(_settings(args))
    errors = sum(finding.level == "error" for finding in findings)
    if args.json:
        print(json.dumps([finding.as_dict() for finding in findings], indent=2))
    else:
        for finding in findings:
            print(finding.as_text())
        warnings = sum(finding.level == "warning" for finding in findings)
        print(f"{errors or 'no'} error{'s' * (errors != 1)}, {warnings or 'no'} warning{'s' * (warnings != 1)}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
