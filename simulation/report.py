"""Pictures and tables of simulation results.

All functions read results as plain dictionaries, just made or loaded from ``result.json``, and never change them. A
site in a round is in one of four states, each with a shape and a brightness of its own, so that the pictures can be
read without colour: accepted, poisoned and rejected (found), honest and rejected (a loss of data), and poisoned and
accepted (missed). Colours are from the colour-blind-safe palette of Okabe & Ito (2008).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from quorsum.errors import UsageError

if TYPE_CHECKING:
    # Neither library is loaded before something is drawn: matplotlib alone takes half a second.
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["comparison_table", "draw_comparison", "draw_rounds", "summary_table"]

Result: TypeAlias = Mapping[str, Any]
Labelled: TypeAlias = Sequence[tuple[str, Result]]

_BLACK = "#222222"
_GREY = "#8a8a8a"
_PALE = "#dbe6ee"
_BLUE = "#0072B2"
_ORANGE = "#D98200"
_GREEN = "#009E73"
_VERMILLION = "#C44E00"
_RED = "#B00020"
_PURPLE = "#9A4C82"

_DPI = 120
_SIZE = (10.0, 20.0 / 3.0)  # inches: 1200 x 800 pixels
_ROW_INCHES = 0.19
_ROWS_THAT_FIT = 16
# With more sites than these, rows are grouped into honest and poisoned and only the groups are named.
_MOST_NAMED = 60
_MOST_NAMED_IN_COMPARISON = 20


@dataclass(frozen=True)
class _State:
    """How one state of a site in a round is called and drawn; ``size`` is relative to the cell."""

    text: str
    marker: str
    colour: str
    filled: bool
    size: float


_ACCEPTED = _State("honest, accepted", "s", _PALE, True, 1.0)
_FOUND = _State("poisoned, rejected", "X", _BLUE, True, 1.0)
_LOST = _State("honest, rejected", "D", _ORANGE, False, 0.7)
_MISSED = _State("poisoned, accepted", "o", _VERMILLION, True, 0.9)
_STATES = (_ACCEPTED, _FOUND, _LOST, _MISSED)

_FAILED: dict[str, Any] = {"facecolor": "none", "edgecolor": _GREY, "hatch": "////", "linewidth": 0.0}
_NO_ATTACK = "no attack"

_Style: TypeAlias = tuple[str, str, str]
# Line colour, dashes and marker, in the order in which curves are drawn: told apart by more than their colour.
_CURVES: tuple[_Style, ...] = (
    (_VERMILLION, "--", "v"),
    (_BLUE, "-", "o"),
    (_PURPLE, "-.", "^"),
    (_GREEN, "-", "D"),
)
_CLEAN_CURVE: _Style = (_BLACK, ":", "")


# --- what the results say --------------------------------------------------------------------------------------------


def _poisoned(result: Result) -> frozenset[str]:
    return frozenset(site["id"] for site in result["sites"] if site["poisoned"])


def _cells(result: Result) -> Iterator[tuple[int, str, _State]]:
    """Round, site and state, for every site that took part in the round."""
    poisoned = _poisoned(result)
    for record in result["rounds"]:
        for site in record["accepted"]:
            yield record["round"], site, _MISSED if site in poisoned else _ACCEPTED
        for site in record["rejected"]:
            yield record["round"], site, _FOUND if site in poisoned else _LOST


def _counts(result: Result) -> dict[str, int]:
    """In how many site-rounds each state occurred, by its text."""
    counts = {state.text: 0 for state in _STATES}
    for _, _, state in _cells(result):
        counts[state.text] += 1
    return counts


def _curve(result: Result) -> tuple[list[int], list[float]]:
    """Round numbers and accuracies in percent, from round 0 where the initial accuracy is known."""
    initial = result["final"].get("initial_accuracy")
    points = [] if initial is None else [(0, initial)]
    points += [(record["round"], record["accuracy"]) for record in result["rounds"]]
    return [number for number, _ in points], [100.0 * accuracy for _, accuracy in points]


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100.0 * part / whole:.0f} %)" if whole else "none there"


def _poisoned_share(result: Result) -> str:
    counts = _counts(result)
    return _share(counts[_FOUND.text], counts[_FOUND.text] + counts[_MISSED.text])


def _honest_share(result: Result) -> str:
    counts = _counts(result)
    return _share(counts[_LOST.text], counts[_LOST.text] + counts[_ACCEPTED.text])


def _data_name(config: Mapping[str, Any]) -> str:
    return Path(str(config["data"])).name


def _attack_text(result: Result) -> str:
    poisoned = len(_poisoned(result))
    if not poisoned or result["config"]["attack"] == "none":
        return _NO_ATTACK
    return f"{result['config']['attack']} by {poisoned} of {len(result['sites'])} sites"


def _check_rounds(result: Result, name: str) -> None:
    if not result.get("rounds"):
        raise UsageError(f"{name} has no rounds, so there is nothing to show; simulate at least one")


# --- tables ----------------------------------------------------------------------------------------------------------


def summary_table(result: Result) -> Table:
    """What one simulation was about and how it ended, one fact a row.

    Raises:
        UsageError: the result has no rounds.
    """
    from rich.table import Table

    _check_rounds(result, "the result")
    config, rounds, final = result["config"], result["rounds"], result["final"]
    table = Table(title="simulation", title_justify="left", show_header=False)
    table.add_column("what", style="bold", no_wrap=True)
    table.add_column("value", overflow="fold")
    start = final.get("initial_accuracy")
    before = "" if start is None else f" (from {100.0 * start:.1f} %)"
    middle = rounds[len(rounds) // 2]
    steps = [f"{name} {middle['seconds'][name]:.2f}" for name in _STEPS if name in middle["seconds"]]
    total = sum(record["seconds"]["total"] for record in rounds)
    for what, value in (
        ("data", f"{_data_name(config)}, {_partition_text(config)}, {len(result['sites'])} sites"),
        ("suite, rule", f"{config['suite']}, {config['rule']}, tolerates {config['tolerate']}"),
        ("attack", _attack_text(result)),
        ("accuracy", f"{100.0 * final['accuracy']:.1f} % after {len(rounds)} rounds{before}"),
        *_measures(final),
        ("poisoned rejected", _poisoned_share(result)),
        ("honest rejected", _honest_share(result)),
        (
            "bytes per site",
            f"{_size(middle['bytes']['up_per_site'])} up, {_size(middle['bytes']['down_per_site'])} down",
        ),
        ("seconds", f"{total:.1f} in all; round {middle['round']}: {', '.join(steps)}"),
    ):
        table.add_row(what, value)
    failed = [str(record["round"]) for record in rounds if record.get("failed")]
    if failed:
        table.add_row("failed rounds", ", ".join(failed), style="red")
    return table


def _measures(final: Result) -> Iterator[tuple[str, str]]:
    """What else counts besides accuracy: the measure for rare classes, and whether a backdoor works."""
    if final.get("primary", "accuracy") != "accuracy" and final["primary"] in final["metrics"]:
        name = final["primary"]
        yield name.replace("_", " "), f"{100.0 * final['metrics'][name]:.1f} %, the measure to compare by"
    if final.get("attack_success") is not None:
        yield "attack success", f"{100.0 * final['attack_success']:.1f} % of inputs with the trigger"


_STEPS = ("train", "seal", "geometry", "open", "total")


def comparison_table(results: Labelled) -> Table:
    """One row a simulation: its label, rule and suite, accuracy and who was rejected; narrow enough for 80 columns.

    Raises:
        UsageError: there are no results, or one has no rounds.
    """
    from rich.table import Table

    _check_all(results)
    table = Table(title="comparison", title_justify="left")
    table.add_column("run", style="bold", no_wrap=True)
    table.add_column("rule, suite", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("poisoned\nrejected", justify="right", no_wrap=True)
    table.add_column("honest\nrejected", justify="right", no_wrap=True)
    for label, result in results:
        config = result["config"]
        table.add_row(
            label,
            f"{config['rule']}, {config['suite']}",
            f"{100.0 * result['final']['accuracy']:.1f} %",
            _poisoned_share(result).partition(" (")[0],
            _honest_share(result).partition(" (")[0],
        )
    return table


def _check_all(results: Labelled) -> None:
    if not results:
        raise UsageError("there are no results to compare; give at least one")
    for label, result in results:
        _check_rounds(result, f"result {label!r}")


def _partition_text(config: Mapping[str, Any]) -> str:
    alpha, split = config.get("alpha"), config.get("split")
    if split is not None:
        return f"split {split}"
    return "even split" if alpha is None else f"Dirichlet({alpha:g}) split"


def _size(count: float) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000.0:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000.0
    return f"{size:.1f} GB"


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_rounds(result: Result, path: str | Path) -> None:
    """Draw one simulation as a PNG file: accuracy per round, below it which sites were accepted.

    The picture is 1200 pixels wide and 800 high, higher for more than 16 sites.

    Raises:
        UsageError: the result has no rounds.
        OSError: the file cannot be written.
    """
    _check_rounds(result, "the result")
    config = result["config"]
    extra = _ROW_INCHES * max(0, min(len(result["sites"]), _MOST_NAMED) - _ROWS_THAT_FIT)
    figure = _figure(
        _SIZE[0],
        _SIZE[1] + extra,
        f"{_data_name(config)}  ·  suite {config['suite']}  ·  rule {config['rule']}  ·  {_attack_text(result)}",
    )
    curve, strip = figure.subplots(2, 1, sharex=True, height_ratios=(3.0, 3.0 + extra))
    last = result["rounds"][-1]["round"]
    _accuracy_axes(curve)
    _draw_curves(curve, [("", result)], [_CURVES[1]])
    _draw_strip(strip, result, cell=_cell_points(result, 8.2, 2.7 + extra), most_named=_MOST_NAMED)
    _round_axis(strip, last)
    _state_legend(figure, _counts(result), any(record.get("failed") for record in result["rounds"]))
    _save(figure, path)


def draw_comparison(results: Labelled, path: str | Path) -> None:
    """Draw several simulations as a PNG file: one column an attack, curves above, rejected sites below.

    Simulations without an attack are drawn into every column, for reference. Below the curves stands, for every
    simulation of the column that rejected anybody, which sites were rejected in which round.

    Raises:
        UsageError: there are no results, or one has no rounds.
        OSError: the file cannot be written.
    """
    _check_all(results)
    arms = _arms(results)
    strips = [[item for item in runs if _rejects(item[1])] for _, _, runs in arms]
    depth = max(1, *(len(items) for items in strips))
    data = ", ".join(dict.fromkeys(_data_name(result["config"]) for _, result in results))
    figure = _figure(
        max(_SIZE[0], 5.0 * len(arms)),
        _SIZE[1] + 2.8 * (depth - 1),
        f"{data}: accuracy under attack, and who was left out",
    )
    grid = figure.subplots(1 + depth, len(arms), squeeze=False, sharex=True, height_ratios=(3.2, *[2.8] * depth))
    last = max(result["rounds"][-1]["round"] for _, result in results)
    for column, (attack, clean, runs) in enumerate(arms):
        _accuracy_axes(grid[0, column])
        grid[0, column].set_title(attack, loc="left", fontsize=11)
        _draw_curves(grid[0, column], [*clean, *runs], [*[_CLEAN_CURVE] * len(clean), *_styles(len(runs))])
        for row in range(depth):
            if row < len(strips[column]):
                label, result = strips[column][row]
                cell = _cell_points(result, 2.7 if len(arms) > 1 else 8.0, 2.2)
                _draw_strip(grid[row + 1, column], result, cell=cell, most_named=_MOST_NAMED_IN_COMPARISON)
                grid[row + 1, column].set_title(label, loc="left", fontsize=10)
            else:
                _say_nobody(grid[row + 1, column], first=row == 0)
        _round_axis(grid[depth, column], last)
    failed = any(record.get("failed") for items in strips for _, result in items for record in result["rounds"])
    _state_legend(figure, None, failed)
    _save(figure, path)


def _rejects(result: Result) -> bool:
    return any(record["rejected"] for record in result["rounds"])


def _arms(results: Labelled) -> list[tuple[str, list[tuple[str, Result]], list[tuple[str, Result]]]]:
    """For every attack its name, the simulations without attack, and the simulations under it."""
    clean = [item for item in results if _attack_text(item[1]) == _NO_ATTACK]
    attacks = dict.fromkeys(_attack_text(result) for _, result in results if _attack_text(result) != _NO_ATTACK)
    if not attacks:
        return [(_NO_ATTACK, [], clean)]
    return [(attack, clean, [item for item in results if _attack_text(item[1]) == attack]) for attack in attacks]


def _styles(count: int) -> list[_Style]:
    return [_CURVES[index % len(_CURVES)] for index in range(count)]


def _figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The figure is not made by pyplot, which keeps every figure in a global list and may ask for a display.
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    # Bold letters of this size need an eighth of an inch; a data file may have a name of any length.
    lines = textwrap.wrap(title, width=int(8 * width), max_lines=3, placeholder=" ...")
    figure.suptitle("\n".join(lines), fontsize=11.5, fontweight="bold", x=0.01, horizontalalignment="left")
    return figure


def _save(figure: Figure, path: str | Path) -> None:
    # No version or date in the file: the same result gives the same bytes.
    figure.savefig(path, format="png", metadata={"Software": None})


def _accuracy_axes(axes: Axes) -> None:
    axes.set_ylim(0.0, 100.0)
    axes.set_ylabel("test accuracy, %")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _round_axis(axes: Axes, last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    axes.set_xlim(-0.6, last + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))


def _draw_curves(axes: Axes, runs: Labelled, styles: Sequence[_Style]) -> None:
    """Accuracy per round, each curve named at its right end."""
    ends: list[float] = []
    right = max(record["round"] for _, result in runs for record in result["rounds"])
    for (_, result), (colour, dashes, marker) in zip(runs, styles, strict=True):
        numbers, accuracy = _curve(result)
        axes.plot(
            numbers, accuracy, color=colour, linestyle=dashes, marker=marker, markersize=4, linewidth=1.8, clip_on=False
        )
        ends.append(accuracy[-1])
    places = _spread(ends, gap=13.0, low=4.0, high=97.0)
    for (label, _), (colour, _, _), end, place in zip(runs, styles, ends, places, strict=True):
        name, _, detail = label.partition(", ")
        axes.annotate(
            "\n".join(filter(None, (f"{name} {end:.1f} %".lstrip(), detail))),
            (right, place),
            xytext=(10.0, 0.0),
            textcoords="offset points",
            color=colour,
            fontsize=9 if name else 11,
            fontweight="bold",
            verticalalignment="center",
            linespacing=1.05,
            annotation_clip=False,
        )


def _spread(values: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Places near the values, in the same order, at least ``gap`` apart and from ``low`` to ``high`` if they fit."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    places = [0.0] * len(values)
    floor, ceiling = low, high
    for index in order:
        places[index] = max(values[index], floor)
        floor = places[index] + gap
    for index in reversed(order):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - gap
    return places


def _cell_points(result: Result, width: float, height: float) -> float:
    """Side of a square cell in points, for a strip of so many inches."""
    columns, rows = len(result["rounds"]) + 1.2, len(result["sites"])
    return max(1.5, min(14.0, 72.0 * 0.8 * min(width / columns, height / rows)))


def _draw_strip(axes: Axes, result: Result, *, cell: float, most_named: int) -> None:
    """Sites down, rounds across, one marker a cell."""
    poisoned = _poisoned(result)
    ids = [site["id"] for site in result["sites"]]
    grouped = len(ids) > most_named
    if grouped:
        ids = [site for site in ids if site not in poisoned] + [site for site in ids if site in poisoned]
    row = {site: index for index, site in enumerate(ids)}
    cells = list(_cells(result))
    for state in _STATES:
        places = [(number, row[site]) for number, site, found in cells if found is state]
        axes.scatter(
            [number for number, _ in places],
            [place for _, place in places],
            s=(cell * state.size) ** 2,
            marker=state.marker,
            facecolors=state.colour if state.filled else "white",
            edgecolors=state.colour if state is not _FOUND else "white",
            linewidths=0.3 if state.filled else 1.6,
        )
    for record in result["rounds"]:
        if record.get("failed"):
            axes.axvspan(record["round"] - 0.5, record["round"] + 0.5, **_FAILED)
    axes.set_ylim(len(ids) - 0.4, -0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if grouped:
        honest = len(ids) - len(poisoned)
        groups = [((honest - 1) / 2, f"{honest} honest\nsites", False)] if honest else []
        groups += [(honest + (len(poisoned) - 1) / 2, f"{len(poisoned)} poisoned\nsites", True)] if poisoned else []
        axes.axhline(honest - 0.5, color=_GREY, linewidth=0.6)
    else:
        groups = [
            (place, f"{site} (poisoned)" if site in poisoned else site, site in poisoned) for site, place in row.items()
        ]
    axes.set_yticks(
        [place for place, _, _ in groups], [name for _, name, _ in groups], fontsize=9 if most_named > 20 else 8
    )
    axes.tick_params(axis="y", length=0)
    for tick, (_, _, bad) in zip(axes.get_yticklabels(), groups, strict=True):
        tick.set_color(_RED if bad else _BLACK)
        tick.set_fontweight("bold" if bad else "normal")


def _say_nobody(axes: Axes, *, first: bool) -> None:
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.set_yticks([])
    if first:
        axes.text(0.5, 0.5, "nobody was rejected", transform=axes.transAxes, ha="center", va="center", color=_GREY)


def _state_legend(figure: Figure, counts: Mapping[str, int] | None, failed: bool) -> None:
    """What the markers mean, below everything, with how often each occurs."""
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Artist] = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=state.marker,
            markersize=9.0 * state.size,
            markerfacecolor=state.colour if state.filled else "white",
            markeredgecolor=state.colour,
            markeredgewidth=1.0 if state.filled else 1.6,
            label=state.text if counts is None else f"{state.text}: {counts[state.text]}",
        )
        for state in _STATES
    ]
    if failed:
        handles.append(Patch(label="round failed", **_FAILED))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=9.5,
        columnspacing=1.4,
        handletextpad=0.4,
    )
