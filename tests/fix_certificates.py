"""Certificates made for the tests: authorities of our own, and what they sign."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from proxy import embedded

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files in PEM that a server of any version accepts."""

    cert: Path
    key: Path

    @property
    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.cert.read_bytes())

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)


def make_key(kind: str = "ec") -> Key:
    match kind:
        case "ec":
            return ec.generate_private_key(ec.SECP256R1())
        case "rsa":
            return rsa.generate_private_key(65537, 2048)
        case "ed25519":
            return ed25519.Ed25519PrivateKey.generate()
    raise ValueError(kind)


class Authority:
    """A certificate authority in a folder of its own."""

    def __init__(self, folder: Path, name: str, *, kind: str = "ec") -> None:
        self.folder = folder
        self.key = make_key(kind)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        self.certificate = (
            x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(self.key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now - DAY).not_valid_after(now + 30 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(
                digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
                key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
                decipher_only=False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .sign(self.key, None if kind == "ed25519" else hashes.SHA256())
        )
        self.file = folder / "ca.pem"
        self.file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        self.file.chmod(0o644)

    def issue(
        self, name: str, *, hosts: tuple[str, ...] = ("localhost", "127.0.0.1"), kind: str = "ec", expired: bool = False,
        digest: hashes.HashAlgorithm | None = None, pss: bool = False, client: bool = False, key_password: str | None = None,
        owner: str | None = None,
    ) -> Pair:
        """A certificate for `hosts`, or for a client whose user is `name`. `owner`: the system user the key is for."""
        key = make_key(kind)
        now = datetime.datetime.now(datetime.UTC)
        end = now - DAY if expired else now + 30 * DAY
        use = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self.certificate.subject).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now - 2 * DAY).not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if not client:
            builder = builder.add_extension(x509.SubjectAlternativeName([_san(host) for host in hosts]), critical=False)
        algorithm = None if isinstance(self.key, ed25519.Ed25519PrivateKey) else digest or hashes.SHA256()
        if pss:
            assert isinstance(self.key, rsa.RSAPrivateKey)
            assert algorithm is not None
            certificate = builder.sign(
                self.key, algorithm, rsa_padding=padding.PSS(padding.MGF1(algorithm), padding.PSS.DIGEST_LENGTH))
        else:
            certificate = builder.sign(self.key, algorithm)
        stem = f"{name.replace(' ', '_')}-{certificate.serial_number:x}"[:60]
        pair = Pair(self.folder / f"{stem}.pem", self.folder / f"{stem}.key")
        pair.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pair.cert.chmod(0o644)
        encryption = (serialization.BestAvailableEncryption(key_password.encode()) if key_password
                      else serialization.NoEncryption())
        pair.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
        pair.key.chmod(0o600)
        if owner is not None:
            entry = pwd.getpwnam(owner)
            os.chown(pair.key, entry.pw_uid, entry.pw_gid)
        return pair

    def crl(self, *revoked: Pair) -> Path:
        """A list of certificates that are not good any more."""
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.certificate.subject)
        builder = builder.last_update(now - DAY).next_update(now + DAY)
        for pair in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder().serial_number(pair.certificate.serial_number)
                .revocation_date(now - DAY).build())
        path = self.folder / f"crl-{len(revoked)}.pem"
        path.write_bytes(builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return path


def _san(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def postgres_owner() -> str | None:
    """The system user that test servers run as; None: the one that the tests run as."""
    entry = embedded.server_owner()
    return entry.pw_name if entry is not None else None


@contextlib.contextmanager
def new_authority(name: str, *, kind: str = "ec") -> Iterator[Authority]:
    """An authority whose folder the servers' system user can get into, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="dfproxy-ca-"))
    folder.chmod(0o755)
    try:
        yield Authority(folder, name, kind=kind)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def authority() -> Iterator[Authority]:
    """The authority that everybody in the tests trusts."""
    with new_authority("dfproxy tests") as made:
        yield made


@pytest.fixture(scope="session")
def stranger() -> Iterator[Authority]:
    """An authority that nobody trusts."""
    with new_authority("somebody else") as made:
        yield made
