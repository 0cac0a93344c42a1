"""What the doctor looks at around the agent: containerd, registries, the fleet, the ports."""

import os
import re
import shutil
import socket
import stat
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import trio

from agent.config import Settings
from agent.errors import SettingsError
from agent.observe.findings import Finding, error, note, ok, warning
from agent.registry.credentials import DockerConfig, parse_docker_config
from agent.registry.hosts import parse_hosts
from agent.runtimes.containerd.client import ContainerdError, open_containerd
from agent.runtimes.containerd.configuration import SNAPSHOTTER, config_snippet
from agent.swarm.bootstrap import Target, parse_bootstrap, resolve_bootstrap
from agent.swarm.fleet import read_fleet_secret

CONTAINERD_CONFIG: Final = Path("/etc/containerd/config.toml")
CONTAINERD_SOCKET: Final = Path("/run/containerd/containerd.sock")
MAX_TARGETS: Final = 8
"""Addresses of one bootstrap peer that are tried; one that answers is enough."""

_VERSION: Final = re.compile(r"v?(\d+)\.(\d+)")
_DEFAULT_HOSTS_DIR: Final = Path("/etc/containerd/certs.d")


# containerd


async def check_containerd(settings: Settings) -> list[Finding]:
    """Does it answer, which version is it, does it know our snapshotter, and at the right socket?"""
    address = settings.containerd_address
    if not settings.snapshotter:
        return [note("containerd", "--no-snapshotter: containerd is not served; `shoal mount` works without it")]
    configured = await trio.to_thread.run_sync(_configured_socket, address)
    if not address.exists():
        version = await trio.to_thread.run_sync(_installed_version)
        if not version:
            return [note("containerd", f"none at {address}; `shoal mount` works without one, `shoal pull` and Kubernetes do not")]
        away = warning(
            "containerd", f"{version} is installed and does not listen at {address}", "start it, or set --containerd-address"
        )
        return [away] if configured else [away, _advice(settings, version)]
    async with open_containerd(str(address)) as client:
        try:
            version = await client.version()
        except ContainerdError as exc:
            return [error("containerd", str(exc), "systemctl start containerd, or set --containerd-address")]
        found = [ok("containerd", f"{version} answers at {address}")]
        try:
            await client.check_snapshotter()
        except ContainerdError as exc:
            if "has no snapshotter" in str(exc):
                return [*found, _advice(settings, version)]
            return [*found, error("snapshotter", str(exc), _how_to_configure(settings, version))]
    expected = str((settings.run_dir / "containerd.sock").absolute())
    if configured and configured != expected:
        found.append(
            error(
                "snapshotter",
                f"containerd asks the snapshotter at {configured}, this agent serves {expected}",
                f"set address in [proxy_plugins.{SNAPSHOTTER}] of {CONTAINERD_CONFIG}, or --run-dir",
            )
        )
    else:
        found.append(ok("snapshotter", f"containerd knows {SNAPSHOTTER!r}"))
    return found


def _advice(settings: Settings, version: str) -> Finding:
    text = f"containerd does not know {SNAPSHOTTER!r} yet; `shoal pull` and Kubernetes need it"
    return warning("snapshotter", text, _how_to_configure(settings, version))


def _how_to_configure(settings: Settings, version: str) -> str:
    match = _VERSION.search(version)
    major = int(match[1]) if match else 2
    snippet = config_snippet(major, (settings.run_dir / "containerd.sock").absolute(), settings.state_dir.absolute())
    return f"put this into {CONTAINERD_CONFIG} (containerd {major}.x) and restart containerd:\n{snippet}"


def _installed_version() -> str:
    """What `containerd --version` says, empty if there is none."""
    program = shutil.which("containerd")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=1, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "containerd"
    match = _VERSION.search(done.stdout)
    return f"containerd {match[0].lstrip('v')}" if match else "containerd"


