"""Files that are either the old version or the new one, whenever the power fails, and that only their owner reads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

__all__ = ["make_private", "replace_file"]


def make_private(folder: Path) -> Path:
    """Make a folder that only its owner may enter.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def replace_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file in one step, mode 0600: it is on the disk, under its name, when this returns.

    Raises:
        OSError: it cannot be written (a full disk, for instance); the old version is still there then.
    """
    # A name of its own for each writer: two at once must not write into one file.
    new = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        # What was written of it would only take room, perhaps the very room that is missing.
        new.unlink(missing_ok=True)
        raise
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
