"""What a round costs in each cipher suite, without training and without a network, as ratios in one run.

Compared with averaging in the clear (suite ``plain`` with the rule ``mean``): the sites' sealing, the coordinator's
measuring and combining, the sites' answers, and the bytes that travel.

    python benchmarks/suites.py --dimensions 100000 1000000 --sites 10
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from quorsum.crypto import (
    Ask,
    Blocks,
    CkksCoordinator,
    CkksSite,
    CoordinatorSuite,
    Identity,
    PlainCoordinator,
    PlainSite,
    RoundContext,
    SealedCoordinator,
    SealedSite,
    SiteSuite,
    generate_site_key,
    run_dialogue,
)
from quorsum.selection import select

Figures = dict[str, float]


def suites(names: list[str], sites: int) -> dict[str, tuple[dict[str, SiteSuite], CoordinatorSuite]]:
    """Both ends of each suite: every site's, and the coordinator's with the keys of all."""
    made: dict[str, tuple[dict[str, SiteSuite], CoordinatorSuite]] = {}
    roster = site_names(sites)
    for name in names:
        ends: dict[str, SiteSuite]
        coordinator: CoordinatorSuite
        if name == "sealed":
            ends = {site: SealedSite(Identity.generate(os.urandom), select, True) for site in roster}
            coordinator = SealedCoordinator(select)
        elif name == "ckks":
            ends = dict.fromkeys(roster, CkksSite(generate_site_key(os.urandom)))
            coordinator = CkksCoordinator()
        else:
            ends = dict.fromkeys(roster, PlainSite())
            coordinator = PlainCoordinator()
        coordinator, _ = coordinator.adopt({site: (end.key_id, end.public_key) for site, end in ends.items()})
        made[name] = (ends, coordinator)
    return made


def site_names(sites: int) -> tuple[str, ...]:
    """Names in roster order."""
    return tuple(f"site-{k:03d}" for k in range(sites))


def one_round(
    ends: dict[str, SiteSuite], coordinator: CoordinatorSuite, dimension: int, tolerate: int, number: int
) -> Figures:
    """One round with honest updates of norm about 1; seconds by step, bytes per site."""
    names, sites = tuple(ends), len(ends)
    context = RoundContext(
        "bench", number, 1, names, dimension, tolerate, 1.0, True, collude=max(1, tolerate), rule="multi-krum"
    )
    context, suite = coordinator.prepare(context, os.urandom)
    common = np.random.default_rng(0).normal(size=dimension) / np.sqrt(2 * dimension)
    seconds = dict.fromkeys(("seal", "accept", "measure", "combine", "answer"), 0.0)
    up, down = 0, 0
    states: dict[str, bytes] = {}
    kept: dict[str, Blocks] = {}
    uploads = {}
    updates = []
    for k, name in enumerate(names):
        own = np.random.default_rng(k + 1).normal(size=dimension) / np.sqrt(2 * dimension)
        update = (0.99 * (common + own) / np.linalg.norm(common + own)).astype(np.float32)
        updates.append(update)
        clock = time.perf_counter()
        states[name], blocks = ends[name].seal(context, update, os.urandom)
        seconds["seal"] += (time.perf_counter() - clock) / sites
        up += sum(map(len, blocks))
        clock = time.perf_counter()
        uploads[name] = suite.accept(context, name, blocks)
        kept[name] = blocks if ends[name].keeps_upload else ()
        seconds["accept"] += time.perf_counter() - clock

    asked = 0.0

    def ask(question: Ask) -> Mapping[str, Blocks]:
        nonlocal asked, up, down
        answers = {}
        for name, blocks in question.questions.items():
            clock = time.perf_counter()
            state = states[name]
            states[name], answers[name] = ends[name].answer(
                context, state, question.phase, blocks, os.urandom, kept[name]
            )
            spent = time.perf_counter() - clock
            asked += spent
            seconds["answer"] += spent / sites
            up += sum(map(len, answers[name]))
            down += sum(map(len, blocks))
        return answers

    def timed(step: str, run: Callable[[], Any]) -> Any:
        nonlocal asked
        asked, clock = 0.0, time.perf_counter()
        result = run()
        seconds[step] += time.perf_counter() - clock - asked
        return result

    measured = timed("measure", lambda: run_dialogue(suite.measure(context, uploads, os.urandom), ask))
    chosen = select(context, measured.sites, measured.gram, tolerate)
    weights = dict.fromkeys(chosen, 1 / len(chosen))
    opened = timed("combine", lambda: run_dialogue(suite.combine(context, uploads, weights, os.urandom), ask))
    expected = sum(
        weights.get(name, 0.0) * update.astype(np.float64) for name, update in zip(names, updates, strict=True)
    )
    error = float(np.linalg.norm(opened.total - expected) / np.linalg.norm(expected))
    return {**seconds, "up": up / sites, "down": down / sites, "error": error}


def clear_average(dimension: int, sites: int) -> float:
    """Seconds to average that many float32 updates in the clear, as any federated averaging must."""
    updates = [np.ones(dimension, dtype=np.float32) for _ in range(sites)]
    clock = time.perf_counter()
    total = np.zeros(dimension, dtype=np.float64)
    for update in updates:
        total += update
    total /= sites
    return time.perf_counter() - clock


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--tolerate", type=int, default=2)
    parser.add_argument("--suites", nargs="+", default=["plain", "ckks", "sealed"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for dimension in options.dimensions:
        average = statistics.median(clear_average(dimension, options.sites) for _ in range(options.repeat))
        for name, (ends, coordinator) in suites(options.suites, options.sites).items():
            runs = [
                one_round(ends, coordinator, dimension, options.tolerate, number + 1)
                for number in range(options.repeat)
            ]
            figures = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            rows.append({"suite": name, "dimension": dimension, "clear_average": average, **figures})
            print(f"measured {name} at {dimension} parameters", file=sys.stderr)
    result = {
        "schema_version": 1,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "cpu": platform.machine()},
        "options": vars(options),
        "rows": rows,
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        Console().print(table(rows, options.sites))


def table(rows: list[dict[str, Any]], sites: int) -> Table:
    """The figures for people."""
    out = Table(title=f"One round of {sites} sites, without training")
    for column in (
        "suite",
        "d",
        "site seals",
        "coordinator",
        "a site answers",
        "all / clear average",
        "up",
        "down",
        "error",
    ):
        out.add_column(column, justify="right")
    for row in rows:
        d = row["dimension"]
        coordinator = row["accept"] + row["measure"] + row["combine"]
        # What one federated average costs in wall time when the sites work side by side.
        whole = row["seal"] + coordinator + row["answer"]
        out.add_row(
            row["suite"],
            f"{d:,}",
            f"{1e6 * row['seal'] / d:.3f} us/par",
            f"{coordinator:.2f} s",
            f"{row['answer']:.2f} s",
            f"{whole / row['clear_average']:,.0f}x",
            f"{row['up'] / d:.1f} B/par",
            f"{row['down'] / d:.1f} B/par",
            f"{100 * row['error']:.2g} %",
        )
    return out


if __name__ == "__main__":
    main()
