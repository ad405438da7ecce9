"""Certificates and keys for a deployment: one authority, the SuperLink's, and a key for each node.

    ca.crt                       what nodes and ``flwr`` trust
    superlink.pem, superlink.key    the SuperLink's certificate, which the authority signed, and key
    nodes/node-0, nodes/node-0.pub ...   a SuperNode's key, and the half that is registered

Elliptic keys on P-384, SuperNodes' in OpenSSH's format, as Flower wants them. The authority's own
key is thrown away: to add a host, make everything anew; nodes can be added at any time.
"""

import datetime
import ipaddress
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from d2ft_fl.errors import ConfigError

DAYS = 825
PRIVATE, PUBLIC = 0o600, 0o644
_LABEL = "[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")


def make(folder: Path, hosts: Sequence[str], nodes: int) -> list[Path]:
    """Make an authority, a SuperLink's certificate for these hosts, and so many SuperNodes' keys.

    Args:
        folder: Where to write; it is made, and must be empty.
        nodes: How many SuperNodes' keys to make.
        hosts: Names and addresses under which the SuperLink is reached; localhost is always one.

    Returns:
        What was written.

    Raises:
        ConfigError: When there is something in the folder already.
    """
    if nodes < 0:
        raise ConfigError(f"--nodes {nodes} must be 0 or more")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{str(folder)!r} is not empty; name a new folder")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority, key = _key(), _key()
    ca = _authority(authority)
    names = dict.fromkeys(["localhost", "127.0.0.1", *hosts])
    certificate = _server(key, authority, ca, names)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return [
        _write(folder / "ca.crt", ca.public_bytes(Encoding.PEM), PUBLIC),
        _write(folder / "superlink.pem", certificate.public_bytes(Encoding.PEM), PUBLIC),
        _write(folder / "superlink.key", secret, PRIVATE),
        *(path for number in range(nodes) for path in make_node(folder, f"node-{number}")),
    ]


def make_node(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a SuperNode's key; return its file, and that of the half to register.

    Raises:
        ConfigError: When there is a key of that name.
    """
    keys = folder / "nodes"
    keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    if keys.joinpath(name).exists():
        raise ConfigError(f"{str(keys / name)!r} is there already; name another node")
    key = _key()
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return (
        _write(keys / name, secret, PRIVATE),
        _write(keys / f"{name}.pub", public + b"\n", PUBLIC),
    )


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _builder(subject: str, issuer: str, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=10))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=DAYS))
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    signs = dict.fromkeys(("digital_signature", "key_cert_sign", "crl_sign"), True)
    public = key.public_key()
    return (
        _builder("d2ft-fl authority", "d2ft-fl authority", public)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage, **signs), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA384())
    )


def _server(
    key: ec.EllipticCurvePrivateKey,
    authority: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    hosts: Iterable[str],
) -> x509.Certificate:
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    return (
        _builder("d2ft-fl SuperLink", "d2ft-fl authority", key.public_key())
        .add_extension(x509.SubjectAlternativeName([_host(h) for h in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(signer, critical=False)
        .sign(authority, hashes.SHA384())
    )


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    try:
        name = text.encode("idna").decode()
    except UnicodeError:
        name = ""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"host {text!r} is no name or address of a machine: write it without a scheme or port, "
            "like superlink.example or 10.0.0.5"
        )
    return x509.DNSName(name)


def _write(path: Path, content: bytes, mode: int) -> Path:
    """Write a file that has its mode from the start, so that nobody else can ever read it."""
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content)
    return path
