"""``quorsum lab report``: one page, two pictures and two tables from the cells of a lab run.

The page is one file that loads nothing and runs no script; its own Content-Security-Policy forbids both, so that names
of files and attacks, which come from outside, can do nothing even if they got through the escaping. All numbers are
made in :mod:`quorsum.simulation.lab_summary`, all pictures in :mod:`quorsum.simulation.lab_drawing`.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from quorsum import __version__, durable
from quorsum.errors import QuorsumError
from quorsum.simulation.lab_drawing import (
    SHADES,
    Curve,
    Heat,
    chart,
    draw_charts,
    draw_heats,
    interval,
    key,
    shade,
    shade_rules,
    state_key,
    strip,
)
from quorsum.simulation.lab_run import read_cells, read_plan
from quorsum.simulation.lab_summary import (
    LEAST_LEAD,
    LEAST_SEEDS,
    Cell,
    Condition,
    Run,
    Standing,
    Summary,
    data_name,
    headline,
    measure_name,
    spread,
    summarise,
)

__all__ = ["Origin", "cells_csv", "render_page", "worst_csv", "write_report"]

_PANELS: Final = 6
_STRIPS: Final = 12
_CURVES: Final = 8
_HOLES: Final = 40


@dataclass(frozen=True)
class Origin:
    """Where the cells come from.

    Attributes:
        name: of the grid.
        command: that makes the cells.
        grid: text of the grid file.
        planned: how many cells the plan has.
        versions: of the plan, by name.
    """

    name: str
    command: str
    grid: str
    planned: int
    versions: Mapping[str, str]


def write_report(folder: Path) -> tuple[Path, ...]:
    """Write the report of a lab run into its folder.

    Returns:
        the files: ``report.html`` first, then ``worst-case.png``, ``curves.png``, ``cells.csv`` and
        ``worst-case.csv``. Without an attack there is no worst case and are no pictures.

    Raises:
        UsageError: this is no folder of ``quorsum lab run``.
        DataError: a file in it cannot be read.
        QuorsumError: the report cannot be written.
    """
    plan = read_plan(folder)
    cells = [cell.to_json() for cell in read_cells(folder)]
    grid = folder / "grid.toml"
    text = grid.read_text(encoding="utf-8", errors="replace") if grid.is_file() else "(grid.toml is not there)"
    origin = Origin(plan.name, plan.command, text, len(plan.cells), plan.versions)
    summary = summarise(cells, origin.planned)
    pictures = _pictures(summary, origin, folder)
    tables = {"cells.csv": cells_csv(cells)} | ({"worst-case.csv": worst_csv(summary)} if summary.conditions else {})
    names = [path.name for path in pictures] + list(tables)
    page = folder / "report.html"
    _write(page, render_page(summary, origin, names))
    for name, content in tables.items():
        _write(folder / name, content)
    return (page, *pictures, *(folder / name for name in tables))


_MAKE_ROOM: Final = "make room or check its permissions, and write the report again"


def _write(path: Path, text: str) -> None:
    try:
        durable.replace_file(path, [text.encode()])
    except OSError as error:
        raise QuorsumError(f"cannot write {path}: {error.strerror}; {_MAKE_ROOM}") from None


# --- the page --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One cell of a table on the page."""

    main: str
    note: str = ""
    style: str = ""


@dataclass(frozen=True)
class _Table:
    title: str
    label: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[_Entry, ...]], ...]


