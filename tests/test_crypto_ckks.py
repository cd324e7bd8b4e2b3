from __future__ import annotations

import os

import numpy as np
import pytest
import tenseal as ts
from crypto_federation import Federation, context_for, shared_site, updates_for
from hypothesis import given, settings
from hypothesis import strategies as st
from tenseal import sealapi

from quorsum.crypto import CKKS_V1, CkksCoordinator, check_opened
from quorsum.crypto.ckks_coordinator import _working_context
from quorsum.crypto.ckks_mask import slots_of, zero_sum_mask
from quorsum.crypto.ckks_parameters import BATCH, GRAM_LABEL, MAX_NORM, gram_step, sum_step
from quorsum.crypto.ckks_probe import draw_probe
from quorsum.crypto.ckks_wire import load_ciphertext, new_context, read_blocks
from quorsum.crypto.randomness import draw, draw_signs
from quorsum.errors import UsageError

SITE = shared_site()


@settings(max_examples=20, deadline=None)
@given(
    dimension=st.integers(1, 20_000),
    sites=st.integers(2, 6),
    seed=st.integers(0, 2**32 - 1),
    unit=st.floats(1e-6, 1e6),
)
def test_gram_and_sum_equal_those_of_the_clear_updates(dimension, sites, seed, unit):
    context = context_for(dimension, sites, unit=unit)
    federation = Federation(context, updates_for(context, seed))
    rng = np.random.default_rng(seed)
    weights = {site: float(weight) for site, weight in zip(context.sites, rng.normal(size=sites), strict=True)}
    uploads = federation.upload()
    measured = federation.measure(uploads)
    opened = federation.combine(uploads, weights)

    assert not measured.faults
    assert not opened.faults
    assert measured.sites == context.sites
    clear = federation.clear_gram()
    norms = np.sqrt(np.diag(clear))
    # Noise is bounded by 3.47 deviations. Sketching adds a relative error of deviation sqrt(2 / (4096 r)) or less.
    sketching = 0.0 if dimension <= CKKS_V1.slots else 6 * (2 / (CKKS_V1.slots * context.sketches)) ** 0.5
    bound = (3.6 * gram_step(context)[1] * unit**2) + sketching * np.outer(norms, norms)
    assert (np.abs(measured.gram - clear) <= bound).all()
    assert np.array_equal(measured.gram, measured.gram.T)

    magnitude = sum(map(abs, weights.values()))
    total = sum(weight * federation.updates[site] for site, weight in weights.items())
    assert np.abs(opened.total - total).max() <= 3.6 * 2**-10 * unit / dimension**0.5 * magnitude
    vector = np.array([weights[site] for site in measured.sites])
    coordinator = federation.coordinator
    check_opened(
        opened.total,
        vector,
        measured.gram,
        coordinator.ratio_tolerance(context),
        coordinator.noise_floor(context, weights),
    )


