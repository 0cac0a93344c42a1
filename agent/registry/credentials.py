"""Credentials for registries: given by the operator, from a Docker config file, or from a credential helper program.

Secrets live in `Credentials` only, which never shows them. The file is read again when it changed, so a rotated password
takes effect without a restart; a helper's answer is kept for some minutes, since helpers may take seconds.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar

import attrs
import structlog
import trio

from agent.registry.references import DOCKER_HUB, is_docker_hub

log = structlog.get_logger()
_T = TypeVar("_T")

_HELPER_DEADLINE_S: Final = 20.0
"""A helper may ask a cloud's metadata service; Docker itself waits for ever."""
_HELPER_KEEP_S: Final = 300.0
_MAX_CONFIG_BYTES: Final = 4 << 20
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_DOCKER_HUB_KEY: Final = "https://index.docker.io/v1/"
_IDENTITY_USER: Final = "<token>"
"""Username with which a helper marks its secret as an identity token (docker-credential-helpers)."""


@attrs.frozen
class Credentials:
    """User and password, or an identity token (an OAuth2 refresh token)."""

    username: str
    password: str = attrs.field(default="", repr=False)
    identity_token: str = attrs.field(default="", repr=False)

    def basic(self) -> str:
        """The value of a Basic Authorization header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


@attrs.frozen
class DockerConfig:
    """What matters to us of a Docker config file; keys are hosts, or host and path, without scheme."""

    auths: Mapping[str, Credentials]
    helpers: Mapping[str, str]
    store: str = ""


def parse_docker_config(raw: bytes) -> DockerConfig:
    """Read a Docker (or Podman) credentials file. Entries that cannot be read are passed over.

    Raises:
        ValueError: not a JSON object.
    """
    document = json.loads(raw)
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    auths: dict[str, Credentials] = {}
    entries = document.get("auths")
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        credentials = _entry(entry)
        if credentials is not None:
            auths[config_key(key)] = credentials
    listed = document.get("credHelpers")
    helpers = {
        config_key(key): name
        for key, name in (listed.items() if isinstance(listed, dict) else ())
        if isinstance(name, str) and _HELPER_NAME.match(name)
    }
    store = document.get("credsStore")
    return DockerConfig(auths, helpers, store if isinstance(store, str) and _HELPER_NAME.match(store) else "")


def config_key(key: str) -> str:
    """A key of the file as host (and path): no scheme, no API version, one name for Docker Hub."""
    _, separator, rest = key.partition("://")
    host, _, path = (rest if separator else key).partition("/")
    path = re.sub(r"(?:\A|/)v[12]\Z", "", path.rstrip("/"))
    if is_docker_hub(host):
        host = DOCKER_HUB
    return f"{host}/{path}" if path else host


def _entry(entry: object) -> Credentials | None:
    if not isinstance(entry, dict):
        return None
    username, password, token = (entry.get(name) or "" for name in ("username", "password", "identitytoken"))
    encoded = entry.get("auth") or ""
    if encoded and isinstance(encoded, str):
        try:
            username, _, password = base64.b64decode(encoded).rstrip(b"\0").decode().partition(":")
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return None
    if not all(isinstance(value, str) for value in (username, password, token)) or not (username or token):
        return None
    return Credentials(username, password, token)


def parse_helper_answer(raw: bytes) -> Credentials | None:
    """What `docker-credential-… get` printed, None if it has nothing usable."""
    try:
        answer = json.loads(raw)
    except ValueError:
        return None
    if not isinstance(answer, dict):
        return None
    username, secret = answer.get("Username"), answer.get("Secret")
    if not isinstance(username, str) or not isinstance(secret, str) or not secret:
        return None
    if username == _IDENTITY_USER:
        return Credentials("", identity_token=secret)
    return Credentials(username, secret)


@attrs.define
class CredentialStore:
    """Finds credentials for a host, in the order: given, helper of the host, helper of the whole file, the file itself."""

    _config_path: Path | None = None
    _given: dict[str, Credentials] = attrs.field(factory=dict, repr=False)
    _config: DockerConfig = attrs.field(factory=lambda: DockerConfig({}, {}), repr=False)
    _config_stamp: tuple[int, int] = (0, 0)
    _helped: dict[str, tuple[float, Credentials | None]] = attrs.field(factory=dict, repr=False)
    _disk: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1), repr=False)

    def add(self, host: str, credentials: Credentials) -> None:
        """Use these for a host (with port) from now on, before anything else."""
        self._given[config_key(host)] = credentials

    def forget(self, host: str) -> None:
        """The host refused what a helper gave: ask the helper anew next time."""
        self._helped.pop(config_key(host), None)

    async def lookup(self, host: str, repository: str = "") -> Credentials | None:
        """Credentials for a repository at a host, None to stay anonymous."""
        key = config_key(host)
        given = _longest(self._given, key, repository)
        if given is not None:
            await trio.lowlevel.checkpoint()
            return given
        config = await self._read_config()
        helper = _longest(config.helpers, key, repository) or config.store
        if helper:
            helped = await self._ask_helper(helper, key)
            if helped is not None:
                return helped
        return _longest(config.auths, key, repository)

    async def _read_config(self) -> DockerConfig:
        if self._config_path is None:
            await trio.lowlevel.checkpoint()
            return self._config
        path = self._config_path
        try:
            self._config, self._config_stamp = await trio.to_thread.run_sync(
                _load, path, self._config, self._config_stamp, limiter=self._disk
            )
        except FileNotFoundError:
            self._config, self._config_stamp = DockerConfig({}, {}), (0, 0)
        except (OSError, ValueError) as exc:
            # the text of a JSON error has a position in it and no content
            log.warning("docker_config_unreadable", path=str(path), reason=str(exc))
        return self._config

    async def _ask_helper(self, name: str, key: str) -> Credentials | None:
        now = trio.current_time()
        kept = self._helped.get(key)
        if kept is not None and kept[0] > now:
            return kept[1]
        question = _DOCKER_HUB_KEY if key == DOCKER_HUB else key
        program = f"docker-credential-{name}"
        answer: Credentials | None = None
        try:
            with trio.fail_after(_HELPER_DEADLINE_S):
                done = await trio.run_process(
                    [program, "get"], stdin=question.encode(), capture_stdout=True, capture_stderr=True, check=False
                )
        except trio.TooSlowError:
            log.warning("credential_helper_too_slow", helper=program, host=key, deadline_s=_HELPER_DEADLINE_S)
            return None
        except OSError as exc:
            log.warning("credential_helper_missing", helper=program, host=key, reason=exc.strerror)
            return None
        if done.returncode == 0:
            answer = parse_helper_answer(done.stdout)
        elif b"not found" not in done.stdout:
            log.warning("credential_helper_failed", helper=program, host=key, exit_status=done.returncode)
            return None
        self._helped[key] = now + _HELPER_KEEP_S, answer
        return answer


def _load(path: Path, known: DockerConfig, stamp: tuple[int, int]) -> tuple[DockerConfig, tuple[int, int]]:
    status = path.stat()
    current = status.st_mtime_ns, status.st_size
    if current == stamp:
        return known, stamp
    if status.st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"larger than {_MAX_CONFIG_BYTES} bytes")
    return parse_docker_config(path.read_bytes()), current


def _longest(table: Mapping[str, _T], key: str, repository: str) -> _T | None:
    """The entry for the longest prefix of host/repository, so that `host/team` wins over `host`."""
    name = f"{key}/{repository}" if repository else key
    while True:
        if name in table:
            return table[name]
        if name == key or "/" not in name:
            return None
        name = name.rpartition("/")[0]
