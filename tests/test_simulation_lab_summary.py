import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab_cells import STEADY, cell, grid

from quorsum.simulation.lab_summary import (
    LEAST_LEAD,
    LEAST_SEEDS,
    Standing,
    Summary,
    better,
    compare,
    headline,
    spread,
    summarise,
)

NUMBERS = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6).map(lambda row: dict(enumerate(row)))


def standing(summary: Summary, rule: str) -> Standing:
    (found,) = (one for one in summary.standings if one.defence.rule == rule)
    return found


def test_worst_case_is_taken_for_each_seed_before_it_is_averaged() -> None:
    worst = standing(summarise(grid(STEADY)), "multi-krum").worst
    assert worst is not None
    assert worst.by_seed == {1: 0.80, 2: 0.91, 3: 0.80}
    assert (worst.attack, worst.times) == ("alie", 2)
    # The lowest mean over seeds of a single attack would be 0.86.
    assert spread(worst.by_seed.values())[0] == pytest.approx(0.8366666)


def test_ranks_are_shared_inside_the_noise_and_not_beyond_it() -> None:
    summary = summarise(grid(STEADY))
    ranks = {one.defence.rule: (one.rank, one.shared) for one in summary.standings}
    assert ranks == {"mean": (3, False), "spectral": (1, True), "multi-krum": (1, True)}


def test_verdict_says_that_nothing_is_told_apart() -> None:
    text = headline(summarise(grid(STEADY)))
    assert "no defence is better in the worst case than spectral and multi-krum, which are not told apart" in text
    assert "The worst case of multi-krum was 83.7 % accuracy (2 of 10 malicious, under alie)." in text


def test_verdict_names_a_clear_winner() -> None:
    clear = grid({("spectral", "a"): (0.9, 0.91, 0.9), ("mean", "a"): (0.1, 0.1, 0.11)})
    text = headline(summarise(clear))
    assert text.startswith("In the one condition, the best worst case is that of spectral; it leads alone.")
    both = clear + grid({("spectral", "a"): (0.9, 0.91, 0.9), ("mean", "a"): (0.9, 0.9, 0.9)}, poisoned=1, tolerate=1)
    text = headline(summarise(both))
    assert "In both conditions, no defence is better in the worst case than spectral; it leads alone in 1" in text


def test_verdict_when_every_defence_is_beaten_somewhere() -> None:
    one = {("spectral", "a"): (0.9, 0.91, 0.9), ("mda", "a"): (0.1, 0.1, 0.11)}
    other = {("mda", "a"): (0.9, 0.91, 0.9), ("spectral", "a"): (0.1, 0.1, 0.11)}
    text = headline(summarise(grid(one) + grid(other, suite="sealed")))
    assert text == (
        "No defence is unbeaten in both conditions. In front, alone or shared: spectral (1 of 2) and mda (1 of 2)."
    )


def test_all_equal_is_said_to_be_a_tie() -> None:
    text = headline(summarise(grid({("spectral", "a"): (0.9, 0.8, 0.9), ("mda", "a"): (0.9, 0.9, 0.8)})))
    assert "the worst cases of spectral and mda cannot be told apart" in text


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([], "No cell has finished yet"),
        (grid({("spectral", "none"): (0.9,)}), "No attack was run"),
        (grid({("spectral", "a"): (0.9, 0.9), ("mean", "a"): (0.1, 0.1)}), "No ranking: 2 seeds. It takes at least 3"),
        (grid({("spectral", "a"): (0.9,)}), "No ranking: 1 seed."),
        (grid({("spectral", "a"): (0.9, 0.9, 0.9)}), "No ranking: only one defence has met all attacks. The worst"),
        (grid({("spectral", "a"): (0.9,), ("mean", "b"): (0.9,)}), "No ranking: no defence has met all attacks yet."),
    ],
)
def test_nothing_is_ranked_without_ground(cells: list[dict[str, Any]], said: str) -> None:
    summary = summarise(cells)
    assert headline(summary).startswith(said)
    assert all(one.rank is None for one in summary.standings)


def test_a_defence_with_a_hole_has_no_worst_case_and_says_what_is_missing() -> None:
    cells = [c for c in grid(STEADY) if (c["settings"]["rule"], c["settings"]["seed"]) != ("spectral", 3)]
    spectral = standing(summarise(cells), "spectral")
    assert spectral.worst is None
    assert spectral.rank is None
    assert spectral.missing == ("alie (1 seed)", "sign-flip (1 seed)")
    assert spectral.unranked == "not ranked: alie (1 seed), sign-flip (1 seed) missing"


def test_price_is_the_plain_mean_minus_the_defence_by_seed() -> None:
    price = standing(summarise(grid(STEADY)), "multi-krum").price
    assert price == {1: pytest.approx(0.02), 2: pytest.approx(0.01), 3: pytest.approx(0.01)}


def test_price_falls_back_to_the_same_federation_without_malicious_sites() -> None:
    cells = grid({("spectral", "a"): (0.8,)})
    cells += grid({("spectral", "none"): (0.9,), ("mean", "none"): (0.95,)}, poisoned=0, tolerate=0)
    cells += grid({("mean", "none"): (0.5,)}, poisoned=0, tolerate=0, sites=12)
    attacked = next(one for one in summarise(cells).standings if one.by_attack)
    assert attacked.price == {1: pytest.approx(0.05)}


