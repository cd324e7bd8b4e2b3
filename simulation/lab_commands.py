"""``quorsum lab``: a grid of simulations, its report, and what follows from it.

stdout carries the result only (a table, paths, or one JSON object with ``--json``); everything else goes to stderr as
``quorsum: ...``, and every end names the next command. Exit status: 0 done, 2 some cells have no verdict, 64 wrong
usage, 130 interrupted (what has ended is kept).

Heavy modules are imported inside the commands, so that ``quorsum lab --help`` is instant.
"""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from quorsum.simulation.lab_grid import PlannedCell
    from quorsum.simulation.lab_run import Cell

__all__ = ["app"]

_OK, _UNKNOWN, _INTERRUPTED = 0, 2, 130
_PARTS = 10

app = typer.Typer(
    name="lab", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Run a grid of attacks, rules and data; report on it; ask it which rule to use.",
)  # fmt: skip

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]


@app.command()
def run(
    grid: Annotated[Path, typer.Argument(help="the grid, a TOML file", metavar="GRID.toml")],
    out: Annotated[Path, typer.Option(help="folder for the results; cells that are there are not run again")],
    data: Annotated[
        str | None, typer.Option(help="use this in place of the data in [base]: a name, a file or a folder")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="cells at a time (default: one for each core)")] = None,
    as_json: AsJson = False,
) -> None:
    """Run every cell of a grid that has not ended yet. The same command goes on after an interruption."""
    from quorsum.simulation.lab_grid import check_data, plan_cells, read_grid
    from quorsum.simulation.lab_run import cores, run_lab

    started = time.perf_counter()
    command = _run_command(grid, out, data, jobs)
    read = read_grid(grid, data=data)
    cells = plan_cells(read, name=str(grid))
    check_data(cells)
    display = _Display(command)
    try:
        with display:
            ended = run_lab(read, cells, out, command=command, jobs=jobs or cores(), progress=display)
    except KeyboardInterrupt:
        _say(f"{display.ended_cells} of {len(cells)} cells have ended and are kept; go on with: {command}")
        raise typer.Exit(_INTERRUPTED) from None
    states = Counter(cell.state for cell in ended)
    summary = {
        "schema_version": 1, "folder": str(out), "cells": len(ended), "run_now": display.run_now,
        "done": states["done"], "failed": states["failed"], "not_applicable": states["not applicable"],
        "crashed": states["crashed"], "seconds": round(time.perf_counter() - started, 1),
        "next": shlex.join(["quorsum", "lab", "report", str(out)]),
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        Console().print(_summary_table(read.name, summary))
    raise typer.Exit(_concluded(ended, summary, command))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="the folder of quorsum lab run", metavar="DIR")],
    as_json: AsJson = False,
) -> None:
    """Write one page, its pictures and a table of all cells into the folder."""
    from quorsum.errors import UsageError
    from quorsum.simulation.lab_run import read_cells, read_plan, unfinished

    plan, missing = read_plan(folder), unfinished(folder)
    if not any(cell.result for cell in read_cells(folder)):
        raise UsageError(f"no cell in {folder} has a result yet; run: {plan.command}")
    from quorsum.simulation.lab_report import write_report

    paths = [str(path) for path in write_report(folder)]
    if as_json:
        typer.echo(json.dumps({"schema_version": 1, "files": paths, "missing_cells": missing}, indent=2))
    else:
        typer.echo("\n".join(paths))
    if missing:
        _say(f"{missing} of {len(plan.cells)} cells have not ended yet; go on with: {plan.command}")
    _say(f"open {paths[0]} in a browser; to choose a rule, run: {_advise_command(folder)}")


