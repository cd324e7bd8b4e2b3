"""What a strategy knows of the federation it runs in, beyond Flower's grid.

In a simulation, and on anybody else's SuperLink, there is nothing to know: sites introduce themselves. On a quorsum
coordinator members were enrolled, their keys are known, they come and go, and a run survives its coordinator. The
grid then carries a :class:`Deployment`, and the same strategy uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from flwr.serverapp import Grid

from quorsum.crypto.identity import PublicIdentity
from quorsum.crypto.suite import Site
from quorsum.errors import QuorsumError
from quorsum.server.checkpoint import RunJournal
from quorsum.server.records import RoundRecord

__all__ = ["TOO_FEW", "Deployment", "Member", "RunStopped", "deployment_of"]

TOO_FEW = "more to be enrolled"
"""How the last of those for whom a run waits ends where there are too few members."""


class RunStopped(QuorsumError):
    """The run was asked to stop; what it has finished is kept, and it goes on from there when it is started again."""


@dataclass(frozen=True)
class Member:
    """A site that was enrolled and approved.

    Attributes:
        site: its name, unique in the federation.
        identity: its keys, as they were compared when it was approved.
    """

    site: Site
    identity: PublicIdentity


class Deployment(Protocol):
    """The federation around a run."""

    @property
    def patience(self) -> float:
        """Seconds to wait at the beginning of a round for sites of the last one, when enough others are there."""

    def members(self) -> Mapping[int, Member]:
        """Members in good standing by Flower's node id, connected or not."""

    def online(self) -> frozenset[int]:
        """Nodes whose process is connected now."""

    def journal(self) -> RunJournal:
        """Where the next ``start`` of this run keeps what must survive; the same for the n-th call after a restart."""

    def waiting(self, sites: Sequence[Site]) -> None:
        """Told for whom the run waits (sites, or how many are missing); nobody when it goes on."""

    def phase(self, number: int, phase: str) -> None:
        """Told what begins."""

    def round(self, record: RoundRecord) -> None:
        """Told every round that was played; after a restart perhaps the last one once more."""

    def stopped(self) -> bool:
        """Whether the run is to end now."""


def deployment_of(grid: Grid) -> Deployment | None:
    """The deployment that a grid belongs to, or None."""
    deployment: Deployment | None = getattr(grid, "deployment", None)
    return deployment
