"""A mounted tree in the form of the fixtures' ground truth, and that ground truth with the limits of a format applied."""

import gzip
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Facts = dict[str, dict[str, Any]]
"""By path (bytes as latin-1, beginning with a slash): type, mode, uid, gid, mtime_ns, and what the type has besides."""

READ = 1 << 20
_KINDS = {
    stat.S_IFDIR: "dir",
    stat.S_IFREG: "file",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
}
_OVERLAY = ("trusted.overlay.", "user.overlay.")


def _walk(root: bytes, below: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    yield below or b"/", root + below
    with os.scandir(root + below) as entries:
        found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    for name, is_folder in found:
        if is_folder:
            yield from _walk(root, below + b"/" + name)
        else:
            yield below + b"/" + name, root + below + b"/" + name


def sha256_of(path: bytes) -> str:
    """Reads the whole file."""
    hasher = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY)
    try:
        while data := os.read(fd, READ):
            hasher.update(data)
    finally:
        os.close(fd)
    return hasher.hexdigest()


def facts_of(root: Path) -> Facts:
    """Everything that a mounted tree says of itself. A whiteout (0:0) has its type alone, as it stands for an absence."""
    found: Facts = {}
    groups: dict[tuple[int, int], list[str]] = {}
    for name, path in _walk(os.fsencode(root)):
        key = name.decode("latin-1")
        info = os.lstat(path)
        kind = _KINDS[stat.S_IFMT(info.st_mode)]
        if kind == "char" and info.st_rdev == 0:
            folder, base = key.rsplit("/", 1)
            found[f"{folder}/.wh.{base}"] = {"type": "whiteout"}
            continue
        entry: dict[str, Any] = {
            "type": kind,
            "mode": stat.S_IMODE(info.st_mode),
            "uid": info.st_uid,
            "gid": info.st_gid,
            "mtime_ns": info.st_mtime_ns,
        }
        if kind == "file":
            entry |= {"size": info.st_size, "sha256": sha256_of(path)}
            if info.st_nlink > 1:
                groups.setdefault((info.st_dev, info.st_ino), []).append(key)
        elif kind == "symlink":
            entry["target"] = os.readlink(path).decode("latin-1")
        elif kind in ("char", "block"):
            entry["rdev"] = [os.major(info.st_rdev), os.minor(info.st_rdev)]
        xattrs = {}
        for label in os.listxattr(path, follow_symlinks=False):
            if (
                label in ("trusted.overlay.opaque", "user.overlay.opaque")
                and os.getxattr(path, label, follow_symlinks=False) == b"y"
            ):
                found[key.rstrip("/") + "/.wh..wh..opq"] = {"type": "whiteout"}
            if not label.startswith(_OVERLAY):
                xattrs[label] = os.getxattr(path, label, follow_symlinks=False).hex()
        if xattrs:
            entry["xattrs"] = xattrs
        found[key] = entry
    for keys in groups.values():
        for key in keys:
            found[key]["hardlink_group"] = sorted(keys)
    return found


def fixture_truth(folder: Path, tag: str) -> tuple[list[Facts], Facts]:
    """(the layers, bottom first; the merged tree) that a fixture image must give. A nydus image has no trees of its layers."""
    raw = json.loads(gzip.decompress((folder / "expected.json.gz").read_bytes()))
    if tag == "oci-nydus":
        return [], _limited(raw["merged_nydus"], is_json=False)
    if "nydus" in tag:
        # What nydus-image wrote has neither fractions of seconds nor times before 1970 (these became 0).
        whole = {
            key: {**entry, "mtime_ns": max(0, entry["mtime_ns"] // 10**9 * 10**9)} for key, entry in raw["merged_nydus"].items()
        }
        return [], _limited(whole, is_json=False)
    is_json = tag != "oci"
    layers = [_limited(raw["layers"][number], is_json=is_json) for number in ("1", "2")]
    return layers, _limited(raw["merged"], is_json=is_json)


def _limited(expected: Facts, *, is_json: bool) -> Facts:
    out: Facts = {}
    groups: dict[str, list[str]] = {}
    for key, entry in expected.items():
        if is_json:
            key = key.encode("latin-1").decode("utf-8", "replace").encode().decode("latin-1")
            entry = {**entry, "mtime_ns": round(entry["mtime_ns"] / 1e9) * 10**9}
        if key.rsplit("/", 1)[1].startswith(".wh."):
            out[key] = {"type": "whiteout"}
            continue
        out[key] = dict(entry)
        if "hardlink_group" in entry:
            groups.setdefault(entry["hardlink_group"], []).append(key)
    for keys in groups.values():
        for key in keys:
            if len(keys) > 1:
                out[key]["hardlink_group"] = sorted(keys)
            else:
                del out[key]["hardlink_group"]
    return out


def differences(found: Facts, truth: Facts, *, most: int = 10) -> list[str]:
    """What is wrong, in words; empty if nothing is."""
    wrong = [f"missing: {key!r}" for key in sorted(truth.keys() - found.keys())]
    wrong += [f"too much: {key!r}" for key in sorted(found.keys() - truth.keys())]
    for key in sorted(truth.keys() & found.keys()):
        here, there = found[key], truth[key]
        for fact in sorted(here.keys() | there.keys()):
            if here.get(fact) != there.get(fact):
                wrong.append(f"{key[:80]!r}: {fact} is {str(here.get(fact))[:100]}, not {str(there.get(fact))[:100]}")
    return wrong[:most] + ([f"and {len(wrong) - most} more"] if len(wrong) > most else [])
