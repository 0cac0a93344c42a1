"""A blob that the writer of containers/storage made: it is read, and from the same tar we make the same TOC and tar-split."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import zstandard

from agent.formats.model import Digest
from agent.formats.tar_split import decode_tar_split
from agent.formats.zstd_chunked import parse_footer, parse_position, tar_split_position
from agent.formats.zstd_chunked_writer import write_zstd_chunked
from tests.zstd_chunked_samples import read_index, read_volume

PREFIX = "io.github.containers.zstd-chunked."
TEXT = b"".join(b"line %d of a file\n" % number for number in range(3000))
HOLES = TEXT + bytes(5000) + TEXT[:100] + bytes(2048)


def source_tar() -> bytes:
    regular = tarfile.REGTYPE
    members: list[tuple[str, bytes, bytes, dict[str, Any]]] = [
        ("./", tarfile.DIRTYPE, b"", {"mode": 0o755, "mtime": 1700000000}),
        ("./holes", regular, HOLES, {"mtime": 1700000000.25}),
        ("./small", regular, b"x" * 700, {"uid": 5}),
        ("./empty", regular, b"", {}),
        ("./zeros", regular, bytes(3000), {}),
        ("./link", tarfile.SYMTYPE, b"", {"linkname": "small"}),
        ("./hard", tarfile.LNKTYPE, b"", {"linkname": "./small"}),
        ("./xattr", regular, b"1", {"pax_headers": {"SCHILY.xattr.user.a": "v", "mtime": "1700000000.123456789"}}),
    ]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind, data, fields in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture(scope="module")
def reference() -> tuple[bytes, dict[str, str]]:
    document = json.loads(Path(__file__).with_name("zstd_chunked_reference.json").read_bytes())
    return base64.b64decode(document["blob"]), document["annotations"]


def test_reference_blob_is_read(reference: tuple[bytes, dict[str, str]]) -> None:
    blob, annotations = reference
    index = read_index(blob, annotations)
    volume = read_volume(index, blob)
    files = index.root.children
    for name, content in ((b"holes", HOLES), (b"small", b"x" * 700), (b"zeros", bytes(3000)), (b"xattr", b"1"), (b"empty", b"")):
        inode = files[name]
        assert volume[max(0, inode.volume_offset) :][: inode.size] == content
    assert files[b"hard"] is files[b"small"]
    assert files[b"link"].target == b"small"
    assert files[b"xattr"].xattrs == {b"user.a": b"v"}
    assert files[b"xattr"].mtime_ns == 1700000000_123456789
    # Of the file with holes no chunk holds zeros: its two ends are one chunk each at most.
    assert index.codec == "zstd"
    assert sum(index.chunks.size) == len(HOLES) - 5000 - 2048 + 700 + 3000 + 1
    footer = parse_footer(blob[-72:], len(blob))
    assert footer is not None
    assert footer.toc == parse_position(annotations[PREFIX + "manifest-position"], len(blob))
    assert footer.tar_split == tar_split_position(annotations, len(blob))


def test_we_write_what_the_reference_writes(reference: tuple[bytes, dict[str, str]]) -> None:
    out = io.BytesIO()
    written = write_zstd_chunked(io.BytesIO(source_tar()), out, level=3)
    assert written.is_tar_kept
    ours, theirs = parts_of(out.getvalue(), written.annotations), parts_of(*reference)
    assert ours == theirs


def parts_of(blob: bytes, annotations: dict[str, str]) -> tuple[list[Any], list[Any], bytes]:
    """The entries but for their places in the blob, the tar-split, the tar."""
    toc_at = parse_position(annotations[PREFIX + "manifest-position"], len(blob))
    with zstandard.ZstdDecompressor().stream_reader(blob[toc_at.offset : toc_at.stop]) as reader:
        toc = json.loads(reader.read())
    split_at = tar_split_position(annotations, len(blob))
    assert split_at is not None
    split = decode_tar_split(blob[split_at.offset : split_at.stop], split_at.plain_length, Digest(toc["tarSplitDigest"]))
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(blob), read_across_frames=True) as reader:
        tar = reader.read()
    for entry in toc["entries"]:
        entry.pop("offset", None)
        entry.pop("endOffset", None)
    return toc["entries"], list(split), tar
