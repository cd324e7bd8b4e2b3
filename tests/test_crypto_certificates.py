"""Certificates: what is issued, what is refused, and that OpenSSL agrees with it."""

from __future__ import annotations

import ssl
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from quorsum.crypto import certificates
from quorsum.errors import KeyMaterialError, Refusal, UsageError

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
HOUR = timedelta(hours=1)
CA_KEY, CA = certificates.make_authority("lab authority", NOW)
KEY = certificates.make_key()


def issued(request: bytes, server: bool = False, hosts: tuple[str, ...] = ()) -> bytes:
    return certificates.issue(CA_KEY, CA, request, NOW, HOUR, hosts=hosts, server=server)


def foreign_request(key: CertificateIssuerPrivateKeyTypes, *names: str, extra: bool = False) -> bytes:
    """A request that this package would not make."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if extra:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("evil.example")]), critical=False)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)


def test_authority_may_issue_for_keys_only() -> None:
    loaded = x509.load_pem_x509_certificate(CA)
    constraints = loaded.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    usage = loaded.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.digital_signature) == (True, False)
    assert timedelta(days=3650) < certificates.expires(CA) - NOW < timedelta(days=3655)
    assert certificates.common_name(CA) == "lab authority"


def test_client_certificate() -> None:
    certificate = issued(certificates.make_request(KEY, "hospital-a"))
    certificates.check_issued(CA, certificate, KEY, "hospital-a")
    assert certificates.expires(certificate) == NOW + HOUR
    assert certificates.starts(certificate) == NOW - timedelta(minutes=5)
    assert certificates.certificate_key(certificate) == certificates.public_key(KEY)
    loaded = x509.load_pem_x509_certificate(certificate)
    usages = loaded.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert loaded.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert len(certificates.fingerprint(certificate)) == 64
    assert certificates.fingerprint(certificate) != certificates.fingerprint(CA)


def test_server_certificate_names_its_hosts() -> None:
    hosts = ("localhost", "127.0.0.1", "::1", "bücher.example")
    certificate = issued(certificates.make_request(KEY, "coordinator"), server=True, hosts=hosts)
    names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == ["localhost", "xn--bcher-kva.example"]
    assert [str(ip) for ip in names.value.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]


def test_openssl_accepts_both_ends_even_when_it_is_strict(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    ca_key, ca = certificates.make_authority("lab authority", now)
    contexts = []
    for name, hosts in (("site", ()), ("coordinator", ("localhost",))):
        request = certificates.make_request(KEY, name)
        made = certificates.issue(ca_key, ca, request, now, HOUR, hosts=hosts, server=bool(hosts))
        (tmp_path / name).write_bytes(KEY + made)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if hosts else ssl.PROTOCOL_TLS_CLIENT)
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_verify_locations(cadata=ca.decode())
        context.load_cert_chain(tmp_path / name)
        contexts.append(context)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = contexts[0].wrap_bio(to_client, to_server, server_hostname="localhost")
    server = contexts[1].wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for end in (client, server):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    assert client.getpeercert()
    assert server.getpeercert()


def test_nothing_that_a_request_asks_for_is_granted() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = x509.load_pem_x509_certificate(issued(foreign_request(key, "a", extra=True)))
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["P-384", "Ed25519", "RSA"],
)
def test_other_kinds_of_keys_are_refused(key: CertificateIssuerPrivateKeyTypes) -> None:
    with pytest.raises(Refusal) as refusal:
        certificates.read_request(foreign_request(key, "a"))
    assert refusal.value.code == "request-curve"


@pytest.mark.parametrize("names", [(), ("a", "b")])
def test_request_without_exactly_one_name(names: tuple[str, ...]) -> None:
    with pytest.raises(Refusal) as refusal:
        issued(foreign_request(ec.generate_private_key(ec.SECP256R1()), *names))
    assert refusal.value.code == "request-name"


def test_request_that_is_not_signed_with_its_key() -> None:
    request = x509.load_pem_x509_csr(certificates.make_request(KEY, "a"))
    der = request.public_bytes(serialization.Encoding.DER)
    other = x509.load_pem_x509_csr(certificates.make_request(certificates.make_key(), "a"))
    spki = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    swapped = der.replace(request.public_key().public_bytes(*spki), other.public_key().public_bytes(*spki))
    assert swapped != der
    pem = x509.load_der_x509_csr(swapped).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(Refusal) as refusal:
        issued(pem)
    assert refusal.value.code == "request-unsigned"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (bytes.fromhex("06082a8648ce3d030107"), bytes.fromhex("06082a8648ce3d03017f")),  # an unknown curve
        (bytes.fromhex("06072a8648ce3d0201"), bytes.fromhex("06072a8648ce3d027f")),  # an unknown kind of key
        (bytes.fromhex("06082a8648ce3d040302"), bytes.fromhex("06082a8648ce3d04037f")),  # an unknown signature
        (bytes.fromhex("020100"), bytes.fromhex("020105")),  # an unknown version
    ],
    ids=["curve", "key", "signature", "version"],
)
def test_request_that_names_what_nobody_knows(old: bytes, new: bytes) -> None:
    pem = certificates.make_request(KEY, "a").decode().replace("CERTIFICATE REQUEST", "CERTIFICATE")
    der = ssl.PEM_cert_to_DER_cert(pem)
    assert old in der
    changed = ssl.DER_cert_to_PEM_cert(der.replace(old, new, 1)).replace("CERTIFICATE", "CERTIFICATE REQUEST")
    with pytest.raises(Refusal) as refusal:
        certificates.read_request(changed.encode())
    assert refusal.value.code in ("request-unreadable", "request-unsigned")


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_politely(data: bytes) -> None:
    with pytest.raises(Refusal):
        certificates.read_request(data)
    for read in (certificates.fingerprint, certificates.expires, certificates.common_name, certificates.public_key):
        with pytest.raises(KeyMaterialError):
            read(data)
    with pytest.raises(KeyMaterialError):
        certificates.public_key_digest(data)


def test_wrong_use_by_the_caller() -> None:
    request = certificates.make_request(KEY, "a")
    with pytest.raises(UsageError, match="time zone"):
        certificates.make_authority("a", NOW.replace(tzinfo=None))
    with pytest.raises(UsageError, match="positive"):
        certificates.issue(CA_KEY, CA, request, NOW, timedelta(0), server=False)
    for server, hosts in ((True, ()), (False, ("a",))):
        with pytest.raises(UsageError, match="hosts"):
            issued(request, server=server, hosts=hosts)
    with pytest.raises(UsageError, match="host name"):
        issued(request, server=True, hosts=("a..b",))
    for name in ("", "a" * 65):
        with pytest.raises(UsageError, match="64"):
            certificates.make_request(KEY, name)
    with pytest.raises(KeyMaterialError) as mismatch:
        certificates.issue(KEY, CA, request, NOW, HOUR, server=False)
    assert mismatch.value.code == "mismatched-keys"


@pytest.mark.parametrize("defect", ["authority", "key", "name", "self-signed"])
def test_what_was_not_asked_for(defect: str) -> None:
    certificate = issued(certificates.make_request(KEY, "a"))
    ca = certificates.make_authority("lab authority", NOW)[1] if defect == "authority" else CA
    key = certificates.make_key() if defect == "key" else KEY
    if defect == "self-signed":
        certificate = certificates.make_authority("a", NOW)[1]
    with pytest.raises(Refusal) as refusal:
        certificates.check_issued(ca, certificate, key, "b" if defect == "name" else "a")
    assert refusal.value.code == "wrong-certificate"


def test_key_digest_is_the_same_however_the_pem_is_written() -> None:
    pem = certificates.public_key(KEY)
    assert certificates.public_key_digest(pem) == certificates.public_key_digest(pem.replace(b"\n", b"\r\n"))


def test_signatures() -> None:
    public, digest = certificates.public_key(KEY), bytes(range(32))
    signature = certificates.sign(KEY, digest)
    assert certificates.verify(public, signature, digest)
    assert not certificates.verify(public, signature, bytes(32))
    assert not certificates.verify(public, b"\x30\x00", digest)
    assert not certificates.verify(certificates.public_key(certificates.make_key()), signature, digest)
    with pytest.raises(UsageError, match="32 bytes"):
        certificates.sign(KEY, b"anything")
    with pytest.raises(KeyMaterialError):
        certificates.verify(b"nonsense", signature, digest)


def test_keys_of_other_kinds_are_not_read() -> None:
    other = ec.generate_private_key(ec.SECP384R1())
    private = other.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = other.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    with pytest.raises(KeyMaterialError, match="P-256"):
        certificates.public_key(private)
    with pytest.raises(KeyMaterialError, match="P-256"):
        certificates.public_key_digest(public)
