"""Reading shared values from answers of which some are missing and some are wrong.

The answers of honest holders are values of a polynomial of degree D, so with the wrong ones they are a Reed-Solomon
word with errors. With at most f' liars a codeword is accepted only if it agrees with at least D + f' + 1 answers, for
then D + 1 honest ones are among these and it is *their* polynomial; a codeword forged through f' wrong answers and D
honest ones falls one short. Liars may lie in single entries, so all m words together may show at most f' of them.

What is accepted is unique and does not depend on the decoder's coins, so everybody who decodes the same answers gets
the same result.

Source: Gao, A new algorithm for decoding Reed-Solomon codes, 2003.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from flint import nmod_poly
from numpy.typing import NDArray

from quorsum.crypto import field
from quorsum.crypto.sharing import lagrange_matrix
from quorsum.crypto.suite import RandomBytes
from quorsum.errors import RoundFailed, UsageError

__all__ = ["Decoded", "Word", "decode", "decode_word"]


@dataclass(frozen=True)
class Word:
    """A codeword near what was received.

    Attributes:
        at_zero: its polynomial's value at zero.
        agreeing: places of the received values that lie on it, ascending.
    """

    at_zero: int
    agreeing: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Decoded:
    """Shared values, and who answered wrongly.

    Attributes:
        values: uint64, shape (m,), the values at zero.
        liars: holders with at least one wrong answer.
    """

    values: NDArray[np.uint64]
    liars: frozenset[int]


@lru_cache(maxsize=256)
def _basis(points: tuple[int, ...]) -> tuple[nmod_poly, tuple[nmod_poly, ...]]:
    """g_0 = prod_i (x - x_i), and the Lagrange polynomials g_0 / (x - x_j) / g_0'(x_j)."""
    whole = nmod_poly([1], field.P)
    for x in points:
        whole *= nmod_poly([-x, 1], field.P)
    slope = whole.derivative()
    parts = tuple((whole // nmod_poly([-x, 1], field.P)) * pow(int(slope(x)), -1, field.P) for x in points)
    return whole, parts


def decode_word(received: Sequence[int], points: Sequence[int], degree: int) -> Word | None:
    """The one polynomial of degree at most ``degree`` that is wrong in at most (h - degree - 1) / 2 of h values.

    Args:
        received: h values; one that is not in [0, p) counts as wrong.
        points: where they were received, h distinct holders.
        degree: D, from 0.

    Returns:
        the codeword, or None if there is none that near.

    Raises:
        UsageError: received and points do not fit each other, or the degree is negative.
    """
    h = len(points)
    if len(received) != h or len(set(points)) != h or degree < 0:
        raise UsageError(f"expected one value for each of {h} distinct holders and a degree from 0")
    if h <= degree:
        return None
    g0, parts = _basis(tuple(points))
    # g_1(x_i) = received_i
    g1 = nmod_poly([], field.P)
    for value, part in zip(received, parts, strict=True):
        g1 += part * (value % field.P)
    # Extended Euclid on (g_0, g_1) up to the first remainder g = u g_0 + v g_1 of degree below (h + D + 1) / 2.
    previous, current = g0, g1
    v_previous, v = nmod_poly([], field.P), nmod_poly([1], field.P)
    while 2 * current.degree() >= h + degree + 1:
        quotient, rest = divmod(previous, current)
        previous, current = current, rest
        v_previous, v = v, v_previous - quotient * v
    polynomial, rest = divmod(current, v)
    if not rest.is_zero() or polynomial.degree() > degree:
        return None
    agreeing = tuple(i for i, (x, y) in enumerate(zip(points, received, strict=True)) if int(polynomial(x)) == y)
    if 2 * (h - len(agreeing)) > h - degree - 1:
        return None
    return Word(int(polynomial(0)), agreeing)


def decode(answers: Mapping[int, NDArray[np.uint64]], degree: int, f_left: int, random_bytes: RandomBytes) -> Decoded:
    """Decode m words at once, with erasures and errors.

    One random linear combination of the words shows all liars at once, except with probability m / p; the polynomials
    through the others' answers are then verified word by word. Words that this does not explain are decoded one by one.

    Args:
        answers: for each holder that answered, its values: uint64, shape (m,), in [0, p).
        degree: D, of the polynomials: 2 tau for the Gram matrix, tau for the sum.
        f_left: f', how many holders may lie, from 0.
        random_bytes: source of the combination. It makes decoding fast; the result does not depend on it.

    Returns:
        the values at zero, and the liars.

    Raises:
        RoundFailed: too few answers, or too many wrong ones; the message counts them.
        UsageError: the answers are not equally long vectors of field elements, or a number is negative.
    """
    holders = tuple(sorted(answers))
    _check_answers(answers, degree, f_left)
    h, needed = len(holders), degree + f_left + 1
    if h < needed:
        raise RoundFailed(
            f"{h} answers came and {needed} are needed: {needed - h} are missing; "
            "wait for more sites, or run the round again"
        )
    matrix = np.stack([answers[holder] for holder in holders])
    # An accepted word is wrong in at most min(f', h - D - f' - 1) <= (h - D - 1) / 2 places: Gao's decoder finds it.
    most_wrong = min(f_left, h - needed)
    values = np.zeros(matrix.shape[1], dtype=np.uint64)
    wrong = np.zeros(matrix.shape, dtype=np.bool_)
    left = np.arange(matrix.shape[1])
    coefficients = field.random_vector(random_bytes, (matrix.shape[1], 1))
    combined = decode_word([int(y) for y in field.matmul(matrix, coefficients)[:, 0]], holders, degree)
    if combined is not None:
        values, wrong = _follow(matrix, holders, combined.agreeing[: degree + 1])
        left = np.flatnonzero(np.count_nonzero(wrong, axis=0) > most_wrong)
    for entry in left:
        word = decode_word([int(y) for y in matrix[:, entry]], holders, degree)
        if word is None or h - len(word.agreeing) > most_wrong:
            raise RoundFailed(
                f"more than {most_wrong} of {h} answers are wrong in entry {entry}: with up to {f_left} liars, "
                f"{max(0, degree + 2 * f_left + 1 - h)} answers are missing to tell which; run the round again"
            )
        values[entry] = word.at_zero
        wrong[:, entry] = True
        wrong[list(word.agreeing), entry] = False
    liars = frozenset(holders[i] for i in np.flatnonzero(wrong.any(axis=1)))
    if len(liars) > f_left:
        raise RoundFailed(
            f"{len(liars)} of {h} holders answered wrongly ({', '.join(map(str, sorted(liars)))}), "
            f"more than the {f_left} that may lie; the round cannot be trusted"
        )
    return Decoded(values, liars)


def _follow(
    matrix: NDArray[np.uint64], holders: tuple[int, ...], base: tuple[int, ...]
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Values at zero of the polynomials through the answers at ``base``, and which answers are not on them."""
    weights = lagrange_matrix([holders[i] for i in base], (0, *holders))
    predicted = field.matmul(weights, matrix[list(base)])
    return predicted[0].copy(), predicted[1:] != matrix


def _check_answers(answers: Mapping[int, NDArray[np.uint64]], degree: int, f_left: int) -> None:
    if degree < 0 or f_left < 0:
        raise UsageError(f"degree and f_left must not be negative, got {degree} and {f_left}")
    shapes = {values.shape for values in answers.values()}
    if len(shapes) > 1 or any(len(shape) != 1 or shape[0] == 0 for shape in shapes):
        raise UsageError(f"all holders' answers must be vectors of one length, at least 1, got shapes {sorted(shapes)}")
    for holder, values in answers.items():
        if values.dtype != np.uint64 or np.any(values >= np.uint64(field.P)):
            raise UsageError(f"the answers of holder {holder} are not field elements: uint64 below p")
