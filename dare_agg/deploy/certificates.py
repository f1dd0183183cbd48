"""Certificates and keys of a deployment: a CA, the SuperLink's certificate, SuperNode keys.

Everything a federation of a few sites needs, made once on one machine: the server folder goes
to the SuperLink, one node folder to each site. Keys are EC P-384 (what Flower's node
authentication takes) and Ed25519 (signed updates). Nothing is ever overwritten.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dare_agg.deploy.identities import make_identity, write_private
from dare_agg.errors import ConfigError

CA_DAYS = 3650
SERVER_DAYS = 825
MAX_NODES = 10_000


@dataclass(frozen=True)
class Deployment:
    """The files that were made, by what they are for."""

    ca: Path
    server: Path
    nodes: tuple[Path, ...]
    identities: Path


def make_deployment(folder: Path, hosts: Sequence[str], nodes: Sequence[str]) -> Deployment:
    """Make ``folder``/ca, server, nodes/<name> and identities.json.

    ``hosts`` are the names and addresses under which clients reach the SuperLink. Raises
    `ConfigError` for a name that cannot be, or a folder that holds keys already.
    """
    _check(hosts, nodes)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} is not empty; keys are never overwritten: name a new folder with --output"
        )
    ca_key = ec.generate_private_key(ec.SECP384R1())
    ca = _authority(ca_key)
    write_private(folder / "ca" / "ca.key", _pem(ca_key))
    _write(folder / "ca" / "ca.crt", _pem_certificate(ca))

    server_key = ec.generate_private_key(ec.SECP384R1())
    server = _server_certificate(server_key, ca_key, ca, hosts)
    write_private(folder / "server" / "server.key", _pem(server_key))
    _write(folder / "server" / "server.pem", _pem_certificate(server))
    _write(folder / "server" / "ca.crt", _pem_certificate(ca))

    known: dict[str, str] = {}
    for name in nodes:
        own = folder / "nodes" / name
        key = ec.generate_private_key(ec.SECP384R1())
        write_private(own / "node.key", _openssh(key))
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        _write(own / "node.pub", public + f" {name}\n".encode())
        _write(own / "ca.crt", _pem_certificate(ca))
        known[name] = make_identity(own / "identity.pem")
        own.chmod(0o700)
    _write(folder / "server" / "identities.json", (json.dumps(known, indent=1) + "\n").encode())
    for private in ("ca", "server"):
        (folder / private).chmod(0o700)
    return Deployment(
        folder / "ca" / "ca.crt",
        folder / "server",
        tuple(folder / "nodes" / name for name in nodes),
        folder / "server" / "identities.json",
    )


def _check(hosts: Sequence[str], nodes: Sequence[str]) -> None:
    if not hosts:
        raise ConfigError("no host; name how clients reach the SuperLink, e.g. --host fl.example")
    for host in hosts:
        plain = host.replace(".", "").replace("-", "").replace(":", "").replace("*", "")
        if not plain.isalnum() or not host.isascii() or len(host) > 253:
            raise ConfigError(f"host {host!r:.80} is no host name and no address")
    if not 1 <= len(nodes) <= MAX_NODES:
        raise ConfigError(f"{len(nodes)} nodes; 1 to {MAX_NODES} are possible")
    if len(set(nodes)) != len(nodes):
        raise ConfigError("two nodes have one name; every node needs its own")
    for name in nodes:
        if not name.replace("-", "").replace("_", "").isalnum() or len(name) > 64:
            raise ConfigError(f"node name {name!r:.80}; letters, digits, - and _ are allowed")


def _authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dare-agg deployment CA")])
    return (
        _builder(name, name, key, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def _server_certificate(
    key: ec.EllipticCurvePrivateKey,
    ca_key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    hosts: Sequence[str],
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    return (
        _builder(name, ca.subject, key, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
            critical=False,
        )
        .sign(ca_key, hashes.SHA384())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks of the sites differ a little.
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, data: bytes) -> None:
    write_private(path, data, mode=0o644)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def _pem_certificate(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
