"""``quorsum lab advise``: which rule to use for n sites of which f may be malicious, from what was measured.

How a rule is chosen, in this order:

1. It must run: enough sites for its bound and for the suite, and a breakdown point above zero if f is.
2. Evidence is taken, for every *scene* (data, split, model, rounds), from the condition whose f/n is nearest to the one
   asked for; of two equally near the one with more malicious sites.
3. Rules that no other beats in their **lowest** scene stay; of these, rules that no other beats **on average** over the
   scenes. Beaten means beyond the noise, as in :mod:`quorsum.simulation.lab_summary`.
4. Of what is left, which is then a tie, the simplest: under ``sealed`` a rule that is a selection by itself; fewer
   parts in its name; then :data:`SIMPLEST` first, which is in order of cost.

A rule without evidence is never recommended before one with evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

from quorsum.aggregation import parse_rule
from quorsum.errors import BoundError, UsageError
from quorsum.simulation.lab_evidence import Row, built_in_rows, rows_from_cells
from quorsum.simulation.lab_summary import LEAST_SEEDS, BySeed, Cell, better, spread
from quorsum.simulation.run import DEFAULT_RULE, MAX_SITES, SUITES, Simulation

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SIMPLEST", "Advice", "Candidate", "advise"]

SCHEMA_VERSION: Final = 1

SIMPLEST: Final = (
    "multi-krum", "centred-clipping", "crowd-clipping", "geometric-median", "spectral", "mda", "trimmed-mean", "median",
    "monna", "fltrust", "krum", "mean",
)  # fmt: skip
"""Rules in the order in which a tie is broken: by cost in n, then those that need to see updates or a trusted site."""

_KNOWN: Final = (
    "mean", "multi-krum", "spectral", "mda", "geometric-median", "centred-clipping", "crowd-clipping", "trimmed-mean",
    "median",
    "nnm+multi-krum", "nnm+spectral", "nnm+mda", "nnm+geometric-median", "nnm+centred-clipping", "nnm+trimmed-mean",
    "arc+nnm+multi-krum",
)  # fmt: skip
_SELECTIONS: Final = ("spectral", "multi-krum", "mda")
_NEAR: Final = 0.05
_LARGEST_SUCCESS: Final = 0.05


@dataclass(frozen=True)
class Finding:
    """What was measured of a candidate in one scene. Fractions 0 .. 1.

    Attributes:
        scene: data, split, model and rounds.
        suite, sites, poisoned: where it was measured.
        distance: how far its f/n is from the one asked for.
        mean, deviation: the worst case over attacks, over the seeds; the deviation is None for one seed.
        seeds: how many.
        attack: the worst one, for most seeds.
        attacks: all attacks that the worst case is over.
        success: mean of the highest success of a backdoor; None without backdoors.
    """

    scene: str
    suite: str
    sites: int
    poisoned: int
    distance: float
    mean: float
    deviation: float | None
    seeds: int
    attack: str
    attacks: tuple[str, ...]
    success: float | None


@dataclass(frozen=True)
class Candidate:
    """One defence that was considered.

    Attributes:
        name: rule, and what else guards the model.
        rule: the rule alone.
        bound: its bound on f as text.
        least_sites: how many sites it needs for this f under any suite.
        excluded: why it cannot be used here; empty if it can.
        findings: what was measured, one for each scene.
    """

    name: str
    rule: str
    bound: str
    least_sites: int
    excluded: str
    findings: tuple[Finding, ...]

    @property
    def lowest(self) -> Finding | None:
        """The scene with the lowest worst case."""
        return min(self.findings, key=lambda finding: finding.mean, default=None)


@dataclass(frozen=True)
class Advice:
    """Which rule, and why.

    Attributes:
        sites, tolerate, suite: what was asked.
        recommended: name of the defence; its rule is ``candidates[0].rule``.
        tied: others that cannot be told apart from it by what was measured.
        why: sentences.
        warnings: what makes the evidence thin, sentences.
        candidates: the recommended one first, then those that run (by lowest worst case), then those that do not.
    """

    sites: int
    tolerate: int
    suite: str
    recommended: str
    tied: tuple[str, ...]
    why: str
    warnings: tuple[str, ...]
    candidates: tuple[Candidate, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def table(self) -> Table:
        """The same for people; as wide as the terminal."""
        from rich.table import Table
        from rich.text import Text

        notes = "\n".join([self.why, *(f"Thin: {warning}." for warning in self.warnings), *self._not_shown()])
        title = f"{self.tolerate} of {self.sites} sites may be malicious, suite {self.suite}: use {self.recommended}"
        table = Table(
            title=Text(title), title_justify="left", caption=Text(notes), caption_justify="left", title_style="bold",
        )  # fmt: skip
        table.add_column("rule", overflow="fold")
        table.add_column("bound", overflow="fold")
        table.add_column("lowest worst case", overflow="fold")
        table.add_column("measured with", overflow="fold")
        for candidate in self._shown():
            mark = "use" if candidate.name == self.recommended else "tied" if candidate.name in self.tied else ""
            style = "bold" if mark == "use" else "dim" if candidate.excluded else ""
            name = f"{candidate.name} ({mark})" if mark else candidate.name
            cells = (name, candidate.bound, *_measured(candidate))
            table.add_row(*(Text(cell) for cell in cells), style=style)
        return table

    def _shown(self) -> list[Candidate]:
        """The recommended one, and what was measured and runs."""
        return [c for c in self.candidates if c.name == self.recommended or (c.findings and not c.excluded)]

    def _not_shown(self) -> list[str]:
        shown = {candidate.name for candidate in self._shown()}
        rest = [candidate for candidate in self.candidates if candidate.name not in shown]
        unknown = [candidate.name for candidate in rest if not candidate.excluded]
        reasons: dict[str, list[str]] = {}
        for candidate in rest:
            if candidate.excluded:
                # A reason begins with the name of its rule where it was made for one; that need not be said twice.
                reasons.setdefault(candidate.excluded.removeprefix(f"{candidate.rule} "), []).append(candidate.name)
        lines = [f"Would run, not measured: {', '.join(unknown)}."] if unknown else []
        return lines + [f"Cannot be used ({reason}): {', '.join(names)}." for reason, names in reasons.items()]


def _measured(candidate: Candidate) -> tuple[str, str]:
    lowest = candidate.lowest
    if candidate.excluded or lowest is None:
        return candidate.excluded or "no evidence", ""
    give = "" if lowest.deviation is None else f" ± {100 * lowest.deviation:.1f}"
    seeds = f"{lowest.seeds} seed" if lowest.seeds == 1 else f"{lowest.seeds} seeds"
    return (
        f"{100 * lowest.mean:.1f} %{give} under {lowest.attack}",
        f"{lowest.scene}; {lowest.poisoned} of {lowest.sites} malicious, {seeds}, {lowest.suite}",
    )


def advise(evidence: Sequence[Cell], sites: int, tolerate: int, suite: str) -> Advice:
    """Choose a rule.

    Args:
        evidence: cells of lab runs; empty takes the evidence that quorsum brings.
        sites: n.
        tolerate: f.
        suite: cipher suite.

    Raises:
        UsageError: an argument is out of range, the evidence has nothing to say, or no rule can tolerate that many.
    """
    if suite not in SUITES:
        raise UsageError(f"no suite is called {suite!r}; known: {', '.join(SUITES)}")
    if not 3 <= sites <= MAX_SITES:
        raise UsageError(f"--sites must lie in 3 .. {MAX_SITES}, got {sites}")
    if not 0 <= tolerate < sites:
        raise UsageError(f"--tolerate must lie in 0 .. {sites - 1} for {sites} sites, got {tolerate}")
    rows = rows_from_cells(evidence) if evidence else built_in_rows()
    if evidence and not rows:
        raise UsageError(
            "these cells say nothing about a rule at its f: no defence met every attack with as many malicious sites "
            "as it tolerates; run the grid to its end"
        )
    return _chosen(rows, sites, tolerate, suite)


def _chosen(rows: Sequence[Row], sites: int, tolerate: int, suite: str) -> Advice:
    near, warnings = _near(rows, sites, tolerate, suite)
    names = {row.name: row.rule for row in near} | {rule: rule for rule in _KNOWN}
    found = [_candidate(name, rule, near, sites, tolerate, suite) for name, rule in names.items()]
    fit = [candidate for candidate in found if not candidate.excluded]
    if not fit:
        least = min(found, key=lambda c: c.least_sites if c.rule != "mean" else 10**9)
        raise UsageError(
            f"no rule tolerates {tolerate} malicious ones of {sites} sites under {suite}: {least.excluded}; "
            "more sites, or a smaller --tolerate"
        )
    tied, why, more = _decided(fit, near, suite)
    best = min(tied, key=lambda candidate: _simplicity(candidate, suite))
    others = tuple(candidate.name for candidate in tied if candidate is not best)
    if others and best.findings:
        why += f" Of these it is the simplest{' whose guarantee is that of a selection' if suite == 'sealed' else ''}."
    ordered = sorted(
        found,
        key=lambda c: (c is not best, bool(c.excluded), -len(c.findings), -c.lowest.mean if c.lowest else 1.0),
    )
    return Advice(
        sites=sites,
        tolerate=tolerate,
        suite=suite,
        recommended=best.name,
        tied=others,
        why=why.format(best=best.name, others=_listed(others)),
        warnings=(*warnings, *more, *_thin(best, sites, tolerate)),
        candidates=tuple(ordered),
    )


# --- evidence --------------------------------------------------------------------------------------------------------


def _near(rows: Sequence[Row], sites: int, tolerate: int, suite: str) -> tuple[list[Row], list[str]]:
    """For each scene the rows of the condition nearest in f/n, of the suite asked for if it was measured at all."""
    warnings = []
    mine = [row for row in rows if row.suite == suite]
    if rows and not mine:
        others = ", ".join(dict.fromkeys(row.suite for row in rows))
        warnings.append(f"nothing was measured under {suite}; this is from {others}")
        # Under sealed a rule only selects: what a rule that weighs or mixes did elsewhere is not what it does there.
        mine = [row for row in rows if row.rule in _SELECTIONS or (suite == "sealed") == (row.suite == "sealed")]
    nearest: dict[tuple[str, str], tuple[float, int, int]] = {}
    for row in mine:
        place = _place(row, sites, tolerate)
        key = (row.scene_id, row.suite)
        nearest[key] = min(nearest.get(key, place), place)
    return [row for row in mine if _place(row, sites, tolerate) == nearest[row.scene_id, row.suite]], warnings


def _place(row: Row, sites: int, tolerate: int) -> tuple[float, int, int]:
    # Digits beyond the ninth are rounding: 1/10 and 3/10 are equally far from 2/10.
    return round(abs(row.share - tolerate / sites), 9), -row.poisoned, abs(row.sites - sites)


def _candidate(name: str, rule: str, near: Sequence[Row], sites: int, tolerate: int, suite: str) -> Candidate:
    parsed = parse_rule(rule)
    findings = tuple(_finding(row, sites, tolerate) for row in near if row.name == name)
    least = parsed.minimum_sites(tolerate)
    return Candidate(name, parsed.name, parsed.bound, least, _excluded(rule, sites, tolerate, suite), findings)


def _excluded(rule: str, sites: int, tolerate: int, suite: str) -> str:
    """Why a rule cannot be used, by the same check that a simulation and a federation make; empty if it can."""
    parsed = parse_rule(rule)
    if tolerate and not parsed.robust:
        return "one malicious site can move it anywhere"
    reference = "site-01" if parsed.needs_reference else None
    try:
        Simulation(
            sites=sites, poisoned=tolerate, tolerate=tolerate, rule=rule, suite=suite, reference=reference
        ).checked()
    except BoundError as error:
        return str(error).partition(";")[0]
    except UsageError as error:
        return str(error).partition(":")[0]
    return ""


def _finding(row: Row, sites: int, tolerate: int) -> Finding:
    mean, deviation = spread(row.worst.values())
    return Finding(
        scene=row.scene,
        suite=row.suite,
        sites=row.sites,
        poisoned=row.poisoned,
        distance=round(abs(row.share - tolerate / sites), 4),
        mean=mean,
        deviation=deviation if len(row.worst) > 1 else None,
        seeds=len(row.worst),
        attack=row.worst_attack,
        attacks=row.attacks,
        success=fmean(row.success.values()) if row.success else None,
    )


# --- the decision ----------------------------------------------------------------------------------------------------


def _decided(fit: Sequence[Candidate], near: Sequence[Row], suite: str) -> tuple[list[Candidate], str, list[str]]:
    """Candidates that cannot be told apart at the top, why (with {best} and {others} to fill in), and warnings."""
    measured = [candidate for candidate in fit if candidate.findings]
    if not measured:
        usual = [c for c in fit if c.rule == DEFAULT_RULE[suite]] or list(fit)
        why = "Nothing was measured for these rules. {best} is the usual one here, and only its bound speaks for it."
        return usual, why, ["there is no evidence at all; run a grid of your own with quorsum lab run"]
    most = max(len(candidate.findings) for candidate in measured)
    whole = [candidate for candidate in measured if len(candidate.findings) == most]
    part = [candidate.name for candidate in measured if len(candidate.findings) < most]
    warnings = [f"not compared, because measured in fewer than {most} scenes: {', '.join(part)}"] if part else []
    lowest = {c.name: _over_scenes(c.name, near, min) for c in whole}
    average = {c.name: _over_scenes(c.name, near, fmean) for c in whole}
    first = _unbeaten(whole, lowest)
    second = _unbeaten(first, average)
    where = "the one scene" if most == 1 else f"the lowest of {most} scenes"
    if len(second) == 1 and len(first) == 1:
        why = f"No other rule is as good as {{best}} in {where}, beyond the noise."
    elif len(second) == 1:
        beside = _listed([candidate.name for candidate in first if candidate is not second[0]])
        why = f"In {where} {{best}} is not told apart from {beside}; on average over the scenes it is better."
    else:
        why = f"{{best}} is not told apart from {{others}}, neither in {where} nor on average."
    if max(len(values) for values in lowest.values()) < LEAST_SEEDS:
        why = f"With fewer than {LEAST_SEEDS} seeds nothing is ranked: {{best}} is not told apart from {{others}}."
        why = why if len(second) > 1 else "{best} is the only rule that was measured."
    elif len(whole) == 1:
        why = "{best} is the only rule that was measured and can be used here."
    return second, why, warnings


def _over_scenes(name: str, near: Sequence[Row], together: Any) -> dict[int, float]:
    mine = [row.worst for row in near if row.name == name]
    seeds = set.intersection(*(set(worst) for worst in mine))
    return {seed: together([worst[seed] for worst in mine]) for seed in sorted(seeds)}


def _unbeaten(candidates: Sequence[Candidate], numbers: Mapping[str, BySeed]) -> list[Candidate]:
    return [
        candidate
        for candidate in candidates
        if not any(better(numbers[other.name], numbers[candidate.name]) for other in candidates)
    ]


def _simplicity(candidate: Candidate, suite: str) -> tuple[bool, int, int, str]:
    parts = candidate.rule.split("+")
    last = parts[-1].partition("(")[0]
    extras = candidate.name.count(",") - candidate.rule.count(",")
    place = SIMPLEST.index(last) if last in SIMPLEST else len(SIMPLEST)
    return suite == "sealed" and candidate.rule not in _SELECTIONS, len(parts) + extras, place, candidate.name


def _thin(best: Candidate, sites: int, tolerate: int) -> list[str]:
    """What a reader should know before trusting the numbers of the recommended rule."""
    found: list[str] = []
    lowest = best.lowest
    if lowest is None:
        return found
    far = max(best.findings, key=lambda finding: finding.distance)
    if far.distance > _NEAR:
        found.append(
            f"the nearest measured share of malicious sites is {far.poisoned} of {far.sites} "
            f"({100 * far.poisoned / far.sites:.0f} %), asked were {100 * tolerate / sites:.0f} %"
        )
    if not any(finding.sites / 2 <= sites <= finding.sites * 2 for finding in best.findings):
        found.append(f"it was measured with {lowest.sites} sites, not with about {sites}")
    fewest = min(finding.seeds for finding in best.findings)
    if fewest < LEAST_SEEDS:
        found.append(f"{fewest} seed{'s' * (fewest != 1)} only; it takes {LEAST_SEEDS} to rank")
    if len({attack for finding in best.findings for attack in finding.attacks}) < LEAST_SEEDS:
        found.append("fewer than three attacks were tried; others may do worse")
    if len(best.findings) == 1:
        found.append(f"one scene only ({lowest.scene}); your data may behave otherwise")
    success = max((finding.success for finding in best.findings if finding.success is not None), default=0.0)
    if success > _LARGEST_SUCCESS:
        found.append(f"a backdoor succeeded in {100 * success:.0f} % of its tries against it")
    return found


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "any other"
