"""The cells of a grid, run side by side, each one kept the moment it ends.

    DIR/grid.toml         the grid file of the last run, byte by byte
    DIR/plan.json         its name, the command, the ids of its cells in order, the versions
    DIR/cells/ID.json     one cell: its settings, and its result or why there is none
    DIR/workers.log       what the worker processes of the last run wrote, such as a traceback
    DIR/lab.lock          held by the process that runs cells here

A cell that has ended is never run again: its id stands for its settings, its data and the version of quorsum. The one
exception is a cell without a verdict, state ``crashed``: the next run tries it anew.

Every worker is a process of its own that is kept for many cells, because its imports cost seconds. Cells so share
nothing but the disk, and a worker that dies takes one cell with it, which is tried once more. Workers die with the
runner, however that dies.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import signal
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from quorsum import durable
from quorsum.errors import DataError, QuorsumError, UsageError
from quorsum.simulation.data import load_dataset
from quorsum.simulation.dataset import Dataset
from quorsum.simulation.lab_grid import Grid, PlannedCell
from quorsum.simulation.run import Simulation, build_world, simulate

__all__ = ["STATES", "Cell", "Plan", "Progress", "Silence", "cores", "read_cells", "read_plan", "run_lab", "unfinished"]

SCHEMA_VERSION: Final = 1
STATES: Final = ("done", "failed", "not applicable", "crashed")
"""``done``: there is a result. ``failed``: quorsum refused, and would again. ``not applicable``: no such combination
can be. ``crashed``: the process died twice, or an error that quorsum does not know; the next run tries again."""

_TRIES: Final = 2
_BAD_STARTS: Final = 3
_PATIENCE: Final = 1.0
_OWN_FILES: Final = frozenset({"grid.toml", "plan.json", "cells", "workers.log", "lab.lock"})
# Cells fill the cores; threads inside of one would only get in the way of the others.
_THREADS: Final = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One cell as it is kept.

    Attributes:
        id: 24 hexadecimal digits.
        settings: the fields of ``Simulation``.
        result: what ``simulate`` returned (``docs/result.md``), or None.
        failed: why there is no result, a sentence; None if there is one.
        seconds: how long it took.
        state: one of ``STATES``.
    """

    id: str
    settings: Mapping[str, Any]
    result: Mapping[str, Any] | None
    failed: str | None
    seconds: float
    state: str = "done"

    def to_json(self) -> dict[str, Any]:
        """As it stands in its file."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


@dataclass(frozen=True)
class Plan:
    """What the last run in a folder was to do.

    Attributes:
        name: of the grid.
        command: that runs, or goes on with, this grid.
        cells: their ids, in the order of the grid.
        versions: of quorsum and of what it computes with.
    """

    name: str
    command: str
    cells: tuple[str, ...]
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``plan.json``."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


class Progress(Protocol):
    """Who is told what happens while a grid is run."""

    def began(self, kept: int, todo: int, jobs: int) -> None:
        """So many cells had ended before, so many will be run now, so many of them at a time."""

    def started(self, cell: PlannedCell) -> None:
        """A worker has taken a cell."""

    def retried(self, cell: PlannedCell, reason: str) -> None:
        """The worker died; the cell is tried once more."""

    def ended(self, cell: PlannedCell, outcome: Cell) -> None:
        """A cell has ended and is on the disk."""


class Silence(Progress):
    """Nobody is told anything."""

    def began(self, kept: int, todo: int, jobs: int) -> None:
        """Say nothing."""
        return

    def started(self, cell: PlannedCell) -> None:
        """Say nothing."""
        return

    def retried(self, cell: PlannedCell, reason: str) -> None:
        """Say nothing."""
        return

    def ended(self, cell: PlannedCell, outcome: Cell) -> None:
        """Say nothing."""
        return


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_plan(folder: Path) -> Plan:
    """What the last run in a folder was to do.

    Raises:
        UsageError: this is no folder of ``quorsum lab run``.
        DataError: its plan cannot be read.
    """
    path = folder / "plan.json"
    if not path.is_file():
        raise UsageError(f"{folder} holds no lab run; make one with: quorsum lab run GRID.toml --out {folder}")
    tree = _load(path)
    try:
        cells = tuple(str(one) for one in tree["cells"])
        plan = Plan(str(tree["name"]), str(tree["command"]), cells, {k: str(v) for k, v in tree["versions"].items()})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError("not-a-plan", f"{path}: this is no plan of a lab run ({error!r}); run the grid again") from None
    # Ids become names of files.
    if odd := [one for one in cells if re.fullmatch(r"[0-9a-f]{24}", one) is None]:
        raise DataError("not-a-plan", f"{path}: {odd[0][:40]!r} is no id of a cell; run the grid again")
    return plan


def read_cells(folder: Path) -> list[Cell]:
    """The cells of the last plan that have ended, in its order.

    Raises:
        UsageError: this is no folder of ``quorsum lab run``.
        DataError: a file cannot be read; the message names it.
    """
    paths = [_cell_path(folder, one) for one in read_plan(folder).cells]
    return [_read_cell(path) for path in paths if _is_there(path)]


def unfinished(folder: Path) -> int:
    """How many cells of the last plan have not ended.

    Raises:
        UsageError, DataError: as :func:`read_plan`.
    """
    return sum(not _is_there(_cell_path(folder, one)) for one in read_plan(folder).cells)


def run_lab(
    grid: Grid,
    cells: Sequence[PlannedCell],
    folder: Path,
    *,
    command: str,
    jobs: int,
    progress: Progress | None = None,
) -> list[Cell]:
    """Run all cells that have not ended yet, and return all cells of the grid in its order.

    Args:
        grid: what was read.
        cells: its cells.
        folder: for the results; another grid's cells may be there already, and stay.
        command: that goes on with this run, for the plan.
        jobs: how many cells are run at a time, 1 or more. With ``runtime="ray"`` it is one, and Ray has the cores.
        progress: is told what happens.

    Raises:
        UsageError: the folder cannot be used, another process works in it, or Ray is missing.
        QuorsumError: worker processes do not even start.
        KeyboardInterrupt: the workers are gone and what has ended is kept.
    """
    progress = progress or Silence()
    if jobs < 1:
        raise UsageError(f"--jobs must be 1 or more, got {jobs}")
    if any(cell.settings.runtime == "ray" for cell in cells):
        jobs = 1
        if importlib.util.find_spec("ray") is None:
            raise UsageError("runtime = \"ray\" needs Flower's simulation runtime: pip install 'quorsum[ray]'")
    _prepare(folder)
    with _locked(folder):
        plan = Plan(grid.name, command, tuple(cell.id for cell in cells), _versions())
        _write(folder / "grid.toml", grid.source)
        _write(folder / "plan.json", _dump(plan.to_json()))
        ended = {cell.id: kept for cell in cells if (kept := _kept(folder, cell)) is not None}

        def keep(cell: PlannedCell, outcome: Cell) -> None:
            _write(_cell_path(folder, cell.id), _dump(outcome.to_json()))
            ended[cell.id] = outcome

        for cell in cells:
            if cell.unfit is not None and cell.id not in ended:
                keep(cell, Cell(cell.id, asdict(cell.settings), None, cell.unfit, 0.0, "not applicable"))
        todo = [cell for cell in cells if cell.id not in ended]
        jobs = max(1, min(jobs, len(todo)))
        progress.began(len(ended), len(todo), jobs)
        if todo:
            _Workers(jobs, folder / "workers.log", progress, keep).run(todo)
        return [ended[cell.id] for cell in cells]


# --- the runner's side ---


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    ready: bool = False
    cell: PlannedCell | None = None


class _Workers:
    """Processes that each run one cell after another."""

    def __init__(self, jobs: int, log: Path, progress: Progress, keep: Callable[[PlannedCell, Cell], None]) -> None:
        self._jobs, self._log, self._progress, self._keep = jobs, log, progress, keep
        self._threads = max(1, cores() // jobs)
        self._workers: list[_Worker] = []
        self._tries: Counter[str] = Counter()
        self._bad_starts = 0

    def run(self, cells: Sequence[PlannedCell]) -> None:
        """Run all of them; cells that end, with or without a result, are kept at once."""
        _write(self._log, b"")
        queue = deque(cells)
        try:
            while queue or any(worker.cell for worker in self._workers):
                busy = sum(worker.cell is not None for worker in self._workers)
                while len(self._workers) < min(self._jobs, len(queue) + busy):
                    with _single_threaded(), _interrupts_held():
                        self._workers.append(_start(self._log, self._threads))
                speaking = wait([worker.connection for worker in self._workers])
                for worker in [one for one in self._workers if one.connection in speaking]:
                    self._hear(worker, queue)
        finally:
            _stop([worker.process for worker in self._workers])

    def _hear(self, worker: _Worker, queue: deque[PlannedCell]) -> None:
        try:
            message = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._bury(worker, queue)
            return
        if worker.cell is not None:
            self._end(worker.cell, _cell_of(json.loads(message)))
            worker.cell = None
        worker.ready = True
        if queue:
            worker.cell = queue.popleft()
            self._progress.started(worker.cell)
            # A worker that has just died is noticed when it is listened to.
            with suppress(OSError):
                worker.connection.send(worker.cell.settings)

    def _bury(self, worker: _Worker, queue: deque[PlannedCell]) -> None:
        worker.connection.close()
        worker.process.join()
        self._workers.remove(worker)
        how, cell = _ending(worker.process.exitcode), worker.cell
        if not worker.ready:
            self._bad_starts += 1
            if self._bad_starts >= _BAD_STARTS:
                raise QuorsumError(f"worker processes cannot start ({how}); {self._log} says why")
        if cell is None:
            return
        self._tries[cell.id] += 1
        if self._tries[cell.id] < _TRIES:
            self._progress.retried(cell, how)
            queue.appendleft(cell)
        else:
            hint = "if memory was short, run fewer at a time with --jobs; the next run tries again"
            reason = f"the process of this cell died {_TRIES} times ({how}); {hint}"
            self._end(cell, Cell(cell.id, asdict(cell.settings), None, reason, 0.0, "crashed"))

    def _end(self, cell: PlannedCell, outcome: Cell) -> None:
        self._bad_starts = 0
        # What the worker calls the cell is of no interest: it was told settings only.
        outcome = Cell(cell.id, asdict(cell.settings), outcome.result, outcome.failed, outcome.seconds, outcome.state)
        self._keep(cell, outcome)
        self._progress.ended(cell, outcome)


def _start(log: Path, threads: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, str(log), threads), daemon=True, name="quorsum-lab")
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _stop(processes: Sequence[SpawnProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


@contextmanager
def _single_threaded() -> Iterator[None]:
    """The environment that a new process inherits: the libraries read it while they are loaded."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Put Ctrl-C off until a worker is there and known, and let the worker inherit that it hears of none.

    A terminal tells every process of the command. The runner ends its workers by itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    # The mask is what a worker inherits; it is not enough here, where another thread may take the signal.
    handler = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(-exitcode).name}"
    return f"exit status {exitcode}"


