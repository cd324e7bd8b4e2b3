"""Pictures of a lab run: SVG for the page, PNG for papers.

The SVG has no colours of its own: it names classes (``c0``, ``dot``, ``lost`` ...) that the style sheet of the page
fills in, for light and dark. Every text that goes into it is escaped. Curves are told apart by dashes and markers as
well as by colour; a site in a round is in one of four states, each with a shape of its own, as in
:mod:`quorsum.simulation.report`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    # Half a second of imports that only drawing PNG files needs.
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "MARKERS",
    "SHADES",
    "STYLES",
    "Curve",
    "Heat",
    "chart",
    "draw_charts",
    "draw_heats",
    "interval",
    "key",
    "shade",
    "shade_rules",
    "state_key",
    "strip",
]

SHADES = 21
"""Number of steps in the colour scale, from 0 to 1."""

_RAMP = ("#a84a04", "#e08a2c", "#fbd39a", "#f4f4f2", "#bcd9ea", "#5b9fcb", "#1d5fa6")
"""From orange (low) over near-white to blue (high): told apart with any kind of colour vision."""

STYLES = 8
"""How many curves have a look of their own."""

_MIDDLE = 0.179
"""Ground that is lighter than this is read better with black letters, darker with white ones."""

_PNG_COLOURS = ("#0072B2", "#C44E00", "#009E73", "#9A4C82", "#222222", "#B58900", "#3B9FD6", "#6B6B6B")
_PNG_DASHES = ("-", "--", "-.", ":", (0, (6, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2, 2, 2)))
_PNG_MARKERS = ("o", "v", "^", "D", "s", "X", "P", "*")

# Outlines of the markers around (0, 0), as functions of their half width.
MARKERS = ("circle", "down", "up", "diamond", "square", "cross", "plus", "star")

_MOST_ROWS = 60


@dataclass(frozen=True)
class Curve:
    """One line of a chart: a mean over seeds with the range of the seeds around it.

    Attributes:
        label: its name.
        style: number of its look, modulo ``STYLES``.
        rounds: round numbers, ascending.
        mean, low, high: fractions 0 .. 1, one for each round.
    """

    label: str
    style: int
    rounds: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Heat:
    """One heat map: rows of fractions 0 .. 1 (or None) with the text to print into each cell."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    texts: tuple[tuple[str, ...], ...]


# --- colours ---------------------------------------------------------------------------------------------------------


def shade(value: float) -> int:
    """The step of the colour scale of a fraction, 0 .. ``SHADES`` - 1; what lies outside 0 .. 1 is taken to its end."""
    return round((SHADES - 1) * min(1.0, max(0.0, value)))


def shade_rules() -> str:
    """Style rules ``.h0`` .. for the steps of the scale, each with black or white letters, whichever is read better."""
    rules = []
    for step in range(SHADES):
        red, green, blue = _ramp(step / (SHADES - 1))
        ink = "#000" if _luminance(red, green, blue) > _MIDDLE else "#fff"
        rules.append(f".heat td.h{step},.h{step}{{background:#{red:02x}{green:02x}{blue:02x};color:{ink}}}")
    return "".join(rules)


def _ramp(value: float) -> tuple[int, int, int]:
    place = value * (len(_RAMP) - 1)
    index = min(int(place), len(_RAMP) - 2)
    low, high = (bytes.fromhex(_RAMP[i][1:]) for i in (index, index + 1))
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _luminance(*channels: int) -> float:
    """Relative luminance (WCAG 2.2)."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# --- SVG -------------------------------------------------------------------------------------------------------------


def _tag(name: str, *children: Markup | str, **attributes: object) -> Markup:
    """One element; a trailing or inner underscore of an attribute's name stands for nothing or a hyphen."""
    shown = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _plain(value)) for key, value in attributes.items()
    )
    inside = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(name, shown, inside)


