"""What is left of a lab run when its cells are boiled down to what advice needs, and the evidence that quorsum brings.

``lab_evidence.json`` beside this file is made from finished lab runs by

    python -m quorsum.simulation.lab_evidence DIR [DIR ...] > simulation/lab_evidence.json

It is one object: ``schema_version`` (1), ``sources`` (for each folder the ``name`` of the grid, the ``command`` and the
``versions``), and ``rows``, one for each defence under each condition; :class:`Row` says what is in one.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from quorsum.errors import DataError
from quorsum.simulation.lab_summary import Cell, Condition, Defence, Standing, data_name, summarise

__all__ = ["Row", "built_in_rows", "rows_from_cells", "rows_from_json"]

SCHEMA_VERSION: Final = 1
_FILE: Final = Path(__file__).with_name("lab_evidence.json")


@dataclass(frozen=True)
class Row:
    """One defence under one condition. Measures are fractions 0 .. 1, by seed.

    Attributes:
        rule: its name, as ``parse_rule`` reads it.
        extras: what else guards the model, in words; empty for the rule alone.
        scene: the condition without its counts and its suite, in words.
        scene_id: tells scenes apart that read alike.
        suite: cipher suite.
        sites, poisoned, tolerate: n, how many were malicious, and f as declared.
        measure: name of the primary measure.
        attacks: that the worst case is over.
        worst: the worst case over the attacks.
        worst_attack: the attack that was the worst for most seeds.
        clean: without an attack; empty where it was not measured.
        success: the highest attack success over the backdoors; empty without backdoors.
    """

    rule: str
    extras: str
    scene: str
    scene_id: str
    suite: str
    sites: int
    poisoned: int
    tolerate: int
    measure: str
    attacks: tuple[str, ...]
    worst: Mapping[int, float]
    worst_attack: str
    clean: Mapping[int, float]
    success: Mapping[int, float]

    @property
    def name(self) -> str:
        """Rule and extras."""
        return ", ".join(filter(None, (self.rule, self.extras)))

    @property
    def share(self) -> float:
        """f/n."""
        return self.tolerate / self.sites


def rows_from_cells(cells: Sequence[Cell]) -> tuple[Row, ...]:
    """What a lab run says for advice: every defence that met all attacks, where f is as many as are malicious.

    A declared f below the number of malicious sites shows what happens when a promise is broken; above it, the worst
    case would be too good. Neither says what the rule does at its f.
    """
    summary = summarise(cells)
    return tuple(
        _row(standing, summary.measure)
        for standing in summary.standings
        if standing.worst is not None and standing.condition.tolerate == standing.condition.poisoned
    )


def _row(standing: Standing, measure: str) -> Row:
    condition, worst = standing.condition, standing.worst
    if worst is None:
        raise ValueError("a standing without a worst case is no evidence")
    scene = tuple(pair for pair in condition.panel if pair[0] not in ("suite", "runtime", "timeout"))
    return Row(
        rule=standing.defence.rule,
        extras=_extras(standing.defence),
        scene=_scene(condition),
        scene_id=hashlib.sha256(json.dumps(scene).encode()).hexdigest()[:8],
        suite=str(condition.setting("suite")),
        sites=condition.sites,
        poisoned=condition.poisoned,
        tolerate=condition.tolerate,
        measure=measure,
        attacks=tuple(standing.by_attack),
        worst=_rounded(worst.by_seed),
        worst_attack=worst.attack,
        clean=_rounded(standing.clean),
        success=_rounded(standing.worst_success or {}),
    )


def _rounded(values: Mapping[int, float]) -> dict[int, float]:
    # Six digits are more than any test set resolves, and keep the file readable.
    return {seed: round(value, 6) for seed, value in values.items()}


def _extras(defence: Defence) -> str:
    settings = {name: json.loads(text) for name, text in defence.settings}
    words = [name for name in ("quarantine", "gate") if settings.get(name)]
    if settings.get("site_momentum"):
        words.append(f"site momentum {settings['site_momentum']:g}")
    return ", ".join(words)


def _scene(condition: Condition) -> str:
    words = [data_name(condition.setting("data"))]
    split, alpha = condition.setting("split"), condition.setting("alpha")
    words.append(str(split) if split else "iid" if alpha is None else f"dirichlet:{alpha:g}")
    if condition.setting("model") not in (None, "auto"):
        words.append(str(condition.setting("model")))
    words.append(f"{condition.setting('rounds')} rounds")
    return ", ".join(words)


def rows_from_json(tree: Any, source: str) -> tuple[Row, ...]:
    """The rows of an evidence file.

    Args:
        tree: the parsed JSON.
        source: name of the file, for errors.

    Raises:
        DataError: it is no evidence.
    """
    if not isinstance(tree, Mapping) or tree.get("schema_version") != SCHEMA_VERSION:
        raise DataError("other-schema", f"{source} is no evidence of schema_version {SCHEMA_VERSION}; make it again")
    try:
        return tuple(
            Row(
                **{
                    **row,
                    "attacks": tuple(row["attacks"]),
                    **{
                        name: {int(seed): float(value) for seed, value in row[name].items()}
                        for name in ("worst", "clean", "success")
                    },
                }
            )
            for row in tree["rows"]
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError("not-evidence", f"{source} has a row that cannot be read ({error!r}); make it again") from None


@cache
def built_in_rows() -> tuple[Row, ...]:
    """The evidence that quorsum brings.

    Raises:
        DataError: the installed file is damaged.
    """
    try:
        tree = json.loads(_FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("not-evidence", f"{_FILE} cannot be read ({error}); install quorsum again") from None
    return rows_from_json(tree, str(_FILE))


def evidence_text(folders: Sequence[Path]) -> str:
    """The evidence of finished lab runs as the text of a file.

    Raises:
        UsageError: a folder is none of ``quorsum lab run``.
        DataError: a file in one cannot be read.
    """
    from quorsum.simulation.lab_run import read_cells, read_plan

    sources, rows = [], []
    for folder in folders:
        plan = read_plan(folder)
        sources.append({"name": plan.name, "command": plan.command, "versions": dict(plan.versions)})
        rows += [json.dumps(asdict(row)) for row in rows_from_cells([cell.to_json() for cell in read_cells(folder)])]
    head = json.dumps({"schema_version": SCHEMA_VERSION, "sources": sources}, indent=1)[:-2]
    # One row a line, so that a difference between two files can be read.
    return f'{head},\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n" if rows else f'{head},\n "rows": []\n}}\n'


if __name__ == "__main__":
    sys.stdout.write(evidence_text([Path(argument) for argument in sys.argv[1:]]))
