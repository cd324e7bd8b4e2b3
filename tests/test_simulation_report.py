import copy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from quorsum.errors import UsageError
from quorsum.simulation.report import _spread, comparison_table, draw_comparison, draw_rounds, summary_table

PNG = b"\x89PNG\r\n\x1a\n"


def result(
    *,
    sites: int = 5,
    poisoned: int = 1,
    rounds: int = 3,
    attack: str = "sign-flip",
    rule: str = "multi-krum",
    missed: tuple[int, ...] = (),
    lost: tuple[int, ...] = (),
    initial: float | None = 0.1,
) -> dict[str, Any]:
    """The last sites are poisoned; rejected in every round but ``missed``, and the first site in ``lost`` rounds."""
    ids = [f"site-{number:02}" for number in range(1, sites + 1)]
    bad = ids[sites - poisoned :] if poisoned else []
    records = []
    for number in range(1, rounds + 1):
        rejected = [*(bad if number not in missed else []), *(ids[:1] if number in lost else [])]
        accepted = [site for site in ids if site not in rejected]
        records.append(
            {
                "round": number,
                "accuracy": 0.5 + 0.4 * number / rounds,
                "accepted": accepted,
                "rejected": rejected,
                "reasons": dict.fromkeys(rejected, "far from the others"),
                "weights": dict.fromkeys(accepted, 1 / max(len(accepted), 1)),
                "seconds": {"train": 0.01, "seal": 0.2, "geometry": 0.5, "open": 0.25, "total": 1.5},
                "bytes": {"up_per_site": 456_700, "down_per_site": 999},
            }
        )
    final: dict[str, Any] = {"accuracy": 0.9, "poisoned_rejected": 1.0, "honest_rejected": 0.0}
    return {
        "schema_version": 1,
        "config": {
            "data": "some/folder/digits.npz", "sites": sites, "poisoned": poisoned, "attack": attack, "rule": rule,
            "tolerate": 1, "suite": "ckks", "rounds": rounds, "alpha": None, "seed": 1, "runtime": "local",
        },
        "sites": [{"id": site, "poisoned": site in bad, "rows": 9} for site in ids],
        "rounds": records,
        "final": final if initial is None else final | {"initial_accuracy": initial},
    }  # fmt: skip


def text_of(table: Table) -> str:
    console = Console(width=160, record=True, file=None, quiet=False)
    with console.capture() as caught:
        console.print(table)
    return caught.get()


