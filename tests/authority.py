"""Certificates for tests: authorities, leaves of any name and age, and directories that are rotated as kubelet does."""

from __future__ import annotations

import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.runtime.tls import MutualTls

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Leaf:
    """A certificate and its key, as PEM."""

    cert: bytes
    key: bytes

    @property
    def serial(self) -> int:
        return x509.load_pem_x509_certificate(self.cert).serial_number


class Authority:
    """One certificate authority."""

    def __init__(self, name: str = "tests") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        self._cert = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self._cert.public_bytes(serialization.Encoding.PEM)

    def issue(self, *names: str, expired: bool = False) -> Leaf:
        """A leaf for server and client with these names and addresses; ``expired`` an hour ago."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        until = now - datetime.timedelta(hours=1) if expired else now + DAY
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        cert = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(until)
            .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Leaf(cert.public_bytes(serialization.Encoding.PEM), secret)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


class SecretDirectory:
    """tls.crt, tls.key and ca.crt as a mounted Secret has them: links through ``..data``, which is swapped at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._generation = 0
        path.mkdir(parents=True, exist_ok=True)
        for name in ("tls.crt", "tls.key", "ca.crt"):
            (path / name).symlink_to(f"..data/{name}")

    def put(self, leaf: Leaf, ca: bytes) -> None:
        self._generation += 1
        data = self.path / f"..{self._generation}"
        data.mkdir()
        (data / "tls.crt").write_bytes(leaf.cert)
        (data / "tls.key").write_bytes(leaf.key)
        (data / "ca.crt").write_bytes(ca)
        fresh = self.path / "..data_tmp"
        fresh.symlink_to(data.name)
        os.replace(fresh, self.path / "..data")

    @property
    def tls(self) -> MutualTls:
        return MutualTls(self.path / "ca.crt", self.path / "tls.crt", self.path / "tls.key")


def mutual_tls(directory: Path, authority: Authority, *dns_names: str, expired: bool = False) -> MutualTls:
    """A service's identity in a directory of its own."""
    secret = SecretDirectory(directory)
    secret.put(authority.issue(*dns_names, expired=expired), authority.pem)
    return secret.tls
