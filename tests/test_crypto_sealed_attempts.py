"""Several attempts at one sealed round: the same integers under new masks, and nothing signed is ever taken back."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from sealed_federation import Federation, context_for, names, updates_for

from quorsum.crypto import field
from quorsum.crypto.mask import MASK_BATCH, centred_binomial, draw_key, unmask
from quorsum.crypto.quantise import quantise
from quorsum.crypto.randomness import stretched
from quorsum.crypto.ring import batches
from quorsum.crypto.sealed_coordinator import SealedCoordinator, SealedUpload
from quorsum.crypto.sealed_geometry import plan_of, scale_of
from quorsum.crypto.sealed_parameters import SEALED_V1, SealedBounds, smallest_roster
from quorsum.crypto.sealed_site import SiteState, _integers
from quorsum.crypto.sketch import integer_sketch
from quorsum.crypto.suite import Blocks, RandomBytes, RoundContext, Site
from quorsum.errors import CoordinatorFault, KeyMaterialError, RoundFailed
from quorsum.selection import select

# Two chunks of flattening signs would take 2^20 parameters; blocks that are not full are enough here.
D = 9000
SITE = "site-02"


def begin(n: int = 5, **changes: object) -> tuple[Federation, dict[Site, SealedUpload], dict[Site, Blocks]]:
    """The first attempt as far as the submissions, and what each site keeps."""
    federation = Federation(context_for(n, D, **changes), updates_for(n, D))
    kept: dict[Site, Blocks] = {}
    uploads = {}
    for site, update in federation.updates.items():

        def keep(blocks: Blocks, site: Site = site) -> None:
            kept[site] = blocks

        end = federation.sites[site]
        federation.states[site], federation.sent[site] = end.seal(federation.context, update, os.urandom, keep)
        uploads[site] = federation.round.accept(federation.context, site, federation.sent[site])
    return federation, uploads, kept


def context_of(before: Federation, sites: tuple[Site, ...], attempt: int = 2) -> Federation:
    """A later attempt with these sites: their keys, another nonce."""
    wanted = replace(before.context, attempt=attempt, sites=sites, keys=(), commitment="")
    after = Federation(wanted, {site: before.updates[site] for site in sites})
    after.sites = {site: before.sites[site] for site in sites}
    introduced = {site: (end.key_id, end.public_key) for site, end in after.sites.items()}
    coordinator, _ = SealedCoordinator(select).adopt(introduced)
    after.context, after.round = coordinator.prepare(wanted, os.urandom)
    return after


def again(
    before: Federation, kept: dict[Site, Blocks], sites: tuple[Site, ...], attempt: int = 2
) -> tuple[Federation, dict[Site, SealedUpload]]:
    """A later attempt as far as the submissions."""
    after = context_of(before, sites, attempt)
    uploads = {}
    for site in sites:
        after.states[site], after.sent[site] = after.sites[site].reseal(
            after.context, before.states[site], kept[site], os.urandom
        )
        uploads[site] = after.round.accept(after.context, site, after.sent[site])
    return after, uploads


def source(seed: int) -> RandomBytes:
    """The same bytes whenever it is made with this seed."""
    return np.random.default_rng(seed).bytes


def opened(context: RoundContext, blocks: Blocks, seed: int, spent: int) -> NDArray[np.int64]:
    """The integers under a mask, by its key and errors; ``spent`` bytes of the stretch went into rounding."""
    random_bytes = source(seed)
    key, many = draw_key(random_bytes), stretched(random_bytes)
    many(spent)
    size = SEALED_V1.degree
    masked = np.concatenate([np.frombuffer(block, "<u8") for block in blocks[2:]]).reshape(-1, size)
    noisy = np.concatenate([*unmask(context.digest(), masked, field.from_signed(key.astype(np.int64)))]).reshape(-1)
    zeros = np.zeros(context.dimension, np.int32)
    errors = [centred_binomial(SEALED_V1.eta_error, x.size, many).astype(np.int64) for x in batches(zeros, MASK_BATCH)]
    exact: NDArray[np.int64] = (noisy - np.concatenate(errors))[: context.dimension]
    return exact


def test_what_is_sealed_again_are_the_same_integers_to_the_last_bit() -> None:
    federation, _, kept = begin()
    end, context = federation.sites[SITE], federation.context
    state, first = end.seal(context, federation.updates[SITE], source(1), lambda blocks: kept.update({SITE: blocks}))
    later = context_of(federation, names(5), attempt=3).context
    _, second = end.reseal(later, state, kept[SITE], source(2))

    random_bytes = source(1)
    draw_key(random_bytes)
    rounded = quantise(federation.updates[SITE], scale_of(context), context.digest(), stretched(random_bytes))
    np.testing.assert_array_equal(opened(context, first, 1, 4 * D), rounded)
    np.testing.assert_array_equal(opened(later, second, 2, 0), _integers(later, kept[SITE]))
    # The public signs are those of each attempt; under them there is one update.
    np.testing.assert_array_equal(_integers(context, kept[SITE]), rounded)
    magnitudes = np.abs(rounded)
    np.testing.assert_array_equal(np.abs(_integers(later, kept[SITE])), magnitudes)
    assert 0.4 < np.mean(_integers(later, kept[SITE]) == rounded) < 0.6


def test_nothing_but_the_integers_is_used_twice() -> None:
    """With one key or one error in two attempts, their difference would show something."""
    federation, _, kept = begin()
    state, first = federation.states[SITE], federation.sent[SITE]
    later = context_of(federation, names(5)).context
    sealed = [federation.sites[SITE].reseal(later, state, kept[SITE], os.urandom) for _ in range(2)]
    uploads = [first, *(blocks for _, blocks in sealed)]
    deals = [SiteState.from_bytes(one).own for one in (state, *(s for s, _ in sealed))]
    for a in range(3):
        for b in range(a):
            difference = field.centred(
                field.sub(*(np.frombuffer(b"".join(uploads[k][2:]), "<u8").astype(np.uint64) for k in (a, b)))
            )
            # Uniform modulo p: the mean magnitude is p / 4; without a mask it would be about a thousand.
            assert np.abs(difference.astype(np.float64)).mean() > field.P / 5
            assert deals[a] != deals[b]
            assert uploads[a][1] != uploads[b][1]


def test_two_attempts_with_different_seeds_show_one_gram_matrix() -> None:
    """A coordinator that runs two attempts measures the same integers twice: each time exactly, up to mask errors."""
    federation, uploads, kept = begin()
    federation.measure(uploads)
    after, resealed = again(federation, kept, names(5))
    after.measure(resealed)
    grams = []
    for played in (federation, after):
        fixed = played.round._fixed
        assert fixed is not None
        plan, size = plan_of(played.context, fixed.seed), SEALED_V1.degree
        clear = []
        for site in names(5):
            padded = np.zeros((plan.signs.shape[1], size), np.int64)
            padded.reshape(-1)[:D] = _integers(played.context, kept[site])
            clear.append(field.centred(integer_sketch(plan, [padded]).reshape(-1)).astype(np.float64))
        expected = np.array(clear) @ np.array(clear).T
        measured = np.array(fixed.found.exact, dtype=np.float64)
        np.testing.assert_allclose(measured, expected, rtol=0, atol=2e-3 * expected.max())
        grams.append(measured)
    # Between the two only the sketches differ.
    np.testing.assert_allclose(grams[0], grams[1], rtol=0, atol=0.1 * grams[0].max())
    first, second = federation.round._fixed, after.round._fixed
    assert first is not None
    assert second is not None
    assert first.seed != second.seed


def test_fewer_sites_finish_what_failed_and_open_the_mean_of_the_first_updates() -> None:
    federation, uploads, kept = begin(n=9)
    federation.tamper = lambda site, phase, blocks: None if phase == "check" and site > "site-05" else blocks
    with pytest.raises(RoundFailed, match="5 sites signed the view, and 6 are needed"):
        federation.measure(uploads)
    after, resealed = again(federation, kept, names(5))
    second = after.measure(resealed)
    assert second.tolerate is not None
    chosen = select(after.context, second.sites, second.gram, second.tolerate)
    assert len(chosen) == 4
    total = after.combine(resealed, chosen).total
    clear = np.mean([federation.updates[site] for site in chosen], axis=0)
    assert np.linalg.norm(total - clear) < 0.02 * np.linalg.norm(clear)


def test_who_signed_a_ticket_seals_nothing_any_more() -> None:
    federation, uploads, kept = begin(n=9)
    signers = names(3)
    federation.turn = lambda site, phase, blocks: () if phase == "ticket" and site not in signers else blocks
    measured = federation.measure(uploads)
    with pytest.raises(RoundFailed, match="3 sites signed a ticket"):
        federation.combine(uploads, select(federation.context, measured.sites, measured.gram, 1))
    after = context_of(federation, names(9))
    for site in names(9):
        if site in signers:
            with pytest.raises(CoordinatorFault) as fault:
                after.sites[site].reseal(after.context, federation.states[site], kept[site], os.urandom)
            assert fault.value.code == "ticket-signed"
        else:
            assert after.sites[site].reseal(after.context, federation.states[site], kept[site], os.urandom)[0]


@pytest.mark.parametrize("phase", ["root", "check", "gram"])
def test_questions_of_one_attempt_are_no_questions_of_another(phase: str) -> None:
    """What sites of the first attempt have signed is worth nothing in the second."""
    federation, uploads, kept = begin()
    federation.measure(uploads)
    after, resealed = again(federation, kept, names(5))
    after.measure(resealed)
    question = dict(next(blocks for asked, blocks in federation.asked if asked == phase))[SITE]
    fresh = context_of(federation, names(5), attempt=3)
    state, sent = fresh.sites[SITE].reseal(fresh.context, after.states[SITE], kept[SITE], os.urandom)
    for states, context, upload in [
        (after.states[SITE], after.context, after.sent[SITE]),
        (state, fresh.context, sent),
    ]:
        with pytest.raises(CoordinatorFault) as fault:
            after.sites[SITE].answer(context, states, phase, question, os.urandom, upload)
        assert fault.value.code in {"asked-twice", "wrong-root", "out-of-order"}
    with pytest.raises(CoordinatorFault) as fault:
        after.sites[SITE].answer(federation.context, after.states[SITE], phase, question, os.urandom, ())
    assert fault.value.code == "wrong-round"


DAMAGE: dict[str, Callable[[Blocks], Blocks]] = {
    "nothing": lambda kept: (),
    "no integers": lambda kept: kept[:1],
    "cut": lambda kept: (kept[0], kept[1][:-4]),
    "one integer": lambda kept: (kept[0], kept[1][:4]),
    "longer": lambda kept: (*kept, kept[1]),
    "of another round": lambda kept: (bytes(32), *kept[1:]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_was_not_kept_is_not_sealed(damage: str) -> None:
    federation, _, kept = begin()
    later = context_of(federation, names(5)).context
    with pytest.raises(KeyMaterialError) as error:
        federation.sites[SITE].reseal(later, federation.states[SITE], DAMAGE[damage](kept[SITE]), os.urandom)
    assert error.value.code == "ledger-damaged"


@pytest.mark.parametrize(
    "change",
    [{"run": "other"}, {"round": 2}, {"unit": 2.0}, {"rule": "mean"}, {"model": "ab" * 32}, {"sketches": 5}],
    ids=lambda change: next(iter(change)),
)
def test_integers_are_sealed_only_for_the_round_they_were_rounded_for(change: dict[str, object]) -> None:
    """The suite checks this once more, whatever the site's ledger has let through."""
    federation, _, kept = begin()
    later = replace(context_of(federation, names(5)).context, **change)  # type: ignore[arg-type]
    with pytest.raises(KeyMaterialError):
        federation.sites[SITE].reseal(later, federation.states[SITE], kept[SITE], os.urandom)


