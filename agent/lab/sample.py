"""The sample image: software found on this machine, as layers like those of a real application image.

A Python interpreter with its standard library, the packages of this very environment, and a script that imports some of them and
prints one known line; around it other software of the machine, which a start does not need, as in any real image. The choice is
deterministic for a given machine: sorted paths, up to a given size.

The interpreter goes to /usr/local whatever its place on this machine, so the image looks alike everywhere. Modules that the start
imports are compiled beforehand with unchecked hashes, as an image's build would: nothing depends on file times.
"""

import hashlib
import io
import json
import os
import platform
import py_compile
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator, Sequence
from importlib.util import source_from_cache
from pathlib import Path
from typing import Final

import attrs

VERSION: Final = "4"
"""Part of the cache's key; count it up when what this module makes changes."""

PACKAGES: Final = ("attrs", "cryptography.x509", "httpx", "msgpack", "rich.console", "structlog", "trio")
_PYTHON: Final = f"python{sys.version_info.major}.{sys.version_info.minor}"
_LIBRARY: Final = f"usr/local/lib/{_PYTHON}"
_SITE: Final = "app/lib"
_SKIPPED_DIRS: Final = frozenset(
    {"__pycache__", "test", "tests", "idlelib", "turtledemo", "ensurepip", "site-packages", "dist-packages"}
)
_TOOLS: Final = ("find", "cat", "ls", "sh", "sha256sum", "tar", "stat")
"""For those who want to look around in a container; the benchmarks walk and read with them."""

_LEFT_OUT: Final = ("shoal", "zstandard")
"""Our own code, which would make every image differ; and a package of 23 MB that httpx imports only if it is there."""

SCRIPT: Final = f'''"""Imports a few packages and says so in one line."""
import hashlib
import importlib
import sys

names = {list(PACKAGES)!r}
modules = [importlib.import_module(name) for name in names]
seen = hashlib.sha256()
for module in modules:
    with open(module.__file__, "rb") as stream:
        seen.update(stream.read())
print("shoal sample:", len(names), "packages on Python", sys.version.split()[0], seen.hexdigest()[:16], flush=True)
'''

# Runs the script and lists what it opened: Python's own audit events for files, the memory map for shared libraries.
_TRACER: Final = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" and isinstance(args[0], str) else None)
exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"))
opened += [m.__spec__.origin for m in sys.modules.values() if getattr(m, "__spec__", None) and m.__spec__.has_location]
opened += [line.split()[-1] for line in open("/proc/self/maps") if line.split()[-1].startswith("/")]
print("\\n".join(dict.fromkeys(opened)), file=sys.stderr)
"""


@attrs.frozen
class SampleLayer:
    """One layer as an uncompressed tar; `prioritized` are the names in it that a start reads, in order."""

    name: str
    tar: Path
    prioritized: tuple[str, ...]


@attrs.frozen
class Sample:
    """The image before compression, bottom layer first, and what its command prints."""

    layers: tuple[SampleLayer, ...]
    command: tuple[str, ...]
    environment: tuple[str, ...]
    expected_output: str

    @property
    def size(self) -> int:
        """Bytes of all layers, uncompressed."""
        return sum(layer.tar.stat().st_size for layer in self.layers)


@attrs.frozen
class _Item:
    """A file of the image: where it goes, and the host's file or the bytes it is made of."""

    target: str
    source: Path | None = None
    data: bytes = b""
    mode: int = 0o644


def _walk(root: Path, target: str, *, skipped: frozenset[str] = _SKIPPED_DIRS) -> Iterator[_Item]:
    for folder, dirs, files in os.walk(root):
        dirs[:] = sorted(name for name in dirs if name not in skipped and not name.startswith("config-"))
        for name in sorted(files):
            path = Path(folder) / name
            if not name.endswith((".pyc", ".pyo", ".a", ".pth")) and (path.is_file() or path.is_symlink()):
                yield _Item(f"{target}/{path.relative_to(root)}", path)


def _libraries(binaries: Sequence[Path]) -> list[Path]:
    """The shared libraries of some binaries, by the names under which the loader looks for them."""
    done = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, check=False)
    found: dict[Path, None] = {}
    for line in done.stdout.splitlines():
        words = line.split()
        if words and line.startswith("\t"):
            name = words[2] if "=>" in words and len(words) > 2 else words[0]
            if name.startswith("/"):
                found[Path(name)] = None
    return sorted(found)


