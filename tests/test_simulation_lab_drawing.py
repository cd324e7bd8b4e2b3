import xml.etree.ElementTree as Tree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab_cells import cell

from quorsum.simulation.lab_drawing import (
    MARKERS,
    SHADES,
    STYLES,
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

FRACTIONS = st.floats(0.0, 1.0)


def curve(*values: float, label: str = "spectral", style: int = 0) -> Curve:
    rounds = tuple(range(len(values)))
    return Curve(label, style, rounds, values, tuple(v - 0.1 for v in values), tuple(v + 0.1 for v in values))


def tree_of(picture: str) -> Tree.Element:
    return Tree.fromstring(picture)  # noqa: S314 - what is parsed was made here


def texts(picture: str) -> list[str]:
    return [element.text or "" for element in tree_of(picture).iter("text")]


def contrast(one: float, other: float) -> float:
    high, low = max(one, other), min(one, other)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    channels = [c / 255 for c in bytes.fromhex(colour if len(colour) == 6 else "".join(2 * c for c in colour))]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_numbers_on_every_shade_can_be_read() -> None:
    rules = shade_rules().split("}")[:-1]
    assert len(rules) == SHADES
    for rule in rules:
        ground, ink = (part.split("#")[1] for part in rule.split("{")[1].split(";"))
        # WCAG AA for text of any size.
        assert contrast(luminance(ground), luminance(ink)) >= 4.5, rule


@given(FRACTIONS, FRACTIONS)
def test_shades_keep_the_order(one: float, other: float) -> None:
    assert 0 <= shade(one) < SHADES
    assert one >= other or shade(one) <= shade(other)


def test_what_lies_outside_is_taken_to_the_end() -> None:
    assert (shade(-1.0), shade(2.0)) == (0, SHADES - 1)


@given(st.lists(st.lists(FRACTIONS, min_size=1, max_size=30), min_size=1, max_size=10))
def test_charts_are_well_formed_and_stay_inside(rows: list[list[float]]) -> None:
    picture = chart([curve(*row, style=i) for i, row in enumerate(rows)], label="a", unit="accuracy")
    tree = tree_of(picture)
    assert tree.attrib["role"] == "img"
    lines = [element for element in tree.iter("path") if element.attrib["class"].startswith("line")]
    assert len(lines) == len(rows)
    for line in lines:
        for point in line.attrib["d"][1:].split("L"):
            x, y = map(float, point.split())
            assert 0 <= x <= 380
            assert 0 <= y <= 236


def test_text_is_escaped() -> None:
    hostile = "<b>\"'&"
    picture = chart([curve(0.5)], label=hostile, unit=hostile)
    assert "<b>" not in picture
    assert f"{hostile}, %" in texts(picture)
    assert tree_of(picture).attrib["aria-label"] == hostile


def test_looks_are_told_apart_without_colour() -> None:
    keys = [key(style) for style in range(STYLES)]
    marks = {tree_of(one)[1].attrib["d"] for one in keys}
    dashes = {tree_of(one)[0].attrib["class"].split()[-1] for one in keys}
    assert len(marks) == len(dashes) == len(MARKERS) == STYLES
    assert key(STYLES) == key(0)
    assert len({state_key(kind) for kind in ("kept", "found", "lost", "missed", "failed")}) == 5


@given(st.lists(FRACTIONS, min_size=1, max_size=9))
def test_intervals_have_one_tick_a_seed(values: list[float]) -> None:
    tree = tree_of(interval(values, low=0.0, high=1.0, label="x"))
    (ticks,) = (one.attrib["d"] for one in tree.iter("path") if one.attrib["class"] == "seed")
    assert ticks.count("M") == len(values)


def test_strip_has_every_site_in_its_state() -> None:
    picture = strip(cell(sites=5, poisoned=1, rounds=4)["result"])
    paths = {one.attrib["class"]: one.attrib["d"].count("M") for one in tree_of(picture).iter("path")}
    assert paths == {"missed": 1, "found": 3, "lost": 1, "kept": 15}
    names = texts(picture)
    assert names.count("site-01, poisoned") == 1
    assert names.index("site-01, poisoned") > names.index("site-05")
    assert "poisoned sites were rejected 3 of 4 times and honest sites 1 of 16 times" in picture


def test_failed_rounds_are_marked() -> None:
    picture = strip(cell(failed_round="nobody answered")["result"])
    assert [one.attrib["class"] for one in tree_of(picture).iter("rect")] == ["failed"]


def test_many_sites_are_shown_as_two_groups() -> None:
    picture = strip(cell(sites=200, poisoned=50, rounds=3)["result"])
    assert texts(picture) == [
        "round", "1", "2", "3", "honest, rejected, %", "1", "0", "0", "poisoned, rejected, %", "0", "100", "100",
    ]  # fmt: skip
    assert "-" in texts(strip(cell(sites=200, poisoned=0)["result"]))


def test_long_runs_stay_narrow() -> None:
    assert float(tree_of(strip(cell(rounds=400)["result"])).attrib["width"]) < 3000


@pytest.mark.parametrize("panels", [1, 2, 4])
def test_pictures_are_png_and_the_same_each_time(tmp_path: Path, panels: int) -> None:
    heat = Heat("a $panel$ \\x", ("2 of 10 malicious", "3"), ("nnm+mean", "x$"), ((0.5, None), (0.1, 1.0)),
                (("50.0\n± 1.0", "incomplete"), ("10", "$")))  # fmt: skip
    for number in (1, 2):
        draw_heats([heat] * panels, tmp_path / f"heat{number}.png", title="t$")
        charts = [("a$", [curve(0.1, 0.5, style=i, label=f"r{i}$") for i in range(9)])] * panels
        draw_charts(charts, tmp_path / f"chart{number}.png", title="t$", unit="accuracy")
    for kind in ("heat", "chart"):
        first = (tmp_path / f"{kind}1.png").read_bytes()
        assert first.startswith(b"\x89PNG\r\n\x1a\n")
        assert first == (tmp_path / f"{kind}2.png").read_bytes()
