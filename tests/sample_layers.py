"""Layers for end-to-end tests: files of this machine's Debian packages, and files that do not compress."""

import io
import os
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import BinaryIO

import attrs

from agent.formats.estargz_writer import write_estargz
from agent.formats.model import Digest
from agent.lab.publish import TOC_DIGEST

DEBIAN_FILES = 12_000
_DEBIAN_FOLDERS = (
    "etc",
    "bin",
    "sbin",
    "lib",
    "lib64",
    "var/lib/dpkg",
    "usr/bin",
    "usr/sbin",
    "usr/share",
    "usr/lib",
    "usr/include",
)
_MOST = 1 << 20
"""Larger files are left out, so that the tree is made in seconds."""


def _debian_paths() -> Iterator[str]:
    yield "."
    yield from ("usr", "var", "var/lib")
    for top in _DEBIAN_FOLDERS:
        path = Path("/") / top
        if path.is_symlink() or not path.is_dir():
            if path.is_symlink():
                yield top
            continue
        for folder, folders, files in os.walk(path):
            folders.sort()
            yield folder[1:]
            for name in sorted([*files, *(inner for inner in folders if os.path.islink(f"{folder}/{inner}"))]):
                full = f"{folder}/{name}"
                if os.path.islink(full) or (os.path.isfile(full) and os.path.getsize(full) <= _MOST):
                    yield full[1:]


def debian_tar(path: Path) -> int:
    """Tar a Debian root file system, as far as this machine has one; gives the number of its entries.

    In GNU form: times are whole seconds there, as they are in eStargz.
    """
    # In order: tar gives a folder its time when it has left it.
    names = sorted(islice(_debian_paths(), DEBIAN_FILES), key=lambda name: name.split("/") if name != "." else [])
    subprocess.run(
        ["tar", "--create", "--format=gnu", f"--file={path}", "--directory=/", "--no-recursion", "--null", "--files-from=-"],
        input=b"\0".join(os.fsencode(name) for name in names),
        check=True,
        capture_output=True,
        timeout=60,
    )
    return len(names)


def noise_tar(path: Path, *, files: int, size: int, seed: int, folder: str = "noise") -> None:
    """A tar of files that do not compress, `files` of `size` bytes on average."""
    random = Random(seed)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in (".", folder):
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.mtime = tarfile.DIRTYPE, 0o755, 1_700_000_000
            archive.addfile(member)
        for number in range(files):
            member = tarfile.TarInfo(f"{folder}/{number:05}")
            member.size, member.mtime = random.randint(size // 2, size + size // 2), 1_700_000_000 + number
            archive.addfile(member, io.BytesIO(random.randbytes(member.size)))


@attrs.frozen
class Layer:
    """A compressed layer on disk."""

    path: Path
    digest: Digest
    size: int
    diff_id: Digest
    annotations: dict[str, str]


def make_estargz(
    tar: BinaryIO, path: Path, *, prioritized: Sequence[str] = (), chunk_size: int = 4 << 20, level: int = 1
) -> Layer:
    """A tar as eStargz, by our own writer."""
    with path.open("wb") as sink:
        written = write_estargz(tar, sink, prioritized=prioritized, chunk_size=chunk_size, level=level)
    return Layer(path, written.digest, written.size, written.diff_id, {TOC_DIGEST: str(written.toc_digest)})


def small_image(folder: Path) -> tuple[Layer, ...]:
    """Two layers of some 6 MB each that do not compress: part1/00000 … and part2/00000 …."""
    layers = []
    for number in (1, 2):
        tar = folder / f"{number}.tar"
        noise_tar(tar, files=60, size=100_000, seed=number, folder=f"part{number}")
        with tar.open("rb") as stream:
            layers.append(make_estargz(stream, folder / f"{number}.esgz", chunk_size=64 << 10))
        tar.unlink()
    return tuple(layers)
