"""A small federation for the tests of the suite ckks: real keys, real answers, and places where to cheat."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from quorsum.crypto import (
    Ask,
    Blocks,
    CkksCoordinator,
    CkksSite,
    CkksUpload,
    Measured,
    Opened,
    RoundContext,
    generate_site_key,
    run_dialogue,
)

Tamper = Callable[[str, str, Blocks], Blocks | None]


@cache
def shared_site() -> CkksSite:
    """One key for all tests that do not need two: making one takes a while."""
    return CkksSite(generate_site_key(os.urandom))


def adopted(site: CkksSite) -> CkksCoordinator:
    """A coordinator with the key of this site."""
    coordinator, refused = CkksCoordinator().adopt({"s0": (site.key_id, site.public_key)})
    assert not refused
    return coordinator


@cache
def other_site() -> CkksSite:
    """A site with another key."""
    return CkksSite(generate_site_key(os.urandom))


def context_for(dimension: int, sites: int = 3, **changes) -> RoundContext:
    fields = {
        "run": "run",
        "round": 1,
        "attempt": 1,
        "sites": tuple(f"s{i}" for i in range(sites)),
        "dimension": dimension,
        "tolerate": (sites - 1) // 2,
        "unit": 1.0,
    }
    return RoundContext(**{**fields, **changes})


def updates_for(context: RoundContext, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    size = context.unit / context.dimension**0.5
    return {site: rng.normal(size=context.dimension) * size for site in context.sites}


@dataclass
class Federation:
    """All sites of a round, and everything that the coordinator received.

    ``tamper(site, phase, blocks)`` changes what a site sends (phase "upload", "gram" or "sum"); None is silence.
    """

    context: RoundContext
    updates: dict[str, np.ndarray]
    tamper: Tamper = lambda site, phase, blocks: blocks
    holders: dict[str, CkksSite] = field(default_factory=dict)
    coordinator: CkksCoordinator = field(default_factory=lambda: adopted(shared_site()))
    random_bytes: Callable[[int], bytes] = os.urandom
    received: list[bytes] = field(default_factory=list)
    asked: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    states: dict[str, bytes] = field(default_factory=dict)

    def holder(self, site: str) -> CkksSite:
        return self.holders.get(site, shared_site())

    def upload(self) -> dict[str, CkksUpload]:
        uploads = {}
        for site, update in self.updates.items():
            self.states[site], blocks = self.holder(site).seal(self.context, update, os.urandom)
            sent = self.tamper(site, "upload", blocks)
            if sent is not None:
                self.received += sent
                uploads[site] = self.coordinator.accept(self.context, site, sent)
        return uploads

    def exchange(self, ask: Ask) -> dict[str, Blocks]:
        self.asked.append((ask.phase, tuple(ask.questions)))
        answers = {}
        for site, question in ask.questions.items():
            self.states[site], blocks = self.holder(site).answer(
                self.context, self.states[site], ask.phase, question, os.urandom
            )
            sent = self.tamper(site, ask.phase, blocks)
            if sent is not None:
                self.received += sent
                answers[site] = sent
        return answers

    def measure(self, uploads: dict[str, CkksUpload]) -> Measured:
        return run_dialogue(self.coordinator.measure(self.context, uploads, self.random_bytes), self.exchange)

    def combine(self, uploads: dict[str, CkksUpload], weights: dict[str, float]) -> Opened:
        return run_dialogue(self.coordinator.combine(self.context, uploads, weights, self.random_bytes), self.exchange)

    def clear_gram(self) -> np.ndarray:
        rows = np.stack([self.updates[site] for site in sorted(self.updates)])
        return rows @ rows.T
