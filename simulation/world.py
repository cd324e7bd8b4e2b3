"""Everything that a simulated federation is made of, before anything has happened in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from quorsum.simulation.attacks import Attack
from quorsum.simulation.dataset import Dataset, InputArray
from quorsum.simulation.models import new_model

__all__ = ["Training", "World", "site_name"]

# Streams of randomness that belong to a site, beside those of its rounds.
_POISON = 1


def site_name(partition: int) -> str:
    """Name of the site with this partition, from ``site-01``; the same that the sealing mod gives it."""
    return f"site-{partition + 1:02d}"


@dataclass(frozen=True)
class Training:
    """How every site trains: plain SGD with momentum; None takes what suits the model (see ``train_locally``).

    Attributes:
        epochs: passes over the rows per round; steps take its place.
        steps: steps per round, instead of epochs.
        batch_size: rows per step.
        lr: step length.
        momentum: within a round.
        site_momentum: beta, over rounds (see ``learning``).
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 32
    lr: float | None = None
    momentum: float = 0.9
    site_momentum: float = 0.0


@dataclass(frozen=True, eq=False)
class World:
    """A federation's data, sites and attackers.

    Attributes:
        data: the whole data set.
        parts: row numbers of each site's training data.
        poisoned: partitions of the malicious sites.
        attack: what these do.
        training: how sites train.
        seed: decides everything that is random in training and attacks.
        hidden: width of the hidden layer, for models that have one.
        model: name of the model.
        target: class that backdoors aim at.
    """

    data: Dataset
    parts: tuple[NDArray[np.int64], ...]
    poisoned: frozenset[int]
    attack: Attack
    training: Training = field(default_factory=Training)
    seed: int = 0
    hidden: int = 32
    model: str = "auto"
    target: int = 0

    @property
    def honest(self) -> tuple[int, ...]:
        """Partitions of the honest sites, ascending."""
        return tuple(p for p in range(len(self.parts)) if p not in self.poisoned)

    def position(self, partition: int) -> int:
        """Number of a malicious site among the malicious ones, from 0."""
        return sorted(self.poisoned).index(partition)

    def rows(self, partition: int) -> tuple[InputArray, NDArray[np.int64]]:
        """What a site trains on; an attacker on data has poisoned it."""
        if partition in self.poisoned and self.attack.on_data:
            return self._poisoned_rows[partition]
        part = self.parts[partition]
        return self.data.train_x[part], self.data.train_y[part]

    @cached_property
    def _poisoned_rows(self) -> dict[int, tuple[InputArray, NDArray[np.int64]]]:
        return {p: self._poison(p) for p in self.poisoned}

    def _poison(self, partition: int) -> tuple[InputArray, NDArray[np.int64]]:
        part = self.parts[partition]
        return self.attack.poison_data(
            self.data.train_x[part],
            self.data.train_y[part],
            data=self.data,
            position=self.position(partition),
            malicious=len(self.poisoned),
            target=self.target,
            rng=np.random.default_rng([self.seed, 0, partition, _POISON]),
        )

    def new_model(self) -> torch.nn.Module:
        """The model, with the initial weights of this seed."""
        return new_model(self.data, model=self.model, hidden=self.hidden, seed=self.seed)
