"""Write tests/vectors/aggregation.json: known answers for the rules, none of them computed by quorsum.

Most come from ByzFL, which works on the updates themselves and not on their inner products. The others are worked
out by hand on integers small enough to check with a pencil. Run it in an environment of its own::

    python -m venv byzfl-venv && . byzfl-venv/bin/activate
    pip install torch numpy scipy && pip install --no-deps byzfl==0.0.11
    python tests/vectors/make_aggregation.py            # write the file
    python tests/vectors/make_aggregation.py --check    # compare with the file, exit 1 if it differs

ByzFL imports torchvision for its data sets, which no aggregator uses. Empty modules take the place of the parts that
do, so that no build of torchvision has to match the one of torch.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TARGET = Path(__file__).with_name("aggregation.json")
Matrix = NDArray[np.float64]

ABOUT = (
    "Known answers for the robust aggregation rules of quorsum, written by tests/vectors/make_aggregation.py. "
    "Each entry of 'valid' holds updates (one row per site), f, a rule by its quorsum name and options, and the "
    "expected 'aggregate' (sum of weights times updates) or 'weights' (one per row), to the relative tolerance "
    "'rtol'. 'source' says who computed it. Where ByzFL counts differently, the call that means the same is named in "
    "'call'. Each entry of 'errors' holds a call that must be refused, the type of the refusal, and words that its "
    "message must contain. Non-finite numbers are written as the strings 'nan', 'inf' and '-inf'."
)


def import_byzfl() -> Any:
    """ByzFL's aggregators, without the parts of it that need torchvision."""
    for part in ("attacks", "benchmark", "fed_framework"):
        sys.modules[f"byzfl.{part}"] = types.ModuleType(f"byzfl.{part}")
    import byzfl

    return byzfl


def inputs() -> Iterator[tuple[str, Matrix, int]]:
    """Updates with a name and f. Rounded to two digits, so that the file can be read and copied exactly."""
    for name, seed, n, d, f in (("small", 1, 7, 3, 2), ("medium", 2, 10, 6, 2), ("crowded", 3, 11, 4, 4)):
        rng = np.random.default_rng(seed)
        yield f"{name}, no outlier", np.round(rng.normal(1.0, 1.0, (n, d)), 2), f
        updates = np.round(rng.normal(1.0, 1.0, (n, d)), 2)
        updates[rng.choice(n, f, replace=False)] += np.round(rng.normal(0.0, 40.0, (f, d)), 2)
        yield f"{name}, {f} far outliers", updates, f
    rng = np.random.default_rng(4)
    yield "no malicious site", np.round(rng.normal(0.0, 1.0, (5, 3)), 2), 0


