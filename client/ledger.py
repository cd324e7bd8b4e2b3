"""What a site must not forget between two messages: which rounds it took, and what it keeps of the last one.

One record: for every run the last round taken, the context of the round taken last, the suite's private state in it,
what was submitted, and, for suites whose answers need it, the upload itself. It is written before the answer that
depends on it leaves, so that a coordinator which has lost that answer can ask again and gets the very same one.
Suites with several attempts at a round also have it keep what a later attempt seals again.

Whoever handles a message holds the ledger from the first look at it until the answer is stored (``hold``): two
processes of one site could otherwise give two different answers.

Two places to keep it:

* :class:`StateLedger`: Flower's ``Context.state``, in the memory of the node, for as long as the node runs.
* :class:`FolderLedger`: files that survive a restart, written with fsync and replaced in one step. A site that takes
  part in real rounds of a suite with certificates must use this one: what it signed must not be forgotten.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from quorsum import messages
from quorsum.crypto.suite import MOST_ATTEMPTS, Blocks, RoundContext, Site
from quorsum.durable import make_private, replace_file
from quorsum.errors import CoordinatorFault, KeyMaterialError, Refusal

__all__ = [
    "FolderLedger",
    "Ledger",
    "StateLedger",
    "earlier_attempt",
    "recall",
    "remember",
    "submitted",
    "take_attempt",
    "take_round",
]

RECORD = "quorsum.ledger"
UPLOAD = "quorsum.upload"
KEPT = "quorsum.kept"

PATIENCE = 2.0
"""Seconds to wait for another process of this site to be done."""

_RECORD_FILE, _UPLOAD_FILE, _KEPT_FILE = "ledger.json", "upload.bin", "kept.bin"
# Bytes of the line before the blocks at most; a damaged file may have no line end.
_LONGEST_HEAD = 1 << 24

# What a later attempt may change; of the roster, only that sites are left out.
_MAY_CHANGE = {"attempt", "sites", "keys", "commitment"}


class Ledger(Protocol):
    """A place for one record, one upload, and what a later attempt seals again."""

    @property
    def durable(self) -> bool:
        """Whether it survives the process, and so has to answer for what an earlier process did."""

    def hold(self) -> AbstractContextManager[None]:
        """Keep other processes of this site out for as long as one message is handled.

        Raises:
            Refusal: ``ledger-busy``: another process of this site is at work.
        """

    def read(self) -> dict[str, Any] | None:
        """The record, or None before the first one."""

    def write(self, record: dict[str, Any]) -> None:
        """Replace the record; it is safe when this returns."""

    def read_upload(self) -> Blocks:
        """The upload kept last."""

    def write_upload(self, blocks: Blocks) -> None:
        """Replace the upload."""

    def read_kept(self) -> Blocks:
        """What a later attempt seals again; nothing before the first."""

    def write_kept(self, blocks: Blocks) -> None:
        """Replace what a later attempt seals again; it is safe when this returns."""


def take_round(ledger: Ledger, context: RoundContext) -> None:
    """Take part in a round; from here on no earlier round and no second context of this one is answered.

    The very same context may be taken again as long as nothing was sealed for it: the process that took it was killed
    while it trained, and nothing has left the site. That holds for a first attempt only: before a later one, something
    has.

    Raises:
        CoordinatorFault: ``replayed-round``: this round of the run, or a later one, was taken before;
            ``no-earlier-attempt``: a round begins with its first attempt.
    """
    record = ledger.read() or {}
    seen: dict[str, int] = record.get("seen", {})
    last = seen.get(context.run, 0)
    taken = bool(record) and not (record["submission"] or record["state"])
    if taken and context.attempt == 1 and _context(record).digest() == context.digest():
        return
    if context.round <= last:
        raise CoordinatorFault(
            "replayed-round",
            f"round {context.round} was asked for after round {last} had been taken; a site trains once per round",
        )
    if context.attempt != 1:
        raise CoordinatorFault("no-earlier-attempt", f"a round begins with attempt 1, not with {context.attempt}")
    _write(ledger, {**seen, context.run: context.round}, context, b"")


def submitted(ledger: Ledger, context: RoundContext) -> tuple[str, Blocks] | None:
    """What this site has submitted for this very context, header and blocks, or None."""
    record = ledger.read()
    if record is None or not record["submission"] or _context(record).digest() != context.digest():
        return None
    blocks = ledger.read_upload()
    return (record["submission"], blocks) if blocks else None


def earlier_attempt(ledger: Ledger, context: RoundContext) -> bytes:
    """The suite's state in the last attempt at this round, if the site may join the one of this context.

    Raises:
        CoordinatorFault: ``unknown-round`` or ``wrong-round``: it is not at the round taken last;
            ``no-earlier-attempt``: the site has sealed nothing in the attempt before; ``replayed-attempt``: attempts
            only go up; ``too-many-attempts``; ``changed-round``: it is not the same round; ``wrong-roster``: a site
            joins, or another key does; ``same-commitment``: the coordinator's nonce is known already.
    """
    record = ledger.read()
    if record is None:
        raise CoordinatorFault("unknown-round", "an attempt at a round came before any round was taken")
    before = _context(record)
    if (context.run, context.round) != (before.run, before.round):
        raise CoordinatorFault("wrong-round", f"the attempt is not at round {before.round}, the one taken last")
    if context.attempt <= before.attempt:
        raise CoordinatorFault(
            "replayed-attempt", f"attempt {context.attempt} was asked for after attempt {before.attempt} had been taken"
        )
    if context.attempt > MOST_ATTEMPTS:
        raise CoordinatorFault(
            "too-many-attempts", f"attempt {context.attempt} was asked for; a round has {MOST_ATTEMPTS} at most"
        )
    if not record["state"]:
        raise CoordinatorFault(
            "no-earlier-attempt",
            f"this site sealed nothing in attempt {before.attempt} at round {before.round}, and sits the round out",
        )
    _same_round(before, context)
    return bytes.fromhex(record["state"])


def _same_round(before: RoundContext, context: RoundContext) -> None:
    names = [one.name for one in fields(RoundContext) if one.name not in _MAY_CHANGE]
    changed = [name for name in names if getattr(before, name) != getattr(context, name)]
    if changed:
        raise CoordinatorFault("changed-round", f"another attempt at a round may not change its {', '.join(changed)}")
    known = _keyed(before)
    strangers = [site for site, key in _keyed(context).items() if known.get(site) != key]
    if strangers:
        raise CoordinatorFault(
            "wrong-roster", f"another attempt may only leave sites out; new, or with a new key: {', '.join(strangers)}"
        )
    if context.commitment == before.commitment != "":
        raise CoordinatorFault("same-commitment", "another attempt needs another nonce: this one is known already")


def _keyed(context: RoundContext) -> dict[Site, str | None]:
    """Each site's key; None where the context gives none."""
    keys = [*context.keys, *[None] * len(context.sites)]
    return dict(zip(context.sites, keys, strict=False))