# --- the worker's side ---


def _work(connection: Connection, log: str, threads: int) -> None:
    """What a worker process does: say that it is there, then run one cell after another."""
    _die_with_the_runner()
    _write_to(log)
    connection.send_bytes(b"ready")
    while True:
        try:
            settings: Simulation = connection.recv()
        except EOFError:
            return
        connection.send_bytes(_dump(_outcome(settings, threads).to_json()))


@lru_cache(maxsize=2)
def _loaded(data: str, label: str | None, key: str | None, seed: int) -> Dataset:
    # Neighbours in a grid mostly have the same data, and reading them can take longer than the cell.
    return load_dataset(data, label=label, key=key, seed=seed)


def _outcome(settings: Simulation, threads: int) -> Cell:
    started = time.perf_counter()
    result: Mapping[str, Any] | None = None
    failed, state = None, "done"
    try:
        data = _loaded(settings.data, settings.label, settings.key, settings.seed)
        result = simulate(settings, build_world(settings, data), workers=threads)
        # A result that JSON cannot carry is an error of this cell, and not the end of its worker.
        _dump(result)
    except QuorsumError as error:
        result, failed, state = None, str(error), "failed"
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not stop the other cells
        traceback.print_exc()
        result, state = None, "crashed"
        failed = f"unexpected {type(error).__name__}: {error}; workers.log has the traceback, the next run tries again"
    return Cell("", {}, result, failed, round(time.perf_counter() - started, 3), state)


