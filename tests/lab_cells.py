"""Cells of a lab run, made by hand: what ``simulate`` would have returned, with the numbers that a test wants."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Cell = dict[str, Any]

SETTINGS: dict[str, Any] = {
    "data": "digits", "label": None, "sites": 10, "poisoned": 2, "attack": "sign-flip", "rule": "spectral",
    "reference": None, "tolerate": 2, "suite": "plain", "rounds": 3, "alpha": None, "clip": False, "seed": 1,
    "runtime": "local", "split": None, "model": "auto", "site_momentum": 0.0, "quarantine": False, "gate": False,
}  # fmt: skip


def cell(
    accuracy: float | None = 0.9,
    *,
    success: float | None = None,
    metrics: Mapping[str, float] | None = None,
    primary: str | None = None,
    failed: str | None = None,
    state: str = "",
    failed_round: str | None = None,
    **settings: Any,
) -> Cell:
    """One cell; without an accuracy it has no result."""
    filled = SETTINGS | settings
    name = hashlib.sha256(json.dumps(filled, sort_keys=True).encode()).hexdigest()[:24]
    tree: Cell = {
        "schema_version": 1, "id": name, "settings": filled, "result": None, "failed": failed, "seconds": 2.0,
        "state": state or ("done" if accuracy is not None else "failed"),
    }  # fmt: skip
    if accuracy is not None:
        tree["result"] = result(accuracy, filled, success, metrics or {}, primary, failed_round)
    return tree


def result(
    accuracy: float,
    settings: Mapping[str, Any],
    success: float | None,
    metrics: Mapping[str, float],
    primary: str | None,
    failed_round: str | None,
) -> dict[str, Any]:
    sites = [f"site-{number:02}" for number in range(1, settings["sites"] + 1)]
    poisoned = sites[: settings["poisoned"]]
    rounds = []
    for number in range(1, settings["rounds"] + 1):
        # The first round misses the malicious sites and loses an honest one; later ones are right.
        out = [sites[-1]] if number == 1 else poisoned
        at = 0.1 + (accuracy - 0.1) * number / settings["rounds"]
        there = {"accuracy": at, **metrics} | ({} if success is None else {"attack_success": success})
        rounds.append(
            {
                "round": number, "accuracy": at, "metrics": there, "rejected": out,
                "accepted": [site for site in sites if site not in out],
                "failed": failed_round if number == 2 else None,
            }
        )  # fmt: skip
    final = {
        "initial_accuracy": 0.1, "accuracy": accuracy, "metrics": {"accuracy": accuracy, **metrics},
        "attack_success": success, "poisoned_rejected": 2 / 3, "honest_rejected": 1 / 30,
    }  # fmt: skip
    return {
        "schema_version": 1,
        "config": dict(settings),
        "versions": {"quorsum": "1.2.3", "python": "3.11.7"},
        "sites": [{"id": site, "poisoned": site in poisoned, "rows": 9} for site in sites],
        "rounds": rounds,
        "final": final | ({} if primary is None else {"primary": primary}),
    }


def grid(
    values: Mapping[tuple[str, str], Sequence[float]], *, success: Mapping[str, float] | None = None, **settings: Any
) -> list[Cell]:
    """Cells from ``{(rule, attack): accuracies by seed}``; attacks named in ``success`` are backdoors."""
    return [
        cell(value, rule=rule, attack=attack, seed=seed, success=(success or {}).get(attack), **settings)
        for (rule, attack), row in values.items()
        for seed, value in enumerate(row, 1)
    ]


def write_lab(folder: Path, cells: Sequence[Cell], *, name: str = "a lab", missing: int = 0, grid: str = "") -> Path:
    """A folder as ``quorsum lab run`` leaves it."""
    (folder / "cells").mkdir(parents=True)
    for one in cells:
        (folder / "cells" / f"{one['id']}.json").write_text(json.dumps(one), encoding="utf-8")
    ids = [one["id"] for one in cells] + [f"{number:024x}" for number in range(missing)]
    plan = {
        "schema_version": 1, "name": name, "command": "quorsum lab run a.toml --out lab", "cells": ids,
        "versions": {"quorsum": "1.2.3"},
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    (folder / "grid.toml").write_text(grid or 'name = "a lab"\n', encoding="utf-8")
    return folder


STEADY = {
    ("mean", "none"): (0.95, 0.96, 0.94),
    ("mean", "sign-flip"): (0.10, 0.11, 0.12),
    ("mean", "alie"): (0.50, 0.52, 0.51),
    ("spectral", "none"): (0.94, 0.95, 0.93),
    ("spectral", "sign-flip"): (0.90, 0.91, 0.92),
    ("spectral", "alie"): (0.80, 0.95, 0.82),
    ("multi-krum", "none"): (0.93, 0.95, 0.93),
    ("multi-krum", "sign-flip"): (0.80, 0.93, 0.85),
    ("multi-krum", "alie"): (0.92, 0.91, 0.80),
}
"""Spectral and multi-krum are inside each other's noise, the mean is far below."""
