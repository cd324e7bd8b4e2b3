"""The simulated sites: an ordinary Flower ClientApp for training, attackers around it, and the sealing mod outside.

Order of the layers, as a message enters: sealing mod -> attacker (poisoned sites only) -> the ClientApp. An attacker
so works like a real one: it decides what its site *submits*, and the protocol takes it from there.

Attackers that know the honest updates get them by training the honest sites' models themselves. Training is a pure
function of (seed, round, site, model), so what they compute is exactly what the honest sites submit in that round.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from numpy.typing import NDArray

from quorsum import arrays, messages
from quorsum.aggregation.gram import gram_matrix
from quorsum.client import seal
from quorsum.crypto.ckks_parameters import MAX_NORM
from quorsum.crypto.suite import Blocks, RandomBytes, RoundContext, SiteSuite, Vector
from quorsum.simulation.attacks import Attack, AttackView
from quorsum.simulation.defence import Defence, clipped
from quorsum.simulation.learning import Learner
from quorsum.simulation.protocol_attacks import PROTOCOL_ATTACKS, WrappedSite
from quorsum.simulation.world import World

__all__ = ["client_app"]

# Rounds whose opened Gram matrix an attacker remembers.
MEMORY = 8


def client_app(
    world: World, make_suite: Callable[[int], SiteSuite], random_bytes: RandomBytes, defence: Defence
) -> ClientApp:
    """The ClientApp that every node of a simulated federation runs; who is who follows from the partition.

    Args:
        world: the federation.
        make_suite: each partition's end of the cipher suite.
        random_bytes: the sites' source of randomness.
        defence: what attackers that know the rule try their updates out on.
    """
    learner = Learner(world)
    honest = seal(lambda node: make_suite(_partition(node)), random_bytes=random_bytes)
    malicious = seal(lambda node: _malicious(world.attack, make_suite(_partition(node))), random_bytes=random_bytes)
    attacker = Attacker(learner, defence)

    def outer(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if _partition(context) not in world.poisoned:
            return honest(message, context, call_next)
        attacker.overhear(message)
        return malicious(message, context, call_next)

    app = ClientApp(mods=[outer, attacker])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = _partition(context)
        model, number = _task(message)
        trained = arrays.apply_update(model, learner.update(partition, number, model))
        metrics = MetricRecord({"num-examples": len(world.parts[partition])})
        return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)

    return app


def _malicious(attack: Attack, suite: SiteSuite) -> SiteSuite:
    """A malicious site's end of a suite."""
    if attack.on_protocol:
        return PROTOCOL_ATTACKS[attack.name].wrap(suite)
    return AttackerSuite(suite, nan=attack.name == "nan")


@dataclass
class _Round:
    """What attackers know of a round; ``sent`` grows as they send.

    Attributes:
        number: the round.
        model: the model that it began with.
        honest: the honest updates, shape (h, d); empty where the attack has no use for them.
        last: how the model moved since the round before, or None in the first one.
        sent: what each malicious site submits.
        agreed: what all of them send, if that is the same; it may take a search, so it is worked out once.
    """

    number: int
    model: ArrayRecord
    honest: NDArray[np.float32]
    last: NDArray[np.float32] | None
    sent: dict[int, NDArray[np.floating]] = field(default_factory=dict)
    agreed: NDArray[np.floating] | None = None


class Attacker:
    """A Flower mod that replaces what a poisoned site has learnt by what its attack sends."""

    def __init__(self, learner: Learner, defence: Defence) -> None:
        self.learner = learner
        self.defence = defence
        self._round: _Round | None = None
        self._past: tuple[NDArray[np.float64], ...] = ()
        self._units: dict[int, float] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"learner": self.learner, "defence": self.defence}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["learner"], state["defence"])  # type: ignore[misc]

    def overhear(self, message: Message) -> None:
        """Take from the instruction to train the norm that sites clip to."""
        if message.has_content() and messages.has_header(message.content):
            header, _ = messages.unpack(message.content)
            if isinstance(header, messages.Train) and header.context.clip:
                self._units[header.context.round] = header.context.unit

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Let the app train, then poison the difference."""
        reply = call_next(message, context)
        partition, world = _partition(context), self.learner.world
        attack = world.attack
        if partition not in world.poisoned or not attack.on_update or attack.name == "nan" or attack.on_protocol:
            return reply
        model, number = _task(message)
        now = self._knowledge(number, model)
        unit = self._units.get(number, math.inf)
        view = AttackView(
            own=arrays.difference(reply.content.array_records["arrays"], model),
            honest=now.honest if attack.needs_honest else None,
            sites=len(world.parts),
            malicious=len(world.poisoned),
            rng=np.random.default_rng([world.seed, number, partition, 1]),
            round=number,
            position=world.position(partition),
            unit=unit,
            defence=replace(self.defence, unit=unit),
            last=now.last,
            past=self._past,
        )
        sent = self._agreed(now, view) if attack.same_for_all else attack.poison_update(view)
        now.sent[partition] = sent
        reply.content["arrays"] = arrays.apply_update(model, sent.astype(np.float64))
        return reply

    def _knowledge(self, number: int, model: ArrayRecord) -> _Round:
        """What is known of a round; worked out once for all attackers."""
        with self._lock:
            before = self._round
            if before is None or before.number != number:
                world = self.learner.world
                honest = [self.learner.update(p, number, model) for p in world.honest if world.attack.needs_honest]
                last = None if before is None else arrays.difference(model, before.model)
                self._remember(before)
                self._round = _Round(number, model, np.stack(honest) if honest else np.empty((0, 0), np.float32), last)
            assert self._round is not None  # noqa: S101 - for the type checker
            return self._round

    def _agreed(self, now: _Round, view: AttackView) -> NDArray[np.floating]:
        with self._lock:
            if now.agreed is None:
                now.agreed = self.learner.world.attack.poison_update(view)
            return now.agreed

    def _remember(self, before: _Round | None) -> None:
        """Keep the Gram matrix that was opened in the last round, which every site of ``sealed`` sees."""
        if before is None or not before.honest.size or len(before.sent) < len(self.learner.world.poisoned):
            return
        rows = np.concatenate([before.honest, [before.sent[p] for p in sorted(before.sent)]])
        gram = np.asarray(gram_matrix(clipped(rows, self._units.get(before.number, math.inf))))
        self._past = (*self._past, gram)[-MEMORY:]


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