def _die_with_the_runner() -> None:
    runner = multiprocessing.parent_process()
    assert runner is not None  # noqa: S101 - multiprocessing's own promise

    def watch() -> None:
        wait([runner.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch").start()


def _write_to(log: str) -> None:
    """Send whatever libraries print to a file: stdout is the command's, and stderr shows its progress."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable()


# --- files ---


def _cell_path(folder: Path, name: str) -> Path:
    return folder / "cells" / f"{name}.json"


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(one.name for one in folder.iterdir() if one.name not in _OWN_FILES)
        if others and not (folder / "plan.json").exists():
            raise UsageError(f"{folder} holds other files, such as {others[0]}; choose an empty or a new folder")
        (folder / "cells").mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror or error}; choose another --out") from None
    if not os.access(folder, os.W_OK) or not os.access(folder / "cells", os.W_OK):
        raise UsageError(f"cannot write to {folder}: permission denied; choose another --out")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "lab.lock", timeout=0, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f"another lab run works in {folder}; wait for it, or choose another --out") from None
    try:
        # Left by a runner that was killed while it wrote.
        for leftover in (folder / "cells").glob("*.new"):
            leftover.unlink()
        yield
    finally:
        lock.release()


def _kept(folder: Path, cell: PlannedCell) -> Cell | None:
    path = _cell_path(folder, cell.id)
    if not _is_there(path):
        return None
    kept = _read_cell(path)
    open_again = kept.state == "crashed" or (kept.state == "not applicable" and cell.unfit is None)
    return None if open_again else kept


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; check its permissions") from None


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Settings(_Part):
    data: str
    sites: int
    poisoned: int
    attack: str
    rule: str | None = None
    suite: str
    tolerate: int | None = None
    rounds: int
    seed: int


class _Site(_Part):
    id: str
    poisoned: bool


class _Round(_Part):
    round: int
    accuracy: float
    metrics: dict[str, float] = {}
    accepted: list[str]
    rejected: list[str]
    failed: str | None = None


class _Last(_Part):
    accuracy: float
    metrics: dict[str, float] = {}
    initial_accuracy: float | None = None
    primary: str | None = None
    attack_success: float | None = None
    poisoned_rejected: float | None = None
    honest_rejected: float | None = None


class _Result(_Part):
    config: _Settings
    versions: dict[str, str] = {}
    sites: list[_Site]
    rounds: list[_Round]
    final: _Last


class _CellFile(_Part):
    """What reports and advice read of a cell."""

    id: str
    settings: _Settings
    result: _Result | None
    failed: str | None
    seconds: float
    state: Literal["done", "failed", "not applicable", "crashed"]


def _read_cell(path: Path) -> Cell:
    tree = _load(path)
    if tree.get("id", path.stem) != path.stem:
        raise DataError("not-a-cell", f"{path}: it holds cell {str(tree['id'])[:40]!r}; {_REMOVE}")
    try:
        _CellFile.model_validate(tree)
    except ValidationError as error:
        # Whatever is wrong here would end a report in the middle.
        detail = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in detail["loc"])
        wrong = f"{where}: {detail['msg'][:1].lower()}{detail['msg'][1:]}"
        raise DataError("not-a-cell", f"{path}: this is no cell of a lab run ({wrong}); {_REMOVE}") from None
    cell = _cell_of(tree)
    if (cell.state == "done") != (cell.result is not None):
        has = "no result" if cell.result is None else "a result"
        raise DataError("not-a-cell", f"{path}: a cell with {has} cannot be in state {cell.state!r}; {_REMOVE}")
    return cell


_REMOVE: Final = "remove the file, and the next run makes it anew"


def _cell_of(tree: Mapping[str, Any]) -> Cell:
    return Cell(
        id=str(tree["id"]),
        settings=dict(tree["settings"]),
        result=None if tree["result"] is None else dict(tree["result"]),
        failed=tree["failed"],
        seconds=float(tree["seconds"]),
        state=tree["state"],
    )


def _load(path: Path) -> Mapping[str, Any]:
    try:
        tree = json.loads(path.read_bytes(), parse_constant=_no_number)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    except (ValueError, RecursionError) as error:
        raise DataError("not-json", f"{path}: this is not JSON ({error}); {_REMOVE}") from None
    if not isinstance(tree, dict) or tree.get("schema_version") != SCHEMA_VERSION:
        raise DataError("other-schema", f"{path}: its schema_version is not {SCHEMA_VERSION}; {_REMOVE}")
    return tree


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number in JSON")


def _write(path: Path, data: bytes) -> None:
    try:
        durable.replace_file(path, [data])
    except OSError as error:
        hint = "make room or check its permissions, and run it again"
        raise QuorsumError(f"cannot write {path}: {error.strerror}; {hint}") from None


def _dump(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, allow_nan=False) + "\n").encode()


def _versions() -> dict[str, str]:
    names = ("quorsum", "flwr", "torch", "tenseal", "numpy")
    return {name: version(name) for name in names} | {"python": platform.python_version()}
