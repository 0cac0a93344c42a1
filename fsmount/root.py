"""The one FUSE file system of a node, as pyfuse3 sees it.

`volumes/<name>` are flat files, `trees/<name>` whole layers, `images/<name>` the layers' metadata images (for kernels that
cannot mount an image from the file system it lies on). Everything is read-only and never changes under its inode number, so
the kernel may cache all of it for ever; what is removed is invalidated.

A removed volume or layer is retired: its name is gone, but the kernel may still hold it open (a lazily unmounted layer of a
container that still runs). It is served until the kernel forgets its inode.
"""

# ruff: noqa: ARG002  the handlers have the shape that pyfuse3 calls

import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import pyfuse3
import trio

from fsmount.table import LayerRecord, VolumeRecord
from fsmount.volumes import Volume, VolumeReader

if TYPE_CHECKING:
    from fsmount.tree import Tree

log = logging.getLogger("fsmount")

FOREVER: Final = 3.0e8
"""Seconds (ten years) that the kernel may keep names and attributes: nothing here ever changes."""

_VOLUMES: Final = 2
_TREES: Final = 3
_IMAGES: Final = 4
_TOP: Final = {b"volumes": _VOLUMES, b"trees": _TREES, b"images": _IMAGES}
_LOW: Final = 0xFFFFFFFF
_DIRECT: Final = 1 << 62
"""Set in the handle of a file opened with O_DIRECT."""

P = ParamSpec("P")
R = TypeVar("R")


