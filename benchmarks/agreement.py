"""How far a sealed run ends from the plain run with the same seed and selection: digits, ten sites, two poisoned.

python benchmarks/agreement.py --seeds 1 2 3 4 5 --rule spectral --rounds 20
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

from quorsum.simulation.run import Simulation, simulate


def ends(suite: str, rule: str, rounds: int, seed: int, attack: str) -> dict[str, Any]:
    """Accuracy at the end in per cent, and who was kept in each round."""
    result = simulate(Simulation(suite=suite, rule=rule, rounds=rounds, seed=seed, attack=attack, clip=True))
    played = result["rounds"]
    return {"accuracy": 100 * played[-1]["metrics"]["accuracy"], "kept": [tuple(one["accepted"]) for one in played]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--rule", default="spectral")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--attack", default="sign-flip")
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        plain, sealed = (
            ends(suite, options.rule, options.rounds, seed, options.attack) for suite in ("plain", "sealed")
        )
        same = sum(a == b for a, b in zip(plain["kept"], sealed["kept"], strict=True))
        row = {
            "seed": seed,
            "plain": plain["accuracy"],
            "sealed": sealed["accuracy"],
            "difference": sealed["accuracy"] - plain["accuracy"],
            "rounds_with_the_same_sites": same,
        }
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    differences = [row["difference"] for row in rows]
    print(
        json.dumps(
            {
                "schema_version": 1,
                "options": vars(options),
                "rows": rows,
                "mean_difference": statistics.mean(differences),
                "largest_difference": max(map(abs, differences)),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
