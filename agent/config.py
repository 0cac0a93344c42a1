"""The one table of settings, and how a value is found for each.

Every field of `Settings` is a flag (`--read-deadline`), an environment variable (`SHOAL_READ_DEADLINE`) and a TOML key
(`read_deadline`), all three derived from its name. A flag wins over the environment, the environment over the file, the file
over the default. An unknown key is an error, never ignored. Settings are read once and passed down; nothing else in the agent
looks at the environment.

This module is on the way of every client command, some of which somebody waits for with a stop-watch: it imports little (a
NamedTuple, because dataclasses and attrs cost 20 to 40 ms from a cold disk; TOML only where there is a file).
"""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from agent.errors import SettingsError

ENV_PREFIX: Final = "SHOAL_"
DEFAULT_FILE: Final = Path("/etc/shoal/shoal.toml")
UNLIMITED: Final = 0
"""What `unlimited` means where a size is asked for."""

_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*\Z", re.IGNORECASE)
_DURATION: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|)\s*\Z")
_POWER: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}


def parse_size(text: str) -> int:
    """Bytes from `512MiB`, `2GB`, `4096` or `unlimited` (which gives `UNLIMITED`)."""
    if text.strip().lower() == "unlimited":
        return UNLIMITED
    match = _SIZE.match(text)
    if not match:
        raise ValueError(f"{text!r} is not a size; write 512MiB, 2GB or unlimited")
    number, unit, binary = match.groups()
    value = int(float(number) * (1024 if binary else 1000) ** _POWER[unit.upper()])
    if value == 0:
        raise ValueError("a size of zero is not allowed; write unlimited if you mean no limit")
    return value


def parse_duration(text: str) -> float:
    """Seconds from `20s`, `250ms`, `5m` or a bare number of seconds."""
    match = _DURATION.match(text)
    if not match or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a duration above zero; write 20s, 250ms or 5m")
    return float(match[1]) * _SECONDS[match[2]]


def parse_switch(text: str) -> bool:
    """A boolean from `true`/`false`, `yes`/`no`, `on`/`off`, `1`/`0`."""
    word = text.strip().lower()
    if word in {"true", "yes", "on", "1"}:
        return True
    if word in {"false", "no", "off", "0"}:
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def parse_list(text: str) -> tuple[str, ...]:
    """The non-empty items of a comma separated list."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _choice(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is none of {', '.join(words)}")
        return text

    return parse


def _path(text: str) -> Path:
    if not text:
        raise ValueError("an empty path")
    return Path(text)


class _Row(NamedTuple):
    """One line of the table; `name` is filled in from the class below."""

    default: Any
    parse: Callable[[str], object]
    unit: str
    help: str
    name: str = ""


def _setting(default: object, parse: Callable[[str], object], unit: str, help_text: str) -> Any:  # a field has its own type
    return _Row(default, parse, unit, help_text)


class Settings(NamedTuple):
    """Everything an operator can set; see the module's text for how."""

    state_dir: Path = _setting(Path("/var/lib/shoal"), _path, "DIR", "what lasts: cached layers, snapshots, the node's key")
    run_dir: Path = _setting(Path("/run/shoal"), _path, "DIR", "sockets and mounts; one agent per directory")
    fleet_secret_file: Path | None = _setting(
        None, _path, "FILE", "secret shared by the fleet; without it the node works alone and shares nothing"
    )
    bootstrap_peers: tuple[str, ...] = _setting(
        (),
        parse_list,
        "ADDRS",
        "peers to contact first: multiaddrs, comma separated; /dns4/… is looked up, /p2p/… may be left out",
    )
    listen: str = _setting("/ip4/0.0.0.0/tcp/4405", str, "ADDR", "where to listen for the fleet's control traffic (libp2p)")
    data_listen: str = _setting("0.0.0.0:4406", str, "HOST:PORT", "where to serve pieces to peers (HTTP over mutual TLS)")
    data_advertise: str = _setting(
        "", str, "HOST:PORT", "address that peers are told for pieces; empty: the address they see, with the port of data-listen"
    )
    zone: str = _setting("", str, "NAME", "where this node is; peers of the same zone are asked first")
    cache_quota: int = _setting(50 << 30, parse_size, "SIZE", "disk space for cached layers; the least recently used go first")
    read_deadline: float = _setting(30.0, parse_duration, "TIME", "after this a read that nobody can serve fails with EIO")
    background_fetch: bool = _setting(True, parse_switch, "", "fetch the rest of a layer when the node is idle")
    prefetch: bool = _setting(True, parse_switch, "", "fetch what the image marks as needed at start before it is read")
    trust_fleet_indexes: bool = _setting(
        False,
        parse_switch,
        "",
        "mount plain layers at once by an index that another node made and signed; any member could then falsify their files",
    )
    soci_v1: bool = _setting(
        False,
        parse_switch,
        "",
        "mount plain layers at once by a SOCI v1 index; whoever may push to the repository could have made it, and falsify files",
    )
    presentation: str = _setting(
        "auto",
        _choice("auto", "erofs-file", "erofs-loop", "fuse-tree"),
        "HOW",
        "how layers are mounted: auto, erofs-file, erofs-loop or fuse-tree",
    )
    registry_hosts_dir: Path | None = _setting(
        Path("/etc/containerd/certs.d"), _path, "DIR", "registry mirrors, in containerd's hosts.toml form"
    )
    docker_config: Path | None = _setting(
        None, _path, "FILE", "registry credentials, in Docker's form (default: ~/.docker/config.json)"
    )
    insecure_registries: tuple[str, ...] = _setting(
        (), parse_list, "HOSTS", "registries reached over plain HTTP besides loopback, comma separated"
    )
    containerd_address: Path = _setting(
        Path("/run/containerd/containerd.sock"), _path, "SOCKET", "containerd's own socket, for `shoal pull`"
    )
    snapshotter: bool = _setting(True, parse_switch, "", "serve containerd's proxy snapshotter at RUN_DIR/containerd.sock")
    log_level: str = _setting("info", _choice("debug", "info", "warning", "error"), "LEVEL", "debug, info, warning or error")
    log_format: str = _setting(
        "auto", _choice("auto", "console", "json"), "FORM", "console, json or auto (console on a terminal)"
    )


