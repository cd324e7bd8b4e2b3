"""Attacks that try what they send against the defence in use and send the strongest.

The attackers know all honest updates of the round and the rule: they can compute what the coordinator will make of the
round. ``defence`` is that computation, a function of n updates, the h honest ones first; nothing else about the rule is
used. All m attackers send the same, and damage is how far they take the result from the honest mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from quorsum.simulation.untargeted import PERTURBATIONS, alie, alie_shift, ipm, mimicked, min_max, min_sum

__all__ = [
    "NOISE",
    "STRENGTHS",
    "as_sketched",
    "damage",
    "gram_aware",
    "opt_alie",
    "opt_ipm",
    "row_weights",
    "strongest",
]

Floats: TypeAlias = NDArray[np.float64]
Defence: TypeAlias = Callable[[Floats], NDArray[np.floating]]

# Powers of two and some between: a rule's limit is met within a factor of two, and the search narrows that down.
_SIZES = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0, 32.0, 64.0)
STRENGTHS: tuple[float, ...] = tuple(sorted([0.0, *_SIZES, *(-size for size in _SIZES)]))
"""The strengths that a line search tries first. Beyond 64, what no rule and no clipping stops is lost already."""

_COARSE = tuple(sorted([*(s := (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)), *(-size for size in s)]))
_REFINEMENTS = 7
# How much of an update hides that its sender has friends, and how long it is against the honest ones.
_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)
_LENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0, 16.0)
# Below any norm that is a norm.
_TINY = 1e-300
_ROUNDS_LOOKED_BACK = 8

NOISE = math.sqrt(2.0 / (4096 * 4))
"""Relative deviation of a squared length that the defence measures, 1.1 %; default of ``gram-aware``.

Squared lengths come from r sketches of N = 4096 numbers and have a relative deviation of ``sqrt(2 / (N r))``; r is 4
unless it is chosen otherwise.
"""

# Expected damage is averaged over so many draws of the noise.
_DRAWS = 6


def damage(honest: Floats, sent: Floats, malicious: int, defence: Defence) -> float:
    """How far m copies of ``sent`` take the defence's result from the honest mean; 0 if the result is not finite."""
    result = defence(np.vstack([honest, np.tile(sent, (malicious, 1))]))
    moved = float(np.linalg.norm(result - honest.mean(axis=0)))
    return moved if math.isfinite(moved) else 0.0


@dataclass
class _Best:
    """The best candidate so far.

    ``measure`` says how good one is, given the best value so far; it need not be exact below that.
    """

    measure: Callable[[Floats, float], float]
    sent: Floats
    value: float = -1.0

    def offer(self, sent: Floats) -> float:
        """Look at a candidate and keep it if it is the best."""
        value = self.measure(sent, self.value)
        if value > self.value:
            self.sent, self.value = sent, value
        return value


def strongest(
    line: Callable[[float], Floats],
    measure: Callable[[Floats], float],
    strengths: Sequence[float] = STRENGTHS,
) -> tuple[Floats, float]:
    """The point of a line with the largest measure, and that measure.

    Tries every strength, then halves the interval between the neighbours of the best one seven times, at two tries
    each: ``len(strengths) + 14`` calls of ``measure``. A rule's limit is a jump, and the best may lie right before it:
    the best so far always stays inside, so that the interval closes in on a jump as well as on a peak. Never worse than
    the best of ``strengths``.
    """
    best = _Best(lambda sent, _: measure(sent), line(strengths[0]))
    _search(best, line, sorted(strengths))
    return best.sent, best.value


def _search(best: _Best, line: Callable[[float], Floats], strengths: Sequence[float]) -> None:
    values = [best.offer(line(strength)) for strength in strengths]
    top = int(np.argmax(values))
    low, at, high = strengths[max(top - 1, 0)], strengths[top], strengths[min(top + 1, len(strengths) - 1)]
    highest = values[top]
    for _ in range(_REFINEMENTS):
        left, right = (low + at) / 2.0, (at + high) / 2.0
        below, above = best.offer(line(left)), best.offer(line(right))
        if max(below, above) <= highest:
            low, high = left, right
        elif below >= above:
            at, high, highest = left, at, below
        else:
            low, at, highest = at, right, above


