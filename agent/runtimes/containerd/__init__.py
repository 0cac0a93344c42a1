"""containerd: the proxy snapshotter that it asks for layers, and the client that brings images into it."""

from agent.runtimes.containerd.client import Containerd, ContainerdError, open_containerd
from agent.runtimes.containerd.configuration import SNAPSHOTTER, config_snippet
from agent.runtimes.containerd.service import serve_snapshots
from agent.runtimes.containerd.snapshotter import LayerService, PreparedLayer, Snapshotter, open_snapshotter

__all__ = [
    "SNAPSHOTTER",
    "Containerd",
    "ContainerdError",
    "LayerService",
    "PreparedLayer",
    "Snapshotter",
    "config_snippet",
    "open_containerd",
    "open_snapshotter",
    "serve_snapshots",
]
