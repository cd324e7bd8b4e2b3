from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.crypto import field, ring
from quorsum.crypto.field import P
from quorsum.crypto.mask import draw_key, mask_blocks
from quorsum.crypto.ring import N
from quorsum.crypto.sketch import Sketcher, SketchPlan, integer_sketch, public_sketch, sketch, sketch_plan
from quorsum.crypto.xof import uniform_blocks
from quorsum.errors import UsageError

SEED = b"\x09" * 32


def slowly(plan, blocks):
    """The formula, one rotation after the other."""
    total = np.zeros((plan.sketches, N), dtype=np.uint64)
    for k in range(plan.sketches):
        for j in range(plan.blocks):
            turned = ring.rotate(blocks[j], int(plan.signs[k, j]), int(plan.rotations[k, j]))
            total[k] = field.add(total[k], turned)
    return total


def length(sketches):
    return sum(int(v) ** 2 for v in field.centred(sketches).reshape(-1).tolist()) / len(sketches)


def test_equal_blocks_cannot_hide():
    """Signs alone would show two opposite equal blocks as nothing in half of the sketches; rotations never do."""
    block = np.random.default_rng(1).integers(-100, 100, N)
    update = np.stack([block, -block])
    true = 2 * float(block @ block)
    shown = [length(integer_sketch(sketch_plan(bytes([i]) * 32, 2, 1), [update])) / true for i in range(40)]
    assert min(shown) > 0.8
    signs_only = SketchPlan(np.ones((1, 2), dtype=np.int8), np.zeros((1, 2), dtype=np.uint16))
    assert length(integer_sketch(signs_only, [update])) == 0


def test_a_sketch_estimates_inner_products():
    rng = np.random.default_rng(2)
    x = rng.integers(-300, 300, (64, N))
    y = x + rng.integers(-300, 300, (64, N))
    plan = sketch_plan(SEED, 64, 16)
    a, b = field.centred(integer_sketch(plan, [x])), field.centred(integer_sketch(plan, [y]))
    estimate = float((a.astype(np.float64) * b).sum()) / 16
    assert abs(estimate / float((x * y).sum()) - 1) < 0.02


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.binary(min_size=1, max_size=32))
def test_the_fast_way_is_the_formula(blocks, r, seed):
    plan = sketch_plan(seed, blocks, r)
    y = field.random_vector(os.urandom, (blocks, N))
    before = y.copy()
    cut = [y[start : start + 7] for start in range(0, blocks, 7)]
    assert np.array_equal(sketch(plan, cut), slowly(plan, y))
    assert np.array_equal(sketch(plan, iter(y[:, None])), sketch(plan, [y]))
    assert np.array_equal(y, before)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rho", [0, 1, N - 1])
@pytest.mark.parametrize("blocks", [6, 7, 8, 9, 15, 100])
def test_many_largest_values_do_not_overflow(sign, rho, blocks):
    plan = SketchPlan(np.full((2, blocks), sign, dtype=np.int8), np.full((2, blocks), rho, dtype=np.uint16))
    y = np.full((blocks, N), P - 1, dtype=np.uint64)
    assert np.array_equal(sketch(plan, [y]), slowly(plan, y))
    y[:] = 1
    assert np.array_equal(sketch(plan, [y]), slowly(plan, y))


def test_the_sketch_of_a_ciphertext_is_a_ciphertext_of_the_sketch():
    """Y - A s is the sketch of x + e, with the A that everybody can compute."""
    blocks, key = 37, draw_key(os.urandom)
    x = np.random.default_rng(3).integers(-500, 500, blocks * N)
    plan = sketch_plan(SEED, blocks, 3)
    y = np.concatenate(list(mask_blocks(b"mask", key, x, os.urandom)))
    public = public_sketch(b"mask", plan)
    assert np.array_equal(public, sketch(plan, [uniform_blocks(b"mask", 0, blocks)]))
    clear = field.sub(sketch(plan, [y]), ring.multiply_short(public, key))
    difference = field.centred(field.sub(clear, integer_sketch(plan, [x.reshape(blocks, N)])))
    # 37 errors of variance 41 each
    assert abs(difference.std() / (37 * 41) ** 0.5 - 1) < 0.05


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 20), st.integers(1, 3))
def test_sketching_is_linear(blocks, r):
    plan = sketch_plan(SEED, blocks, r)
    a, b = field.random_vector(os.urandom, (2, blocks, N))
    assert np.array_equal(sketch(plan, [field.add(a, b)]), field.add(sketch(plan, [a]), sketch(plan, [b])))


def test_integers_of_both_signs_and_of_field_elements_agree():
    plan = sketch_plan(SEED, 5, 2)
    x = np.random.default_rng(4).integers(-(2**59), 2**59, (5, N))
    assert np.array_equal(integer_sketch(plan, [x[:2], x[2:]]), sketch(plan, [field.from_signed(x)]))


def test_plans_depend_on_the_seed_and_only_on_it():
    one, same, other = sketch_plan(SEED, 50, 4), sketch_plan(SEED, 50, 4), sketch_plan(b"x", 50, 4)
    assert np.array_equal(one.signs, same.signs)
    assert np.array_equal(one.rotations, same.rotations)
    assert not np.array_equal(one.signs, other.signs)
    assert not np.array_equal(one.rotations, other.rotations)
    assert (one.signs.dtype, one.rotations.dtype) == (np.int8, np.uint16)
    assert (one.sketches, one.blocks) == (4, 50)
    assert one.rotations.max() < N


def test_the_seven_delayed_blocks_reach_the_result_that_is_asked_for_in_between():
    plan, y = sketch_plan(SEED, 3, 1), field.random_vector(os.urandom, (3, N))
    total = Sketcher(plan)
    for block in y:
        with pytest.raises(UsageError, match="the plan has 3 blocks, got"):
            total.result()
        total.add(block[None])
    assert np.array_equal(total.result(), total.result())
    assert np.array_equal(total.result(), slowly(plan, y))


@pytest.mark.parametrize(("blocks", "r"), [(0, 1), (1, 0), (-1, 1)])
def test_empty_plans_are_refused(blocks, r):
    with pytest.raises(UsageError, match="at least one block and one sketch"):
        sketch_plan(SEED, blocks, r)


def test_too_few_too_many_and_misshapen_blocks_are_refused():
    plan, block = sketch_plan(SEED, 2, 1), np.zeros((1, N), dtype=np.uint64)
    with pytest.raises(UsageError, match="the plan has 2 blocks, got 1"):
        sketch(plan, [block])
    with pytest.raises(UsageError, match="the plan has 2 blocks, got more"):
        sketch(plan, [block] * 3)
    with pytest.raises(UsageError, match="a batch has shape"):
        sketch(plan, [block[0]])