def pixels(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    from matplotlib.image import imread

    return np.asarray(imread(path))


def test_summary_counts_who_was_rejected() -> None:
    text = text_of(summary_table(result(missed=(2,), lost=(1, 3))))
    assert "2 of 3 (67 %)" in text
    assert "2 of 12 (17 %)" in text
    assert "digits.npz, even split, 5 sites" in text
    assert "some/folder" not in text
    assert "sign-flip by 1 of 5 sites" in text
    assert "90.0 % after 3 rounds (from 10.0 %)" in text
    assert "456.7 kB up, 999 B down" in text
    assert "4.5 in all" in text
    assert "failed" not in text


def test_summary_without_attack_or_initial_accuracy() -> None:
    text = text_of(summary_table(result(poisoned=0, attack="none", initial=None)))
    assert "no attack" in text
    assert "none there" in text
    assert "from" not in text


def test_summary_says_whether_a_backdoor_works_and_which_measure_counts() -> None:
    one = result()
    one["config"]["split"] = "similarity:0"
    one["final"] |= {"attack_success": 0.034, "primary": "average_precision", "metrics": {"average_precision": 0.71}}
    text = text_of(summary_table(one))
    assert "split similarity:0" in text
    assert "3.4 % of inputs with the trigger" in text
    assert "71.0 %, the measure to compare by" in text
    assert "attack success" not in text_of(summary_table(result()))


def test_summary_names_failed_rounds_and_the_split() -> None:
    one = result()
    one["rounds"][1]["failed"] = "too few sites answered"
    one["config"]["alpha"] = 0.5
    text = text_of(summary_table(one))
    assert "failed rounds" in text
    assert "Dirichlet(0.5) split" in text


@pytest.mark.parametrize(("count", "shown"), [(1.5e6, "1.5 MB"), (2.5e9, "2.5 GB"), (0, "0 B")])
def test_sizes_are_readable(count: float, shown: str) -> None:
    one = result()
    for record in one["rounds"]:
        record["bytes"]["up_per_site"] = count
    assert f"{shown} up" in text_of(summary_table(one))


def test_comparison_has_one_row_a_result() -> None:
    table = comparison_table([("first", result()), ("second", result(missed=(1, 2, 3)))])
    assert table.row_count == 2
    text = text_of(table)
    assert "3 of 3" in text
    assert "0 of 3" in text


@pytest.mark.parametrize(
    ("one", "height"),
    [
        (result(missed=(2,), lost=(3,)), 800),
        (result(poisoned=0, attack="none", initial=None, rounds=1), 800),
        (result(sites=40, poisoned=7, rounds=60), 1347),
        (result(sites=200, poisoned=60, lost=(1,)), 1803),
        (result(sites=200, poisoned=200), 1803),
    ],
)
def test_rounds_are_drawn(tmp_path: Path, one: dict[str, Any], height: int) -> None:
    path = tmp_path / "rounds.png"
    before = copy.deepcopy(one)
    draw_rounds(one, path)
    assert path.read_bytes().startswith(PNG)
    assert pixels(path).shape[:2] == (height, 1200)
    assert one == before


def test_margins_are_blank_so_that_nothing_is_cut_off(tmp_path: Path) -> None:
    failing = result(sites=12, poisoned=3, rounds=100, rule="a+" * 60 + "mean", lost=(1, 2))
    failing["rounds"][1]["failed"] = "too few sites answered"
    draw_rounds(failing, tmp_path / "rounds.png")
    named = [("mean, a rather long name of a run", failing), ("quorsum, another rather long name", failing)]
    draw_comparison(named, tmp_path / "comparison.png")
    for name in ("rounds.png", "comparison.png"):
        image = pixels(tmp_path / name)[..., :3]
        for edge in (image[:2], image[-2:], image[:, :2], image[:, -2:]):
            assert (edge == 1.0).all(), name


def test_states_differ_in_brightness(tmp_path: Path) -> None:
    # One picture per state of the same cell; seen in grey, no two are alike.
    greys = []
    for poisoned, missed, lost in ((0, (), ()), (0, (), (1,)), (1, (), ()), (1, (1,), ())):
        path = tmp_path / "rounds.png"
        draw_rounds(result(sites=1, poisoned=poisoned, rounds=1, missed=missed, lost=lost), path)
        cells = pixels(path)[420:650, 850:1100, :3] @ np.array([0.299, 0.587, 0.114])
        greys.append((round(float(cells.min()), 3), int((cells < 0.97).sum())))
    assert len(set(greys)) == 4
    accepted, lost_cell, found, missed_cell = greys
    assert accepted[0] > 0.8 > lost_cell[0]
    assert found[1] != missed_cell[1] != lost_cell[1]


def test_same_result_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        draw_rounds(result(), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_failed_rounds_are_hatched(tmp_path: Path) -> None:
    plain, failed = result(), result()
    failed["rounds"][1]["failed"] = "too few sites answered"
    draw_rounds(plain, tmp_path / "plain.png")
    draw_rounds(failed, tmp_path / "failed.png")
    assert not np.array_equal(pixels(tmp_path / "plain.png"), pixels(tmp_path / "failed.png"))


@pytest.mark.parametrize(
    ("attacks", "size"),
    [(("none",), (1200, 800)), (("none", "sign-flip", "alie"), (1200, 800)), (("a", "b", "c"), (1800, 800))],
)
def test_comparison_is_drawn_with_one_column_an_attack(
    tmp_path: Path, attacks: tuple[str, ...], size: tuple[int, int]
) -> None:
    results = [
        (f"run, {attack}", result(attack=attack, poisoned=0 if attack == "none" else 1, sites=30)) for attack in attacks
    ]
    path = tmp_path / "comparison.png"
    draw_comparison(results, str(path))
    assert pixels(path).shape[1::-1] == size


def test_comparison_has_one_strip_for_every_run_that_rejected(tmp_path: Path) -> None:
    path = tmp_path / "comparison.png"
    nobody = result(missed=(1, 2, 3))
    draw_comparison([("mean", nobody), ("krum", result()), ("median", result()), ("other", result(attack="b"))], path)
    assert pixels(path).shape[1::-1] == (1200, 800 + 336)


def test_results_without_rounds_or_no_results_are_refused(tmp_path: Path) -> None:
    empty = result(rounds=0)
    with pytest.raises(UsageError, match="the result has no rounds"):
        summary_table(empty)
    with pytest.raises(UsageError, match="the result has no rounds"):
        draw_rounds(empty, tmp_path / "x.png")
    with pytest.raises(UsageError, match="result 'mine' has no rounds"):
        comparison_table([("mine", empty)])
    with pytest.raises(UsageError, match="no results to compare"):
        draw_comparison([], tmp_path / "x.png")
    with pytest.raises(OSError, match="no-such-folder"):
        draw_rounds(result(), tmp_path / "no-such-folder" / "x.png")


def test_matplotlib_is_not_loaded_before_something_is_drawn(tmp_path: Path) -> None:
    code = "import sys; import quorsum.simulation.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@given(values=st.lists(st.floats(0.0, 100.0), min_size=1, max_size=7))
def test_labels_keep_their_order_and_distance(values: list[float]) -> None:
    places = _spread(values, gap=13.0, low=4.0, high=97.0)
    order = sorted(range(len(values)), key=lambda index: values[index])
    ordered = [places[index] for index in order]
    assert all(after - before >= 13.0 - 1e-9 for before, after in pairwise(ordered))
    assert ordered[0] >= 4.0
    assert ordered[-1] <= 97.0
