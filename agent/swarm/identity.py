"""Who a node is: one Ed25519 key, kept on disk, whose libp2p peer id names the node everywhere.

The peer id of an Ed25519 key carries the whole public key (multihash "identity"), so an id proves itself: whoever signs with
the key that is inside it is that node. It is computed here and not by libp2p, so that nothing needs the library for it.
"""

import os
from pathlib import Path
from typing import Final

import attrs
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from agent.errors import SettingsError

KEY_FILE: Final = "node.key"
_KEY_BYTES: Final = 32
_ALPHABET: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"

# multihash: code 0 (identity), 36 bytes; protobuf PublicKey: field 1 (type) = 1 (Ed25519), field 2 (data), 32 bytes
_ID_PREFIX: Final = bytes((0x00, 0x24, 0x08, 0x01, 0x12, 0x20))


def _base58(data: bytes) -> str:
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _ALPHABET[digit] + text
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + text


def peer_id_of(key: Ed25519PublicKey) -> str:
    """The libp2p peer id (`12D3Koo…`) of an Ed25519 public key."""
    return _base58(_ID_PREFIX + key.public_bytes(Encoding.Raw, PublicFormat.Raw))


@attrs.frozen
class Identity:
    """A node's private key and the peer id that follows from it."""

    key: Ed25519PrivateKey = attrs.field(repr=False)
    peer_id: str

    @classmethod
    def from_key(cls, key: Ed25519PrivateKey) -> "Identity":
        """The identity that belongs to `key`."""
        return cls(key, peer_id_of(key.public_key()))

    @property
    def raw_key(self) -> bytes:
        """The private key's 32 bytes."""
        return self.key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())


def new_identity() -> Identity:
    """An identity that is not kept anywhere."""
    return Identity.from_key(Ed25519PrivateKey.generate())


def load_identity(directory: Path) -> Identity:
    """Read the node's key from `directory`, or make one there (mode 0600) at the first start. Blocks on the disk.

    Raises:
        SettingsError: the file is damaged or others may read it.
    """
    path = directory / KEY_FILE
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(_KEY_BYTES + 1)
    except FileNotFoundError:
        return _create(directory, path)
    if mode & 0o077:
        raise SettingsError(f"{path} may be read by others (mode {mode & 0o7777:04o}); run: chmod 600 {path}")
    if len(raw) != _KEY_BYTES:
        raise SettingsError(f"{path} is not a node key; remove it and the node gets a new identity at its next start")
    return Identity.from_key(Ed25519PrivateKey.from_private_bytes(raw))


def _create(directory: Path, path: Path) -> Identity:
    identity = new_identity()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(identity.raw_key)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return identity
