"""A folder of a lab run that somebody has laid hands on: what is wrong is named, and nothing else happens."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab_cells import cell, grid, write_lab

from quorsum.cli import run as command_line
from quorsum.errors import DataError, UsageError
from quorsum.simulation.lab_report import write_report
from quorsum.simulation.lab_run import read_cells, read_plan, unfinished

Tree = dict[str, Any]


def lab(folder: Path) -> tuple[Path, Path]:
    """A lab run of two cells, and the file of the second."""
    cells = [cell(0.8, rule="mean"), cell(0.9, rule="spectral")]
    return write_lab(folder, cells), folder / "cells" / f"{cells[1]['id']}.json"


def changed(path: Path, change: Callable[[Tree], Any]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update(result={}), "result.config: field required"),
        (lambda t: t["result"].pop("final"), "result.final: field required"),
        (
            lambda t: t["result"]["final"].update(accuracy="high"),
            "result.final.accuracy: input should be a valid number",
        ),
        (lambda t: t["result"]["final"].update(accuracy=float("nan")), "NaN is no number"),
        (lambda t: t["result"]["final"].update(metrics=None), "result.final.metrics"),
        (lambda t: t["result"]["rounds"][0].pop("rejected"), "result.rounds.0.rejected: field required"),
        (lambda t: t["result"].update(sites=[1]), "result.sites.0"),
        (lambda t: t["result"]["config"].update(seed="one"), "result.config.seed"),
        (lambda t: t.update(settings={}), "settings.data: field required"),
        (lambda t: t.update(settings=[]), "settings"),
        (lambda t: t.update(failed=5), "failed: input should be a valid string"),
        (lambda t: t.update(state="odd"), "state: input should be 'done', 'failed'"),
        (lambda t: t.update(result=None), "a cell with no result cannot be in state 'done'"),
        (lambda t: t.update(state="crashed"), "a cell with a result cannot be in state 'crashed'"),
    ],
)
def test_a_cell_that_is_json_and_no_cell_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Tree], Any], says: str
) -> None:
    folder, path = lab(tmp_path / "lab")
    changed(path, change)
    advise = ["advise", "--sites", "10", "--tolerate", "2", "--suite", "plain", "--evidence", str(folder)]
    for command in (["report", str(folder)], advise):
        assert command_line(["lab", *command]) == 64
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"quorsum: {path}: ")
        assert says in said.err
        assert said.err.endswith("remove the file, and the next run makes it anew\n")


def test_a_cell_nested_without_end_is_named(tmp_path: Path) -> None:
    folder, path = lab(tmp_path / "lab")
    path.write_text("[" * 200_000)
    with pytest.raises(DataError, match=rf"{path.name}: this is not JSON"):
        read_cells(folder)


def test_a_cell_that_cannot_be_read_is_not_to_be_removed(tmp_path: Path) -> None:
    folder, path = lab(tmp_path / "lab")
    content = path.read_bytes()
    # There is a file, and reading it is an error of the disk: the result in it may be whole.
    path.unlink()
    os.symlink("/proc/self/mem", path)
    with pytest.raises(UsageError, match=rf"cannot read .*{path.name}: .*; check its permissions"):
        read_cells(folder)
    path.unlink()
    path.write_bytes(content)
    assert len(read_cells(folder)) == 2
    (folder / "cells").rename(folder / "away")
    os.symlink("x" * 300, folder / "cells")
    for reader in (read_cells, unfinished, write_report):
        with pytest.raises(UsageError, match=r"cannot read .*\.json: .*; check its permissions"):
            reader(folder)


def test_ids_that_would_leave_the_folder_or_have_no_file_are_named(tmp_path: Path) -> None:
    folder, path = lab(tmp_path / "lab")
    for odd in ("../../elsewhere", "x" * 400, path.stem + "\n", ""):
        changed(folder / "plan.json", lambda t, odd=odd: t.update(cells=[path.stem, odd]))  # type: ignore[misc]
        for reader in (read_plan, read_cells, unfinished, write_report):
            with pytest.raises(DataError, match="is no id of a cell; run the grid again"):
                reader(folder)


def test_names_that_are_markup_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    cells = grid({(evil, evil): (0.8, 0.9, 0.7), ("mean", evil): (0.6, 0.5, 0.4)}, split=evil)
    failed = cell(None, failed=evil, rule=evil, seed=9)
    folder = write_lab(tmp_path / "lab", [*cells, failed], name=evil, grid=f"# {evil}")
    page = write_report(folder)[0].read_text(encoding="utf-8")
    assert evil not in page
    assert "&lt;script&gt;" in page