def opt_ipm(honest: NDArray[np.floating], malicious: int, defence: Defence) -> Floats:
    """``-epsilon mu`` with the epsilon that does the most damage to the rule in use.

    Xie et al., UAI 2020, with the strength searched for as in Shejwalkar & Houmansadr, NDSS 2021, and in the benchmark
    of Allouah et al., AISTATS 2023 (ByzFL's ``Optimal_InnerProductManipulation``: 16 tries from 0 upwards). Here
    epsilon may be negative, and 39 are tried, 0.5 among them.
    """
    rows, basis = _turned(honest.astype(np.float64), defence)
    sent = strongest(lambda epsilon: ipm(rows, epsilon), lambda sent: damage(rows, sent, malicious, defence))[0]
    return _back(sent, basis)


def opt_alie(honest: NDArray[np.floating], malicious: int, defence: Defence) -> Floats:
    """``mu - z sigma`` with the z that does the most damage to the rule in use (Baruch et al., NeurIPS 2019).

    Searched for as in :func:`opt_ipm`; the z of plain ALIE is among the tries.
    """
    full = honest.astype(np.float64)
    turned, basis = _turned(np.vstack([full, full.std(axis=0)]), defence)
    rows, sigma = turned[:-1], turned[-1]
    mu = rows.mean(axis=0)
    sent = strongest(
        lambda z: mu - z * sigma,
        lambda sent: damage(rows, sent, malicious, defence),
        _shifts(len(rows) + malicious, malicious),
    )[0]
    return _back(sent, basis)


def opt_spread(
    honest: NDArray[np.floating], malicious: int, defence: Defence, generator: np.random.Generator
) -> Floats:
    """Updates against the honest mean that are no copies of each other, the set of them that does the most damage.

    ``s (-sqrt(1 - b) mu / |mu| + sqrt(b) e_k)`` with random directions ``e_k`` of length 1, for shares b of what hides
    and lengths s in units of the median honest norm. Against defences that look for sites that are too alike; with
    b = 0 it is inner-product manipulation.

    Args:
        honest: shape (h, d).
        malicious: m.
        defence: what the coordinator makes of n updates.
        generator: draws the directions; attackers that are to agree must use the same.

    Returns:
        float64, shape (m, d), a row for each attacker.
    """
    full = honest.astype(np.float64)
    hide = generator.standard_normal((malicious, full.shape[1]))
    turned, basis = _turned(np.vstack([full, hide]), defence)
    rows, hide = turned[: len(full)], turned[len(full) :]
    hide = hide / np.maximum(np.linalg.norm(hide, axis=1, keepdims=True), _TINY)
    mu = rows.mean(axis=0)
    against = -mu / max(float(np.linalg.norm(mu)), _TINY)
    length = float(np.median(np.linalg.norm(rows, axis=1)))

    def hurt(sent: Floats) -> float:
        moved = float(np.linalg.norm(defence(np.vstack([rows, sent])) - mu))
        return moved if math.isfinite(moved) else 0.0

    tries = (
        scale * length * (math.sqrt(1.0 - share) * against + math.sqrt(share) * hide)
        for share in _SHARES
        for scale in _LENGTHS
    )
    return _back(max(tries, key=hurt), basis)


def _turned(rows: Floats, defence: Defence) -> tuple[Floats, Floats | None]:
    """The rows as coordinates in an orthonormal basis of what they span, and the basis, shape (k, d).

    A search stays in that span, and a defence that looks at inner products only (``defence.isometric``) does the same
    there, k numbers instead of d. For other defences the rows stay as they are.
    """
    if not getattr(defence, "isometric", False) or rows.shape[1] <= len(rows):
        return rows, None
    basis, coordinates = np.linalg.qr(rows.T)
    return np.ascontiguousarray(coordinates.T), np.ascontiguousarray(basis.T)


