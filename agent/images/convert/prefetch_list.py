"""The file behind `--prefetch`: which paths an image reads first."""

import json
from pathlib import Path
from typing import Final

from agent.errors import SettingsError

MAX_BYTES: Final = 16 << 20
MAX_PATHS: Final = 100_000
"""An image that reads more files than this at start gains nothing from an order."""


def parse_prefetch(raw: bytes) -> tuple[str, ...]:
    """Paths in order, each once: one a line, or JSON with a list `paths`. Names that are not UTF-8 keep their bytes as surrogates.

    Raises:
        ValueError: it is neither, or too long; the text says what is wrong.
    """
    if len(raw) > MAX_BYTES:
        raise ValueError(f"it has {len(raw)} bytes; at most {MAX_BYTES} are read")
    paths = _from_json(raw) if raw.lstrip()[:1] == b"{" else raw.decode("utf-8", "surrogateescape").split("\n")
    found = tuple(dict.fromkeys(path for path in (path.rstrip("\r") for path in paths) if path.strip()))
    if len(found) > MAX_PATHS:
        raise ValueError(f"it names {len(found)} paths; at most {MAX_PATHS} make sense")
    return found


def _from_json(raw: bytes) -> list[str]:
    try:
        profile = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise ValueError("it begins like JSON and is not") from exc
    paths = profile.get("paths")
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError('a profile has its paths as {"paths": ["/bin/sh", …]}')
    return paths


def read_prefetch(path: Path) -> tuple[str, ...]:
    """`parse_prefetch` of a file.

    Raises:
        SettingsError: it cannot be read or is no such list.
    """
    try:
        with path.open("rb") as file:
            return parse_prefetch(file.read(MAX_BYTES + 1))
    except OSError as exc:
        raise SettingsError(f"cannot read the prefetch list {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise SettingsError(f"the prefetch list {path} is not usable: {exc}") from exc
