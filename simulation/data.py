"""Data to learn from: two sets that come with scikit-learn, and files that are read where they lie.

``load_dataset`` turns any of them into one :class:`Dataset`, already split into training and test rows. A file that
cannot be used is refused with a :class:`~quorsum.errors.DataError` that names the file, what is wrong with it and what
to change; nothing is repaired or dropped silently. Whatever is left out on purpose is listed in ``Dataset.notes``.

Sources: digits, Alpaydin & Kaynak (1998), UCI "Optical Recognition of Handwritten Digits" (test part);
breast-cancer, Wolberg, Mangasarian & Street (1995), UCI "Breast Cancer Wisconsin (Diagnostic)". The formats of files
are described in ``data_csv``, ``data_npz``, ``data_idx``, ``data_cifar`` and ``data_text``.
"""

from __future__ import annotations

import difflib
import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from quorsum.errors import DataError, UsageError
from quorsum.simulation.data_cifar import holds_cifar, load_cifar
from quorsum.simulation.data_csv import load_csv
from quorsum.simulation.data_idx import holds_idx, load_idx
from quorsum.simulation.data_npz import load_npz
from quorsum.simulation.data_text import load_text
from quorsum.simulation.dataset import Dataset, split_table, stratified

__all__ = ["BUILT_IN", "Dataset", "load_dataset"]

_ENDINGS = (".csv", ".npz", ".txt")
_USABLE = "a .csv, .npz or .txt file, or a folder of MNIST's or CIFAR-10's files"


def load_dataset(
    spec: str,
    *,
    label: str | None = None,
    key: str | None = None,
    seed: int = 0,
    test_fraction: float = 0.2,
) -> Dataset:
    """Load a data set by name or by path.

    Args:
        spec: a name in ``BUILT_IN``; or the path of a ``.csv`` table (header row, numeric columns; comma, semicolon or
            tab), of a ``.npz`` file of images (names of MedMNIST or of Keras), of a ``.txt`` file, or of a folder with
            MNIST's IDX files or CIFAR-10's binary batches.
        label: for a CSV, the column that holds the class.
        key: for a CSV, the column that says whose row it is; it is no input to learn from.
        seed: decides which rows are test rows. Images and text bring their own test rows and ignore it.
        test_fraction: share of every class kept for the test, strictly between 0 and 1; at least one row of every
            class stays on either side. Ignored for images and text.

    Returns:
        The data set. The same arguments and file always give the same rows in the same order.

    Raises:
        DataError: the name is unknown, or the file is missing, damaged, or not usable as it is.
        UsageError: ``seed`` is negative or ``test_fraction`` is out of range.
    """
    if seed < 0:
        raise UsageError(f"seed must be 0 or more, got {seed}")
    if not 0.0 < test_fraction < 1.0:
        raise UsageError(f"test_fraction must be strictly between 0 and 1, got {test_fraction}")
    rng = np.random.default_rng(seed)
    path = Path(spec)
    suffix = path.suffix.lower()
    for column, name in ((label, "label"), (key, "key")):
        if column is not None and suffix != ".csv":
            raise DataError(
                f"{name}-not-used", f"{spec}: a {name} column can be named for a .csv file only; leave it out"
            )
    if spec in _LOADERS:
        return _LOADERS[spec](rng, test_fraction)
    try:
        if path.is_dir():
            return _load_folder(path)
        if suffix not in _ENDINGS:
            raise _unknown(spec, path)
        if not path.is_file():
            raise DataError("not-found", f"{spec}: does not exist; give the path of {_USABLE}")
        if suffix == ".csv":
            return load_csv(path, label, key, rng, test_fraction)
        return load_npz(path) if suffix == ".npz" else load_text(path)
    except OSError as error:
        raise DataError("unreadable", f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def _load_folder(folder: Path) -> Dataset:
    if holds_idx(folder):
        return load_idx(folder)
    if holds_cifar(folder):
        return load_cifar(folder)
    raise DataError(
        "unknown-folder",
        f"{folder}: is a folder without MNIST's files (train-images-idx3-ubyte, ...) or CIFAR-10's "
        f"(data_batch_1.bin, ...); give the path of {_USABLE}",
    )


def _unknown(spec: str, path: Path) -> DataError:
    if path.is_file():
        ending = path.suffix or "a name without an ending"
        return DataError("unknown-format", f"{spec}: {ending} is not a known format; convert it to .csv, .npz or .txt")
    close = difflib.get_close_matches(spec.lower().replace("_", "-"), BUILT_IN, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]}?)" if close else ""
    known = ", ".join(BUILT_IN)
    return DataError("unknown-name", f"no data set is called {spec!r}{hint}; known: {known}, or the path of {_USABLE}")


def _bundled(name: str) -> Path:
    # The files are read in place: importing sklearn.datasets for them would cost about a second at every start.
    spec = importlib.util.find_spec("sklearn")
    folders = () if spec is None else tuple(spec.submodule_search_locations or ())
    for folder in folders:
        path = Path(folder) / "datasets" / "data" / name
        if path.is_file():
            return path
    raise DataError(
        "not-installed",
        f"{name}: comes with scikit-learn, which was not found; install it with: pip install 'quorsum[simulation]'",
    )


def _load_digits(rng: np.random.Generator, test_fraction: float) -> Dataset:
    with gzip.open(_bundled("digits.csv.gz"), "rt", encoding="ascii") as handle:
        table = np.loadtxt(handle, delimiter=",", dtype=np.float64)
    x = (table[:, :-1] / 16.0).astype(np.float32)  # grey levels are 0 .. 16
    y = table[:, -1].astype(np.int64)
    train, test = stratified(y, rng, test_fraction)
    return Dataset(
        name="digits",
        train_x=x[train],
        train_y=y[train],
        test_x=x[test],
        test_y=y[test],
        class_names=tuple(str(digit) for digit in range(10)),
        feature_names=tuple(f"pixel_{row}_{column}" for row in range(8) for column in range(8)),
    )


def _load_breast_cancer(rng: np.random.Generator, test_fraction: float) -> Dataset:
    with _bundled("breast_cancer.csv").open(encoding="ascii") as handle:
        class_names = handle.readline().strip().split(",")[2:]
        table = np.loadtxt(handle, delimiter=",", dtype=np.float64)
    measured = (
        "radius", "texture", "perimeter", "area", "smoothness",
        "compactness", "concavity", "concave points", "symmetry", "fractal dimension",
    )  # fmt: skip
    feature_names = (
        *(f"mean {name}" for name in measured),
        *(f"{name} error" for name in measured),
        *(f"worst {name}" for name in measured),
    )
    y = table[:, -1].astype(np.int64)
    return split_table("breast-cancer", table[:, :-1], y, class_names, feature_names, rng, test_fraction)


_LOADERS: dict[str, Callable[[np.random.Generator, float], Dataset]] = {
    "digits": _load_digits,
    "breast-cancer": _load_breast_cancer,
}

BUILT_IN: tuple[str, ...] = tuple(_LOADERS)
"""The data sets that need no file."""
