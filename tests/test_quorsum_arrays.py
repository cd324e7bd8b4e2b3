"""Between named arrays and one flat vector."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quorsum import arrays
from quorsum.errors import Refusal

FLOATS = st.floats(-1e6, 1e6, width=32)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, max_side=4)
MODELS = st.lists(hnp.arrays(np.float32, SHAPES, elements=FLOATS), min_size=1, max_size=4)


def record(*values: np.ndarray) -> ArrayRecord:
    return ArrayRecord({f"layer.{k}": Array(np.asarray(v)) for k, v in enumerate(values)})


@given(MODELS, st.integers(0, 2**32 - 1))
def test_difference_then_apply_gives_the_new_model(layers: list[np.ndarray], seed: int) -> None:
    rng = np.random.default_rng(seed)
    old = record(*layers)
    new = record(*[(v + rng.normal(size=v.shape)).astype(np.float32) for v in layers])
    update = arrays.difference(new, old)
    assert update.dtype == np.float32
    assert update.shape == (arrays.dimension(old),)
    moved = arrays.apply_update(old, update.astype(np.float64))
    for name, array in new.items():
        np.testing.assert_allclose(moved[name].numpy(), array.numpy(), rtol=1e-6, atol=1e-6)
        assert moved[name].numpy().dtype == array.numpy().dtype
        assert moved[name].shape == array.shape


def test_flatten_follows_the_order_of_names() -> None:
    model = record(np.array([[1, 2], [3, 4]], dtype=np.float32), np.array([5], dtype=np.float32))
    np.testing.assert_array_equal(arrays.flatten(model), [1, 2, 3, 4, 5])


def test_integer_arrays_take_part_and_are_rounded() -> None:
    old = record(np.array(10, dtype=np.int64), np.array([1.0], dtype=np.float32))
    moved = arrays.apply_update(old, np.array([2.6, 0.25]))
    assert moved["layer.0"].numpy() == 13
    assert moved["layer.0"].numpy().dtype == np.int64
    assert moved["layer.1"].numpy() == np.float32(1.25)


def test_apply_does_not_change_the_old_model() -> None:
    old = record(np.ones(3, dtype=np.float32))
    arrays.apply_update(old, np.ones(3))
    np.testing.assert_array_equal(old["layer.0"].numpy(), np.ones(3))


@pytest.mark.parametrize(
    ("new", "code"),
    [
        (record(np.zeros(4, np.float32)), "wrong-shape"),
        (record(np.zeros(3, np.float32), np.zeros(1, np.float32)), "wrong-shape"),
        (ArrayRecord({"other": Array(np.zeros(3, np.float32))}), "wrong-shape"),
        (ArrayRecord({"layer.0": Array(np.array(["a", "b", "c"]))}), "wrong-type"),
        (ArrayRecord({"layer.0": Array("float32", (3,), "numpy.ndarray", b"rubbish")}), "undecodable"),
        (ArrayRecord({"layer.0": Array("float32", (3,), "other", b"rubbish")}), "undecodable"),
    ],
    ids=["shape", "one more", "name", "text", "rubbish", "foreign"],
)
def test_models_that_do_not_fit_are_refused(new: ArrayRecord, code: str) -> None:
    with pytest.raises(Refusal) as refusal:
        arrays.difference(new, record(np.zeros(3, np.float32)))
    assert refusal.value.code == code
