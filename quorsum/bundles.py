"""Bundles: an app as one file whose SHA-256 a site can allow.

The same folder gives the same bytes on every machine, so that a site computes the digest from its own copy and need
not trust what it is sent. What goes in is decided by Flower's own builder; the archive around it is written here,
uncompressed and with fixed dates, because compressed bytes depend on the machine's zlib.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import sys
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Final

from quorsum import flower
from quorsum.errors import Refusal, UsageError

__all__ = ["LONGEST", "Description", "Value", "build", "configured", "describe", "digest", "shadowed", "unpack"]

LONGEST: Final = 10 * 1024 * 1024
"""Bytes of a bundle at most, packed and unpacked."""

MOST_FILES: Final = 2000
_DATE: Final = (2024, 10, 1, 0, 0, 0)
_UNIX: Final = 3

Value = bool | float | int | str


@dataclass(frozen=True)
class Description:
    """What a bundle says about itself.

    Attributes:
        name: ``publisher/name``.
        version: of the app.
        components: ``clientapp`` and ``serverapp``, each as ``module:attribute``.
        config: the run config, nested tables joined by dots.
    """

    name: str
    version: str
    components: Mapping[str, str]
    config: Mapping[str, Value]


def build(app_dir: Path) -> bytes:
    """Make the bundle of an app's folder.

    Raises:
        UsageError: the folder is no Flower app, holds names of installed packages, or is too large.
    """
    if not app_dir.is_dir():
        raise UsageError(f"{app_dir} is not a folder; give the folder of the app, the one with its pyproject.toml")
    try:
        made = flower.build_fab(app_dir)
    except (ValueError, OSError) as error:
        raise UsageError(f"{app_dir} is not a Flower app: {error}") from None
    with zipfile.ZipFile(io.BytesIO(made)) as archive:
        files = {name: archive.read(name) for name in sorted(archive.namelist())}
    bundle = _pack(files)
    if len(bundle) > LONGEST:
        raise UsageError(
            f"the bundle of {app_dir} has {len(bundle)} bytes, {LONGEST} are allowed; leave files out with fab-exclude "
            "in its pyproject.toml"
        )
    taken = shadowed(bundle)
    if taken:
        raise UsageError(f"{app_dir} holds {', '.join(taken)}, which are names of installed packages; rename them")
    return bundle


def _pack(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system = _UNIX
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, content)
    return buffer.getvalue()


def digest(bundle: bytes) -> str:
    """SHA-256 of a bundle, 64 hexadecimal digits: the name under which sites allow it."""
    return hashlib.sha256(bundle).hexdigest()


def describe(bundle: bytes) -> Description:
    """Read what a bundle says about itself.

    Raises:
        Refusal: ``not-a-bundle``.
    """
    try:
        # Flower reads the file that says so whole, whatever length it grows to.
        _read(bundle)
        config = flower.fab_config(bundle)
        name, version = flower.fab_identity(config)
        components = {str(k): str(v) for k, v in config["tool"]["flwr"]["app"]["components"].items()}
        return Description(name, version, components, flower.run_config(config))
    except Refusal:
        raise
    except Exception as error:  # noqa: BLE001 - Flower's reader raises whatever its parts raise
        raise Refusal("not-a-bundle", f"this is not a bundle of a Flower app ({type(error).__name__})") from None


def configured(told: Description, overrides: Mapping[str, Value]) -> dict[str, Value]:
    """The run config of a bundle with some of its values replaced.

    Raises:
        Refusal: ``unknown-setting``: an override that the app does not have.
    """
    unknown = sorted(set(overrides) - set(told.config))
    if unknown:
        known = ", ".join(sorted(told.config)) or "none"
        raise Refusal("unknown-setting", f"the app has no setting {unknown[0]!r}; it has: {known}")
    return {**told.config, **overrides}


def shadowed(bundle: bytes) -> tuple[str, ...]:
    """Top-level names in a bundle that belong to installed packages or to Python itself, sorted.

    Raises:
        Refusal: ``not-a-bundle``.
    """
    tops = {PurePosixPath(entry.filename).parts[0] for entry in _entries(bundle)}
    names = {top.split(".")[0] for top in tops if "." not in top or top.endswith((".py", ".so", ".pyd", ".pyc"))}
    return tuple(sorted(names & _installed()))


@lru_cache(maxsize=1)
def _installed() -> frozenset[str]:
    # An editable installation may not list its own name.
    own = {"quorsum", "flwr", "numpy", "torch"}
    return frozenset(sys.stdlib_module_names) | frozenset(metadata.packages_distributions()) | own


def unpack(bundle: bytes, folder: Path) -> None:
    """Unpack a bundle into a folder that only its owner reads; what was there before is replaced.

    Raises:
        Refusal: ``not-a-bundle``, ``unsafe-bundle`` (a name that leads out of the folder, a link, too much).
        OSError: the folder cannot be written.
    """
    contents = _read(bundle)
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700, parents=True)
    for name, content in contents.items():
        path = new.joinpath(*PurePosixPath(name).parts)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def _check_length(length: int) -> None:
    if length > LONGEST:
        raise Refusal("unsafe-bundle", f"the bundle has more than the {LONGEST} bytes that are allowed")


def _read(bundle: bytes) -> dict[str, bytes]:
    _check_length(len(bundle))
    entries = _entries(bundle)
    contents: dict[str, bytes] = {}
    left = LONGEST
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            for entry in entries:
                if entry.is_dir():
                    continue
                with archive.open(entry) as file:
                    # The stated size may lie.
                    content = file.read(left + 1)
                left -= len(content)
                _check_length(LONGEST - left)
                contents[entry.filename] = content
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError, ValueError) as error:
        raise Refusal("not-a-bundle", f"the bundle is damaged ({type(error).__name__})") from None
    return contents


def _entries(bundle: bytes) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError):
        raise Refusal("not-a-bundle", "this is not a zip archive, so no bundle") from None
    if len(entries) > MOST_FILES:
        raise Refusal("unsafe-bundle", f"the bundle holds more than the {MOST_FILES} files that are allowed")
    seen: set[str] = set()
    for entry in entries:
        _check_name(entry)
        # Two names that a file system may take for one.
        folded = entry.filename.casefold()
        if folded in seen:
            raise Refusal("unsafe-bundle", f"the bundle holds {entry.filename!r} twice")
        seen.add(folded)
    return entries


def _check_name(entry: zipfile.ZipInfo) -> None:
    name = entry.orig_filename
    parts = name.rstrip("/").split("/")
    bad = (
        len(name) > 400
        or not all(c.isprintable() for c in name)
        or any(c in name for c in '\\:*?"<>|')
        or any(part.strip() in ("", ".", "..") for part in parts)
    )
    if bad:
        raise Refusal(
            "unsafe-bundle", f"the bundle holds the name {name[:100]!r}, which is not a plain path in a folder"
        )
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise Refusal("unsafe-bundle", f"the bundle holds {name[:100]!r}, which is not an ordinary file")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # Python unpacks the others in one go, whatever they grow to.
        raise Refusal("unsafe-bundle", f"the bundle holds {name[:100]!r} compressed in another way than zip's own")
    if entry.flag_bits & 0x1:
        raise Refusal("unsafe-bundle", f"the bundle holds {name[:100]!r} encrypted")
