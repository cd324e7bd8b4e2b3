"""A site's folder: its keys, its certificate, its configuration, and the other members as it knows them.

    identity.key   signs and opens what is sealed to the site      node.key   with which it speaks to Flower
    tls.key        of its TLS certificate                          tls.crt    the certificate, renewed all the time
    ca.crt         the federation's authority                      site.toml  configuration
    roster.json    the members, pinned                             suite.key, suite.json  the shared key, for ``ckks``
    ledger.json, upload.bin, kept.bin                              what must not be forgotten within a round
    apps/          apps that may run here, unpacked                allowed.json, status.json

The folder has mode 0700, its files 0600. Keys are made here, never sent, and never overwritten.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from quorsum.client.keys import load_identity
from quorsum.config import SiteConfig, load, replace_file, write
from quorsum.crypto import certificates
from quorsum.crypto.identity import Identity
from quorsum.enrollment import Member, key_epoch
from quorsum.errors import CoordinatorFault, KeyMaterialError, UsageError
from quorsum.homes import SITE_HOME

__all__ = ["SiteHome", "check_roster"]

_MEMBERS: TypeAdapter[list[Member]] = TypeAdapter(list[Member])
_KEYS: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str])


@dataclass(frozen=True)
class SiteHome:
    """A site's folder.

    Attributes:
        path: of the folder.
    """

    path: Path

    def command(self, *words: str) -> str:
        """A command of quorsum as it must be typed to mean this folder."""
        return SITE_HOME.command(self.path, *words)

    @property
    def identity_file(self) -> Path:
        """The site's identity."""
        return self.path / "identity.key"

    @property
    def node_key_file(self) -> Path:
        """Private key with which the site speaks to Flower, PKCS #8 PEM."""
        return self.path / "node.key"

    @property
    def tls_key_file(self) -> Path:
        """Private key of the TLS certificate, PKCS #8 PEM."""
        return self.path / "tls.key"

    @property
    def certificate_file(self) -> Path:
        """The TLS certificate, PEM; replaced in one step when it is renewed."""
        return self.path / "tls.crt"

    @property
    def authority_file(self) -> Path:
        """The authority's certificate, PEM."""
        return self.path / "ca.crt"

    @property
    def config_file(self) -> Path:
        """The configuration."""
        return self.path / "site.toml"

    @property
    def roster_file(self) -> Path:
        """The members, pinned."""
        return self.path / "roster.json"

    @property
    def suite_key_file(self) -> Path:
        """The key that all sites share, for the suite ``ckks``."""
        return self.path / "suite.key"

    @property
    def suite_epochs_file(self) -> Path:
        """In which epoch which shared key was used: a key has one epoch only."""
        return self.path / "suite.json"

    @property
    def apps(self) -> Path:
        """Apps that may run here."""
        return self.path / "apps"

    def create(self) -> None:
        """Make the folder where it is missing.

        Raises:
            KeyMaterialError: ``no-home`` (it cannot be made), ``home-readable`` (others may look into it).
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = stat.S_IMODE(self.path.stat().st_mode)
        except OSError as error:
            raise KeyMaterialError(
                "no-home", f"cannot make {self.path}: {error.strerror}; choose another home"
            ) from None
        if os.name == "posix" and mode & 0o077:
            raise KeyMaterialError(
                "home-readable", f"others may look into {self.path} (mode {mode:04o}); run: chmod 700 {self.path}"
            )

    def identity(self) -> Identity:
        """The site's identity; made the first time.

        Raises:
            KeyMaterialError: it cannot be read or written, others may read it, or it is damaged.
        """
        if not self.identity_file.exists():
            self._create(self.identity_file, Identity.generate(os.urandom).to_bytes())
        return load_identity(self.path)

    def node_key(self) -> bytes:
        """The private node key, PEM; made the first time.

        Raises:
            KeyMaterialError: as :meth:`identity`.
        """
        return self._key(self.node_key_file)

    def tls_key(self) -> bytes:
        """The private TLS key, PEM; made the first time.

        Raises:
            KeyMaterialError: as :meth:`identity`.
        """
        return self._key(self.tls_key_file)

    def authority(self) -> bytes:
        """The authority's certificate, PEM.

        Raises:
            KeyMaterialError: ``not-enrolled``.
        """
        return self._read(self.authority_file, secret=False)

    def certificate(self) -> bytes:
        """The TLS certificate, PEM.

        Raises:
            KeyMaterialError: ``not-enrolled``.
        """
        return self._read(self.certificate_file, secret=False)

    def config(self) -> SiteConfig:
        """The configuration.

        Raises:
            KeyMaterialError: ``not-enrolled``.
            UsageError: the file is wrong.
        """
        self._read(self.config_file, secret=False)
        return load(self.config_file, SiteConfig)

    def write_config(self, config: SiteConfig) -> None:
        """Replace the configuration.

        Raises:
            UsageError: it cannot be written.
        """
        write(self.config_file, config)

    def roster(self) -> tuple[Member, ...]:
        """The members as pinned last; empty before the first time.

        Raises:
            KeyMaterialError: ``roster-damaged``.
        """
        if not self.roster_file.exists():
            return ()
        try:
            return tuple(_MEMBERS.validate_json(self.roster_file.read_bytes()))
        except (OSError, ValidationError):
            raise self._damaged(self.roster_file, "roster-damaged") from None

    def pin(self, members: Sequence[Member], site: str) -> None:
        """Replace the members, if what changed may change.

        Raises:
            CoordinatorFault: ``roster-changed``.
            KeyMaterialError: ``roster-damaged``.
        """
        check_roster(self.roster(), members, site, self.identity().public().hex)
        replace_file(self.roster_file, _MEMBERS.dump_json(list(members)))

    def epoch(self) -> str:
        """The epoch of the pinned members, 64 hexadecimal digits."""
        return key_epoch((m.site, m.identity) for m in self.roster() if m.state == "approved")

    def suite_epochs(self) -> dict[str, str]:
        """The fingerprint of the shared key of each epoch, oldest first.

        Raises:
            KeyMaterialError: ``suite-damaged``.
        """
        if not self.suite_epochs_file.exists():
            return {}
        try:
            return _KEYS.validate_json(self.suite_epochs_file.read_bytes())
        except (OSError, ValidationError):
            raise self._damaged(self.suite_epochs_file, "suite-damaged") from None

    def write_suite_key(self, key: bytes, key_id: str, epoch: str) -> None:
        """Replace the shared key, and remember in which epoch it is used.

        Raises:
            UsageError: it cannot be written.
        """
        # The note first: a key that is noted and missing is fetched again, one that is there unnoted is not used.
        replace_file(self.suite_epochs_file, json.dumps({**self.suite_epochs(), epoch: key_id}).encode())
        replace_file(self.suite_key_file, key)

    def _key(self, path: Path) -> bytes:
        if not path.exists():
            self._create(path, certificates.make_key())
        key = self._read(path, secret=True)
        certificates.public_key(key)
        return key

    def _create(self, path: Path, data: bytes) -> None:
        """Put a new file in its place whole or not at all, and never over another one."""
        self.create()
        new = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.made")
        try:
            replace_file(new, data)
            os.link(new, path)
        except FileExistsError:
            return
        except (OSError, UsageError) as error:
            raise KeyMaterialError("no-key", f"cannot make {path}: {error}; choose another home") from None
        finally:
            new.unlink(missing_ok=True)

    def _read(self, path: Path, *, secret: bool) -> bytes:
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            data = path.read_bytes()
        except FileNotFoundError:
            raise KeyMaterialError(
                "not-enrolled",
                f"{path} is missing: this site has not been enrolled; run: {self.command('site', 'enroll')}",
            ) from None
        except OSError as error:
            raise KeyMaterialError("no-key", f"cannot read {path}: {error.strerror}") from None
        if secret and os.name == "posix" and mode & 0o077:
            raise KeyMaterialError(
                "key-readable", f"{path} can be read by others (mode {mode:04o}); run: chmod 600 {path}"
            )
        return data

    def _damaged(self, path: Path, code: str) -> KeyMaterialError:
        return KeyMaterialError(
            code,
            f"{path} cannot be read; restore it, or move it away and compare the members with the other sites anew",
        )


def check_roster(pinned: Sequence[Member], members: Sequence[Member], site: str, identity: str) -> None:
    """Whether a roster can follow upon the pinned one.

    An identity stays in the roster for good; its state goes from approved to revoked or left and never back; a name has
    one approved identity at most. So a member's key can only change after it was openly revoked.

    Args:
        pinned: what this site knew.
        members: what the coordinator says now.
        site: name of this site.
        identity: its public identity, hex.

    Raises:
        CoordinatorFault: ``roster-changed``, naming the member.
    """
    now = {(member.site, member.identity): member.state for member in members}
    if len(now) != len(members):
        raise _changed("the same member is in it twice")
    for old in pinned:
        state = now.get((old.site, old.identity))
        if state is None:
            raise _changed(f"the key of {old.site} is another one, or {old.site} is gone, and it was never revoked")
        if old.state != "approved" and state != old.state:
            raise _changed(f"{old.site} was {old.state} and is {state} with the same key")
    approved = [name for (name, _), state in now.items() if state == "approved"]
    twice = sorted({name for name in approved if approved.count(name) > 1})
    if twice:
        raise _changed(f"{twice[0]} has two approved keys at once")
    if now.get((site, identity)) != "approved":
        raise _changed(f"this site, {site}, is not in it with its own key")


def _changed(what: str) -> CoordinatorFault:
    return CoordinatorFault(
        "roster-changed",
        f"the coordinator's list of members cannot be right: {what}; stop, and ask the other sites and the "
        "coordinator's operator what happened",
    )
