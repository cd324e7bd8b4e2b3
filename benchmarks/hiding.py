"""How well an update hides from the sketches of a sealed round: three attackers, several numbers of sketches.

A round is played in integers, exactly as the sealed suite computes it but without masks and shares, which change
nothing here. Of n sites one is malicious. Counted over many seeds:

* **gate**: its row passes the exact checks (norm gate, Cauchy-Schwarz, semidefiniteness);
* **selected**: and the rule keeps it;
* **unnoticed**: and the opened sum is not longer than 1.08 times what was measured;
* **moved**: in the unnoticed rounds, the largest distance of the mean from that of the selected honest sites and what
  the attacker would have had to send to be measured truly (its orthogonal part), in norms of the honest mean.

    python benchmarks/hiding.py --seeds 200
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from quorsum.crypto import RoundContext, field
from quorsum.crypto.exact_checks import exact_checks
from quorsum.crypto.ring import N
from quorsum.crypto.sealed_coordinator import RATIO
from quorsum.crypto.sealed_geometry import block_count, plan_of, scale_of
from quorsum.crypto.sealed_parameters import norm_gate
from quorsum.crypto.sketch import integer_sketch
from quorsum.errors import RoundFailed
from quorsum.selection import select
from quorsum.simulation.protocol_attacks import equal_blocks, single_frequency, wrapped_block

ATTACKERS = ("equal-blocks", "single-frequency", "half-hidden", "wrap-around")
Integers = NDArray[np.int64]


def honest_updates(n: int, dimension: int, spread: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Updates of norm 0.95 with a common part, shape (n, d)."""
    made = rng.normal(size=dimension) + spread * rng.normal(size=(n, dimension))
    return np.asarray(0.95 * made / np.linalg.norm(made, axis=1, keepdims=True))


def attacker(
    name: str, context: RoundContext, own: NDArray[np.float64], energy: float, rng: np.random.Generator
) -> Integers:
    """What it seals, shape (B N,)."""
    integers = np.zeros(block_count(context) * N, np.int64)
    if name == "wrap-around":
        integers[:N] = wrapped_block(context, rng)
        return integers
    make = equal_blocks if name == "equal-blocks" else single_frequency
    hidden = make(context.dimension, math.sqrt(energy) * context.unit, rng)
    # Half hidden: an honest update and a part that hides, at right angles as all unrelated updates are.
    sent = own + hidden if name == "half-hidden" else hidden
    integers[: context.dimension] = np.rint(sent * scale_of(context))
    return integers


def play(name: str, context: RoundContext, energy: float, spread: float, seed: int) -> tuple[bool, bool, bool, float]:
    """One round: passed, selected, unnoticed, and how far the mean moved."""
    rng = np.random.default_rng(seed)
    n, blocks = len(context.sites), block_count(context)
    updates = honest_updates(n, context.dimension, spread, rng)
    integers = np.zeros((n, blocks * N), np.int64)
    integers[:, : context.dimension] = np.rint(updates * scale_of(context))
    integers[0] = attacker(name, context, updates[0], energy, rng)
    plan = plan_of(context, rng.bytes(32))
    bound = norm_gate(context.unit, scale_of(context), context.sketches, blocks)
    own = integer_sketch(plan, [integers[0].reshape(blocks, N)]).reshape(-1)
    if field.dot(own, own) > bound:
        # What most attackers come to; the others' sketches make no difference to it.
        return False, False, False, 0.0
    flat = np.stack([integer_sketch(plan, [row.reshape(blocks, N)]).reshape(-1) for row in integers])
    exact = [[int(x) for x in row] for row in field.centred(field.matmul(flat, flat.T))]
    try:
        verdict = exact_checks(exact, bound, context.tolerate)
    except RoundFailed:
        return False, False, False, 0.0
    if 0 not in verdict.rows:
        return False, False, False, 0.0
    rows = verdict.rows
    gram = np.array([[exact[i][j] for j in rows] for i in rows]) / (context.sketches * scale_of(context) ** 2)
    chosen = select(context, tuple(context.sites[row] for row in rows), gram, verdict.tolerate)
    if context.sites[0] not in chosen:
        return True, False, False, 0.0
    kept = [row for row in rows if context.sites[row] in chosen]
    total = integers[kept].sum(axis=0).astype(np.float64)
    predicted = sum(exact[i][j] for i in kept for j in kept) / context.sketches
    unnoticed = bool(float(total @ total) <= RATIO * predicted)
    # Against what the round would have given had the attacker sent its honest update.
    honest = total - integers[0] + np.pad(np.rint(updates[0] * scale_of(context)), (0, blocks * N - context.dimension))
    moved = float(np.linalg.norm(total - honest) / np.linalg.norm(honest))
    return True, True, unnoticed, moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--dimension", type=int, default=131_072)
    parser.add_argument("--sketches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--energy", type=float, default=4.0, help="squared norm of what hides, in C^2")
    parser.add_argument("--spread", type=float, default=0.5, help="how much honest updates differ")
    parser.add_argument("--rule", default="spectral")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    base = RoundContext(
        "run", 1, 1, tuple(f"site-{k:02d}" for k in range(given.sites)), given.dimension, tolerate=2, collude=2,
        unit=1.0, clip=True, rule=given.rule,
    )  # fmt: skip
    table = Table("attacker", "r", "passes", "selected", "unnoticed", "mean moved, median", "mean moved, largest")
    figures = []
    for name in ATTACKERS:
        for sketches in given.sketches:
            context = replace(base, sketches=sketches)
            ends = [play(name, context, given.energy, given.spread, seed) for seed in range(given.seeds)]
            passed, selected, unnoticed = (sum(end[k] for end in ends) for k in range(3))
            moves = [end[3] for end in ends if end[2]] or [0.0]
            row = [passed / given.seeds, selected / given.seeds, unnoticed / given.seeds]
            table.add_row(
                name, str(sketches), *(f"{x:.1%}" for x in row), f"{np.median(moves):.2f}", f"{max(moves):.2f}"
            )
            figures.append(
                {"attacker": name, "r": sketches, "passes": row[0], "selected": row[1], "unnoticed": row[2],
                 "moved_median": float(np.median(moves)), "moved_largest": max(moves)}
            )  # fmt: skip
    if given.json:
        print(json.dumps(figures))
    else:
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
