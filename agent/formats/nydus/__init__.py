"""Nydus RAFS, versions 5 and 6 and zran (formats.md 3): images of one bootstrap and several data blobs.

Trust. The manifest vouches for the bootstrap's layer by its digest, which is checked over the whole layer; the bootstrap has the
digests of all chunks, and those are always checked, whatever flags of the image say. Tables in the data blobs only say how to decode
and need no trust, except digests that a bootstrap left to them: these are believed if a digest in the bootstrap leads there.

A blob with a bootstrap of its own, in an image without a bootstrap layer, is read whole once: nothing in it is vouched for but all
of it.
"""

import hashlib
from collections.abc import Generator
from typing import Final

from agent.formats.model import ChunkTable, FormatError, Inode, InodeKind, LayerIndex, digest_of
from agent.formats.nydus.assemble import assemble, lay_out, needs_tables
from agent.formats.nydus.blob_meta import HEADER_SIZE, MAX_TABLES, BlobMeta, check_bounds, decompress, read_copy, read_stored
from agent.formats.nydus.blob_toc import TAIL_SIZE, BlobToc, find_bootstrap, read_toc
from agent.formats.nydus.bootstrap import BlobEntry, Bootstrap
from agent.formats.nydus.bootstrap_v5 import is_v5, parse_v5
from agent.formats.nydus.bootstrap_v6 import is_v6, parse_v6
from agent.formats.nydus.packaging import (
    MAX_LAYER_BYTES,
    MAX_UNPACKED_BYTES,
    BlobPlace,
    BootstrapFiles,
    is_bootstrap_layer,
    is_data_layer,
    locate,
    unpack_layer,
)
from agent.formats.opening import BlobRange, IndexReader, LayerFacts, Want
from agent.formats.pieces import cut_fixed

_STEP: Final = 4 << 20
_TOC_DIGESTS: Final = "blob.digest"


def parse_bootstrap(data: bytes) -> Bootstrap:
    """Read a bootstrap of either version.

    Raises:
        FormatError: it is neither, or not one that Shoal reads.
    """
    if is_v5(data):
        return parse_v5(data)
    if is_v6(data):
        return parse_v6(data)
    raise FormatError("the bootstrap is neither RAFS v5 nor v6")


class NydusFormat:
    """Nydus as `agent.formats.catalogue` lists it."""

    name = "nydus"
    is_only_form = True

    def recognises(self, facts: LayerFacts) -> bool:
        """A bootstrap layer; or a data blob of an image that has none."""
        if is_bootstrap_layer(facts):
            return True
        return is_data_layer(facts) and bool(facts.siblings) and not any(is_bootstrap_layer(layer) for layer in facts.siblings)

    def read_index(self, facts: LayerFacts) -> IndexReader:
        """The bootstrap, then what tables of other blobs it takes."""
        files = yield from _read_bootstrap(facts)
        bootstrap = parse_bootstrap(files.bootstrap)
        bootstrap.apply_whiteouts(is_merged=is_bootstrap_layer(facts))
        metas: dict[int, BlobMeta] = {}
        places: dict[int, BlobPlace] = {}
        held = len(files.bootstrap) + sum(len(meta) for meta in files.metas.values())

        def find(blob: int) -> Generator[Want, bytes, None]:
            """Fill in the place of a blob, and its tables."""
            nonlocal held
            entry = bootstrap.blobs[blob]
            held += entry.ci_usize
            if held > MAX_UNPACKED_BYTES + MAX_TABLES:
                raise FormatError(f"the blobs of the image have tables of more than {MAX_TABLES} bytes")
            metas[blob] = yield from _read_meta(entry, places[blob], files.metas)

        open_rows: dict[int, list[int]] = {}
        for row in bootstrap.chunks.open_rows:
            open_rows.setdefault(bootstrap.chunks.blob[row], []).append(row)
        for blob, rows in open_rows.items():
            places[blob] = locate(bootstrap.blobs[blob], blob, bootstrap.blobs, facts)
            yield from find(blob)
            digests = yield from _read_digests(bootstrap.blobs[blob], places[blob])
            _fill_in(bootstrap, rows, metas[blob], digests)
        volume = lay_out(bootstrap)
        for blob in volume.blobs:
            places[blob] = locate(bootstrap.blobs[blob], blob, bootstrap.blobs, facts)
            if blob not in metas and needs_tables(bootstrap.blobs[blob]):
                yield from find(blob)
        return assemble(bootstrap, volume, places, metas, facts.digest, facts.size)


class NydusDataFormat:
    """The data blobs of an image with a bootstrap layer: as layers they are empty, for the bootstrap's has all files and reads
    their bytes (`LayerIndex.parts`). A runtime still mounts them, one below the other."""

    name = "nydus data"
    is_only_form = True

    def recognises(self, facts: LayerFacts) -> bool:
        """A data blob and a bootstrap layer are in the same image."""
        return is_data_layer(facts) and any(is_bootstrap_layer(layer) for layer in facts.siblings)

    def read_index(self, facts: LayerFacts) -> IndexReader:
        """An empty tree; nothing is read."""
        yield from ()
        return LayerIndex("nydus data", "raw", Inode(InodeKind.DIRECTORY), ChunkTable(), cut_fixed(facts.size), 0, 0)