def from_byzfl(byzfl: Any) -> Iterator[dict[str, Any]]:
    """Everything that means the same in ByzFL and in quorsum."""
    source = f"byzfl {importlib.metadata.version('byzfl')}"

    def entry(
        title: str, rule: str, call: str, compute: Callable[[Matrix], Matrix], updates: Matrix, f: int, **more: Any
    ) -> dict[str, Any]:
        # A copy, because some of its aggregators write into what they are given.
        return {
            "title": f"{rule}: {title}",
            "rule": rule,
            "f": f,
            "updates": updates.tolist(),
            **more,
            "aggregate": np.asarray(compute(updates.copy())).tolist(),
            "rtol": more.get("rtol", 1e-9),
            "source": source,
            "call": call,
        }

    for title, updates, f in inputs():
        n = len(updates)
        yield entry(title, "mean", "Average()", byzfl.Average(), updates, f)
        yield entry(title, "median", "Median()", byzfl.Median(), updates, f)
        yield entry(title, "trimmed-mean", f"TrMean({f})", byzfl.TrMean(f), updates, f)
        # ByzFL sums over n - f - 1 neighbours where Blanchard et al. take n - f - 2: its f is ours plus 1.
        yield entry(title, "krum", f"Krum({f + 1})", byzfl.Krum(f + 1), updates, f)
        same = f"multi-krum(m={n - f - 1})"
        yield entry(title, same, f"MultiKrum({f + 1})", byzfl.MultiKrum(f + 1), updates, f)
        if sum(np.isclose(diameters(updates, f), min(diameters(updates, f)))) == 1:
            # ByzFL takes the first of several sets of the same diameter, quorsum the tightest.
            yield entry(title, "mda", f"MDA({f})", byzfl.MDA(f), updates, f)
        yield entry(title, "monna", f"MoNNA({f}, 1)", byzfl.MoNNA(f, 1), updates, f, reference=1)
        for radius in (0.5, 2.0):
            for steps in (1, 3):
                clipping = byzfl.CenteredClipping(m=None, L=steps, tau=radius)
                name = f"centred-clipping(radius={radius}, steps={steps})"
                yield entry(title, name, f"CenteredClipping(None, {steps}, {radius})", clipping, updates, f)
        nu = 1e-3 * scale(updates)
        yield entry(
            title,
            "geometric-median",
            f"GeometricMedian(nu={nu!r}, T=100000)",
            byzfl.GeometricMedian(nu=nu, T=100_000),
            updates,
            f,
            rtol=1e-4,
        )
        for mixer, call, first in (
            ("nnm", f"NNM({f})", byzfl.NNM(f)),
            ("arc", f"ARC({f})", byzfl.ARC(f)),
            ("clip(norm=1.5)", "Clipping(1.5)", byzfl.Clipping(1.5)),
        ):
            for rule, then, second in (
                ("mean", "Average()", byzfl.Average()),
                ("trimmed-mean", f"TrMean({f})", byzfl.TrMean(f)),
                ("centred-clipping(radius=2.0)", "CenteredClipping(None, 1, 2.0)", None),
            ):
                # It remembers its centre from call to call, so every call gets a new one.
                after = second or byzfl.CenteredClipping(m=None, L=1, tau=2.0)
                yield entry(
                    title,
                    f"{mixer}+{rule}",
                    f"{then} after {call}",
                    lambda x, first=first, after=after: after(first(x)),  # type: ignore[misc]
                    updates,
                    f,
                )


def diameters(updates: Matrix, f: int) -> list[float]:
    """Diameter of every set of n - f rows."""
    from itertools import combinations

    distances = np.linalg.norm(updates[:, None] - updates[None], axis=2)
    sets = combinations(range(len(updates)), len(updates) - f)
    return [float(distances[np.ix_(rows, rows)].max()) for rows in sets]


