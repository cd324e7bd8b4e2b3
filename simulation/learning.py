"""What every simulated site learns in a round: trained once, whoever asks, with the site's momentum.

Site momentum (Karimireddy, He & Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021): a site
submits ``m_t = beta m_{t-1} + (1 - beta) x_t`` and not its update ``x_t``. What honest sites submit then differs less
from round to round, and what differs for good stands out.

The honest sites' updates are asked for twice: by the sites, and by attackers that know them. Both get the same array.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from quorsum import arrays
from quorsum.simulation.dataset import InputArray
from quorsum.simulation.models import learnable, load_learnable, train_locally
from quorsum.simulation.world import World

__all__ = ["Learner"]


@dataclass(frozen=True)
class _Learnt:
    round: int
    update: NDArray[np.float32]


class Learner:
    """The sites of a world as learners; safe to ask from several threads.

    It remembers the last round of each site. In another process it starts without that memory, so a federation that is
    spread over processes cannot have site momentum.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._locks = [threading.Lock() for _ in world.parts]
        self._last: dict[int, _Learnt] = {}
        self._rows: dict[int, tuple[InputArray, NDArray[np.int64]]] = {}
        # A model to train in for each thread: making one takes longer than a step of training.
        self._desk = threading.local()

    def __getstate__(self) -> dict[str, World]:
        return {"world": self.world}

    def __setstate__(self, state: dict[str, World]) -> None:
        self.__init__(state["world"])  # type: ignore[misc]

    def update(self, partition: int, number: int, model: ArrayRecord) -> NDArray[np.float32]:
        """What the site submits in a round if it is honest, float32, shape ``(d,)``; not to be changed.

        Args:
            partition: the site.
            number: the round; rounds are asked for in ascending order.
            model: the model of the round.
        """
        with self._locks[partition]:
            last = self._last.get(partition)
            if last is not None and last.round == number:
                return last.update
            update = self._trained(partition, number, model)
            if (beta := self.world.training.site_momentum) > 0.0:
                # m <- beta m + (1 - beta) x, from m = 0
                update = np.float32(1.0 - beta) * update
                if last is not None:
                    update += np.float32(beta) * last.update
            update.setflags(write=False)
            self._last[partition] = _Learnt(number, update)
            return update

    def _trained(self, partition: int, number: int, model: ArrayRecord) -> NDArray[np.float32]:
        """The difference that local training makes: a pure function of the arguments and the seed."""
        world, training = self.world, self.world.training
        network = self._network()
        load_learnable(network, model.to_torch_state_dict())
        if partition not in self._rows:
            self._rows[partition] = world.rows(partition)
        x, y = self._rows[partition]
        stream = np.random.SeedSequence([world.seed, number, partition]).generate_state(1, np.uint64)
        train_locally(
            network,
            x,
            y,
            seed=int(stream[0] >> 1),
            epochs=training.epochs,
            steps=training.steps,
            batch_size=training.batch_size,
            lr=training.lr,
            momentum=training.momentum,
        )
        return arrays.difference(ArrayRecord(learnable(network)), model)

    def _network(self) -> torch.nn.Module:
        if not hasattr(self._desk, "network"):
            self._desk.network = self.world.new_model()
        network: torch.nn.Module = self._desk.network
        return network
