"""What our writer makes, read by ourselves, by tarfile and by gzip; and the reference reader's rules."""

import gzip
import hashlib
import io
import json
import os
import tarfile
from typing import Any, BinaryIO

import pytest

from agent.formats import estargz
from agent.formats.estargz_writer import WrittenLayer, write_estargz
from agent.formats.model import FormatError, digest_of
from agent.formats.plain import PlainLayerParser
from agent.formats.tar import TarEntry
from agent.formats.tar_headers import encode_header


def write(tar: bytes, **options: Any) -> tuple[WrittenLayer, bytes]:
    out = io.BytesIO()
    written = write_estargz(io.BytesIO(tar), out, **options)
    blob = out.getvalue()
    assert written.digest == digest_of(blob)
    assert written.size == len(blob)
    return written, blob


def toc_of(blob: bytes) -> tuple[list[dict[str, Any]], int]:
    footer = estargz.parse_footer(blob[-60:], len(blob))
    assert footer is not None
    assert footer.footer_size == 51
    toc = estargz.unpack_toc(blob[footer.toc_offset : -51])
    return json.loads(toc)["entries"], footer.toc_offset


def small_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:

        def add(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: Any) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))

        add("./", tarfile.DIRTYPE, mode=0o755)
        add("./usr/", tarfile.DIRTYPE, mode=0o755, uname="root")
        add("./usr/bin/", tarfile.DIRTYPE, mode=0o755, uname="root")
        add("./usr/bin/first", data=b"old")
        add("./usr/bin/tool", data=os.urandom(100_000), mode=0o755)
        add("./usr/bin/first", data=b"first", uname="root", gname="staff", gid=50)
        add("./etc/", tarfile.DIRTYPE)
        add("./etc/link", tarfile.LNKTYPE, linkname="./usr/bin/tool")
        add("./etc/link2", tarfile.LNKTYPE, linkname="etc/link")
        add("./etc/empty")
        add(".no.prefetch.landmark", data=b"\x0f")
        add("stargz.index.json", data=b"{}")
    return out.getvalue()


@pytest.mark.parametrize("options", [{}, {"min_chunk": 50_000, "level": 1}, {"chunk_size": 65536, "is_fast": True, "level": 2}])
def test_fixture_survives_the_round_trip(images: Any, options: dict[str, Any]) -> None:
    tar = gzip.decompress(images.layers("oci")[0].blob)
    written, blob = write(tar, **options)
    index = images.read_toc(blob, written.toc_digest)
    volume = images.read_volume(index, blob)
    found = images.describe(index, volume)
    truth = images.truth(1, is_json=False)
    renamed = {key.encode("latin-1").decode("utf-8", "replace").encode().decode("latin-1"): value for key, value in truth.items()}
    assert found.keys() == renamed.keys()
    # Times keep their nanoseconds, other than with the reference writer.
    assert {key: value for key, value in found.items() if value != renamed[key]} == {}
    if options:
        return
    # The same blob as a plain layer: tar headers and TOC say the same.
    parser = PlainLayerParser()
    plain = bytearray()
    for offset, data in parser.feed(blob):
        plain.extend(bytes(max(0, offset + len(data) - len(plain))))
        plain[offset : offset + len(data)] = data
    whole = parser.finish()
    assert images.describe(whole.index, bytes(plain)) == truth
    assert whole.diff_id == written.diff_id
    assert whole.uncompressed_size == written.uncompressed_size


def test_writing_twice_gives_the_same_bytes(images: Any) -> None:
    tar = gzip.decompress(images.layers("oci")[1].blob)
    assert write(tar)[1] == write(tar)[1]


def test_tarfile_reads_the_blob(images: Any) -> None:
    tar = gzip.decompress(images.layers("oci")[0].blob)
    _, blob = write(tar, is_fast=True)

    def members(stream: BinaryIO) -> dict[str, Any]:
        found = {}
        with tarfile.open(fileobj=stream, mode="r:*") as archive:
            for info in archive:
                data = archive.extractfile(info) if info.isreg() else None
                xattrs = {key: value for key, value in info.pax_headers.items() if key.startswith("SCHILY.xattr")}
                content = hashlib.sha256(data.read()).hexdigest() if data else None
                found[info.name] = (
                    info.mode,
                    info.uid,
                    info.gid,
                    info.mtime,
                    info.type,
                    info.linkname,
                    info.devmajor,
                    info.devminor,
                    xattrs,
                    content,
                )
        return found

    expected, found = members(io.BytesIO(tar)), members(io.BytesIO(blob))
    assert found.pop("stargz.index.json")[4] == tarfile.REGTYPE
    found.pop(".no.prefetch.landmark")
    assert found.keys() == expected.keys()
    assert {key for key in found if found[key][:4] + found[key][5:] != expected[key][:4] + expected[key][5:]} <= {
        "sizes/sparse",
        "./sizes/sparse",
    }


