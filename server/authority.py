"""The coordinator's authority on its disk, and the certificate with which its ports show themselves."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from quorsum.config import replace_file
from quorsum.crypto import certificates
from quorsum.errors import KeyMaterialError, UsageError
from quorsum.homes import COORDINATOR_HOME

__all__ = ["SERVER_LIFETIME", "Authority", "ServerCertificate", "create_authority", "load_authority"]

SERVER_LIFETIME: Final = timedelta(days=30)
"""How long the certificate of the coordinator's ports lasts; it is issued anew when a third of that is left."""

_NAME: Final = "coordinator"


@dataclass(frozen=True)
class Authority:
    """Who vouches for every certificate of the federation. The key does not show in ``repr``.

    Attributes:
        key: private key, PEM.
        certificate: PEM.
    """

    key: bytes = field(repr=False)
    certificate: bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, 64 hexadecimal digits."""
        return certificates.fingerprint(self.certificate)


def create_authority(home: Path, federation: str, now: datetime) -> Authority:
    """Make the authority of a new federation: ``ca.key`` and ``ca.crt`` in the coordinator's home, mode 0600.

    Raises:
        UsageError: there is one already, or the files cannot be written.
    """
    key, certificate = certificates.make_authority(f"{federation} authority", now)
    for name in ("ca.key", "ca.crt"):
        if (home / name).exists():
            raise UsageError(f"{home / name} is there already; a new authority would lock every site out")
    # The key first: a certificate without its key would look like an authority and be none.
    replace_file(home / "ca.key", key)
    replace_file(home / "ca.crt", certificate)
    return Authority(key, certificate)


def load_authority(home: Path) -> Authority:
    """Read the authority.

    Raises:
        KeyMaterialError: ``no-key`` (a file is missing), ``key-readable`` (others may read the key), ``unreadable``,
            ``mismatched-keys``.
    """
    authority = Authority(_read(home / "ca.key", secret=True), _read(home / "ca.crt", secret=False))
    if certificates.public_key(authority.key) != certificates.certificate_key(authority.certificate):
        raise KeyMaterialError("mismatched-keys", f"ca.key and ca.crt in {home} do not fit each other; restore both")
    return authority


def _read(path: Path, *, secret: bool) -> bytes:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        data = path.read_bytes()
    except OSError as error:
        anew = COORDINATOR_HOME.command(Path("NEW-HOME"), "coordinator", "init")
        raise KeyMaterialError(
            "no-key",
            f"cannot read {path}: {error.strerror}; restore it from a backup, or begin anew and invite anew: {anew}",
        ) from None
    if secret and os.name == "posix" and mode & 0o077:
        raise KeyMaterialError("key-readable", f"{path} can be read by others (mode {mode:04o}); run: chmod 600 {path}")
    return data


class ServerCertificate:
    """The key and certificate of the coordinator's ports: new at every start, and again before it runs out.

    Args:
        authority: that issues it.
        hosts: names and IP addresses under which sites reach the coordinator.
        clock: the time, with time zone.
        home: where ``server.key`` and ``server.crt`` are kept for whoever reads them from files; the key stays the
            same over restarts. None keeps both in memory only.
    """

    def __init__(
        self, authority: Authority, hosts: Sequence[str], clock: Callable[[], datetime], home: Path | None = None
    ) -> None:
        self._authority, self._hosts, self._clock, self._home = authority, tuple(hosts), clock, home
        self._lock = threading.Lock()
        self._key = self._kept_key()
        self._chain = self._issue()

    def current(self) -> tuple[bytes, bytes]:
        """The private key and the chain (certificate, then authority), PEM; issued anew when a third is left."""
        with self._lock:
            if certificates.expires(self._chain) - self._clock() < SERVER_LIFETIME / 3:
                self._chain = self._issue()
            return self._key, self._chain

    def _kept_key(self) -> bytes:
        path = self._home / "server.key" if self._home is not None else None
        if path is not None and path.exists():
            return _read(path, secret=True)
        key = certificates.make_key()
        if path is not None:
            replace_file(path, key)
        return key

    def _issue(self) -> bytes:
        request = certificates.make_request(self._key, _NAME)
        leaf = certificates.issue(
            self._authority.key,
            self._authority.certificate,
            request,
            self._clock(),
            SERVER_LIFETIME,
            hosts=self._hosts,
            server=True,
        )
        chain = leaf + self._authority.certificate
        if self._home is not None:
            replace_file(self._home / "server.crt", chain)
        return chain
