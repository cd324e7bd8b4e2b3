"""How the rows of one data set are dealt out to sites.

==============  ====================================================================================================
split           deals
==============  ====================================================================================================
iid             evenly and at random
dirichlet:A     for every class k, shares ``p_k ~ Dirichlet(A, .., A)`` over the sites say how much of that class
                each site holds (Yurochkin et al., ICML 2019; A as the concentration that Hsu, Qi & Brown, 2019, made
                the usual measure). Small A: few classes per site and very unequal sizes; large A: nearly even
similarity:G    a share G of the rows evenly and at random; the rest, sorted by class, in equal contiguous pieces
                (Karimireddy et al., "SCAFFOLD", ICML 2020; Allouah et al., AISTATS 2023). G = 1: iid; G = 0: extreme,
                each site holds one class or two where there are as many sites as classes
label:K         K classes to every site, each class to about as many sites as any other, its rows in equal parts
                (after the shards of McMahan et al., AISTATS 2017; the exact number of classes as in Li et al., ICDE
                2022)
key             all rows of one key (hospital, speaker) to one site, so that sites are about equally large
==============  ====================================================================================================

A text has no classes to sort by: it is dealt ``iid`` or by ``key``; without speakers, ``key`` cuts it into contiguous
parts.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from quorsum.errors import UsageError
from quorsum.simulation.dataset import Dataset

__all__ = ["SPLITS", "Split", "parse_split", "partition"]

_ALPHA_RANGE = (1e-3, 1e6)
_Parts: TypeAlias = list[NDArray[np.int64]]


@dataclass(frozen=True)
class Split:
    """A way to deal out rows; made by :func:`parse_split`.

    Attributes:
        name: one of ``SPLITS``.
        value: A, G or K; 0 for the ways that have no number.
    """

    name: str
    value: float = 0.0

    def __str__(self) -> str:
        """The text that ``parse_split`` reads back."""
        return f"{self.name}:{self.value:.15g}" if self.name in _NUMBERS else self.name


@dataclass(frozen=True)
class _Number:
    letter: str
    says: str
    fits: Callable[[float], bool]


_NUMBERS: Mapping[str, _Number] = MappingProxyType(
    {
        "dirichlet": _Number(
            "A", "a number from 0.001 to 1000000, the concentration", lambda a: _ALPHA_RANGE[0] <= a <= _ALPHA_RANGE[1]
        ),
        "similarity": _Number("G", "a number from 0 (extreme) to 1 (even)", lambda g: 0.0 <= g <= 1.0),
        "label": _Number("K", "a whole number from 1, classes per site", lambda k: k >= 1 and k == int(k)),
    }
)

SPLITS: tuple[str, ...] = ("iid", "dirichlet", "similarity", "label", "key")
"""The names that ``parse_split`` knows."""


def parse_split(text: str) -> Split:
    """Read a split: ``"iid"``, ``"dirichlet:0.3"``, ``"similarity:0.33"``, ``"label:1"``, ``"key"``.

    Raises:
        UsageError: the name is unknown, or its number is missing, superfluous or out of range.
    """
    name, colon, rest = (part.strip() for part in text.partition(":"))
    if name not in SPLITS:
        close = difflib.get_close_matches(name, SPLITS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        forms = ", ".join(f"{name}:{_NUMBERS[name].letter}" if name in _NUMBERS else name for name in SPLITS)
        raise UsageError(f"no split is called {name!r}{hint}; known: {forms}")
    if name not in _NUMBERS:
        if colon:
            raise UsageError(f"split {name} takes no number, got {text!r}; write {name}")
        return Split(name)
    number = _NUMBERS[name]
    try:
        value = float(rest)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and number.fits(value)):
        raise UsageError(
            f"split {name}:{number.letter} needs {number.says}, got {text!r}; write, for example, {_EXAMPLES[name]}"
        )
    return Split(name, value)


_EXAMPLES = {"dirichlet": "dirichlet:0.3", "similarity": "similarity:0.33", "label": "label:2"}


def partition(
    data: Dataset | NDArray[np.integer],
    sites: int,
    *,
    alpha: float | None = None,
    split: str | None = None,
    keys: NDArray[np.integer] | None = None,
    rng: np.random.Generator,
    minimum: int = 2,
) -> list[NDArray[np.int64]]:
    """Deal out rows to sites; every row goes to exactly one site.

    Args:
        data: a data set, whose training rows are dealt; or the class of every row, shape ``(n,)``.
        sites: number of sites, at least 1.
        alpha: the same as ``split="dirichlet:ALPHA"``; not both.
        split: one of the ways above; ``None`` without ``alpha`` is ``"iid"``.
        keys: whose row each row is, shape ``(n,)``; unless given, those of the data set. For ``"key"`` only.
        rng: the source of randomness; the same state gives the same split.
        minimum: fewest rows that a site gets, at least 1. Where a draw gives a site fewer, rows move to it one by one
            from whichever site then has most; by key nothing moves, and too few rows are refused.

    Returns:
        For every site the sorted row numbers that it holds, int64. ``iid`` sizes differ by at most one.

    Raises:
        UsageError: an argument is out of range; ``sites * minimum`` exceeds the number of rows; there are too few keys
            or classes; or the data have no classes or keys to deal by.
    """
    if sites < 1 or minimum < 1:
        raise UsageError(f"sites and minimum must be 1 or more, got {sites} and {minimum}")
    way = _way(alpha, split)
    labels: NDArray[np.integer] | None
    if isinstance(data, Dataset):
        rows = len(data.train_y)
        keys = data.train_keys if keys is None else keys
        labels = data.train_y if data.kind == "classes" else None
    elif data.ndim != 1:
        raise UsageError(f"labels must have shape (n,), got {data.shape}")
    else:
        rows, labels = data.size, data
    if sites * minimum > rows:
        raise UsageError(
            f"{rows} rows are too few for {sites} sites with at least {minimum} each; "
            f"use at most {rows // minimum} sites"
        )
    if way.name == "iid":
        dealt = np.array_split(rng.permutation(rows), sites)
    elif way.name == "key":
        dealt = _dealt_by_key(data, rows, sites, keys, rng, minimum)
    elif labels is None:
        raise UsageError(f"a text has no classes to deal by, so split {way} is not for it; use iid or key")
    else:
        dealt = _topped_up(_WAYS[way.name](labels, sites, way.value, rng), minimum)
    return [np.sort(part) for part in dealt]


def _way(alpha: float | None, split: str | None) -> Split:
    if alpha is None:
        return parse_split("iid" if split is None else split)
    if split is not None:
        raise UsageError(f"alpha and split both say how rows are dealt, got {alpha} and {split!r}; leave alpha out")
    if not _ALPHA_RANGE[0] <= alpha <= _ALPHA_RANGE[1]:
        raise UsageError(
            f"alpha must lie in {_ALPHA_RANGE[0]:g} .. {_ALPHA_RANGE[1]:g}, or be None for even, got {alpha}"
        )
    return Split("dirichlet", alpha)


def _by_dirichlet(labels: NDArray[np.integer], sites: int, alpha: float, rng: np.random.Generator) -> _Parts:
    """For every class, its shuffled rows cut into one piece per site, in Dirichlet proportions."""
    pieces = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(sites, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * rows.size).astype(np.int64)
        pieces.append(np.split(rows, cuts))
    return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]


def _by_similarity(labels: NDArray[np.integer], sites: int, share: float, rng: np.random.Generator) -> _Parts:
    """The share of rows at random, the rest by class."""
    rows = rng.permutation(labels.size)
    even, rest = np.split(rows, [round(share * rows.size)])
    by_class = rest[np.argsort(labels[rest], kind="stable")]
    # The second deal goes backwards: the rows left over by the two divisions so fall to different sites.
    pieces = zip(np.array_split(even, sites), reversed(np.array_split(by_class, sites)), strict=True)
    return [np.concatenate(pair) for pair in pieces]


def _by_label(labels: NDArray[np.integer], sites: int, count: float, rng: np.random.Generator) -> _Parts:
    """So many classes to every site: each takes those that the fewest sites hold so far, ties at random."""
    classes, each = np.unique(labels), int(count)
    if each > classes.size:
        raise UsageError(f"split label:{each} asks for more classes than there are, {classes.size}")
    if each * sites < classes.size:
        raise UsageError(
            f"split label:{each} gives {sites} sites {each * sites} of {classes.size} classes; "
            f"use label:{-(-classes.size // sites)} or more sites, so that no rows are left"
        )
    holders: list[list[int]] = [[] for _ in classes]
    for site in range(sites):
        order = rng.permutation(classes.size)
        for number in sorted(order, key=lambda number: len(holders[number]))[:each]:
            holders[number].append(site)
    dealt: list[list[NDArray[np.int64]]] = [[np.zeros(0, dtype=np.int64)] for _ in range(sites)]
    for label, sites_of in zip(classes, holders, strict=True):
        rows = rng.permutation(np.flatnonzero(labels == label))
        for site, piece in zip(sites_of, np.array_split(rows, len(sites_of)), strict=True):
            dealt[site].append(piece)
    return [np.concatenate(parts) for parts in dealt]


_WAYS: Mapping[str, Callable[[NDArray[np.integer], int, float, np.random.Generator], _Parts]] = MappingProxyType(
    {"dirichlet": _by_dirichlet, "similarity": _by_similarity, "label": _by_label}
)


def _dealt_by_key(
    data: Dataset | NDArray[np.integer],
    rows: int,
    sites: int,
    keys: NDArray[np.integer] | None,
    rng: np.random.Generator,
    minimum: int,
) -> _Parts:
    if keys is None and isinstance(data, Dataset) and data.kind == "text":
        return np.array_split(np.arange(rows), sites)
    if keys is None:
        raise UsageError("split key needs to know whose row each row is; name the key column of the CSV, or use iid")
    if keys.shape != (rows,):
        raise UsageError(f"keys must have shape ({rows},), one per row, got {keys.shape}")
    return _by_key(keys, sites, rng, minimum)


def _by_key(keys: NDArray[np.integer], sites: int, rng: np.random.Generator, minimum: int) -> _Parts:
    """The largest key first, each to the site with the fewest rows so far; ties at random."""
    names, held = np.unique(keys, return_inverse=True)
    if names.size < sites:
        raise UsageError(
            f"{names.size} different keys are too few for {sites} sites, since a key is never divided; "
            f"use at most {names.size} sites, or another split"
        )
    sizes = np.bincount(held)
    order = rng.permutation(names.size)
    loads, site_of = np.zeros(sites, dtype=np.int64), np.zeros(names.size, dtype=np.int64)
    places = rng.permutation(sites)
    for key in order[np.argsort(-sizes[order], kind="stable")]:
        site_of[key] = places[np.argmin(loads[places])]
        loads[site_of[key]] += sizes[key]
    if loads.min() < minimum:
        raise UsageError(
            f"dealt by key, the smallest of {sites} sites has {loads.min()} rows but needs {minimum}; use fewer sites"
        )
    return [np.flatnonzero(site_of[held] == site) for site in range(sites)]


def _topped_up(dealt: _Parts, minimum: int) -> _Parts:
    held = [list(map(int, rows)) for rows in dealt]
    for poor in held:
        while len(poor) < minimum:
            # The last row of a site is of its last class only by the order of dealing; which one moves is no matter,
            # since rows were shuffled within their class.
            richest = max(held, key=len)
            poor.append(richest.pop())
    return [np.array(rows, dtype=np.int64) for rows in held]
