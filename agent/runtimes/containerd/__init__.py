"""containerd: the proxy snapshotter that it asks for layers, and the client that brings images into it."""
