"""EROFS metadata images: written from a tree of inodes, mounted by the kernel, or read here for the FUSE tree."""

from fsmount.erofs.layout import ErofsError, FileKind
from fsmount.erofs.reader import ImageReader, InodeView
from fsmount.erofs.writer import Node, write_image

__all__ = ["ErofsError", "FileKind", "ImageReader", "InodeView", "Node", "write_image"]
