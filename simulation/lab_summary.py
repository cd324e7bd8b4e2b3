"""From the cells of a lab run to numbers: worst cases, spreads, prices, and rankings that stop where the noise begins.

A *cell* is one simulation as it lies in ``DIR/cells``: a mapping with ``id``, ``settings``, ``result`` (or None),
``failed`` (a sentence, or None), ``seconds`` and ``state``. Everything here is a pure function of cells.

How cells are compared:

* The **defence** of a cell is its rule and what else guards the model (:data:`DEFENCE`). Its **condition** is all the
  rest but the attack and the seed: data, split, number of sites, how many are malicious, suite. Defences are compared
  inside one condition only, where they met the same attacks on the same data.
* The **worst case** is taken for each seed on its own, over all attacks of the condition, and then averaged over the
  seeds. Taking the attack with the lowest average would flatter a defence that fails under another attack each time.
* A defence that lacks an attack or a seed has no worst case there: nothing is compared with a hole in it.
* Two defences are compared by the **paired t interval** of their worst cases over the seeds that both have, since a
  seed decides data split, partition and who is malicious for both alike. One is *better* only if the 95 % interval of
  the difference excludes zero and the difference is at least :data:`LEAST_LEAD`. With fewer than :data:`LEAST_SEEDS`
  seeds nothing is ranked. The rank of a defence is one more than the number of defences that are better.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, product
from pathlib import PurePath
from statistics import fmean, stdev
from typing import Any, Literal, TypeAlias

__all__ = [
    "DEFENCE",
    "LEAST_LEAD",
    "LEAST_SEEDS",
    "Cell",
    "Comparison",
    "Condition",
    "Defence",
    "Gap",
    "Run",
    "Standing",
    "Summary",
    "Worst",
    "better",
    "compare",
    "data_name",
    "headline",
    "measure_name",
    "spread",
    "summarise",
]

Cell: TypeAlias = Mapping[str, Any]
BySeed: TypeAlias = Mapping[int, float]

DEFENCE = ("rule", "reference", "clip", "quarantine", "gate", "site_momentum")
"""Settings that make up a defence. All other settings but the attack and the seed make up the condition."""

LEAST_SEEDS = 3
"""With fewer seeds nothing is ranked: two numbers say nothing about their own spread."""

LEAST_LEAD = 0.005
"""Half a percentage point. What the noise of encryption alone can make is no lead, however steady it looks."""

CONFIDENCE = 0.95

_NO_ATTACK = "none"
_COUNTS = ("poisoned", "sites", "tolerate")
_MEASURES = {
    "accuracy": "accuracy",
    "average_precision": "AUC-PR",
}


# --- what a cell is about --------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Condition:
    """What defences are compared under.

    Attributes:
        panel: all settings of the condition but the three counts, as pairs of name and JSON text, sorted by name.
        poisoned: how many sites are malicious.
        sites: n.
        tolerate: f, as it was declared to the rule.
    """

    panel: tuple[tuple[str, str], ...]
    poisoned: int
    sites: int
    tolerate: int

    @property
    def column(self) -> str:
        """The counts in words."""
        declared = "" if self.tolerate == self.poisoned else f", f = {self.tolerate} declared"
        return f"{self.poisoned} of {self.sites} malicious{declared}"

    def setting(self, name: str) -> Any:
        """One setting of the panel as a value, or None where there is no such setting."""
        found = dict(self.panel).get(name)
        return None if found is None else json.loads(found)


@dataclass(frozen=True, order=True)
class Defence:
    """What guards the model: the settings in :data:`DEFENCE` as pairs of name and JSON text; the rule comes first."""

    settings: tuple[tuple[str, str], ...]

    @property
    def rule(self) -> str:
        """The name of the rule."""
        return str(json.loads(self.settings[0][1]))


@dataclass(frozen=True, eq=False)
class Run:
    """The numbers of one finished cell. Shares and measures are fractions, 0 .. 1.

    Attributes:
        cell: the cell itself, for its rounds.
        value: the primary measure of the last model.
        success: share of triggered test rows on which a backdoor had its way; None without a backdoor.
        poisoned_rejected, honest_rejected: shares of site-rounds; None where there are no such sites.
        failed_rounds: rounds in which the model did not change.
    """

    cell: Cell
    condition: Condition
    defence: Defence
    attack: str
    seed: int
    value: float
    success: float | None
    poisoned_rejected: float | None
    honest_rejected: float | None
    failed_rounds: int

    @property
    def clean(self) -> bool:
        """Whether nobody attacked."""
        return self.attack == _NO_ATTACK or self.condition.poisoned == 0


@dataclass(frozen=True)
class Worst:
    """The worst case over attacks.

    Attributes:
        by_seed: for each seed the lowest value over all attacks.
        attack: the attack that was the worst for most seeds.
        times: for how many of them.
    """

    by_seed: BySeed
    attack: str
    times: int


@dataclass(frozen=True)
class Comparison:
    """How two series of numbers relate, paired by seed.

    Attributes:
        difference: mean of first minus second; NaN without a common seed.
        half: half the width of the 95 % interval of the difference; infinite below two seeds.
        seeds: how many seeds both have.
        verdict: which is better; "tied" inside the noise, "no ranking" with too few seeds.
    """

    difference: float
    half: float
    seeds: int
    verdict: Literal["first", "second", "tied", "no ranking"]


@dataclass(frozen=True, eq=False)
class Standing:
    """One defence under one condition.

    Attributes:
        runs: its finished cells under this condition.
        by_attack: the primary measure by attack and seed, without ``none``.
        success: attack success by backdoor and seed.
        missing: attacks (with the number of seeds) that other cells of the condition have and this defence lacks.
        worst: the worst case; None where anything is missing, or nobody attacked.
        worst_success: for each seed the highest success over the backdoors; None without backdoors.
        clean: the primary measure without an attack, by seed; empty where it was not measured.
        price: what the defence costs without an attack, by seed: the plain mean's measure minus its own.
        rank: 1 is best; None where it was not ranked.
        shared: whether another defence has the same rank.
        unranked: why there is no rank; empty where there is one.
    """

    condition: Condition
    defence: Defence
    runs: tuple[Run, ...]
    by_attack: Mapping[str, BySeed]
    success: Mapping[str, BySeed]
    missing: tuple[str, ...]
    worst: Worst | None
    worst_success: BySeed | None
    clean: BySeed
    price: BySeed
    rank: int | None = None
    shared: bool = False
    unranked: str = ""

    def worst_runs(self) -> tuple[Run, ...]:
        """The cells under the attack that was the worst for most seeds, in order of their seeds."""
        if self.worst is None:
            return ()
        return tuple(sorted((r for r in self.runs if r.attack == self.worst.attack), key=lambda run: run.seed))

    def worst_backdoor_runs(self) -> tuple[Run, ...]:
        """The cells under the backdoor with the highest mean success, in order of their seeds."""
        if not self.success:
            return ()
        attack = max(self.success, key=lambda name: fmean(self.success[name].values()))
        return tuple(sorted((run for run in self.runs if run.attack == attack), key=lambda run: run.seed))


@dataclass(frozen=True)
class Gap:
    """Cells without a result, or with failed rounds, and why.

    Attributes:
        kind: "not applicable" (the settings cannot work, nothing was run), "failed" or "failed rounds".
        defence: rule of the cells.
        reason: a sentence.
        cells: how many cells it is about.
        where: the conditions, in words.
    """

    kind: Literal["not applicable", "failed", "failed rounds"]
    defence: str
    reason: str
    cells: int
    where: str


@dataclass(frozen=True, eq=False)
class Summary:
    """All numbers of a lab run.

    Attributes:
        cells: how many cells were given.
        planned: how many the plan has.
        runs: the finished ones, in the order given.
        standings: every defence under every condition, in the order in which they first occur.
        gaps: what has no result and why.
        measure: name of the primary measure in words.
        versions: versions that made the results, by name; several are joined by commas.
        seconds: how long all cells took together, one after the other.
    """

    cells: int
    planned: int
    runs: tuple[Run, ...]
    standings: tuple[Standing, ...]
    gaps: tuple[Gap, ...]
    measure: str
    versions: Mapping[str, str]
    seconds: float
    _varying: tuple[str, ...] = field(default=(), repr=False)
    _marked: tuple[str, ...] = field(default=(), repr=False)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """All conditions under which somebody attacked, in the order in which they first occur."""
        return tuple(dict.fromkeys(s.condition for s in self.standings if s.by_attack))

    @property
    def panels(self) -> tuple[tuple[tuple[str, str], ...], ...]:
        """The different panels of these conditions."""
        return tuple(dict.fromkeys(condition.panel for condition in self.conditions))

    @property
    def defences(self) -> tuple[Defence, ...]:
        """All defences, in the order in which they first occur."""
        return tuple(dict.fromkeys(standing.defence for standing in self.standings))

    @property
    def attacks(self) -> tuple[str, ...]:
        """All attacks but ``none``, in the order in which they first occur."""
        return tuple(dict.fromkeys(run.attack for run in self.runs if not run.clean))

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds."""
        return tuple(sorted({run.seed for run in self.runs}))

    def under(self, condition: Condition) -> tuple[Standing, ...]:
        """The defences under one condition."""
        return tuple(standing for standing in self.standings if standing.condition == condition)

    def panel_name(self, panel: tuple[tuple[str, str], ...]) -> str:
        """What is special about a panel: the settings in which panels differ; empty if they do not."""
        # With a split of its own, a panel has no use for alpha.
        idle = "alpha" if dict(panel).get("split", "null") != "null" else ""
        return ", ".join(_words(name, text) for name, text in panel if name in self._varying and name != idle)

    def condition_name(self, condition: Condition) -> str:
        """A condition in words: its counts, and its panel where panels differ."""
        return ", ".join(filter(None, (self.panel_name(condition.panel), condition.column)))

    def defence_name(self, defence: Defence) -> str:
        """The rule, and what else guards where that differs between defences with the same rule."""
        extras = [_words(name, text) for name, text in defence.settings[1:] if name in self._marked]
        return ", ".join([defence.rule, *extras])


