"""Whole simulated federations: what the demonstration claims, as tests."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from quorsum.errors import BoundError, UsageError
from quorsum.simulation.run import Simulation, build_world, simulate

BASE = Simulation(rounds=8, suite="ckks")


def slow(*attacks: str) -> list[Any]:
    """Attacks that are tried with ``-m slow`` only: they take the same way through the code as the others."""
    return [pytest.param(attack, marks=pytest.mark.slow) for attack in attacks]


SOME_LOUD = ("sign-flip", "nan", *slow("scaling", "gaussian"))


@cache
def outcome(**changes: Any) -> dict[str, Any]:
    return simulate(replace(BASE, **changes))


def clean() -> float:
    return float(outcome(poisoned=0, attack="none", rule="mean", suite="plain")["final"]["accuracy"])


def accepted(result: dict[str, Any]) -> list[list[str]]:
    return [one["accepted"] for one in result["rounds"]]


@pytest.mark.parametrize("attack", SOME_LOUD)
def test_sealed_and_attacked_ends_like_clean_training(attack: str) -> None:
    result = outcome(attack=attack, suite="ckks")
    assert result["final"]["accuracy"] >= clean() - 0.02
    assert result["final"]["poisoned_rejected"] >= 0.9
    assert all(one["failed"] is None for one in result["rounds"])


@pytest.mark.parametrize("attack", ["alie:z=1.5", *slow("ipm", "label-flip")])
def test_quiet_attacks_do_not_hurt_either(attack: str) -> None:
    assert outcome(attack=attack, suite="ckks")["final"]["accuracy"] >= clean() - 0.02


def test_undefended_mean_collapses_under_sign_flip() -> None:
    result = outcome(attack="sign-flip", rule="mean", tolerate=0, suite="plain")
    assert result["final"]["accuracy"] < 0.5 < clean()


@pytest.mark.parametrize("suite", ["plain", pytest.param("sealed", marks=pytest.mark.slow)])
def test_a_backdoor_works_through_the_mean_and_not_through_a_rule_with_clipping(suite: str) -> None:
    one = {"attack": "backdoor", "poisoned": 1}
    naive = outcome(**one, suite="plain", rule="mean", tolerate=0)
    assert naive["final"]["attack_success"] > 0.9
    safe = outcome(**one, suite=suite, rule="spectral", clip=True)
    assert safe["final"]["attack_success"] < 0.05
    assert safe["final"]["accuracy"] >= clean() - 0.015
    assert "attack_success" in safe["rounds"][0]["metrics"]


@pytest.mark.parametrize("attack", SOME_LOUD)
def test_plain_and_ckks_choose_the_same_sites(attack: str) -> None:
    sealed, clear = outcome(attack=attack, suite="ckks"), outcome(attack=attack, suite="plain")
    near = 0.005
    if attack == "nan":
        # Both attackers fail at the door, and the rule then drops two of eight honest sites that are nearly alike.
        # Which two, the noise of opening decides, and so which honest data are missing.
        near = 0.01
        assert sealed["final"]["poisoned_rejected"] == clear["final"]["poisoned_rejected"] == 1.0
    else:
        assert accepted(sealed) == accepted(clear)
    assert abs(sealed["final"]["accuracy"] - clear["final"]["accuracy"]) <= near


@pytest.mark.parametrize("attack", SOME_LOUD)
def test_sealed_under_attack_ends_like_clean_training(attack: str) -> None:
    result = outcome(attack=attack, suite="sealed")
    assert result["final"]["accuracy"] >= clean() - 0.03
    assert all(one["failed"] is None for one in result["rounds"])


def test_plain_and_sealed_choose_the_same_sites_by_the_same_selection() -> None:
    """Ten rounds here; docs/performance.md has the longer runs."""
    same = {"rule": "multi-krum", "clip": True, "rounds": 10}
    sealed, clear = outcome(suite="sealed", **same), outcome(suite="plain", **same)
    assert accepted(sealed) == accepted(clear)
    assert abs(sealed["final"]["accuracy"] - clear["final"]["accuracy"]) <= 0.003


def test_fltrust_under_sealed_beats_the_mean_under_sign_flip() -> None:
    """Three flipped updates among ten: clipping alone does not save the mean, and a trusted site finds all of them."""
    same = {"attack": "sign-flip", "suite": "sealed", "poisoned": 3, "tolerate": 1}
    trusted, mean = outcome(rule="fltrust", reference="site-01", **same), outcome(rule="mean", **same)
    assert [one["failed"] for one in trusted["rounds"]] == [None] * BASE.rounds
    assert trusted["final"]["accuracy"] >= clean() - 0.03
    assert trusted["final"]["accuracy"] > mean["final"]["accuracy"] + 0.04
    assert trusted["final"]["poisoned_rejected"] == 1.0
    assert all(one["codes"]["site-01"] == "reference" for one in trusted["rounds"])
    assert trusted["config"]["reference"] == "site-01"


def test_reference_is_never_poisoned() -> None:
    for seed in range(20):
        settings = Simulation(rule="fltrust", reference="site-02", poisoned=7, sites=8, suite="plain", seed=seed)
        assert 1 not in build_world(settings).poisoned


@pytest.mark.parametrize("attack", ["wrong-points", "inconsistent-shares", "other-key", "silent-sum"])
def test_protocol_attackers_run_in_a_simulation_and_gain_nothing(attack: str) -> None:
    result = outcome(attack=attack, suite="sealed", rounds=2)
    assert [one["failed"] for one in result["rounds"]] == [None, None]
    assert result["final"]["accuracy"] > 0.88


def test_result_is_plain_json_of_the_promised_shape() -> None:
    result = outcome(attack="sign-flip", suite="ckks")
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["schema_version"] == 1
    assert result["config"]["tolerate"] == 2
    assert {site["id"] for site in result["sites"]} == {f"site-{k:02d}" for k in range(1, 11)}
    assert sum(site["poisoned"] for site in result["sites"]) == 2
    for one in result["rounds"]:
        assert set(one["accepted"]) | set(one["rejected"]) == {site["id"] for site in result["sites"]}
        assert set(one["reasons"]) == set(one["rejected"])
        assert set(one["weights"]) == set(one["accepted"])
        assert sum(one["weights"].values()) == pytest.approx(1)
        assert set(one["seconds"]) == {"train", "seal", "geometry", "open", "total"}
        assert one["bytes"]["up_per_site"] > 2410 * 60
    assert set(result["final"]) >= {"accuracy", "poisoned_rejected", "honest_rejected"}


def test_same_seed_same_run() -> None:
    def strip(result: dict[str, Any]) -> list[Any]:
        return [(one["accuracy"], one["accepted"], one["weights"]) for one in result["rounds"]]

    settings = Simulation(rounds=3, suite="plain", rule="bucketing+multi-krum", poisoned=1, sites=11, attack="gaussian")
    assert strip(simulate(settings)) == strip(simulate(settings))
    other = simulate(replace(settings, seed=2))
    assert other["rounds"][0]["accuracy"] != simulate(settings)["rounds"][0]["accuracy"]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"sites": 2}, UsageError, "--sites"),
        ({"poisoned": 10}, UsageError, "--poisoned"),
        ({"poisoned": -1}, UsageError, "--poisoned"),
        ({"rounds": 0}, UsageError, "--rounds"),
        ({"suite": "rot13"}, UsageError, "known: sealed, ckks, plain"),
        ({"runtime": "mainframe"}, UsageError, "known: local, ray"),
        ({"attack": "sing-flip"}, UsageError, "did you mean sign-flip"),
        ({"rule": "krumm"}, UsageError, "krum"),
        ({"rule": "fltrust"}, UsageError, "--reference must name one of site-01 .. site-10, got none"),
        ({"rule": "fltrust", "reference": "site-11"}, UsageError, "site-01 .. site-10, got site-11"),
        ({"reference": "site-01"}, UsageError, "has no use for a reference"),
        ({"rule": "monna", "reference": "site-01", "sites": 9, "poisoned": 4}, BoundError, "at least 10 sites"),
        ({"rule": "median"}, UsageError, "inner products"),
        ({"sites": 6}, BoundError, "at least 7 sites"),
        ({"tolerate": 4}, BoundError, "at least 11 sites"),
        ({"suite": "sealed", "sites": 8}, BoundError, "at least 9 sites"),
        ({"suite": "sealed", "rule": "bucketing+mean"}, UsageError, "repeat the selection"),
        ({"attack": "wrong-points"}, UsageError, "--suite sealed"),
        ({"hidden": 0}, UsageError, "hidden"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_starts(
    changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        simulate(replace(BASE, **changes))


@pytest.mark.slow
def test_ray_runtime_gives_the_same_result() -> None:
    settings = Simulation(rounds=2, sites=5, poisoned=1, attack="sign-flip", rule="multi-krum")
    local, ray = simulate(settings), simulate(replace(settings, runtime="ray"))
    assert accepted(local) == accepted(ray)
    assert local["final"]["accuracy"] == pytest.approx(ray["final"]["accuracy"], abs=0.005)
