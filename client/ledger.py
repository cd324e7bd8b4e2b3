"""What a site must not forget between two messages: which rounds it took, and what it keeps of the last one.

One record: for every run the last round taken, the context of the round taken last, the suite's private state in it,
and, for suites whose answers need it, the upload itself. It is written before the answer that depends on it leaves.

Two places to keep it:

* :class:`StateLedger`: Flower's ``Context.state``, in the memory of the node, for as long as the node runs.
* :class:`FolderLedger`: files that survive a restart, written with fsync and replaced in one step. A site that takes
  part in real rounds of a suite with certificates must use this one: what it signed must not be forgotten.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from quorsum import messages
from quorsum.crypto.suite import Blocks, RoundContext
from quorsum.errors import CoordinatorFault, KeyMaterialError

__all__ = ["FolderLedger", "Ledger", "StateLedger", "recall", "remember", "take_round"]

RECORD = "quorsum.ledger"
UPLOAD = "quorsum.upload"


class Ledger(Protocol):
    """A place for one record and one upload."""

    def read(self) -> dict[str, Any] | None:
        """The record, or None before the first one."""

    def write(self, record: dict[str, Any]) -> None:
        """Replace the record; it is safe when this returns."""

    def read_upload(self) -> Blocks:
        """The upload kept last."""

    def write_upload(self, blocks: Blocks) -> None:
        """Replace the upload."""


def take_round(ledger: Ledger, context: RoundContext) -> None:
    """Take part in a round; from here on no earlier round and no second context of this one is answered.

    Raises:
        CoordinatorFault: this round of the run, or a later one, was taken before.
    """
    seen: dict[str, int] = (ledger.read() or {}).get("seen", {})
    last = seen.get(context.run, 0)
    if context.round <= last:
        raise CoordinatorFault(
            "replayed-round",
            f"round {context.round} was asked for after round {last} had been taken; a site seals once per round",
        )
    _write(ledger, {**seen, context.run: context.round}, context, b"")


def remember(ledger: Ledger, context: RoundContext, state: bytes, upload: Blocks | None = None) -> None:
    """Store the suite's private state of a round already taken, and its upload where the suite needs that."""
    if upload is not None:
        ledger.write_upload(upload)
    _write(ledger, (ledger.read() or {})["seen"], context, state)


def recall(ledger: Ledger, digest: str) -> tuple[RoundContext, bytes]:
    """The context and the suite's state of the round a question is about.

    Raises:
        CoordinatorFault: the question is not about the round taken last.
    """
    record = ledger.read()
    if record is None:
        raise CoordinatorFault("unknown-round", "a question came before any round was taken")
    context = messages.Context.model_validate_json(record["context"]).round_context()
    if context.digest().hex() != digest:
        raise CoordinatorFault("wrong-round", f"the question is not about round {context.round}, the last one taken")
    return context, bytes.fromhex(record["state"])


def _write(ledger: Ledger, seen: dict[str, int], context: RoundContext, state: bytes) -> None:
    text = messages.Context.of(context).model_dump_json()
    ledger.write({"seen": seen, "context": text, "state": state.hex()})


class StateLedger:
    """A ledger in a node's ``Context.state``."""

    def __init__(self, state: RecordDict) -> None:
        self._state = state

    def read(self) -> dict[str, Any] | None:
        """The record, or None before the first one."""
        record = self._state.get(RECORD)
        return json.loads(str(record["json"])) if isinstance(record, ConfigRecord) else None

    def write(self, record: dict[str, Any]) -> None:
        """Replace the record."""
        self._state[RECORD] = ConfigRecord({"json": json.dumps(record)})

    def read_upload(self) -> Blocks:
        """The upload kept last."""
        record = self._state.get(UPLOAD)
        return tuple(array.data for array in record.values()) if isinstance(record, ArrayRecord) else ()

    def write_upload(self, blocks: Blocks) -> None:
        """Replace the upload."""
        self._state[UPLOAD] = ArrayRecord(
            {f"{k:06d}": Array("uint8", (len(block),), messages.RAW, block) for k, block in enumerate(blocks)}
        )


class FolderLedger:
    """A ledger in a folder that only the site's own user reads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise KeyMaterialError(
                "no-folder", f"cannot keep records in {folder}: {error.strerror}; choose another quorsum-home"
            ) from None

    def read(self) -> dict[str, Any] | None:
        """The record, or None before the first one.

        Raises:
            KeyMaterialError: there is a record that cannot be read. The site must not go on as if it had none.
        """
        path = self._folder / "ledger.json"
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if set(record) != {"seen", "context", "state"}:
                raise ValueError
            return record
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            raise KeyMaterialError(
                "ledger-damaged",
                f"{path} cannot be read; what this site signed is not known any more. Move it away and sit out until "
                "the coordinator starts a new run",
            ) from None

    def write(self, record: dict[str, Any]) -> None:
        """Replace the record in one step; it is on the disk when this returns."""
        self._replace("ledger.json", [json.dumps(record).encode()])

    def read_upload(self) -> Blocks:
        """The upload kept last."""
        lengths = json.loads((self._folder / "upload.json").read_text(encoding="utf-8"))
        with (self._folder / "upload.bin").open("rb") as file:
            return tuple(file.read(length) for length in lengths)

    def write_upload(self, blocks: Blocks) -> None:
        """Replace the upload."""
        self._replace("upload.bin", blocks)
        self._replace("upload.json", [json.dumps([len(block) for block in blocks]).encode()])

    def _replace(self, name: str, parts: list[bytes] | Blocks) -> None:
        new = self._folder / f"{name}.new"
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._folder / name)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