@pytest.mark.parametrize("dimension", [1, 4095, 4096, 4097, BATCH * 4096 - 1, BATCH * 4096 + 1])
def test_dimensions_around_the_edges(dimension):
    context = context_for(dimension)
    federation = Federation(context, updates_for(context))
    uploads = federation.upload()
    assert len(uploads["s0"].blocks) == -(-dimension // (4096 * BATCH))
    opened = federation.combine(uploads, {"s1": 1.0})
    assert np.abs(opened.total - federation.updates["s1"]).max() <= 3.6 * 2**-10 / dimension**0.5


def test_padding_is_zero():
    # TenSEAL fills a short vector up with copies of itself, which would multiply the squared norm.
    context = context_for(1)
    federation = Federation(context, {site: np.array([1.0]) for site in context.sites})
    gram = federation.measure(federation.upload()).gram
    assert gram == pytest.approx(np.ones((3, 3)), abs=2**-9)


def test_float32_and_float64_updates():
    context = context_for(50)
    update = updates_for(context)["s0"]
    federation = Federation(context, {"s0": update.astype(np.float32), "s1": update, "s2": update})
    gram = federation.measure(federation.upload()).gram
    assert gram == pytest.approx(np.full((3, 3), update @ update), abs=2**-9)


def test_zero_updates():
    context = context_for(5000)
    federation = Federation(context, {site: np.zeros(5000) for site in context.sites})
    uploads = federation.upload()
    measured = federation.measure(uploads)
    assert np.abs(measured.gram).max() < 2**-10
    opened = federation.combine(uploads, dict.fromkeys(context.sites, 1 / 3))
    floor = federation.coordinator.noise_floor(context, dict.fromkeys(context.sites, 1 / 3))
    check_opened(opened.total, np.full(3, 1 / 3), measured.gram, floor=floor)


def test_the_longest_update_that_can_be_sealed_does_not_wrap():
    context = context_for(20_000)
    update = np.zeros(20_000)
    update[123] = MAX_NORM * 0.999
    federation = Federation(context, dict.fromkeys(context.sites, update))
    uploads = federation.upload()
    assert federation.measure(uploads).gram == pytest.approx(np.full((3, 3), update[123] ** 2), rel=1e-3)
    opened = federation.combine(uploads, dict.fromkeys(context.sites, 5.0))
    assert opened.total[123] == pytest.approx(15 * update[123], rel=1e-4)


def test_two_f_plus_one_sites_open_the_sum_and_take_turns():
    for number in (1, 2):
        context = context_for(10, 5, round=number, tolerate=1)
        federation = Federation(context, updates_for(context))
        uploads = federation.upload()
        federation.combine(uploads, {"s0": 1.0})
        assert federation.asked == [("sum", tuple(f"s{(number + i) % 5}" for i in range(3)))]


def test_all_sites_get_the_same_question_and_release_the_same_answer():
    context = context_for(100)
    federation = Federation(context, updates_for(context))
    federation.measure(federation.upload())
    answers = federation.received[-3:]
    assert answers[0] == answers[1] == answers[2]
    assert federation.asked == [("gram", context.sites)]


def test_released_values_carry_the_stated_noise():
    context = context_for(200_000)
    federation = Federation(context, updates_for(context))
    opened = federation.combine(federation.upload(), {"s0": 0.25, "s1": 0.75})
    error = opened.total - 0.25 * federation.updates["s0"] - 0.75 * federation.updates["s1"]
    assert error.std() == pytest.approx(2**-10 / 200_000**0.5, rel=0.02)
    assert sum_step(context)[1] == pytest.approx(2**-10 * (4096 / 200_000) ** 0.5)


def test_the_library_noise_is_far_below_the_flooding():
    """The ratios that docs/suites.md states: 2^18 for a Gram entry, 2^25 for a parameter of the sum, d = 10^6."""
    working = new_context()
    working.auto_rescale = working.auto_mod_switch = True
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 4096))
    cx, cy = (ts.ckks_vector(working, v.tolist()) for v in (x, y))
    errors = [np.array((cx * cy).decrypt()) * GRAM_LABEL - x * y for _ in range(4)]
    assert np.log2(gram_step(context_for(4096))[1] / max(abs(e.mean()) for e in errors)) > 15
    scaled = np.array((cx * (0.5 * 2.0**11)).decrypt()) / 2 - 0.5 * x
    assert np.log2(sum_step(context_for(1_000_000))[1] / scaled.std()) > 25


def test_the_mask_sums_to_zero_and_is_uniform_otherwise():
    slots = zero_sum_mask(os.urandom)
    assert abs(slots.real.sum()) < np.abs(slots).max() * 2**-30
    # Uniform modulo 2^60 at scale 2^50: 8191 coefficients of deviation 2^60 / sqrt(12); half of that on each axis.
    expected = 2.0**60 / 12**0.5 * (8191 / 2) ** 0.5 / 2.0**50
    assert slots.real.std() == pytest.approx(expected, rel=0.06)
    assert slots.imag.std() == pytest.approx(expected, rel=0.06)