def take_attempt(ledger: Ledger, context: RoundContext) -> None:
    """Take part in a later attempt at the round taken last; from here on no earlier attempt at it is answered."""
    _write(ledger, (ledger.read() or {})["seen"], context, b"")


def remember(
    ledger: Ledger, context: RoundContext, state: bytes, upload: Blocks | None = None, submission: str | None = None
) -> None:
    """Store the suite's private state of a round already taken, with what was submitted where that is new.

    Args:
        ledger: where.
        context: the round.
        state: the suite's private state.
        upload: the blocks submitted, if they are to be kept.
        submission: the header of the submission.
    """
    if upload is not None:
        ledger.write_upload(upload)
    record = ledger.read() or {}
    _write(ledger, record["seen"], context, state, record["submission"] if submission is None else submission)


def recall(ledger: Ledger, digest: str) -> tuple[RoundContext, bytes]:
    """The context and the suite's state of the round a question is about.

    Raises:
        CoordinatorFault: the question is not about the round taken last.
    """
    record = ledger.read()
    if record is None:
        raise CoordinatorFault("unknown-round", "a question came before any round was taken")
    context = _context(record)
    if context.digest().hex() != digest:
        raise CoordinatorFault("wrong-round", f"the question is not about round {context.round}, the last one taken")
    return context, bytes.fromhex(record["state"])


def _context(record: dict[str, Any]) -> RoundContext:
    return messages.Context.model_validate_json(record["context"]).round_context()


def _write(ledger: Ledger, seen: dict[str, int], context: RoundContext, state: bytes, submission: str = "") -> None:
    text = messages.Context.of(context).model_dump_json()
    ledger.write({"seen": seen, "context": text, "state": state.hex(), "submission": submission})


def _digest(blocks: Iterable[bytes]) -> str:
    """SHA-256 of blocks with their lengths: a bit that a disk has turned must not be sealed, nor blamed on others."""
    state = hashlib.sha256()
    for block in blocks:
        state.update(len(block).to_bytes(8, "little"))
        state.update(block)
    return state.hexdigest()