FORMAT: Final = NydusFormat()
DATA_FORMAT: Final = NydusDataFormat()


def _read_bootstrap(facts: LayerFacts) -> Generator[Want, bytes, BootstrapFiles]:
    if not is_bootstrap_layer(facts):
        return (yield from _read_inline(facts))
    if facts.media_type.endswith("+encrypted"):
        raise FormatError("the bootstrap layer is encrypted, which Shoal does not read")
    if facts.size > MAX_LAYER_BYTES:
        raise FormatError(f"a bootstrap layer of {facts.size} bytes")
    blob = yield BlobRange(0, facts.size)
    if digest_of(blob) != facts.digest:
        raise FormatError(f"the bootstrap layer has digest {digest_of(blob)}, the manifest says {facts.digest}")
    return unpack_layer(blob)


def _read_inline(facts: LayerFacts) -> Generator[Want, bytes, BootstrapFiles]:
    """The bootstrap at the end of a data blob, which is verified as a whole."""
    tail = yield BlobRange(max(0, facts.size - TAIL_SIZE), facts.size)
    part = find_bootstrap(tail, facts.size)
    if part is None:
        raise FormatError("the image has no bootstrap layer, and the blob no bootstrap")
    if part.size > MAX_UNPACKED_BYTES or part.compressed_size > MAX_LAYER_BYTES:
        raise FormatError(f"a bootstrap of {part.size} bytes")
    hasher, kept = hashlib.sha256(), bytearray()
    for start in range(0, facts.size, _STEP):
        data = yield BlobRange(start, min(start + _STEP, facts.size))
        hasher.update(data)
        low, high = part.offset - start, part.offset + part.compressed_size - start
        kept += data[max(0, low) : max(0, high)]
    if f"sha256:{hasher.hexdigest()}" != facts.digest:
        raise FormatError(f"the blob has digest sha256:{hasher.hexdigest()}, the manifest says {facts.digest}")
    return BootstrapFiles(decompress(bytes(kept), part.compressor, part.size), {})


def _read_meta(entry: BlobEntry, place: BlobPlace, copies: dict[str, bytes]) -> Generator[Want, bytes, BlobMeta]:
    """A blob's tables, from beside the bootstrap or from the blob."""
    for name in (place.meta_digest.removeprefix("sha256:"), entry.id):
        if name in copies:
            found = read_copy(entry, copies[name])
            if found is not None:
                return found
    check_bounds(entry)
    stop = entry.ci_offset + entry.ci_csize + HEADER_SIZE
    if stop > place.meta_size:
        raise FormatError(f"chunk infos end at {stop} of blob {place.meta_digest}, which has {place.meta_size}")
    data = yield BlobRange(entry.ci_offset, stop, place.meta_digest, place.meta_size)
    return read_stored(entry, data)


def _read_digests(entry: BlobEntry, place: BlobPlace) -> Generator[Want, bytes, bytes]:
    """The digests of all chunks of a blob, from its end; the bootstrap vouches for the blob's TOC, and that for them."""
    size = place.meta_size
    tail = yield BlobRange(max(0, size - TAIL_SIZE), size, place.meta_digest, size)
    toc: BlobToc | None = read_toc(tail, size)
    part = toc.parts.get(_TOC_DIGESTS) if toc else None
    if toc is None or part is None:
        raise FormatError(f"the bootstrap has no digests for chunks of blob {entry.id[:80]}, and neither has the blob")
    if entry.toc_digest not in toc.digests:
        raise FormatError(f"the bootstrap does not vouch for the digests in blob {entry.id[:80]}")
    if part.size != 32 * entry.chunk_count or part.size > MAX_TABLES or part.compressed_size > MAX_TABLES:
        raise FormatError(f"{part.size} bytes of digests for {entry.chunk_count} chunks of blob {entry.id[:80]}")
    data = yield BlobRange(part.offset, part.offset + part.compressed_size, place.meta_digest, size)
    digests = decompress(data, part.compressor, part.size)
    if hashlib.sha256(digests).digest() != part.digest:
        raise FormatError(f"the digests in blob {entry.id[:80]} are not those that its TOC names")
    return digests


def _fill_in(bootstrap: Bootstrap, rows: list[int], meta: BlobMeta, digests: bytes) -> None:
    """Complete chunks of which the bootstrap says only where they are in the uncompressed blob."""
    chunks = bootstrap.chunks
    for row in rows:
        index = chunks.index[row]
        info = meta.info(index)
        if info.offset != chunks.offset[row] or info.size != chunks.size[row]:
            raise FormatError(f"chunk {index} of a blob is another one in the blob's own tables")
        chunks.flags[row] = info.flags & 1
        chunks.compressed_offset[row], chunks.compressed_size[row] = info.compressed_offset, info.compressed_size
        chunks.digests[32 * row : 32 * row + 32] = digests[32 * index : 32 * index + 32]
