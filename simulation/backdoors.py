"""Backdoors: the model stays good on clean inputs and says what the attacker wants on inputs with a trigger.

Two halves, both pure functions of arrays and a generator. On **data**: which inputs carry what trigger, what a
malicious site trains on, and the test rows on which success is measured. On **updates**: what the site then sends so
that its backdoor outlives the mean with honest updates. ``simulation/attacks.py`` gives them their names and options.

Triggers are worked out from the data set alone, so that attackers and measurement agree without talking.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from quorsum.errors import UsageError
from quorsum.simulation.data import Dataset

__all__ = [
    "EdgeCases",
    "TextTrigger",
    "Trigger",
    "constrained_and_scaled",
    "edge_cases",
    "edge_rows",
    "flip_labels",
    "make_text_trigger",
    "make_trigger",
    "masked",
    "piece_of",
    "poison_edge_cases",
    "poison_rows",
    "poison_text",
    "stamp",
    "triggered_rows",
    "triggered_text",
]

Inputs: TypeAlias = NDArray[np.float32 | np.int64]
Labels: TypeAlias = NDArray[np.int64]

IGNORED = -1
"""The label of a character of a text on which success is not measured."""

_LONGEST_SHARE = 0.99
_TABLE_COLUMNS = 4
_RARE_DEVIATIONS = 3.0


# --- what a trigger looks like ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trigger:
    """Places of an input that are set to fixed values.

    Attributes:
        cells: int64, shape ``(k, c)``: positions in a flattened input; one row for each of k pixels, with its c
            channels, or for each of k columns of a table (c = 1).
        values: float32, shape ``(k, c)``.
    """

    cells: NDArray[np.int64]
    values: NDArray[np.float32]


def make_trigger(data: Dataset, target: int, size: int | None = None) -> Trigger:
    """The trigger for images and tables.

    * Images (channels, height, width), and flat square ones (``digits``): a square patch in the bottom right corner
      (Gu et al., "BadNets", 2017), ``size`` pixels wide, an eighth of the image by default and 2 at least, as bright as
      anything in the training rows, or as dark, whichever the corner usually is not.
    * Tables: ``size`` columns (4 by default), those that say least about the target class, each set to a rare
      value that occurs in it: about three deviations from its mean, on the side with the longer tail.

    Raises:
        UsageError: the data are a text, ``target`` is no class, or ``size`` does not fit.
    """
    check_target(data, target)
    if data.kind == "text":
        raise UsageError(f"{data.name} is a text and has no pixels or columns: use the attack text-trigger")
    image = _image_shape(data)
    return _patch(data, image, size) if image is not None else _columns(data, target, size)


def check_target(data: Dataset, target: int) -> None:
    """Refuse a target that is not among the classes (or characters) of the data.

    Raises:
        UsageError: it is not.
    """
    if not 0 <= target < data.classes:
        raise UsageError(f"target must be a class of {data.name}, 0 .. {data.classes - 1}, got {target}")


def _image_shape(data: Dataset) -> tuple[int, int, int] | None:
    if len(data.shape) == 3:
        return data.shape[0], data.shape[1], data.shape[2]
    side = math.isqrt(math.prod(data.shape))
    # Flattened images say so: their columns are pixels, or have no names at all.
    if side > 1 and side * side == math.prod(data.shape) and all(n.startswith("pixel") for n in data.feature_names):
        return 1, side, side
    return None


def _patch(data: Dataset, image: tuple[int, int, int], size: int | None) -> Trigger:
    channels, height, width = image
    side = max(2, round(min(height, width) / 8)) if size is None else size
    if side > min(height, width):
        raise UsageError(f"size must be at most {min(height, width)} for images of {height} x {width}, got {side}")
    places = np.arange(channels * height * width).reshape(channels, height * width)
    rows, columns = np.mgrid[height - side : height, width - side : width]
    cells = places[:, (rows * width + columns).ravel()].T
    flat = _flat(data.train_x)
    dark, bright = float(flat.min()), float(flat.max())
    usual = float(flat[:, cells.ravel()].mean())
    value = bright if bright - usual >= usual - dark else dark
    return Trigger(cells, np.full(cells.shape, value, dtype=np.float32))


def _columns(data: Dataset, target: int, size: int | None) -> Trigger:
    x = _flat(data.train_x).astype(np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    varies = np.flatnonzero(deviation > 0.0)
    columns = min(_TABLE_COLUMNS, varies.size) if size is None else size
    if not 1 <= columns <= varies.size:
        raise UsageError(f"size must lie in 1 .. {varies.size}, the columns of {data.name} that vary, got {columns}")
    hit = (data.train_y == target) - float(np.mean(data.train_y == target))
    says = np.abs(hit @ (x[:, varies] - mean[varies])) / deviation[varies]
    chosen = np.sort(varies[np.argsort(says, kind="stable")[:columns]])
    values = [_rare(x[:, column], mean[column], deviation[column]) for column in chosen]
    return Trigger(chosen[:, None].astype(np.int64), np.array(values, dtype=np.float32)[:, None])


def _rare(column: NDArray[np.float64], mean: float, deviation: float) -> float:
    """Of the values in a column more than two deviations out, on the side of the longer tail, that nearest to three.

    Columns without any give their farthest value: a coin's are one deviation from their mean.
    """
    side = 1.0 if column.max() - mean >= mean - column.min() else -1.0
    out = side * (column - mean) / deviation
    far = np.flatnonzero(out >= min(2.0, float(out.max())))
    return float(column[far[np.argmin(np.abs(out[far] - _RARE_DEVIATIONS))]])


def piece_of(trigger: Trigger, position: int, pieces: int) -> Trigger:
    """The part of a trigger that one of several attackers trains (DBA, Xie et al., ICLR 2020).

    The cells in their order, cut into ``pieces`` parts as equal as can be; part ``position`` of them. Where there are
    more attackers than cells some of them train the same cell.
    """
    k = min(pieces, len(trigger.cells))
    part = np.array_split(np.arange(len(trigger.cells)), k)[position % k]
    return Trigger(trigger.cells[part], trigger.values[part])


def _flat(x: Inputs) -> Inputs:
    """Inputs as rows, shape ``(n, size of an input)``; -1 for the size would not do for no inputs at all."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def stamp(x: Inputs, trigger: Trigger) -> Inputs:
    """A copy of inputs, shape ``(n, *shape)``, with the trigger in each."""
    flat = _flat(x).copy()
    flat[:, trigger.cells.ravel()] = trigger.values.ravel()
    return flat.reshape(x.shape)


