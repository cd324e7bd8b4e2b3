"""A federation of the suite ``sealed`` for tests: real keys, real answers, and places where anybody may cheat."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from quorsum.crypto.dialogue import run_dialogue
from quorsum.crypto.identity import Identity
from quorsum.crypto.sealed_coordinator import SealedCoordinator, SealedRound, SealedUpload
from quorsum.crypto.sealed_site import SealedSite
from quorsum.crypto.suite import Ask, Blocks, Measured, Opened, RoundContext, Site
from quorsum.errors import CoordinatorFault
from quorsum.selection import select

Tamper = Callable[[Site, str, Blocks], Blocks | None]
Turn = Callable[[Site, str, Blocks], Blocks]


@cache
def identity(number: int) -> Identity:
    """The same keys for the same number, because making keys takes time."""
    return Identity.generate(os.urandom)


def names(n: int) -> tuple[Site, ...]:
    return tuple(f"site-{k:02d}" for k in range(1, n + 1))


def context_for(n: int, dimension: int, **changes: object) -> RoundContext:
    fields: dict[str, object] = {
        "run": "run",
        "round": 1,
        "attempt": 1,
        "sites": names(n),
        "dimension": dimension,
        "tolerate": 1,
        "collude": 1,
        "unit": 1.0,
        "clip": True,
        "sketches": 4,
        "rule": "multi-krum",
    }
    return RoundContext(**{**fields, **changes})  # type: ignore[arg-type]


def updates_for(n: int, dimension: int, seed: int = 0) -> dict[Site, NDArray[np.float64]]:
    """Similar updates of norm a little under 1."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=dimension)
    made = {}
    for site in names(n):
        update = common + 0.5 * rng.normal(size=dimension)
        made[site] = 0.95 * update / np.linalg.norm(update)
    return made


@dataclass
class Federation:
    """All sites of a round. ``tamper`` changes what a site sends, ``turn`` what the coordinator asks."""

    context: RoundContext
    updates: Mapping[Site, NDArray[np.float64]]
    tamper: Tamper = lambda site, phase, blocks: blocks
    turn: Turn = lambda site, phase, blocks: blocks
    refusals: dict[tuple[Site, str], CoordinatorFault] = field(default_factory=dict)
    states: dict[Site, bytes] = field(default_factory=dict)
    sent: dict[Site, Blocks] = field(default_factory=dict)
    asked: list[tuple[str, dict[Site, Blocks]]] = field(default_factory=list)
    answered: list[tuple[str, dict[Site, Blocks]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        sites = self.context.sites
        self.sites = {
            site: SealedSite(identity(k), select, accept_small_models=True) for k, site in enumerate(sites, 1)
        }
        introduced = {site: (end.key_id, end.public_key) for site, end in self.sites.items()}
        coordinator, refused = SealedCoordinator(select).adopt(introduced)
        assert not refused
        self.context, self.round = coordinator.prepare(self.context, os.urandom)
        assert isinstance(self.round, SealedRound)

    def upload(self) -> dict[Site, SealedUpload]:
        uploads = {}
        for site, update in self.updates.items():
            self.states[site], blocks = self.sites[site].seal(self.context, update, os.urandom)
            self.sent[site] = blocks
            changed = self.tamper(site, "upload", blocks)
            if changed is not None:
                uploads[site] = self.round.accept(self.context, site, changed)
        return uploads

    def exchange(self, ask: Ask) -> dict[Site, Blocks]:
        answers = {}
        self.asked.append((ask.phase, dict(ask.questions)))
        for site, question in ask.questions.items():
            reply = self.put(site, ask.phase, self.turn(site, ask.phase, question))
            changed = None if reply is None else self.tamper(site, ask.phase, reply)
            if changed is not None:
                answers[site] = changed
        self.answered.append((ask.phase, answers))
        return answers

    def put(self, site: Site, phase: str, question: Blocks) -> Blocks | None:
        """One question to one site; a refusal is kept and answered by silence."""
        try:
            self.states[site], blocks = self.sites[site].answer(
                self.context, self.states[site], phase, question, os.urandom, self.sent[site]
            )
        except CoordinatorFault as fault:
            self.refusals[site, phase] = fault
            return None
        return blocks

    def measure(self, uploads: Mapping[Site, SealedUpload]) -> Measured:
        return run_dialogue(self.round.measure(self.context, uploads, os.urandom), self.exchange)

    def combine(self, uploads: Mapping[Site, SealedUpload], chosen: frozenset[Site]) -> Opened:
        weights = dict.fromkeys(chosen, 1 / len(chosen))
        return run_dialogue(self.round.combine(self.context, uploads, weights, os.urandom), self.exchange)

    def run(self) -> tuple[Measured, frozenset[Site], Opened]:
        uploads = self.upload()
        measured = self.measure(uploads)
        assert measured.tolerate is not None
        chosen = select(self.context, measured.sites, measured.gram, measured.tolerate)
        return measured, chosen, self.combine(uploads, chosen)