def _back(sent: Floats, basis: Floats | None) -> Floats:
    return sent if basis is None else np.asarray(sent @ basis)


def _shifts(sites: int, malicious: int) -> tuple[float, ...]:
    # A dishonest majority has nothing to hide, and no z of its own.
    return (*STRENGTHS, alie_shift(sites, malicious)) if 2 * malicious <= sites else STRENGTHS


def row_weights(grams: Sequence[Floats], defence: Defence, dimension: int) -> Floats | None:
    """How much the defence lets each row count, on average over Gram matrices, shape ``(n,)``.

    Vectors with a given Gram matrix are found from its eigenvectors; a rule that needs inner products only treats them
    as it treated the updates. Their weights are the least-squares solution of ``sum_i w_i y_i = defence(y)``; rows that
    coincide share theirs.

    Returns:
        The weights, or None if no matrix is finite or d < n, too few for n vectors in general position.
    """
    known = [gram for gram in grams if np.isfinite(gram).all() and len(gram) <= dimension]
    if not known:
        return None
    return np.asarray(np.mean([_weights(gram, defence, dimension) for gram in known], axis=0), dtype=np.float64)


def _weights(gram: Floats, defence: Defence, dimension: int) -> Floats:
    values, vectors = np.linalg.eigh(gram)
    # Sketches make a Gram matrix of vectors that are not quite those of the updates; rounding makes it not quite one.
    rows = np.zeros((len(gram), dimension))
    rows[:, : len(gram)] = vectors * np.sqrt(np.maximum(values, 0.0))
    result = defence(rows).astype(np.float64)
    solved = np.linalg.lstsq(rows.T, np.where(np.isfinite(result), result, 0.0), rcond=1e-6)[0]
    return np.asarray(solved, dtype=np.float64)


def as_sketched(rows: Floats, error: Floats) -> Floats:
    """Vectors with the inner products that a sketch of the rows may have.

    In an orthonormal basis of their span the rows are ``L``, and a sketch of k numbers measures ``L W L^T``, W the mean
    of k outer products of normal vectors. For large k, ``W = (I + E)^2`` with a symmetric E of normal entries. The
    vectors are ``L (I + E)``, back in the space of the rows: rows that coincide still do.

    Args:
        rows: shape ``(n, d)``.
        error: E, shape ``(n, n)``; its leading part is used where the rows span less.
    """
    values, vectors = np.linalg.eigh(rows @ rows.T)
    kept = values > 1e-10 * max(float(values.max()), np.finfo(np.float64).tiny)
    lengths, vectors = np.sqrt(values[kept]), vectors[:, kept]
    basis = (vectors / lengths).T @ rows
    k = len(lengths)
    return np.asarray(rows + (vectors * lengths) @ error[:k, :k] @ basis, dtype=np.float64)


def _errors(n: int, noise: float) -> list[Floats]:
    """Draws of E. Always the same ones, so that all attackers come to the same answer."""
    # |c (I + E)|^2 = |c|^2 + 2 c^T E c, and c^T E c has the deviation of the diagonal: half that of a squared length.
    rng = np.random.default_rng(n)
    drawn = rng.normal(0.0, noise / 2.0, (_DRAWS, n, n))
    return list((drawn + drawn.transpose(0, 2, 1)) / 2.0) if noise > 0.0 else []


