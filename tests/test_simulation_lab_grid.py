"""Grid files: what they span, what tells one cell from another, and every refusal."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.errors import DataError, UsageError
from quorsum.simulation import lab_grid
from quorsum.simulation.lab_grid import Grid, check_data, data_digest, plan_cells, read_grid
from quorsum.simulation.run import Simulation

EXAMPLES = sorted((Path(__file__).parent.parent / "examples" / "lab").glob("*.toml"))
HEAD = 'name = "some"\n'
SEEDS = "[grid]\nseed = [1]\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "grid.toml"
    path.write_text(text, encoding="utf-8")
    return path


def spanned(folder: Path, text: str) -> list[Simulation]:
    return [cell.settings for cell in plan_cells(read_grid(written(folder, text)))]


def test_the_product_is_in_order_and_the_last_list_varies_fastest(tmp_path: Path) -> None:
    text = HEAD + '[base]\nsuite = "plain"\n[grid]\nattack = ["none", "ipm"]\npoisoned = [1, 2]\nseed = [3, 1]\n'
    cells = spanned(tmp_path, text)
    assert [(c.attack, c.poisoned, c.seed) for c in cells] == [
        (attack, poisoned, seed) for attack in ("none", "ipm") for poisoned in (1, 2) for seed in (3, 1)
    ]
    assert {c.suite for c in cells} == {"plain"}


def test_what_is_left_open_is_filled_in(tmp_path: Path) -> None:
    (cell,) = spanned(tmp_path, HEAD + SEEDS)
    assert cell == Simulation(seed=1).checked()
    assert (cell.rule, cell.tolerate, cell.clip) == ("spectral", 2, True)


def test_honest_sites_come_besides_the_poisoned(tmp_path: Path) -> None:
    cells = spanned(tmp_path, HEAD + 'honest = 10\n[base]\nsuite = "plain"\n[grid]\npoisoned = [0, 1, 4]\n')
    assert [c.sites for c in cells] == [10, 11, 14]


def test_a_data_set_can_be_given_besides(tmp_path: Path) -> None:
    path = written(tmp_path, HEAD + '[base]\ndata = "mnist"\n' + SEEDS)
    (cell,) = plan_cells(read_grid(path, data="breast-cancer"))
    assert cell.settings.data == "breast-cancer"
    assert cell.id != plan_cells(read_grid(path))[0].id


def test_settings_that_come_to_the_same_are_one_cell(tmp_path: Path) -> None:
    cells = spanned(tmp_path, HEAD + '[base]\nsuite = "plain"\n[grid]\nrule = ["krum", " krum"]\nseed = [1, 2]\n')
    assert [c.seed for c in cells] == [1, 2]


def test_numbers_are_alike_however_they_are_written(tmp_path: Path) -> None:
    one = plan_cells(read_grid(written(tmp_path, HEAD + "[base]\nalpha = 1\n" + SEEDS)))
    other = plan_cells(read_grid(written(tmp_path, HEAD + "[base]\nalpha = 1.0\n" + SEEDS)))
    assert one[0].id == other[0].id


@settings(max_examples=25, deadline=None)
@given(
    poisoned=st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
    rounds=st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True),
)
def test_every_combination_is_one_cell_with_an_id_of_its_own(
    poisoned: list[int], seeds: list[int], rounds: list[int]
) -> None:
    axes = (("poisoned", tuple(poisoned)), ("rounds", tuple(rounds)), ("seed", tuple(seeds)))
    cells = plan_cells(Grid("some", {"suite": "plain", "rule": "mean"}, axes, 7, b""))
    assert len(cells) == math.prod(len(values) for _, values in axes)
    assert len({cell.id for cell in cells}) == len(cells)
    assert all(len(cell.id) == 24 and int(cell.id, 16) >= 0 for cell in cells)


def test_the_id_follows_settings_data_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "own.csv"

    def named(rows: str, label: str) -> str:
        table.write_text(rows)
        data_digest.cache_clear()
        text = HEAD + f'[base]\ndata = "{table}"\nlabel = "{label}"\n' + SEEDS
        return plan_cells(read_grid(written(tmp_path, text)))[0].id

    first = named("a,b\n1,0\n", "b")
    assert named("a,b\n1,0\n", "b") == first
    assert named("a,b\n1,1\n", "b") != first
    assert named("a,b\n1,0\n", "a") != first
    monkeypatch.setattr(lab_grid, "__version__", "0.0.0")
    assert named("a,b\n1,0\n", "b") != first


def test_a_folder_of_data_is_told_by_the_names_and_contents_of_its_files(tmp_path: Path) -> None:
    def digest() -> str | None:
        data_digest.cache_clear()
        return data_digest(str(tmp_path))

    (tmp_path / "a").write_bytes(b"1")
    first = digest()
    (tmp_path / "b").write_bytes(b"")
    second = digest()
    (tmp_path / "a").write_bytes(b"2")
    assert len({first, second, digest()}) == 3
    assert data_digest("digits") is None


def test_only_rules_that_need_a_trusted_site_get_it(tmp_path: Path) -> None:
    base = '[base]\nsuite = "plain"\nreference = "site-02"\n'
    cells = spanned(tmp_path, HEAD + base + '[grid]\nrule = ["mean", "fltrust", "krum"]\n')
    assert [c.reference for c in cells] == [None, "site-02", None]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[base]\nsites = 10\n[grid]\nsuite = ["sealed"]\npoisoned = [1, 4]\n', "needs at least 17 sites"),
        ('[grid]\nsuite = ["sealed", "plain"]\nrule = ["median"]\n', "inner products"),
        ('[grid]\nsuite = ["sealed", "plain"]\nattack = ["wrong-points"]\n', "attacks the sealed protocol"),
    ],
)
def test_a_combination_that_cannot_be_is_kept_with_its_reason(tmp_path: Path, text: str, says: str) -> None:
    cells = plan_cells(read_grid(written(tmp_path, HEAD + text)))
    reasons = [cell.unfit for cell in cells if cell.unfit]
    assert len(cells) == 2
    assert len(reasons) == 1
    assert says in reasons[0]
    unfit = next(cell.settings for cell in cells if cell.unfit)
    assert None not in (unfit.rule, unfit.tolerate)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = ", "is not TOML"),
        (SEEDS, "name: missing"),
        (HEAD, "grid: missing"),
        (HEAD + "[grid]\n", "grid: this is empty"),
        ("name = 3\n" + SEEDS, "line 1: name: input should be a valid string, got 3"),
        ('name = "<b>"\n' + SEEDS, "name"),
        (HEAD + "colour = 1\n" + SEEDS, "colour: unknown key"),
        (HEAD + "honest = 0\n" + SEEDS, "honest"),
        (HEAD + "[gird]\nseed = [1]\n", "gird: unknown key (did you mean grid?)"),
        (
            "name = '<b>'\n" + SEEDS,
            "line 1: name: 1 to 80 letters, digits, spaces and . , + - _ are allowed, got '<b>'",
        ),
        (
            HEAD + "[base]\nrulle = 'krum'\n" + SEEDS,
            "line 3: base.rulle: unknown key (did you mean rule?); known: data",
        ),
        (HEAD + "[base]\nrounds = 'many'\n" + SEEDS, "base.rounds: input should be a valid integer"),
        (HEAD + "[base]\nrounds = true\n" + SEEDS, "base.rounds"),
        (HEAD + "[base]\nrounds = 1.5\n" + SEEDS, "base.rounds"),
        (HEAD + "[base]\nlr = nan\n" + SEEDS, "base.lr"),
        (HEAD + "[grid]\nseed = []\n", "grid.seed: this is empty"),
        (HEAD + "[grid]\nseed = 1\n", "grid.seed: input should be a valid list"),
        (HEAD + "[grid]\nseed = [1, 'two']\n", "grid.seed"),
        (HEAD + "[grid]\nseed = [1, 1]\n", "grid.seed lists 1 twice"),
        (HEAD + "[base]\nseed = 1\n" + SEEDS, "seed stands in [base] and in [grid]"),
        (HEAD + "honest = 9\n[base]\nsites = 10\n" + SEEDS, "leave sites out"),
        (HEAD + "[grid]\nruntime = ['ray', 'local']\n", "give it in [base]"),
        (HEAD + f"[grid]\nseed = {list(range(201))}\nrounds = {list(range(1, 101))}\n", "20100 cells are more than"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as refusal:
        read_grid(path)
    assert str(refusal.value).startswith(str(path))
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[grid]\nattack = ['bribe']\n", "the cell attack=bribe: "),
        ("[grid]\nattack = ['wrong-points']\nrule = ['krumm']\nsuite = ['plain']\n", "krumm"),
        ("[grid]\nattack = ['wrong-points']\nsuite = ['open']\n", "no suite is called 'open'"),
        ("[grid]\nrule = ['fltrust']\nsuite = ['plain']\n", "needs a trusted site"),
        ("[grid]\nsuite = ['open']\n", "no suite is called 'open'"),
        ("[grid]\nsplit = ['iid', 'random']\nseed = [1]\n", "the cell split=random seed=1: "),
        ("[grid]\nmodel = ['resnet']\n", "no model is called 'resnet'"),
        ("[grid]\nseed = [1, -1]\n", "the cell seed=-1: seed must lie in 0 .. 2"),
        (f"[grid]\nseed = [{2**63}]\n", "the cell seed=9223372036854775808: seed must lie in 0 .. 2"),
        ("[grid]\nsites = [2]\n", "--sites must lie in"),
        ("[grid]\nsites = [4]\n", "no cell can be run"),
    ],
)
def test_a_wrong_value_stops_the_grid_and_names_the_cell(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError) as refusal:
        plan_cells(read_grid(written(tmp_path, HEAD + text)), name="some.toml")
    assert str(refusal.value).startswith("some.toml: ")
    assert says in str(refusal.value)


def test_files_that_are_no_grids(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give the path of a grid file"):
        read_grid(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="cannot read"):
        read_grid(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not TOML"):
        read_grid(tmp_path / "binary.toml")
    (tmp_path / "long.toml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(UsageError, match="this is not a grid"):
        read_grid(tmp_path / "long.toml")


def test_data_in_a_list_cannot_be_replaced(tmp_path: Path) -> None:
    path = written(tmp_path, HEAD + '[grid]\ndata = ["digits", "breast-cancer"]\n')
    with pytest.raises(UsageError, match="leave --data out"):
        read_grid(path, data="digits")
    assert [cell.settings.data for cell in plan_cells(read_grid(path))] == ["digits", "breast-cancer"]


def test_data_that_cannot_be_used_are_found_before_anything_runs(tmp_path: Path) -> None:
    cells = plan_cells(read_grid(written(tmp_path, HEAD + '[base]\ndata = "nowhere.csv"\nlabel = "y"\n' + SEEDS)))
    with pytest.raises(DataError, match=r"nowhere\.csv"):
        check_data(cells)
    check_data(plan_cells(read_grid(written(tmp_path, HEAD + SEEDS))))


def test_a_model_that_is_none_for_these_data_is_found_before_anything_runs(tmp_path: Path) -> None:
    cells = plan_cells(read_grid(written(tmp_path, HEAD + '[grid]\nmodel = ["auto", "transformer"]\n')))
    with pytest.raises(UsageError, match="the cell model=transformer: "):
        check_data(cells)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_can_be_run(path: Path) -> None:
    cells = plan_cells(read_grid(path))
    assert read_grid(path).name == path.stem
    assert f"quorsum lab run examples/lab/{path.name} " in path.read_text(encoding="utf-8")
    assert sum(cell.unfit is None for cell in cells) > len(cells) / 2


def test_the_smoke_grid_has_200_cells() -> None:
    assert [len(plan_cells(read_grid(path))) for path in EXAMPLES if path.stem == "smoke"] == [200]
