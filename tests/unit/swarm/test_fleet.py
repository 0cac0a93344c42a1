"""The fleet secret: what follows from it, who may read it, what a certificate proves."""

import ssl
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from agent.errors import SettingsError
from agent.swarm import FleetSecret, load_identity, make_credentials, new_identity, peer_id_in, read_fleet_secret
from agent.swarm.fleet import _ca, _leaf
from agent.swarm.identity import Identity

SECRET = FleetSecret(b"correct horse battery staple")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_peer_id_is_that_of_the_libp2p_specification() -> None:
    # the Ed25519 example of the peer-ids specification, checked against libp2p's own code in tests/integration/swarm
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    identity = Identity.from_key(key)
    assert identity.peer_id.startswith("12D3KooW")
    assert len(identity.peer_id) == 52
    assert Identity.from_key(key) == identity


def test_derived_values_are_the_same_everywhere_and_differ_by_purpose() -> None:
    again = FleetSecret(SECRET.value)
    assert again.network_key == SECRET.network_key
    assert len(bytes.fromhex(SECRET.network_key)) == 32
    assert SECRET.derive(b"a") != SECRET.derive(b"b")
    assert FleetSecret(b"another secret of some length").network_key != SECRET.network_key
    assert _ca(SECRET)[1].public_bytes(Encoding.DER) == _ca(again)[1].public_bytes(Encoding.DER)


def test_nothing_secret_is_shown() -> None:
    identity = new_identity()
    credentials = make_credentials(SECRET, identity)
    shown = repr(SECRET) + repr(credentials) + repr(identity) + str(credentials)
    assert SECRET.value.decode() not in shown
    assert SECRET.network_key not in shown
    assert "PrivateKey" not in shown


def test_certificate_proves_the_peer_id_of_its_own_key_only() -> None:
    ca_key, _ = _ca(SECRET)
    mine, other = new_identity(), new_identity()
    honest = _leaf(ca_key, mine.key.public_key(), mine.peer_id, NOW)
    assert peer_id_in(honest.public_bytes(Encoding.DER)) == mine.peer_id
    # a member can sign what it likes, but not own another's key
    forged = _leaf(ca_key, mine.key.public_key(), other.peer_id, NOW)
    assert peer_id_in(forged.public_bytes(Encoding.DER)) is None
    assert peer_id_in(b"\x30\x03\x02\x01\x01") is None
    assert peer_id_in(None) is None


def test_certificate_is_signed_by_the_fleet_and_usable_on_both_ends() -> None:
    ca_key, ca = _ca(SECRET)
    identity = new_identity()
    leaf = _leaf(ca_key, identity.key.public_key(), identity.peer_id, NOW)
    leaf.verify_directly_issued_by(ca)
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert {oid.dotted_string for oid in usage} == {"1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"}
    credentials = make_credentials(SECRET, identity)
    for context in (credentials.server_context, credentials.client_context):
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3


@pytest.mark.parametrize("size", [0, 15, 4097])
def test_secret_of_wrong_length_is_refused(size: int) -> None:
    with pytest.raises(SettingsError, match="bytes"):
        FleetSecret(b"x" * size)


def test_secret_file_is_trimmed_and_must_be_private(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"  " + SECRET.value + b"\n\n")
    path.chmod(0o600)
    assert read_fleet_secret(path) == SECRET
    path.chmod(0o440)
    assert read_fleet_secret(path) == SECRET
    for mode in (0o604, 0o644, 0o620, 0o602):
        path.chmod(mode)
        with pytest.raises(SettingsError, match="chmod 600"):
            read_fleet_secret(path)
    with pytest.raises(SettingsError, match="cannot read"):
        read_fleet_secret(tmp_path / "none")


def test_identity_is_kept_and_private(tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    first = load_identity(folder)
    assert load_identity(folder).peer_id == first.peer_id
    key = folder / "node.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    key.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        load_identity(folder)
    key.chmod(0o600)
    key.write_bytes(b"short")
    with pytest.raises(SettingsError, match="not a node key"):
        load_identity(folder)
