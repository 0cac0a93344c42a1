"""What our writer makes, read by ourselves, by plain zstd and tarfile; and the rules of the reader in containers/storage."""

import gzip
import hashlib
import io
import itertools
import json
import random
import tarfile
from typing import Any

import pytest
import zstandard

from agent.formats.content_chunks import CHUNK_MOST, cut_chunks
from agent.formats.model import FormatError, digest_of
from agent.formats.tar_split import Payload, Segment, decode_tar_split
from agent.formats.zstd_chunked import parse_footer
from agent.formats.zstd_chunked_writer import WrittenLayer, write_zstd_chunked
from tests.zstd_chunked_samples import read_index, read_volume

PREFIX = "io.github.containers.zstd-chunked."


def write(tar: bytes, **options: Any) -> tuple[WrittenLayer, bytes]:
    out = io.BytesIO()
    written = write_zstd_chunked(io.BytesIO(tar), out, **{"level": 1, **options})
    blob = out.getvalue()
    assert written.digest == digest_of(blob)
    assert written.size == len(blob)
    plain = unpack(blob)
    assert written.diff_id == digest_of(plain)
    assert written.uncompressed_size == len(plain)
    assert written.is_tar_kept == (plain == tar)
    return written, blob


def unpack(blob: bytes) -> bytes:
    """As a plain decoder does it: all frames, skippable ones ignored."""
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(blob), read_across_frames=True) as reader:
        return reader.read()


def toc_of(written: WrittenLayer, blob: bytes) -> dict[str, Any]:
    part = blob[written.toc.offset : written.toc.stop]
    assert digest_of(part) == written.annotations[PREFIX + "manifest-checksum"]
    with zstandard.ZstdDecompressor().stream_reader(part) as reader:
        plain = reader.read()
    assert len(plain) == written.toc.plain_length
    toc: dict[str, Any] = json.loads(plain)
    assert json.dumps(toc, ensure_ascii=False, separators=(",", ":")).encode() == plain
    return toc


