"""The gate: what turns a model down, what f liars can do about it, and what a turned down round leaves behind."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from federation import DIMENSION, honest_update, learning_app, model
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum import arrays
from quorsum.client import seal
from quorsum.crypto.plain import PlainCoordinator, PlainSite
from quorsum.errors import UsageError
from quorsum.server import QuorumResult, QuorumStrategy
from quorsum.server.gate import COORDINATOR, Gate, Votes, Watched, decide, read, watched
from quorsum.simulation.grid import LocalGrid

GATE = Gate()


def votes(count: int, name: str = "accuracy", value: float = 0.9) -> dict[str, dict[str, float]]:
    return {f"site-{number:02d}": {name: value} for number in range(count)}


def said(before: Mapping[str, Mapping[str, float]], bad: int, name: str, good: float, worse: float) -> Votes:
    return {site: {name: worse if place < bad else good} for place, site in enumerate(sorted(before))}


# --- reading ---


def test_what_a_voter_says_is_read_by_name() -> None:
    reported = {
        "accuracy": 0.9, "accuracy-women": 0.95, "accuracy-men": 0.8, "predicted-3": 0.1, "loss": 0.4, "other": 0.5,
    }  # fmt: skip
    assert read(GATE, reported) == pytest.approx({"accuracy": 0.9, "predicted-3": 0.1, "gap": 0.15})
    assert read(GATE, {"accuracy-women": 0.95}) == {}, "one group alone has no gap"
    assert read(Gate(measure="recall"), {"recall": 0.5, "recall-a": 0.1, "recall-b": 0.3, "accuracy": 1.0}) == (
        pytest.approx({"recall": 0.5, "gap": 0.2})
    )


@pytest.mark.parametrize("value", [1.01, -0.01, float("nan"), float("inf"), 1e300])
def test_what_is_no_share_is_not_read(value: float) -> None:
    assert read(GATE, {"accuracy": value, "predicted-1": value, "accuracy-a": value, "accuracy-b": 0.5}) == {}


# --- deciding ---


@pytest.mark.parametrize(
    ("name", "good", "worse", "says"),
    [
        ("accuracy", 0.88, 0.84, "accuracy fell by 0.060"),
        ("predicted-7", 0.95, 1.0, "predicted to be 7 rose by"),
        ("gap", 0.95, 1.0, "gap between groups widened"),
    ],
)
def test_each_limit_turns_a_model_down(name: str, good: float, worse: float, says: str) -> None:
    base = 0.9 if name == "accuracy" else 0.7
    before = votes(5, name, base)
    assert decide(before, said(before, 0, name, good if name == "accuracy" else 0.8, worse), GATE, 1).adopt
    verdict = decide(before, said(before, 5, name, good, worse), GATE, 1)
    assert not verdict.adopt
    assert says in verdict.reasons[0]
    assert "5 of 5 sites" in verdict.reasons[0]


def test_shares_and_gaps_wait_until_the_model_has_settled() -> None:
    before = votes(5, "predicted-7", 0.1)
    after = votes(5, "predicted-7", 1.0)
    assert not decide(before, after, GATE, 1).adopt
    assert decide(before, after, GATE, 1, settled=False).adopt


@settings(deadline=None)
@given(n=st.integers(1, 15), f=st.integers(0, 7), lie=st.floats(0, 1))
def test_f_liars_alone_never_turn_a_model_down(n: int, f: int, lie: float) -> None:
    f = min(f, n)
    before = votes(n)
    assert decide(before, said(before, f, "accuracy", 0.9, lie), GATE, f).adopt or f == 0


@settings(deadline=None)
@given(n=st.integers(1, 15), f=st.integers(0, 7), lie=st.floats(0, 1))
def test_f_liars_cannot_save_a_model_that_all_others_see_to_be_bad(n: int, f: int, lie: float) -> None:
    if n < 2 * f + 1:
        return
    before = votes(n)
    after = said(before, f, "accuracy", 0.5, lie)
    assert not decide(before, after, GATE, f).adopt


def test_where_the_honest_are_split_the_liars_decide_and_that_is_what_is_left() -> None:
    """Nine sites, f = 2; the limit is passed at three of the seven honest ones."""
    before = votes(9)
    after = said(before, 3, "accuracy", 0.9, 0.5)
    assert decide(before, after, GATE, 2).adopt
    lied = {**after, "site-07": {"accuracy": 0.0}, "site-08": {"accuracy": 0.0}}
    assert not decide(before, lied, GATE, 2).adopt


def test_the_few_who_answer_must_be_more_than_f() -> None:
    before = votes(9)
    two = {site: {"accuracy": 0.0} for site in ("site-00", "site-01")}
    assert decide(before, two, GATE, 2).adopt
    assert not decide(before, {**two, "site-02": {"accuracy": 0.0}}, GATE, 2).adopt


def test_nobody_who_can_compare_is_no_reason() -> None:
    assert decide({}, votes(5), GATE, 1).adopt
    assert decide(votes(5), {}, GATE, 1) == decide({}, {}, GATE, 0)
    assert decide({}, votes(5), GATE, 1).voters == 0


def test_the_coordinators_own_data_need_no_majority() -> None:
    before, after = {COORDINATOR: {"accuracy": 0.9}}, {COORDINATOR: {"accuracy": 0.8}}
    verdict = decide(before, after, GATE, 0)
    assert not verdict.adopt
    assert verdict.reasons == ("accuracy fell by 0.100, more than 0.05",)


# --- remembering ---


def start(value: float = 0.9) -> Watched:
    return watched(Watched(), votes(5, value=value), GATE)


def test_slow_decline_is_turned_down_in_the_second_round() -> None:
    now, value, adopted = start(), 0.9, []
    for _ in range(10):
        new = votes(5, value=value - 0.04)
        verdict = decide(now.votes, new, GATE, 1)
        now = watched(now, new, GATE, verdict)
        adopted.append(verdict.adopt)
        value -= 0.04 if verdict.adopt else 0.0
    assert adopted[:2] == [True, False]
    assert value >= 0.9 - 0.05, "ten rounds cost no more than the limit"


def test_what_gets_better_is_the_new_measure_at_once() -> None:
    now = watched(start(0.5), votes(5, value=0.8), GATE, decide({}, {}, GATE, 0))
    assert now.votes["site-00"]["accuracy"] == 0.8
    assert now.adopted == 1
    assert not decide(now.votes, votes(5, value=0.7), GATE, 1).adopt


def test_a_model_that_was_turned_down_is_no_measure() -> None:
    before = start()
    bad = votes(5, value=0.1)
    after = watched(before, bad, GATE, decide(before.votes, bad, GATE, 1))
    assert after == replace(before, turned_down=1)


def test_shares_are_free_until_settled_and_slow_after() -> None:
    now = watched(Watched(), votes(5, "predicted-1", 1.0), GATE)
    yes = decide({}, {}, GATE, 0)
    for _ in range(GATE.settle):
        now = watched(now, votes(5, "predicted-1", 0.1), GATE, yes)
    assert now.votes["site-00"]["predicted-1"] == 0.1
    now = watched(now, votes(5, "predicted-1", 0.25), GATE, yes)
    assert now.votes["site-00"]["predicted-1"] == pytest.approx(0.12)


def test_it_comes_back_from_json_to_the_last_bit() -> None:
    now = watched(start(0.1 + 0.2), {COORDINATOR: {"accuracy": 1 / 3, "loss": 2.0}}, GATE)
    assert Watched.from_json(json.loads(json.dumps(now.to_json()))) == now


@pytest.mark.parametrize("values", [{}, {"votes": 3, "reported": {}, "adopted": 0, "turned_down": 0}])
def test_other_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises((KeyError, AttributeError)):
        Watched.from_json(values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"drop": 0.0}, "drop"),
        ({"share": 1.5}, "share"),
        ({"gap": -0.1}, "gap"),
        ({"measure": ""}, "measure"),
        ({"settle": -1}, "settle"),
        ({"attention": 0}, "attention"),
    ],
)
def test_limits_that_cannot_work_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Gate(**change)


# --- in a run ---

SITES = 7


def quality(parameters: ArrayRecord) -> float:
    """A measure that training improves: 1 at the point to which all sites move, 0 far from it."""
    vector = arrays.flatten(parameters).astype(np.float64)
    return float(max(0.0, 1 - np.linalg.norm(vector - 4.0) / (5 * np.sqrt(DIMENSION))))


def app(partition: int, learn: Callable[[int, int], np.ndarray], report: Callable[[float], float]) -> ClientApp:
    inner = learning_app([], learn)
    outer = ClientApp(mods=[seal(PlainSite())])

    @outer.train()
    def train(message: Message, context: Context) -> Message:
        return inner(message, context)

    @outer.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        value = report(quality(message.content.array_records["arrays"]))
        metrics = MetricRecord({"num-examples": 7, "accuracy": value})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return outer


def run(
    learn: Callable[[int, int], np.ndarray],
    *,
    rounds: int = 6,
    lies: Mapping[int, Callable[[float], float]] | None = None,
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    **options: Any,
) -> QuorumResult:
    reports = lies or {}
    apps = [app(p, learn, reports.get(p, lambda value: value)) for p in range(SITES)]
    settings: dict[str, Any] = {"rule": "mean", "tolerate": 0, "gate": GATE} | options
    with LocalGrid(apps) as grid:
        strategy = QuorumStrategy(PlainCoordinator(), **settings)
        return strategy.start(grid, model(), rounds, timeout=30, evaluate_fn=evaluate_fn)


def poisons(number: int, by: float = -40.0) -> Callable[[int, int], np.ndarray]:
    """One site sends a huge update in one round, and the mean does nothing about it."""

    def learn(partition: int, round_number: int) -> np.ndarray:
        scale = by if (partition, round_number) == (3, number) else 1.0
        return (honest_update(partition, round_number) * np.float32(scale)).astype(np.float32)

    return learn


def test_a_poisoned_model_is_turned_down_and_the_run_goes_on_from_the_last_good_one() -> None:
    result = run(poisons(3))
    third = result.rounds[2]
    assert third.failed is not None
    assert third.failed.startswith("gate: accuracy fell by")
    assert third.accepted == ()
    assert third.rejected == third.invited
    assert set(third.codes.values()) == {"gate"}
    assert any("was opened and is not used" in note for note in third.notes)
    assert third.metrics == result.rounds[1].metrics, "the model in force is the one before"
    assert dict(result.evaluate_metrics_clientapp[3]) == third.metrics
    assert [record.failed is None for record in result.rounds] == [True, True, False, True, True, True]
    clean = run(poisons(99), rounds=5)
    assert quality(result.arrays) == pytest.approx(quality(clean.arrays), abs=0.02), "only the round was lost"
    assert result.rounds[3].unit == third.unit, "the reference norm is that of before, too"


def test_without_the_gate_it_is_adopted() -> None:
    result = run(poisons(3), gate=None, rounds=3)
    assert result.rounds[2].failed is None
    assert quality(result.arrays) < 0.2


def test_a_trusted_set_at_the_coordinator_is_enough() -> None:
    def evaluate(number: int, parameters: ArrayRecord) -> MetricRecord:
        return MetricRecord({"accuracy": quality(parameters)})

    result = run(poisons(3), fraction_evaluate=0.0, evaluate_fn=evaluate)
    assert [record.failed is None for record in result.rounds] == [True, True, False, True, True, True]
    assert result.rounds[2].metrics == result.rounds[1].metrics
    assert float(result.evaluate_metrics_serverapp[3]["accuracy"]) == result.rounds[1].metrics["accuracy"]  # type: ignore[arg-type]


def test_the_first_model_is_compared_with_the_one_that_the_run_begins_with() -> None:
    result = run(poisons(1, by=-20.0), rounds=2)
    assert [record.failed is None for record in result.rounds] == [False, True]


@pytest.mark.parametrize("lie", [0.0, 1.0])
def test_f_liars_neither_force_nor_prevent(lie: float) -> None:
    liars = {0: lambda value: lie, 1: lambda value: lie}
    result = run(poisons(3), lies=liars, rule="geometric-median", tolerate=2)
    assert all(record.failed is None for record in result.rounds), "a rule that holds leaves nothing to turn down"
    # With a rule that does not hold, and the same votes.
    strategy = run(poisons(3), lies=liars, rounds=4)
    assert [record.failed is None for record in strategy.rounds] == [True, True, False, True]


def test_models_turned_down_in_a_row_call_for_attention(caplog: pytest.LogCaptureFixture) -> None:
    def learn(partition: int, number: int) -> np.ndarray:
        return honest_update(partition, number) * np.float32(-40.0 if partition == 3 and number > 1 else 1.0)

    with caplog.at_level(logging.WARNING):
        result = run(learn, rounds=4)
    assert [record.failed is None for record in result.rounds] == [True, False, False, False]
    assert "3 models in a row were turned down" in caplog.text
    assert any("3 models in a row" in note for note in result.rounds[3].notes)
    assert not any("in a row" in note for note in result.rounds[2].notes)


def test_a_gate_that_nobody_can_pass_judgement_for_says_so() -> None:
    with pytest.raises(UsageError, match="somebody who evaluates"):
        run(poisons(3), fraction_evaluate=0.0)
    result = run(poisons(3), rounds=1, gate=Gate(measure="recall"))
    assert any("nobody could compare" in note for note in result.rounds[0].notes)


def test_settings_of_an_evaluation_reach_the_sites() -> None:
    seen: list[int] = []

    def evaluate(message: Message, context: Context) -> Message:
        seen.append(int(message.content.config_records["config"]["server-round"]))  # type: ignore[arg-type]
        return Message(RecordDict({"metrics": MetricRecord({"accuracy": 0.5})}), reply_to=message)

    apps = []
    for _ in range(5):
        one = ClientApp(mods=[seal(PlainSite())])
        one.evaluate()(evaluate)
        one.train()(lambda message, context: learning_app([])(message, context))
        apps.append(one)
    with LocalGrid(apps) as grid:
        QuorumStrategy(PlainCoordinator(), tolerate=1, gate=GATE).start(
            grid, model(), 1, evaluate_config=ConfigRecord({"rows": 3})
        )
    assert seen == [1] * 10, "the model that the run begins with is evaluated, too"