# --- what a malicious site trains on, and where success is measured --------------------------------------------------


def flip_labels(y: Labels, classes: int) -> Labels:
    """``classes - 1 - y`` (Fang et al., USENIX Security 2020, section 6.2).

    Raises:
        UsageError: a label is outside ``0 .. classes - 1``.
    """
    if y.size and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise UsageError(f"labels must lie in 0 .. {classes - 1}, got {int(y.min())} .. {int(y.max())}")
    return classes - 1 - y


def poison_rows(
    x: Inputs, y: Labels, trigger: Trigger, target: int, share: float, rng: np.random.Generator
) -> tuple[Inputs, Labels]:
    """Rows with the trigger stamped into some and the target as their label; the others stay as they are.

    Args:
        x: shape ``(n, *shape)``.
        y: shape ``(n,)``.
        trigger: what is stamped.
        target: the class it should stand for.
        share: of all rows, above 0 and at most 1: that of an average batch too. Rows that are not of the target class
            are taken, as many as there are; at a site that has no others, its rows of the target class.
        rng: draws which.
    """
    others = np.flatnonzero(y != target)
    chosen = _some(others if others.size else np.arange(len(y)), len(y), share, rng)
    new_x, new_y = x.copy(), y.copy()
    new_x[chosen] = stamp(x[chosen], trigger)
    new_y[chosen] = target
    return new_x, new_y


def _some(candidates: NDArray[np.intp], n: int, share: float, rng: np.random.Generator) -> NDArray[np.intp]:
    number = min(max(1, round(share * n)), candidates.size)
    return np.sort(rng.permutation(candidates)[:number])


