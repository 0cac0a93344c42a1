"""The process that owns Shoal's mounts: volume files over FUSE, EROFS on top, and a successor whenever it dies.

It knows volumes, EROFS metadata images and mounts; no network and no image format. The agent comes and goes beside it.
"""

__version__ = "0.1.0"