def test_order_landmarks_and_links() -> None:
    written, blob = write(small_tar(), prioritized=["etc/link2", "/usr/bin/first", "absent"])
    entries, toc_offset = toc_of(blob)
    assert [entry["name"] for entry in entries] == [
        "./",
        "./usr/",
        "./usr/bin/",
        "./usr/bin/tool",
        "./etc/",
        "./etc/link",
        "./etc/link2",
        "./usr/bin/first",
        ".prefetch.landmark",
        "./etc/empty",
    ]
    assert written.missing == ("absent",)
    index = estargz.parse_toc(
        estargz.unpack_toc(blob[toc_offset:-51]), blob_size=len(blob), toc_offset=toc_offset, toc_digest=None
    )
    landmark = next(entry for entry in entries if entry["name"] == ".prefetch.landmark")
    assert index.prefetch_stop == landmark["offset"]
    assert (
        index.prefetch_stop in list(index.pieces.starts) or index.prefetch_stop > index.chunks.blob_offset[len(index.chunks) - 1]
    )
    assert b".prefetch.landmark" not in index.root.children
    names = {entry["name"]: entry for entry in entries}
    assert names["./usr/"]["userName"] == "root"
    assert "userName" not in names["./usr/bin/"]
    assert names["./usr/bin/first"]["groupName"] == "staff"
    assert names["./usr/bin/first"]["digest"] == digest_of(b"first")
    assert names["./etc/empty"]["digest"] == digest_of(b"")
    assert written.annotations["containerd.io/snapshot/stargz/toc.digest"] == written.toc_digest


def test_a_slash_behind_the_name_of_a_file_goes() -> None:
    # Go's archive/tar, and so every container runtime, has a file here; GNU tar would make a directory of it.
    head = bytearray(encode_header(TarEntry(b"f", b"0", size=1)))
    head[1:2] = b"/"
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 256 + sum(head[156:]))
    _, blob = write(bytes(head) + b"x" + bytes(511))
    assert [(entry["name"], entry["type"]) for entry in toc_of(blob)[0][1:]] == [("f", "reg")]
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(blob))) as archive:
        assert (archive.getmember("f").isreg(), archive.getmember("f").size) == (True, 1)


def test_without_priorities_the_landmark_says_so() -> None:
    _, blob = write(small_tar())
    entries, _ = toc_of(blob)
    assert entries[0]["name"] == ".no.prefetch.landmark"
    assert [entry["name"] for entry in entries].count(".no.prefetch.landmark") == 1


def test_every_chunk_opens_a_member_of_its_own() -> None:
    _, blob = write(small_tar(), chunk_size=30_000)
    entries, toc_offset = toc_of(blob)
    offsets = [entry["offset"] for entry in entries if "offset" in entry]
    assert len(set(offsets)) == len(offsets)
    for offset in [*offsets, toc_offset]:
        assert blob[offset : offset + 3] == b"\x1f\x8b\x08"
    tool = [entry for entry in entries if entry["name"] == "./usr/bin/tool"]
    assert [entry.get("chunkOffset", 0) for entry in tool] == [0, 30_000, 60_000, 90_000]
    # Explicit unless it is what is left, as the reference writer does.
    assert [entry.get("chunkSize") for entry in tool] == [30_000, 30_000, 30_000, None]


def test_exact_multiples_state_their_last_chunk() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("f")
        info.size = 60_000
        archive.addfile(info, io.BytesIO(bytes(60_000)))
    entries, _ = toc_of(write(out.getvalue(), chunk_size=30_000)[1])
    assert [entry.get("chunkSize") for entry in entries[1:]] == [30_000, 30_000]


def test_members_group_small_files() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for number in range(300):
            info = tarfile.TarInfo(f"f{number}")
            info.size = 1000
            archive.addfile(info, io.BytesIO(os.urandom(1000)))
    _, blob = write(out.getvalue(), min_chunk=20_000)
    entries, _ = toc_of(blob)
    offsets = sorted({entry["offset"] for entry in entries})
    assert 3 < len(offsets) < 20
    assert any(entry.get("innerOffset") for entry in entries)


def test_impossible_arguments_and_inputs() -> None:
    for size in (0, -1, 1 << 40):
        with pytest.raises(FormatError):
            write(small_tar(), chunk_size=size)
    with pytest.raises(FormatError):
        write(b"no tar at all" * 100)


def test_the_toc_has_tabs_and_no_more_than_it_must() -> None:
    written, blob = write(small_tar())
    _, toc_offset = toc_of(blob)
    toc = estargz.unpack_toc(blob[toc_offset:-51], written.toc_digest)
    assert toc == json.dumps(json.loads(toc), indent="\t", ensure_ascii=False).encode()