def _configured_socket(address: Path) -> str:
    """The snapshotter's socket in the configuration of the machine's own containerd; empty where it cannot be known."""
    if address != CONTAINERD_SOCKET:
        return ""
    try:
        plugin = tomllib.loads(CONTAINERD_CONFIG.read_text())["proxy_plugins"][SNAPSHOTTER]
        return str(plugin["address"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # set up by an import, by flags, or not readable: containerd itself has said that it knows us


# The fleet


def check_secret(settings: Settings) -> list[Finding]:
    """Is there one, may nobody else read it, is it long enough?"""
    path = settings.fleet_secret_file
    if path is None:
        if settings.bootstrap_peers:
            return [
                error(
                    "fleet secret",
                    "there are --bootstrap-peers but no secret: the node works alone",
                    "set --fleet-secret-file; every node of the fleet has the same",
                )
            ]
        return [
            note(
                "fleet",
                "no fleet secret: this node works alone and shares nothing",
                "set --fleet-secret-file and --bootstrap-peers",
            )
        ]
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        return [
            error(
                "fleet secret",
                f"cannot read {path}: {exc.strerror}",
                f"copy it from another node, or make one: (umask 077; head -c 32 /dev/urandom | base64 >{path})",
            )
        ]
    try:
        read_fleet_secret(path)
    except SettingsError as exc:
        if stat.S_ISREG(mode) and mode & 0o027:
            return [
                error(
                    "fleet secret",
                    f"{path} may be read or changed by others (mode {stat.S_IMODE(mode):04o})",
                    f"chmod 600 {path}",
                )
            ]
        return [error("fleet secret", str(exc), f"(umask 077; head -c 32 /dev/urandom | base64 >{path}), the same on every node")]
    return [ok("fleet secret", f"{path} can be used")]


async def check_bootstrap(settings: Settings, peers: int | None) -> list[Finding]:
    """Each bootstrap peer: is it an address, does its name resolve, does anybody listen? `peers`: connected to the agent now."""
    if settings.fleet_secret_file is None:
        return []
    if not settings.bootstrap_peers:
        return [
            note(
                "bootstrap peers",
                "none: others can join this node, it joins nobody",
                "set --bootstrap-peers, but on the first node",
            )
        ]
    found: list[Finding] = []

    async def check(text: str) -> None:
        found.append(await _check_peer(text))

    async with trio.open_nursery() as nursery:
        for text in settings.bootstrap_peers:
            nursery.start_soon(check, text)
    if peers == 0:
        found.append(
            warning(
                "fleet",
                "the agent is connected to no peer",
                "are the secrets equal? look for bootstrap_peer_unreachable in its log",
            )
        )
    elif peers is not None:
        found.append(ok("fleet", f"the agent is connected to {peers} peers"))
    return found


async def _check_peer(text: str) -> Finding:
    subject = f"bootstrap peer {text}"
    try:
        address = parse_bootstrap(text)
    except SettingsError as exc:
        return error("bootstrap peers", str(exc), "write /ip4/10.0.0.7/tcp/4405 or /dns4/shoal.example.org/tcp/4405")
    try:
        targets = await resolve_bootstrap(address)
    except OSError as exc:
        return warning(
            subject, f"does not resolve: {exc.strerror or exc}", "correct the name or the DNS; the agent goes on trying"
        )
    if not targets:
        return warning(subject, "resolves to no address", "correct the name; the agent goes on trying")
    refused: list[str] = []
    answered: list[Target] = []

    async def connect(target: Target, scope: trio.CancelScope) -> None:
        _, _, host, _, port = target.address.split("/")
        try:
            stream = await trio.open_tcp_stream(host, int(port))
        except OSError as exc:
            cause: BaseException = exc.__cause__ or exc
            while isinstance(cause, BaseExceptionGroup):
                cause = cause.exceptions[0]
            refused.append(f"{target.address}: {(cause.strerror if isinstance(cause, OSError) else '') or exc}")
            return
        await stream.aclose()
        answered.append(target)
        scope.cancel()

    async with trio.open_nursery() as nursery:
        for target in targets[:MAX_TARGETS]:
            nursery.start_soon(connect, target, nursery.cancel_scope)
    if answered:
        return ok(subject, "listens")
    return warning(
        subject, f"does not answer ({'; '.join(refused)})", "is its agent running, is the port open? the agent goes on trying"
    )


# Ports


def check_ports(settings: Settings, status: Mapping[str, Any] | None) -> list[Finding]:
    """The two ports of a fleet member: free, or held by this node's own agent."""
    if settings.fleet_secret_file is None:
        return []
    ours: set[int] = set()
    for address in status["addresses"] if status else ():
        ours |= {int(word) for word in str(address).split("/") if word.isdecimal()}
    if status and (data_port := str(status.get("data_address", "")).rpartition(":")[2]).isdecimal():
        ours.add(int(data_port))
    found = []
    for flag, value, parse in (("--listen", settings.listen, _multiaddr), ("--data-listen", settings.data_listen, _host_port)):
        try:
            host, port = parse(value)
        except ValueError:
            form = "/ip4/ADDRESS/tcp/PORT" if flag == "--listen" else "HOST:PORT"
            found.append(error(flag, f"{value} is not of the form {form}", f"write {form}"))
            continue
        found.append(_check_port(flag, value, host, port, is_ours=port in ours))
    return found


def _multiaddr(text: str) -> tuple[str, int]:
    empty, kind, host, tcp, port = text.split("/")
    if empty or kind not in {"ip4", "ip6"} or tcp != "tcp" or not port.isdecimal() or int(port) >= 1 << 16:
        raise ValueError(text)
    return host, int(port)


def _host_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) >= 1 << 16:
        raise ValueError(text)
    return host.strip("[]") or "0.0.0.0", int(port)


def _check_port(flag: str, value: str, host: str, port: int, *, is_ours: bool) -> Finding:
    # Bound, never listened on: a port that is free stays free, and nobody can connect.
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            if is_ours:
                return ok(flag, f"{value} is held by this node's agent")
            holder = _holder_of(port)
            by = f", held by {holder}" if holder else ""
            return error(flag, f"{value}: {exc.strerror}{by}", f"end that, or choose another with {flag}")
    return ok(flag, f"{value} is free")


def _holder_of(port: int) -> str:
    """Which process listens on a TCP port, empty if it cannot be seen."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in os.scandir("/proc") if inodes else ():
        if not process.name.isdecimal():
            continue
        try:
            if any(os.readlink(entry.path) in inodes for entry in os.scandir(f"{process.path}/fd")):
                name = Path(process.path, "comm").read_text().strip()
                return f"{name} (process {process.name})"
        except OSError:
            continue  # it has ended
    return ""


# Registries


def check_hosts_dir(settings: Settings) -> list[Finding]:
    """Every hosts.toml must parse; the agent passes over one that does not, and then misses its mirror."""
    folder = settings.registry_hosts_dir
    if folder is None:
        return []
    if not folder.is_dir():
        if folder == _DEFAULT_HOSTS_DIR:
            return [ok("registries", f"no {folder}: every registry is asked directly")]
        return [error("registries", f"--registry-hosts-dir {folder} is not a directory", "make it, or leave the setting out")]
    found, right = [], 0
    for place in sorted(folder.iterdir()):
        file = place / "hosts.toml"
        if not file.is_file():
            continue
        registry = re.sub(r"_(\d+)_\Z", r":\1", place.name)
        try:
            parse_hosts(file.read_text(), registry, place, settings.insecure_registries)
            right += 1
        except (SettingsError, OSError, UnicodeDecodeError) as exc:
            found.append(
                warning("registries", f"{file} is passed over: {exc}", "correct the file; containerd refuses it as well")
            )
    return found or [ok("registries", f"{folder} has {right} usable hosts.toml")]


def check_docker_config(settings: Settings) -> list[Finding]:
    """Credentials: can they be read, by root alone, and do the helpers that they name exist?"""
    given = settings.docker_config
    path = given or Path.home() / ".docker" / "config.json"
    subject = "registry credentials"
    try:
        mode = path.stat().st_mode
        config = parse_docker_config(path.read_bytes())
    except FileNotFoundError:
        if given is not None:
            return [
                error(
                    subject, f"--docker-config {path} does not exist", "make it with `docker login` or `podman login --authfile`"
                )
            ]
        return [ok(subject, f"no {path}: registries are asked without")]
    except OSError as exc:
        return [error(subject, f"cannot read {path}: {exc.strerror}", f"chown root {path}; chmod 600 {path}")]
    except ValueError as exc:
        return [error(subject, f"{path} is no Docker configuration: {exc}", "make it anew with `docker login`")]
    found = []
    if config.auths and mode & 0o077:
        found.append(
            warning(subject, f"{path} has passwords and others may read it (mode {stat.S_IMODE(mode):04o})", f"chmod 600 {path}")
        )
    found += _missing_helpers(config, path)
    return found or [ok(subject, f"{path} names {len(config.auths) + len(config.helpers)} registries")]


def _missing_helpers(config: DockerConfig, path: Path) -> list[Finding]:
    names = sorted({*config.helpers.values(), *([config.store] if config.store else [])})
    return [
        warning(
            "registry credentials",
            f"{path} names the helper docker-credential-{name}, which is not on the PATH",
            "install it, or take it out of the file",
        )
        for name in names
        if shutil.which(f"docker-credential-{name}") is None
    ]
