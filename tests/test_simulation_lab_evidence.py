import json
import subprocess
import sys
from pathlib import Path

import pytest
from lab_cells import STEADY, cell, grid, write_lab

from quorsum.errors import DataError, UsageError
from quorsum.simulation.lab_evidence import built_in_rows, evidence_text, rows_from_cells, rows_from_json


def test_a_row_says_what_was_measured_and_where() -> None:
    cells = grid(STEADY | {("spectral", "dba"): (0.9, 0.9, 0.9)}, success={"dba": 0.25})
    (row,) = (row for row in rows_from_cells(cells) if row.rule == "spectral")
    assert (row.name, row.scene, row.suite) == ("spectral", "digits, iid, 3 rounds", "plain")
    assert (row.sites, row.poisoned, row.tolerate, row.share) == (10, 2, 2, 0.2)
    assert row.worst == {1: 0.8, 2: 0.9, 3: 0.82}
    assert (row.worst_attack, row.attacks) == ("alie", ("sign-flip", "alie", "dba"))
    assert row.clean == {1: 0.94, 2: 0.95, 3: 0.93}
    assert row.success == {1: 0.25, 2: 0.25, 3: 0.25}


def test_scenes_and_defences_are_told_apart() -> None:
    attacked = {("spectral", "a"): (0.9,)}
    cells = grid(attacked, site_momentum=0.9, gate=True) + grid(attacked, split="similarity:0", model="cnn")
    cells += grid(attacked, alpha=0.3) + grid(attacked, alpha=0.3, data="/x/mnist", label="y")
    rows = rows_from_cells(cells)
    assert [row.name for row in rows] == ["spectral, gate, site momentum 0.9"] + ["spectral"] * 3
    assert [row.scene for row in rows[1:]] == [
        "digits, similarity:0, cnn, 3 rounds", "digits, dirichlet:0.3, 3 rounds", "mnist, dirichlet:0.3, 3 rounds",
    ]  # fmt: skip
    assert len({row.scene_id for row in rows}) == 4


def test_suites_share_a_scene() -> None:
    rows = rows_from_cells(grid({("spectral", "a"): (0.9,)}) + grid({("spectral", "a"): (0.9,)}, suite="sealed"))
    assert len({row.scene_id for row in rows}) == 1
    assert [row.suite for row in rows] == ["plain", "sealed"]


def test_what_says_nothing_about_a_rule_at_its_f_is_left_out() -> None:
    assert rows_from_cells(grid({("spectral", "a"): (0.9,)}, tolerate=1)) == ()
    assert rows_from_cells(grid({("spectral", "none"): (0.9,)})) == ()
    holes = grid({("spectral", "a"): (0.9,), ("mean", "b"): (0.9,)})
    assert rows_from_cells([*holes, cell(None, failed="no")]) == ()


def test_file_is_read_back(tmp_path: Path) -> None:
    folder = write_lab(tmp_path / "lab", grid(STEADY))
    text = evidence_text([folder, folder])
    tree = json.loads(text)
    assert tree["schema_version"] == 1
    assert [source["command"] for source in tree["sources"]] == ["quorsum lab run a.toml --out lab"] * 2
    assert rows_from_json(tree, "x") == rows_from_cells(grid(STEADY)) * 2
    assert json.loads(evidence_text([]))["rows"] == []


def test_command_that_makes_the_file(tmp_path: Path) -> None:
    folder = write_lab(tmp_path / "lab", grid(STEADY))
    done = subprocess.run(
        [sys.executable, "-m", "quorsum.simulation.lab_evidence", folder], capture_output=True, text=True, check=True
    )
    assert done.stdout == evidence_text([folder])


def test_built_in_evidence_can_be_read() -> None:
    for row in built_in_rows():
        assert row.worst
        assert row.poisoned == row.tolerate


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ([], "no evidence of schema_version 1"),
        ({"schema_version": 2}, "no evidence of schema_version 1"),
        ({"schema_version": 1}, "cannot be read"),
        ({"schema_version": 1, "rows": [{}]}, "cannot be read"),
        ({"schema_version": 1, "rows": [{"attacks": [], "worst": 3, "clean": {}, "success": {}}]}, "cannot be read"),
        ({"schema_version": 1, "rows": [{"attacks": [], "worst": {"x": 1}}]}, "cannot be read"),
    ],
)
def test_files_of_another_shape_are_refused(tree: object, said: str) -> None:
    with pytest.raises(DataError, match=f"^mine.json .*{said}.*make it again"):
        rows_from_json(tree, "mine.json")


def test_folders_without_a_lab_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no lab run"):
        evidence_text([tmp_path])