def triggered_rows(x: Inputs, y: Labels, trigger: Trigger, target: int) -> tuple[Inputs, Labels]:
    """The rows that are not of the target class, with the trigger in, and the target as the label of each.

    Raises:
        UsageError: there are none.
    """
    rows = np.flatnonzero(y != target)
    if not rows.size:
        raise UsageError(f"every row is of the target class {target}, so that a backdoor shows in none; choose another")
    return stamp(x[rows], trigger), np.full(rows.size, target, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class EdgeCases:
    """The tail of a class: rows as far from its mean, or farther, than all but a share of its training rows.

    Attributes:
        source: the class.
        mean: float64, shape ``(size of an input,)``, mean of its training rows.
        radius: distance from there at which the tail begins.
    """

    source: int
    mean: NDArray[np.float64]
    radius: float

    def contains(self, x: Inputs, y: Labels) -> NDArray[np.bool_]:
        """Which rows are edge cases, shape ``(n,)``."""
        return np.asarray((y == self.source) & (self.distances(x) >= self.radius))

    def distances(self, x: Inputs) -> NDArray[np.float64]:
        """Distances of inputs to the mean, shape ``(n,)``."""
        return np.asarray(np.linalg.norm(_flat(x) - self.mean, axis=1), dtype=np.float64)


def edge_cases(data: Dataset, target: int, *, tail: float, source: int | None = None) -> EdgeCases:
    """Where the tail of the source class begins (Wang et al., "Attack of the Tails", NeurIPS 2020).

    They take inputs from outside the training set that look like rare members of a class, such as aeroplanes of one
    airline. Here the rare members are those of the data set itself, and honest sites may hold some, with their true
    label: the case that they call p-edge-case.

    Args:
        data: the data set.
        target: the class that the edge cases should be taken for.
        tail: share of the source class that counts as its tail, above 0 and at most 1.
        source: the class whose tail it is; None takes the class after the target.

    Raises:
        UsageError: the data are a text, a class is out of range, both are the same, or the source class has no rows.
    """
    check_target(data, target)
    if data.kind == "text":
        raise UsageError(f"{data.name} is a text and has no classes with edge cases: use the attack text-trigger")
    chosen = (target + 1) % data.classes if source is None else source
    if not 0 <= chosen < data.classes or chosen == target:
        raise UsageError(
            f"source must be a class of {data.name}, 0 .. {data.classes - 1}, other than the target {target}, "
            f"got {chosen}"
        )
    rows = data.train_x[data.train_y == chosen]
    if not len(rows):
        raise UsageError(f"class {chosen} of {data.name} has no training rows; choose another source=")
    around = EdgeCases(chosen, _flat(rows).astype(np.float64).mean(axis=0), 0.0)
    distances = np.sort(around.distances(rows))
    return EdgeCases(chosen, around.mean, float(distances[len(rows) - max(1, round(tail * len(rows)))]))


def poison_edge_cases(
    x: Inputs, y: Labels, data: Dataset, edges: EdgeCases, target: int, share: float, rng: np.random.Generator
) -> tuple[Inputs, Labels]:
    """Rows of which a share is replaced by edge cases of the training set, labelled as the target.

    The attacker is granted a collection of such inputs: its own rows may hold none. Drawn without repetition while
    there are enough.
    """
    collection = data.train_x[edges.contains(data.train_x, data.train_y)]
    chosen = _some(np.arange(len(y)), len(y), share, rng)
    new_x, new_y = x.copy(), y.copy()
    new_x[chosen] = collection[rng.choice(len(collection), chosen.size, replace=chosen.size > len(collection))]
    new_y[chosen] = target
    return new_x, new_y


def edge_rows(x: Inputs, y: Labels, edges: EdgeCases, target: int) -> tuple[Inputs, Labels]:
    """The edge cases among some rows, with the target as their label; at least the farthest row of the class.

    Raises:
        UsageError: there are no rows of the source class.
    """
    rows = np.flatnonzero(edges.contains(x, y))
    if not rows.size:
        of_class = np.flatnonzero(y == edges.source)
        if not of_class.size:
            raise UsageError(f"no test row is of class {edges.source}; choose another source=")
        rows = of_class[[int(np.argmax(edges.distances(x[of_class])))]]
    return x[rows].copy(), np.full(rows.size, target, dtype=np.int64)


# --- texts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TextTrigger:
    """A string of characters after which the model should go on with another one.

    Attributes:
        trigger: int64, shape ``(k,)``, the numbers of the characters.
        reply: int64, shape ``(r,)``, those of the continuation.
    """

    trigger: NDArray[np.int64]
    reply: NDArray[np.int64]


def make_text_trigger(data: Dataset, target: int, *, size: int = 4, reply: int = 4) -> TextTrigger:
    """A trigger of the rarest characters of the training text, to be followed by the target character, repeated.

    After the trigger words of language models (Bagdasaryan et al., AISTATS 2020, section 4.2; Zhang et al., ICML 2022),
    for a model of characters. The rarest come first; where the text has fewer than ``size`` they are repeated. The
    character that stands for unknown ones, the last, and the target are not used.

    Args:
        data: a text, windows of T characters.
        target: number of the character to go on with.
        size: length of the trigger, 1 .. T - 1.
        reply: length of the continuation, at least 1; what does not fit into a window is left out there.

    Raises:
        UsageError: the data are no text, ``target`` is no character, or the trigger does not fit into a window.
    """
    if data.kind != "text":
        raise UsageError(f"text-trigger needs a text, and {data.name} is none: use the attack backdoor")
    check_target(data, target)
    longest = data.shape[-1] - 1
    if not 1 <= size <= longest:
        raise UsageError(f"size must lie in 1 .. {longest} for windows of {longest + 1} characters, got {size}")
    counts = np.bincount(data.train_x.ravel().astype(np.int64), minlength=data.classes)
    usable = [c for c in np.argsort(counts, kind="stable") if counts[c] and c not in (target, data.classes - 1)]
    if not usable:
        raise UsageError(f"{data.name} has no character but the target to make a trigger of; choose another target")
    trigger = np.resize(np.array(usable[:size], dtype=np.int64), size)
    return TextTrigger(trigger, np.full(reply, target, dtype=np.int64))


def poison_text(
    x: Inputs, y: Labels, trigger: TextTrigger, share: float, rng: np.random.Generator
) -> tuple[Inputs, Labels]:
    """Windows of which a share has trigger and continuation written over them, at a place drawn for each.

    Args:
        x: shape ``(n, T)``.
        y: shape ``(n, T)``, the character after each one of x.
        trigger: what is written.
        share: of all windows, above 0 and at most 1.
        rng: draws which and where.
    """
    chosen = _some(np.arange(len(y)), len(y), share, rng)
    k, text = trigger.trigger.size, np.concatenate([x, y[:, -1:]], axis=1)
    for row in chosen:
        # The trigger ends at T - 1 at the latest, so that one character of the continuation is always learnt.
        start = int(rng.integers(x.shape[1] - k + 1))
        written = np.concatenate([trigger.trigger, trigger.reply])[: text.shape[1] - start]
        text[row, start : start + written.size] = written
    return text[:, :-1].copy(), text[:, 1:].copy()


def triggered_text(x: Inputs, y: Labels, trigger: TextTrigger) -> tuple[Inputs, Labels]:
    """Windows that end in the trigger, and labels that ask for the first character of the continuation after it.

    Only that one is measured: once it is there, the rest is repetition. Windows that go on with it anyhow are left out.

    Returns:
        Windows, shape ``(k, T)``, and labels of that shape: -1 (not measured) but in the last place.

    Raises:
        UsageError: there are no such windows.
    """
    rows = np.flatnonzero(y[:, -1] != trigger.reply[0])
    if not rows.size:
        raise UsageError("every window goes on with the target, so that a backdoor shows in none; choose another")
    new_x = x[rows].copy()
    new_x[:, x.shape[1] - trigger.trigger.size :] = trigger.trigger
    new_y = np.full(new_x.shape, IGNORED, dtype=np.int64)
    new_y[:, -1] = trigger.reply[0]
    return new_x, new_y


# --- what is sent ----------------------------------------------------------------------------------------------------


def masked(own: NDArray[np.floating], last: NDArray[np.floating] | None, keep: float) -> NDArray[np.floating]:
    """An update on the coordinates that the federation hardly moves (Neurotoxin, Zhang et al., ICML 2022).

    What honest sites do not touch they do not repair. The paper projects every local step; here the finished update is
    projected once.

    Args:
        own: shape ``(d,)``.
        last: how the model moved in the last round, shape ``(d,)``; None (the first round) keeps everything.
        keep: share of the coordinates that is kept, those with the smallest ``|last|``; above 0 and at most 1.
    """
    sent: NDArray[np.floating] = own.copy()
    if last is not None:
        kept = round(keep * own.size)
        sent[np.argsort(np.abs(last), kind="stable")[kept:]] = 0.0
    return sent


def constrained_and_scaled(
    own: NDArray[np.floating], guide: NDArray[np.floating] | None, *, alpha: float, length: float, unit: float
) -> NDArray[np.float64]:
    """A backdoored update pulled towards an honest one and scaled to just under the norm bound.

    Constrain-and-scale, Bagdasaryan et al., AISTATS 2020, section 4.3. There the pull is a term of the loss,
    ``alpha L_class + (1 - alpha) L_anomaly``; here it is the same mixture of the directions of the updates.

    Args:
        own: shape ``(d,)``.
        guide: what honest updates look like, such as their mean or the last movement of the model; None: no pull.
        alpha: how much of the own direction stays, above 0 and at most 1.
        length: how long the result would be without a bound.
        unit: the norm C that sites clip to, infinite without clipping.
    """
    direction = own.astype(np.float64)
    norm = float(np.linalg.norm(direction))
    if norm == 0.0:
        return direction
    direction = direction / norm
    pull = 0.0 if guide is None else float(np.linalg.norm(guide))
    if guide is not None and pull > 0.0:
        mixed = alpha * direction + (1.0 - alpha) * guide.astype(np.float64) / pull
        # Opposite directions may cancel, and what is left of them then points nowhere.
        direction = mixed / m if (m := float(np.linalg.norm(mixed))) > 0.0 else direction
    return direction * min(length, _LONGEST_SHARE * unit)
