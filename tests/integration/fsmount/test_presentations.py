import os
import signal
import stat
from pathlib import Path

import pytest

from agent.formats.model import Inode, InodeKind
from fsmount.link import open_link
from tests.fsmount_samples import LayerOnDisk, file_node, in_thread, look, make_layer, open_agent, register

PRESENTATIONS = ["erofs-file", "erofs-loop", "fuse-tree"]
ACL = bytes.fromhex("0200000001000600ffffffff02000400e803000004000400ffffffff10000400ffffffff20000400ffffffff")


def odd_tree(volume: bytearray) -> Inode:
    """One of everything that a layer can hold."""
    twice = file_node(volume, b"under two names", mode=0o640, uid=1000, gid=1001, mtime_ns=1_600_000_000_123_456_789)
    return Inode(
        InodeKind.DIRECTORY,
        mtime_ns=1_700_000_000_000_000_000,
        children={
            b"empty": file_node(volume, b""),
            b"one byte": file_node(volume, b"x"),
            b"one block": file_node(volume, b"b" * 4096),
            b"more than a block": file_node(volume, bytes(range(256)) * 20),
            b"large": file_node(volume, os.urandom((3 << 20) + 17)),
            b"hole": Inode(InodeKind.FILE, size=100_000),
            b"setuid": file_node(volume, b"#!", mode=0o4755),
            b"far owner": file_node(volume, b"o", uid=4_000_000_000, gid=3_000_000_000),
            b"first": twice,
            b"no utf-8 \xff\xfe": file_node(volume, b"n"),
            b"n" * 255: file_node(volume, b"long name"),
            b"attributes": file_node(
                volume,
                b"a",
                mode=0o644,
                xattrs={
                    b"user.short": b"v",
                    b"user.long": b"w" * 5000,
                    b"trusted.one": b"t",
                    b"security.capability": b"\x01\0\0\x02" + bytes(16),
                },
            ),
            b"acl": file_node(volume, b"acl", mode=0o644, xattrs={b"system.posix_acl_access": ACL}),
            b"short link": Inode(InodeKind.SYMLINK, 0o777, target=b"large"),
            b"long link": Inode(InodeKind.SYMLINK, 0o777, target=b"/".join([b"component"] * 350)),
            b"null": Inode(InodeKind.CHAR, 0o666, rdev=(1, 3)),
            b"disk": Inode(InodeKind.BLOCK, 0o660, gid=6, rdev=(259, 70000)),
            b"pipe": Inode(InodeKind.FIFO, 0o600),
            b"socket": Inode(InodeKind.SOCKET, 0o755),
            b"removed": Inode(InodeKind.CHAR, 0, rdev=(0, 0)),
            b"opaque": Inode(InodeKind.DIRECTORY, 0o700, is_opaque=True, children={b"second": twice}),
            b"many": Inode(
                InodeKind.DIRECTORY,
                0o1777,
                children={b"entry %d" % number: file_node(volume, b"%d" % number) for number in range(700)},
            ),
            b"deep": Inode(InodeKind.DIRECTORY, children={b"er": Inode(InodeKind.DIRECTORY)}),
        },
    )


@pytest.fixture
def layer(tmp_path: Path) -> LayerOnDisk:
    volume = bytearray()
    root = odd_tree(volume)
    return make_layer(tmp_path / "layer", "odd", root, bytes(volume))


@pytest.mark.parametrize("presentation", PRESENTATIONS)
async def test_every_presentation_shows_the_tree(fsmount: Path, layer: LayerOnDisk, presentation: str) -> None:
    volume = bytearray()
    expected = odd_tree(volume)
    async with open_agent(fsmount, layer) as link:
        assert presentation in link.info.presentations
        path = await register(link, layer, presentation)
        found = await in_thread(look, path)
    for name, node in expected.children.items():
        shown = found["/" + os.fsdecode(name)]
        assert int(str(shown["mode"]), 8) & 0o7777 == node.mode, name
        assert shown["owner"] == (node.uid, node.gid), name
        assert shown["mtime_ns"] == node.mtime_ns, name
        if node.kind is InodeKind.FILE and node.volume_offset >= 0:
            assert shown["content"] == layer.source[node.volume_offset : node.volume_offset + node.size], name
        if node.kind is InodeKind.SYMLINK:
            assert shown["target"] == node.target
        if node.kind in (InodeKind.CHAR, InodeKind.BLOCK):
            assert shown["rdev"] == os.makedev(*node.rdev)
    assert found["/hole"]["content"] == bytes(100_000)
    assert found["/first"]["same_file"] == ["/first", "/opaque/second"]
    assert found["/first"]["nlink"] == 2
    assert found["/attributes"]["xattrs"] == {os.fsdecode(k): v for k, v in expected.children[b"attributes"].xattrs.items()}
    assert found["/acl"]["xattrs"] == {"system.posix_acl_access": ACL}
    assert found["/opaque"]["xattrs"]["trusted.overlay.opaque"] == b"y"  # type: ignore[index]
    assert len(found["/many"]["entries"]) == 700  # type: ignore[arg-type]