def _plain(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def _picture(width: float, height: float, label: str, children: Sequence[Markup], kind: str) -> Markup:
    return _tag(
        "svg", *children, viewBox=f"0 0 {width:.0f} {height:.0f}", role="img", aria_label=label, class_=kind,
        width=float(width), height=float(height),
    )  # fmt: skip


def _marker(kind: str, x: float, y: float, r: float) -> str:
    """Path data of one marker."""
    outlines: Mapping[str, Sequence[tuple[float, float]]] = {
        "down": ((-1.1, -0.9), (1.1, -0.9), (0, 1.1)),
        "up": ((-1.1, 0.9), (1.1, 0.9), (0, -1.1)),
        "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        "square": ((-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)),
        "cross": tuple(_turned(_PLUS, math.pi / 4)),
        "plus": _PLUS,
        "star": tuple(
            (
                (1.35 if i % 2 else 0.55) * math.sin(i * math.pi / 5),
                (1.35 if i % 2 else 0.55) * math.cos(i * math.pi / 5),
            )
            for i in range(10)
        ),
    }
    if kind == "circle":
        return f"M{x - r:.1f} {y:.1f}a{r:.1f} {r:.1f} 0 1 0 {2 * r:.1f} 0a{r:.1f} {r:.1f} 0 1 0 {-2 * r:.1f} 0z"
    return "M" + "L".join(f"{x + r * a:.1f} {y + r * b:.1f}" for a, b in outlines[kind]) + "z"


_PLUS: tuple[tuple[float, float], ...] = (
    (-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4),
    (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4),
)  # fmt: skip


def _turned(points: Sequence[tuple[float, float]], angle: float) -> list[tuple[float, float]]:
    c, s = math.cos(angle), math.sin(angle)
    return [(c * x - s * y, s * x + c * y) for x, y in points]


def chart(curves: Sequence[Curve], *, label: str, unit: str) -> Markup:
    """Curves over rounds, 0 to 100 % upwards; bands show the lowest and the highest seed."""
    width, height, left, right, top, bottom = 380.0, 236.0, 36.0, 10.0, 26.0, 30.0
    last = max((curve.rounds[-1] for curve in curves), default=1)
    first = min((curve.rounds[0] for curve in curves), default=0)

    def x(number: float) -> float:
        return left + (width - left - right) * (number - first) / max(1, last - first)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - min(1.0, max(0.0, value)))

    parts = [_tag("text", f"{unit}, %", x=4.0, y=11.0, class_="tick")]
    for percent in (0, 25, 50, 75, 100):
        level = y(percent / 100)
        parts.append(_tag("path", d=f"M{left:.1f} {level:.1f}H{width - right:.1f}", class_="rule"))
        parts.append(_tag("text", str(percent), x=left - 6, y=level + 3.5, class_="tick end"))
    below = height - bottom + 14
    parts += [_tag("text", str(number), x=x(number), y=below, class_="tick mid") for number in _ticks(first, last)]
    parts.append(_tag("text", "round", x=width - right, y=height - 3, class_="tick end"))
    for curve in curves:
        there = [f"{x(n):.1f} {y(v):.1f}" for n, v in zip(curve.rounds, curve.high, strict=True)]
        back = [f"{x(n):.1f} {y(v):.1f}" for n, v in zip(curve.rounds, curve.low, strict=True)]
        parts.append(_tag("path", d="M" + "L".join([*there, *reversed(back)]) + "z", class_=f"band c{_look(curve)}"))
    for curve in curves:
        points = [(x(n), y(v)) for n, v in zip(curve.rounds, curve.mean, strict=True)]
        line = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        parts.append(_tag("path", d=line, class_=f"line c{_look(curve)} d{_look(curve)}"))
        step = max(1, len(points) // 8)
        marks = "".join(_marker(MARKERS[_look(curve)], a, b, 3.0) for a, b in points[::-1][::step])
        parts.append(_tag("path", d=marks, class_=f"mark c{_look(curve)}"))
    return _picture(width, height, label, parts, "chart")


def key(style: int) -> Markup:
    """The look of a curve, for a legend."""
    look = style % STYLES
    parts = [
        _tag("path", d="M1 6H33", class_=f"line c{look} d{look}"),
        _tag("path", d=_marker(MARKERS[look], 17.0, 6.0, 3.4), class_=f"mark c{look}"),
    ]
    return _tag("svg", *parts, viewBox="0 0 34 12", width=34, height=12, aria_hidden="true", class_="key")


def _look(curve: Curve) -> int:
    return curve.style % STYLES


def _ticks(first: int, last: int) -> list[int]:
    step = next(
        (s * 10**power for power in range(9) for s in (1, 2, 5) if (last - first) <= 7 * s * 10**power), last or 1
    )
    return list(range(-(-first // step) * step, last + 1, step))


def interval(values: Sequence[float], *, low: float, high: float, label: str) -> Markup:
    """Mean and single seeds on a line from ``low`` to ``high``."""
    width, height = 170.0, 18.0

    def x(value: float) -> float:
        return 6 + (width - 12) * (value - low) / max(1e-9, high - low)

    mean = math.fsum(values) / len(values)
    ticks = "".join(f"M{x(value):.1f} 3V15" for value in values)
    parts = [
        _tag("path", d=f"M6 9H{width - 6:.1f}", class_="rule"),
        _tag("path", d=f"M{x(min(values)):.1f} 9H{x(max(values)):.1f}", class_="range"),
        _tag("path", d=ticks, class_="seed"),
        _tag("path", d=_marker("circle", x(mean), 9.0, 3.4), class_="dot"),
    ]
    return _picture(width, height, label, parts, "interval")


def strip(result: Mapping[str, Any]) -> Markup:
    """Who was rejected in which round: sites down, rounds across. With more than 60 sites, shares of two groups."""
    sites = {site["id"]: bool(site["poisoned"]) for site in result["sites"]}
    records = result["rounds"]
    if len(sites) > _MOST_ROWS:
        return _grouped_strip(sites, records)
    cell = max(7.0, min(17.0, 640.0 / max(1, len(records))))
    left, top = 122.0, 18.0
    # Poisoned sites last, so that what matters stands together.
    order = sorted(sites, key=lambda site: sites[site])
    row = {site: index for index, site in enumerate(order)}
    paths = {"kept": "", "found": "", "lost": "", "missed": ""}
    for column, record in enumerate(records):
        for state, names in (("accepted", record["accepted"]), ("rejected", record["rejected"])):
            for site in names:
                kind = _STATES[sites.get(site, False), state]
                shape, size = _SHAPES[kind]
                middle = (left + cell * (column + 0.5), top + cell * (row.get(site, 0) + 0.5))
                paths[kind] += _marker(shape, *middle, size * cell)
    height = top + cell * len(order) + 4
    parts = _round_numbers(records, left, cell)
    for column, record in enumerate(records):
        if record.get("failed"):
            place = left + cell * column
            parts.append(_tag("rect", x=place, y=top, width=cell, height=height - top - 4, class_="failed"))
    for site, index in row.items():
        style = "site bad end" if sites[site] else "site end"
        name = f"{site}, poisoned" if sites[site] else site
        parts.append(_tag("text", name, x=left - 8, y=top + cell * (index + 0.5) + 3.5, class_=style))
    parts += [_tag("path", d=path, class_=kind) for kind, path in paths.items() if path]
    return _picture(left + cell * len(records) + 4, height, _strip_words(sites, records), parts, "strip")


_STATES = {
    (False, "accepted"): "kept",
    (True, "rejected"): "found",
    (False, "rejected"): "lost",
    (True, "accepted"): "missed",
}
_SHAPES = {"kept": ("square", 0.38), "found": ("cross", 0.36), "lost": ("diamond", 0.28), "missed": ("circle", 0.36)}


def state_key(kind: str) -> Markup:
    """The look of one state of a site in a round, for a legend; ``"failed"`` is a failed round."""
    if kind == "failed":
        parts = [_tag("rect", x=1, y=1, width=12, height=12, class_=kind)]
    else:
        shape, size = _SHAPES[kind]
        parts = [_tag("path", d=_marker(shape, 7.0, 7.0, 14 * size), class_=kind)]
    return _tag("svg", *parts, viewBox="0 0 14 14", width=14, height=14, aria_hidden="true", class_="key")


def _grouped_strip(sites: Mapping[str, bool], records: Sequence[Mapping[str, Any]]) -> Markup:
    cell, left, top = max(22.0, min(34.0, 640.0 / max(1, len(records)))), 150.0, 18.0
    parts = _round_numbers(records, left, cell)
    for index, (bad, name) in enumerate(((False, "honest, rejected, %"), (True, "poisoned, rejected, %"))):
        level = top + 22.0 * index
        parts.append(_tag("text", name, x=left - 8, y=level + 14, class_="site bad end" if bad else "site end"))
        for column, record in enumerate(records):
            out = sum(sites.get(site, False) == bad for site in record["rejected"])
            whole = out + sum(sites.get(site, False) == bad for site in record["accepted"])
            text = f"{100 * out / whole:.0f}" if whole else "-"
            parts.append(_tag("text", text, x=left + cell * (column + 0.5), y=level + 14, class_="site mid"))
    return _picture(left + cell * len(records) + 4, top + 46, _strip_words(sites, records), parts, "strip")


def _round_numbers(records: Sequence[Mapping[str, Any]], left: float, cell: float) -> list[Markup]:
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100) if s * cell >= 16), 200)
    shown = [(i, r["round"]) for i, r in enumerate(records) if i == 0 or r["round"] % step == 0]
    return [_tag("text", "round", x=left - 8, y=11.0, class_="tick end")] + [
        _tag("text", str(number), x=left + cell * (index + 0.5), y=11.0, class_="tick mid") for index, number in shown
    ]


def _strip_words(sites: Mapping[str, bool], records: Sequence[Mapping[str, Any]]) -> str:
    counts = {True: [0, 0], False: [0, 0]}
    for record in records:
        for site in record["rejected"]:
            counts[sites.get(site, False)][0] += 1
        for site in (*record["rejected"], *record["accepted"]):
            counts[sites.get(site, False)][1] += 1
    (found, bad), (lost, good) = counts[True], counts[False]
    return (
        f"Over {len(records)} rounds, poisoned sites were rejected {found} of {bad} times and honest sites "
        f"{lost} of {good} times."
    )


# --- PNG -------------------------------------------------------------------------------------------------------------


def draw_heats(heats: Sequence[Heat], path: Path, *, title: str) -> None:
    """Heat maps side by side, three in a row, numbers printed into the cells."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("quorsum", list(_RAMP))
    across = min(3, len(heats))
    down = -(-len(heats) // across)
    widest = max(len(name) for heat in heats for name in heat.rows)
    width = across * (0.085 * min(widest, 32) + 1.05 * max(len(heat.columns) for heat in heats) + 0.4)
    height = 0.7 + down * (1.15 + 0.42 * max(len(heat.rows) for heat in heats))
    figure = _figure(width, height, title)
    grid = figure.subplots(down, across, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(heats):
            axes.set_axis_off()
            continue
        heat = heats[index]
        numbers = [[math.nan if value is None else value for value in row] for row in heat.values]
        axes.imshow(numbers, cmap=colours, vmin=0.0, vmax=1.0, aspect="auto")
        for down_, row in enumerate(heat.texts):
            for across_, text in enumerate(row):
                value = heat.values[down_][across_]
                ink = "black" if value is None or _luminance(*_ramp(min(1.0, max(0.0, value)))) > _MIDDLE else "white"
                axes.text(across_, down_, _literal(text), ha="center", va="center", fontsize=8, color=ink)
        columns = [_literal(textwrap.fill(name, 14)) for name in heat.columns]
        axes.set_xticks(range(len(columns)), columns, fontsize=8)
        axes.set_yticks(range(len(heat.rows)), [_literal(textwrap.shorten(n, 34)) for n in heat.rows], fontsize=8)
        axes.set_xticks([place - 0.5 for place in range(1, len(heat.columns))], minor=True)
        axes.set_yticks([place - 0.5 for place in range(1, len(heat.rows))], minor=True)
        axes.grid(which="minor", color="white", linewidth=2.5)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        if heat.title:
            axes.set_title(_literal(textwrap.fill(heat.title, 48)), loc="left", fontsize=9)
    _save(figure, path)


def draw_charts(charts: Sequence[tuple[str, Sequence[Curve]]], path: Path, *, title: str, unit: str) -> None:
    """Charts side by side, at most three in a row, with one legend for all of them."""
    across = min(3, len(charts))
    down = -(-len(charts) // across)
    figure = _figure(max(6.5, 4.4 * across), 1.4 + 3.0 * down, title)
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    named: dict[str, Any] = {}
    for index, axes in enumerate(grid.flat):
        if index >= len(charts):
            axes.set_axis_off()
            continue
        name, curves = charts[index]
        _draw_curves(axes, curves, named)
        if name:
            axes.set_title(_literal(textwrap.fill(name, 52)), loc="left", fontsize=9)
        if index % across == 0:
            axes.set_ylabel(f"{unit}, %", fontsize=9)
    figure.legend(
        named.values(), [_literal(name) for name in named], loc="outside lower center", ncols=min(3, len(named)),
        frameon=False, fontsize=8.5,
    )  # fmt: skip
    _save(figure, path)


def _draw_curves(axes: Axes, curves: Sequence[Curve], named: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    for curve in curves:
        look = _look(curve)
        low, mean, high = ([100 * value for value in values] for values in (curve.low, curve.mean, curve.high))
        axes.fill_between(curve.rounds, low, high, color=_PNG_COLOURS[look], alpha=0.13, linewidth=0)
        (line,) = axes.plot(
            curve.rounds, mean, color=_PNG_COLOURS[look], linestyle=_PNG_DASHES[look], linewidth=1.7, markersize=4,
            marker=_PNG_MARKERS[look], markevery=max(1, len(mean) // 8),
        )  # fmt: skip
        named.setdefault(curve.label, line)
    axes.set_ylim(0.0, 100.0)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("round", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)


def _literal(text: str) -> str:
    """A dollar sign begins mathematics in matplotlib; names of files and attacks are no mathematics."""
    return text.replace("\\", "\\\\").replace("$", "\\$") if "$" in text else text


def _figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not made by pyplot, which keeps every figure in a global list and may ask for a display.
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    lines = textwrap.wrap(title, width=max(20, int(9 * width)), max_lines=3, placeholder=" ...")
    figure.suptitle(_literal("\n".join(lines)), fontsize=11, fontweight="bold", x=0.01, horizontalalignment="left")
    return figure


def _save(figure: Figure, path: Path) -> None:
    # No version or date in the file: the same cells give the same bytes.
    figure.savefig(path, format="png", metadata={"Software": None})
