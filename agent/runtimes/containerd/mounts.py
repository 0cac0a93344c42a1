"""Which mounts a snapshot is, as pure rules (contracts of the snapshots service).

A snapshot without a parent is a bind mount of its own directory, a view on one parent a read-only bind of that, everything
else an overlay. Directories are `<root>/<id>/fs` and `<root>/<id>/work`. For a layer that is presented elsewhere `fs` is a
symbolic link to it: mount(2) takes at most one page of options, and the compaction that containerd does for long chains (it
changes into the common parent of the lower directories) only helps where the differing parts are short. Ten characters a
layer let 128 of them mount; 64 hex digits would stop at sixty.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs

from agent.errors import SettingsError

UID_MAP: Final = Path("/proc/self/uid_map")
OVERLAY_INDEX: Final = Path("/sys/module/overlay/parameters/index")


@attrs.frozen
class Mount:
    """One mount as containerd's API has it."""

    type: str
    source: str
    options: tuple[str, ...]


def check_root(root: Path) -> None:
    """Refuse a directory that cannot stand in overlay's options, which separate by comma and colon.

    Raises:
        SettingsError: names the setting to change.
    """
    if any(char in str(root) for char in ",:\\"):
        raise SettingsError(
            f"{root} cannot hold snapshots: overlayfs cannot take a path with , : or \\ in it; choose another --state-dir"
        )


def overlay_options() -> tuple[str, ...]:
    """Options that this machine wants on every overlay: `userxattr` inside a user namespace (trusted.* is out of reach there),
    `index=off` where the kernel knows it (with it an upper directory is bound to its first lower ones)."""
    try:
        is_initial = UID_MAP.read_text().split() == ["0", "0", "4294967295"]
    except OSError:
        is_initial = True
    options = () if is_initial else ("userxattr",)
    return (*options, "index=off") if OVERLAY_INDEX.exists() else options


def mounts_of(root: Path, identity: int, parents: Sequence[int], *, is_view: bool, extra: Sequence[str] = ()) -> list[Mount]:
    """The mounts of an active snapshot or a view; `parents` are the ids of its chain, nearest first."""
    base = os.fspath(root)
    if not parents:
        return [Mount("bind", f"{base}/{identity}/fs", ("ro" if is_view else "rw", "rbind"))]
    if is_view and len(parents) == 1:
        return [Mount("bind", f"{base}/{parents[0]}/fs", ("ro", "rbind"))]
    lower = "lowerdir=" + ":".join(f"{base}/{parent}/fs" for parent in parents)
    upper = () if is_view else (f"workdir={base}/{identity}/work", f"upperdir={base}/{identity}/fs")
    return [Mount("overlay", "overlay", (*upper, lower, *extra))]
