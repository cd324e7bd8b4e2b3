"""Checks on a Gram matrix: who is named, who is not, and why."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.aggregation import NonFiniteGramError, check_gram, copies, gram_matrix, judge, parse_rule
from quorsum.errors import RoundFailed, UsageError


def honest(n: int = 10, d: int = 20, seed: int = 0) -> np.ndarray:
    updates = np.random.default_rng(seed).normal(size=(n, d))
    return np.asarray(updates / np.linalg.norm(updates, axis=1, keepdims=True))


@settings(deadline=None)
@given(n=st.integers(1, 12), d=st.integers(1, 20), seed=st.integers(0, 2**32 - 1), exponent=st.floats(-6, 6))
def test_honest_updates_are_never_named(n: int, d: int, seed: int, exponent: float) -> None:
    updates = honest(n, d, seed) * 10**exponent
    report = check_gram(gram_matrix(updates), 0, norm_bound=10**exponent)
    assert len(report) == 0
    assert report.consistent
    assert report.remaining == tuple(range(n))
    assert report.zeros == ()


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_noise_below_the_tolerance_accuses_nobody(seed: int) -> None:
    rng = np.random.default_rng(seed)
    updates = honest(10, 20, seed)
    updates[3] = 0
    # A pair of almost equal rows is the hardest: Cauchy-Schwarz holds with nothing to spare.
    updates[5] = updates[6]
    noise = rng.uniform(-1, 1, size=(10, 10)) * 1e-7
    report = check_gram(gram_matrix(updates) + noise, 0, norm_bound=1.0)
    assert dict(report) == {}
    assert report.consistent
    assert report.zeros == (3,)


def test_every_fault_has_its_code_and_its_sentence() -> None:
    gram = gram_matrix(honest())
    gram[1, :] = gram[:, 1] = np.nan
    gram[2, 2] = -1.0
    gram[3, 3] = 9.0
    gram[4, [5, 6, 7, 8]] = gram[[5, 6, 7, 8], 4] = 5.0
    report = check_gram(gram, 4, norm_bound=1.0)
    assert {row: finding.code for row, finding in report.items()} == {
        1: "non-finite",
        2: "negative-norm",
        3: "norm-bound",
        4: "inconsistent",
    }
    assert [finding.row for finding in report.values()] == [1, 2, 3, 4]
    assert report[1].reason == "its update has inner products that are not finite"
    assert report[2].reason == "its update has the squared norm -1, below zero"
    assert report[3].reason == "its update has norm 3, above the bound 1"
    assert report[4].reason == "its inner products contradict those of 4 other sites, more than the 1 that can lie"
    assert report.remaining == (0, 5, 6, 7, 8, 9)
    assert report.consistent


def test_the_rest_can_be_aggregated() -> None:
    gram = gram_matrix(honest())
    gram[1, :] = gram[:, 1] = np.inf
    gram[4, 4] = 100.0
    kept = list(check_gram(gram, 2, norm_bound=1.0).remaining)
    assert parse_rule("nnm+multi-krum").apply(gram[np.ix_(kept, kept)], 0).weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("liars", [0, 1, 2])
def test_a_contradiction_with_more_than_f_names_the_liar_and_clears_the_others(liars: int) -> None:
    gram = gram_matrix(honest())
    for liar in range(liars):
        others = [row for row in range(10) if row != liar]
        gram[liar, others] = gram[others, liar] = 2.0
    report = check_gram(gram, 2)
    assert sorted(report) == list(range(liars))
    assert report.disputes == ()


def test_a_contradiction_with_at_most_f_is_a_dispute() -> None:
    gram = gram_matrix(honest())
    gram[2, 7] = gram[7, 2] = 3.0
    report = check_gram(gram, 1)
    assert len(report) == 0
    assert report.disputes == ((2, 7),)
    assert not report.consistent
    # If nobody can lie, both are out: one of them did, and nobody knows which.
    assert sorted(check_gram(gram, 0)) == [2, 7]


def test_with_no_liar_allowed_the_one_in_every_contradiction_is_named_alone() -> None:
    gram = gram_matrix(honest())
    gram[4, [0, 1, 2]] = gram[[0, 1, 2], 4] = 3.0
    assert sorted(check_gram(gram, 0)) == [4]


def test_named_rows_use_up_f() -> None:
    gram = gram_matrix(honest())
    gram[2, [6, 7]] = gram[[6, 7], 2] = 3.0
    assert check_gram(gram, 2).disputes == ((2, 6), (2, 7))
    gram[0, 0] = 50.0
    report = check_gram(gram, 2, norm_bound=1.0)
    assert {row: finding.code for row, finding in report.items()} == {0: "norm-bound", 2: "inconsistent"}


def test_asymmetry_is_a_contradiction() -> None:
    gram = gram_matrix(honest())
    gram[3, 8] += 0.01
    report = check_gram(gram, 1)
    assert report.disputes == ((3, 8),)
    assert report.asymmetry == pytest.approx(0.01, rel=1e-6)


def test_three_that_fit_in_pairs_only_are_reported_without_blame() -> None:
    # Cosines of -0.9 between all three of them: possible for two, impossible for three.
    gram = np.full((3, 3), -0.9) + 1.9 * np.eye(3)
    report = check_gram(gram, 1)
    assert len(report) == 0
    assert report.smallest_eigenvalue == pytest.approx(-0.8)
    assert not report.positive_semidefinite
    assert not report.consistent


def test_a_long_row_does_not_hide_the_contradictions_of_the_short() -> None:
    gram = np.eye(4)
    gram[:3, :3] = np.full((3, 3), -0.9) + 1.9 * np.eye(3)
    gram[3, 3] = 1e20
    assert not check_gram(gram, 1).positive_semidefinite


def test_norm_bound_is_inclusive() -> None:
    gram = np.diag([4.0, 4.0, 4.001])
    assert sorted(check_gram(gram, 1, norm_bound=2.0)) == [2]
    assert len(check_gram(gram, 1)) == 0


def test_nothing_but_spoilt_rows() -> None:
    report = check_gram(np.full((3, 3), np.nan), 1)
    assert sorted(report) == [0, 1, 2]
    assert report.remaining == ()
    assert report.smallest_eigenvalue == 0


def test_only_zeros() -> None:
    report = check_gram(np.zeros((3, 3)), 1, norm_bound=1.0)
    assert len(report) == 0
    assert report.zeros == (0, 1, 2)
    assert report.consistent


def test_the_report_cannot_be_changed_and_the_input_is_not() -> None:
    gram = gram_matrix(honest())
    gram[1, :] = gram[:, 1] = np.nan
    before = gram.copy()
    report = check_gram(gram, 1)
    np.testing.assert_array_equal(gram, before)
    with pytest.raises(TypeError):
        report.findings[0] = report[1]  # type: ignore[index]


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.floats(-4, 1))
def test_noise_of_opening_accuses_nobody(seed: int, exponent: float) -> None:
    """From updates far below the noise, where nothing but noise is left, to those far above it."""
    rng = np.random.default_rng(seed)
    updates = honest(10, 20, seed) * 10**exponent
    updates[3] = 0
    updates[5] = updates[6]
    off = np.triu(rng.normal(size=(10, 10)) * 2**-12)
    gram = gram_matrix(updates) + off + np.triu(off, 1).T
    report = check_gram(gram, 0, norm_bound=10**exponent, noise=2**-12)
    assert dict(report) == {}
    assert report.consistent
    assert 3 in report.zeros


def test_what_noise_cannot_explain_is_still_named() -> None:
    noise = 1e-3
    gram = gram_matrix(honest())
    gram[1, 1] = -7 * noise
    gram[2, 2] = 1 + 7 * noise
    gram[4, [5, 6, 7]] = gram[[5, 6, 7], 4] = 1 + 13 * noise
    report = check_gram(gram, 3, norm_bound=1.0, noise=noise)
    assert {row: finding.code for row, finding in report.items()} == {
        1: "negative-norm",
        2: "norm-bound",
        4: "inconsistent",
    }
    gram[1, :] = gram[:, 1] = 0.0
    gram[1, 1], gram[2, 2] = -5 * noise, 1 + 5 * noise
    gram[4, [5, 6, 7]] = gram[[5, 6, 7], 4] = 1 + 11 * noise
    assert dict(check_gram(gram, 3, norm_bound=1.0, noise=noise)) == {}


def test_a_norm_that_is_no_proof_does_not_count_against_f() -> None:
    gram = gram_matrix(honest())
    gram[2, [6, 7]] = gram[[6, 7], 2] = 3.0
    gram[0, 0] = 50.0
    report = check_gram(gram, 2, norm_bound=1.0, norm_proves=False)
    assert {row: (finding.code, finding.proven) for row, finding in report.items()} == {0: ("norm-bound", False)}
    assert report.disputes == ((2, 6), (2, 7))
    assert all(finding.proven for finding in check_gram(gram, 2, norm_bound=1.0).values())


class TestJudge:
    def test_more_proven_than_f_trusts_nothing(self) -> None:
        gram = gram_matrix(honest())
        gram[1, 1] = gram[2, 2] = -1.0
        rule = parse_rule("multi-krum")
        assert judge(gram, rule, 2).tolerate == 0
        with pytest.raises(RoundFailed, match="2 sites sent what no honest site sends, more than the 1"):
            judge(gram, rule, 1)
        with pytest.raises(RoundFailed, match="3 sites"):
            judge(gram, rule, 2, proven=1)

    def test_findings_without_proof_do_not_lower_f(self) -> None:
        gram = gram_matrix(honest())
        gram[1, 1] = gram[2, 2] = 50.0
        verdict = judge(gram, parse_rule("multi-krum"), 2, norm_bound=1.0, norm_proves=False)
        assert set(verdict.findings) == {1, 2}
        assert verdict.tolerate == 2
        assert verdict.weights[[1, 2]].tolist() == [0, 0]
        assert judge(gram, parse_rule("multi-krum"), 2, norm_bound=1.0).tolerate == 0

    def test_reference_that_cannot_be_honest_guides_nothing(self) -> None:
        gram = gram_matrix(honest())
        gram[1, 1] = -1.0
        assert judge(gram, parse_rule("fltrust"), 1, reference=0).weights[0] == 0
        with pytest.raises(RoundFailed, match="row of the trusted reference cannot be used"):
            judge(gram, parse_rule("fltrust"), 1, reference=1)

    def test_noise_is_passed_on(self) -> None:
        gram = gram_matrix(honest())
        gram[1, :] = gram[:, 1] = 0.0
        gram[1, 1] = -0.01
        assert set(judge(gram, parse_rule("mean"), 1).findings) == {1}
        assert judge(gram, parse_rule("mean"), 1, noise=0.01).findings == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gram": np.zeros((2, 3))}, "must be square"),
        ({"gram": [["a"]]}, "must be a matrix of real numbers"),
        ({"f": -1}, "f must be a whole number"),
        ({"norm_bound": 0.0}, "norm_bound must be a positive finite number"),
        ({"norm_bound": float("nan")}, "norm_bound must be a positive finite number"),
        ({"tolerance": 0.0}, "tolerance must be a positive finite number"),
        ({"noise": -1.0}, "noise must be a positive finite number"),
        ({"noise": float("nan")}, "noise must be a positive finite number"),
    ],
)
def test_wrong_calls(arguments: dict[str, object], words: str) -> None:
    call: dict[str, object] = {"gram": np.eye(3), "f": 1, **arguments}
    with pytest.raises(UsageError, match=words):
        check_gram(call.pop("gram"), call.pop("f"), **call)  # type: ignore[arg-type]


class TestCopies:
    @settings(deadline=None)
    @given(seed=st.integers(0, 2**32 - 1), exponent=st.floats(-6, 6))
    def test_copies_are_found_and_others_are_not(self, seed: int, exponent: float) -> None:
        updates = honest(8, 20, seed) * 10**exponent
        updates[[5, 7]] = updates[2]
        updates[6] = updates[1] * (1 + 1e-3)
        assert copies(gram_matrix(updates)) == ((2, 5), (2, 7), (5, 7))
        assert (1, 6) in copies(gram_matrix(updates), rtol=0.01)

    def test_zeros_are_copies_of_each_other(self) -> None:
        assert copies(np.diag([0.0, 1.0, 0.0])) == ((0, 2),)

    def test_refusals(self) -> None:
        with pytest.raises(NonFiniteGramError):
            copies(np.diag([1.0, np.nan]))
        with pytest.raises(UsageError, match="rtol must be a positive finite number"):
            copies(np.eye(2), rtol=0)