_TABLE: Final = [row._replace(name=name) for name, row in Settings._field_defaults.items()]
# Up to here the defaults were rows of the table, so that each setting is written once.
Settings.__new__.__defaults__ = tuple(row.default for row in _TABLE)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _rows(names: Sequence[str] | None = None) -> Iterator[_Row]:
    return (row for row in _TABLE if names is None or row.name in names)


def show_value(value: object) -> str:
    """A setting's value as one would write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(value)
    return "" if value is None else str(value)


def _show_default(field: _Row) -> str:
    """A default as an operator would write it, with its unit."""
    if field.parse is parse_size and isinstance(field.default, int):
        return f"{field.default >> 30}GiB"
    if field.parse is parse_duration and isinstance(field.default, float):
        return f"{field.default:g}s"
    return show_value(field.default)


def add_flags(parser: argparse.ArgumentParser, names: Sequence[str] | None = None) -> None:
    """Add the flags of the named settings (all by default), and `--config`."""
    group = parser.add_argument_group(
        "settings", "each is also an environment variable (SHOAL_READ_DEADLINE) and a TOML key (read_deadline)"
    )
    group.add_argument("--config", metavar="FILE", help=f"TOML file with settings (default: {DEFAULT_FILE} if it exists)")
    for field in _rows(names):
        help_text = field.help.replace("%", "%%")
        if isinstance(field.default, bool):
            group.add_argument(
                _flag(field.name),
                action=argparse.BooleanOptionalAction,
                default=None,
                help=f"{help_text} (default: {show_value(field.default)})",
            )
            continue
        default = _show_default(field)
        group.add_argument(
            _flag(field.name),
            metavar=field.unit,
            default=None,
            help=help_text + (f" (default: {default})" if default and "default" not in help_text else ""),
        )


def _from_toml(name: str, value: object, where: Path) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    raise SettingsError(f"{name} in {where} must be a string, number, boolean or list of strings")


def _read_file(path: Path) -> dict[str, tuple[str, str]]:
    import tomllib  # noqa: PLC0415 - see the module's text

    try:
        table = tomllib.loads(path.read_text())
    except OSError as exc:
        raise SettingsError(f"cannot read settings from {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{path} is not valid TOML: {exc}") from exc
    known = {field.name for field in _rows()}
    unknown = sorted(set(table) - known)
    if unknown:
        raise SettingsError(f"unknown setting {unknown[0]!r} in {path}; known are {', '.join(sorted(known))}")
    return {name: (_from_toml(name, value, path), f"{name} in {path}") for name, value in table.items()}


def load_settings(flags: Mapping[str, object], environ: Mapping[str, str], *, default_file: Path = DEFAULT_FILE) -> Settings:
    """Settings from parsed flags (as `add_flags` made them), the environment and the file.

    Raises:
        SettingsError: a value does not parse, a key is unknown, or the file that was named cannot be read.
    """
    config = flags.get("config") or environ.get(ENV_PREFIX + "CONFIG")
    texts: dict[str, tuple[str, str]] = {}
    if config:
        texts.update(_read_file(Path(str(config))))
    elif default_file.exists():
        texts.update(_read_file(default_file))
    known = {ENV_PREFIX + field.name.upper(): field.name for field in _rows()}
    for variable, value in environ.items():
        if variable in known:
            texts[known[variable]] = (value, variable)
        elif variable.startswith(ENV_PREFIX) and variable != ENV_PREFIX + "CONFIG":
            raise SettingsError(f"unknown setting in the environment: {variable}; see `shoal agent --help`")
    for field in _rows():
        given = flags.get(field.name)
        if given is not None:
            texts[field.name] = (show_value(given), _flag(field.name))
    values: dict[str, Any] = {}
    for field in _rows():
        if field.name not in texts:
            continue
        text, origin = texts[field.name]
        if not text and field.default in (None, (), ""):
            values[field.name] = field.default
            continue
        try:
            values[field.name] = field.parse(text)
        except ValueError as exc:
            raise SettingsError(f"{origin}: {exc}") from exc
    return Settings(**values)


def reference_page() -> str:
    """The settings as a Markdown table, for docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "A flag wins over its environment variable, the variable over the TOML file (`--config`, `SHOAL_CONFIG`,",
        f"`{DEFAULT_FILE}`), the file over the default.",
        "",
        "| flag | variable | TOML key | default | meaning |",
        "|---|---|---|---|---|",
    ]
    for field in _rows():
        default = _show_default(field)
        lines.append(
            f"| `{_flag(field.name)}` | `{ENV_PREFIX}{field.name.upper()}` | `{field.name}` | {f'`{default}`' if default else ''} | {field.help} |"
        )
    return "\n".join(lines) + "\n"