def gram_aware(
    honest: NDArray[np.floating],
    malicious: int,
    defence: Defence,
    *,
    last: NDArray[np.floating] | None = None,
    past: Sequence[Floats] = (),
    noise: float = NOISE,
) -> Floats:
    """The strongest of some 300 candidates against a defence that sees sketched inner products.

    A search of quorsum's own, after the adaptive attacks of Shejwalkar & Houmansadr (NDSS 2021), who fix the direction
    and search the length. Candidates are ``base + t * direction``. Bases: the honest mean; of the honest rows the one
    that the rule lets count the most (to hide beside) and the one it lets count the least (to give it company, so that
    an outlier is kept in place of a good row). Directions: against the mean, against the deviation, the principal
    direction of the honest updates and the last movement of the model, both ways each. Besides these: every honest row
    copied (mimic), Min-Max and Min-Sum, and the two full line searches of :func:`opt_ipm` and :func:`opt_alie`.
    At the end the best of these lines is searched as finely.

    Which rows count comes from the opened Gram matrices of past rounds, by :func:`row_weights`; without any, the rows
    nearest to the mean and farthest from it stand in.

    The defence measures by sketches whose seed the attackers do not know, so that an attack at the very edge of what is
    let through is caught half the time. A candidate is therefore worth the damage to be expected: the mean over six
    draws of that noise (:func:`as_sketched`), always the same six.

    Args:
        honest: shape ``(h, d)``, h at least 1.
        malicious: m, at least 1.
        defence: see the top of the module.
        last: how the model moved in the last round, shape ``(d,)``.
        past: opened Gram matrices of past rounds, shape ``(n, n)``, rows of honest sites first.
        noise: relative deviation of a squared length as the defence measures it; 0 if it measures exactly.
    """
    rows = honest.astype(np.float64)
    mean = rows.mean(axis=0)
    errors = _errors(len(rows) + 1, noise)

    def measured(sent: Floats, so_far: float) -> float:
        value = damage(rows, sent, malicious, defence)
        # The second look is long: only those that might win get it.
        if value <= so_far or not errors:
            return value
        seen = [as_sketched(np.vstack([rows, sent]), error) for error in errors]
        return float(np.mean([damage(every[:-1], every[-1], malicious, defence) for every in seen]))

    best = _Best(measured, mean)
    for candidate in _ready_made(rows, past):
        best.offer(candidate)
    _search(best, lambda epsilon: ipm(rows, epsilon), STRENGTHS)
    _search(best, lambda z: alie(rows, z), sorted(_shifts(len(rows) + malicious, malicious)))
    before, winner = best.value, None
    for base in _bases(rows, past, defence):
        for direction in _directions(rows, last):
            for strength in _COARSE:
                best.offer(base + strength * direction)
            if best.value > before:
                before, winner = best.value, (base, direction)
    if winner is not None:
        base, direction = winner
        _search(best, lambda t: base + t * direction, STRENGTHS)
    return best.sent


def _ready_made(rows: Floats, past: Sequence[Floats]) -> Iterator[Floats]:
    yield rows[mimicked(rows, past)]
    yield from rows
    for perturbation in PERTURBATIONS:
        yield min_max(rows, perturbation)
        yield min_sum(rows, perturbation)


def _bases(rows: Floats, past: Sequence[Floats], defence: Defence) -> list[Floats]:
    mean = rows.mean(axis=0)
    weights = row_weights(past[-_ROUNDS_LOOKED_BACK:], defence, rows.shape[1])
    if weights is None or len(weights) < len(rows):
        weights = -np.sum((rows - mean) ** 2, axis=1)
    counts = weights[: len(rows)]
    return [mean, rows[int(np.argmax(counts))], rows[int(np.argmin(counts))]]


def _directions(rows: Floats, last: NDArray[np.floating] | None) -> list[Floats]:
    """Directions to leave a base in, each about as long as an honest update is or differs from the mean."""
    mean = rows.mean(axis=0)
    away = rows - mean
    # The principal direction is a combination of the rows: eigenvectors of an (h, h) matrix, not of a (d, d) one.
    principal = np.linalg.eigh(away @ away.T)[1][:, -1] @ away / math.sqrt(len(rows))
    found = [-mean, -rows.std(axis=0), principal]
    if last is not None and float(np.linalg.norm(last)) > 0.0:
        found.append(-last * (float(np.linalg.norm(mean)) / float(np.linalg.norm(last))))
    return [direction.astype(np.float64) for direction in found if float(np.linalg.norm(direction)) > 0.0]
