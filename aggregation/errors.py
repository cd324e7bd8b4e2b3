"""What the rules refuse, and why.

Errors of the calling program derive from :class:`quorsum.errors.UsageError`; a round that cannot be aggregated
although every call was right is a :class:`quorsum.errors.RoundFailed`.
"""

from __future__ import annotations

from collections.abc import Iterable

from quorsum.errors import RoundFailed, UsageError

__all__ = [
    "ClearSuiteError",
    "NoConvergenceError",
    "NoTrustError",
    "NonFiniteError",
    "NonFiniteGramError",
    "NonFiniteUpdateError",
    "UnknownRuleError",
]


class NonFiniteError(UsageError):
    """Some rows hold NaN, infinity, or numbers too large to compute with.

    Attributes:
        rows: the guilty rows, ascending.
    """

    def __init__(self, message: str, rows: Iterable[int]) -> None:
        super().__init__(message)
        self.rows = tuple(rows)

    def __reduce__(self) -> tuple[type, tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.rows)


class NonFiniteGramError(NonFiniteError):
    """A Gram matrix with such rows reached a rule; ``check_gram`` names them so that they can be dropped before."""


class NonFiniteUpdateError(NonFiniteError):
    """A matrix of updates with such rows reached a rule of the clear suite."""


class UnknownRuleError(UsageError):
    """The name is not that of a rule, a pre-aggregator or a parameter."""


class ClearSuiteError(UsageError):
    """The rule must see every coordinate of every update, and only a Gram matrix is there."""


class NoConvergenceError(RoundFailed):
    """An iterative rule did not reach its tolerance within its iterations."""


class NoTrustError(RoundFailed):
    """No update points in the direction of the trusted reference, so nothing can be averaged."""
