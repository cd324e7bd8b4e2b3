"""Every error that quorsum raises on purpose.

Two roots, because two different people must act:

* ``UsageError``: the calling program passed something that can never work. Fix the call.
* ``Refusal``: something that came from outside (a site, the coordinator, a file) is not acceptable.
  A refusal says who is to blame, and how strongly that is known.

This module is a leaf: it imports only the standard library, and every room may import it.
"""

from __future__ import annotations

__all__ = [
    "BoundError",
    "CoordinatorFault",
    "DataError",
    "HidingSuspected",
    "KeyMaterialError",
    "QuorsumError",
    "Refusal",
    "RoundFailed",
    "SiteFault",
    "UsageError",
]


# Messages may quote what came from outside. They end up in logs, where a long or many-line one would do harm.
_LONGEST = 1000


def _one_line(text: str) -> str:
    line = "".join(c if c.isprintable() else " " for c in text[: 2 * _LONGEST])
    return line if len(line) <= _LONGEST else line[:_LONGEST] + " ..."


class QuorsumError(Exception):
    """Root of every error quorsum raises on purpose."""


class UsageError(QuorsumError, ValueError):
    """The caller passed an argument that can never work."""


class BoundError(UsageError):
    """Too few sites for the number of malicious ones that must be tolerated."""


class Refusal(QuorsumError):
    """Something that came from outside was refused.

    Attributes:
        code: a short, stable, machine-readable reason such as ``"wrong-shape"``.
    """

    def __init__(self, code: str, message: str) -> None:
        message = _one_line(message)
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type, tuple[str | bool, ...]]:
        return type(self), (self.code, self.message)


class SiteFault(Refusal):
    """One site did not do its part.

    Attributes:
        site: the identifier of the site.
        proven: true when what the site sent shows that it left the protocol; false when nothing shows more than
            bad luck (silence, a crash, an error it reported itself).
    """

    def __init__(self, site: str, code: str, message: str, proven: bool = True) -> None:
        super().__init__(code, message)
        self.site = site
        self.proven = proven

    def __str__(self) -> str:
        return f"site {self.site}: {self.message}"

    def __reduce__(self) -> tuple[type, tuple[str | bool, ...]]:
        return type(self), (self.site, self.code, self.message, self.proven)


class CoordinatorFault(Refusal):
    """The coordinator is to blame: it asked for something that a site must not answer."""


class DataError(Refusal):
    """A data file cannot be used; the message names the file and what to change."""


class KeyMaterialError(Refusal):
    """A key or a context is missing, unreadable, or holds a secret that it must not hold."""


class RoundFailed(QuorsumError):
    """A round could not be finished and nobody is provably to blame.

    Attributes:
        faults: what each site did in this round, where something is known.
    """

    def __init__(self, message: str, faults: dict[str, Refusal] | None = None) -> None:
        super().__init__(message)
        self.faults = dict(faults or {})


class HidingSuspected(RoundFailed):
    """What was opened is longer than what was measured: an update hid from the sketches. Nobody is proven guilty."""
