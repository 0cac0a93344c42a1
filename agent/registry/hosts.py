"""Which hosts serve a registry: containerd's `hosts.toml` directories, Docker's certificate directories, or the defaults.

`<dir>/<registry>/hosts.toml` (a port as `host_5000_` or `host:5000`), else `<dir>/_default/hosts.toml`, lists mirrors in the
order of the file and then the registry itself (`server`), as containerd 2.4 core/remotes/docker/config/hosts.go reads it.
Loopback registries are plain HTTP unless a file says otherwise.
"""

import ipaddress
import posixpath
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import attrs

from agent.errors import SettingsError
from agent.registry.references import DOCKER_HUB, is_docker_hub

_CAPABILITIES: Final = frozenset({"pull", "resolve", "push", "referrers"})
_MAX_FILE_BYTES: Final = 1 << 20
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


@attrs.frozen
class TlsSettings:
    """How a host proves itself, and we to it. Paths of PEM files."""

    ca_paths: tuple[Path, ...] = ()
    client_pairs: tuple[tuple[Path, Path | None], ...] = ()
    skip_verify: bool = False

    def without_client(self) -> "TlsSettings":
        """The same trust, without showing our certificate: for hosts that a registry redirects to."""
        return attrs.evolve(self, client_pairs=())


@attrs.frozen
class RegistryHost:
    """One server that answers for a registry. `base_url` ends in the API's root (`/v2`)."""

    registry: str
    base_url: str
    capabilities: frozenset[str] = _CAPABILITIES
    tls: TlsSettings = TlsSettings()
    headers: tuple[tuple[str, str], ...] = attrs.field(default=(), repr=False)
    connect_timeout_s: float | None = None

    @property
    def name(self) -> str:
        """Host and port."""
        return urlsplit(self.base_url).netloc

    @property
    def is_mirror(self) -> bool:
        """Is this another host than the registry, which must be told for whom it answers (`ns=`)?"""
        return self.name != self.registry and not (is_docker_hub(self.name) and self.registry == DOCKER_HUB)

    @property
    def is_plain(self) -> bool:
        """Does it speak HTTP without TLS?"""
        return self.base_url.startswith("http://")


def is_loopback(host: str) -> bool:
    """Is a host (with or without port) this machine: localhost, 127.0.0.0/8, ::1?"""
    name = host_without_port(host)
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def host_without_port(host: str) -> str:
    """`[::1]:5000` to `::1`, `a:5000` to `a`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def default_host(registry: str, insecure: Collection[str] = (), tls: TlsSettings | None = None) -> RegistryHost:
    """The registry's own server."""
    host = "registry-1.docker.io" if registry == DOCKER_HUB else registry
    plain = registry in insecure or host_without_port(registry) in insecure
    if is_loopback(registry) and not registry.endswith(":443"):
        plain = plain or tls is None
    return RegistryHost(registry, f"{'http' if plain else 'https'}://{host}/v2", tls=tls or TlsSettings())


def parse_hosts(text: str, registry: str, base_dir: Path, insecure: Collection[str] = ()) -> tuple[RegistryHost, ...]:
    """Read a `hosts.toml`: mirrors in the file's order, then the registry itself. Relative paths are under `base_dir`.

    Raises:
        SettingsError: not TOML, or a value that containerd refuses as well.
    """
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise SettingsError(f"{base_dir}/hosts.toml is not TOML: {exc}") from exc
    listed = document.get("host", {})
    if not isinstance(listed, dict):
        raise SettingsError(f"{base_dir}/hosts.toml: `host` is not a table")
    hosts = []
    for address, fields in listed.items():
        if not isinstance(fields, dict):
            raise SettingsError(f"{base_dir}/hosts.toml: `host.{address}` is not a table")
        hosts.append(_host(registry, address, fields, base_dir))
    server = document.get("server") or ""
    if not isinstance(server, str):
        raise SettingsError(f"{base_dir}/hosts.toml: `server` is not text")
    own = default_host(registry, insecure)
    hosts.append(_host(registry, server or own.base_url, document, base_dir))
    return tuple(hosts)


