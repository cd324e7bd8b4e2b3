"""The federation's certificates: one authority, short-lived certificates for the coordinator and for every site.

PEM bytes in, PEM bytes out; the time is passed in. All keys are EC P-256, drawn by the library ``cryptography`` from
the operating system; it takes no other source. A certificate carries what its issuer decides and nothing that the
request asks for: extensions of a request are ignored, of its subject only the common name is taken.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from quorsum.errors import KeyMaterialError, Refusal, UsageError

__all__ = [
    "BACKDATED",
    "certificate_key",
    "check_issued",
    "common_name",
    "expires",
    "fingerprint",
    "issue",
    "make_authority",
    "make_key",
    "make_request",
    "public_key",
    "public_key_digest",
    "read_request",
    "sign",
    "starts",
    "verify",
]

AUTHORITY_LIFETIME: Final = timedelta(days=3652)
"""How long an authority lasts: ten years."""

BACKDATED: Final = timedelta(minutes=5)
"""By how much a certificate begins before it is issued, so that a clock that is slow by less still accepts it."""

LONGEST_NAME: Final = 64
"""Characters of a common name at most (RFC 5280, upper bounds)."""

# What the library raises for bytes from outside: they do not parse, are encrypted, or name what it does not know.
_UNREADABLE: Final = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)


def make_key() -> bytes:
    """A new EC P-256 private key, PKCS #8 PEM."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_authority(name: str, now: datetime) -> tuple[bytes, bytes]:
    """A new authority: its private key and its self-signed certificate, both PEM.

    The certificate lasts ten years and may issue certificates for keys only, not for further authorities.

    Args:
        name: its common name, 1 to 64 characters.
        now: with time zone.

    Raises:
        UsageError: the name is empty or too long, or ``now`` has no time zone.
    """
    key_pem = make_key()
    key = _private(key_pem)
    subject = _subject(name)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _builder(subject, subject, key.public_key(), now, AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    return key_pem, certificate.public_bytes(serialization.Encoding.PEM)


def make_request(key: bytes, name: str) -> bytes:
    """A request for a certificate, PEM, signed with the key that it is for.

    Raises:
        KeyMaterialError: the key is not an EC P-256 private key.
        UsageError: the name is empty or too long.
    """
    request = x509.CertificateSigningRequestBuilder().subject_name(_subject(name)).sign(_private(key), hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def read_request(request: bytes) -> tuple[str, bytes]:
    """Check a request from outside.

    Args:
        request: PEM.

    Returns:
        the common name it asks for, and its public key, PEM.

    Raises:
        Refusal: ``request-unreadable``, ``request-curve`` (not EC P-256), ``request-unsigned`` (whoever made it does
            not hold the key), ``request-name`` (not exactly one common name).
    """
    key, name = _request(request)
    return name, _public_pem(key)


def issue(
    ca_key: bytes,
    ca_cert: bytes,
    request: bytes,
    now: datetime,
    lifetime: timedelta,
    *,
    hosts: Sequence[str] = (),
    server: bool,
) -> bytes:
    """Issue a certificate, PEM, for the key of a request, under the common name of the request.

    Args:
        ca_key: private key of the authority, PEM.
        ca_cert: its certificate, PEM.
        request: PEM.
        now: with time zone; the certificate begins :data:`BACKDATED` before.
        lifetime: counted from ``now``.
        hosts: names and IP addresses of a server.
        server: whether it is for a server (extended key usage serverAuth) or for a client (clientAuth).

    Raises:
        Refusal: as :func:`read_request`.
        KeyMaterialError: ``unreadable``, or ``mismatched-keys``: the authority's key is not that of its certificate.
        UsageError: the lifetime is not positive, or ``hosts`` do not fit ``server``.
    """
    if lifetime <= timedelta(0):
        raise UsageError(f"the lifetime of a certificate must be positive, got {lifetime}")
    if server != bool(hosts):
        raise UsageError("a server's certificate names its hosts, a client's names none")
    public, name = _request(request)
    authority, key = _certificate(ca_cert), _private(ca_key)
    if authority.public_key() != key.public_key():
        raise KeyMaterialError(
            "mismatched-keys", "the authority's key does not belong to its certificate; restore both"
        )
    usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        _builder(_subject(name), authority.subject, public, now, lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def check_issued(ca_cert: bytes, cert: bytes, key: bytes, name: str) -> None:
    """Check that a certificate is what was asked for.

    Args:
        ca_cert: certificate of the authority that must have issued it, PEM.
        cert: the certificate, PEM.
        key: private key that it must be for, PEM.
        name: its common name.

    Raises:
        Refusal: ``wrong-certificate``: another authority, another key, or another name.
        KeyMaterialError: ``unreadable``.
    """
    loaded = _certificate(cert)
    try:
        loaded.verify_directly_issued_by(_certificate(ca_cert))
    except (InvalidSignature, ValueError, TypeError):
        raise Refusal("wrong-certificate", "the certificate was not issued by this federation's authority") from None
    if loaded.public_key() != _private(key).public_key():
        raise Refusal("wrong-certificate", "the certificate is for another key than the one it was asked for")
    if common_name(cert) != name:
        raise Refusal("wrong-certificate", f"the certificate is for {common_name(cert)!r} instead of {name!r}")


def fingerprint(cert: bytes) -> str:
    """SHA-256 of the certificate's DER, 64 hexadecimal digits.

    Raises:
        KeyMaterialError: ``unreadable``.
    """
    return hashlib.sha256(_certificate(cert).public_bytes(serialization.Encoding.DER)).hexdigest()


def starts(cert: bytes) -> datetime:
    """From when the certificate is valid, UTC.

    Raises:
        KeyMaterialError: ``unreadable``.
    """
    return _certificate(cert).not_valid_before_utc


def expires(cert: bytes) -> datetime:
    """Until when the certificate is valid, UTC.

    Raises:
        KeyMaterialError: ``unreadable``.
    """
    return _certificate(cert).not_valid_after_utc


def common_name(cert: bytes) -> str:
    """The one common name of the certificate's subject.

    Raises:
        KeyMaterialError: ``unreadable``, also when there is not exactly one.
    """
    name = _one_name(_certificate(cert).subject)
    if name is None:
        raise KeyMaterialError("unreadable", "the certificate does not have exactly one common name")
    return name


def public_key(key: bytes) -> bytes:
    """The public half of a private key, PEM (SubjectPublicKeyInfo).

    Raises:
        KeyMaterialError: the key is not an EC P-256 private key.
    """
    return _public_pem(_private(key).public_key())


def certificate_key(cert: bytes) -> bytes:
    """The public key of a certificate, PEM (SubjectPublicKeyInfo).

    Raises:
        KeyMaterialError: ``unreadable``, also when it is not EC P-256.
    """
    key = _certificate(cert).public_key()
    if not _is_p256(key):
        raise KeyMaterialError("unreadable", "the key of the certificate is not EC P-256")
    return _public_pem(key)


def public_key_digest(public: bytes) -> str:
    """SHA-256 of a public key's DER, 64 hexadecimal digits: the same however the PEM around it is written.

    Args:
        public: EC P-256 public key, PEM.

    Raises:
        KeyMaterialError: ``unreadable``.
    """
    der = _public(public).public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def sign(key: bytes, digest: bytes) -> bytes:
    """Sign 32 bytes with an EC P-256 private key (ECDSA with SHA-256, DER).

    Args:
        key: PEM.
        digest: a domain-separated hash; never bytes that somebody else chose.

    Raises:
        KeyMaterialError: the key is not an EC P-256 private key.
        UsageError: these are not 32 bytes.
    """
    if len(digest) != hashlib.sha256().digest_size:
        raise UsageError(f"only a digest of 32 bytes is signed, got {len(digest)} bytes")
    return _private(key).sign(digest, ec.ECDSA(hashes.SHA256()))


def verify(public: bytes, signature: bytes, digest: bytes) -> bool:
    """Whether the holder of a public key (PEM) signed this digest.

    Raises:
        KeyMaterialError: ``unreadable``: the public key is not an EC P-256 public key.
    """
    key = _public(public)
    try:
        key.verify(signature, digest, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    if now.tzinfo is None:
        raise UsageError("the time of a certificate needs a time zone; pass datetime.now(UTC)")
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now.astimezone(UTC) - BACKDATED)
        .not_valid_after(now.astimezone(UTC) + lifetime)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(name: str) -> x509.Name:
    if not 0 < len(name) <= LONGEST_NAME:
        raise UsageError(f"a common name has 1 to {LONGEST_NAME} characters, got {len(name)}")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("idna").decode("ascii"))
    except (UnicodeError, ValueError):
        raise UsageError(f"{host!r} is neither an IP address nor a host name") from None


def _one_name(subject: x509.Name) -> str | None:
    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1 or not isinstance(names[0].value, str):
        return None
    return names[0].value


def _is_p256(key: object) -> bool:
    return isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey) and isinstance(
        key.curve, ec.SECP256R1
    )


def _request(pem: bytes) -> tuple[ec.EllipticCurvePublicKey, str]:
    try:
        loaded = x509.load_pem_x509_csr(pem)
        key, name = loaded.public_key(), _one_name(loaded.subject)
    except _UNREADABLE:
        raise Refusal("request-unreadable", "the request for a certificate cannot be read; make it anew") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not _is_p256(key):
        raise Refusal("request-curve", "the key of the request is not EC P-256; make a new key")
    try:
        signed = loaded.is_signature_valid
    except _UNREADABLE:
        signed = False
    if not signed:
        raise Refusal("request-unsigned", "the request is not signed with its own key; make it with that key")
    if name is None or not 0 < len(name) <= LONGEST_NAME:
        raise Refusal("request-name", "the request must have exactly one common name, the name of the site")
    return key, name


def _certificate(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except _UNREADABLE:
        raise KeyMaterialError("unreadable", "this is not a certificate in PEM form; restore it") from None


def _private(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except _UNREADABLE:
        raise KeyMaterialError("unreadable", "this is not an unencrypted private key in PEM form; restore it") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not _is_p256(key):
        raise KeyMaterialError("unreadable", "the private key is not EC P-256; restore it or make a new one")
    return key


def _public(pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_pem_public_key(pem)
    except _UNREADABLE:
        raise KeyMaterialError("unreadable", "this is not a public key in PEM form; make it anew") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not _is_p256(key):
        raise KeyMaterialError("unreadable", "the public key is not EC P-256; make a new key")
    return key


def _public_pem(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise KeyMaterialError("unreadable", "the public key is not EC P-256; make a new key")
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
