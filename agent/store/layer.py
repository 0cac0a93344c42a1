"""One stored layer: its blob, its volume, and what of both is here.

Everything but the tests of bits may block on the disk and belongs in a worker thread; any number of threads may call at once.
"""

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from agent.errors import StoreError
from agent.formats.model import BLOCK_SIZE, Digest, FormatError
from agent.store import verification
from agent.store.gate import Gate
from agent.store.layout import LayerPaths, OpenedLayer, data_size, doubt_pieces, is_image_good, sync_layer, write_saved
from agent.store.sparse import allocated_bytes, clone_range, has_data, punch_hole, read_exactly, write_all, write_content

BLOB_READ: Final = 1 << 20
"""Bytes of a blob that are read at once while it is verified."""

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors that eviction may mend."""


class StoredLayer:
    """A layer of the store. Its tables and facts are attributes; its methods are safe from any thread."""

    def __init__(
        self,
        root: Path,
        opened: OpenedLayer,
        *,
        on_written: Callable[[int], None],
        on_full: Callable[[], None],
        writing: Gate,
        is_dirty: bool = False,
        is_new: bool = False,
    ) -> None:
        header = opened.header
        self.digest: Digest = header.digest
        self.format, self.codec = header.format, header.codec
        self.blob_size, self.volume_size = header.blob_size, header.volume_size
        self.prefetch_stop, self.entry_count = header.prefetch_stop, header.entry_count
        self.extra = header.extra
        self.chunks, self.pieces, self.members = opened.chunks, opened.pieces, opened.members
        self.prefetch_pieces, self.parts = header.prefetch_pieces, header.parts
        paths = LayerPaths.of(root)
        self.root = root
        self.data_path, self.blob_path, self.blocks_path, self.image_path = paths.data, paths.blob, paths.block_map, paths.image
        self.last_used_s = time.time()
        self._paths, self._header = paths, header
        self._presence = opened.presence
        self._piece_map, self._piece_doubt = opened.piece_map, opened.piece_doubt
        self._piece_doubts = opened.piece_doubt.count()
        self._piece_lock = threading.Lock()
        self._data_fd, self._blob_fd = opened.data_fd, opened.blob_fd
        self._learnt = opened.learnt
        self._gate = Gate()
        self._writing = writing
        self._on_written, self._on_full = on_written, on_full
        self._arriving: dict[int, float] = {}
        """Pieces that somebody is writing or about to mark, and when they were last touched: eviction leaves their bytes alone."""
        self._is_dirty = self._is_map_dirty = is_dirty
        self._is_index_durable = not (is_dirty or is_new)
        self._is_closed = False
        self._may_clone = True
        """Until the file system has refused; it would refuse again."""

    def __repr__(self) -> str:
        return f"<StoredLayer {self.digest}>"

    # --- what is here: no I/O, fine on the event loop ---------------------------------------------------------------------

    def has_chunk(self, number: int) -> bool:
        """Whether the chunk's verified bytes are in the volume and not in doubt."""
        return self._presence.has(number)

    def is_doubtful(self, number: int) -> bool:
        """Whether the chunk was here before an unclean boot and must be hashed (`verify_chunk`) before it is used."""
        return self._presence.is_doubtful(number)

    def missing_chunks(self, start: int, stop: int) -> list[int]:
        """Chunks with bytes in volume range [start, stop) that are not here (or are in doubt), each place once."""
        return self._presence.missing(start, stop)

    @property
    def complete(self) -> bool:
        """Whether the whole volume is here."""
        return self._presence.is_complete

    def has_piece(self, number: int) -> bool:
        """Whether the piece's bytes are in the blob file and verified."""
        return self._piece_map.test(number)

    def possession(self) -> bytes:
        """Bitmap of the pieces that are held, least significant bit first."""
        return self._piece_map.to_bytes()

    @property
    def has_doubts(self) -> bool:
        """Whether `verify_chunk` or `verify_piece` has work left from an unclean boot."""
        return bool(self._presence.doubtful() or self.doubtful_pieces())

    def doubtful_pieces(self) -> list[int]:
        """Pieces that were held before an unclean boot; `verify_piece` settles one."""
        if not self._piece_doubts:
            return []
        return [number for number in range(len(self.pieces)) if self._piece_doubt.test(number)]

    def doubtful_chunks(self) -> list[int]:
        """Chunks that were here before an unclean boot; `verify_chunk` settles one."""
        return self._presence.doubtful()

    def present_chunks(self) -> list[int]:
        """All chunks that are here, each place in the volume once."""
        return self._presence.present()

    def touch(self) -> None:
        """Note that the layer was used just now; the least recently used is evicted first."""
        self.last_used_s = time.time()

    def disk_bytes(self) -> int:
        """Bytes of disk that blob and volume take now."""
        return sum(self.part_bytes())

    def part_bytes(self) -> tuple[int, int]:
        """Bytes of disk that (blob, volume) take now."""
        if self._is_closed:
            return 0, 0
        return allocated_bytes(self._blob_fd), allocated_bytes(self._data_fd)

    # --- the volume -------------------------------------------------------------------------------------------------------

    def write_chunk(self, number: int, data: bytes | bytearray | memoryview) -> None:
        """Put a verified chunk into the volume and let fsmount serve it. Does nothing if it is here already.

        Raises:
            StoreError: the disk refused (`errno`); nothing was marked.
        """
        size = self.chunks.size[number]
        if len(data) != size:
            raise StoreError(f"chunk {number} of {self.digest} has {size} bytes, not {len(data)}")
        with self._writing.shared(), self._shared("writing a chunk"):
            if self._presence.has(number):
                return
            write_content(self._data_fd, data, self.chunks.volume_offset[number])
            if self._learnt is not None and not self.chunks.is_known(number):
                self._learnt.learn(self._presence.first(number), data)
            self._presence.add(number)
            self._is_dirty = True
        self.touch()
        self._on_written(size)

    def read_chunk(self, number: int) -> bytes:
        """The bytes of a chunk that is here.

        Raises:
            StoreError: it is not here, or the disk failed.
        """
        with self._shared("reading a chunk"):
            if not self._presence.has(number):
                raise StoreError(f"chunk {number} of {self.digest} is not in the store")
            data = self._read_place(number)
        self.touch()
        return data

    def verify_chunk(self, number: int) -> bool:
        """Hash a chunk that is here or in doubt: good, it may be served (again); bad, it is forgotten. False if it is not here.

        Raises:
            StoreError: the disk failed in a way that says nothing about this chunk.
        """
        with self._shared("verifying a chunk"):
            is_here = self._presence.has(number)
            if not is_here and not self._presence.is_doubtful(number):
                return False
            try:
                is_good = self._is_right(number, self._read_place(number))
            except OSError:  # a bad sector is as good as wrong bytes: both are fetched again
                is_good = False
            if not is_good:
                self._presence.drop(number)
            elif not is_here:
                self._presence.add(number)
            self._is_dirty = True
            return is_good

    def copy_chunk(self, source: "StoredLayer", source_number: int, number: int) -> bool:
        """Take a chunk with the same digest from another layer (or this one); False if its bytes turn out not to be right.

        Where the file system can, the two share the disk blocks. The bytes are hashed in any case.

        Raises:
            StoreError: it is not there, or the disk refused.
        """
        with ExitStack() as stack:
            stack.enter_context(self._writing.shared())
            # In one order everywhere: of two that copy from each other each could hold what the other one waits for.
            for layer in sorted({self, source}, key=lambda layer: layer.digest):
                stack.enter_context(layer._shared("copying a chunk"))
            if not source.has_chunk(source_number):
                raise StoreError(f"chunk {source_number} of {source.digest} is not in the store")
            if self._presence.has(number):
                return True
            data = source._read_place(source_number)
            if not self.chunks.is_right(number, data):
                return False
            cloned = self._clone(source, source.chunks.volume_offset[source_number], self.chunks.volume_offset[number], len(data))
            write_content(self._data_fd, memoryview(data)[cloned:], self.chunks.volume_offset[number] + cloned)
            self._presence.add(number)
            self._is_dirty = True
        self.touch()
        self._on_written(len(data) - cloned)
        return True

    def _clone(self, source: "StoredLayer", source_offset: int, offset: int, size: int) -> int:
        """Share the whole blocks of a chunk; gives the bytes that need not be written."""
        whole = size - size % BLOCK_SIZE
        if not self._may_clone or not whole or source_offset % BLOCK_SIZE or offset % BLOCK_SIZE:
            return 0
        if clone_range(source._data_fd, source_offset, whole, self._data_fd, offset):
            return whole
        self._may_clone = False
        return 0

    def forget_chunk(self, number: int) -> None:
        """Have a chunk fetched again."""
        with self._shared("forgetting a chunk"):
            self._presence.drop(number)
            self._is_dirty = True

    def _is_right(self, number: int, data: bytes) -> bool:
        if self._learnt is not None and not self.chunks.is_known(number):
            return self._learnt.is_right(self._presence.first(number), data)
        return self.chunks.is_right(number, data)

    def _read_place(self, number: int) -> bytes:
        return read_exactly(self._data_fd, self.chunks.volume_offset[number], self.chunks.size[number])

    # --- the blob ---------------------------------------------------------------------------------------------------------

    def write_blob(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put bytes of the blob into its file. They are served to nobody until their piece is marked.

        Raises:
            StoreError: outside the blob, or the disk refused (`errno`).
        """
        stop = offset + len(data)
        if not 0 <= offset <= stop <= self.blob_size:
            raise StoreError(f"blob range {offset}-{stop} of {self.digest}, which has {self.blob_size} bytes")
        with self._writing.shared(), self._shared("writing the blob"):
            self._note_arriving(offset, stop)
            write_all(self._blob_fd, data, offset)
        self.touch()
        self._on_written(len(data))

    def mark_piece(self, number: int) -> None:
        """Declare a piece held, after all its bytes were written to the blob file and all its chunks were verified.

        Raises:
            StoreError: not all of its bytes are in the blob file.
        """
        start, stop = self.pieces.extent(number)
        with self._shared("marking a piece"), self._piece_lock:
            if not has_data(self._blob_fd, start, stop):
                raise StoreError(f"piece {number} of {self.digest} was marked before its bytes were written")
            self._set_piece(number)

    def read_blob(self, start: int, stop: int) -> bytes | None:
        """Bytes of the blob; None unless every piece that they touch is held.

        Raises:
            StoreError: the disk failed.
        """
        if not 0 <= start <= stop <= self.blob_size:
            return None
        with self._shared("reading the blob"):
            if not all(self._piece_map.test(number) for number in self.pieces.covering(start, stop)):
                return None
            data = read_exactly(self._blob_fd, start, stop - start)
        self.touch()
        return data

    def peek_blob(self, start: int, stop: int) -> bytes:
        """What the blob file holds, unverified: for a caller that verifies it and then marks the pieces.

        Raises:
            StoreError: the disk failed.
        """
        with self._shared("reading the blob"):
            self._note_arriving(start, stop)
            return read_exactly(self._blob_fd, start, stop - start)

    def blob_has_data(self, start: int, stop: int) -> bool:
        """Whether the file has no hole in that range: a cheap hint that `peek_blob` may find a whole piece.

        Raises:
            StoreError: the disk failed.
        """
        with self._shared("reading the blob"):
            return has_data(self._blob_fd, start, stop)

    def forget_piece(self, number: int) -> None:
        """Do not serve a piece any more; it may be fetched again."""
        with self._shared("forgetting a piece"), self._piece_lock:
            self._piece_map.clear(number, number + 1)
            self._clear_piece_doubt(number)
            self._is_dirty = True

    def verify_piece(self, number: int) -> bool:
        """Decode a piece that is held or in doubt: good, it may be served (again); bad, it is forgotten. False if it is not here.

        A piece of a layer without random access can only be judged together with all others; it is good if the blob is.

        Raises:
            StoreError: the disk failed in a way that says nothing about this piece.
        """
        if not self._piece_map.test(number) and not self._piece_doubt.test(number):
            return False
        if self.codec == "whole":
            return self._verify_blob()
        with self._shared("verifying a piece"):
            try:
                is_good = verification.is_piece_good(self, number, self._blob_parts(*self.pieces.extent(number)))
            except (OSError, FormatError):
                is_good = False
            with self._piece_lock:
                return self._judge_pieces((number,), is_good=is_good)

    def _verify_blob(self) -> bool:
        with self._shared("verifying the blob"):
            everything = range(len(self.pieces))
            if not all(self._piece_map.test(number) or self._piece_doubt.test(number) for number in everything):
                is_good = False
            else:
                hasher = hashlib.sha256()
                try:
                    for part in self._blob_parts(0, self.blob_size):
                        hasher.update(part)
                    is_good = "sha256:" + hasher.hexdigest() == self.digest
                except OSError:
                    is_good = False
            with self._piece_lock:
                return self._judge_pieces(everything, is_good=is_good)

    def _judge_pieces(self, numbers: range | tuple[int, ...], *, is_good: bool) -> bool:
        for number in numbers:
            if is_good:
                self._set_piece(number)
            else:
                self._piece_map.clear(number, number + 1)
                self._clear_piece_doubt(number)
        self._is_dirty = True
        return is_good

    def _blob_parts(self, start: int, stop: int) -> Iterator[bytes]:
        while start < stop:
            size = min(BLOB_READ, stop - start)
            yield read_exactly(self._blob_fd, start, size)
            start += size

    def _set_piece(self, number: int) -> None:
        self._clear_piece_doubt(number)
        self._piece_map.set(number, number + 1)
        self._arriving.pop(number, None)
        self._is_dirty = True

    def _clear_piece_doubt(self, number: int) -> None:
        if self._piece_doubts and self._piece_doubt.test(number):
            self._piece_doubt.clear(number, number + 1)
            self._piece_doubts -= 1

    def _note_arriving(self, start: int, stop: int) -> None:
        now = time.monotonic()
        for number in self.pieces.covering(start, stop):
            if not self._piece_map.test(number):
                self._arriving[number] = now

    # --- the metadata image -----------------------------------------------------------------------------------------------

    def verify_image(self) -> bool:
        """Whether the metadata image is as it was made."""
        with self._shared("verifying the metadata image"):
            return is_image_good(self.image_path, self._header)

    def repair_image(self, image: bytes | bytearray) -> bool:
        """Write the metadata image again, in place and so under any mount of it; False if `image` is another one.

        Raises:
            StoreError: the disk refused.
        """
        if hashlib.sha256(image).digest() != self._header.meta_sha256:
            return False
        with self._writing.shared(), self._shared("repairing the metadata image"):
            fd = os.open(self.image_path, os.O_RDWR | os.O_CLOEXEC)
            try:
                write_all(fd, image, 0)
                os.ftruncate(fd, len(image))
                os.fsync(fd)
            finally:
                os.close(fd)
        return True

    # --- for the store ----------------------------------------------------------------------------------------------------

    def evict_blob(self, *, stale_after_s: float) -> list[int]:
        """Give the blob's disk space back, except that of pieces somebody is writing; gives the pieces that were lost.

        A piece counts as being written if it was touched within `stale_after_s` seconds.

        Raises:
            StoreError: the disk failed.
        """
        with self._alone("evicting the blob"), self._piece_lock:
            lost = [number for number in range(len(self.pieces)) if self._piece_map.test(number)]
            self._piece_map.clear(0, self._piece_map.bits)
            self._piece_doubt.clear(0, self._piece_doubt.bits)
            self._piece_doubts = 0
            self._is_dirty = True
            youngest_stale = time.monotonic() - stale_after_s
            self._arriving = {number: at for number, at in self._arriving.items() if at > youngest_stale}
            at = 0
            for number in sorted(self._arriving):
                start, stop = self.pieces.extent(number)
                punch_hole(self._blob_fd, at, start)
                at = stop
            # Up to the end of the last block: of a block that is only partly punched the disk space stays.
            punch_hole(self._blob_fd, at, data_size(self.blob_size) if at < self.blob_size else at)
            return lost

    def evict_data(self) -> None:
        """Give the volume's disk space back; fsmount is told by the bits, before the bytes go.

        Raises:
            StoreError: the disk failed.
        """
        with self._alone("evicting the volume"):
            self._presence.drop_all()
            self._is_dirty = True
            punch_hole(self._data_fd, 0, os.fstat(self._data_fd).st_size)

    def checkpoint(self) -> None:
        """Make durable what is here now, and the knowledge of it.

        Raises:
            StoreError: the disk failed. What the kernel could not write is in doubt from now on.
        """
        if not self._is_index_durable:
            with self._shared("checkpointing"), self._mapped_errors("checkpointing"):
                sync_layer(self.root)
            self._is_index_durable = True
        if not self._is_dirty:
            return
        with self._shared("checkpointing"):
            self._is_dirty = False
            self._is_map_dirty = True
            # First the maps are copied, then the bytes synced: every bit of the copy has its bytes on the disk.
            chunks = self._presence.snapshot()
            with self._piece_lock:
                pieces = self._held_or_doubted()
            fds = [self._data_fd, self._blob_fd, *([self._learnt.fileno()] if self._learnt is not None else [])]
            fds = [os.dup(fd) for fd in fds]  # the gate is not held while the disk works
        try:
            with self._mapped_errors("checkpointing"):
                for fd in fds:
                    os.fdatasync(fd)
                write_saved(self._paths.chunk_saved, len(self.chunks), chunks)
                write_saved(self._paths.piece_saved, len(self.pieces), pieces)
        except StoreError as exc:
            self._is_dirty = True
            if exc.errno == errno.EIO:
                self._doubt_everything()
            raise
        finally:
            for fd in fds:
                os.close(fd)

    def _held_or_doubted(self) -> bytes:
        held = int.from_bytes(self._piece_map.to_bytes(), "little")
        if self._piece_doubts:
            held |= int.from_bytes(self._piece_doubt.to_bytes(), "little")
        return held.to_bytes((len(self.pieces) + 7) // 8, "little")

    def _doubt_everything(self) -> None:
        # The kernel drops pages it could not write back and says so once (fsync(2), EIO): any of them may be gone.
        self._presence.doubt_all()
        with self._piece_lock:
            doubt_pieces(self._piece_map, self._piece_doubt)
            self._piece_doubts = self._piece_doubt.count()

    def sync_maps(self) -> None:
        """Write the maps to the disk, at a clean end."""
        if not self._is_map_dirty:
            return
        with self._shared("writing the maps"):
            self._presence.sync()
            self._piece_map.sync()
            self._piece_doubt.sync()

    def close(self, *, unmap: bool = False) -> None:
        """End all use: later calls that touch the disk raise StoreError. Tests of bits still answer unless `unmap` ends them too."""
        with self._gate.exclusive():
            if not self._is_closed:
                self._is_closed = True
                os.close(self._data_fd)
                os.close(self._blob_fd)
                if self._learnt is not None:
                    self._learnt.close()
            if unmap:
                self._presence.close()
                self._piece_map.close()
                self._piece_doubt.close()

    @contextmanager
    def _shared(self, doing: str) -> Iterator[None]:
        with self._gate.shared():
            with self._mapped_errors(doing):
                yield

    @contextmanager
    def _alone(self, doing: str) -> Iterator[None]:
        with self._gate.exclusive():
            with self._mapped_errors(doing):
                yield

    @contextmanager
    def _mapped_errors(self, doing: str) -> Iterator[None]:
        if self._is_closed:
            raise StoreError(f"{doing} of {self.digest}: the layer was removed or the store is closed")
        try:
            yield
        except OSError as exc:
            if exc.errno in FULL:
                self._on_full()
            raise StoreError(f"{doing} of {self.digest} failed: {exc.strerror or exc}", errno=exc.errno or 0) from exc
