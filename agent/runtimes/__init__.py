"""One module per consumer of images: containerd today."""