def scale(updates: Matrix) -> float:
    """The typical distance that smooths the geometric median: the smallest lower median of a row's distances."""
    distances = np.sort(np.linalg.norm(updates[:, None] - updates[None], axis=2), axis=1)
    return float(distances[:, (len(updates) - 1) // 2].min())


def by_hand() -> Iterator[dict[str, Any]]:
    """Answers that can be checked with a pencil."""

    def entry(title: str, rule: str, f: int, updates: list[list[float]], why: str, **more: Any) -> dict[str, Any]:
        return {
            "title": f"{rule}: {title}",
            "rule": rule,
            "f": f,
            "updates": updates,
            **more,
            "rtol": 1e-12,
            "source": "by hand",
            "why": why,
        }

    line = [[0.0], [1.0], [2.0], [4.0], [100.0]]
    yield entry(
        "five on a line",
        "krum",
        1,
        line,
        "n - f - 2 = 2 neighbours; scores 1+4=5, 1+1=2, 1+4=5, 4+9=13, 96^2+98^2=18820",
        weights=[0, 1, 0, 0, 0],
        scores=[5, 2, 5, 13, 18820],
    )
    yield entry(
        "five on a line",
        "multi-krum",
        1,
        line,
        "the n - f = 4 lowest of 5, 2, 5, 13, 18820",
        weights=[0.25, 0.25, 0.25, 0.25, 0],
    )
    yield entry(
        "equal scores go to the lowest row",
        "multi-krum(m=2)",
        1,
        line,
        "score 2, then 5 twice: row 0 before row 2",
        weights=[0.5, 0.5, 0, 0, 0],
    )
    yield entry(
        "ties go to the lowest row",
        "krum",
        0,
        [[0.0], [1.0], [0.0], [1.0]],
        "n - f - 2 = 2 neighbours; every score is 0 + 1",
        weights=[1, 0, 0, 0],
        scores=[1, 1, 1, 1],
    )
    yield entry(
        "a copy of the reference is a neighbour",
        "monna",
        1,
        [[0.0], [0.0], [3.0]],
        "n - f = 2 nearest to row 1: itself and row 0",
        reference=1,
        weights=[0.5, 0.5, 0],
    )
    yield entry(
        "one of two sets of equal diameter is tighter",
        "mda",
        1,
        [[0.0], [1.0], [5.0], [9.0], [10.0]],
        "without row 0 or without row 4 the diameter is 9; the squared distances sum to 206 and 206 as well, so the "
        "set that keeps the lower rows is taken",
        weights=[0.25, 0.25, 0.25, 0.25, 0],
    )
    yield entry(
        "the tighter of two sets of equal diameter",
        "mda",
        1,
        [[0.0], [1.0], [8.0], [9.0], [10.0]],
        "without row 0 or without row 4 the diameter is 9; squared distances sum to 49+64+81+1+4+1=200 without row 0 "
        "and to 1+64+81+49+64+1=260 without row 4",
        weights=[0, 0.25, 0.25, 0.25, 0.25],
    )
    yield entry(
        "three equal of five",
        "geometric-median",
        2,
        [[1.0, 1.0], [7.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 9.0]],
        "a point with more than half of the rows is the median",
        weights=[1 / 3, 0, 1 / 3, 1 / 3, 0],
    )
    yield entry(
        "one step from zero",
        "centred-clipping(radius=2.0)",
        1,
        [[1.0, 0.0], [0.0, 4.0], [-8.0, 0.0], [0.0, 2.0]],
        "factors 1, 2/4, 2/8, 1, each divided by n = 4",
        weights=[0.25, 0.125, 0.0625, 0.25],
    )
    yield entry(
        "one step from an extra row",
        "centred-clipping(radius=2.0)",
        1,
        [[1.0, 0.0], [1.0, 1.0], [5.0, 0.0], [1.0, 4.0]],
        "distances from row 0 are 1, 4, 4; factors 1, 1/2, 1/2, divided by n = 3; row 0 keeps 1 - 2/3",
        reference=0,
        weights=[1 / 3, 1 / 3, 1 / 6, 1 / 6],
    )
    yield entry(
        "copies share one voice",
        "crowd-clipping",
        1,
        [[4.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0], [0.0, 0.0, 4.0, 0.0], [0.0, 0.0, 0.0, 4.0], [0.0, 0.0, 0.0, 8.0]],
        "the second highest cosine of every row is 0, so that rows 3 and 4 are alike by 1; row 4 is clipped to norm 4",
        weights=[0.2, 0.2, 0.2, 0.1, 0.05],
        scores=[0, 0, 0, 1, 1],
    )
    yield entry(
        "trust is the cosine, lengths are made equal",
        "fltrust",
        1,
        [[3.0, 4.0], [-1.0, 0.0], [0.0, 2.0], [2.0, 0.0]],
        "cosines with (2, 0): 3/5, -1, 0; only row 0 is trusted: weight |x_0| / |x_i| = 2/5",
        reference=3,
        weights=[0.4, 0, 0, 0],
    )
    yield entry(
        "the far one is dropped",
        "spectral",
        1,
        [[0.0], [1.0], [2.0], [9.0]],
        "mean 3; squared deviations 9, 4, 1, 36; without row 3 mean 1 and 1, 0, 1",
        weights=[1 / 3, 1 / 3, 1 / 3, 0],
        scores=[1, 0, 1, 36],
    )
    yield entry(
        "neighbours are averaged, a copy does not displace an update from its own mixture",
        "nnm+mean",
        1,
        [[0.0], [0.0], [6.0]],
        "pairs {0,1}, {0,1} and {0,2}: column sums 2.5/3 ... (1+1+1)/6, (1+1)/6, 1/6",
        weights=[0.5, 1 / 3, 1 / 6],
    )
    yield entry(
        "the two longest of five",
        "arc+mean",
        1,
        [[1.0], [2.0], [3.0], [4.0], [-8.0]],
        "k = floor(2 * 1/5 * 4) = 1: only row 4 is clipped, to norm 4",
        weights=[0.2, 0.2, 0.2, 0.2, 0.1],
    )
    yield entry(
        "two far rows of ten",
        "nnm+multi-krum",
        2,
        [[0.0], [1.0], [2.0], [3.0], [50.0], [4.0], [5.0], [-90.0], [6.0], [7.0]],
        "all eight near rows have the same eight neighbours, so their mixtures are equal and score 0",
        weights=[0.125, 0.125, 0.125, 0.125, 0, 0.125, 0.125, 0, 0.125, 0.125],
    )


def errors() -> Iterator[dict[str, Any]]:
    """Calls that must be refused."""
    four = [[0.0], [1.0], [2.0], [3.0]]
    for rule, f, more, error, words in (
        ("krum", 1, {}, "BoundError", ["krum", "n = 5", "n = 4", "f = 1", "tolerate f = 0"]),
        ("multi-krum", 1, {}, "BoundError", ["multi-krum", "n = 5", "n = 4", "f = 1"]),
        ("nnm+multi-krum", 1, {}, "BoundError", ["nnm+multi-krum", "n = 5", "n = 4", "f = 1"]),
        ("mda", 2, {}, "BoundError", ["mda", "n = 5", "n = 4", "f = 2", "tolerate f = 1"]),
        ("geometric-median", 2, {}, "BoundError", ["geometric-median", "n = 5"]),
        ("centred-clipping", 2, {}, "BoundError", ["centred-clipping", "n = 5"]),
        ("centred-clipping", 2, {"reference": 0}, "BoundError", ["centred-clipping", "n = 5", "n = 3"]),
        ("crowd-clipping", 2, {}, "BoundError", ["crowd-clipping", "n = 5"]),
        ("monna", 2, {"reference": 0}, "BoundError", ["monna", "n = 5"]),
        ("fltrust", 3, {"reference": 0}, "BoundError", ["fltrust", "n = 4", "n = 3"]),
        ("spectral", 2, {}, "BoundError", ["spectral", "n = 5"]),
        ("median", 2, {}, "BoundError", ["median", "n = 5"]),
        ("trimmed-mean", 2, {}, "BoundError", ["trimmed-mean", "n = 5"]),
        ("mean", 4, {}, "BoundError", ["mean", "n = 5"]),
        ("arc+mean", 2, {}, "BoundError", ["arc+mean", "n = 5"]),
        ("mean", -1, {}, "UsageError", ["f must be a whole number from 0", "-1"]),
        ("multi-krum(m=5)", 0, {}, "UsageError", ["at most n - f = 4", "m = 5"]),
        ("monna", 1, {}, "UsageError", ["monna needs a trusted row"]),
        ("fltrust", 1, {}, "UsageError", ["fltrust needs a trusted row"]),
        ("fltrust", 1, {"reference": 0}, "UsageError", ["norm 0"]),
        ("fltrust", 1, {"reference": 4}, "UsageError", ["0..3", "4"]),
        ("krum", 0, {"reference": 0}, "UsageError", ["no use for a reference"]),
    ):
        yield {"rule": rule, "f": f, "updates": four, **more, "error": error, "words": words}
    spoilt = [[0.0, 0.0], ["nan", 1.0], [2.0, 1.0], ["inf", 0.0], [1.0, 1.0]]
    yield {"rule": "krum", "f": 1, "updates": spoilt, "error": "NonFiniteGramError", "rows": [1, 3], "words": ["1, 3"]}
    yield {
        "rule": "median",
        "f": 1,
        "updates": spoilt,
        "error": "NonFiniteUpdateError",
        "rows": [1, 3],
        "words": ["1, 3"],
    }
    yield {
        "rule": "fltrust",
        "f": 1,
        "updates": [[1.0], [-1.0], [-2.0]],
        "reference": 0,
        "error": "NoTrustError",
        "words": ["no update has a positive cosine"],
    }


def build() -> str:
    """The file's text."""
    valid = [*by_hand(), *from_byzfl(import_byzfl())]
    content = {"about": ABOUT, "valid": valid, "errors": list(errors())}
    # One line per entry: short enough to scroll, and a change shows which entry it touched.
    lines = [f'"about": {json.dumps(content["about"])}']
    for key in ("valid", "errors"):
        entries = ",\n".join(f"  {json.dumps(entry, allow_nan=False)}" for entry in content[key])
        lines.append(f'"{key}": [\n{entries}\n]')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> int:
    """Write the file, or compare it."""
    text = build()
    if sys.argv[1:] == ["--check"]:
        return 0 if TARGET.read_text(encoding="utf-8") == text else 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
