"""Volumes: flat sparse files whose present blocks a shared bitmap names.

How a range is read: note the bitmap's generation, test the range's bits, read the data file, look at the generation again. If
a bit is clear the read is parked (`fsmount.needs`) and then starts over; if the generation has moved, blocks were taken away
meanwhile and what was read may be a hole, so it starts over too.

The data file is read on the event loop where its pages are cached (RWF_NOWAIT says so without waiting) and in a worker thread
where they are not.

Read-ahead. The kernel asks for more than its reader wants, and a READ is answered as a whole. So a READ of which some blocks are
present may hold up a reader of just these, or of a cached file next to a missing one, for as long as the missing ones take. Such
a READ is given up after a moment with an error that no reader sees: the kernel then asks for the pages wanted, one by one. (With
direct I/O instead there is no read-ahead across files, but each of a layer's small files costs a READ: tar of 7,300 files of
253 MB, data in the page cache, took 3.5 to 4.5 s instead of 1.3 to 1.5 s, and six times the CPU here.)
"""

import errno
import logging
import mmap
import os
from collections import deque
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from fsmount.bitmap import Bitmap, BitmapError
from fsmount.errors import ShoalError
from fsmount.handshake import MAX_READ
from fsmount.needs import Needs

log = logging.getLogger("fsmount")

BLOCK: Final = 4096

MIXED_PATIENCE_S: Final = 1.0
"""How long a READ may wait that holds present blocks too; several times what a piece takes to come from a registry."""

_ASKED_AGAIN_S: Final = 1.0
"""The kernel asks again for a refused range within milliseconds."""


class VolumeError(ShoalError):
    """A volume's files are not what its registration says."""


