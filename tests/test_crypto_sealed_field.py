from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.crypto import field
from quorsum.crypto.field import P
from quorsum.errors import Refusal, UsageError

# The values at which carries, wraps and reductions go wrong if they go wrong at all.
EDGES = [0, 1, 2, 7, 8, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**32, 2**60 - 1, 2**60, P // 2, P // 2 + 1, P - 2, P - 1]
elements = st.one_of(st.sampled_from(EDGES), st.integers(0, P - 1))
vectors = st.lists(elements, min_size=1, max_size=20)


def array(values):
    return np.array(values, dtype=np.uint64)


@pytest.mark.parametrize("value", [P, P + 1, 2**63, 2**64 - 1])
def test_bytes_of_a_value_outside_the_field_are_refused(value):
    with pytest.raises(Refusal, match="number 1 is") as caught:
        field.from_bytes(array([5, value]).astype("<u8").tobytes())
    assert caught.value.code == "out-of-range"


def test_bytes_that_are_no_whole_number_of_elements_are_refused():
    with pytest.raises(Refusal, match="got 9 bytes") as caught:
        field.from_bytes(b"\x00" * 9)
    assert caught.value.code == "wrong-shape"


@pytest.mark.parametrize("bad", [array([P]), np.array([1], dtype=np.int64), np.array([1.0])])
def test_only_field_elements_are_written(bad):
    with pytest.raises(UsageError, match="2\\^61 - 1"):
        field.to_bytes(bad)


def test_every_pair_of_edge_values():
    a, b = array(EDGES)[:, None], array(EDGES)[None, :]
    for operation, exact in [
        (field.add, lambda x, y: x + y),
        (field.sub, lambda x, y: x - y),
        (field.mul, lambda x, y: x * y),
    ]:
        assert operation(a, b).tolist() == [[exact(x, y) % P for y in EDGES] for x in EDGES]


@given(vectors, st.data())
def test_operations_agree_with_integers(x, data):
    y = data.draw(st.lists(elements, min_size=len(x), max_size=len(x)))
    a, b = array(x), array(y)
    pairs = list(zip(x, y, strict=True))
    assert field.add(a, b).tolist() == [(u + v) % P for u, v in pairs]
    assert field.sub(a, b).tolist() == [(u - v) % P for u, v in pairs]
    assert field.mul(a, b).tolist() == [u * v % P for u, v in pairs]
    assert field.neg(a).tolist() == [-u % P for u in x]
    assert field.dot(a, b) == sum(u * v for u, v in pairs) % P
    assert a.tolist() == x


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_reduce_takes_all_64_bits(x):
    assert field.reduce(array(x)).tolist() == [u % P for u in x]


@given(elements, st.integers(0, 200))
def test_powers_of_two(x, exponent):
    assert field.mul_power_of_two(array([x]), exponent).tolist() == [(x << exponent) % P]


@given(st.lists(st.one_of(st.sampled_from([-(2**63), 2**63 - 1, -P, P, -1, 0]), st.integers(-(2**63), 2**63 - 1))))
def test_signed_numbers_of_any_size(x):
    assert field.from_signed(np.array(x, dtype=np.int64)).tolist() == [u % P for u in x]


@given(vectors, st.data())
def test_adding_signed_numbers(x, data):
    signed = st.one_of(st.sampled_from([-P, 1 - P, -1, 0, 1, P - 1, P]), st.integers(-P, P))
    y = data.draw(st.lists(signed, min_size=len(x), max_size=len(x)))
    expected = [(u + v) % P for u, v in zip(x, y, strict=True)]
    assert field.add_signed(array(x), np.array(y, dtype=np.int64)).tolist() == expected


def test_adding_small_signed_types():
    small = np.array([-128, -1, 0, 127], dtype=np.int8)
    for value in (0, 1, P - 1):
        assert field.add_signed(array([value] * 4), small).tolist() == [(value + int(v)) % P for v in small]


def test_small_signed_types():
    assert field.from_signed(np.array([-128, 127], dtype=np.int8)).tolist() == [P - 128, 127]


@given(vectors)
def test_centred_is_the_representative_next_to_zero(x):
    signed = field.centred(array(x))
    assert all(-P // 2 < v <= P // 2 for v in signed.tolist())
    assert field.from_signed(signed).tolist() == x


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_sum_of_many_largest_values(axis):
    full = np.full((300, 40), P - 1, dtype=np.uint64)
    count = full.shape[axis]
    assert set(field.sum_mod(full, axis).tolist()) == {count * (P - 1) % P}


@given(st.lists(vectors.map(lambda v: (v * 3)[:3]), min_size=1, max_size=9))
def test_sum_agrees_with_integers(rows):
    assert field.sum_mod(array(rows), 0).tolist() == [sum(column) % P for column in zip(*rows, strict=True)]


# One inner product of 2^11 terms is the largest that fits in a step; look at it, at one more, and at many.
@pytest.mark.parametrize("depth", [1, 2047, 2048, 2049, 16384])
def test_matrix_product_of_the_largest_values(depth):
    a, b = np.full((2, depth), P - 1, dtype=np.uint64), np.full((depth, 3), P - 1, dtype=np.uint64)
    assert np.all(field.matmul(a, b) == depth % P)
    # All limbs full: 2^61 - 2^21 - 1 has limbs 2^21 - 1, 2^21 - 2, 2^19 - 1.
    value = 2**61 - 2**21 - 1
    a[:] = value
    assert np.all(field.matmul(a, b) == -value * depth % P)


@pytest.mark.parametrize("shape", [(10, 3, 50), (3, 0, 2), (1, 5000, 1), (0, 3, 2)])
def test_matrix_product_agrees_with_integers(shape):
    m, k, n = shape
    a, b = field.random_vector(os.urandom, (m, k)), field.random_vector(os.urandom, (k, n))
    exact = (a.astype(object) @ b.astype(object)) % P if k else np.zeros((m, n), dtype=object)
    assert field.matmul(a, b).tolist() == exact.tolist()


def test_shapes_that_do_not_fit_are_refused():
    one = array([1, 2])
    with pytest.raises(UsageError, match="cannot multiply"):
        field.matmul(one[None, :], one[None, :])
    with pytest.raises(UsageError, match="one length"):
        field.dot(one, array([1]))
    with pytest.raises(UsageError, match="one length"):
        field.dot(one[None, :], one[None, :])


@given(vectors)
def test_bytes_round_trip(x):
    data = field.to_bytes(array(x))
    assert data == b"".join(v.to_bytes(8, "little") for v in x)
    assert field.from_bytes(data).tolist() == x
    assert not field.from_bytes(data).flags.writeable


def test_random_vector_is_spread_and_has_the_shape_asked_for():
    drawn = field.random_vector(os.urandom, (100, 200))
    assert drawn.shape == (100, 200)
    assert int(drawn.max()) < P
    assert abs(drawn.astype(np.float64).mean() / P - 0.5) < 5 / (12 * drawn.size) ** 0.5
    assert field.random_vector(os.urandom, 7).shape == (7,)


def test_random_vector_draws_again_what_is_not_below_p():
    chunks = iter([b"\xff" * 8 + (5).to_bytes(8, "little"), b"\xff" * 8, (9).to_bytes(8, "little")])
    assert field.random_vector(lambda _: next(chunks), 2).tolist() == [9, 5]


def test_broken_sources_are_refused():
    with pytest.raises(UsageError, match="ones only"):
        field.random_vector(lambda count: b"\xff" * count, 3)
    with pytest.raises(UsageError, match="gave 0 bytes"):
        field.random_vector(lambda _: b"", 3)


@settings(max_examples=30)
@given(elements, elements, elements)
def test_distributive_law(a, b, c):
    x, y, z = array([a]), array([b]), array([c])
    assert field.mul(x, field.add(y, z)) == field.add(field.mul(x, y), field.mul(x, z))
