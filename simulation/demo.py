"""The runs of the demonstration: what an attack does to a plain mean, and what is left of it here."""

from __future__ import annotations

from dataclasses import replace

from quorsum.simulation.run import Simulation

__all__ = ["demo_runs"]

# Two attacks of opposite kinds: one loud; one ("a little is enough") inside the spread of the honest updates.
ARMS = {"sign flip": "sign-flip", "ALIE": "alie:z=1.5"}


def demo_runs(*, rounds: int, seed: int) -> list[tuple[str, Simulation]]:
    """Name and settings of each run: one clean mean, then for each attack the mean and quorsum."""
    base = Simulation(data="digits", sites=10, poisoned=2, rounds=rounds, seed=seed)
    runs = [("mean, no attack", replace(base, poisoned=0, attack="none", rule="mean", suite="plain"))]
    for name, attack in ARMS.items():
        runs.append((f"mean, {name}", replace(base, attack=attack, rule="mean", tolerate=0, suite="plain")))
        runs.append((f"ckks, {name}", replace(base, attack=attack, suite="ckks")))
        runs.append((f"sealed, {name}", replace(base, attack=attack, suite="sealed")))
    return runs
