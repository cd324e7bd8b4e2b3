"""What a run must not lose when its coordinator is killed, in files of one folder.

A run is a sequence of finished rounds and at most one open one.

* After a round: model, reference norm, records. One file is replaced in one step (``state.npz``), and that is the
  moment at which the round counts: never twice, never not at all.
* While a round is open (``round-000007/``): the seed of the coordinator's randomness, the roster it began with, and
  every reply of every exchange, each written before anything is done with it.

A coordinator that comes back plays the open round again from the start. It draws the same randomness from the seed,
takes from the files what it had, and asks the sites only for the rest; they give the same answer to the same question.
So it arrives where it was, without a state machine of its own.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
from flwr.app import Array, ArrayRecord

from quorsum.aggregation.reputation import Reputation
from quorsum.crypto.suite import Blocks, RandomBytes, Site
from quorsum.durable import make_private, replace_file
from quorsum.errors import Refusal, SiteFault
from quorsum.server.gate import Watched
from quorsum.server.records import RoundRecord

__all__ = [
    "ExchangeLog",
    "FolderExchange",
    "FolderRound",
    "FolderRun",
    "NoRun",
    "RoundJournal",
    "RunJournal",
    "RunState",
    "Said",
]

SEED_LENGTH = 32


@dataclass(frozen=True)
class RunState:
    """A run between two rounds.

    Attributes:
        run: random identifier of the run, in hexadecimal digits.
        tolerate: f of this run.
        number: number of the last round that was played, finished or failed; 0 before the first.
        finished: how many of the rounds asked for are done.
        unit: the reference norm C of the next round.
        sketches: r, random sketches of the next round.
        model: the model.
        records: one for each round played.
        norms: what the last rounds said about the reference norm.
        reputation: what is held against single sites.
        watched: what the gate compares the next model with.
    """

    run: str
    tolerate: int
    number: int
    finished: int
    unit: float
    sketches: int
    model: ArrayRecord
    records: tuple[RoundRecord, ...] = ()
    norms: tuple[float, ...] = ()
    reputation: Reputation = field(default_factory=Reputation)
    watched: Watched = field(default_factory=Watched)


@dataclass(frozen=True)
class Said:
    """One reply of a site, as the round takes it.

    Attributes:
        site: whose reply.
        header: the message without its blocks, one line of JSON; empty where there was none to take.
        blocks: its blocks.
        fault: what was wrong, where there was none to take.
    """

    site: Site
    header: str
    blocks: Blocks = ()
    fault: SiteFault | None = None


class ExchangeLog(Protocol):
    """What is kept of one exchange with the sites."""

    def said(self) -> Iterator[Said]:
        """The replies so far, in the order in which they were taken."""

    def add(self, said: Said) -> None:
        """Keep a reply; it is safe when this returns."""

    def finished(self) -> bool:
        """Whether the exchange was over."""

    def finish(self) -> None:
        """The exchange is over."""


class RoundJournal(Protocol):
    """What is kept of an open round."""

    def seed(self, random_bytes: RandomBytes) -> bytes:
        """32 bytes, the same whenever this round is played."""

    def roster(self) -> dict[Site, tuple[str, bytes]] | None:
        """The sites that the round began with, with the key each introduced itself with; None before it began."""

    def begin(self, roster: Mapping[Site, tuple[str, bytes]]) -> None:
        """Begin the round with these sites."""

    def exchange(self, step: int) -> ExchangeLog | None:
        """The log of exchange number ``step``, from 0; None where nothing is kept."""


class RunJournal(Protocol):
    """What is kept of a run."""

    def load(self) -> RunState | None:
        """The run as it was after its last round, or None before the first commit."""

    def commit(self, state: RunState) -> None:
        """Replace the state; the round it came from counts from now on, and what was kept of it while open goes."""

    def round(self, number: int) -> RoundJournal:
        """The journal of an open round."""


class _NoRound:
    """Keeps nothing."""

    def seed(self, random_bytes: RandomBytes) -> bytes:
        return random_bytes(SEED_LENGTH)

    def roster(self) -> dict[Site, tuple[str, bytes]] | None:
        return None

    def begin(self, roster: Mapping[Site, tuple[str, bytes]]) -> None:
        pass

    def exchange(self, step: int) -> ExchangeLog | None:
        return None


class NoRun:
    """For runs that need not survive: simulations, and apps on another coordinator than ours."""

    def load(self) -> RunState | None:
        """Nothing."""
        return None

    def commit(self, state: RunState) -> None:
        """Nothing."""

    def round(self, number: int) -> RoundJournal:
        """A journal that keeps nothing."""
        return _NoRound()


class FolderRun:
    """A run in a folder that only the coordinator's own user reads."""

    def __init__(self, folder: Path) -> None:
        self._folder = make_private(folder)

    def load(self) -> RunState | None:
        """The run as it was after its last round, or None before the first commit.

        Raises:
            Refusal: ``checkpoint-damaged``: there is a file that cannot be read. The run must not begin anew over it.
        """
        path = self._folder / "state.npz"
        try:
            with np.load(path, allow_pickle=False) as parts:
                head = json.loads(parts["head"].tobytes())
                arrays = {name: Array(parts[f"array-{place}"]) for place, name in enumerate(head.pop("arrays"))}
                records = tuple(_record(one) for one in head.pop("records"))
                later = _later(head)
                return RunState(**head, **later, model=ArrayRecord(arrays), records=records)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, BadZipFile):
            raise Refusal(
                "checkpoint-damaged", f"{path} cannot be read; restore it from a backup, or start a new run"
            ) from None

    def commit(self, state: RunState) -> None:
        """Replace the state in one step, then drop what was kept of the round while it was open."""
        head = {
            **{name: getattr(state, name) for name in ("run", "tolerate", "number", "finished", "unit", "sketches")},
            "arrays": list(state.model),
            "records": [asdict(record) for record in state.records],
            "norms": list(state.norms),
            "reputation": state.reputation.to_json(),
            "watched": state.watched.to_json(),
        }
        out = io.BytesIO()
        arrays: dict[str, Any] = {f"array-{place}": array.numpy() for place, array in enumerate(state.model.values())}
        np.savez(out, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
        replace_file(self._folder / "state.npz", [out.getbuffer()])
        for folder in self._folder.glob("round-*"):
            # Before its first round a run has none open: what lies there is of another run whose state was lost, and
            # the coordinator's nonce in it has been published.
            if state.number == 0 or int(folder.name.removeprefix("round-")) <= state.number:
                shutil.rmtree(folder)

    def round(self, number: int) -> RoundJournal:
        """The journal of an open round."""
        return FolderRound(self._folder / f"round-{number:06d}")


class FolderRound:
    """An open round in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = make_private(folder)

    def seed(self, random_bytes: RandomBytes) -> bytes:
        """32 bytes, drawn when first asked for; the coordinator's nonce is made from it, so that it is secret.

        Raises:
            Refusal: ``checkpoint-damaged``.
        """
        path = self._folder / "seed"
        if not path.exists():
            replace_file(path, [random_bytes(SEED_LENGTH)])
        seed = path.read_bytes()
        if len(seed) != SEED_LENGTH:
            raise Refusal("checkpoint-damaged", f"{path} has {len(seed)} bytes instead of {SEED_LENGTH}")
        return seed

    def roster(self) -> dict[Site, tuple[str, bytes]] | None:
        """The sites that the round began with.

        Raises:
            Refusal: ``checkpoint-damaged``.
        """
        path = self._folder / "roster.bin"
        if not path.exists():
            return None
        names, keys = _read(path)
        with _whole(path):
            return {site: (key_id, key) for (site, key_id), key in zip(names, keys, strict=True)}

    def begin(self, roster: Mapping[Site, tuple[str, bytes]]) -> None:
        """Begin the round with these sites."""
        names = [[site, key_id] for site, (key_id, _) in roster.items()]
        _write(self._folder / "roster.bin", names, tuple(key for _, key in roster.values()))

    def exchange(self, step: int) -> ExchangeLog:
        """The log of exchange number ``step``."""
        return FolderExchange(self._folder / f"exchange-{step:03d}")


class FolderExchange:
    """One exchange in a folder: a file for each reply."""

    def __init__(self, folder: Path) -> None:
        self._folder = make_private(folder)
        self._count = len(list(folder.glob("reply-*.bin")))

    def said(self) -> Iterator[Said]:
        """The replies so far, in order, one at a time.

        Raises:
            Refusal: ``checkpoint-damaged``.
        """
        for place in range(self._count):
            path = self._path(place)
            head, blocks = _read(path)
            with _whole(path):
                site, header, fault = head
                said = Said(site, header, blocks, None if fault is None else SiteFault(site, *fault))
            yield said

    def add(self, said: Said) -> None:
        """Keep a reply."""
        fault = said.fault
        told = None if fault is None else [fault.code, fault.message, fault.proven]
        _write(self._path(self._count), [said.site, said.header, told], said.blocks)
        self._count += 1

    def finished(self) -> bool:
        """Whether the exchange was over."""
        return (self._folder / "finished").exists()

    def finish(self) -> None:
        """The exchange is over."""
        replace_file(self._folder / "finished", [])

    def _path(self, place: int) -> Path:
        return self._folder / f"reply-{place:05d}.bin"


def _later(head: dict[str, Any]) -> dict[str, Any]:
    """Take out of a state what those of 0.1.0 do not have; they begin with nothing."""
    found: dict[str, Any] = {}
    if "norms" in head:
        found["norms"] = tuple(float(norm) for norm in head.pop("norms"))
    if "reputation" in head:
        found["reputation"] = Reputation.from_json(head.pop("reputation"))
    if "watched" in head:
        found["watched"] = Watched.from_json(head.pop("watched"))
    return found


def _record(values: dict[str, Any]) -> RoundRecord:
    # JSON has no tuples; a record has no lists.
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return RoundRecord(**fields)


def _write(path: Path, head: Any, blocks: Blocks) -> None:
    # head and lengths in one line of JSON, then the blocks
    line = json.dumps([head, [len(block) for block in blocks]]).encode() + b"\n"
    replace_file(path, [line, *blocks])


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Whatever in this file cannot be understood is damage.

    Raises:
        Refusal: ``checkpoint-damaged``.
    """
    try:
        yield
    except (OSError, ValueError, TypeError):
        raise Refusal("checkpoint-damaged", f"{path} cannot be read; restore it, or start a new run") from None


def _read(path: Path) -> tuple[Any, Blocks]:
    with _whole(path), path.open("rb") as file:
        head, lengths = json.loads(file.readline())
        blocks = tuple(file.read(length) for length in lengths)
        if [len(block) for block in blocks] != lengths or file.read(1):
            raise ValueError
        return head, blocks
