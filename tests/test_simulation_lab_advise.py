import json
from typing import Any

import pytest
from lab_cells import STEADY, grid
from rich.console import Console

from quorsum.errors import UsageError
from quorsum.simulation.lab_advise import Advice, Candidate, _chosen, advise

CLEAR = {
    ("spectral", "a"): (0.90, 0.91, 0.92),
    ("multi-krum", "a"): (0.50, 0.52, 0.51),
    ("mean", "a"): (0.99, 0.99, 0.99),
}


def named(advice: Advice, name: str) -> Candidate:
    (found,) = (candidate for candidate in advice.candidates if candidate.name == name)
    return found


def text_of(advice: Advice) -> str:
    console = Console(width=200)
    with console.capture() as caught:
        console.print(advice.table())
    return caught.get()


def test_the_best_is_recommended_when_its_lead_exceeds_the_noise() -> None:
    advice = advise(grid(CLEAR), 10, 2, "plain")
    assert (advice.recommended, advice.tied) == ("spectral", ())
    assert advice.why == "No other rule is as good as spectral in the one scene, beyond the noise."
    assert advice.candidates[0].name == "spectral"
    assert named(advice, "mean").excluded == "one malicious site can move it anywhere"


def test_a_tie_is_named_and_broken_by_simplicity() -> None:
    tie = {("nnm+spectral", "a"): (0.9, 0.8, 0.9), ("spectral", "a"): (0.85, 0.9, 0.8), ("mda", "a"): (0.8, 0.9, 0.9)}
    advice = advise(grid(tie), 10, 2, "plain")
    assert (advice.recommended, advice.tied) == ("spectral", ("nnm+spectral", "mda"))
    assert advice.why == (
        "spectral is not told apart from nnm+spectral and mda, neither in the one scene nor on average. "
        "Of these it is the simplest."
    )


def test_under_sealed_a_selection_goes_before_a_cheaper_rule_that_weighs() -> None:
    tie = {("geometric-median", "a"): (0.9, 0.8, 0.9), ("spectral", "a"): (0.85, 0.9, 0.8)}
    assert advise(grid(tie), 12, 2, "plain").recommended == "geometric-median"
    assert advise(grid(tie, suite="sealed"), 12, 2, "sealed").recommended == "spectral"


def test_a_tie_in_the_lowest_scene_is_decided_by_the_average() -> None:
    hard = {("spectral", "a"): (0.3, 0.3, 0.3), ("multi-krum", "a"): (0.3, 0.3, 0.3)}
    advice = advise(grid(hard, split="similarity:0") + grid(CLEAR), 10, 2, "plain")
    assert (advice.recommended, advice.tied) == ("spectral", ())
    assert advice.why == (
        "In the lowest of 2 scenes spectral is not told apart from multi-krum; on average over the scenes it is better."
    )


def test_the_nearest_share_of_malicious_sites_speaks() -> None:
    few = {("spectral", "a"): (0.9, 0.9, 0.9), ("mda", "a"): (0.5, 0.5, 0.5)}
    many = {("spectral", "a"): (0.1, 0.1, 0.1), ("mda", "a"): (0.4, 0.4, 0.4)}
    cells = grid(few, sites=20, poisoned=2, tolerate=2) + grid(many, sites=20, poisoned=6, tolerate=6)
    assert advise(cells, 20, 3, "plain").recommended == "spectral"
    assert advise(cells, 20, 5, "plain").recommended == "mda"
    # Of two that are equally near, the one with more malicious sites.
    advice = advise(cells, 20, 4, "plain")
    assert advice.recommended == "mda"
    (finding,) = advice.candidates[0].findings
    assert (finding.poisoned, finding.sites, finding.distance) == (6, 20, 0.1)
    assert "the nearest measured share of malicious sites is 6 of 20 (30 %), asked were 20 %" in advice.warnings


def test_other_suites_speak_with_a_warning_and_for_selections_only() -> None:
    cells = grid({("nnm+spectral", "a"): (0.99,) * 3, ("spectral", "a"): (0.9,) * 3})
    advice = advise(cells, 12, 2, "sealed")
    assert advice.recommended == "spectral"
    assert "nothing was measured under sealed; this is from plain" in advice.warnings
    assert named(advice, "nnm+spectral").findings == ()
    assert advise(cells, 12, 2, "ckks").recommended == "nnm+spectral"


