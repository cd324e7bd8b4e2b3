from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.crypto import Ask, PlainCoordinator, PlainSite, RoundContext, run_dialogue
from quorsum.crypto.plain import PLAIN_BLOCK
from quorsum.errors import CoordinatorFault, SiteFault, UsageError


def context_for(dimension: int, sites: int = 3) -> RoundContext:
    return RoundContext("run", 1, 1, tuple(f"s{i}" for i in range(sites)), dimension, 1, 1.0)


def nobody(ask: Ask):
    raise AssertionError(f"plain asks nobody, but asked {ask.phase}")


def seal_all(context: RoundContext, updates: dict[str, np.ndarray]):
    coordinator = PlainCoordinator()
    sealed = {site: PlainSite().seal(context, update, os.urandom)[1] for site, update in updates.items()}
    return coordinator, {site: coordinator.accept(context, site, blocks) for site, blocks in sealed.items()}


@settings(max_examples=30, deadline=None)
@given(dimension=st.integers(1, 20_000), sites=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_gram_and_sum_are_exact(dimension, sites, seed):
    rng = np.random.default_rng(seed)
    context = context_for(dimension, sites)
    updates = {site: rng.normal(size=dimension).astype(np.float32) for site in context.sites}
    weights = {site: float(rng.normal()) for site in context.sites}
    coordinator, uploads = seal_all(context, updates)

    measured = run_dialogue(coordinator.measure(context, uploads, os.urandom), nobody)
    opened = run_dialogue(coordinator.combine(context, uploads, weights, os.urandom), nobody)

    rows = np.stack([updates[site] for site in measured.sites]).astype(np.float64)
    assert measured.gram == pytest.approx(rows @ rows.T, rel=1e-12, abs=1e-12 * dimension)
    assert np.array_equal(measured.gram, measured.gram.T)
    assert opened.total == pytest.approx(
        sum(weights[s] * updates[s].astype(np.float64) for s in context.sites), rel=1e-12, abs=1e-12
    )
    assert not measured.faults
    assert not opened.faults


def test_updates_of_several_blocks():
    dimension = PLAIN_BLOCK + 70_000
    context = context_for(dimension, 2)
    rng = np.random.default_rng(0)
    updates = {site: rng.normal(size=dimension) for site in context.sites}
    coordinator, uploads = seal_all(context, updates)
    assert [block.size for block in uploads["s0"].blocks] == [PLAIN_BLOCK, 70_000]
    opened = run_dialogue(coordinator.combine(context, uploads, {"s1": 2.0}, os.urandom), nobody)
    assert np.array_equal(opened.total, 2.0 * updates["s1"].astype(np.float32).astype(np.float64))


def test_sites_without_weight_are_left_out():
    context = context_for(3, 2)
    coordinator, uploads = seal_all(context, {"s0": np.ones(3), "s1": np.full(3, 7.0)})
    opened = run_dialogue(coordinator.combine(context, uploads, {"s0": 0.5, "s1": 0.0}, os.urandom), nobody)
    assert np.array_equal(opened.total, np.full(3, 0.5))


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (np.ones(4), r"shape \(3,\), got \(4,\)"),
        (np.ones((3, 1)), "shape"),
        (np.ones(3, dtype=np.int64), "float32 or float64"),
        ([1.0, 2.0, 3.0], "got list"),
        (np.array([1.0, np.nan, 1.0]), "index 1"),
        (np.array([1.0, 1.0, -np.inf]), "index 2"),
        (np.array([1e300, 1.0, 1.0]), "index 0 is too large for float32"),
    ],
)
def test_updates_that_cannot_be_sealed(update, message):
    with pytest.raises(UsageError, match=message):
        PlainSite().seal(context_for(3), update, os.urandom)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dimension": 0}, "dimension"),
        ({"unit": 0.0}, "unit"),
        ({"unit": float("inf")}, "unit"),
        ({"sketches": 0}, "sketches"),
        ({"tolerate": -1}, "tolerate"),
    ],
)
def test_contexts_that_cannot_work(changes, message):
    fields = {"dimension": 3, "tolerate": 1, "unit": 1.0, "sketches": 4, **changes}
    context = RoundContext("run", 1, 1, ("a",), **fields)
    with pytest.raises(UsageError, match=message):
        PlainSite().seal(context, np.ones(3), os.urandom)


@pytest.mark.parametrize(
    ("blocks", "code"),
    [
        ((), "wrong-shape"),
        ((b"",), "wrong-shape"),
        ((bytes(11),), "wrong-shape"),
        ((bytes(12), bytes(12)), "wrong-shape"),
        ((np.array([0, np.nan, 0], dtype="<f4").tobytes(),), "non-finite"),
        ((np.array([0, 0, np.inf], dtype="<f4").tobytes(),), "non-finite"),
    ],
)
def test_uploads_that_are_refused(blocks, code):
    with pytest.raises(SiteFault) as caught:
        PlainCoordinator().accept(context_for(3), "mallory", blocks)
    assert (caught.value.code, caught.value.site) == (code, "mallory")


def test_a_plain_site_answers_nothing():
    with pytest.raises(CoordinatorFault) as caught:
        PlainSite().answer(context_for(3), b"", "gram", (), os.urandom)
    assert caught.value.code == "unknown-phase"


def test_nothing_to_measure_or_combine():
    context = context_for(3)
    coordinator, uploads = seal_all(context, {"s0": np.ones(3)})
    with pytest.raises(UsageError, match="no upload"):
        run_dialogue(coordinator.measure(context, {}, os.urandom), nobody)
    with pytest.raises(UsageError, match="zero"):
        run_dialogue(coordinator.combine(context, uploads, {"s0": 0.0}, os.urandom), nobody)
    with pytest.raises(UsageError, match="finite"):
        run_dialogue(coordinator.combine(context, uploads, {"s0": float("nan")}, os.urandom), nobody)
    with pytest.raises(UsageError, match="no upload of it"):
        run_dialogue(coordinator.combine(context, uploads, {"s2": 1.0}, os.urandom), nobody)


def test_both_ends_agree_on_the_name():
    assert PlainSite().name == PlainCoordinator().name == "plain/v1"
    assert PlainSite().key_id == ""
    assert PlainCoordinator().noise_floor(context_for(3), {"s0": 1.0}) == 0.0
    assert PlainCoordinator().ratio_tolerance(context_for(3)) == 1.01


def test_a_dialogue_is_closed_when_the_exchange_fails():
    closed = []

    def dialogue():
        try:
            yield Ask("gram", {})
        finally:
            closed.append(True)
        raise AssertionError("never reached")

    def broken(ask: Ask):
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        run_dialogue(dialogue(), broken)
    assert closed == [True]
