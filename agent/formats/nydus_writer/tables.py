"""The tables of a v6 bootstrap that speak of blobs and chunks: which blobs there are, and which copy of a chunk counts.

A chunk that several layers have is taken from the lowest blob that has it; the other copies lie in their blobs unused.
"""

from array import array
from collections.abc import Sequence
from typing import Final

from agent.formats.model import FormatError, Inode
from agent.formats.nydus_writer.blob import WrittenBlob
from agent.formats.nydus_writer.records import (
    BLOB_ENTRY,
    BLOB_FEATURES,
    BLOCK,
    CHUNK_COMPRESSED,
    CHUNK_ROW,
    COMPRESSORS,
    DEVICE_ALIGNMENT,
    MAX_BLOBS,
    SHA256,
)
from fsmount.erofs.layout import CHUNK_INDEX, DEVICE_SLOT, NULL_BLOCK

_UNUSED: Final = (1 << 64) - 1
_NUMBER_BITS: Final = 32


class BlobTables:
    """Gives each file its chunk indexes and remembers which chunks are in use."""

    def __init__(self, layers: Sequence[WrittenBlob]) -> None:
        self._layers = layers
        # Layers of equal data have one blob.
        self.blobs = list({layer.digest: layer for layer in layers if layer.digest is not None}.values())
        if len(self.blobs) > MAX_BLOBS:
            raise FormatError(f"{len(self.blobs)} layers with data; nydus can hold {MAX_BLOBS}")
        if len({(layer.chunk_size, layer.compressor) for layer in layers}) > 1:
            raise FormatError("the layers of one image were written with different chunk sizes or compressors")
        # By digest, blob number << 32 | chunk number of the copy that counts.
        self._homes: dict[bytes, int] = {}
        for number, blob in enumerate(self.blobs):
            chunks = blob.chunks
            for row in range(len(chunks)):
                self._homes.setdefault(chunks.digest(row), number << _NUMBER_BITS | row)
        # Offset in the file that uses a chunk first, by blob and chunk.
        self._first_uses = [array("Q", [_UNUSED]) * len(blob.chunks) for blob in self.blobs]

    def indexes_of(self, inode: Inode, layer_number: int) -> bytes:
        """The chunk indexes of a file, 8 bytes each, in the order of the file."""
        layer = self._layers[layer_number]
        chunks, size = layer.chunks, layer.chunk_size
        indexes = bytearray()
        uses = layer.uses[inode.first_chunk : inode.first_chunk + inode.chunk_count]
        for at, use in enumerate(uses):
            home = self._homes[chunks.digest(use)]
            blob, row = home >> _NUMBER_BITS, home & 0xFFFFFFFF
            first = self._first_uses[blob]
            if first[row] == _UNUSED:
                first[row] = at * size
            block = self.blobs[blob].chunks.volume_offset[row] // BLOCK
            # Kernels take neither the chunk's number nor the high byte of the device into account.
            indexes += CHUNK_INDEX.pack(row & 0xFFFF, blob + 1 | row >> 16 << 8, block)
        return bytes(indexes)

    def chunk_rows(self) -> bytes:
        """The chunk table: the chunks in use, by blob and number; to be asked when every file has its indexes."""
        rows = bytearray()
        for number, (blob, first) in enumerate(zip(self.blobs, self._first_uses, strict=True)):
            chunks = blob.chunks
            for row, file_offset in enumerate(first):
                if file_offset == _UNUSED:
                    continue
                stored, plain = chunks.blob_length[row], chunks.size[row]
                rows += CHUNK_ROW.pack(
                    chunks.digest(row),
                    number,
                    CHUNK_COMPRESSED if stored != plain else 0,
                    stored,
                    plain,
                    chunks.blob_offset[row],
                    chunks.volume_offset[row],
                    file_offset,
                    row,
                    0,
                )
        return bytes(rows)

    def blob_entries(self) -> bytes:
        """The blob table."""
        return b"".join(
            BLOB_ENTRY.pack(
                blob.blob_id.encode(),
                number,
                blob.chunk_size,
                len(blob.chunks),
                COMPRESSORS[blob.compressor],
                SHA256,
                BLOB_FEATURES,
                blob.data_size,
                blob.uncompressed_size,
                blob.toc_size,
                COMPRESSORS[blob.info_compressor],
                blob.info_offset,
                blob.info_stored,
                blob.info_size,
                blob.toc_digest,
                bytes(32),
            )
            for number, blob in enumerate(self.blobs)
        )

    def device_slots(self, blocks: int) -> bytes:
        """The device table of an image of so many blocks.

        Raises:
            FormatError: more data than EROFS can address.
        """
        slots = bytearray()
        for blob in self.blobs:
            address = blocks + -blocks % DEVICE_ALIGNMENT
            count = blob.uncompressed_size // BLOCK
            blocks = address + count
            if blocks >= NULL_BLOCK:
                raise FormatError("the layers have more than 16 TiB of data")
            slots += DEVICE_SLOT.pack(blob.blob_id.encode(), count, address, 0, 0)
        return bytes(slots)