def test_rules_measured_in_fewer_scenes_are_not_compared() -> None:
    cells = grid(CLEAR) + grid({("multi-krum", "a"): (0.5,) * 3}, split="similarity:0")
    advice = advise(cells, 10, 2, "plain")
    assert advice.recommended == "multi-krum"
    assert advice.why == "multi-krum is the only rule that was measured and can be used here."
    assert "not compared, because measured in fewer than 2 scenes: spectral" in advice.warnings


def test_thin_evidence_is_called_thin() -> None:
    one = {("spectral", "a"): (0.9,), ("multi-krum", "a"): (0.8,)}
    advice = advise(grid(one, success={"a": 0.4}), 50, 2, "plain")
    assert advice.why.startswith(
        "With fewer than 3 seeds nothing is ranked: multi-krum is not told apart from spectral."
    )
    assert set(advice.warnings) == {
        "the nearest measured share of malicious sites is 2 of 10 (20 %), asked were 4 %",
        "it was measured with 10 sites, not with about 50",
        "1 seed only; it takes 3 to rank",
        "fewer than three attacks were tried; others may do worse",
        "one scene only (digits, iid, 3 rounds); your data may behave otherwise",
        "a backdoor succeeded in 40 % of its tries against it",
    }


def test_rules_that_cannot_run_say_why() -> None:
    advice = advise(grid(STEADY), 10, 4, "plain")
    assert named(advice, "multi-krum").excluded == (
        "multi-krum under plain needs at least 11 sites to tolerate 4 malicious ones, got 10"
    )
    assert advice.recommended == "spectral"
    sealed = advise(grid(STEADY, suite="sealed"), 12, 2, "sealed")
    assert "needs every coordinate" in named(sealed, "trimmed-mean").excluded
    assert named(sealed, "spectral").bound == "n >= 2f + 1"


def test_a_trusted_site_counts_as_one_more() -> None:
    advice = advise(grid({("monna", "a"): (0.9,) * 3}, reference="site-10"), 5, 2, "plain")
    assert "monna under plain needs at least 6 sites" in named(advice, "monna").excluded


def test_without_evidence_the_usual_rule_is_named_by_its_bound_alone() -> None:
    advice = _chosen([], 12, 2, "sealed")
    assert advice.recommended == "spectral"
    assert advice.why == (
        "Nothing was measured for these rules. spectral is the usual one here, and only its bound speaks for it."
    )
    assert "there is no evidence at all" in advice.warnings[0]
    assert _chosen([], 5, 2, "plain").recommended != "nnm+multi-krum"


def test_nobody_malicious_may_use_the_mean() -> None:
    advice = _chosen([], 5, 0, "plain")
    assert named(advice, "mean").excluded == ""


def test_built_in_evidence_is_used_where_none_is_given() -> None:
    advice = advise([], 14, 2, "sealed")
    assert not named(advice, advice.recommended).excluded


def test_json_is_plain_and_whole() -> None:
    tree = json.loads(json.dumps(advise(grid(CLEAR), 10, 2, "plain").to_json(), allow_nan=False))
    assert (tree["schema_version"], tree["recommended"], tree["sites"]) == (1, "spectral", 10)
    assert tree["candidates"][0]["findings"][0]["attack"] == "a"


def test_table_shows_what_counts_and_takes_no_name_for_markup() -> None:
    text = text_of(advise(grid(CLEAR, data="[bold]x"), 10, 2, "plain"))
    assert "2 of 10 sites may be malicious, suite plain: use spectral" in text
    assert "91.0 % ± 1.0 under a" in text
    assert "[bold]x, iid, 3 rounds; 2 of 10 malicious, 3 seeds, plain" in text
    assert "Would run, not measured: mda" in text
    assert "Cannot be used (one malicious site can move it anywhere): mean." in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((grid(CLEAR), 10, 2, "magic"), "no suite is called 'magic'; known: sealed, ckks, plain"),
        ((grid(CLEAR), 2, 0, "plain"), r"--sites must lie in 3 \.\. 500, got 2"),
        ((grid(CLEAR), 501, 2, "plain"), r"--sites must lie in 3 \.\. 500, got 501"),
        ((grid(CLEAR), 10, 10, "plain"), r"--tolerate must lie in 0 \.\. 9 for 10 sites, got 10"),
        ((grid(CLEAR), 10, -1, "plain"), r"--tolerate must lie in 0 \.\. 9"),
        ((grid(CLEAR, tolerate=1), 10, 2, "plain"), "these cells say nothing about a rule at its f"),
        ((grid(CLEAR), 6, 3, "plain"), "no rule tolerates 3 malicious ones of 6 sites under plain"),
    ],
)
def test_what_cannot_be_advised_is_refused(arguments: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        advise(*arguments)
