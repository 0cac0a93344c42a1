"""The part of containerd's config.toml that makes Shoal its snapshotter, for `shoal doctor` and the documents.

Two forms, chosen by containerd's major version. `exports.root` lets CRI report the disk use of the right file system. From 2.1 CRI
pulls through the transfer service, and so does `ctr` from 2.0: there `enable_remote_snapshot_annotations` (a string) and an
`unpack_config` entry pass on what a layer is; setting `disable_snapshot_annotations = false` makes CRI pull by itself, which
works too. `ctr` 1.x passes no such labels: `ctr images pull --snapshotter shoal` works there but downloads everything, so `shoal
pull` is the way. An `unpack_config` replaces containerd's default list, so overlayfs is named again.
"""

from pathlib import Path
from typing import Final

SNAPSHOTTER: Final = "shoal"
"""The name under which containerd, `ctr --snapshotter` and CRI know us."""

_VERSION_2: Final = """\
version = 2

[proxy_plugins.{name}]
  type = "snapshot"
  address = "{socket}"
  [proxy_plugins.{name}.exports]
    root = "{root}"

# For Kubernetes; without these two lines only `shoal pull` and `ctr --snapshotter {name}` use it.
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "{name}"
  disable_snapshot_annotations = false
"""

_VERSION_3: Final = """\
version = 3

[proxy_plugins.{name}]
  type = "snapshot"
  address = "{socket}"
  [proxy_plugins.{name}.exports]
    root = "{root}"
    enable_remote_snapshot_annotations = "true"

[plugins."io.containerd.transfer.v1.local"]
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux"
    snapshotter = "{name}"
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux"
    snapshotter = "overlayfs"

# For Kubernetes; without these two lines only `shoal pull` and `ctr --snapshotter {name}` use it.
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "{name}"
  disable_snapshot_annotations = false
"""


def config_snippet(major: int, socket: Path, state_dir: Path) -> str:
    """What to put into /etc/containerd/config.toml of containerd `major` (1 means 1.6 and 1.7)."""
    template = _VERSION_2 if major < 2 else _VERSION_3
    return template.format(name=SNAPSHOTTER, socket=socket, root=state_dir / "snapshots")
