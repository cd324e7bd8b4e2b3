"""Defences over rounds against real attacks on real training, whatever the suite."""

from __future__ import annotations

from itertools import pairwise

import pytest

from quorsum.server import RoundRecord
from quorsum.simulation.run import Simulation, build_world, simulate
from quorsum.simulation.world import site_name


def played(settings: Simulation) -> tuple[set[str], list[RoundRecord]]:
    """Names of the poisoned sites, and the records of the rounds."""
    records: list[RoundRecord] = []
    world = build_world(settings.checked())
    simulate(settings, world, on_round=records.append)
    return {site_name(partition) for partition in world.poisoned}, records


@pytest.mark.parametrize(
    ("suite", "poisoned"), [("plain", 2), pytest.param("sealed", 1, marks=pytest.mark.slow)], ids=["plain", "sealed"]
)
def test_attackers_end_in_quarantine_and_honest_sites_never(suite: str, poisoned: int) -> None:
    settings = Simulation(suite=suite, poisoned=poisoned, attack="sign-flip", rounds=15, quarantine=True)
    bad, records = played(settings)
    assert set(records[-1].quarantined) == bad
    assert set().union(*(record.quarantined for record in records)) == bad
    assert all(record.failed is None for record in records)
    assert records[-1].metrics["accuracy"] > 0.93


def test_nobody_is_quarantined_where_nobody_attacks() -> None:
    """Two of ten are left out in every round, and always the same ones more often than the others."""
    settings = Simulation(suite="plain", rule="spectral", clip=True, poisoned=0, tolerate=2, attack="none", rounds=20)
    _, records = played(settings)
    left_out = [sum(site in record.rejected for record in records) for site in records[0].invited]
    assert max(left_out) >= 8, "chance alone would give four"
    _, records = played(Simulation(**{**vars(settings), "quarantine": True}))
    assert not any(record.quarantined for record in records)


@pytest.mark.parametrize("gate", [True, False])
def test_a_model_that_one_site_ruins_is_not_adopted(gate: bool) -> None:
    """The mean lets everything through; the gate sees what came out."""
    settings = Simulation(
        suite="plain", rule="mean", poisoned=1, tolerate=0, attack="sign-flip:strength=8", rounds=5, gate=gate
    )
    _, records = played(settings)
    turned_down = [record for record in records if record.failed]
    if gate:
        assert turned_down
        assert all((record.failed or "").startswith("gate: accuracy fell") for record in turned_down)
        accuracies = [record.metrics["accuracy"] for record in records]
        assert all(later >= before - 0.05 for before, later in pairwise(accuracies))
    else:
        assert not turned_down