def test_the_mask_leaves_one_coefficient_alone_and_covers_all_others():
    encoder, plaintext = sealapi.CKKSEncoder(new_context().seal_context().data), sealapi.Plaintext()
    # Coefficients back from the slots: those at the roots and their conjugates, transformed the other way.
    order = 2 * CKKS_V1.degree
    exponents = np.array([pow(3, j, order) for j in range(CKKS_V1.slots)])
    encoder.encode((zero_sum_mask(os.urandom) * 2.0**-10).tolist(), CKKS_V1.scale, plaintext)
    slots = np.array(encoder.decode_complex(plaintext)) * CKKS_V1.scale
    values = np.zeros(CKKS_V1.degree, dtype=complex)
    values[(exponents - 1) // 2] = slots
    values[(order - exponents - 1) // 2] = slots.conj()
    twist = np.exp(-1j * np.pi * np.arange(CKKS_V1.degree) / CKKS_V1.degree)
    coefficients = (np.fft.fft(values) / CKKS_V1.degree * twist).real
    assert abs(coefficients[0]) < 2
    others = np.abs(coefficients[1:]) / 2.0**49
    assert others.max() < 1.001
    assert others.mean() == pytest.approx(0.5, abs=0.03)
    for half in (others[0::2], others[1::2], others[:4095], others[4095:]):
        assert half.mean() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("power", [0, 1, 2, 777, 4095, 4096, 8191])
def test_slots_stand_at_the_roots_that_the_mask_expects(power):
    # At scale 1 coefficients are rounded to integers, so only a polynomial with integer ones, like X^t,
    # survives; slots in another order would be those of a polynomial with small fractions everywhere.
    coefficients = np.zeros(CKKS_V1.degree)
    coefficients[power] = 1.0
    slots = slots_of(coefficients)
    encoder, plaintext = sealapi.CKKSEncoder(new_context().seal_context().data), sealapi.Plaintext()
    encoder.encode(slots.tolist(), 1.0, plaintext)
    assert np.allclose(encoder.decode_complex(plaintext), slots, atol=1e-9)
    if power:
        shuffled = np.random.default_rng(0).permutation(slots)
        encoder.encode(shuffled.tolist(), 1.0, plaintext)
        assert not np.allclose(encoder.decode_complex(plaintext), shuffled, atol=0.1)


@pytest.mark.parametrize("dimension", [1, 4000, 4096, 4097, 8192, 20_000])
def test_the_probe_adds_nothing_to_the_norms_of_honest_updates(dimension):
    context = context_for(dimension)
    worker = _working_context(SITE.public_key)
    probe = draw_probe(worker, context, os.urandom)
    assert len(probe.sketches) == (1 if dimension <= 4096 else context.sketches)
    assert (probe.padding is None) == (dimension <= 4096 or dimension % 4096 == 0)
    _, blocks = SITE.seal(context, updates_for(context)["s0"], os.urandom)
    items = [load_ciphertext(worker, item, size=2, moduli=2) for item in read_blocks(blocks, -(-dimension // 4096))]
    *_, last = read_blocks(blocks, len(items))
    added = probe.apply(worker, [items[0] for _ in probe.sketches], last)
    opened = ts.ckks_vector_from(SITE.key.load(), added.serialize()).decrypt()
    assert abs(np.mean(opened)) * GRAM_LABEL < 2**-26


def test_gram_noise_is_that_of_the_released_entries():
    context = context_for(500, 6, unit=3.0)
    federation = Federation(context, updates_for(context))
    error = federation.measure(federation.upload()).gram - federation.clear_gram()
    noise = federation.coordinator.gram_noise(context)
    assert noise == 9 * 2**-12
    assert 0.3 * noise < error.std() < 2 * noise


def test_a_weight_that_rounds_to_nothing_is_left_out():
    context = context_for(10)
    federation = Federation(context, updates_for(context))
    opened = federation.combine(federation.upload(), {"s0": 1.0, "s1": 1e-30})
    assert opened.total == pytest.approx(federation.updates["s0"], abs=4 * 2**-10 / 10**0.5)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (np.ones(11), "shape"),
        (np.ones(10, dtype=np.float16), "float16"),
        (np.array([np.nan] + [0.0] * 9), "index 0"),
        (np.array([0.0] * 9 + [np.inf]), "index 9"),
        (np.full(10, 100.0), "316 units long and ckks can carry at most 64"),
        (np.full(10, 1e300), "units long"),
        (np.full(10, -3e38, dtype=np.float32), "units long"),
    ],
)
def test_updates_that_cannot_be_sealed(update, message):
    with pytest.raises(UsageError, match=message):
        SITE.seal(context_for(10), update, os.urandom)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"s0": float("inf")}, "finite"),
        ({"s0": 0.0}, "zero"),
        ({}, "zero"),
        ({"s7": 1.0}, "no upload of it"),
    ],
)
def test_weights_that_cannot_work(weights, message):
    context = context_for(10)
    federation = Federation(context, updates_for(context))
    uploads = federation.upload()
    with pytest.raises(UsageError, match=message):
        federation.combine(uploads, weights)


def test_nothing_to_measure():
    with pytest.raises(UsageError, match="no upload"):
        Federation(context_for(10), {}).measure({})


def test_sealing_twice_gives_different_bytes():
    context = context_for(10)
    update = updates_for(context)["s0"]
    assert SITE.seal(context, update, os.urandom)[1] != SITE.seal(context, update, os.urandom)[1]


def test_sources_of_randomness_are_checked():
    with pytest.raises(UsageError, match=r"random_bytes\(8\) gave 7 bytes"):
        draw(lambda count: bytes(count - 1), 8)
    signs = draw_signs(os.urandom, 7, 999)
    assert signs.shape == (7, 999)
    assert set(np.unique(signs)) == {-1, 1}
    assert abs(signs.mean()) < 5 / 6993**0.5


def test_both_ends_agree_on_the_name():
    assert SITE.name == CkksCoordinator().name == "ckks/v1"


@pytest.mark.parametrize(
    ("dimension", "sketches", "tolerance"), [(4096, 4, 1.01), (4097, 4, 1.08), (4097, 16, 1.04), (4097, 1, 1.16)]
)
def test_ratio_tolerance(dimension, sketches, tolerance):
    context = context_for(dimension, sketches=sketches)
    assert CkksCoordinator().ratio_tolerance(context) == pytest.approx(tolerance)
