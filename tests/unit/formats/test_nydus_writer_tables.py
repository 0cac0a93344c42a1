"""Every table that our nydus writer makes, walked by a parser of its own; the same walk over images of the reference builder."""

import gzip
import hashlib
import io
import stat
import struct
import tarfile
from typing import Any

import attrs
import blake3
import pytest
import zstandard

from agent.formats.nydus_writer import WrittenBlob, build_bootstrap, write_blob, write_bootstrap
from tests.unit.formats.conftest import FixtureImages

BLOCK = 4096


@attrs.frozen
class Blob:
    parts: list[tuple[str, int, int]]
    toc: dict[str, tuple[int, bytes, int, int, int]]
    infos: list[tuple[int, int, int, int]]
    header: tuple[int, ...]
    digests: bytes


@attrs.frozen
class Boot:
    super: tuple[Any, ...]
    ext: tuple[int, ...]
    devices: list[tuple[bytes, int, int]]
    blobs: list[dict[str, Any]]
    prefetch: list[int]
    chunks: dict[tuple[int, int], tuple[Any, ...]]
    files: dict[bytes, tuple[int, int, list[tuple[int, int, int]]]]
    nids: dict[bytes, int]


def walk_blob(data: bytes) -> Blob:
    """From the end to the start, by the tar headers; then what the parts say."""
    parts, end = [], len(data)
    while end:
        header = data[end - 512 : end]
        assert header[257:265] == b"ustar  \0"
        assert header[156:157] == b"0"
        assert int(header[148:155], 8) == sum(header[:148]) + 256 + sum(header[156:])
        assert not any(header[100:124] + header[157:257] + header[265:])
        size = int(header[124:135], 8)
        end -= 512 + size
        parts.append((header[:100].rstrip(b"\0").decode(), end, size))
    parts.reverse()
    where = {name: (start, size) for name, start, size in parts}
    start, size = where["rafs.blob.toc"]
    assert size % 128 == 0
    toc = {}
    for at in range(start, start + size, 128):
        flags, reserved, name, digest, offset, stored, plain = struct.unpack_from("<II16s32sQQQ", data, at)
        assert reserved == 0
        assert not any(data[at + 80 : at + 128])
        toc[name.rstrip(b"\0").decode()] = (flags, digest, offset, stored, plain)
    _, _, offset, stored, plain = toc["blob.meta"]
    infos = data[offset : offset + stored]
    if toc["blob.meta"][0] == 2:
        infos = zstandard.decompress(infos, plain)
    assert len(infos) == plain
    rows = []
    for u, c in struct.iter_unpack("<QQ", infos):
        assert u & 0xFF == 0
        rows.append(
            (
                c & 0xFFFFFFFFFF,
                (c >> 44 | (c >> 40 & 0xF) << 20) + 1,
                u & 0xFFFFFFFF000,
                (u >> 44 | (u >> 8 & 0xF) << 20) + 1,
            )
        )
    at = toc["blob.meta.header"][2]
    header = struct.unpack_from("<IIIIQQQQQI", data, at)
    assert struct.unpack_from("<I", data, at + 4092) == (0xB10BB10B,)
    assert not any(data[at + 60 : at + 4092])
    offset, size = where["blob.digest"]
    return Blob(parts, toc, rows, header, data[offset : offset + size])


