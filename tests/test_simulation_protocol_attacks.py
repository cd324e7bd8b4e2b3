"""The attacks on the sealed protocol, as a simulation uses them."""

from __future__ import annotations

import os

import numpy as np
import pytest
from sealed_federation import context_for, identity, names

from quorsum.crypto import PlainSite, SealedSite, field
from quorsum.crypto.ring import N
from quorsum.crypto.sealed_geometry import block_count, plan_of, scale_of
from quorsum.crypto.sealed_parameters import norm_gate
from quorsum.crypto.sketch import integer_sketch
from quorsum.errors import UsageError
from quorsum.selection import select
from quorsum.simulation.protocol_attacks import PROTOCOL_ATTACKS, equal_blocks, single_frequency, wrapped_block

SITE = SealedSite(identity(1), select, accept_small_models=True)


@pytest.mark.parametrize("name", PROTOCOL_ATTACKS)
def test_attacker_looks_like_the_site_it_is(name: str) -> None:
    attack = PROTOCOL_ATTACKS[name]
    attacker = attack.wrap(SITE)
    assert (attacker.name, attacker.key_id, attacker.public_key, attacker.keeps_upload) == (
        SITE.name, SITE.key_id, SITE.public_key, SITE.keeps_upload,
    )  # fmt: skip
    assert attack.description
    assert "\n" not in attack.description


def test_attack_on_the_protocol_needs_the_protocol() -> None:
    with pytest.raises(UsageError, match="needs the suite sealed, got 'plain"):
        PROTOCOL_ATTACKS["other-key"].wrap(PlainSite())


@pytest.mark.parametrize("make", [equal_blocks, single_frequency])
@pytest.mark.parametrize("dimension", [1000, N, 3 * N + 5])
def test_hidden_updates_have_the_norm_asked_for(make, dimension: int) -> None:  # type: ignore[no-untyped-def]
    update = make(dimension, 2.0, np.random.default_rng(1))
    assert update.shape == (dimension,)
    assert np.linalg.norm(update) == pytest.approx(2.0)


@pytest.mark.parametrize("sketches", [1, 4, 16])
def test_wrapped_block_passes_the_gate_under_every_seed(sketches: int) -> None:
    context = context_for(7, 20_000, sketches=sketches, keys=tuple(f"{k:0128x}" for k in range(1, 8)))
    block = wrapped_block(context, np.random.default_rng(2))
    integers = np.zeros((block_count(context), N), np.int64)
    integers[0] = block
    bound = norm_gate(context.unit, scale_of(context), sketches, block_count(context))
    for _ in range(3):
        flat = integer_sketch(plan_of(context, os.urandom(32)), [integers]).reshape(-1)
        seen = int(field.centred(np.array([field.dot(flat, flat)], np.uint64))[0])
        assert 0 < seen <= bound
    assert sum(int(x) ** 2 for x in block) * sketches > field.P
    assert names(7) == context.sites
