"""The site's key on disk. Read once per process; never sent, never logged."""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from quorsum.crypto import CkksSite, CkksSiteKey
from quorsum.errors import KeyMaterialError

__all__ = ["HOME", "NODE_CONFIG_KEY", "configured_suite", "load_site_key"]

NODE_CONFIG_KEY = "quorsum-key"
HOME = "quorsum-home"


def load_site_key(path: Path) -> CkksSiteKey:
    """Read a site key.

    Raises:
        KeyMaterialError: there is no such file, others may read it, or it is not a site key.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        data = path.read_bytes()
    except OSError as error:
        raise KeyMaterialError(
            "no-key", f"cannot read the site key {path}: {error.strerror}; make one with: quorsum keygen --out {path}"
        ) from None
    if os.name == "posix" and mode & 0o077:
        raise KeyMaterialError(
            "key-readable", f"the site key {path} can be read by others (mode {mode:04o}); run: chmod 600 {path}"
        )
    return CkksSiteKey.from_bytes(data)


@lru_cache(maxsize=4)
def _ckks_site(path: Path) -> CkksSite:
    return CkksSite(load_site_key(path))


def configured_suite(context: Context) -> CkksSite:
    """The suite that the node's own configuration names: ``quorsum-key="/path/to/site.key"``.

    Raises:
        KeyMaterialError: the node's configuration names no key, or the key cannot be used.
    """
    path = context.node_config.get(NODE_CONFIG_KEY)
    if not isinstance(path, str):
        raise KeyMaterialError(
            "no-key",
            f"this node names no key; start it with: --node-config '{NODE_CONFIG_KEY}=\"PATH\"'",
        )
    return _ckks_site(Path(path))
