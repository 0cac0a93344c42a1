"""Plain layers: fixtures, compressions, cut input, promised sizes; `tarfile` and GNU tar as oracles."""

import gzip
import io
import os
import subprocess
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from agent.formats.model import FormatError, InodeKind, digest_of
from agent.formats.plain import PlainLayer, PlainLayerParser


def parse(blob: bytes, *, step: int = 65536, most: int | None = None) -> tuple[PlainLayer, bytes]:
    parser = PlainLayerParser(most)
    volume = bytearray()
    for at in range(0, len(blob), step):
        for offset, data in parser.feed(blob[at : at + step]):
            volume.extend(bytes(max(0, offset + len(data) - len(volume))))
            volume[offset : offset + len(data)] = data
    layer = parser.finish()
    size = layer.index.volume_size
    return layer, bytes(volume[:size].ljust(size, b"\0"))


def make_tar(*members: tuple[str, bytes] | tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> bytes:  # noqa: A002
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def special(name: str, kind: bytes, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def read(layer: PlainLayer, volume: bytes, path: str) -> bytes:
    inode = layer.index.root
    for name in path.encode().split(b"/"):
        inode = inode.children[name]
    assert inode.kind is InodeKind.FILE
    return volume[inode.volume_offset : inode.volume_offset + inode.size] if inode.size else b""


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("step", [65536, 4099])
def test_fixture_layer_equals_its_source(images: Any, layer: int, step: int) -> None:
    fixture = images.layers("oci")[layer - 1]
    parsed, volume = parse(fixture.blob, step=step)
    found, truth = images.describe(parsed.index, volume), images.truth(layer, is_json=False)
    assert found.keys() == truth.keys()
    assert {key: value for key, value in found.items() if value != truth[key]} == {}
    assert parsed.diff_id == fixture.diff_id
    assert parsed.blob_digest == digest_of(fixture.blob)
    assert parsed.index.codec == "deflate"
    assert parsed.compression == "gzip"
    assert parsed.index.pieces.blob_size == len(fixture.blob)
    assert parsed.index.warnings == ()


def test_estargz_blob_read_whole_equals_the_lazy_one(images: Any) -> None:
    fixture = images.layers("esgz")[0]
    parsed, volume = parse(fixture.blob)
    lazy = images.read_toc(fixture.blob, fixture.toc_digest)
    found = images.describe(parsed.index, volume)
    assert found.keys() == images.truth(1, is_json=False).keys()
    assert set(images.describe(lazy, images.read_volume(lazy, fixture.blob))) == {
        key.encode("latin-1").decode("utf-8", "replace").encode().decode("latin-1") for key in found
    }
    assert parsed.diff_id == fixture.diff_id


def test_chunks_cover_every_file_and_match(images: Any) -> None:
    parsed, volume = parse(images.layers("oci")[0].blob)
    chunks = parsed.index.chunks
    for number in range(len(chunks)):
        start = chunks.volume_offset[number]
        assert digest_of(volume[start : start + chunks.size[number]]) == f"sha256:{chunks.digest(number).hex()}"
    assert list(chunks.volume_offset) == sorted(set(chunks.volume_offset))
    big = parsed.index.root.children[b"sizes"].children[b"5MiB-zeros"]
    assert [chunks.size[n] for n in range(big.first_chunk, big.first_chunk + big.chunk_count)] == [4 << 20, 1 << 20]


def test_bytes_between_files_are_zeros() -> None:
    same = os.urandom(9000)
    layer, volume = parse(make_tar(("a", same), ("b", same), ("c", b"short"), ("d", same), ("e", b"x" * 5000)))
    assert read(layer, volume, "b") == same
    assert layer.index.root.children[b"a"].volume_offset == layer.index.root.children[b"d"].volume_offset
    used = bytearray(len(volume))
    for inode in layer.index.root.children.values():
        used[inode.volume_offset : inode.volume_offset + inode.size] = b"\1" * inode.size
    assert all(byte == 0 for byte, is_used in zip(volume, used, strict=True) if not is_used)
    assert layer.index.volume_size == 12288 + 4096 + 8192


@pytest.mark.parametrize("compression", ["none", "gzip", "members", "padded", "zstd", "frames"])
def test_compressions(compression: str) -> None:
    import zstandard

    data = os.urandom(70_000) + b"text " * 20_000
    tar = make_tar(("dir/file", data), ("other", b"x"))
    half = len(tar) // 2
    zstd = zstandard.ZstdCompressor(write_checksum=True)
    skippable = b"\x51\x2a\x4d\x18\x05\0\0\0hello"
    blob = {
        "none": tar,
        "gzip": gzip.compress(tar),
        "members": gzip.compress(tar[:half]) + gzip.compress(b"") + gzip.compress(tar[half:]),
        "padded": gzip.compress(tar) + bytes(1000),
        "zstd": zstd.compress(tar),
        "frames": skippable + zstd.compress(tar[:half]) + skippable + zstd.compress(tar[half:]) + skippable,
    }[compression]
    for step in (37, 512, 1 << 20):
        layer, volume = parse(blob, step=step)
        assert read(layer, volume, "dir/file") == data
        assert layer.diff_id == digest_of(tar)
        assert layer.uncompressed_size == len(tar)


@pytest.mark.parametrize("make", [gzip.compress, lambda data: __import__("zstandard").ZstdCompressor().compress(data), bytes])
def test_a_cut_blob_is_refused(make: Any) -> None:
    blob = make(make_tar(("file", os.urandom(5000))))
    for stop in (3, 600, len(blob) // 2):
        with pytest.raises(FormatError):
            parse(blob[:stop])


def test_garbage_behind_gzip_is_refused() -> None:
    with pytest.raises(FormatError):
        parse(gzip.compress(make_tar(("file", b"x"))) + b"garbage")


def test_more_than_promised_is_refused() -> None:
    tar = make_tar(("zeros", bytes(50 << 20)))
    blob = gzip.compress(tar)
    assert len(blob) < 100_000
    parser = PlainLayerParser(10 << 20)
    with pytest.raises(FormatError, match="promised"):
        parser.feed(blob)
    parse(blob, most=len(tar))


def test_nanoseconds_and_times_before_the_epoch() -> None:
    def at(name: str, mtime: str) -> tarfile.TarInfo:
        return special(name, tarfile.REGTYPE, pax_headers={"mtime": mtime})

    layer, _ = parse(
        make_tar(at("a", "1234567890.123456789"), at("b", "-1.5"), at("c", "5000000000.1234567891234"), at("d", "-0.25"))
    )
    times = {name: inode.mtime_ns for name, inode in layer.index.root.children.items()}
    assert times == {b"a": 1234567890123456789, b"b": -1500000000, b"c": 5000000000123456789, b"d": -250000000}


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_agrees_with_tarfile(format: int) -> None:  # noqa: A002
    long = "long/" + "/".join(["d" * 30] * (7 if format == tarfile.USTAR_FORMAT else 40))
    big = 0o7777777 if format == tarfile.USTAR_FORMAT else 3_000_000_000
    members: list[Any] = [
        special("./", tarfile.DIRTYPE, mode=0o711, uid=5),
        special("dir/", tarfile.DIRTYPE, mode=0o1777, uid=big if format != tarfile.USTAR_FORMAT else 100, mtime=77),
        special(long, tarfile.REGTYPE, mode=0o4755),
        special("link", tarfile.SYMTYPE, linkname=("t" * 90 if format == tarfile.USTAR_FORMAT else "t" * 3000)),
        ("dir/file", b"content"),
        special("hard", tarfile.LNKTYPE, linkname="dir/file", mode=0),
        special("fifo", tarfile.FIFOTYPE),
        special("chr", tarfile.CHRTYPE, devmajor=1, devminor=300),
        special("blk", tarfile.BLKTYPE, devmajor=259, devminor=7),
        ("über", b"utf-8"),
    ]
    tar = make_tar(*members, format=format)
    layer, volume = parse(tar)
    root = layer.index.root
    assert (root.mode, root.uid) == (0o711, 5)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for info in archive.getmembers():
            if info.name == ".":
                continue
            inode = root
            for name in info.name.encode().split(b"/"):
                inode = inode.children[name]
            if info.islnk():
                assert inode is root.children[b"dir"].children[b"file"]
                continue
            assert (inode.mode, inode.uid, inode.gid, inode.mtime_ns) == (info.mode, info.uid, info.gid, info.mtime * 10**9)
            if info.issym():
                assert inode.target == info.linkname.encode()
            if info.isdev() and not info.isfifo():
                assert inode.rdev == (info.devmajor, info.devminor)
            if info.isreg():
                stream = archive.extractfile(info)
                assert stream is not None
                assert read(layer, volume, info.name) == stream.read()


@pytest.mark.parametrize("kind", ["--format=gnu", "--sparse-version=0.0", "--sparse-version=0.1", "--sparse-version=1.0"])
def test_sparse_files_of_gnu_tar(tmp_path: Path, kind: str) -> None:
    def sparse(name: str, size: int, parts: dict[int, bytes]) -> None:
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(size)
            for offset, data in parts.items():
                stream.seek(offset)
                stream.write(data)

    sparse("many", 30 << 20, {n << 19: os.urandom(4096) for n in range(0, 60, 2)})
    sparse("head", 9 << 20, {0: b"start" * 1000})
    sparse("tail", (12 << 20) + 5, {(12 << 20): b"tail!"})
    sparse("hole", 8 << 20, {})
    sparse("dense", 100, {0: b"d" * 100})
    options = [kind] if kind == "--format=gnu" else ["--format=pax", kind]
    names = ["many", "head", "tail", "hole", "dense"]
    tar = subprocess.run(["tar", "-C", tmp_path, "-S", *options, "-cf", "-", *names], check=True, capture_output=True).stdout
    assert len(tar) < 2 << 20
    layer, volume = parse(tar, step=1000)
    for name in names:
        assert read(layer, volume, name) == (tmp_path / name).read_bytes()
    chunks = layer.index.chunks
    for number in range(len(chunks)):
        start = chunks.volume_offset[number]
        assert digest_of(volume[start : start + chunks.size[number]]) == f"sha256:{chunks.digest(number).hex()}"


def test_a_huge_sparse_file_costs_little() -> None:
    size = 800 << 30
    tar = make_tar(
        special(
            "lastlog",
            tarfile.REGTYPE,
            pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": str(size), "GNU.sparse.name": "lastlog"},
        )
    )
    parser = PlainLayerParser()
    assert parser.feed(tar) == []
    layer = parser.finish()
    assert layer.index.root.children[b"lastlog"].size == size
    assert len(layer.index.chunks) == 0


def test_xattrs_keep_their_bytes_and_bad_ones_are_reported() -> None:
    def pax(*records: tuple[bytes, bytes]) -> bytes:
        payload = b""
        for key, value in records:
            body = b" " + key + b"=" + value + b"\n"
            size = len(body) + 1
            while len(str(size)) + len(body) != size:
                size = len(str(size)) + len(body)
            payload += str(size).encode() + body
        header = special("x", tarfile.XHDTYPE, size=len(payload)).tobuf(tarfile.USTAR_FORMAT)
        return header + payload + bytes(-len(payload) % 512)

    nasty = bytes(range(256)) * 3
    records = (
        (b"SCHILY.xattr.user.bin", nasty),
        (b"SCHILY.xattr.user.empty", b""),
        (b"LIBARCHIVE.xattr.user.na%6De", b"aGVsbG8" + b"="),
        (b"SCHILY.xattr.btrfs.compression", b"zstd"),
        (b"SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        (b"SCHILY.acl.access", b"user::rw-,user:1000:r--,group::r--,mask::r--,other::---"),
        (b"path", b"name\xff"),
    )
    layer, _ = parse(pax(*records) + make_tar(("f", b"x")))
    inode = layer.index.root.children[b"name\xff"]
    acl = inode.xattrs.pop(b"system.posix_acl_access")
    assert inode.xattrs == {b"user.bin": nasty, b"user.empty": b"", b"user.name": b"hello"}
    assert acl.hex() == "0200000001000600ffffffff02000400e803000004000400ffffffff10000400ffffffff20000000ffffffff"
    assert len(layer.index.warnings) == 2


def test_hard_links_with_and_without_a_body() -> None:
    body = b"B" * 700
    link = special("link", tarfile.LNKTYPE, linkname="/./file", size=len(body))
    head = make_tar(("file", body))[:1536]
    tail = make_tar(("after", b"after"))
    for middle in (link.tobuf(tarfile.USTAR_FORMAT) + body + bytes(324), link.tobuf(tarfile.USTAR_FORMAT)):
        layer, volume = parse(head + middle + tail)
        assert layer.index.root.children[b"link"] is layer.index.root.children[b"file"]
        assert read(layer, volume, "after") == b"after"


def test_an_archive_without_its_end_is_whole() -> None:
    tar = make_tar(("file", b"content"))
    for stop in (1024, 512 + 7):
        layer, volume = parse(tar[:stop])
        assert read(layer, volume, "file") == b"content"
    with pytest.raises(FormatError):
        parse(tar[: 512 + 6])


def test_an_empty_blob_is_an_empty_layer() -> None:
    layer, _ = parse(b"")
    assert layer.index.root.children == {}
    layer, _ = parse(gzip.compress(b""))
    assert layer.index.volume_size == 0


def test_global_pax_records_hold_until_they_are_cleared() -> None:
    def glob(text: bytes) -> bytes:
        return special("g", tarfile.XGLTYPE, size=len(text)).tobuf(tarfile.USTAR_FORMAT) + text + bytes(-len(text) % 512)

    tar = glob(b"12 uid=1234\n") + make_tar(("a", b""))[:512] + glob(b"7 uid=\n") + make_tar(("b", b""))
    layer, _ = parse(tar)
    assert {name: inode.uid for name, inode in layer.index.root.children.items()} == {b"a": 1234, b"b": 0}


def test_bad_checksums_are_refused() -> None:
    tar = bytearray(make_tar(("file", b"content")))
    tar[0] ^= 1
    with pytest.raises(FormatError, match="header"):
        parse(bytes(tar))


def test_stored_blocks_do_not_grow_memory() -> None:
    import tracemalloc

    tar = make_tar(("zeros", bytes(64 << 20)))
    blob = zlib.compress(tar, 9, wbits=31)
    parser = PlainLayerParser()
    tracemalloc.start()
    for at in range(0, len(blob), 4096):
        parser.feed(blob[at : at + 4096])
    parser.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20
