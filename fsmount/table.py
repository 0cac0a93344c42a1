"""What this node has mounted, as a file that every fsmount process of one FUSE mount reads and replaces.

`run_dir/fsmount.state`, msgpack: a map with `magic` "shoal-fsmount", `version` 1, `boot_id`, `mount` (a random token of the FUSE
mount, given by the holder), `next_id`, `presentations` (what the probe found, or nil) and the lists `volumes`, `layers`, `roots`
of maps with the fields of the records below. A table of another boot or of another FUSE mount describes mounts that are gone;
only its roots are still of interest, to be taken away.

Numbers. Every volume and layer has an id that is never used again under one FUSE mount. A volume's inode number and file
handle is id << 32; a layer's image file has id << 32 as well, and inode `nid` of its tree is id << 32 | nid. So all numbers that
the kernel holds mean the same to every process.
"""

import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self

import msgpack

from fsmount.errors import ShoalError

_MAGIC: Final = "shoal-fsmount"
_MAX_BYTES: Final = 64 << 20


class TableError(ShoalError):
    """The file is not a table."""


@dataclass(slots=True)
class VolumeRecord:
    """A registered volume. Retired: removed by the agent, but the kernel may still hold it open."""

    name: str
    id: int
    data_path: str
    blocks_path: str
    size: int
    is_retired: bool = False


@dataclass(slots=True)
class LayerRecord:
    """A layer and how it is presented. `uses_fuse`: its tree or image is read through our FUSE root."""

    name: str
    id: int
    image_path: str
    volumes: list[str]
    volume_ids: list[int]
    presentation: str = ""
    uses_fuse: bool = False
    is_mounted: bool = False
    is_retired: bool = False


@dataclass(slots=True)
class RootRecord:
    """A merged root of several layers (bottom first) at a target chosen by the agent."""

    target: str
    layers: list[str]


@dataclass(slots=True)
class Table:
    """The records of one FUSE mount. Retired records share names with live ones, so they are told apart by id."""

    boot_id: str
    mount: str
    next_id: int = 1
    presentations: list[str] | None = None
    volumes: list[VolumeRecord] = field(default_factory=list)
    layers: list[LayerRecord] = field(default_factory=list)
    roots: list[RootRecord] = field(default_factory=list)

    def new_id(self) -> int:
        """A number for a volume or layer."""
        self.next_id += 1
        return self.next_id - 1

    def volume(self, name: str) -> VolumeRecord | None:
        """The live volume of that name."""
        return next((v for v in self.volumes if v.name == name and not v.is_retired), None)

    def layer(self, name: str) -> LayerRecord | None:
        """The live layer of that name."""
        return next((record for record in self.layers if record.name == name and not record.is_retired), None)

    def root(self, target: str) -> RootRecord | None:
        """The merged root at that place."""
        return next((record for record in self.roots if record.target == target), None)

    def to_bytes(self) -> bytes:
        """The file's content."""
        packed: bytes = msgpack.packb({"magic": _MAGIC, "version": 1, **asdict(self)}, unicode_errors="surrogateescape")
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read the file's content.

        Raises:
            TableError: it is something else.
        """
        try:
            found: dict[str, Any] = msgpack.unpackb(data, unicode_errors="surrogateescape")
            if found.pop("magic") != _MAGIC or found.pop("version") != 1:
                raise TableError("not a version 1 table of fsmount")
            volumes = [VolumeRecord(**_known(VolumeRecord, record)) for record in found.pop("volumes")]
            layers = [LayerRecord(**_known(LayerRecord, record)) for record in found.pop("layers")]
            roots = [RootRecord(**_known(RootRecord, record)) for record in found.pop("roots")]
            return cls(**_known(cls, found), volumes=volumes, layers=layers, roots=roots)
        except (KeyError, TypeError, ValueError, AttributeError, msgpack.UnpackException) as error:
            raise TableError(f"not a table of fsmount: {error}") from error


def _known(record: type, found: dict[str, Any]) -> dict[str, Any]:
    """Only the fields that this program knows: the table may have been written by a newer one, before a step back."""
    names = {each.name for each in fields(record)}
    return {name: value for name, value in found.items() if name in names}


def load_table(path: Path) -> Table | None:
    """The table in the file, None if there is none. Raises TableError, OSError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(data) > _MAX_BYTES:
        raise TableError(f"{path} has {len(data)} bytes, too many for a table")
    return Table.from_bytes(data)


def store_table(path: Path, data: bytes) -> None:
    """Replace the file at once. Not synced: a table of another boot is worth nothing."""
    temporary = path.with_name(path.name + ".new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    temporary.replace(path)