class StateLedger:
    """A ledger in a node's ``Context.state``."""

    def __init__(self, state: RecordDict) -> None:
        self._state = state

    @property
    def durable(self) -> bool:
        """No."""
        return False

    def read(self) -> dict[str, Any] | None:
        """The record, or None before the first one."""
        record = self._state.get(RECORD)
        return json.loads(str(record["json"])) if isinstance(record, ConfigRecord) else None

    def write(self, record: dict[str, Any]) -> None:
        """Replace the record."""
        self._state[RECORD] = ConfigRecord({"json": json.dumps(record)})

    def hold(self) -> AbstractContextManager[None]:
        """Nothing to keep out: the memory of a node belongs to one process."""
        return nullcontext()

    def read_upload(self) -> Blocks:
        """The upload kept last."""
        return self._blocks(UPLOAD)

    def write_upload(self, blocks: Blocks) -> None:
        """Replace the upload."""
        self._put(UPLOAD, blocks)

    def read_kept(self) -> Blocks:
        """What a later attempt seals again; nothing before the first."""
        return self._blocks(KEPT)

    def write_kept(self, blocks: Blocks) -> None:
        """Replace what a later attempt seals again."""
        self._put(KEPT, blocks)

    def _blocks(self, name: str) -> Blocks:
        record = self._state.get(name)
        return tuple(array.data for array in record.values()) if isinstance(record, ArrayRecord) else ()

    def _put(self, name: str, blocks: Blocks) -> None:
        self._state[name] = ArrayRecord(
            {f"{k:06d}": Array("uint8", (len(block),), messages.RAW, block) for k, block in enumerate(blocks)}
        )


class FolderLedger:
    """A ledger in a folder that only the site's own user reads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            make_private(folder)
        except OSError as error:
            raise self._unusable(error) from None

    @property
    def durable(self) -> bool:
        """Yes."""
        return True

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other processes of this site out, by a lock on a file; a process that dies lets it go.

        Raises:
            Refusal: ``ledger-busy``: another process of this site is at work and was not done within ``PATIENCE``.
            KeyMaterialError: the folder takes no lock.
        """
        lock = FileLock(self._folder / "lock", timeout=PATIENCE, mode=0o600)
        try:
            lock.acquire()
        except Timeout:
            raise Refusal(
                "ledger-busy",
                "another process of this site is at work, and the two could answer differently; "
                "run one node per quorsum-home, or ask again when it is done",
            ) from None
        except OSError as error:
            raise self._unusable(error) from None
        try:
            self._tidy()
            yield
        finally:
            lock.release()

    def _tidy(self) -> None:
        """Drop what a process that was killed has left half written: it may hold an update in the clear."""
        for name in (_RECORD_FILE, _UPLOAD_FILE, _KEPT_FILE):
            for half in self._folder.glob(f"{name}.*.new"):
                half.unlink(missing_ok=True)

    def read(self) -> dict[str, Any] | None:
        """The record, or None before the first one.

        Raises:
            KeyMaterialError: there is a record that cannot be read. The site must not go on as if it had none.
        """
        path = self._folder / _RECORD_FILE
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if set(record) != {"seen", "context", "state", "submission"}:
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
        replace_file(self._folder / _RECORD_FILE, [json.dumps(record).encode()])

    def read_upload(self) -> Blocks:
        """The upload kept last.

        Raises:
            KeyMaterialError: ``ledger-damaged``: it cannot be read, or is not what was written.
        """
        return self._blocks(_UPLOAD_FILE)

    def write_upload(self, blocks: Blocks) -> None:
        """Replace the upload in one step."""
        self._put(_UPLOAD_FILE, blocks)

    def read_kept(self) -> Blocks:
        """What a later attempt seals again; nothing before the first.

        Raises:
            KeyMaterialError: ``ledger-damaged``: it cannot be read, or is not what was written.
        """
        return self._blocks(_KEPT_FILE)

    def write_kept(self, blocks: Blocks) -> None:
        """Replace what a later attempt seals again, in one step; it is on the disk when this returns."""
        self._put(_KEPT_FILE, blocks)

    def _blocks(self, name: str) -> Blocks:
        path = self._folder / name
        try:
            with path.open("rb") as file:
                lengths, digest = json.loads(file.readline(_LONGEST_HEAD))
                if min(lengths, default=0) < 0 or sum(lengths) != path.stat().st_size - file.tell():
                    raise ValueError
                blocks = tuple(file.read(length) for length in lengths)
                if _digest(blocks) != digest:
                    raise ValueError
                return blocks
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, TypeError):
            raise KeyMaterialError(
                "ledger-damaged",
                f"{path} is not what this site wrote and is not used; look after the disk and move the file away. "
                "The site sits this round out and takes part in the next one",
            ) from None

    def _put(self, name: str, blocks: Blocks) -> None:
        # Lengths and digest in one line of JSON, then the blocks.
        head = json.dumps([[len(block) for block in blocks], _digest(blocks)])
        replace_file(self._folder / name, [head.encode() + b"\n", *blocks])

    def _unusable(self, error: OSError) -> KeyMaterialError:
        return KeyMaterialError(
            "no-folder", f"cannot keep records in {self._folder}: {error.strerror}; choose another quorsum-home"
        )