# --- numbers ---------------------------------------------------------------------------------------------------------


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN where there are too few values for them."""
    numbers = list(values)
    mean = fmean(numbers) if numbers else math.nan
    return mean, stdev(numbers) if len(numbers) > 1 else math.nan


def compare(first: BySeed, second: BySeed) -> Comparison:
    """Which of two series is higher, beyond the noise: the paired t interval of their difference over common seeds."""
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return Comparison(math.nan, math.inf, 0, "no ranking")
    difference, deviation = spread(first[seed] - second[seed] for seed in seeds)
    if len(seeds) < LEAST_SEEDS:
        return Comparison(difference, math.inf, len(seeds), "no ranking")
    half = _student(len(seeds) - 1) * deviation / math.sqrt(len(seeds))
    # The last digit of a float must not decide: 0.905 - 0.9 is a hair below 0.005.
    if abs(difference) <= half or abs(difference) < LEAST_LEAD - 1e-12:
        return Comparison(difference, half, len(seeds), "tied")
    return Comparison(difference, half, len(seeds), "first" if difference > 0 else "second")


def better(first: BySeed, second: BySeed) -> bool:
    """Whether the first series is higher than the second, beyond the noise."""
    return compare(first, second).verdict == "first"


def _student(freedom: int) -> float:
    """The two-sided 95 % point of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


