"""What the nydus writer does with layers: chunks once, whiteouts applied, files first, the same bytes every time."""

import hashlib
import io
import tarfile
from array import array
from typing import Any

import pytest

from agent.formats.model import ChunkTable, Digest, FormatError, Inode, InodeKind
from agent.formats.nydus_writer import WrittenBlob, build_bootstrap, write_blob, write_bootstrap
from agent.formats.nydus_writer.bootstrap import MAX_PREFETCH
from agent.formats.nydus_writer.merge import merge_layers
from agent.formats.tar import TarEntry
from agent.formats.tar_headers import encode_header
from agent.formats.tree import walk
from tests.unit.formats.conftest import FixtureImages
from tests.unit.formats.test_nydus_writer_tables import Boot, check_image, convert, source

MIB = 1 << 20
OPAQUE = ".wh..wh..opq"


def noise(seed: int, size: int) -> bytes:
    return hashlib.shake_128(b"%d" % seed).digest(size)


class Tar:
    """A layer, entry by entry."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._archive = tarfile.open(fileobj=self._out, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  # closed in `data`

    def add(self, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: Any) -> "Tar":
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(data)
        for key, value in fields.items():
            setattr(info, key, value)
        self._archive.addfile(info, io.BytesIO(data))
        return self

    def folder(self, name: str, **fields: Any) -> "Tar":
        return self.add(name, kind=tarfile.DIRTYPE, **{"mode": 0o755, **fields})

    def link(self, name: str, target: str) -> "Tar":
        return self.add(name, kind=tarfile.LNKTYPE, linkname=target)

    def data(self) -> bytes:
        self._archive.close()
        return self._out.getvalue()


def read_files(boot: Boot, blobs: list[bytes]) -> dict[str, bytes]:
    """The files of an image made without compression."""
    files = {}
    for path, (size, _, indexes) in boot.files.items():
        data = b"".join(blobs[blob][block * 4096 : block * 4096 + boot.ext[3]] for _, blob, block in indexes)
        files[path.decode()] = data[:size]
    return files


def make(*tars: Tar, prefetch: tuple[bytes, ...] = (), **options: Any) -> tuple[Boot, dict[str, bytes], list[WrittenBlob]]:
    layers, blobs = convert([tar.data() for tar in tars], compressor="none", **options)
    distinct = list(dict.fromkeys(blobs))
    boot, _ = check_image(bytes(build_bootstrap(layers, prefetch).image), distinct)
    return boot, read_files(boot, distinct), layers


def test_the_same_input_gives_the_same_bytes(images: FixtureImages) -> None:
    tars = source(images, "oci")

    def once() -> tuple[list[bytes], bytes]:
        layers, blobs = convert(tars, prioritized=[b"/etc/hosts"])
        out = io.BytesIO()
        write_bootstrap(layers, out, [b"/etc"])
        return blobs, out.getvalue()

    assert once() == once()


def test_the_tar_may_be_a_stream() -> None:
    class Stream(io.RawIOBase):
        def __init__(self, data: bytes) -> None:
            self._data = io.BytesIO(data)

        def read(self, size: int = -1) -> bytes:
            return self._data.read(min(size, 777))

    tar = Tar().add("a", noise(1, 3 * MIB)).data()
    out, other = io.BytesIO(), io.BytesIO()
    write_blob(Stream(tar), out)
    write_blob(io.BytesIO(tar), other)
    assert out.getvalue() == other.getvalue()


def test_a_chunk_is_stored_once_in_a_blob() -> None:
    part = noise(1, MIB)
    boot, files, (layer,) = make(Tar().add("a", part * 3).add("b", part).add("c", part + b"x").add("d", b"x"))
    assert files == {"/a": part * 3, "/b": part, "/c": part + b"x", "/d": b"x"}
    assert len(layer.chunks) == len(boot.chunks) == 2


def test_a_chunk_of_an_earlier_layer_is_used_from_there() -> None:
    shared, own = noise(1, MIB), noise(2, 5000)
    boot, files, layers = make(Tar().add("a", shared), Tar().add("b", shared + own).add("c", shared))
    assert files == {"/a": shared, "/b": shared + own, "/c": shared}
    assert [blob for _, blob, _ in boot.files[b"/b"][2]] == [0, 1]
    assert [blob for _, blob, _ in boot.files[b"/c"][2]] == [0]
    # The copy stays in its blob.
    assert [len(layer.chunks) for layer in layers] == [1, 2]
    assert boot.chunks.keys() == {(0, 0), (1, 1)}


def test_a_chunk_of_a_removed_file_still_serves() -> None:
    data = noise(1, 9000)
    boot, files, _ = make(Tar().add("a", data).add("rest", b"1"), Tar().add(".wh.a").add("b", data))
    assert files == {"/b": data, "/rest": b"1"}
    assert boot.files[b"/b"][2] == [(0, 0, 0)]


def test_layers_with_equal_data_have_one_blob() -> None:
    data = noise(1, 9000)
    boot, files, layers = make(Tar().add("a", data), Tar().add("z", b"other"), Tar().add("b", data))
    assert files == {"/a": data, "/b": data, "/z": b"other"}
    assert layers[0].digest == layers[2].digest
    assert len(boot.blobs) == 2
    written = write_bootstrap(layers, io.BytesIO())
    # In the order of the lowest layer that has each; the annotation and the blob table agree.
    assert written.blob_ids == (layers[0].blob_id, layers[1].blob_id)
    assert written.blob_ids == tuple(entry["id"].decode() for entry in boot.blobs)
    assert written.blob_ids == tuple(name.rstrip(b"\0").decode() for name, _, _ in boot.devices)


def test_a_layer_without_data_has_no_blob() -> None:
    out = io.BytesIO()
    layer = write_blob(io.BytesIO(Tar().folder("etc").add(".wh.gone").add("empty").data()), out)
    assert (layer.digest, layer.size, layer.blob_id, out.getvalue()) == (None, 0, "", b"")
    boot, files, _ = make(Tar().add("gone", b"1").add("stays", b"2"), Tar().folder("etc").add(".wh.gone").add("empty"))
    assert files == {"/stays": b"2", "/empty": b""}
    assert len(boot.blobs) == 1


def test_an_image_without_data_has_no_devices() -> None:
    boot, _, _ = make(Tar().folder("etc"))
    assert boot.devices == []
    assert boot.super[9] == 0
    assert boot.nids.keys() == {b"/", b"/etc"}


def merged(*tars: Tar) -> dict[str, Inode]:
    layers, _ = convert([tar.data() for tar in tars])
    return {path.decode() or "/": inode for path, inode in walk(merge_layers([layer.root for layer in layers]).root)}


def test_whiteouts_remove_what_is_below() -> None:
    below = Tar().folder("d").add("d/a", b"1").folder("d/sub").add("d/sub/b", b"2").add("f", b"3")
    tree = merged(below, Tar().add("d/.wh.a").add("d/.wh.sub").add(".wh.f").add(".wh.never-there"))
    assert tree.keys() == {"/", "/d"}


def test_whiteouts_spare_their_own_layer() -> None:
    below = Tar().folder("d").add("d/old", b"1").add("f", b"1")
    tree = merged(below, Tar().folder("d").add("d/new", b"2").add(".wh.d").add("f", b"22").add(".wh.f"))
    assert tree.keys() == {"/", "/d", "/d/new", "/f"}
    assert tree["/f"].size == 2


def test_whiteouts_of_the_lowest_layer_vanish() -> None:
    tree = merged(Tar().add(".wh.x").folder("d").add(f"d/{OPAQUE}").add("d/.wh.y").add("d/z"))
    assert tree.keys() == {"/", "/d", "/d/z"}
    assert not tree["/d"].is_opaque


def test_opaque_directories_hide_what_is_below() -> None:
    below = Tar().folder("d", mode=0o700).add("d/old", b"1").folder("d/sub").add("d/sub/deep", b"1")
    tree = merged(below, Tar().folder("d/sub").add("d/sub/new", b"2").add(f"d/{OPAQUE}"))
    assert tree.keys() == {"/", "/d", "/d/sub", "/d/sub/new"}
    # The marker alone says nothing of the directory's attributes.
    assert tree["/d"].mode == 0o700


def test_directories_merge_and_take_the_upper_attributes() -> None:
    below = Tar().folder("./", mode=0o711).folder("d", mode=0o700, uid=5, mtime=7).add("d/a", b"1")
    tree = merged(below, Tar().folder("d", mode=0o2755, uid=6, mtime=8).add("d/b", b"2"))
    assert tree.keys() == {"/", "/d", "/d/a", "/d/b"}
    assert (tree["/d"].mode, tree["/d"].uid, tree["/d"].mtime_ns) == (0o2755, 6, 8 * 10**9)
    assert tree["/"].mode == 0o711


def test_implied_directories_take_nothing_from_what_is_below() -> None:
    below = Tar().folder("d", mode=0o1777, gid=9, mtime=7)
    tree = merged(below, Tar().add("d/new/file", b"1"))
    assert (tree["/d"].mode, tree["/d"].gid, tree["/d"].mtime_ns) == (0o1777, 9, 7 * 10**9)
    assert tree["/d/new"].mode == 0o755


@pytest.mark.parametrize("is_file_first", [False, True])
def test_types_change(is_file_first: bool) -> None:
    file, folder = Tar().add("x", b"data"), Tar().folder("x").add("x/inner", b"1")
    tree = merged(*((file, folder) if is_file_first else (folder, file)))
    assert tree.keys() == ({"/", "/x", "/x/inner"} if is_file_first else {"/", "/x"})


def test_merging_leaves_the_layers_as_they_are() -> None:
    layers, _ = convert([Tar().folder("d").add("d/a", b"1").data(), Tar().add("d/b", b"2").add("d/.wh.a").data()])
    before = [[path for path, _ in walk(layer.root)] for layer in layers]
    assert build_bootstrap(layers).image == build_bootstrap(layers).image
    assert [[path for path, _ in walk(layer.root)] for layer in layers] == before


def test_hard_links_stay_one_inode_while_they_have_names() -> None:
    below = Tar().add("a", b"data").link("b", "a").link("c", "./b").add("alone", b"1")
    boot, files, _ = make(below, Tar().add(".wh.b").link("again", "new").add("new", b"22"))
    assert boot.nids[b"/a"] == boot.nids[b"/c"]
    assert boot.nids[b"/again"] == boot.nids[b"/new"]
    assert b"/b" not in boot.nids
    assert files["/c"] == b"data"
    assert files["/again"] == b"22"


def test_prioritized_files_lie_first() -> None:
    tar = Tar().add("a", noise(1, 9000)).add("b", noise(2, 2 * MIB)).add("c", b"cc").link("d", "b")
    data = tar.data()
    layers, blobs = convert([data], prioritized=[b"/c", b"./d", b"nowhere", b"c", b""], compressor="none")
    boot, _ = check_image(bytes(build_bootstrap(layers).image), blobs)
    assert layers[0].missing == (b"nowhere", b"")
    assert [boot.files[path][2][0][0] for path in (b"/c", b"/b", b"/a")] == [0, 1, 3]
    plain, _ = convert([data], compressor="none")
    assert len(layers[0].chunks) == len(plain[0].chunks)
    assert read_files(boot, blobs)["/b"] == noise(2, 2 * MIB)


def test_links_in_a_circle_are_no_file_to_put_first() -> None:
    with pytest.raises(FormatError, match="circle"):
        convert([Tar().link("a", "b").link("b", "a").data()], prioritized=[b"a"])


def test_paths_to_read_ahead() -> None:
    tar = Tar().folder("usr").add("usr/tool", b"1").link("same", "usr/tool")
    layers, blobs = convert([tar.data()])
    made = build_bootstrap(layers, [b"/usr/tool", b"same", b"usr/none", b"/usr/", b"/", b"usr/tool/x"])
    assert made.missing == (b"usr/none", b"usr/tool/x")
    boot, _ = check_image(bytes(made.image), blobs)
    assert boot.prefetch == [boot.nids[b"/usr/tool"], boot.nids[b"/usr"], boot.nids[b"/"]]
    assert made.warnings == ()


def test_too_many_paths_to_read_ahead() -> None:
    names = [b"%d" % number for number in range(MAX_PREFETCH + 1)]
    layers, _ = convert([b"".join(encode_header(TarEntry(name, b"6")) for name in names)])
    # What is named twice counts once.
    made = build_bootstrap(layers, [*names, b"0", b"/"])
    assert made.warnings == (f"2 of the paths to read ahead were left out: the table has {MAX_PREFETCH}",)
    assert made.missing == ()


def sparse(size: int, parts: list[tuple[int, bytes]]) -> bytes:
    """A layer with the file `s`, sparse in pax form 1.0."""
    numbers = [len(parts), *(number for at, data in parts for number in (at, len(data)))]
    table = "".join(f"{number}\n" for number in numbers).encode()
    stored = table + bytes(-len(table) % 512) + b"".join(data for _, data in parts)
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s", "GNU.sparse.realsize": str(size)}
    return Tar().add("GNUSparseFile.0/s", stored, pax_headers=pax).data()


@pytest.mark.parametrize("prioritized", [(), (b"s",)])
def test_holes_are_one_chunk_of_zeros(prioritized: tuple[bytes, ...]) -> None:
    size = (300 << 30) + 5
    tar = sparse(size, [(0, b"head"), (MIB + 10, b"x"), (size - 1, b"!")])
    layers, blobs = convert([tar], prioritized=prioritized)
    boot, _ = check_image(bytes(build_bootstrap(layers).image), blobs)
    indexes = boot.files[b"/s"][2]
    assert len(indexes) == 300 * 1024 + 1
    assert len(layers[0].chunks) == 4
    assert len(set(indexes[2:-1])) == 1
    assert len(blobs[0]) < 16384


def test_a_sparse_file_that_would_need_too_many_chunks_is_refused() -> None:
    with pytest.raises(FormatError, match="chunks"):
        convert([sparse(1 << 50, [(5, b"x")])])


@pytest.mark.parametrize("size", [0, 4095, 6000, 32 << 20])
def test_chunk_sizes_that_readers_refuse(size: int) -> None:
    with pytest.raises(FormatError, match="chunk size"):
        convert([Tar().data()], chunk_size=size)


def test_the_largest_chunks() -> None:
    data = noise(1, (32 << 20) - 1)
    boot, files, _ = make(Tar().add("a", data), chunk_size=16 << 20)
    assert files == {"/a": data}
    assert [row[4] for row in boot.chunks.values()] == [16 << 20, (16 << 20) - 1]
    layers, blobs = convert([Tar().add("a", data).add("b", bytes(20 << 20)).data()], chunk_size=16 << 20)
    check_image(bytes(build_bootstrap(layers).image), blobs)


@pytest.mark.parametrize("value", [0x00, 0x37, 0x80, 0xFF])
def test_headers_with_a_byte_that_is_wrong(value: int) -> None:
    tar = (
        Tar().folder("d").add("d/file", noise(1, 5000)).add("dev", kind=tarfile.CHRTYPE, devmajor=1, devminor=3).link("l", "dev")
    )
    data = tar.data()
    headers = [0, 512, 512 + 512 + 5120, 1024 + 512 + 5120]
    for at in (header + byte for header in headers for byte in (*range(0, 10, 3), *range(96, 148, 3), 156, *range(157, 345, 3))):
        wrong = bytearray(data)
        wrong[at] = value
        start = at - at % 512
        wrong[start + 148 : start + 156] = b" " * 8
        wrong[start + 148 : start + 156] = b"%06o\0 " % sum(wrong[start : start + 512])
        try:
            layers, blobs = convert([bytes(wrong)])
        except FormatError:
            continue
        check_image(bytes(build_bootstrap(layers).image), blobs)


def test_a_tar_that_ends_too_early() -> None:
    with pytest.raises(FormatError):
        convert([Tar().add("a", bytes(10_000)).data()[:5000]])


def synthetic(blob_id: int, *, chunk_size: int = MIB) -> WrittenBlob:
    """A layer with one file of one chunk."""
    chunks = ChunkTable()
    chunks.append(0, 1, 0, 1, noise(blob_id, 32))
    root = Inode(InodeKind.DIRECTORY, children={b"%d" % blob_id: Inode(InodeKind.FILE, size=1, chunk_count=1)})
    return WrittenBlob(
        Digest(f"sha256:{blob_id:064x}"), 1, root, array("I", [0]), chunks, chunk_size, "zstd", uncompressed_size=4096
    )


def test_as_many_blobs_as_the_format_can_hold() -> None:
    image = build_bootstrap([synthetic(number) for number in range(254)]).image
    assert image
    with pytest.raises(FormatError, match="255 layers"):
        build_bootstrap([synthetic(number) for number in range(255)])


def test_layers_that_do_not_belong_together() -> None:
    with pytest.raises(FormatError, match="different chunk sizes"):
        build_bootstrap([synthetic(1), synthetic(2, chunk_size=65536)])


def test_what_cannot_be_stored_is_told() -> None:
    pax = {"SCHILY.xattr.system.posix_acl_access": "rubbish", "SCHILY.xattr.user.kept": "1", "SCHILY.xattr.foreign.x": "1"}
    tar = Tar().add("a", b"1", pax_headers=pax).add("dev", kind=tarfile.CHRTYPE, devmajor=5000, devminor=1)
    layers, _ = convert([tar.data()])
    made = build_bootstrap(layers)
    assert any("foreign.x" in text for text in layers[0].warnings)
    assert sorted(text.split(" ", 2)[1] for text in made.warnings) == ["attribute", "device"]