def test_round_with_a_reference_has_one_attempt() -> None:
    """Its set may be so small that none of those who sign for it is in it; see the specification, section 7."""
    federation, _, kept = begin(rule="fltrust", reference="site-01")
    later = context_of(federation, names(5)).context
    with pytest.raises(CoordinatorFault) as fault:
        federation.sites[SITE].reseal(later, federation.states[SITE], kept[SITE], os.urandom)
    assert fault.value.code == "one-attempt"


@pytest.mark.parametrize("tau", range(1, 12))
@pytest.mark.parametrize("f", range(12))
def test_two_sums_of_a_round_differ_by_three_honest_updates_at_least(tau: int, f: int) -> None:
    """Whoever signed for the first sum is in no later one, wherever a later one is possible at all."""
    least = smallest_roster(tau, f)
    for n in range(least, 150):
        honest_signers = SealedBounds.of(n, tau, f).quorum - tau
        if n - honest_signers >= least:
            assert honest_signers - 2 * f - tau // 2 >= 3


def test_a_site_that_sealed_nothing_seals_nothing_again() -> None:
    federation, _, kept = begin()
    later = context_of(federation, names(5)).context
    with pytest.raises(CoordinatorFault) as fault:
        federation.sites[SITE].reseal(later, b"", kept[SITE], os.urandom)
    assert fault.value.code == "unknown-round"


@pytest.mark.parametrize(
    ("without", "code"), [(("site-05",), "wrong-bound"), ((SITE, "site-05"), "wrong-roster")], ids=["few", "itself"]
)
def test_policy_holds_in_every_attempt(without: tuple[Site, ...], code: str) -> None:
    federation, _, kept = begin()
    sites = tuple(site for site in names(5) if site not in without)
    keys = tuple(federation.sites[site].public_key.hex() for site in sites)
    later = replace(federation.context, attempt=2, sites=sites, keys=keys)
    with pytest.raises(CoordinatorFault) as fault:
        federation.sites[SITE].reseal(later, federation.states[SITE], kept[SITE], os.urandom)
    assert fault.value.code == code


def test_nothing_is_kept_where_nobody_asks_for_it() -> None:
    federation, _, _ = begin()
    state, blocks = federation.sites[SITE].seal(federation.context, federation.updates[SITE], os.urandom)
    assert state
    assert len(blocks) == 3


def test_kept_integers_are_as_large_as_the_update_in_single_precision() -> None:
    _, _, kept = begin()
    assert sum(len(block) for block in kept[SITE]) == 4 * D + 32