async def test_all_presentations_look_alike(fsmount: Path, layer: LayerOnDisk) -> None:
    looks = []
    for presentation in PRESENTATIONS:
        async with open_agent(fsmount, layer) as link:
            path = await register(link, layer, presentation)
            looks.append(await in_thread(look, path))
            await link.unmount_layer("odd")
    assert looks[0] == looks[1]
    assert looks[0] == looks[2]


@pytest.mark.parametrize("presentation", PRESENTATIONS)
async def test_unprivileged_reader(fsmount: Path, layer: LayerOnDisk, presentation: str) -> None:
    """Permissions and ACLs of the layer hold for others than root; only root sees trusted attributes."""
    script = (
        "import os,sys; os.setgid(1000); os.setuid(1000)\n"
        "os.chdir(sys.argv[1])\n"
        "assert open('acl').read() == 'acl'\n"
        "print(sorted(os.listxattr('attributes')))\n"
        "try: os.listdir('opaque')\n"
        "except PermissionError: print('refused')\n"
    )
    fsmount.parent.chmod(0o755)
    for parent in fsmount.parents:
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
    async with open_agent(fsmount, layer) as link:
        path = await register(link, layer, presentation)
        process = await in_thread(run, ["python3", "-c", script, str(path)])
    assert process == "['security.capability', 'user.long', 'user.short']\nrefused\n"


def run(command: list[str]) -> str:
    import subprocess

    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


async def test_merged_root_applies_whiteouts(fsmount: Path, tmp_path: Path) -> None:
    volumes = [bytearray(), bytearray()]
    lower = Inode(
        InodeKind.DIRECTORY,
        children={
            b"kept": file_node(volumes[0], b"kept"),
            b"removed": file_node(volumes[0], b"removed"),
            b"hidden": Inode(InodeKind.DIRECTORY, children={b"old": file_node(volumes[0], b"old")}),
        },
    )
    upper = Inode(
        InodeKind.DIRECTORY,
        children={
            b"removed": Inode(InodeKind.CHAR, 0, rdev=(0, 0)),
            b"hidden": Inode(InodeKind.DIRECTORY, is_opaque=True, children={b"new": file_node(volumes[1], b"new")}),
        },
    )
    layers = [
        make_layer(tmp_path / name, name, root, bytes(volume))
        for name, root, volume in (("lower", lower, volumes[0]), ("upper", upper, volumes[1]))
    ]
    target, alone = tmp_path / "root", tmp_path / "alone"
    target.mkdir()
    alone.mkdir()
    for presentation in PRESENTATIONS:
        async with open_agent(fsmount, *layers) as link:
            for layer in layers:
                await register(link, layer, presentation)
            await link.mount_root(target, ["lower", "upper"])
            await link.mount_root(target, ["lower", "upper"])
            await link.mount_root(alone, ["upper"])
            assert {root["target"] for root in (await link.list())["roots"]} == {str(target), str(alone)}
            assert sorted(await in_thread(os.listdir, target)) == ["hidden", "kept"]
            assert await in_thread(os.listdir, target / "hidden") == ["new"]
            assert await in_thread((target / "hidden" / "new").read_bytes) == b"new"
            assert await in_thread((target / "kept").read_bytes) == b"kept"
            assert await in_thread(os.listdir, alone) == ["hidden"]
            await link.unmount_root(target)
            await link.unmount_root(alone)
            assert await in_thread(os.listdir, target) == []
            for layer in layers:
                await link.unmount_layer(layer.name)
    async with open_link(fsmount) as link:
        assert (await link.list())["roots"] == []


@pytest.mark.parametrize("presentation", PRESENTATIONS)
async def test_files_on_tmpfs(fsmount: Path, tmp_path: Path, presentation: str) -> None:
    """tmpfs cannot back an EROFS mount itself; the image then goes through our own root, and outlives a worker there."""
    memory = tmp_path / "memory"
    memory.mkdir()
    await in_thread(run, ["mount", "-t", "tmpfs", "tmpfs", str(memory)])
    try:
        volume = bytearray()
        root = odd_tree(volume)
        layer = make_layer(memory / "layer", "odd", root, bytes(volume))
        async with open_agent(fsmount, layer) as link:
            path = await register(link, layer, presentation)
            node = root.children[b"large"]
            os.kill(link.info.pid, signal.SIGKILL)
            await link.wait_closed()
        async with open_agent(fsmount, layer) as link:
            content = await in_thread((path / "large").read_bytes)
            assert content == layer.source[node.volume_offset : node.volume_offset + node.size]
            assert len(await in_thread(os.listdir, path / "many")) == 700
            await link.unmount_layer("odd")
            await link.remove_volume("odd")
        layer.blocks.close()
    finally:
        await in_thread(run, ["umount", "-l", str(memory)])