def check_blob(data: bytes, entry: dict[str, Any]) -> Blob:
    """The rules for one blob, with its entry in the blob table beside it."""
    blob = walk_blob(data)
    hash_of = {0: lambda chunk: blake3.blake3(chunk).digest(), 1: lambda chunk: hashlib.sha256(chunk).digest()}[entry["digester"]]
    assert entry["id"] == hashlib.sha256(data).hexdigest().encode()
    names = [name for name, _, _ in blob.parts if name != "image.boot"]
    assert names == ["image.blob", "blob.meta", "blob.digest", "rafs.blob.toc"]
    for name, (flags, digest, offset, stored, plain) in blob.toc.items():
        raw = data[offset : offset + stored]
        if name == "image.blob":
            assert (flags, offset, plain) == (1, 0, entry["plain"])
            assert digest == hashlib.sha256(data[: stored + 512]).digest()
            continue
        assert digest == hashlib.sha256(raw if flags == 1 else zstandard.decompress(raw, plain)).digest()
    ci_end = entry["ci_offset"] + entry["ci_stored"]
    assert blob.toc["blob.meta"][2:] == (entry["ci_offset"], entry["ci_stored"], entry["ci_plain"])
    assert blob.toc["blob.meta"][0] == {0: 1, 3: 2}[entry["ci_compressor"]]
    assert blob.toc["blob.meta.header"][2:] == (ci_end, 4096, 4096)
    assert blob.parts[1] == ("blob.meta", entry["ci_offset"], entry["ci_stored"] + 4096)
    magic, features, *rest = blob.header
    assert (magic, features & ~2) == (0xB10BB10B, entry["features"])
    assert rest == [entry["ci_compressor"], len(blob.infos), entry["ci_offset"], entry["ci_stored"], entry["ci_plain"], 0, 0, 0]
    assert entry["ci_plain"] == 16 * entry["count"] == 16 * len(blob.infos)
    # What the entry calls the stored size ends where the digest table's tar header does.
    assert entry["stored"] == blob.parts[2][1] + blob.parts[2][2] + 512
    place = 0
    for number, (offset, stored, plain_offset, plain) in enumerate(blob.infos):
        assert plain_offset == place
        place += -(-plain // BLOCK) * BLOCK
        assert 0 < stored <= plain <= entry["chunk_size"]
        assert offset + stored <= blob.parts[0][2]
        chunk = data[offset : offset + stored]
        if stored != plain:
            chunk = zstandard.decompress(chunk, plain)
        assert hash_of(chunk) == blob.digests[32 * number : 32 * number + 32]
    assert place == entry["plain"]
    if entry["toc_size"]:
        assert entry["toc_digest"] == hashlib.sha256(data[-entry["toc_size"] :]).digest()
        assert entry["toc_size"] == blob.parts[-1][2] + 512
    return blob


_ENTRY = struct.Struct("<64s6IQQ2I3Q32s32sQQI")
_ENTRY_KEYS = [
    "id",
    "index",
    "chunk_size",
    "count",
    "compressor",
    "digester",
    "features",
    "stored",
    "plain",
    "toc_size",
    "ci_compressor",
    "ci_offset",
    "ci_stored",
    "ci_plain",
    "toc_digest",
    "meta_digest",
    "meta_size",
    "iv",
    "cipher",
]


def walk_bootstrap(image: bytes) -> Boot:
    """All tables of a v6 bootstrap; what any of them must be is asserted on the way."""
    assert len(image) % BLOCK == 0
    fields = struct.unpack_from("<IIIBBHQqIIII16s16sIHHHBBIQBBHIQ", image, 1024)
    magic, checksum, compat, bits, ext_slots, root, inodes, epoch, nsec, blocks, meta, xattr_block = fields[:12]
    assert (magic, checksum, compat, bits, ext_slots) == (0xE0F5E1E2, 0, 0x40000000, 12, 0)
    assert (epoch, nsec, xattr_block) == (0, 0, 0)
    assert fields[12:16] == (bytes(16), bytes(16), 0xC, 0)
    devices_count, slot_offset = fields[16:18]
    assert slot_offset == 11
    assert not any(fields[18:])
    ext = struct.unpack_from("<QQIIQQQI", image, 1152)
    flags, blobs_at, blobs_size, chunk_size, chunks_at, chunks_size, prefetch_at, prefetch_size = ext
    assert flags & 0x0100_0110 == 0x0100_0110
    assert (flags & 0xC3).bit_count() == 1
    assert (flags & 0xC).bit_count() == 1
    assert not any(image[1152 + 52 : 1408])
    devices = []
    for at in range(1408, 1408 + 128 * devices_count, 128):
        tag, count, address, *high = struct.unpack_from("<64sIIHH", image, at)
        assert (high, any(image[at + 76 : at + 128])) == ([0, 0], False)
        devices.append((tag, count, address))
    free = len(image) // BLOCK
    for _, count, address in devices:
        assert address % 128 == 0
        assert free <= address < free + 256
        free = address + count
    assert blocks == sum(count for _, count, _ in devices)
    assert blobs_at == -(-(1408 + 128 * devices_count) // BLOCK) * BLOCK
    assert blobs_size == 256 * devices_count
    blobs = []
    for at in range(blobs_at, blobs_at + blobs_size, 256):
        blobs.append(dict(zip(_ENTRY_KEYS, _ENTRY.unpack_from(image, at), strict=True)))
        assert not any(image[at + 220 : at + 256])
    for number, (entry, device) in enumerate(zip(blobs, devices, strict=True)):
        assert (entry["index"], entry["chunk_size"], entry["cipher"]) == (number, chunk_size, 0)
        assert device[:2] == (entry["id"], entry["plain"] // BLOCK)
    if prefetch_size:
        assert prefetch_at == blobs_at + blobs_size
    prefetch = [nid for (nid,) in struct.iter_unpack("<I", image[prefetch_at : prefetch_at + prefetch_size])]
    assert chunks_at % BLOCK == 0
    assert len(image) == -(-(chunks_at + chunks_size) // BLOCK) * BLOCK
    assert not any(image[chunks_at + chunks_size :])
    chunks = {}
    for row in struct.iter_unpack("<32sIIIIQQQII", image[chunks_at : chunks_at + chunks_size]):
        chunks[row[1], row[8]] = row
    assert len(chunks) == chunks_size // 80
    # The inodes begin a block behind the meta block, so that none has number 0.
    assert root == 128
    assert (meta + 1) * BLOCK >= prefetch_at + prefetch_size
    assert not any(image[meta * BLOCK + (prefetch_at + prefetch_size) % BLOCK : (meta + 1) * BLOCK]) or not prefetch
    files, nids = _walk_inodes(image, meta * BLOCK, root, chunk_size)
    assert len(nids) == inodes
    return Boot(fields, ext, devices, blobs, prefetch, chunks, files, nids)


def _walk_inodes(image: bytes, base: int, root: int, chunk_size: int) -> tuple[dict[bytes, Any], dict[bytes, int]]:
    files: dict[bytes, Any] = {}
    nids = {b"/": root}
    numbers: dict[int, int] = {}
    pending = [(b"/", root, root)]
    while pending:
        path, nid, parent = pending.pop()
        at = base + 32 * nid
        form, count, mode, size, u, number, _, _, _, nanoseconds, links = struct.unpack_from("<HHH2xQIIIIqII", image, at)
        assert form in (1, 5, 9)
        assert nanoseconds < 10**9
        assert links > 0
        assert not any(image[at + 48 : at + 64])
        assert numbers.setdefault(nid, number) == number
        head = 64 + (12 + 4 * (count - 1) if count else 0)
        if count:
            assert not any(image[at + 64 : at + 76]), "shared xattrs"
        at += head
        if stat.S_ISREG(mode):
            assert form == 9
            assert u & ~0x1F == 0x20
            need = -(-size // chunk_size)
            at = (at + 7) & -8
            indexes = [struct.unpack_from("<HHI", image, at + 8 * n) for n in range(need)]
            files[path] = (
                size,
                u & 0x1F,
                [(low | device >> 8 << 16, (device & 0xFF) - 1, block) for low, device, block in indexes],
            )
        elif form == 5:
            assert at % BLOCK + size % BLOCK <= BLOCK
        if not stat.S_ISDIR(mode):
            continue
        names, subdirectories = [], 0
        for start in range(0, size, BLOCK):
            length = min(BLOCK, size - start)
            from_ = at if form == 5 and length < BLOCK else u * BLOCK + start
            block = image[from_ : from_ + length]
            entries = [struct.unpack_from("<QHBB", block, 12 * n) for n in range(struct.unpack_from("<H", block, 8)[0] // 12)]
            stops = [entry[1] for entry in entries[1:]] + [len(block)]
            for (child, name_at, kind, reserved), stop in zip(entries, stops, strict=True):
                name = block[name_at:stop].rstrip(b"\0")
                assert reserved == 0
                names.append(name)
                if name in (b".", b".."):
                    assert (child, kind) == (nid if name == b"." else parent, 2)
                    continue
                subdirectories += kind == 2
                nids[path + name] = child
                pending.append((path + name + (b"/" if kind == 2 else b""), child, nid))
        assert names == sorted(set(names))
        assert {b".", b".."} <= set(names)
        assert links == 2 + subdirectories
    assert numbers[root] == 1
    assert len(set(numbers.values())) == len(numbers)
    assert max(numbers.values()) <= len(nids)
    return files, nids


def check_image(image: bytes, blobs: list[bytes]) -> tuple[Boot, list[Blob]]:
    """Bootstrap and blobs, and that they speak of the same chunks."""
    boot = walk_bootstrap(image)
    walked = [check_blob(data, entry) for data, entry in zip(blobs, boot.blobs, strict=True)]
    used = set()
    for path, (size, bits, indexes) in boot.files.items():
        for at, (number, blob, block) in enumerate(indexes):
            row = boot.chunks[blob, number]
            assert row[6] == block * BLOCK, path
            assert row[4] == min(boot.ext[3], size - at * boot.ext[3]), path
            used.add((blob, number))
        assert 1 << bits >= boot.ext[3] // BLOCK
    assert used == boot.chunks.keys()
    for (blob, number), (digest, _, flags, stored, plain, offset, plain_offset, _, _, _) in boot.chunks.items():
        assert walked[blob].infos[number] == (offset, stored, plain_offset, plain)
        assert walked[blob].digests[32 * number : 32 * number + 32] == digest
        assert flags & 1 == (stored != plain)
    return boot, walked


def convert(tars: list[bytes], **options: Any) -> tuple[list[WrittenBlob], list[bytes]]:
    layers, blobs = [], []
    for tar in tars:
        out = io.BytesIO()
        layer = write_blob(io.BytesIO(tar), out, **options)
        blob = out.getvalue()
        assert layer.size == len(blob)
        if layer.digest is not None:
            assert layer.digest == "sha256:" + hashlib.sha256(blob).hexdigest()
            blobs.append(blob)
        layers.append(layer)
    return layers, blobs


def source(images: FixtureImages, tag: str) -> list[bytes]:
    return [gzip.decompress(layer.blob) for layer in images.layers(tag)]


def reference(images: FixtureImages, tag: str) -> tuple[bytes, list[bytes]]:
    *blobs, last = images.layers(tag)
    with tarfile.open(fileobj=io.BytesIO(last.blob)) as archive:
        member = archive.extractfile("image/image.boot")
        assert member is not None
        return member.read(), [blob.blob for blob in blobs]


@pytest.mark.parametrize("tag", ["nydus-v6-zstd", "nydus-v6-none", "nydus-v6-prefetch"])
def test_the_walk_knows_the_reference_builder(images: FixtureImages, tag: str) -> None:
    check_image(*reference(images, tag))


@pytest.mark.parametrize(
    ("tag", "options"),
    [
        ("nydus-v6-zstd", {}),
        ("nydus-v6-none", {"compressor": "none"}),
        ("nydus-v6-prefetch", {"chunk_size": 65536}),
    ],
)
def test_our_image_has_the_structure_of_the_reference(images: FixtureImages, tag: str, options: dict[str, Any]) -> None:
    layers, blobs = convert(source(images, "oci-nydus"), **options)
    ours, _ = check_image(bytes(build_bootstrap(layers, [b"/"]).image), blobs)
    theirs, _ = check_image(*reference(images, tag))
    assert ours.nids.keys() == theirs.nids.keys()
    assert {path: (size, len(indexes)) for path, (size, _, indexes) in ours.files.items()} == {
        path: (size, len(indexes)) for path, (size, _, indexes) in theirs.files.items()
    }
    assert len(ours.chunks) == len(theirs.chunks)
    same = ("chunk_size", "count", "compressor", "features", "plain", "ci_compressor", "ci_plain", "cipher", "meta_size")
    for mine, other in zip(ours.blobs, theirs.blobs, strict=True):
        assert {key: mine[key] for key in same} == {key: other[key] for key in same}
        assert mine["digester"] == 1
    assert ours.ext[0] & ~0xC == theirs.ext[0] & ~0xC
    assert ours.super[:7] == theirs.super[:7]
    assert [count for _, count, _ in ours.devices] == [count for _, count, _ in theirs.devices]


def test_uncompressed_blobs_lie_as_the_kernel_addresses_them(images: FixtureImages) -> None:
    layers, blobs = convert(source(images, "oci"), compressor="none")
    boot, walked = check_image(bytes(build_bootstrap(layers).image), blobs)
    for blob in walked:
        assert all(offset == plain_offset for offset, _, plain_offset, _ in blob.infos)
    for row in boot.chunks.values():
        assert row[5] == row[6]


def test_the_bootstrap_layer(images: FixtureImages) -> None:
    layers, _ = convert(source(images, "oci"))
    out = io.BytesIO()
    written = write_bootstrap(layers, out, [b"/etc/hosts"])
    stored = out.getvalue()
    plain = gzip.decompress(stored)
    assert (written.digest, written.size) == ("sha256:" + hashlib.sha256(stored).hexdigest(), len(stored))
    assert (written.diff_id, written.uncompressed_size) == ("sha256:" + hashlib.sha256(plain).hexdigest(), len(plain))
    with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
        assert [(m.name, m.type, m.mode, m.mtime) for m in archive] == [
            ("image", tarfile.DIRTYPE, 0o755, 0),
            ("image/image.boot", tarfile.REGTYPE, 0o444, 0),
        ]
        member = archive.extractfile("image/image.boot")
        assert member is not None
        assert member.read() == build_bootstrap(layers, [b"/etc/hosts"]).image
    assert written.annotations == {
        "containerd.io/snapshot/nydus-bootstrap": "true",
        "containerd.io/snapshot/nydus-fs-version": "6",
        "containerd.io/snapshot/nydus-reference-blob-ids": f'["{layers[0].blob_id}","{layers[1].blob_id}"]',
    }
    assert layers[0].annotations == {"containerd.io/snapshot/nydus-blob": "true"}
