"""Shamir's sharing of mask keys, sharings of zero, and what one dealer hands to one holder.

Holders are numbered ``k = 1..n``; holder k's share of a value is a polynomial's value at k, the value itself stands at
zero. Any ``degree`` shares are uniform and independent of what is shared; ``degree + 1`` determine it.

Source: Shamir, How to share a secret, CACM 1979. The sharings of zero of degree 2 tau hide the products of shares
(Ben-Or, Goldwasser, Wigderson, STOC 1988).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto import field
from quorsum.crypto.identity import SEAL_OVERHEAD
from quorsum.crypto.sealed_parameters import SEALED_V1, SealedBounds
from quorsum.crypto.suite import RandomBytes
from quorsum.errors import Refusal, UsageError

__all__ = [
    "Deal",
    "deal_length",
    "deal_shares",
    "deal_zeros",
    "interpolate_at_zero",
    "lagrange_matrix",
    "share",
]

_WORD = 8


def _check_points(points: Sequence[int]) -> None:
    if len(set(points)) != len(points) or any(not 0 < point < field.P for point in points):
        raise UsageError(f"holders must be distinct numbers from 1 to p - 1, got {list(points)}")


@lru_cache(maxsize=256)
def _vandermonde(degree: int, n: int) -> NDArray[np.uint64]:
    """V[k - 1, j] = k^j mod p, shape (n, degree + 1)."""
    matrix = np.array([[pow(k, j, field.P) for j in range(degree + 1)] for k in range(1, n + 1)], dtype=np.uint64)
    matrix.flags.writeable = False
    return matrix


@lru_cache(maxsize=256)
def _lagrange(points: tuple[int, ...], targets: tuple[int, ...]) -> NDArray[np.uint64]:
    p = field.P
    rows: list[list[int]] = []
    # w_j = 1 / prod_{i != j} (x_j - x_i)
    weights: list[int] = []
    for j, x in enumerate(points):
        product = 1
        for i, other in enumerate(points):
            if i != j:
                product = product * (x - other) % p
        weights.append(pow(product, -1, p))
    places = {x: j for j, x in enumerate(points)}
    for target in targets:
        if target in places:
            rows.append([int(j == places[target]) for j in range(len(points))])
            continue
        whole = 1
        for x in points:
            whole = whole * (target - x) % p
        # L_j(t) = w_j prod_i (t - x_i) / (t - x_j)
        rows.append([whole * w % p * pow(target - x, -1, p) % p for w, x in zip(weights, points, strict=True)])
    matrix = np.array(rows, dtype=np.uint64).reshape(len(targets), len(points))
    matrix.flags.writeable = False
    return matrix


def lagrange_matrix(points: Sequence[int], targets: Sequence[int]) -> NDArray[np.uint64]:
    """Matrix that takes a polynomial's values at ``points`` to its values at ``targets``.

    Exact for polynomials of degree below ``len(points)``. Kept for reuse, therefore read-only.

    Args:
        points: distinct holders, each from 1 to p - 1.
        targets: field elements; zero is where the shared value stands.

    Returns:
        uint64, shape (len(targets), len(points)), values in [0, p).

    Raises:
        UsageError: there is no point, a point is repeated or is not a holder, or a target is not a field element.
    """
    _check_points(points)
    if not points or any(not 0 <= target < field.P for target in targets):
        raise UsageError("there must be a point to interpolate from, and targets must lie from 0 to p - 1")
    return _lagrange(tuple(points), tuple(targets))


def share(secrets: NDArray[np.uint64], degree: int, n: int, random_bytes: RandomBytes) -> NDArray[np.uint64]:
    """Share each of m values with a fresh random polynomial.

    Args:
        secrets: uint64, shape (m,), values in [0, p).
        degree: how many shares reveal nothing, from 0 to n - 1.
        n: number of holders.
        random_bytes: source of the m * degree coefficients.

    Returns:
        uint64, shape (n, m); row k - 1 is for holder k.

    Raises:
        UsageError: the degree does not fit the number of holders, or the secrets are not field elements.
    """
    if n < 1 or not 0 <= degree < n:
        raise UsageError(f"a sharing of degree {degree} needs from {max(0, degree) + 1} holders on, got {n}")
    _check_elements(secrets, (secrets.size,))
    # s_c(k) = s_c + sum_{j=1..degree} k^j r_j,c
    coefficients = np.concatenate([secrets[np.newaxis], field.random_vector(random_bytes, (degree, secrets.size))])
    return field.matmul(_vandermonde(degree, n), coefficients)


def deal_zeros(count: int, tau: int, n: int, random_bytes: RandomBytes) -> NDArray[np.uint64]:
    """Share zero ``count`` times with random polynomials of degree 2 tau.

    Returns:
        uint64, shape (n, count); row k - 1 is for holder k.

    Raises:
        UsageError: n < 2 tau + 1.
    """
    return share(np.zeros(count, dtype=np.uint64), 2 * tau, n, random_bytes)


def interpolate_at_zero(shares: NDArray[np.uint64], points: Sequence[int]) -> NDArray[np.uint64]:
    """The shared values, from shares that are known to be right (``decoding`` is for those that are not).

    Args:
        shares: uint64, shape (h, m); row i is the share of holder ``points[i]``. More rows than degree + 1 do no harm.
        points: h distinct holders.

    Returns:
        uint64, shape (m,).

    Raises:
        UsageError: shares and points do not fit each other, or a point is repeated.
    """
    if shares.ndim != 2 or len(points) != shares.shape[0]:
        raise UsageError(f"expected one row of shares for each of {len(points)} holders, got shape {shares.shape}")
    values: NDArray[np.uint64] = field.matmul(lagrange_matrix(points, (0,)), shares)[0]
    return values


def _check_elements(values: NDArray[np.uint64], shape: tuple[int, ...]) -> None:
    if values.dtype != np.uint64 or values.shape != shape or np.any(values >= np.uint64(field.P)):
        raise UsageError(
            f"expected uint64 field elements below p of shape {shape}, got {values.dtype} of shape {values.shape}"
        )


@dataclass(frozen=True, eq=False)
class Deal:
    """What one dealer gives one holder. All of it is secret, none of it shows in ``repr``.

    Attributes:
        key: uint64, shape (N,): shares of degree tau of the dealer's mask key.
        key_mask: a share of degree tau of a random value; hides the check of ``key``.
        zeros: uint64, shape (n,): shares b_i,1..b_i,n of zero of degree 2 tau, for the dealer's row of the Gram matrix.
        zeros_mask: one more such share of zero; hides the check of ``zeros``.
    """

    key: NDArray[np.uint64] = dataclass_field(repr=False)
    key_mask: int = dataclass_field(repr=False)
    zeros: NDArray[np.uint64] = dataclass_field(repr=False)
    zeros_mask: int = dataclass_field(repr=False)

    def to_bytes(self) -> bytes:
        """All field elements in the order of the attributes, eight bytes each, little-endian."""
        masks = np.array([self.key_mask, self.zeros_mask], dtype=np.uint64)
        return b"".join(field.to_bytes(part) for part in (self.key, masks[:1], self.zeros, masks[1:]))

    @classmethod
    def from_bytes(cls, data: bytes, n: int) -> Deal:
        """Read what :meth:`to_bytes` wrote, in a round of n sites.

        Raises:
            Refusal: ``wrong-shape`` or ``out-of-range``.
        """
        if len(data) != deal_length(n):
            raise Refusal("wrong-shape", f"a deal among {n} sites has {deal_length(n)} bytes, got {len(data)}")
        size = SEALED_V1.degree
        elements = field.from_bytes(data)
        return cls(elements[:size], int(elements[size]), elements[size + 1 : -1], int(elements[-1]))


def deal_length(n: int, sealed: bool = False) -> int:
    """Bytes of a deal in a round of n sites, as it is or sealed to its holder."""
    return _WORD * (SEALED_V1.degree + n + 2) + (SEAL_OVERHEAD if sealed else 0)


def deal_shares(key: NDArray[np.uint64], bounds: SealedBounds, random_bytes: RandomBytes) -> tuple[Deal, ...]:
    """Deal a mask key among the holders 1..n.

    Args:
        key: uint64, shape (N,), the mask key as field elements.
        bounds: n and tau of the round.
        random_bytes: source of every polynomial.

    Returns:
        n deals; the one at place k - 1 is for holder k.

    Raises:
        UsageError: the key is not N field elements.
    """
    n, tau = bounds.n, bounds.tau
    _check_elements(key, (SEALED_V1.degree,))
    # The value of the key's mask at zero must be random too: the sum of gamma_c s_c is about the key and must not show.
    shared = share(np.append(key, field.random_vector(random_bytes, (1,))), tau, n, random_bytes)
    zeros = deal_zeros(n + 1, tau, n, random_bytes)
    return tuple(
        Deal(shared[k, :-1].copy(), int(shared[k, -1]), zeros[k, :-1].copy(), int(zeros[k, -1])) for k in range(n)
    )
