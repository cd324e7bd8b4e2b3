"""A coordinator's enrollment service on 127.0.0.1 for tests, and a site that can be made to lie."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from pydantic import BaseModel

from quorsum import enrollment as talk
from quorsum.client.enrollment import Waiting, enroll
from quorsum.client.home import SiteHome
from quorsum.config import CoordinatorConfig, SiteConfig
from quorsum.crypto import Identity, certificates
from quorsum.crypto.labels import tagged
from quorsum.invitation import Invitation, secret_hash
from quorsum.server.authority import Authority, create_authority
from quorsum.server.enrollment import EnrollmentService, Limits
from quorsum.server.store import Store

FAST = Limits(rate=1000, burst=1000, overall_rate=2000, overall_burst=2000, failure_rate=100, failure_burst=1000)


@dataclass
class Hand:
    """A clock that a test can set."""

    ahead: timedelta = timedelta(0)

    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def seconds(self) -> float:
        return self.now().timestamp()


class Coordinator:
    """The service with its store; ports are chosen by the system."""

    def __init__(self, home: Path, limits: Limits = FAST, **config: Any) -> None:
        home.mkdir(mode=0o700, exist_ok=True)
        self.home, self.clock = home, Hand()
        self.authority = create_authority(home, "lab", self.clock.now())
        self.store = Store(home / "state.db")
        ports = {"enrollment_port": 0, "members_port": 0, "fleet_port": 7403}
        self.config = CoordinatorConfig(federation="lab", **{**ports, **config})
        self.service = EnrollmentService(self.store, self.authority, self.config, self.clock.now, limits=limits)
        self.service.start()

    def stop(self) -> None:
        self.service.stop(0)
        self.store.close()

    def invite(self, site: str, hours: float = 72) -> Invitation:
        secret = os.urandom(16)
        now = self.clock.seconds()
        self.store.invite(site, secret_hash(secret), now + hours * 3600, now, "tester")
        address, fingerprint = self.service.enrollment_address, self.authority.fingerprint
        return Invitation(address, fingerprint, site, int(now + hours * 3600), secret)

    def approve(self, site: str) -> None:
        row = self.store.site(site)
        assert row is not None
        self.store.approve(site, row.words, self.clock.seconds(), "tester")

    def enroll(self, site: str, home: Path) -> tuple[SiteHome, SiteConfig]:
        """Invite, enrol and approve a site."""
        invitation, place = self.invite(site), SiteHome(home)
        config = enroll(invitation, place, lambda waiting: self._decide(waiting, site), threading.Event(), poll_s=0.05)
        return place, config

    def _decide(self, waiting: Waiting, site: str) -> None:
        assert waiting.state == "pending", waiting
        self.store.approve(site, waiting.words, self.clock.seconds(), "tester")


@dataclass(frozen=True)
class Answer:
    """What came back: a reply, or a refusal's code."""

    reply: bytes = b""
    status: grpc.StatusCode = grpc.StatusCode.OK
    code: str = ""
    message: str = ""


def speak(
    address: str,
    authority: Authority,
    service: str,
    name: str,
    message: BaseModel | bytes,
    key: bytes | None = None,
    certificate: bytes | None = None,
) -> Answer:
    """One call, with any bytes and any certificate."""
    credentials = grpc.ssl_channel_credentials(authority.certificate, key, certificate)
    data = talk.pack(message) if isinstance(message, BaseModel) else message
    with grpc.secure_channel(address, credentials, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            return Answer(reply=channel.unary_unary(talk.method(service, name))(data, timeout=10))
        except grpc.RpcError as error:
            detail = talk.decode_detail(error.details() or "")
            refusal = detail[0] if detail else None
            code, text = (refusal.code, refusal.message) if refusal else ("", error.details() or "")
            return Answer(status=error.code(), code=code, message=text)


@dataclass(frozen=True)
class Liar:
    """A site whose request can have anything in it."""

    site: str = "a"
    identity: Identity = field(default_factory=lambda: Identity.generate(os.urandom))
    node_key: bytes = field(default_factory=certificates.make_key)
    tls_key: bytes = field(default_factory=certificates.make_key)
    name_in_request: str = ""

    def request(self, fingerprint: str, secret: bytes, **changes: Any) -> talk.EnrollRequest:
        """A request that is signed properly; ``changes`` are made before the signatures."""
        fields = {
            "site": self.site,
            "secret_hex": secret.hex(),
            "identity": self.identity.public().hex,
            "node_key": certificates.public_key(self.node_key).decode(),
            "request": certificates.make_request(self.tls_key, self.name_in_request or self.site).decode(),
            "identity_proof": "0" * 128,
            "node_proof": "0" * 16,
            "tls_proof": "0" * 16,
        }
        unsigned = talk.EnrollRequest.model_validate({**fields, **changes})
        statement = talk.enrollment_statement(fingerprint, unsigned)
        return unsigned.model_copy(
            update={
                "identity_proof": self.identity.sign(talk.REQUEST, *statement).hex(),
                "node_proof": certificates.sign(self.node_key, tagged(talk.NODE_PROOF, *statement)).hex(),
                "tls_proof": certificates.sign(self.tls_key, tagged(talk.TLS_PROOF, *statement)).hex(),
            }
        )

    def present(self, coordinator: Coordinator, secret: bytes, **changes: Any) -> Answer:
        """Send such a request."""
        request = self.request(coordinator.authority.fingerprint, secret, **changes)
        return self.send(coordinator, request)

    def send(self, coordinator: Coordinator, request: talk.EnrollRequest) -> Answer:
        """Send any request."""
        address = coordinator.service.enrollment_address
        return speak(address, coordinator.authority, talk.ENROLLMENT, "Enroll", request)

    def another(self, **changes: Any) -> Liar:
        """The same with other fields."""
        return replace(self, **changes)