class VolumeReader:
    """What all volumes of the process share: the buffer that answers are read into, the parked reads, the disk threads."""

    def __init__(self, needs: Needs) -> None:
        self.needs: Final = needs
        # One buffer for all answers read on the loop: pyfuse3 hands an answer to the kernel in the same step in which `read`
        # returns it. A fresh bytes object of 1 MiB would cost 256 page faults a READ.
        self.buffer: Final = memoryview(mmap.mmap(-1, MAX_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.disk: Final = trio.CapacityLimiter(8)


class Volume:
    """One registered volume, open. `size` is a whole number of blocks, at least one: the kernel maps a device in blocks."""

    __slots__ = ("_active", "_blocks", "_fd", "_is_closing", "_may_probe", "_reader", "_refused", "declared_size", "name", "size")

    def __init__(self, name: str, data_path: str, blocks_path: str, declared_size: int, reader: VolumeReader) -> None:
        """Opens both files.

        Raises:
            VolumeError: they are missing, unreadable or of the wrong size.
        """
        self.name = name
        self.declared_size = declared_size
        self.size = max(1, -(-declared_size // BLOCK)) * BLOCK
        self._reader = reader
        self._may_probe = True
        self._refused: deque[tuple[int, int, float, float, bool]] = deque(maxlen=32)
        self._active = 0
        self._is_closing = False
        try:
            self._fd = os.open(data_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise VolumeError(f"cannot open the data of volume {name}: {error}") from error
        try:
            self._blocks = Bitmap.open(Path(blocks_path))
        except (OSError, BitmapError) as error:
            os.close(self._fd)
            raise VolumeError(f"cannot use the block map of volume {name}: {error}") from error
        if self._blocks.unit != BLOCK or self._blocks.bits != -(-declared_size // BLOCK):
            found = f"{self._blocks.bits} bits of {self._blocks.unit} bytes"
            self.close()
            raise VolumeError(f"the block map of volume {name} has {found}, which do not fit its {declared_size} bytes")

    def close(self) -> None:
        """Close the files once no read uses them: a number of a closed descriptor may soon name another file."""
        self._is_closing = True
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._is_closing and not self._active and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._blocks.close()

    @property
    def is_complete(self) -> bool:
        """Whether every block is present."""
        return self._blocks.all_set(0, self._blocks.bits)

    async def read(self, offset: int, length: int, *, is_direct: bool = False) -> memoryview | bytes:
        """Bytes [offset, offset + length), cut at the end; zeros behind the declared size.

        The answer may lie in the shared buffer: use it before the next await. Does not checkpoint when the data are cached
        (the caller's loop does, once a request). `is_direct`: no page cache stands between the reader and this READ.

        Raises:
            pyfuse3.FUSEError: the data did not come in time, or the disk failed.
        """
        length = min(length, self.size - offset, MAX_READ)
        if length <= 0:
            return b""
        if self._fd < 0:
            raise pyfuse3.FUSEError(errno.ESTALE)
        self._active += 1
        try:
            return await self._read_present(offset, length, is_direct=is_direct)
        finally:
            self._active -= 1
            self._close_if_unused()

    async def _read_present(self, offset: int, length: int, *, is_direct: bool) -> memoryview | bytes:
        blocks, since, patience, is_told = self._blocks, -1.0, None, False
        first, stop = offset // BLOCK, min(-(-(offset + length) // BLOCK), blocks.bits)
        while True:
            generation = blocks.generation
            missing = blocks.first_clear(first, stop)
            if missing >= stop:
                data: memoryview | bytes | None = self._read_cached(offset, length)
                if data is None:
                    data = await trio.to_thread.run_sync(self._read_file, offset, length, limiter=self._reader.disk)
                if blocks.generation == generation:
                    return data
                await trio.lowlevel.checkpoint()
                continue
            if since < 0:
                now = trio.current_time()
                since, is_told = self._asked_first(first, stop, now)
                is_mixed = stop - first > 1 and blocks.first_set(first, stop) < stop
                if is_mixed and not is_direct and since == now:
                    patience = MIXED_PATIENCE_S
            wanted = stop
            while wanted > missing + 1 and blocks.test(wanted - 1):
                wanted -= 1
            end = min(wanted * BLOCK, self.declared_size)
            code = await self._reader.needs.wait(
                self.name, missing * BLOCK, end - missing * BLOCK, since, patience, is_told=is_told
            )
            if code:
                self._refused.append((first, stop, trio.current_time(), since, patience is None))
                raise pyfuse3.FUSEError(code)

    def _asked_first(self, first: int, stop: int, now: float) -> tuple[float, bool]:
        """When the reader behind a READ began to wait: earlier if the kernel asks again for what it was refused a moment ago;
        and whether that refusal is in the log.

        So deadline and log line are one for the reader, though read-ahead, the page and the file system above each ask in turn.
        What only touches the refused range counts too: one read of the file system above may become several READs in a row.
        What was refused before the present agent came is forgotten: that agent may have what the last one had not.
        """
        asked_since = self._reader.needs.asked_since
        for begin, end, refused, since, is_told in reversed(self._refused):
            if begin <= stop and first <= end and now - refused < _ASKED_AGAIN_S and refused >= asked_since:
                return since, is_told
        return now, False

    def _read_cached(self, offset: int, length: int) -> memoryview | None:
        """The bytes if the page cache has all of them, in the shared buffer."""
        if not self._may_probe:
            return None
        view = self._reader.buffer[:length]
        try:
            got = os.preadv(self._fd, [view], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # a file system without RWF_NOWAIT: always through a thread
                self._may_probe = False
            return None
        return view if got == length else None

    def _read_file(self, offset: int, length: int) -> bytes:
        """In a thread: the bytes from the disk. Behind the declared size there may be no file; those bytes are zero."""
        try:
            data = os.pread(self._fd, length, offset)
            while len(data) < length:
                more = os.pread(self._fd, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            log.error("disk_read_failed volume=%s offset=%d length=%d error=%s", self.name, offset, length, error)
            raise pyfuse3.FUSEError(errno.EIO) from error
        if len(data) < min(length, self.declared_size - offset):
            log.error("data_file_short volume=%s offset=%d got=%d of=%d", self.name, offset, len(data), length)
            raise pyfuse3.FUSEError(errno.EIO)
        return data.ljust(length, b"\0")
