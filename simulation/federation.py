"""The simulated sites: an ordinary Flower ClientApp for training, attackers around it, and the sealing mod outside.

Order of the layers, as a message enters: sealing mod -> attacker (poisoned sites only) -> the ClientApp. An attacker
so works like a real one: it decides what its site *submits*, and the protocol takes it from there.

Attackers that know the honest updates get them by training the honest sites' models themselves. Training is a pure
function of (seed, round, site, model), so what they compute is exactly what the honest sites submit in that round.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from numpy.typing import NDArray

from quorsum import arrays
from quorsum.client import seal
from quorsum.crypto.ckks_parameters import MAX_NORM
from quorsum.crypto.suite import Blocks, RandomBytes, RoundContext, SiteSuite, Vector
from quorsum.simulation.attacks import Attack, AttackView
from quorsum.simulation.data import Dataset
from quorsum.simulation.models import build_model, train_locally
from quorsum.simulation.protocol_attacks import PROTOCOL_ATTACKS, WrappedSite

__all__ = ["Training", "World", "client_app", "site_name"]


def site_name(partition: int) -> str:
    """Name of the site with this partition, from ``site-01``; the same that the sealing mod gives it."""
    return f"site-{partition + 1:02d}"


@dataclass(frozen=True)
class Training:
    """How every site trains: plain SGD with momentum; None takes what suits the model (see ``train_locally``)."""

    epochs: int | None = None
    batch_size: int = 32
    lr: float | None = None
    momentum: float = 0.9


@dataclass(frozen=True)
class World:
    """Everything that a simulated federation is made of.

    Attributes:
        data: the whole data set.
        parts: row numbers of each site's training data.
        poisoned: partitions of the malicious sites.
        attack: what these do.
        training: how sites train.
        seed: decides everything that is random in training and attacks.
        hidden: width of the hidden layer, for models that have one.
    """

    data: Dataset
    parts: tuple[NDArray[np.int64], ...]
    poisoned: frozenset[int]
    attack: Attack
    training: Training = field(default_factory=Training)
    seed: int = 0
    hidden: int = 32

    def rows(self, partition: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """What a site trains on; an attacker on data has poisoned its labels."""
        part = self.parts[partition]
        labels = self.data.train_y[part]
        if partition in self.poisoned and self.attack.on_data:
            labels = self.attack.poison_labels(labels, self.data.classes)
        return self.data.train_x[part], labels

    def new_model(self) -> torch.nn.Module:
        """The model, with the initial weights of this seed."""
        return build_model(self.data.shape, self.data.classes, seed=self.seed, hidden=self.hidden)

    def trained(self, partition: int, number: int, model: ArrayRecord) -> ArrayRecord:
        """The model after a site's local training in a round: a pure function of its arguments and the seed."""
        network = self.new_model()
        network.load_state_dict(model.to_torch_state_dict())
        x, y = self.rows(partition)
        stream = np.random.SeedSequence([self.seed, number, partition]).generate_state(1, np.uint64)
        t = self.training
        train_locally(
            network, x, y, seed=int(stream[0] >> 1), epochs=t.epochs, batch_size=t.batch_size, lr=t.lr,
            momentum=t.momentum,
        )  # fmt: skip
        return ArrayRecord(network.state_dict())


def client_app(world: World, make_suite: Callable[[int], SiteSuite], random_bytes: RandomBytes) -> ClientApp:
    """The ClientApp that every node of a simulated federation runs; who is who follows from the partition."""
    honest = seal(lambda node: make_suite(_partition(node)), random_bytes=random_bytes)
    malicious = seal(lambda node: _malicious(world.attack, make_suite(_partition(node))), random_bytes=random_bytes)
    attacker = Attacker(world)

    def outer(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        mod = malicious if _partition(context) in world.poisoned else honest
        return mod(message, context, call_next)

    app = ClientApp(mods=[outer, attacker])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = _partition(context)
        model, number = _task(message)
        trained = world.trained(partition, number, model)
        metrics = MetricRecord({"num-examples": len(world.parts[partition])})
        return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)

    return app


def _malicious(attack: Attack, suite: SiteSuite) -> SiteSuite:
    """A malicious site's end of a suite."""
    if attack.on_protocol:
        return PROTOCOL_ATTACKS[attack.name].wrap(suite)
    return AttackerSuite(suite, nan=attack.name == "nan")


class Attacker:
    """A Flower mod that replaces what a poisoned site has learnt by what its attack sends."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._known: OrderedDict[int, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"world": self.world}

    def __setstate__(self, state: dict[str, World]) -> None:
        self.__init__(state["world"])  # type: ignore[misc]

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Let the app train, then poison the difference."""
        reply = call_next(message, context)
        partition, attack = _partition(context), self.world.attack
        if (
            partition not in self.world.poisoned
            or attack.name in ("none", "nan")
            or attack.on_data
            or attack.on_protocol
        ):
            return reply
        model, number = _task(message)
        view = AttackView(
            own=arrays.difference(reply.content.array_records["arrays"], model),
            honest=self._honest_updates(number, model) if attack.needs_honest else None,
            sites=len(self.world.parts),
            malicious=len(self.world.poisoned),
            rng=np.random.default_rng([self.world.seed, number, partition, 1]),
        )
        poisoned = arrays.apply_update(model, attack.poison_update(view).astype(np.float64))
        reply.content["arrays"] = poisoned
        return reply

    def _honest_updates(self, number: int, model: ArrayRecord) -> NDArray[np.float32]:
        """Updates of all honest sites in this round, shape (h, d); worked out once for all attackers."""
        with self._lock:
            if number not in self._known:
                world = self.world
                honest = [p for p in range(len(world.parts)) if p not in world.poisoned]
                self._known[number] = np.stack(
                    [arrays.difference(world.trained(p, number, model), model) for p in honest]
                )
                while len(self._known) > 1:
                    self._known.popitem(last=False)
            return self._known[number]


class AttackerSuite(WrappedSite[SiteSuite]):
    """A malicious site's end of a suite: it does not check what it seals.

    * What is longer than any suite carries is cut to just below that (the longest lie that gets through).
    * A site that attacks with NaN sends the bytes of a clear float32 vector full of NaN, whatever the suite.
    """

    def __init__(self, suite: SiteSuite, *, nan: bool) -> None:
        super().__init__(suite)
        self._nan = nan

    def forge(self, context: RoundContext, update: Vector, random_bytes: RandomBytes) -> tuple[bytes, Blocks]:
        """Seal the update, cut to length; or send bare NaN."""
        if self._nan:
            return b"", (np.full(context.dimension, np.nan, dtype="<f4").tobytes(),)
        longest, norm = 0.99 * MAX_NORM * context.unit, float(np.linalg.norm(update))
        return self.site.seal(context, update * (longest / norm) if norm > longest else update, random_bytes)


def _partition(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _task(message: Message) -> tuple[ArrayRecord, int]:
    content = message.content
    return content.array_records["arrays"], int(content.config_records["config"]["server-round"])  # type: ignore[arg-type]