# --- from cells to standings -----------------------------------------------------------------------------------------


def summarise(cells: Sequence[Cell], planned: int | None = None) -> Summary:
    """All numbers of a lab run.

    Args:
        cells: those that there are, in the order of the plan.
        planned: how many there should be; as many as there are, if not given.
    """
    finished = [cell for cell in cells if cell["result"] is not None]
    runs = tuple(_run(cell) for cell in finished)
    groups: dict[tuple[Condition, Defence], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.condition, run.defence), []).append(run)
    wanted = _wanted(runs)
    clean: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        if run.clean:
            clean.setdefault(run.condition.panel, []).append(run)
    standings = [
        _standing(condition, defence, tuple(group), wanted.get(condition, frozenset()), clean.get(condition.panel, []))
        for (condition, defence), group in groups.items()
    ]
    measures = dict.fromkeys(measure_name(cell["result"]) for cell in finished)
    return Summary(
        cells=len(cells),
        planned=len(cells) if planned is None else max(planned, len(cells)),
        runs=runs,
        standings=tuple(_ranked(standings)),
        gaps=_gaps(cells),
        measure=" / ".join(_MEASURES[name] for name in measures) or "accuracy",
        versions=_versions(finished),
        seconds=math.fsum(float(cell["seconds"]) for cell in cells),
        _varying=_varying(runs),
        _marked=_marked(runs),
    )


def measure_name(result: Mapping[str, Any]) -> str:
    """The primary measure of a result: the one that it names in ``final.primary``, or else accuracy.

    A result names the area under precision and recall where one class is rare: there a model that never finds it has a
    high accuracy.
    """
    final = result["final"]
    named = final.get("primary")
    return named if named in _MEASURES and named in (final.get("metrics") or {}) else "accuracy"