def _answered(handler: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """The edge of the component: whatever goes wrong in a handler is one EIO and a traceback, never the end of the process."""

    @functools.wraps(handler)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            log.exception("handler_failed handler=%s", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return answer


class _Layer:
    """A layer in the root: its record, its volumes, and the tree once somebody looks into it."""

    __slots__ = ("record", "tree", "volumes")

    def __init__(self, record: LayerRecord, volumes: Sequence[Volume]) -> None:
        self.record = record
        self.volumes = tuple(volumes)
        self.tree: Tree | None = None

    def open_tree(self) -> "Tree":
        if self.tree is None:
            from fsmount.tree import Tree  # noqa: PLC0415  not needed, and not in memory, where the kernel mounts EROFS

            self.tree = Tree(self.record.id, self.record.image_path, self.volumes)
        return self.tree


class Root(pyfuse3.Operations):
    """The operations. Records come from the mount table; this class opens what they name."""

    def __init__(self, reader: VolumeReader, on_forgotten: Callable[[int], None]) -> None:
        """`on_forgotten` is told the id of a retired volume or layer when it was closed for good."""
        super().__init__()
        self._reader = reader
        self._on_forgotten = on_forgotten
        self._volume_names: dict[bytes, int] = {}
        self._layer_names: dict[bytes, int] = {}
        self._open: dict[int, Volume | _Layer] = {}
        self._retired: set[int] = set()
        self._unknown: set[int] = set()
        """Those of the retired that the kernel has forgotten, or never knew."""

    # What exists. Called by the mount table, on the loop.

    def add_volume(self, record: VolumeRecord) -> None:
        """Open a volume and show it. Raises VolumeError."""
        volume = Volume(record.name, record.data_path, record.blocks_path, record.size, self._reader)
        self._open[record.id] = volume
        if record.is_retired:
            self._retired.add(record.id)
        else:
            self._volume_names[os.fsencode(record.name)] = record.id

    def volume(self, name: str) -> Volume | None:
        """The live volume of that name."""
        found = self._open.get(self._volume_names.get(os.fsencode(name), -1))
        return found if isinstance(found, Volume) else None

    def add_layer(self, record: LayerRecord) -> None:
        """Show a layer. Its volumes must be there (KeyError)."""
        volumes = []
        for number in record.volume_ids:
            volume = self._open[number]
            if not isinstance(volume, Volume):
                raise KeyError(number)
            volumes.append(volume)
        self._open[record.id] = _Layer(record, volumes)
        if record.is_retired:
            self._retired.add(record.id)
        else:
            self._layer_names[os.fsencode(record.name)] = record.id

    def drop(self, record_id: int) -> None:
        """Close a volume or layer at once; its inodes are stale from now on."""
        found = self._open.pop(record_id, None)
        self._retired.discard(record_id)
        self._unknown.discard(record_id)
        for names in (self._volume_names, self._layer_names):
            for name in [name for name, known in names.items() if known == record_id]:
                del names[name]
        if isinstance(found, Volume):
            found.close()
        elif found is not None:
            for number in found.record.volume_ids:
                if number in self._unknown and self._may_drop(number):
                    self.drop(number)
                    self._on_forgotten(number)

    def _may_drop(self, record_id: int) -> bool:
        """Whether a retired record that the kernel does not know may go; a volume may still have a tree over it."""
        return not any(isinstance(layer, _Layer) and record_id in layer.record.volume_ids for layer in self._open.values())

    async def retire(self, record_id: int) -> bool:
        """Take the name away. True if nothing uses the record, so that it may be dropped at once."""
        name, parents = b"", [_TREES, _IMAGES]
        for names, directories in ((self._volume_names, [_VOLUMES]), (self._layer_names, [_TREES, _IMAGES])):
            for known, number in list(names.items()):
                if number == record_id:
                    name, parents = known, directories
                    del names[known]
        self._retired.add(record_id)
        # The kernel takes locks for this that a request being handled may hold: never on the loop.
        if await trio.to_thread.run_sync(_invalidate, parents, name, limiter=self._reader.disk):
            return False
        self._unknown.add(record_id)
        return record_id in self._retired and self._may_drop(record_id)

    # What the kernel asks.

    def _directory(self, ino: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(ino)
        entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o755)
        entry.st_nlink = 2
        entry.entry_timeout = entry.attr_timeout = FOREVER
        return entry

    def _file(self, ino: int, size: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(ino)
        entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o400)
        entry.st_size = size
        entry.st_blocks = -(-size // 512)
        entry.entry_timeout = entry.attr_timeout = FOREVER
        return entry

    def _find(self, ino: int) -> Volume | _Layer:
        found = self._open.get(ino >> 32)
        if found is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return found

    def _attributes(self, ino: int) -> pyfuse3.EntryAttributes:
        if ino <= _IMAGES:
            return self._directory(ino)
        found = self._find(ino)
        if isinstance(found, Volume):
            return self._file(ino, found.size)
        if ino & _LOW:
            return found.open_tree().attributes(ino)
        return self._file(ino, os.stat(found.record.image_path).st_size)

    @_answered
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if parent_inode > _IMAGES:
            found = self._find(parent_inode)
            if isinstance(found, Volume):
                raise pyfuse3.FUSEError(errno.ENOTDIR)
            return found.open_tree().lookup(parent_inode, name)
        number: int | None = None
        if parent_inode == pyfuse3.ROOT_INODE:
            number = _TOP.get(name)
        elif parent_inode == _VOLUMES:
            number = self._shifted(self._volume_names.get(name))
        elif name in self._layer_names:
            number = self._shifted(self._layer_names[name])
            layer = self._find(number or 0)
            if parent_inode == _TREES and isinstance(layer, _Layer):
                number = layer.open_tree().root
        if number is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(number)

    @staticmethod
    def _shifted(record_id: int | None) -> int | None:
        return None if record_id is None else record_id << 32

    @_answered
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    @_answered
    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        for ino, _count in inode_list:
            record_id = ino >> 32
            if record_id not in self._retired:
                continue
            found = self._open.get(record_id)
            # A tree's inodes come and go one by one; its root goes last.
            if isinstance(found, _Layer) and ino & _LOW and ino != found.open_tree().root:
                continue
            self._unknown.add(record_id)
            if self._may_drop(record_id):
                self.drop(record_id)
                self._on_forgotten(record_id)

    @_answered
    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        self._find(inode)
        handle = inode | _DIRECT if flags & os.O_DIRECT else inode
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle), keep_cache=True)

    @_answered
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        return None

    @_answered
    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)  # once, and the kernel never asks again

    @_answered
    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        is_direct, ino = bool(fh & _DIRECT), fh & ~_DIRECT
        found = self._find(ino)
        if isinstance(found, Volume):
            return await found.read(off, size, is_direct=is_direct)  # type: ignore[return-value]  # any buffer will do for pyfuse3
        if ino & _LOW:
            return await found.open_tree().read(ino, off, size, is_direct=is_direct)  # type: ignore[return-value]  # as above
        return await trio.to_thread.run_sync(_read_image, found.record.image_path, off, size, limiter=self._reader.disk)

    @_answered
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        return pyfuse3.FileHandleT(inode)

    @_answered
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        return None

    @_answered
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        def emit(name: bytes, attributes: pyfuse3.EntryAttributes, next_id: int) -> bool:
            return pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), attributes, next_id)

        if fh > _IMAGES:
            found = self._find(fh)
            if isinstance(found, Volume):
                raise pyfuse3.FUSEError(errno.ENOTDIR)
            found.open_tree().list(fh, start_id, emit)
            return
        if fh == pyfuse3.ROOT_INODE:
            names = [(name, number) for name, number in _TOP.items()]
        elif fh == _VOLUMES:
            names = [(name, number << 32) for name, number in self._volume_names.items()]
        else:
            names = []
            for name, record_id in self._layer_names.items():
                layer = self._open[record_id]
                if isinstance(layer, _Layer):
                    names.append((name, layer.open_tree().root if fh == _TREES else record_id << 32))
        # Sorted by number, and the position is the number: a listing stays right while entries come and go.
        for name, number in sorted(names, key=lambda item: item[1]):
            if number > start_id and not emit(name, self._attributes(number), number):
                return

    @_answered
    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        found = self._find(inode)
        if isinstance(found, Volume):
            raise pyfuse3.FUSEError(errno.EINVAL)
        return pyfuse3.FileNameT(found.open_tree().readlink(inode))

    def _xattrs(self, inode: int, ctx: pyfuse3.RequestContext) -> dict[bytes, bytes]:
        found = self._open.get(inode >> 32)
        if not isinstance(found, _Layer) or not inode & _LOW:
            return {}
        return found.open_tree().xattrs(inode, is_privileged=ctx.uid == 0)

    @_answered
    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        value = self._xattrs(inode, ctx).get(name)
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return bytes(value)

    @_answered
    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> list[pyfuse3.XAttrNameT]:
        return [pyfuse3.XAttrNameT(name) for name in self._xattrs(inode, ctx)]

    @_answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = 4096
        answer.f_blocks = sum(v.size for v in self._open.values() if isinstance(v, Volume)) // 4096
        answer.f_files = len(self._open)
        answer.f_namemax = 255
        return answer


def _invalidate(parents: Sequence[int], name: bytes) -> bool:
    """In a thread: have the kernel drop a name. True if it knew it."""
    knew = False
    for parent in parents:
        try:
            pyfuse3.invalidate_entry(pyfuse3.InodeT(parent), pyfuse3.FileNameT(name))
            knew = True
        except OSError as error:
            if error.errno != errno.ENOENT:
                log.warning("invalidate_failed name=%s error=%s", os.fsdecode(name), error)
                knew = True
    return knew


def _read_image(path: str, offset: int, length: int) -> bytes:
    """In a thread: part of a metadata image."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)