@app.command()
def advise(
    sites: Annotated[int, typer.Option(help="n, sites of the federation")],
    tolerate: Annotated[int, typer.Option(help="f, malicious ones to tolerate")],
    suite: Annotated[str, typer.Option(help="cipher suite: sealed, ckks or plain")] = "sealed",
    evidence: Annotated[
        list[Path] | None, typer.Option(help="a folder of quorsum lab run; several are put together")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which rule to use, from what was measured, and what is proven about it."""
    from quorsum.errors import UsageError
    from quorsum.simulation.lab_run import read_cells, read_plan

    cells = [cell.to_json() for folder in evidence or [] for cell in read_cells(folder)]
    if evidence and not cells:
        # Nothing measured there must not silently become what comes with quorsum.
        raise UsageError(f"no cell in {evidence[0]} has ended yet; run: {read_plan(evidence[0]).command}")
    from quorsum.simulation.lab_advise import advise as find_advice

    advice = find_advice(cells, sites, tolerate, suite)
    if as_json:
        typer.echo(json.dumps(advice.to_json(), indent=2, allow_nan=False))
    else:
        Console().print(advice.table())


# --- what the commands say ---


def _say(text: str) -> None:
    typer.echo(f"quorsum: {text}", err=True)


def _run_command(grid: Path, out: Path, data: str | None, jobs: int | None) -> str:
    words = ["quorsum", "lab", "run", str(grid), "--out", str(out)]
    words += [] if data is None else ["--data", data]
    words += [] if jobs is None else ["--jobs", str(jobs)]
    return shlex.join(words)


def _advise_command(folder: Path) -> str:
    return f"{shlex.join(['quorsum', 'lab', 'advise', '--evidence', str(folder)])} --sites N --tolerate F"


def _summary_table(name: str, summary: dict[str, Any]) -> Table:
    table = Table("cells", "done", "failed", "not applicable", "crashed", "run now", title=Text(name), box=None)
    keys = ("cells", "done", "failed", "not_applicable", "crashed", "run_now")
    table.add_row(*(str(summary[key]) for key in keys))
    return table


def _concluded(cells: Sequence[Cell], summary: dict[str, Any], command: str) -> int:
    """Name what went wrong and the next command; the exit status."""
    bad = [cell for cell in cells if cell.state in ("failed", "crashed")]
    if bad:
        _say(f"{len(bad)} cells have no result; the first, {bad[0].id}: {bad[0].failed}")
    if summary["crashed"]:
        _say(f"to try those that crashed again, run: {command}")
    if summary["done"]:
        _say(f"run: {summary['next']}")
    elif not summary["crashed"]:
        _say(f"there is nothing to report on; change the grid and run: {command}")
    return _UNKNOWN if bad else _OK


def _span(seconds: float) -> str:
    """A length of time in the units in which people wait."""
    seconds = max(1, round(seconds))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds % 60:02d} s" if minutes else f"{seconds} s"


class _TimeLeft(ProgressColumn):
    """How long the rest takes, from the mean of the cells that were run; it counts down between them."""

    def render(self, task: Task) -> Text:
        until = task.fields.get("until")
        return Text("" if until is None else f"about {_span(until - time.monotonic())} left", style="cyan")


class _Display:
    """A bar on a terminal, and elsewhere one line for each tenth of the way."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            MofNCompleteColumn(), BarColumn(bar_width=24), _TimeLeft(), TextColumn("{task.description}", markup=False),
            console=self._console, transient=True, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None)
        self._working: dict[str, str] = {}
        self._kept = self._todo = 0
        self._began = 0.0
        self.run_now = 0

    @property
    def ended_cells(self) -> int:
        """Cells of the grid that have ended so far, in this run and before."""
        return self._kept + self.run_now

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def began(self, kept: int, todo: int, jobs: int) -> None:
        """Say what there is to do."""
        self._kept, self._todo = kept, todo
        before = f"; {kept} had ended before or cannot be run" if kept else ""
        self._line(f"{todo} cells to run, {jobs} at a time{before}" if todo else f"nothing to run{before}")
        self._bar.update(self._task, total=kept + todo, completed=kept, description="starting")

    def started(self, cell: PlannedCell) -> None:
        """Show the cell that has been taken last."""
        # What the processes need to get going once is no measure of the cells to come.
        self._began = self._began or time.monotonic()
        self._working[cell.id] = cell.label
        self._show()

    def retried(self, cell: PlannedCell, reason: str) -> None:
        """Say why a cell is tried again."""
        self._working.pop(cell.id, None)
        self._line(f"the process of a cell died ({reason}); it is tried once more: {cell.label}")

    def ended(self, cell: PlannedCell, outcome: Cell) -> None:
        """Count a cell, and say why it has no result."""
        self._working.pop(cell.id, None)
        self.run_now += 1
        if outcome.failed is not None:
            self._line(f"{outcome.state}: {cell.label}: {outcome.failed}")
        self._show()
        tenths = [number * _PARTS // self._todo for number in (self.run_now - 1, self.run_now)]
        if not self._console.is_terminal and tenths[0] < tenths[1]:
            left = "" if self.run_now == self._todo else f", about {_span(self._left())} left"
            self._line(f"{self.ended_cells} of {self._kept + self._todo} cells{left}")

    def _show(self) -> None:
        more = f" (+{len(self._working) - 1})" if len(self._working) > 1 else ""
        newest = next(reversed(self._working.values()), "")
        until = time.monotonic() + self._left() if self.run_now else None
        # Drawn at once: a short cell would otherwise be over before anybody has seen its name.
        self._bar.update(self._task, completed=self.ended_cells, description=newest + more, until=until, refresh=True)

    def _left(self) -> float:
        return (time.monotonic() - self._began) / self.run_now * (self._todo - self.run_now)

    def _line(self, text: str) -> None:
        self._bar.console.print(f"quorsum: {text}", markup=False, soft_wrap=True)
