"""Rules by name: parsing, composition, outcomes, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quorsum import aggregation
from quorsum.aggregation import (
    ClearSuiteError,
    NonFiniteGramError,
    NonFiniteUpdateError,
    Outcome,
    Rule,
    UnknownRuleError,
    gram_matrix,
    known_rules,
    parse_rule,
    select,
)
from quorsum.errors import BoundError, UsageError

Matrix = NDArray[np.float64]

MIXERS = ["nnm", "bucketing", "arc", "clip(norm=1.5)", "arc+nnm", "bucketing(size=3)+nnm", "nnm+bucketing"]
FINALS = [
    "mean", "krum", "multi-krum", "mda", "geometric-median", "centred-clipping", "crowd-clipping", "monna", "fltrust",
    "spectral",
]  # fmt: skip
CLEAR = ["median", "trimmed-mean"]


def reference_for(rule: Rule) -> int | None:
    return 0 if rule.needs_reference else None


def apply(rule: Rule, updates: Matrix, f: int, seed: int = 0) -> Outcome:
    return rule.apply(gram_matrix(updates), f, rng=np.random.default_rng(seed), reference=reference_for(rule))


def some_updates(n: int = 12, d: int = 6, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).normal(1.0, 1.0, size=(n, d))


def by_hand(mixer: str, gram: Matrix, f: int, rng: np.random.Generator, size: int) -> Matrix:
    if mixer == "nnm":
        return aggregation.nnm_matrix(gram, f)
    if mixer == "arc":
        return aggregation.arc_matrix(gram, f)
    if mixer == "clip":
        return aggregation.clip_matrix(gram, 1.5)
    return aggregation.bucketing_matrix(len(gram), rng, size)


class TestNames:
    @pytest.mark.parametrize("name", [*FINALS, *CLEAR, *(f"{mixer}+{final}" for mixer in MIXERS for final in FINALS)])
    def test_a_name_reads_back(self, name: str) -> None:
        rule = parse_rule(name)
        assert rule.name == name
        assert str(rule) == name
        assert parse_rule(rule.name) == rule
        assert hash(parse_rule(rule.name)) == hash(rule)

    @pytest.mark.parametrize(
        ("written", "name"),
        [
            ("  NNM + Multi-Krum ", "nnm+multi-krum"),
            ("centered-clipping", "centred-clipping"),
            ("multikrum", "multi-krum"),
            ("average", "mean"),
            ("clip(norm=1e+3)+mean", "clip(norm=1000.0)+mean"),
            ("multi-krum( m = 5 )", "multi-krum(m=5)"),
            ("centred-clipping(radius=1, steps=2)", "centred-clipping(radius=1.0, steps=2)"),
            ("krum()", "krum"),
        ],
    )
    def test_ways_to_write_it(self, written: str, name: str) -> None:
        assert parse_rule(written).name == name

    @pytest.mark.parametrize(
        ("written", "words"),
        [
            ("multi-crum", "did you mean multi-krum\\? known: mean, krum, "),
            ("xyz", "unknown rule 'xyz' in 'xyz': known: mean, krum, "),
            ("mnm+krum", "unknown pre-aggregator 'mnm' .*did you mean nnm\\? known: nnm, bucketing"),
            ("nnm", "nnm only prepares updates .*such as nnm\\+multi-krum"),
            ("nnm+arc", "arc only prepares"),
            ("krum+nnm", "krum is a rule and comes last"),
            ("krum+mean", "krum is a rule and comes last"),
            ("krum(m=3)", "krum has no option 'm'; its options: none"),
            ("multi-krum(k=3)", "multi-krum has no option 'k'; its options: m"),
        ],
    )
    def test_unknown(self, written: str, words: str) -> None:
        with pytest.raises(UnknownRuleError, match=words):
            parse_rule(written)

    @pytest.mark.parametrize(
        ("written", "words"),
        [
            ("", "'' is not the name of a rule"),
            ("nnm+", "is not the name of a rule"),
            ("+krum", "is not the name of a rule"),
            ("krum(", "is not the name of a rule"),
            ("krum mean", "is not the name of a rule"),
            ("multi-krum(m=x)", "option m of multi-krum must be a number, got 'x'"),
            ("multi-krum(m)", "option m of multi-krum must be a number, got ''"),
            ("multi-krum(m=0)", "m must be a whole number from 1, got 0"),
            ("multi-krum(m=2.5)", "m must be a whole number from 1, got 2.5"),
            ("bucketing(size=0)+krum", "size must be a whole number from 1, got 0"),
            ("clip+mean", "clip has no sensible default for norm: write clip\\(norm=...\\)"),
            ("clip(norm=-1)+mean", "norm must be a positive finite number"),
            ("clip(norm=nan)+mean", "norm must be a positive finite number"),
            ("centred-clipping(radius=0)", "radius must be a positive finite number"),
            ("geometric-median(tolerance=0)", "tolerance must be a positive finite number"),
        ],
    )
    def test_malformed(self, written: str, words: str) -> None:
        with pytest.raises(UsageError, match=words):
            parse_rule(written)

    def test_known_rules_lists_all_with_their_bounds(self) -> None:
        known = known_rules()
        assert set(known) == {"nnm", "bucketing", "arc", "clip", *FINALS, *CLEAR}
        assert known["krum"] == "n >= 2f + 3"


class TestSuites:
    @pytest.mark.parametrize("name", [*CLEAR, "nnm+median"])
    @pytest.mark.parametrize("suite", ["ckks", "sealed", "ckks/8192", "Sealed_v1", "plaintext", ""])
    def test_rules_on_coordinates_are_refused_where_updates_are_hidden(self, name: str, suite: str) -> None:
        with pytest.raises(ClearSuiteError, match=r"needs every coordinate of every update.*only inner products"):
            parse_rule(name, suite=suite)

    @pytest.mark.parametrize("name", [*CLEAR, *FINALS])
    @pytest.mark.parametrize("suite", ["plain", "plain/v1", None])
    def test_every_rule_serves_the_clear_suite(self, name: str, suite: str | None) -> None:
        assert parse_rule(name, suite=suite).needs == ("updates" if name in CLEAR else "gram")

    @pytest.mark.parametrize("name", FINALS)
    def test_rules_on_inner_products_serve_every_suite(self, name: str) -> None:
        assert parse_rule(name, suite="ckks").needs == "gram"

    @pytest.mark.parametrize("name", CLEAR)
    def test_they_cannot_be_applied_to_a_gram_matrix(self, name: str) -> None:
        with pytest.raises(ClearSuiteError, match=f"{name} needs every coordinate.*this is a Gram matrix"):
            parse_rule(name).apply(np.eye(9), 1)


class TestBounds:
    @pytest.mark.parametrize(
        ("name", "f", "sites"),
        [
            ("mean", 0, 1),
            ("mean", 3, 4),
            ("krum", 0, 3),
            ("krum", 2, 7),
            ("nnm+multi-krum", 2, 7),
            ("nnm+mean", 2, 5),
            ("mda", 2, 5),
            ("bucketing+multi-krum", 2, 13),
            ("bucketing(size=3)+multi-krum", 2, 19),
            ("nnm+bucketing+mda", 1, 5),
            ("bucketing+nnm+mean", 1, 5),
            ("fltrust", 3, 4),
            ("median", 2, 5),
        ],
    )
    def test_minimum_sites(self, name: str, f: int, sites: int) -> None:
        assert parse_rule(name).minimum_sites(f) == sites

    @pytest.mark.parametrize("name", [*FINALS, *CLEAR, *(f"{mixer}+{final}" for mixer in MIXERS for final in FINALS)])
    @pytest.mark.parametrize("f", [0, 1, 2])
    def test_the_minimum_works_and_one_less_does_not(self, name: str, f: int) -> None:
        rule = parse_rule(name)
        extra = int("fltrust" in name)
        least = rule.minimum_sites(f)
        updates = some_updates(least + extra)
        rng = np.random.default_rng(0)
        assert np.isfinite(rule.aggregate(updates, f, rng=rng, reference=reference_for(rule))).all()
        if least > 1:
            with pytest.raises(BoundError, match=rf"at least n = {least} sites, got n = {least - 1}") as caught:
                rule.aggregate(updates[:-1], f, rng=rng, reference=reference_for(rule))
            assert rule.name in str(caught.value)
            assert rule.bound in str(caught.value)

    def test_bound_names_every_part(self) -> None:
        assert parse_rule("krum").bound == "n >= 2f + 3"
        assert parse_rule("nnm+multi-krum").bound == "nnm: n >= 2f + 1; multi-krum: n >= 2f + 3"

    def test_robust(self) -> None:
        assert parse_rule("krum").robust
        assert not parse_rule("arc+mean").robust

    def test_f_must_be_a_count(self) -> None:
        for wrong in (-1, 0.5, True):
            with pytest.raises(UsageError, match="f must be a whole number"):
                parse_rule("krum").minimum_sites(wrong)  # type: ignore[arg-type]


class TestOutcome:
    @pytest.mark.parametrize("name", [f"{mixer}+{final}" for mixer in MIXERS for final in FINALS])
    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    def test_composition_is_mixing_the_updates(self, name: str, seed: int) -> None:
        rule = parse_rule(name)
        updates = some_updates(14, 6, seed) + 2
        f, rng = 1, np.random.default_rng(seed)
        reference, extra = reference_for(rule), int("fltrust" in name)
        # By hand: every part on explicit updates, the reference of fltrust (row 0) untouched.
        fixed, sites = updates[:extra], updates[extra:]
        pivot = reference
        for part in rule.parts[:-1]:
            matrix = by_hand(part.name, gram_matrix(sites), f, rng, int(part.options.get("size", 2)))
            if part.name == "bucketing" and pivot is not None and not extra:
                pivot = int(np.argmax(matrix[:, pivot]))
            sites = matrix @ sites
        last = Rule(rule.parts[-1:])
        if extra:
            expected = last.aggregate(np.concatenate([sites, fixed]), f, reference=len(sites))
        else:
            expected = last.aggregate(sites, f, reference=pivot)
        np.testing.assert_allclose(apply(rule, updates, f, seed).weights @ updates, expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("name", FINALS)
    def test_weights_are_those_of_the_function(self, name: str) -> None:
        gram = gram_matrix(some_updates())
        function = getattr(aggregation, name.replace("-", "_"))
        options = {"reference": 0} if parse_rule(name).needs_reference else {}
        np.testing.assert_array_equal(apply(parse_rule(name), some_updates(), 2).weights, function(gram, 2, **options))

    @pytest.mark.parametrize("name", [*FINALS, *(f"{mixer}+{final}" for mixer in MIXERS for final in FINALS)])
    def test_shapes_and_immutability(self, name: str) -> None:
        rule = parse_rule(name)
        outcome = apply(rule, some_updates(20), 2)
        assert outcome.rule == name
        assert outcome.weights.shape == outcome.scores.shape == outcome.keep.shape == (20,)
        assert outcome.weights.dtype == outcome.scores.dtype == np.float64
        assert outcome.keep.dtype == np.bool_
        assert np.isfinite(outcome.scores).all()
        np.testing.assert_array_equal(outcome.selected, outcome.weights != 0)
        assert outcome.keep.any()
        for array in (outcome.weights, outcome.scores, outcome.keep):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0
        mask = select(outcome)
        mask[:] = False
        assert outcome.keep.any()

    @pytest.mark.parametrize("name", ["multi-krum", "mda", "monna", "spectral", "geometric-median"])
    def test_every_robust_rule_can_drop_f(self, name: str) -> None:
        updates = some_updates(12, 20)
        updates[[4, 9]] -= 1000
        for prefix in ("", "nnm+", "arc+nnm+"):
            outcome = apply(parse_rule(prefix + name), updates, 2)
            assert np.count_nonzero(outcome.keep) == 10
            if not prefix or name != "monna":
                assert np.flatnonzero(~select(outcome)).tolist() == [4, 9]

    def test_krum_keeps_one_and_the_mean_all(self) -> None:
        assert np.count_nonzero(apply(parse_rule("krum"), some_updates(), 2).keep) == 1
        assert apply(parse_rule("mean"), some_updates(), 2).keep.all()

    def test_the_mean_of_all_clipped_updates_is_centred_clipping(self) -> None:
        # Which is why, as a selection over updates that are clipped to a common norm, it keeps everybody.
        updates = some_updates(12, 20)
        updates[[4, 9]] -= 1000
        outcome = apply(parse_rule("centred-clipping(radius=3.0)"), updates, 2)
        assert outcome.keep.all()
        clipped = updates * np.minimum(1.0, 3.0 / np.linalg.norm(updates, axis=1, keepdims=True))
        np.testing.assert_allclose(outcome.weights @ updates, clipped.mean(axis=0), rtol=1e-9, atol=1e-12)

    def test_the_extra_row_is_never_kept(self) -> None:
        updates = some_updates()
        for name in ("fltrust", "nnm+fltrust", "bucketing+fltrust"):
            outcome = apply(parse_rule(name), updates, 2)
            assert not outcome.keep[0]
            assert outcome.weights[0] == 0
        outcome = parse_rule("nnm+centred-clipping(radius=0.1)").apply(gram_matrix(updates), 2, reference=3)
        assert not outcome.keep[3]
        assert outcome.weights.sum() == pytest.approx(1)
        assert outcome.weights[3] > 0

    def test_a_bucket_shares_its_fate(self) -> None:
        updates = some_updates(14)
        updates[5] += 1e4
        outcome = apply(parse_rule("bucketing+multi-krum"), updates, 1)
        dropped = np.flatnonzero(~outcome.keep)
        assert 5 in dropped
        assert len(dropped) == 2
        assert (outcome.weights[dropped] == 0).all()
        assert len(set(outcome.scores[dropped])) == 1

    @settings(deadline=None)
    @given(seed=st.integers(0, 2**32 - 1), distance=st.floats(50, 1e8), together=st.booleans())
    def test_the_default_drops_two_far_rows_of_ten_entirely(self, seed: int, distance: float, together: bool) -> None:
        rng = np.random.default_rng(seed)
        updates = rng.normal(size=(10, 30)) + rng.normal(size=30)
        far = rng.choice(10, 2, replace=False)
        ways = rng.normal(size=(2, 30))
        ways[1] = ways[0] if together else ways[1]
        updates[far] += distance * ways / np.linalg.norm(ways, axis=1, keepdims=True)
        outcome = parse_rule("nnm+multi-krum").apply(gram_matrix(updates), 2)
        assert (outcome.weights[far] == 0).all()
        assert outcome.weights.sum() == pytest.approx(1)
        np.testing.assert_array_equal(np.flatnonzero(~outcome.keep), np.sort(far))
        np.testing.assert_array_equal(np.flatnonzero(~outcome.selected), np.sort(far))

    @pytest.mark.parametrize("name", [*FINALS, *(f"{mixer}+krum" for mixer in MIXERS)])
    def test_input_is_left_alone(self, name: str) -> None:
        gram = gram_matrix(some_updates(20))
        before = gram.copy()
        rule = parse_rule(name)
        rule.apply(gram, 1, rng=np.random.default_rng(0), reference=reference_for(rule))
        np.testing.assert_array_equal(gram, before)


class TestArguments:
    @pytest.mark.parametrize("name", ["monna", "fltrust", "nnm+monna"])
    def test_a_needed_reference_is_asked_for(self, name: str) -> None:
        assert parse_rule(name).needs_reference
        with pytest.raises(UsageError, match="needs a trusted row: pass its number as reference"):
            parse_rule(name).apply(np.eye(9), 1)

    @pytest.mark.parametrize("name", ["krum", "mean", "nnm+spectral", "median"])
    def test_a_useless_reference_is_refused(self, name: str) -> None:
        assert not parse_rule(name).needs_reference
        with pytest.raises(UsageError, match="has no use for a reference row"):
            parse_rule(name).aggregate(some_updates(), 1, reference=0)

    def test_reference_is_a_row(self) -> None:
        with pytest.raises(UsageError, match=r"reference must be a row in 0\.\.8, got 9"):
            parse_rule("fltrust").apply(np.eye(9), 1, reference=9)

    def test_the_extra_row_is_no_site(self) -> None:
        with pytest.raises(BoundError, match="n = 5 sites, got n = 4"):
            parse_rule("centred-clipping").apply(np.eye(5), 2, reference=0)

    def test_bucketing_asks_for_a_generator(self) -> None:
        assert parse_rule("bucketing+krum").needs_generator
        assert not parse_rule("nnm+krum").needs_generator
        with pytest.raises(UsageError, match="pass rng, a numpy Generator"):
            parse_rule("bucketing+krum").apply(np.eye(20), 1)

    @pytest.mark.parametrize("name", ["krum", "nnm+krum", "bucketing+krum"])
    def test_non_finite_rows_are_named(self, name: str) -> None:
        updates = some_updates(14)
        updates[[2, 5]] = np.nan
        with pytest.raises(NonFiniteGramError) as caught:
            apply(parse_rule(name), updates, 1)
        assert caught.value.rows == (2, 5)
        with pytest.raises(NonFiniteUpdateError) as clear:
            parse_rule(name).aggregate(updates, 1, rng=np.random.default_rng(0))
        assert clear.value.rows == (2, 5)

    def test_pre_aggregators_serve_rules_on_coordinates(self) -> None:
        updates = some_updates()
        expected = np.median(aggregation.nnm_matrix(gram_matrix(updates), 2) @ updates, axis=0)
        np.testing.assert_allclose(parse_rule("nnm+median").aggregate(updates, 2), expected, rtol=1e-12)