def test_defences_with_the_same_rule_are_told_apart_by_what_else_guards() -> None:
    cells = grid({("spectral", "a"): (0.9, 0.9, 0.9)}) + grid({("spectral", "a"): (0.5, 0.5, 0.5)}, gate=True)
    cells += grid({("spectral", "a"): (0.5, 0.5, 0.5)}, site_momentum=0.9)
    summary = summarise(cells)
    assert [summary.defence_name(defence) for defence in summary.defences] == [
        "spectral, no gate, site momentum 0.0",
        "spectral, gate, site momentum 0.0",
        "spectral, no gate, site momentum 0.9",
    ]


def test_conditions_are_named_by_what_differs() -> None:
    cells = grid({("spectral", "a"): (0.9,)}, split="similarity:0", data="/far/away/mnist")
    cells += grid({("spectral", "a"): (0.9,)}, split=None, tolerate=3, alpha=0.5)
    summary = summarise(cells)
    assert [summary.condition_name(condition) for condition in summary.conditions] == [
        "mnist, split similarity:0, 2 of 10 malicious",
        "Dirichlet 0.5, digits, usual split, 2 of 10 malicious, f = 3 declared",
    ]


def test_average_precision_counts_where_the_result_says_so() -> None:
    rare = {"average_precision": 0.3}
    assert summarise([cell(0.99, metrics=rare, primary="average_precision")]).measure == "AUC-PR"
    assert summarise([cell(0.99, metrics=rare, primary="average_precision")]).runs[0].value == 0.3
    assert summarise([cell(0.99, metrics=rare)]).runs[0].value == 0.99
    assert summarise([cell(0.99, primary="average_precision")]).runs[0].value == 0.99


def test_the_highest_success_of_a_backdoor_counts() -> None:
    cells = grid({("mean", "dba"): (0.9, 0.9), ("mean", "trigger"): (0.9, 0.9)}, success={"dba": 0.2, "trigger": 0.7})
    mean = standing(summarise(cells), "mean")
    assert mean.worst_success == {1: 0.7, 2: 0.7}
    assert [run.attack for run in mean.worst_backdoor_runs()] == ["trigger", "trigger"]


def test_what_has_no_result_is_grouped_by_reason() -> None:
    cells = [
        cell(None, failed="too few sites", state="not applicable", seed=1),
        cell(None, failed="too few sites", state="not applicable", seed=2),
        cell(None, failed="the file is gone", seed=3),
        cell(0.9, failed_round="nobody answered", seed=4),
    ]
    summary = summarise(cells, planned=7)
    assert [(gap.kind, gap.reason, gap.cells) for gap in summary.gaps] == [
        ("failed", "the file is gone", 1),
        ("failed rounds", "nobody answered", 1),
        ("not applicable", "too few sites", 2),
    ]
    assert (summary.cells, summary.planned, len(summary.runs)) == (4, 7, 1)
    assert summary.seconds == 8.0


def test_settings_that_were_left_open_are_filled_in() -> None:
    one = cell(None, failed="no", rule=None, tolerate=None)
    assert summarise([one]).gaps[0].defence == "usual rule of plain"
    filled = cell(0.9)
    filled["settings"] = filled["settings"] | {"rule": None, "tolerate": None}
    assert summarise([filled]).standings[0].defence.rule == "spectral"


def test_versions_of_all_cells_are_kept() -> None:
    other = cell(seed=2)
    other["result"]["versions"]["quorsum"] = "1.2.4"
    assert summarise([cell(), other]).versions == {"quorsum": "1.2.3, 1.2.4", "python": "3.11.7"}


@given(NUMBERS, NUMBERS)
def test_comparison_is_antisymmetric(first: dict[int, float], second: dict[int, float]) -> None:
    mirror = {"first": "second", "second": "first"}
    one, other = compare(first, second), compare(second, first)
    assert other.verdict == mirror.get(one.verdict, one.verdict)
    assert other.difference == pytest.approx(-one.difference, nan_ok=True)
    assert not (better(first, second) and better(second, first))


@given(NUMBERS)
def test_nothing_is_better_than_itself_or_than_what_is_a_hair_lower(row: dict[int, float]) -> None:
    assert not better(row, row)
    assert not better(row, {seed: value - 0.9 * LEAST_LEAD for seed, value in row.items()})


@given(st.floats(0.1, 0.9), st.floats(0.01, 0.1))
def test_a_steady_lead_counts_from_three_seeds(value: float, lead: float) -> None:
    for seeds in range(1, 6):
        high, low = dict.fromkeys(range(seeds), value + lead), dict.fromkeys(range(seeds), value)
        assert better(high, low) == (seeds >= LEAST_SEEDS)


def test_interval_is_that_of_student() -> None:
    # t at 97.5 % with 2 degrees of freedom is 4.3027; the deviation of 0.1, 0.2, 0.3 is 0.1.
    found = compare({1: 0.1, 2: 0.2, 3: 0.3, 9: 1.0}, {1: 0.0, 2: 0.0, 3: 0.0, 8: 1.0})
    assert found.seeds == 3
    assert found.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert found.verdict == "tied"
    assert compare({1: 0.5}, {2: 0.5}).seeds == 0


def test_spread_of_few_values() -> None:
    assert math.isnan(spread([])[0])
    assert spread([0.5])[0] == 0.5
    assert math.isnan(spread([0.5])[1])


@given(st.permutations(grid(STEADY)))
def test_order_of_the_cells_changes_no_number(cells: list[dict[str, Any]]) -> None:
    found = {one.defence.rule: (one.worst, one.rank, one.price) for one in summarise(cells).standings}
    wanted = {one.defence.rule: (one.worst, one.rank, one.price) for one in summarise(grid(STEADY)).standings}
    assert {rule: (w and w.by_seed, rank, price) for rule, (w, rank, price) in found.items()} == {
        rule: (w and w.by_seed, rank, price) for rule, (w, rank, price) in wanted.items()
    }