def _settings(cell: Cell) -> dict[str, Any]:
    """The settings of a cell, with what the simulation filled in."""
    config = (cell["result"] or {}).get("config", {})
    settings = {**cell["settings"], **config}
    if settings.get("tolerate") is None:
        settings["tolerate"] = settings.get("poisoned", 0)
    return settings


def _condition(settings: Mapping[str, Any]) -> Condition:
    left = {"attack", "seed", *DEFENCE, *_COUNTS}
    panel = tuple(sorted((name, json.dumps(value)) for name, value in settings.items() if name not in left))
    return Condition(panel, *(int(settings[name]) for name in _COUNTS))


def _defence(settings: Mapping[str, Any]) -> Defence:
    rule = settings.get("rule") or f"usual rule of {settings.get('suite')}"
    rest = ((name, json.dumps(settings.get(name))) for name in DEFENCE[1:])
    return Defence((("rule", json.dumps(rule)), *rest))


def _run(cell: Cell) -> Run:
    result = cell["result"]
    settings, final = _settings(cell), result["final"]
    name = measure_name(result)
    value = final["accuracy"] if name == "accuracy" else final["metrics"][name]
    return Run(
        cell=cell,
        condition=_condition(settings),
        defence=_defence(settings),
        attack=str(settings["attack"]),
        seed=int(settings["seed"]),
        value=float(value),
        success=_number(final.get("attack_success")),
        poisoned_rejected=_number(final.get("poisoned_rejected")),
        honest_rejected=_number(final.get("honest_rejected")),
        failed_rounds=sum(bool(record.get("failed")) for record in result["rounds"]),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _wanted(runs: Sequence[Run]) -> dict[Condition, frozenset[tuple[str, int]]]:
    """For each condition the pairs of attack and seed that a defence must have met there to be compared.

    These are all pairs of the attacks and the seeds that occur under the condition. A cell without a result does not
    count: what no defence could meet is not missing.
    """
    attacks: dict[Condition, set[str]] = {}
    seeds: dict[Condition, set[int]] = {}
    for run in runs:
        if not run.clean:
            attacks.setdefault(run.condition, set()).add(run.attack)
            seeds.setdefault(run.condition, set()).add(run.seed)
    return {condition: frozenset(product(found, seeds[condition])) for condition, found in attacks.items()}


def _standing(
    condition: Condition,
    defence: Defence,
    runs: tuple[Run, ...],
    wanted: frozenset[tuple[str, int]],
    beside: Sequence[Run],
) -> Standing:
    attacked = [run for run in runs if not run.clean]
    by_attack = _by_attack(attacked, lambda run: run.value)
    success = _by_attack(attacked, lambda run: run.success)
    lacking = Counter(attack for attack, seed in sorted(wanted) if seed not in by_attack.get(attack, {}))
    missing = tuple(f"{attack} ({count} {_plural(count, 'seed')})" for attack, count in lacking.items())
    clean = _nearest_clean(condition, [run for run in beside if run.defence == defence])
    baseline = _baseline(condition, defence, beside)
    return Standing(
        condition=condition,
        defence=defence,
        runs=runs,
        by_attack=by_attack,
        success=success,
        missing=missing,
        worst=_worst(by_attack) if by_attack and not missing else None,
        worst_success=_highest(success) if success and not missing else None,
        clean=clean,
        price={seed: baseline[seed] - clean[seed] for seed in sorted(set(baseline) & set(clean))},
    )


def _by_attack(runs: Iterable[Run], number: Any) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        value = number(run)
        if value is not None:
            found.setdefault(run.attack, {})[run.seed] = value
    return found


def _worst(by_attack: Mapping[str, BySeed]) -> Worst:
    lowest: dict[int, float] = {}
    guilty: list[str] = []
    for seed in sorted(next(iter(by_attack.values()))):
        lowest[seed], attack = min((values[seed], attack) for attack, values in by_attack.items())
        guilty.append(attack)
    worst, times = Counter(guilty).most_common(1)[0]
    return Worst(lowest, worst, times)


def _highest(success: Mapping[str, BySeed]) -> dict[int, float]:
    seeds = sorted({seed for values in success.values() for seed in values})
    return {seed: max(values[seed] for values in success.values() if seed in values) for seed in seeds}


def _baseline(condition: Condition, defence: Defence, clean: Sequence[Run]) -> dict[int, float]:
    """The plain mean without an attack, with the same extras (such as momentum at sites) where it was run with them."""
    means = [run for run in clean if run.defence.rule == "mean"]
    alike = [run for run in means if run.defence.settings[1:] == defence.settings[1:]]
    return _nearest_clean(condition, alike) or _nearest_clean(condition, means)


def _nearest_clean(condition: Condition, clean: Sequence[Run]) -> dict[int, float]:
    """The measure without an attack by seed: malicious sites that behave, or else the same number of honest ones."""
    exact = {run.seed: run.value for run in clean if run.condition == condition}
    alike = [run for run in clean if run.condition.sites == condition.sites and run.condition.poisoned == 0]
    # Later ones replace earlier ones of the same seed, so that the same f counts before another.
    alike.sort(key=lambda run: run.condition.tolerate == condition.tolerate)
    return exact or {run.seed: run.value for run in alike}


def _ranked(standings: Sequence[Standing]) -> list[Standing]:
    """The same standings with ranks inside each condition."""
    ranked = []
    for standing in standings:
        rivals = [other for other in standings if other.condition == standing.condition and other is not standing]
        why = _why_unranked(standing, rivals)
        if why or standing.worst is None:
            ranked.append(replace(standing, unranked=why))
        else:
            ranked.append(replace(standing, rank=_rank(standing.worst, rivals)))
    firsts = Counter((standing.condition, standing.rank) for standing in ranked if standing.rank is not None)
    return [
        replace(standing, shared=standing.rank is not None and firsts[standing.condition, standing.rank] > 1)
        for standing in ranked
    ]


def _why_unranked(standing: Standing, rivals: Sequence[Standing]) -> str:
    if not standing.by_attack:
        return "no attack was run"
    if standing.worst is None:
        return f"not ranked: {', '.join(standing.missing)} missing"
    seeds = len(standing.worst.by_seed)
    if seeds < LEAST_SEEDS:
        return f"no ranking: {seeds} {_plural(seeds, 'seed')}"
    if not any(rival.worst is not None and len(rival.worst.by_seed) >= LEAST_SEEDS for rival in rivals):
        return "no ranking: nothing to compare with"
    return ""


def _rank(worst: Worst, rivals: Sequence[Standing]) -> int:
    return 1 + sum(better(rival.worst.by_seed, worst.by_seed) for rival in rivals if rival.worst is not None)


# --- what is missing -------------------------------------------------------------------------------------------------


def _gaps(cells: Sequence[Cell]) -> tuple[Gap, ...]:
    entries: list[tuple[str, str, str, str]] = []
    for cell in cells:
        settings = _settings(cell)
        rule, where = _defence(settings).rule, _condition(settings).column
        if cell["result"] is None:
            kind = "not applicable" if cell.get("state") == "not applicable" else "failed"
            entries.append((kind, rule, str(cell["failed"] or "no result and no reason"), where))
            continue
        reasons = {str(record["failed"]) for record in cell["result"]["rounds"] if record.get("failed")}
        entries += [("failed rounds", rule, reason, f"{settings['attack']}, {where}") for reason in sorted(reasons)]
    found = []
    for (kind, rule, reason), same in groupby(sorted(entries), key=lambda entry: entry[:3]):
        places = [entry[3] for entry in same]
        found.append(Gap(kind, rule, reason, len(places), "; ".join(dict.fromkeys(places))))
    order = ("failed", "failed rounds", "not applicable")
    return tuple(sorted(found, key=lambda gap: order.index(gap.kind)))


def _versions(cells: Sequence[Cell]) -> dict[str, str]:
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        for name, text in cell["result"].get("versions", {}).items():
            found.setdefault(str(name), {})[str(text)] = None
    return {name: ", ".join(texts) for name, texts in found.items()}


# --- words -----------------------------------------------------------------------------------------------------------


def _varying(runs: Sequence[Run]) -> tuple[str, ...]:
    """Settings in which panels differ."""
    values: dict[str, set[str]] = {}
    panels = {run.condition.panel for run in runs}
    for panel in panels:
        for name, text in panel:
            values.setdefault(name, set()).add(text)
    holes = {name for name in values if any(name not in dict(panel) for panel in panels)}
    return tuple(name for name, texts in values.items() if len(texts) > 1 or name in holes)


def _marked(runs: Sequence[Run]) -> tuple[str, ...]:
    """Settings in which defences with the same rule differ under the same condition."""
    values: dict[tuple[Condition, str, str], set[str]] = {}
    for run in runs:
        for name, text in run.defence.settings[1:]:
            values.setdefault((run.condition, run.defence.rule, name), set()).add(text)
    return tuple(dict.fromkeys(name for (_, _, name), texts in values.items() if len(texts) > 1))


_PLAIN_WORDS = {"site_momentum": "site momentum", "batch_size": "batch size", "lr": "learning rate"}


def _words(name: str, text: str) -> str:
    value = json.loads(text)
    plain = _PLAIN_WORDS.get(name, name)
    if name == "data":
        return data_name(value)
    if name == "split" and value is None:
        return "usual split"
    if name == "alpha":
        return "iid" if value is None else f"Dirichlet {value:g}"
    if isinstance(value, bool):
        return plain if value else f"no {plain}"
    return f"no {plain}" if value is None else f"{plain} {value}"


def data_name(data: Any) -> str:
    """The last part of the path of a data file, or the name of an embedded data set."""
    return PurePath(str(data)).name or str(data)


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"


def headline(summary: Summary) -> str:
    """The verdict in a sentence or two; it ranks nothing that the seeds do not carry."""
    ranked = [standing for standing in summary.standings if standing.rank is not None]
    if not summary.runs:
        return "No cell has finished yet, so there is nothing to say."
    if not summary.conditions:
        return "No attack was run, so there is no worst case to compare."
    if not ranked:
        return _no_ranking(summary)
    places = Counter(standing.defence for standing in ranked)
    full = [defence for defence in summary.defences if places[defence] == max(places.values())]
    unbeaten = [d for d in full if all(s.rank == 1 for s in ranked if s.defence == d)]
    count = max(places.values())
    everywhere = {1: "in the one condition", 2: "in both conditions"}.get(count, f"in all {count} conditions")
    over = everywhere[0].upper() + everywhere[1:]
    if not unbeaten:
        firsts = Counter(standing.defence for standing in ranked if standing.rank == 1)
        listed = _listed([f"{summary.defence_name(d)} ({firsts[d]} of {count})" for d in full if firsts[d]])
        return f"No defence is unbeaten {everywhere}. In front, alone or shared: {listed}."
    if len(unbeaten) > 1:
        names = _listed([summary.defence_name(defence) for defence in unbeaten])
        floors = " ".join(_floor(summary, defence, name=True) for defence in unbeaten[:2])
        if len(unbeaten) == len(full):
            return f"{over}, the worst cases of {names} cannot be told apart: they differ inside the noise. {floors}"
        return f"{over}, no defence is better in the worst case than {names}, which are not told apart. {floors}"
    (winner,) = unbeaten
    alone = sum(s.rank == 1 and not s.shared for s in ranked if s.defence == winner)
    lead = "it leads alone" if alone == count else f"it leads alone in {alone} and shares the first place in the rest"
    beaten = "no defence is better in the worst case than" if alone < count else "the best worst case is that of"
    return f"{over}, {beaten} {summary.defence_name(winner)}; {lead}. {_floor(summary, winner)}"


def _no_ranking(summary: Summary) -> str:
    with_worst = [standing for standing in summary.standings if standing.worst is not None]
    if not with_worst:
        return "No ranking: no defence has met all attacks yet."
    most = max(len(standing.worst.by_seed) for standing in with_worst if standing.worst is not None)
    if most < LEAST_SEEDS:
        return f"No ranking: {most} {_plural(most, 'seed')}. It takes at least {LEAST_SEEDS} to tell a lead from luck."
    return f"No ranking: only one defence has met all attacks. {_floor(summary, with_worst[0].defence, name=True)}"


def _floor(summary: Summary, defence: Defence, *, name: bool = False) -> str:
    """The lowest worst case of a defence over all conditions."""
    value, where, attack = min(
        (spread(standing.worst.by_seed.values())[0], summary.condition_name(standing.condition), standing.worst.attack)
        for standing in summary.standings
        if standing.defence == defence and standing.worst is not None
    )
    whose = f"The worst case of {summary.defence_name(defence)}" if name else "Its worst case"
    return f"{whose} was {100 * value:.1f} % {summary.measure} ({where}, under {attack})."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