def pack(*members: tuple[str, bytes, bytes, dict[str, Any]], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, kind, data, fields in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def regular(name: str, data: bytes = b"", **fields: Any) -> tuple[str, bytes, bytes, dict[str, Any]]:
    return name, tarfile.REGTYPE, data, fields


def folder(name: str, **fields: Any) -> tuple[str, bytes, bytes, dict[str, Any]]:
    return name, tarfile.DIRTYPE, b"", fields


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("prioritized", [(), ("etc/hosts", "sizes/4MiB+1")])
def test_fixture_survives_the_round_trip(images: Any, layer: int, prioritized: tuple[str, ...]) -> None:
    tar = gzip.decompress(images.layers("oci")[layer - 1].blob)
    written, blob = write(tar, prioritized=prioritized)
    index = read_index(blob, written.annotations)
    found = images.describe(index, read_volume(index, blob))
    truth = images.truth(layer, is_json=False)
    renamed = {key.encode("latin-1").decode("utf-8", "replace").encode().decode("latin-1"): value for key, value in truth.items()}
    assert found.keys() == renamed.keys()
    assert {key: value for key, value in found.items() if value != renamed[key]} == {}
    if layer == 2:
        assert write(tar, prioritized=prioritized)[1] == blob


def test_annotations_and_footer_agree() -> None:
    written, blob = write(pack(regular("f", random.Random(7).randbytes(1000))))
    footer = parse_footer(blob[-72:], len(blob))
    assert footer is not None
    assert (footer.toc, footer.tar_split, footer.size) == (written.toc, written.tar_split, 72)
    toc, split = written.toc, written.tar_split
    assert written.annotations == {
        PREFIX + "manifest-checksum": digest_of(blob[toc.offset : toc.stop]),
        PREFIX + "manifest-position": f"{toc.offset}:{toc.length}:{toc.plain_length}:1",
        PREFIX + "tarsplit-position": f"{split.offset}:{split.length}:{split.plain_length}",
    }
    assert toc.stop + 8 == split.offset
    assert split.stop + 72 == len(blob)
    for at, size in ((toc.offset, toc.length), (split.offset, split.length), (len(blob) - 64, 64)):
        assert blob[at - 8 : at] == b"\x50\x2a\x4d\x18" + size.to_bytes(4, "little")
    assert toc_of(written, blob)["tarSplitDigest"] == digest_of(blob[split.offset : split.stop])


def test_the_toc_says_what_the_reference_writer_says() -> None:
    data = random.Random(7).randbytes(100)
    written, blob = write(
        pack(
            folder("./", mode=0o755, mtime=1700000000),
            regular("./f", data, mode=0o4755, uid=1, gid=2, mtime=1.5, uname="u", pax_headers={"mtime": "1.25", "atime": "2"}),
            regular("./empty"),
            ("./l", tarfile.SYMTYPE, b"", {"linkname": "f", "pax_headers": {"SCHILY.xattr.user.a": "x"}}),
            ("./h", tarfile.LNKTYPE, b"", {"linkname": "./f"}),
            ("./c", tarfile.CHRTYPE, b"", {"devmajor": 1, "devminor": 3}),
        )
    )
    assert written.is_tar_kept
    toc = toc_of(written, blob)
    file = toc["entries"][1]
    plain = {"mode": 0o644, "modtime": "1970-01-01T00:00:00Z"}
    assert toc["entries"] == [
        {"type": "dir", "name": "./", "mode": 0o755, "modtime": "2023-11-14T22:13:20Z"},
        {
            "type": "reg",
            "name": "./f",
            "mode": 0o4755,
            "size": 100,
            "uid": 1,
            "gid": 2,
            "modtime": "1970-01-01T00:00:01.25Z",
            "accesstime": "1970-01-01T00:00:02Z",
            "digest": digest_of(data),
            "offset": file["offset"],
            "endOffset": file["endOffset"],
        },
        {"type": "reg", "name": "./empty", **plain},
        {"type": "symlink", "name": "./l", "linkName": "f", **plain, "xattrs": {"user.a": "eA=="}},
        {"type": "hardlink", "name": "./h", "linkName": "./f", **plain},
        {"type": "char", "name": "./c", **plain, "devMajor": 1, "devMinor": 3},
    ]
    assert zstandard.decompress(blob[file["offset"] : file["endOffset"]]) == data


def test_chunks_and_holes() -> None:
    noise = random.Random(1).randbytes(500_000).replace(b"\0", b"\1")
    data = noise[:200_000] + bytes(5000) + noise[200_000:] + bytes(1023) + b"end"
    written, blob = write(pack(regular("f", data), regular("g", bytes(50_000)), regular("h", bytes(CHUNK_MOST + 1))))
    entries = toc_of(written, blob)["entries"]
    chunks = [entry for entry in entries if entry["name"] == "f"]
    assert [entry["type"] for entry in chunks] == ["reg"] + ["chunk"] * (len(chunks) - 1)
    assert sum(entry["chunkSize"] for entry in chunks) == len(data)
    (hole,) = (entry for entry in chunks if entry.get("chunkType"))
    assert (hole["chunkOffset"], hole["chunkSize"], hole["chunkType"]) == (200_000, 5000, "zeros")
    ends = [entry["offset"] for entry in chunks[1:]] + [chunks[0]["endOffset"]]
    for entry, end in zip(chunks, ends, strict=True):
        at = entry.get("chunkOffset", 0)
        part = data[at : at + entry["chunkSize"]]
        assert zstandard.decompress(blob[entry["offset"] : end]) == part
        assert entry["chunkDigest"] == digest_of(part)
    assert 4 < len(chunks) < 40
    # A file of one chunk has no keys of chunks, whatever it holds; a larger one of zeros is nothing but holes.
    (alone,) = (entry for entry in entries if entry["name"] == "g")
    assert not {"chunkSize", "chunkDigest", "chunkType"} & alone.keys()
    assert [entry["chunkType"] for entry in entries if entry["name"] == "h"] == ["zeros", "zeros"]
    index = read_index(blob, written.annotations)
    volume = read_volume(index, blob)
    for name, content in ((b"f", data), (b"g", bytes(50_000)), (b"h", bytes(CHUNK_MOST + 1))):
        inode = index.root.children[name]
        assert volume[inode.volume_offset : inode.volume_offset + inode.size] == content


def test_what_go_cannot_agree_on_is_written_anew() -> None:
    twice = pack(regular("f", b"old"), regular("./f", b"new"))
    acl = pack(regular("f", b"x", pax_headers={"SCHILY.acl.access": "user::rw-,group::r--,other::r--"}))
    own = pack(regular(".no.prefetch.landmark", b"\x0f"), regular("f", b"x"))
    world = io.BytesIO()
    with tarfile.open(fileobj=world, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"uname": "all"}) as archive:
        archive.addfile(tarfile.TarInfo("f"))
    old = bytearray(pack(regular("f"), form=tarfile.USTAR_FORMAT))
    old[156:157] = b"7"
    old[148:156] = b"%06o\0 " % (sum(old[:148]) + 256 + sum(old[156:512]))
    slash = pack(regular("f/", b"x"))
    for tar in (twice, acl, own, world.getvalue(), bytes(old), slash):
        written, blob = write(tar)
        assert not written.is_tar_kept
        assert [entry["name"].removeprefix("./") for entry in toc_of(written, blob)["entries"]] == ["f"]
        check_like_containers_storage(written, blob)
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        written, blob = write(pack(regular("a" * 90 + "/" + "b" * 99, b"x" * 513), folder("d"), form=form))
        assert written.is_tar_kept
        check_like_containers_storage(written, blob)