def _host(registry: str, address: str, fields: Mapping[str, Any], base_dir: Path) -> RegistryHost:
    where = f"{base_dir}/hosts.toml: {address!r}"
    try:
        url = urlsplit(address if "://" in address else f"https://{address}")
        is_usable = url.scheme in {"http", "https"} and bool(url.hostname) and url.username is None and url.port != 0
    except ValueError as exc:
        raise SettingsError(f"{where} is not a URL") from exc
    if not is_usable:
        raise SettingsError(f"{where} is not a http(s) URL without credentials")
    path = posixpath.normpath(url.path) if url.path.strip("/") else ""
    if not path.endswith("/v2") and not fields.get("override_path", False):
        path += "/v2"
    capabilities = fields.get("capabilities") or sorted(_CAPABILITIES)
    if not isinstance(capabilities, list) or not all(isinstance(one, str) for one in capabilities):
        raise SettingsError(f"{where}: capabilities is not a list of words")
    unknown = {one.lower() for one in capabilities} - _CAPABILITIES
    if unknown:
        raise SettingsError(f"{where}: unknown capability {min(unknown)!r}")
    return RegistryHost(
        registry,
        f"{url.scheme}://{url.netloc}{path}",
        frozenset(one.lower() for one in capabilities),
        TlsSettings(
            _ca(fields.get("ca"), base_dir, where),
            _client(fields.get("client"), base_dir, where),
            bool(fields.get("skip_verify")),
        ),
        _headers(fields.get("header"), where),
        _timeout(fields.get("dial_timeout"), where),
    )


def _ca(value: object, base_dir: Path, where: str) -> tuple[Path, ...]:
    paths = [value] if isinstance(value, str) else value or []
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise SettingsError(f"{where}: `ca` is not a path or a list of paths")
    return tuple(base_dir / path for path in paths)


def _client(value: object, base_dir: Path, where: str) -> tuple[tuple[Path, Path | None], ...]:
    pairs: list[tuple[Path, Path | None]] = []
    for item in value if isinstance(value, list) else [value] if value is not None else []:
        match item:
            case str(path):
                pairs.append((base_dir / path, None))
            case [str(certificate), str(key)]:
                pairs.append((base_dir / certificate, base_dir / key))
            case _:
                raise SettingsError(f"{where}: `client` is not a path, a list of paths or a list of pairs")
    return tuple(pairs)


def _headers(value: object, where: str) -> tuple[tuple[str, str], ...]:
    headers: list[tuple[str, str]] = []
    for name, texts in value.items() if isinstance(value, dict) else ():
        for text in [texts] if isinstance(texts, str) else texts if isinstance(texts, list) else [None]:
            if not isinstance(text, str) or not text.isprintable() or not re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name):
                raise SettingsError(f"{where}: bad header {name!r}")
            headers.append((name, text))
    return tuple(headers)


def _timeout(value: object, where: str) -> float | None:
    if not value:
        return None
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise SettingsError(f'{where}: dial_timeout {value!r} is not a duration such as "5s"')
    return float(found[1]) * _UNITS[found[2]]


def host_directories(hosts_dir: Path, registry: str) -> list[Path]:
    """Where containerd looks for a registry's files, first hit first."""
    names = []
    if registry.rfind(":") > 0:
        host, _, port = registry.rpartition(":")
        names.append(f"{host}_{port}_")
    return [hosts_dir / name for name in (*names, registry, "_default")]


def load_hosts(hosts_dir: Path | None, registry: str, insecure: Collection[str] = ()) -> tuple[tuple[RegistryHost, ...], str]:
    """The hosts of a registry and, if a file was passed over, why. Reads the disk: call it in a thread."""
    if hosts_dir is None:
        return (default_host(registry, insecure),), ""
    directory = next((path for path in host_directories(hosts_dir, registry) if path.is_dir()), None)
    if directory is None:
        return (default_host(registry, insecure),), ""
    trouble = ""
    file = directory / "hosts.toml"
    try:
        with file.open("rb") as stream:
            raw = stream.read(_MAX_FILE_BYTES + 1)
        if len(raw) > _MAX_FILE_BYTES:
            raise SettingsError(f"{file} is larger than {_MAX_FILE_BYTES} bytes")
        if raw.strip():
            return parse_hosts(raw.decode(), registry, directory, insecure), ""
    except FileNotFoundError:
        trouble = ""
    except (OSError, UnicodeDecodeError, SettingsError) as exc:
        trouble = str(exc)
    # as containerd and Docker do: certificates that lie beside
    ca, pairs = [], []
    for path in sorted(directory.iterdir()):
        if path.suffix == ".crt":
            ca.append(path)
        elif path.suffix == ".cert":
            key = path.with_suffix(".key")
            pairs.append((path, key if key.exists() else None))
    tls = TlsSettings(tuple(ca), tuple(pairs)) if ca or pairs else None
    return (default_host(registry, insecure, tls),), trouble