def _library_items(libraries: Sequence[Path]) -> Iterator[_Item]:
    """Libraries at the host's place, or in /usr/local/lib if they are not the system's; each as a plain file under its soname."""
    for path in libraries:
        place = str(path).lstrip("/")
        if place.startswith(("lib", "usr/lib")):
            place = place if place.startswith("usr/") else f"usr/{place}"
        else:
            place = f"usr/local/lib/{path.name}"
        yield _Item(place, path.resolve(), mode=0o755)


def _interpreter() -> tuple[Path, Path]:
    """The Python to put into the image, and its standard library: the distribution's if it is of our version, else our own."""
    system = Path("/usr/bin") / _PYTHON
    if not system.exists():
        return Path(getattr(sys, "_base_executable", sys.executable)).resolve(), Path(sysconfig.get_path("stdlib"))
    asked = [str(system), "-c", "import sysconfig; print(sysconfig.get_path('stdlib'))"]
    return system, Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())


def _trace(interpreter: Path, script: Path, site: Path) -> tuple[str, list[Path]]:
    environment = {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [str(interpreter), "-s", "-c", _TRACER, str(script)], env=environment, capture_output=True, text=True, check=True
    )
    opened = [line for line in done.stderr.splitlines() if line.startswith("/")]
    return done.stdout.strip(), [Path(source_from_cache(line) if line.endswith(".pyc") else line) for line in opened]


def _padding(taken: set[str], size: int) -> Iterator[_Item]:
    """Software that a start does not need: whole folders of the machine's own, in order, until `size` bytes."""
    left = size
    for root in ("/usr/bin", "/usr/sbin", f"/usr/lib/{platform.machine()}-linux-gnu", "/usr/lib", "/usr/share"):
        for item in _walk(Path(root), root[1:], skipped=frozenset({"__pycache__", "locale", "doc", "man"})):
            assert item.source is not None
            if item.target in taken or item.source.is_symlink() or not item.source.is_file():
                continue
            left -= item.source.stat().st_size
            if left < 0:
                return
            taken.add(item.target)
            yield item