def check_like_containers_storage(written: WrittenLayer, blob: bytes) -> None:
    """TOC and tar-split must list the same: each segment is the padding before and the headers of one entry."""
    toc, split = toc_of(written, blob), written.tar_split
    parts = list(decode_tar_split(blob[split.offset : split.stop], split.plain_length, toc["tarSplitDigest"]))
    entries = {entry["name"]: entry for entry in toc["entries"] if entry["type"] != "chunk"}
    assert len(entries) == sum(entry["type"] != "chunk" for entry in toc["entries"])
    padding = 0
    for part, after in itertools.pairwise(parts):
        if isinstance(part, Segment) and isinstance(after, Payload):
            with tarfile.open(fileobj=io.BytesIO(part.data[padding:] + bytes(1024)), mode="r:") as archive:
                info = archive.next()
            assert info is not None
            entry = entries.pop(after.name.decode())
            assert (entry.get("size", 0), entry.get("uid", 0), entry.get("mode", 0)) == (info.size, info.uid, info.mode)
            assert (after.size, entry.get("linkName", "")) == (info.size, info.linkname)
            padding = -info.size % 512
    assert not entries
    assert isinstance(parts[-1], Segment)
    assert len(parts[-1].data) >= padding


def test_names_that_json_cannot_say() -> None:
    tar = pack(regular("n\udcff", b"x"))
    written, blob = write(tar)
    assert written.is_tar_kept
    toc = toc_of(written, blob)
    assert [entry["name"] for entry in toc["entries"]] == ["n\ufffd"]
    assert "tarSplitDigest" not in toc
    split = written.tar_split
    payloads = [
        part for part in decode_tar_split(blob[split.offset : split.stop], split.plain_length) if isinstance(part, Payload)
    ]
    assert [part.name for part in payloads] == [b"n\xff"]


