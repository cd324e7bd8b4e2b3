"""The site's keys on disk. Read once per process; never sent, never logged."""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from quorsum.crypto import CkksSite, CkksSiteKey, Identity, SealedSite, SiteSuite
from quorsum.errors import KeyMaterialError
from quorsum.selection import select

__all__ = [
    "ACCEPT_SMALL",
    "HOME",
    "LEAST_COLLUDE",
    "NODE_CONFIG_KEY",
    "configured_suite",
    "load_identity",
    "load_site_key",
]

NODE_CONFIG_KEY = "quorsum-key"
HOME = "quorsum-home"
ACCEPT_SMALL = "quorsum-accept-small-models"
LEAST_COLLUDE = "quorsum-least-collude"


def load_site_key(path: Path) -> CkksSiteKey:
    """Read a site key.

    Raises:
        KeyMaterialError: there is no such file, others may read it, or it is not a site key.
    """
    data = _read_secret(path, f"make one with: quorsum keygen --out {path}")
    return CkksSiteKey.from_bytes(data)


def load_identity(home: Path) -> Identity:
    """The site's own keys, from ``identity.key`` in its home; made there the first time. They never leave the site.

    Raises:
        KeyMaterialError: the file cannot be read or written, others may read it, or it is no identity.
    """
    path = home / "identity.key"
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return Identity.from_bytes(_read_secret(path, "move it away to let this site make a new one"))
    except OSError as error:
        raise KeyMaterialError(
            "no-key", f"cannot keep this site's keys in {home}: {error.strerror}; choose another {HOME}"
        ) from None
    identity = Identity.generate(os.urandom)
    with os.fdopen(descriptor, "wb") as file:
        file.write(identity.to_bytes())
        file.flush()
        os.fsync(file.fileno())
    return identity


def _read_secret(path: Path, otherwise: str) -> bytes:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        data = path.read_bytes()
    except OSError as error:
        raise KeyMaterialError("no-key", f"cannot read {path}: {error.strerror}; {otherwise}") from None
    if os.name == "posix" and mode & 0o077:
        raise KeyMaterialError("key-readable", f"{path} can be read by others (mode {mode:04o}); run: chmod 600 {path}")
    return data


@lru_cache(maxsize=4)
def _ckks_site(path: Path) -> CkksSite:
    return CkksSite(load_site_key(path))


@lru_cache(maxsize=4)
def _sealed_site(home: Path, accept_small_models: bool, least_collude: int) -> SealedSite:
    return SealedSite(load_identity(home), select, accept_small_models, least_collude)


def configured_suite(context: Context) -> SiteSuite:
    """The suite that the node's own configuration names.

    ``quorsum-home="/path/to/folder"`` for ``sealed``: keys and records of the site live there. Its policy:
    ``quorsum-accept-small-models=true``, and ``quorsum-least-collude=2`` for the smallest tau it takes part with.
    ``quorsum-key="/path/to/site.key"`` for ``ckks``: the key that all sites share.

    Raises:
        KeyMaterialError: the node's configuration names neither, or what it names cannot be used.
    """
    key, home = context.node_config.get(NODE_CONFIG_KEY), context.node_config.get(HOME)
    if isinstance(key, str):
        return _ckks_site(Path(key))
    if isinstance(home, str):
        accept, least = context.node_config.get(ACCEPT_SMALL, False), context.node_config.get(LEAST_COLLUDE, 1)
        return _sealed_site(Path(home), bool(accept), int(least))
    raise KeyMaterialError(
        "no-key", f"this node has no home for its keys; start it with: --node-config '{HOME}=\"FOLDER\"'"
    )
