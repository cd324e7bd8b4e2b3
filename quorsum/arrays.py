"""Between a model as Flower carries it (named arrays) and an update as quorsum seals it (one flat vector).

A model is flattened in the order of its array names as they arrive: first array, C order, then the next.
Integer arrays (batch counters of normalisation layers, for instance) take part as numbers and are rounded
when the mean is applied.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from quorsum.errors import Refusal

__all__ = ["apply_update", "difference", "dimension", "fingerprint", "flatten"]


def _numeric(name: str, array: Array) -> NDArray[np.generic]:
    try:
        values = array.numpy()
    except (TypeError, ValueError, EOFError, OSError) as error:
        raise Refusal("undecodable", f"array {name!r} cannot be decoded as a NumPy array ({error})") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
        raise Refusal("wrong-type", f"array {name!r} does not hold numbers that have a mean")
    # The declared shape is only a claim; memory is never sized by it.
    if values.shape != tuple(array.shape):
        raise Refusal("wrong-shape", f"array {name!r} has shape {values.shape} and declares {tuple(array.shape)}")
    return values


def dimension(arrays: ArrayRecord) -> int:
    """Number of parameters d of a model.

    Raises:
        Refusal: an array cannot be decoded, or declares another shape than it has.
    """
    return sum(_numeric(name, array).size for name, array in arrays.items())


def fingerprint(arrays: ArrayRecord) -> str:
    """SHA-256 of a model, over the names, types, shapes and bytes of its arrays, in hexadecimal digits."""
    digest = hashlib.sha256(b"quorsum/model/v1\x00")
    for name, array in arrays.items():
        head = json.dumps([name, array.dtype, list(array.shape), array.stype, len(array.data)]).encode()
        digest.update(len(head).to_bytes(4, "little"))
        digest.update(head)
        digest.update(array.data)
    return digest.hexdigest()


def flatten(arrays: ArrayRecord) -> NDArray[np.float32]:
    """The model as one float32 vector, shape (d,).

    Raises:
        Refusal: an array is not numeric or cannot be decoded.
    """
    parts = [_numeric(name, array).reshape(-1).astype(np.float32) for name, array in arrays.items()]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def difference(new: ArrayRecord, old: ArrayRecord) -> NDArray[np.float32]:
    """``new - old`` as one float32 vector, shape (d,), in the order of ``old``.

    Raises:
        Refusal: the two models do not have the same names, shapes and numeric arrays.
    """
    if list(new.keys()) != list(old.keys()):
        raise Refusal("wrong-shape", f"the model has arrays {list(new.keys())}, expected {list(old.keys())}")
    parts = []
    for name, array in old.items():
        before, after = _numeric(name, array), _numeric(name, new[name])
        if before.shape != after.shape:
            raise Refusal("wrong-shape", f"array {name!r} has shape {after.shape}, expected {before.shape}")
        # Subtract in float64: late in training the two are nearly equal.
        # NumPy does so in a buffer, so that the whole difference exists in float32 only.
        step = np.empty(before.shape, np.float32)
        np.subtract(after, before, out=step, dtype=np.float64, casting="same_kind")
        parts.append(step.reshape(-1))
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def apply_update(arrays: ArrayRecord, update: NDArray[np.floating]) -> ArrayRecord:
    """The model moved by ``update``, shape (d,); every array keeps its name, shape and type."""
    moved: dict[str, Array] = {}
    start = 0
    for name, array in arrays.items():
        before = _numeric(name, array)
        step = update[start : start + before.size].reshape(before.shape)
        after = before.astype(np.float64) + step
        if before.dtype.kind in "iu":
            after = np.rint(after)
        # asarray, because NumPy turns the sum of arrays without axes into a scalar.
        moved[name] = Array(np.asarray(after, dtype=before.dtype))
        start += before.size
    return ArrayRecord(moved)