def test_prioritized_files_come_first() -> None:
    tar = pack(
        folder("usr"),
        regular("usr/last", random.Random(7).randbytes(900)),
        folder("etc"),
        regular("etc/first", b"1"),
        ("l", tarfile.LNKTYPE, b"", {"linkname": "usr/last"}),
    )
    written, blob = write(tar, prioritized=["etc/first", "/l", "absent"])
    toc = toc_of(written, blob)
    assert [entry["name"] for entry in toc["entries"]] == ["etc/", "etc/first", "usr/", "usr/last", "l"]
    assert written.missing == ("absent",)
    index = read_index(blob, written.annotations)
    assert index.prefetch_stop == toc["prefetchStop"] >= toc["entries"][3]["endOffset"]
    check_like_containers_storage(written, blob)
    assert "prefetchStop" not in toc_of(*write(tar))
    with tarfile.open(fileobj=io.BytesIO(unpack(blob))) as archive:
        assert archive.getnames() == ["etc", "etc/first", "usr", "usr/last", "l"]


@pytest.mark.parametrize("tail", [b"", bytes(511), bytes(1024), bytes(10240), bytes(3 << 20)])
def test_ends_of_tars(tail: bytes) -> None:
    tar = pack(regular("f", b"x" * 512))[:1024] + tail
    written, blob = write(tar)
    assert written.is_tar_kept
    if tail:
        check_like_containers_storage(written, blob)


def test_no_tar() -> None:
    with pytest.raises(FormatError):
        write(b"no tar at all" * 1000)
    written, blob = write(b"")
    assert read_index(blob, written.annotations).entry_count == 0


# --- chunks by content --------------------------------------------------------------------------------------------------------


def plain_cuts(data: bytes) -> list[tuple[int, bool]]:
    """The rule, a byte at a time: the sum of 64 bytes, and runs of 1 KiB of zeros aside; and the least size, which is ours."""
    low, high, window, at = 64 * 31, 64 * 63 * 31, bytearray(64), 0
    cuts, size = [], 0

    def roll(byte: int) -> bool:
        nonlocal low, high, at
        dropped, window[at % 64] = window[at % 64], byte
        low += byte - dropped
        high += low - 64 * (dropped + 31)
        at += 1
        return high & 0xFFFF == 0xFFFF

    for is_zero, group in itertools.groupby(data, lambda byte: byte == 0):
        run = bytes(group)
        if is_zero and len(run) >= 1024:
            cuts += [(size, False)] if size else []
            cuts.append((len(run), True))
            size = 0
            for byte in run:
                roll(byte)
            continue
        for byte in run:
            size += 1
            if roll(byte) and size >= 1024:
                cuts.append((size, False))
                size = 0
    return cuts + ([(size, False)] if size else [])


@pytest.mark.parametrize("seed", range(6))
def test_cuts_are_those_of_the_reference_writer(seed: int) -> None:
    dice = random.Random(seed)
    data = b"".join(
        dice.choice([dice.randbytes(dice.randrange(90_000)), bytes(dice.choice([1, 1023, 1024, 4000]))]) for _ in range(6)
    )
    rest, blocks = data, []
    while rest:
        size = dice.choice([1, 700, 5000, 70_000, 300_000])
        blocks.append(rest[:size])
        rest = rest[size:]
    chunks = list(cut_chunks(blocks))
    assert [(chunk.size, chunk.is_hole) for chunk in chunks] == plain_cuts(data)
    assert b"".join(chunk.data or bytes(chunk.size) for chunk in chunks) == data


def test_contents_that_never_end_a_chunk_are_cut() -> None:
    chunks = list(cut_chunks(itertools.repeat(b"\xff" * (1 << 20), 17)))
    assert [chunk.size for chunk in chunks] == [CHUNK_MOST, 1 << 20]
    holes = list(cut_chunks(itertools.repeat(bytes(1 << 20), 17)))
    assert [(chunk.size, chunk.is_hole) for chunk in holes] == [(CHUNK_MOST, True), (1 << 20, True)]


def test_an_insertion_changes_few_chunks() -> None:
    data = random.Random(1).randbytes(1 << 20)
    old = {hashlib.sha256(chunk.data).digest() for chunk in cut_chunks([data])}
    new = {hashlib.sha256(chunk.data).digest() for chunk in cut_chunks([data[:400_000] + b"inserted" + data[400_000:]])}
    assert len(new - old) <= 2
