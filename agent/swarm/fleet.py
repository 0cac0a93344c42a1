"""Who belongs to the fleet: everything both planes need to know each other, derived from one secret.

    fleet secret ── HKDF-SHA256 ──┬── pre-shared key of libp2p's private network (control plane)
                                  ├── Ed25519 key of the fleet CA (data plane)
                                  └── HMAC key of documents that pass through several hands (layer indexes)

The CA certificate is the same bytes on every node: fixed dates and serial, deterministic signature. A node's leaf
certificate holds the node's own identity key, so its peer id follows from the certificate's public key. Every member could
sign a certificate (all know the CA key), but none can sign one for the key of another: naming a foreign peer id needs that
peer's private key. Both ends demand a certificate of the CA, TLS 1.3 only.
"""

import os
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import attrs
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.errors import SettingsError
from agent.swarm.identity import Identity, peer_id_of

MIN_SECRET_BYTES: Final = 16
"""Shortest secret taken: 128 bits, if it was drawn at random."""
MAX_SECRET_BYTES: Final = 4096

_SALT: Final = b"shoal fleet v1"
_CA_NAME: Final = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Shoal fleet")])
_CA_FROM: Final = datetime(2020, 1, 1, tzinfo=UTC)
_CA_UNTIL: Final = datetime(2120, 1, 1, tzinfo=UTC)
_LEAF_LIFE: Final = timedelta(days=3650)
"""A leaf is made at each start and never leaves memory; its life only has to exceed an agent's."""
_CLOCK_SLACK: Final = timedelta(days=2)
"""Nodes whose clocks disagree must still meet; edge nodes without a clock battery start in the past."""


@attrs.frozen(repr=False)
class FleetSecret:
    """The secret that admits a node to its fleet. It never shows in a log or a traceback."""

    value: bytes = attrs.field()

    @value.validator
    def _check(self, _attribute: "attrs.Attribute[bytes]", value: bytes) -> None:
        if not MIN_SECRET_BYTES <= len(value) <= MAX_SECRET_BYTES:
            raise SettingsError(
                f"the fleet secret has {len(value)} bytes; {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} are needed "
                "(make one with: head -c 32 /dev/urandom | base64)"
            )

    def __repr__(self) -> str:
        return "FleetSecret(…)"

    def derive(self, purpose: bytes) -> bytes:
        """32 bytes for one purpose; knowing them tells nothing about the secret or about other purposes."""
        return HKDF(algorithm=SHA256(), length=32, salt=_SALT, info=purpose).derive(self.value)

    @property
    def network_key(self) -> str:
        """The pre-shared key of the private libp2p network, 64 hex digits."""
        return self.derive(b"libp2p psk").hex()


def read_fleet_secret(path: Path) -> FleetSecret:
    """Read the secret from a file; white space around it does not count. Blocks on the disk.

    Raises:
        SettingsError: no such file, not readable, others may read or change it, too short or too long.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(MAX_SECRET_BYTES + 100)
    except OSError as exc:
        raise SettingsError(f"cannot read the fleet secret {path}: {exc.strerror}") from exc
    if stat.S_ISREG(mode) and mode & 0o027:
        raise SettingsError(
            f"the fleet secret {path} may be read or changed by others (mode {mode & 0o7777:04o}); run: chmod 600 {path}"
        )
    return FleetSecret(raw.strip())


@attrs.frozen(repr=False)
class FleetCredentials:
    """What a member needs to talk to members: the network key, the key that seals what members tell each other through others,
    and the TLS contexts of both directions."""

    identity: Identity
    network_key: str
    seal_key: bytes
    server_context: ssl.SSLContext
    client_context: ssl.SSLContext

    def __repr__(self) -> str:
        return f"FleetCredentials(peer_id={self.identity.peer_id!r}, …)"


def _ca(secret: FleetSecret) -> tuple[Ed25519PrivateKey, x509.Certificate]:
    key = Ed25519PrivateKey.from_private_bytes(secret.derive(b"fleet ca"))
    public = key.public_key()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_CA_NAME)
        .issuer_name(_CA_NAME)
        .public_key(public)
        .serial_number(1)
        .not_valid_before(_CA_FROM)
        .not_valid_after(_CA_UNTIL)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, None)
    )
    return key, certificate


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _leaf(ca_key: Ed25519PrivateKey, key: Ed25519PublicKey, peer_id: str, now: datetime) -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, peer_id)]))
        .issuer_name(_CA_NAME)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SLACK)
        .not_valid_after(now + _LEAF_LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"shoal://peer/{peer_id}")]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, None)
    )


def peer_id_in(certificate: bytes | None) -> str | None:
    """The peer id that a peer's DER certificate proves: its subject names the id of its own public key.

    None when it names another id than its key has, or is no fleet leaf at all.
    """
    if certificate is None:
        return None
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        key = parsed.public_key()
        names = parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except (ValueError, UnsupportedAlgorithm):
        return None
    if not isinstance(key, Ed25519PublicKey) or len(names) != 1:
        return None
    peer_id = peer_id_of(key)
    return peer_id if names[0].value == peer_id else None


def _context(protocol: int, ca_pem: str, chain_pem: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # peers have ids, not names; the client compares the id in the certificate
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=ca_pem)
    # ssl reads keys from files only; a memfd is one that never reaches a disk.
    descriptor = os.memfd_create("shoal-leaf", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, chain_pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return context


def make_credentials(secret: FleetSecret, identity: Identity, *, now: datetime | None = None) -> FleetCredentials:
    """Derive a member's credentials (about 1 ms)."""
    ca_key, ca_certificate = _ca(secret)
    leaf = _leaf(ca_key, identity.key.public_key(), identity.peer_id, now or datetime.now(UTC))
    chain = identity.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + leaf.public_bytes(Encoding.PEM)
    ca_pem = ca_certificate.public_bytes(Encoding.PEM).decode()
    return FleetCredentials(
        identity,
        secret.network_key,
        secret.derive(b"seal"),
        server_context=_context(ssl.PROTOCOL_TLS_SERVER, ca_pem, chain),
        client_context=_context(ssl.PROTOCOL_TLS_CLIENT, ca_pem, chain),
    )