def _compiled(item: _Item, scratch: Path) -> _Item | None:
    """The `.pyc` of a module, or None if it does not compile."""
    assert item.source is not None
    target = Path(item.target)
    output = scratch / "module.pyc"
    try:
        py_compile.compile(
            str(item.source),
            str(output),
            f"/{item.target}",
            doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
    except py_compile.PyCompileError:
        return None
    return _Item(
        str(target.parent / "__pycache__" / f"{target.stem}.{sys.implementation.cache_tag}.pyc"), data=output.read_bytes()
    )


def build_sample(folder: Path, *, size: int = 315_000_000) -> Sample:
    """Make the layers' tars in `folder`, about `size` bytes together; quick if they are there already.

    Blocking, for several seconds: call it from a worker thread.
    """
    folder.mkdir(parents=True, exist_ok=True)
    site = Path(sysconfig.get_path("purelib"))
    interpreter, stdlib = _interpreter()
    script = folder / "main.py"
    script.write_text(SCRIPT)
    expected, opened = _trace(interpreter, script, site)

    modules = list(_walk(stdlib, _LIBRARY))
    packages = [item for item in _walk(site, _SITE) if not any(name in item.target.split("/")[2] for name in _LEFT_OUT)]
    places = {item.source: item for item in (*modules, *packages)}
    needed = [places[path] for path in opened if path in places]
    tools = [Path(path) for name in _TOOLS if (path := shutil.which(name, path="/usr/bin:/bin"))]
    binaries = [interpreter, *tools, *(item.source for item in needed if item.source is not None and ".so" in item.source.name)]
    base = [
        *_library_items(_libraries(binaries)),
        *(_Item(f"usr/bin/{path.name}", path.resolve(), mode=0o755) for path in tools),
        _Item("etc/passwd", data=b"root:x:0:0:root:/root:/bin/sh\n"),
        _Item("etc/group", data=b"root:x:0:\n"),
        _Item("etc/nsswitch.conf", data=b"hosts: files\n"),
    ]
    compiled = {item.target: pyc for item in needed if item.target.endswith(".py") and (pyc := _compiled(item, folder))}
    python = [
        _Item(f"usr/local/bin/{_PYTHON}", interpreter, mode=0o755),
        *modules,
        *(pyc for name, pyc in compiled.items() if name.startswith(_LIBRARY)),
    ]
    packages = _within(packages, needed, size - sum(_size(item) for item in (*base, *python)))
    application = [*packages, *(pyc for name, pyc in compiled.items() if name.startswith(_SITE))]
    taken = {item.target for item in (*base, *python, *application)}
    so_far = sum(_size(item) for item in (*base, *python, *application))
    contents = {
        "system": [*base, *_padding(taken, max(0, size - so_far))],
        "python": python,
        "packages": application,
        "app": [_Item("app/main.py", data=SCRIPT.encode())],
    }

    first = {
        f"usr/local/bin/{_PYTHON}": None,
        **dict.fromkeys(item.target for item in base if not item.target.startswith("usr/bin/")),
    }
    for item in needed:
        pyc = compiled.get(item.target)
        first[pyc.target if pyc else item.target] = None
    # The script hashes these sources.
    first.update(dict.fromkeys(item.target for item in needed if item.target in _hashed(needed)))
    first["app/main.py"] = None
    layers = tuple(_write_layer(folder, name, items, list(first)) for name, items in contents.items())
    environment = (
        "PATH=/usr/local/bin:/usr/bin:/bin",
        f"PYTHONPATH=/{_SITE}",
        "PYTHONHOME=/usr/local",
        "PYTHONDONTWRITEBYTECODE=1",
        "LD_LIBRARY_PATH=/usr/local/lib",
        "LANG=C.UTF-8",
    )
    return Sample(layers, (f"/usr/local/bin/{_PYTHON}", "/app/main.py"), environment, expected)


def _size(item: _Item) -> int:
    return item.source.stat().st_size if item.source else len(item.data)


def _within(packages: Sequence[_Item], needed: Sequence[_Item], size: int) -> list[_Item]:
    """The packages that the script needs, whole, and of the others what fits into `size` bytes."""
    needed_roots = {item.target.split("/")[2] for item in needed if item.target.startswith(f"{_SITE}/")}
    chosen = [item for item in packages if item.target.split("/")[2] in needed_roots]
    left = size - sum(_size(item) for item in chosen)
    for item in packages:
        if item.target.split("/")[2] not in needed_roots and left > 0:
            chosen.append(item)
            left -= _size(item)
    return chosen


def _hashed(needed: Sequence[_Item]) -> set[str]:
    stems = {f"{_SITE}/{name.replace('.', '/')}" for name in PACKAGES}
    return {
        item.target
        for item in needed
        if item.target.removesuffix(".py") in stems or item.target.removesuffix("/__init__.py") in stems
    }


def _write_layer(folder: Path, name: str, items: Sequence[_Item], first: Sequence[str]) -> SampleLayer:
    path = folder / f"{name}.tar"
    names = {item.target for item in items}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        if name == "system":
            for link, target in (("lib", "usr/lib"), ("lib64", "usr/lib64"), ("bin", "usr/bin"), ("sbin", "usr/sbin")):
                tar.addfile(_header(link, tarfile.SYMTYPE, 0o777, linkname=target))
            for directory in ("tmp", "proc", "sys", "dev", "run", "root"):
                tar.addfile(_header(directory, tarfile.DIRTYPE, 0o1777 if directory == "tmp" else 0o755))
        made: set[str] = set()
        for item in sorted(items, key=lambda item: item.target):
            for parent in reversed(Path(item.target).parents):
                if str(parent) not in {".", *made}:
                    made.add(str(parent))
                    tar.addfile(_header(str(parent), tarfile.DIRTYPE, 0o755))
            _add(tar, item)
    return SampleLayer(name, path, tuple(target for target in first if target in names))


def _header(name: str, kind: bytes, mode: int, *, linkname: str = "", mtime: int = 0, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.mtime, info.size = kind, mode, linkname, mtime, size
    return info


def _add(tar: tarfile.TarFile, item: _Item) -> None:
    if item.source is None:
        tar.addfile(_header(item.target, tarfile.REGTYPE, item.mode, size=len(item.data)), io.BytesIO(item.data))
        return
    state = item.source.lstat()
    if item.source.is_symlink():
        tar.addfile(_header(item.target, tarfile.SYMTYPE, 0o777, linkname=os.readlink(item.source), mtime=int(state.st_mtime)))
        return
    mode = state.st_mode & 0o755 | item.mode
    with item.source.open("rb") as stream:
        tar.addfile(_header(item.target, tarfile.REGTYPE, mode, mtime=int(state.st_mtime), size=state.st_size), stream)


def sample_key(size: int) -> str:
    """Names what `build_sample` would make on this machine now, without making it."""
    state = [VERSION, SCRIPT, str(size), sys.version, platform.machine()]
    for folder in (str(_interpreter()[1]), sysconfig.get_path("purelib"), "/usr/bin", "/usr/lib", "/usr/share"):
        state += [folder, *sorted(os.listdir(folder))]
    # Package managers note every change there; folder times change for less.
    state += [str(path.stat().st_mtime_ns) for path in (Path("/var/lib/dpkg/status"),) if path.exists()]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