def render_page(summary: Summary, origin: Origin, files: Sequence[str] = ()) -> str:
    """The page as text; a pure function of what it is given.

    Args:
        summary: all numbers.
        origin: where they come from.
        files: names of the files beside the page.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__)
    style = here.with_name("lab_report.css").read_text(encoding="utf-8") + shade_rules()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    # A rule's name may be broken after a plus; elsewhere a break would look like another name.
    environment.filters["breakable"] = lambda text: Markup("+<wbr>").join(text.split("+"))
    template = environment.from_string(here.with_name("lab_report.html").read_text(encoding="utf-8"))
    context = _context(summary, origin, files)
    context["contents"] = [
        (id_, text) for id_, text, there in _CONTENTS if not there or any(context[one] for one in there)
    ]
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    # Our own file, not text from outside; escaped, its quotes would break both the style and its digest.
    return template.render(context, style=Markup(style), policy=policy, shades=SHADES)  # noqa: S704


_CONTENTS = (
    ("worst", "Worst case", ("worst",)),
    ("heat", "By malicious sites", ("heats",)),
    ("curves", "Curves", ("curves",)),
    ("backdoors", "Backdoors", ("backdoors",)),
    ("rejected", "Who was rejected", ("strips",)),
    ("price", "Price", ("prices",)),
    ("gaps", "No result", ("gaps", "holes")),
    ("method", "Method", ()),
    ("repeat", "Repeat it", ()),
)


def _context(summary: Summary, origin: Origin, files: Sequence[str]) -> dict[str, Any]:
    focus = _hardest(summary)
    strips = _strips(summary, focus)
    shown = _shown_conditions(summary)
    left_out = len({s.condition for s in summary.standings if s.worst is not None}) - len(shown)
    return {
        "name": origin.name,
        "ran": _what_ran(summary),
        "verdict": headline(summary),
        "warnings": _warnings(summary, origin),
        "facts": _facts(summary, focus),
        "measure": summary.measure,
        "worst": _worst_rows(summary),
        "ranking_note": _ranking_note(summary),
        "heats": _heat_tables(summary),
        "details": _detail_tables(summary),
        "curves": _chart_figures(summary, shown, backdoor=False),
        "curves_note": f" Not drawn here: {_count(left_out, 'more condition')}." if left_out else "",
        "curves_legend": _legend(summary, shown, backdoor=False),
        "backdoors": _backdoor_tables(summary),
        "backdoor_curves": _chart_figures(summary, shown, backdoor=True),
        "backdoors_legend": _legend(summary, shown, backdoor=True),
        "strips": strips,
        "strips_where": _strips_where(summary, focus),
        "states": [{"key": state_key(kind), "name": name} for kind, name in _STATE_NAMES],
        "prices": _price_tables(summary),
        "gaps": summary.gaps,
        "holes": _holes(summary),
        "lead": f"{100 * LEAST_LEAD:g}",
        "least_seeds": LEAST_SEEDS,
        "command": origin.command,
        "versions": _versions(summary, origin),
        "grid": origin.grid.strip(),
        "files": ", ".join(files) or "nothing",
        "cells": _count(summary.cells, "cell"),
        "quorsum": __version__,
    }


_STATE_NAMES = (
    ("kept", "honest, accepted"),
    ("found", "poisoned, rejected"),
    ("lost", "honest, rejected"),
    ("missed", "poisoned, accepted"),
    ("failed", "round failed"),
)


def _what_ran(summary: Summary) -> str:
    if not summary.runs:
        return f"{_count(summary.cells, 'cell')}, none with a result"
    data = dict.fromkeys(data_name(run.condition.setting("data")) for run in summary.runs)
    suites = dict.fromkeys(str(run.condition.setting("suite")) for run in summary.runs)
    return " · ".join(
        (
            _some(list(data)),
            f"suite {_some(list(suites))}",
            _count(len(summary.defences), "defence"),
            _count(len(summary.attacks), "attack") + (f" ({_some(list(summary.attacks))})" if summary.attacks else ""),
            _count(len(summary.seeds), "seed"),
            _duration(summary.seconds) + " of computing",
        )
    )


def _some(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _warnings(summary: Summary, origin: Origin) -> list[str]:
    found = []
    if summary.cells < summary.planned:
        missing = summary.planned - summary.cells
        found.append(
            f"{missing} of {summary.planned} cells have not ended yet, so this is a part of the picture. "
            f"Go on with: {origin.command}"
        )
    failed = sum(gap.cells for gap in summary.gaps if gap.kind == "failed")
    if failed:
        found.append(f"{_count(failed, 'cell')} failed; the reasons are below, under “What has no result”.")
    if any("," in text for text in summary.versions.values()):
        mixed = [name for name, text in summary.versions.items() if "," in text]
        found.append(f"The cells come from different versions of {', '.join(mixed)}; differences may come from that.")
    return found


def _facts(summary: Summary, focus: Condition | None) -> list[dict[str, str]]:
    done, absent = len(summary.runs), sum(gap.cells for gap in summary.gaps if gap.kind == "not applicable")
    note = f"{absent} not applicable" if absent else "nothing is missing" if done == summary.planned else ""
    facts = [{"label": "Cells with a result", "value": f"{done} of {summary.planned}", "note": note}]
    if focus is None:
        return facts
    there = [s for s in summary.under(focus) if s.worst is not None]
    best = max(there, key=_worst_mean)
    where = summary.condition_name(focus)
    facts.append(
        {
            "label": "Best worst case in the hardest condition",
            "value": _percent(_worst_mean(best)),
            "note": f"{summary.defence_name(best.defence)}{_company(summary, best, there)}; {where}",
        }
    )
    plain = [s for s in there if s.defence.rule == "mean"]
    if plain:
        facts.append(
            {
                "label": "What a plain mean has left there",
                "value": _percent(_worst_mean(plain[0])),
                "note": f"under {plain[0].worst.attack}" if plain[0].worst else "",
            }
        )
    if best.price:
        mean, deviation = spread(best.price.values())
        facts.append(
            {
                "label": "Its price without an attack",
                "value": f"{_signed(mean)} points",
                "note": f"{_give(deviation)} against the plain mean".strip(),
            }
        )
    marked = [s for s in summary.standings if s.worst_success]
    if marked:
        least = min(marked, key=lambda s: fmean((s.worst_success or {}).values()))
        facts.append(
            {
                "label": "Lowest success of backdoors",
                "value": _percent(fmean((least.worst_success or {}).values())),
                "note": f"{summary.defence_name(least.defence)}; {summary.condition_name(least.condition)}",
            }
        )
    return facts


def _company(summary: Summary, best: Standing, there: Sequence[Standing]) -> str:
    if best.rank is None:
        return f" ({best.unranked})"
    others = [s for s in there if s.rank == 1 and s is not best]
    if best.rank > 1 or not others:
        return ", ahead beyond the noise" if best.rank == 1 else ""
    return f", not told apart from {_some([summary.defence_name(s.defence) for s in others], 3)}"


def _worst_rows(summary: Summary) -> list[dict[str, Any]]:
    rows = []
    for defence in summary.defences:
        mine = [s for s in summary.standings if s.defence == defence and s.worst is not None]
        if not mine:
            continue
        lowest = min(mine, key=_worst_mean)
        worst = lowest.worst
        if worst is None:
            continue
        values = list(worst.by_seed.values())
        mean, deviation = spread(values)
        ranked = [s for s in mine if s.rank is not None]
        whole = len(summary.conditions)
        part = "" if len(mine) == whole else f" (of {len(mine)} of {whole} conditions)"
        firsts, alone = sum(s.rank == 1 for s in ranked), sum(s.rank == 1 and not s.shared for s in ranked)
        name = summary.defence_name(defence)
        rows.append(
            {
                "mean": mean,
                "name": name,
                "value": f"{100 * mean:.1f}",
                "spread": _give(deviation),
                "picture": interval(
                    values, low=0.0, high=1.0,
                    label=f"{name}: seeds from {100 * min(values):.1f} to {100 * max(values):.1f} %",
                ),
                "whole": not part,
                "where": summary.condition_name(lowest.condition) + part,
                "attack": f"{worst.attack} ({worst.times} of {_count(len(values), 'seed')})",
                "firsts": _firsts(firsts, alone, len(ranked)),
            }
        )  # fmt: skip
    # A lowest value over fewer conditions flatters, so these come last.
    return sorted(rows, key=lambda row: (not row["whole"], -row["mean"]))


def _firsts(firsts: int, alone: int, ranked: int) -> str:
    if not ranked:
        return "not ranked"
    return f"{firsts} of {ranked}" + (f", {alone} alone" if alone else "")


def _ranking_note(summary: Summary) -> str:
    if any(s.rank is not None for s in summary.standings):
        return (
            "“In front” counts the conditions in which no other defence is better beyond the noise; alone, where all "
            "others are worse. Order in this table is by the number and is no ranking."
        )
    why = dict.fromkeys(s.unranked for s in summary.standings if s.unranked and s.by_attack)
    return f"Nothing is ranked here: {_some(list(why), 3)}. Order in this table is by the number only."


def _heat_tables(summary: Summary) -> list[_Table]:
    return _tables(summary, _heat_entry, lambda standing: bool(standing.by_attack))


def _backdoor_tables(summary: Summary) -> list[_Table]:
    return _tables(summary, _success_entry, lambda standing: bool(standing.success))


def _price_tables(summary: Summary) -> list[_Table]:
    return _tables(summary, _price_entry, lambda standing: bool(standing.price) and standing.defence.rule != "mean")


def _tables(
    summary: Summary, entry: Callable[[Standing | None], _Entry], there: Callable[[Standing], bool]
) -> list[_Table]:
    """One table for each panel: defences down, numbers of malicious sites across; empty where there is nothing."""
    tables = []
    for panel in dict.fromkeys(s.condition.panel for s in summary.standings if there(s)):
        standings = [s for s in summary.standings if s.condition.panel == panel and there(s)]
        columns = sorted({s.condition for s in standings}, key=lambda c: (c.poisoned, c.sites, c.tolerate))
        rows = []
        for defence in dict.fromkeys(s.defence for s in standings):
            found = {s.condition: s for s in standings if s.defence == defence}
            rows.append((summary.defence_name(defence), tuple(entry(found.get(column)) for column in columns)))
        title = summary.panel_name(panel)
        tables.append(
            _Table(title, title or "defences and conditions", "defence", tuple(c.column for c in columns), tuple(rows))
        )
    return tables


def _heat_entry(standing: Standing | None) -> _Entry:
    if standing is None:
        return _Entry("", "no result", "none")
    if standing.worst is None:
        return _Entry("", "incomplete", "none")
    mean, deviation = spread(standing.worst.by_seed.values())
    first = standing.rank == 1
    place = ("=1st" if standing.shared else "1st") if first else ""
    return _Entry(
        f"{100 * mean:.1f}",
        " ".join(filter(None, (_give(deviation), place))),
        f"h{shade(mean)}" + (" first" if first else ""),
    )


def _success_entry(standing: Standing | None) -> _Entry:
    if standing is None or standing.worst_success is None:
        return _Entry("", "no result" if standing is None else "incomplete", "none")
    mean, deviation = spread(standing.worst_success.values())
    return _Entry(f"{100 * mean:.1f}", _give(deviation), f"h{shade(1 - mean)}")


def _price_entry(standing: Standing | None) -> _Entry:
    if standing is None:
        return _Entry("", "no result", "none")
    mean, deviation = spread(standing.price.values())
    reached, _ = spread(standing.clean.values())
    return _Entry(f"{_signed(mean)} {_give(deviation)}".strip(), f"reaches {100 * reached:.1f}\u00a0%")


def _detail_tables(summary: Summary) -> list[_Table]:
    tables = []
    for condition in summary.conditions:
        standings = summary.under(condition)
        attacks = list(dict.fromkeys(attack for s in standings for attack in s.by_attack))
        backdoors = list(dict.fromkeys(attack for s in standings for attack in s.success))
        rows = []
        for standing in standings:
            entries = [_number(standing.clean)]
            entries += [_number(standing.by_attack.get(attack, {})) for attack in attacks]
            entries += [_number(standing.success.get(attack, {})) for attack in backdoors]
            entries += [_rejected(standing, "poisoned_rejected"), _rejected(standing, "honest_rejected")]
            rows.append((summary.defence_name(standing.defence), tuple(entries)))
        columns = ("no attack", *attacks, *(f"{name}: success" for name in backdoors))
        title = summary.condition_name(condition)
        tables.append(_Table(title, title, "defence", (*columns, "poisoned rejected", "honest rejected"), tuple(rows)))
    return tables


def _number(values: Mapping[int, float]) -> _Entry:
    mean, deviation = spread(values.values())
    return _Entry("–" if math.isnan(mean) else f"{100 * mean:.1f}", _give(deviation))


def _rejected(standing: Standing, name: str) -> _Entry:
    shares = [share for run in standing.runs if not run.clean and (share := getattr(run, name)) is not None]
    return _Entry(f"{100 * fmean(shares):.0f} %" if shares else "–")


def _holes(summary: Summary) -> list[str]:
    found = [
        f"{summary.defence_name(s.defence)}, {summary.condition_name(s.condition)}: {', '.join(s.missing)}"
        for s in summary.standings
        if s.missing and s.by_attack
    ]
    return found if len(found) <= _HOLES else [*found[:_HOLES], f"and {len(found) - _HOLES} more"]


# --- which runs are shown as pictures --------------------------------------------------------------------------------


def _hardest(summary: Summary) -> Condition | None:
    """The condition whose best worst case is the lowest, among those with the most defences."""
    whole: dict[Condition, list[float]] = {}
    for standing in summary.standings:
        if standing.worst is not None:
            whole.setdefault(standing.condition, []).append(_worst_mean(standing))
    if not whole:
        return None
    most = max(len(values) for values in whole.values())
    return min((c for c, values in whole.items() if len(values) == most), key=lambda c: max(whole[c]))


def _shown_conditions(summary: Summary) -> list[Condition]:
    """All conditions with a worst case, or else of the first panels the one with the most malicious sites."""
    there = list(dict.fromkeys(s.condition for s in summary.standings if s.worst is not None))
    if len(there) > _PANELS:
        most = {c.panel: c for c in sorted(there, key=lambda c: c.poisoned)}
        there = [most[panel] for panel in dict.fromkeys(c.panel for c in there)][:_PANELS]
    return there


def _style(summary: Summary, defence: Any) -> int:
    return summary.defences.index(defence)


def _chart_figures(summary: Summary, shown: Sequence[Condition], *, backdoor: bool) -> list[dict[str, Any]]:
    figures = []
    for condition, curves, attacks in _charts(summary, shown, backdoor=backdoor):
        ends = "; ".join(f"{curve.label} {100 * curve.mean[-1]:.1f} %" for curve in curves)
        unit = "attack success" if backdoor else summary.measure
        title = summary.condition_name(condition)
        figures.append(
            {
                "title": title,
                "note": "under " + _some(list(dict.fromkeys(attacks)), 4),
                "picture": chart(curves, label=f"{unit} per round, {title}. After the last round: {ends}", unit=unit),
            }
        )
    return figures


def _legend(summary: Summary, shown: Sequence[Condition], *, backdoor: bool) -> list[dict[str, Any]]:
    curves = {curve.label: curve.style for _, many, _ in _charts(summary, shown, backdoor=backdoor) for curve in many}
    return [{"key": key(style), "name": label} for label, style in curves.items()]


def _charts(
    summary: Summary, shown: Sequence[Condition], *, backdoor: bool
) -> list[tuple[Condition, list[Curve], list[str]]]:
    charts = []
    for condition in shown:
        curves: list[Curve] = []
        attacks: list[str] = []
        for standing in summary.under(condition):
            runs = standing.worst_backdoor_runs() if backdoor else standing.worst_runs()
            curve = _curve(summary, standing, runs, _attack_success if backdoor else _value)
            if curve is not None and len(curves) < _CURVES:
                curves.append(curve)
                attacks.append(runs[0].attack)
        if curves:
            charts.append((condition, curves, attacks))
    return charts


def _curve(
    summary: Summary, standing: Standing, runs: Sequence[Run], number: Callable[[Mapping[str, Any], str], float | None]
) -> Curve | None:
    """Mean and range over seeds, round by round; None where nothing was measured."""
    points: dict[int, list[float]] = {}
    for run in runs:
        result = run.cell["result"]
        name = measure_name(result)
        initial = result["final"].get("initial_accuracy")
        if number is _value and name == "accuracy" and initial is not None:
            points.setdefault(0, []).append(float(initial))
        for record in result["rounds"]:
            value = number(record, name)
            if value is not None:
                points.setdefault(int(record["round"]), []).append(value)
    if not points:
        return None
    rounds = tuple(sorted(points))
    return Curve(
        label=summary.defence_name(standing.defence),
        style=_style(summary, standing.defence),
        rounds=rounds,
        mean=tuple(fmean(points[r]) for r in rounds),
        low=tuple(min(points[r]) for r in rounds),
        high=tuple(max(points[r]) for r in rounds),
    )


def _value(record: Mapping[str, Any], name: str) -> float | None:
    value = record["accuracy"] if name == "accuracy" else record.get("metrics", {}).get(name)
    return None if value is None else float(value)


def _attack_success(record: Mapping[str, Any], _name: str) -> float | None:
    value = record.get("metrics", {}).get("attack_success")
    return None if value is None else float(value)


def _strips(summary: Summary, focus: Condition | None) -> list[dict[str, Any]]:
    figures = []
    for standing in summary.under(focus)[:_STRIPS] if focus else ():
        runs = standing.worst_runs()
        if not runs:
            continue
        run = min(runs, key=lambda one: one.value)
        found, lost = run.poisoned_rejected, run.honest_rejected
        figures.append(
            {
                "title": summary.defence_name(standing.defence),
                "note": f"{run.attack}, seed {run.seed}: {_percent(run.value)}; rejected: poisoned "
                f"{_percent(found, 0)}, honest {_percent(lost, 0)}",
                "picture": strip(run.cell["result"]),
            }
        )
    return figures


def _strips_where(summary: Summary, focus: Condition | None) -> str:
    if focus is None:
        return ""
    return f"the hardest condition ({summary.condition_name(focus)}), under the attack that was the worst for it"


def _pictures(summary: Summary, origin: Origin, folder: Path) -> tuple[Path, ...]:
    heats = [
        Heat(
            table.title,
            table.columns,
            tuple(name for name, _ in table.rows),
            tuple(tuple(_fraction(entry) for entry in entries) for _, entries in table.rows),
            tuple(tuple(f"{e.main}\n{e.note}".strip() for e in entries) for _, entries in table.rows),
        )
        for table in _heat_tables(summary)
    ]
    charts = [
        (summary.condition_name(condition), curves)
        for condition, curves, _ in _charts(summary, _shown_conditions(summary), backdoor=False)
    ]
    written = []
    try:
        if heats:
            written.append(folder / "worst-case.png")
            draw_heats(heats, written[-1], title=f"{origin.name}: worst case over attacks, {summary.measure} in %")
        if charts:
            written.append(folder / "curves.png")
            draw_charts(charts, written[-1], title=f"{origin.name}: the worst attack on each", unit=summary.measure)
    except OSError as error:
        raise QuorsumError(f"cannot write {written[-1]}: {error.strerror}; {_MAKE_ROOM}") from None
    return tuple(written)


def _fraction(entry: _Entry) -> float | None:
    return float(entry.main) / 100 if entry.main else None


# --- tables for other programs ---------------------------------------------------------------------------------------


def cells_csv(cells: Sequence[Cell]) -> str:
    """One row a cell: its state, settings, and every number of its last model."""
    settings = list(dict.fromkeys(name for cell in cells for name in cell["settings"]))
    metrics = list(
        dict.fromkeys(
            name for cell in cells if cell["result"] for name in cell["result"]["final"].get("metrics", {})
        )
    )  # fmt: skip
    numbers = ("attack_success", "poisoned_rejected", "honest_rejected", "initial_accuracy")
    metrics = [name for name in metrics if name not in numbers]
    rows = []
    for cell in cells:
        result = cell["result"]
        final = result["final"] if result else {}
        row: list[Any] = [cell["id"], cell.get("state") or ("done" if result else "failed"), cell["seconds"]]
        row += [cell["settings"].get(name) for name in settings]
        row += [final.get("metrics", {}).get(name) for name in metrics]
        row += [final.get(name) for name in numbers]
        row += [sum(bool(r.get("failed")) for r in result["rounds"]) if result else None, cell["failed"]]
        rows.append(row)
    return _csv(["id", "state", "seconds", *settings, *metrics, *numbers, "failed_rounds", "failed"], rows)


def worst_csv(summary: Summary) -> str:
    """One row a defence and condition: worst case, spread, rank, price, attack success."""
    header = [
        "defence", "condition", "sites", "poisoned", "tolerate", "worst_case", "deviation", "seeds", "attack", "rank",
        "shared", "not_ranked_because", "clean", "price", "attack_success",
    ]  # fmt: skip
    rows = []
    for standing in summary.standings:
        if not standing.by_attack:
            continue
        worst, condition = standing.worst, standing.condition
        mean, deviation = spread(worst.by_seed.values() if worst else ())
        rows.append(
            [
                summary.defence_name(standing.defence), summary.panel_name(condition.panel), condition.sites,
                condition.poisoned, condition.tolerate, mean, deviation, len(worst.by_seed) if worst else 0,
                worst.attack if worst else None, standing.rank, standing.shared, standing.unranked,
                *(spread(numbers.values())[0] for numbers in (standing.clean, standing.price)),
                spread((standing.worst_success or {}).values())[0],
            ]
        )  # fmt: skip
    return _csv(header, rows)


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([_harmless(name) for name in header])
    writer.writerows([[_harmless(value) for value in row] for row in rows])
    return text.getvalue()


def _harmless(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets an apostrophe; numbers stay, what is missing is empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) or text[:1] in ("\t", "\r", "\n") else text


# --- words -----------------------------------------------------------------------------------------------------------


def _worst_mean(standing: Standing) -> float:
    return fmean(standing.worst.by_seed.values()) if standing.worst is not None else math.nan


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _signed(value: float) -> str:
    text = f"{100 * value:.1f}"
    return "0.0" if text == "-0.0" else text.replace("-", "−")


def _give(deviation: float) -> str:
    return "" if math.isnan(deviation) else f"± {100 * deviation:.1f}"


def _count(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _versions(summary: Summary, origin: Origin) -> list[tuple[str, str]]:
    """Of what made the cells; what only the plan knows is added."""
    return [(name, str(text)) for name, text in {**origin.versions, **summary.versions}.items()]
