"""Data to learn from: two sets that come with scikit-learn, MedMNIST-format ``.npz`` files, and CSV tables.

``load_dataset`` turns any of them into one :class:`Dataset`: float32 inputs, int64 labels ``0 .. k-1``, already split
into training and test rows. A file that cannot be used is refused with a :class:`~quorsum.errors.DataError` that names
the file, what is wrong with it and what to change; nothing is repaired or dropped silently. Whatever is left out on
purpose is listed in ``Dataset.notes``.

Sources: digits, Alpaydin & Kaynak (1998), UCI "Optical Recognition of Handwritten Digits" (test part);
breast-cancer, Wolberg, Mangasarian & Street (1995), UCI "Breast Cancer Wisconsin (Diagnostic)"; the ``.npz`` format,
Yang et al. (2023), "MedMNIST v2", Scientific Data 10:41.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import importlib.util
import math
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quorsum.errors import DataError, UsageError

__all__ = ["BUILT_IN", "Dataset", "load_dataset"]

FloatArray: TypeAlias = NDArray[np.float32]
LabelArray: TypeAlias = NDArray[np.int64]

_MISSING = frozenset({"", "?", "na", "n/a", "nan", "null", "none"})
_NPZ_REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")
_NPZ_OPTIONAL = ("val_images", "val_labels")
_NAMES_SHOWN = 40


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification task, split into training and test rows.

    Attributes:
        name: what a title calls it: the built-in name, or the file name without its folder.
        train_x: float32, shape ``(n, *shape)``; images are channels first, in -1 .. 1; tables are standardised by the
            mean and standard deviation of the training rows.
        train_y: int64, shape ``(n,)``, values ``0 .. classes - 1``.
        test_x: float32, shape ``(t, *shape)``, on the scale of ``train_x``.
        test_y: int64, shape ``(t,)``.
        class_names: what each label was called in the source, in label order.
        feature_names: one name per input column; empty for images.
        notes: what was left out of the source on purpose, one sentence each.
    """

    name: str
    train_x: FloatArray
    train_y: LabelArray
    test_x: FloatArray
    test_y: LabelArray
    class_names: tuple[str, ...]
    feature_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """Number of classes, at least 2."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input: ``(columns,)`` or ``(channels, height, width)``."""
        return self.train_x.shape[1:]

    @property
    def positive_rate(self) -> float | None:
        """Share of class 1 among all rows, 0 .. 1, for two classes; ``None`` for more."""
        if self.classes != 2:
            return None
        return float(np.mean(np.concatenate([self.train_y, self.test_y])))


def load_dataset(spec: str, *, label: str | None = None, seed: int = 0, test_fraction: float = 0.2) -> Dataset:
    """Load a data set by name or by path.

    Args:
        spec: a name in ``BUILT_IN``, or the path of a ``.npz`` file (MedMNIST format) or a ``.csv`` file (header row,
            numeric columns; comma, semicolon or tab).
        label: for a CSV, the column that holds the class.
        seed: decides which rows are test rows. A ``.npz`` file brings its own test rows and ignores it.
        test_fraction: share of every class kept for the test, strictly between 0 and 1; at least one row of every
            class stays on either side. Ignored for ``.npz``.

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
    if label is not None and suffix != ".csv":
        raise DataError("label-not-used", f"{spec}: a label column can be named for a .csv file only; leave it out")
    if spec in _LOADERS:
        return _LOADERS[spec](rng, test_fraction)
    if suffix not in {".npz", ".csv"}:
        raise _unknown(spec, path)
    if not path.is_file():
        reason = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError("not-found", f"{spec}: {reason}; give the path of an existing .npz or .csv file")
    try:
        return _load_npz(path) if suffix == ".npz" else _load_csv(path, label, rng, test_fraction)
    except OSError as error:
        raise DataError("unreadable", f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def _unknown(spec: str, path: Path) -> DataError:
    if path.is_file():
        ending = path.suffix or "no ending"
        return DataError("unknown-format", f"{spec}: {ending} is not a known format; convert it to .csv or .npz")
    close = difflib.get_close_matches(spec.lower().replace("_", "-"), BUILT_IN, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]}?)" if close else ""
    known = ", ".join(BUILT_IN)
    return DataError(
        "unknown-name", f"no data set is called {spec!r}{hint}; known: {known}, or the path of a .npz or .csv file"
    )


# --- splitting and scaling -------------------------------------------------------------------------------------------


def _stratified(labels: LabelArray, rng: np.random.Generator, fraction: float) -> tuple[LabelArray, LabelArray]:
    """Row numbers for training and for the test; every class (of two rows or more) is on both sides."""
    train: list[LabelArray] = []
    test: list[LabelArray] = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held_out = min(max(round(fraction * rows.size), 1), rows.size - 1)
        test.append(rows[:held_out])
        train.append(rows[held_out:])
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))


def _standardised(x: NDArray[np.float64], train: LabelArray) -> FloatArray:
    """Columns at mean 0 and deviation 1 over the training rows; a column that is constant there becomes 0 there."""
    # Dividing by the largest magnitude first keeps the squares of amounts near 1e300 from overflowing.
    largest = np.max(np.abs(x), axis=0)
    scaled = x / np.where(largest > 0.0, largest, 1.0)
    deviation = np.std(scaled[train], axis=0)
    # Below 1e-12 of its magnitude a column varies by rounding error only, which must not be blown up to 1.
    steady = np.where(deviation > 1e-12, deviation, 1.0)
    standardised: NDArray[np.float64] = (scaled - np.mean(scaled[train], axis=0)) / steady
    return standardised.astype(np.float32)


def _split_table(
    name: str,
    x: NDArray[np.float64],
    y: LabelArray,
    class_names: Sequence[str],
    feature_names: Sequence[str],
    rng: np.random.Generator,
    test_fraction: float,
    notes: Sequence[str] = (),
) -> Dataset:
    train, test = _stratified(y, rng, test_fraction)
    scaled = _standardised(x, train)
    return Dataset(
        name=name,
        train_x=scaled[train],
        train_y=y[train],
        test_x=scaled[test],
        test_y=y[test],
        class_names=tuple(class_names),
        feature_names=tuple(feature_names),
        notes=tuple(notes),
    )


# --- built-in sets ---------------------------------------------------------------------------------------------------


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
    train, test = _stratified(y, rng, test_fraction)
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
    return _split_table("breast-cancer", table[:, :-1], y, class_names, feature_names, rng, test_fraction)


_LOADERS: dict[str, Callable[[np.random.Generator, float], Dataset]] = {
    "digits": _load_digits,
    "breast-cancer": _load_breast_cancer,
}

BUILT_IN: tuple[str, ...] = tuple(_LOADERS)
"""The data sets that need no file."""


# --- MedMNIST .npz ---------------------------------------------------------------------------------------------------


def _load_npz(path: Path) -> Dataset:
    arrays = _read_npz(path)
    parts = {}
    for part in ("train", "val", "test"):
        if f"{part}_images" in arrays:
            images = _images(path, f"{part}_images", arrays[f"{part}_images"])
            parts[part] = images, _labels(path, f"{part}_labels", arrays[f"{part}_labels"], len(images))
    train_x, train_y = parts["train"]
    for part, (images, _) in parts.items():
        if images.shape[1:] != train_x.shape[1:]:
            raise DataError(
                "wrong-shape",
                f"{path}: one image is {images.shape[1:]} in {part}_images but {train_x.shape[1:]} in train_images; "
                "all parts must hold images of one size",
            )
    if "val" in parts:
        # Nothing is selected on validation rows here, so they serve as training rows.
        train_x = np.concatenate([train_x, parts["val"][0]])
        train_y = np.concatenate([train_y, parts["val"][1]])
    test_x, test_y = parts["test"]
    values = np.unique(train_y)
    if values.size < 2:
        raise DataError("one-class", f"{path}: train_labels hold the single class {values[0]}; at least two are needed")
    unseen = np.setdiff1d(test_y, values)
    if unseen.size:
        raise DataError(
            "unseen-class",
            f"{path}: class {unseen[0]} occurs in test_labels only; it cannot be learnt, remove its rows",
        )
    return Dataset(
        name=path.name,
        train_x=train_x,
        train_y=np.searchsorted(values, train_y).astype(np.int64),
        test_x=test_x,
        test_y=np.searchsorted(values, test_y).astype(np.int64),
        class_names=tuple(str(value) for value in values),
    )


def _read_npz(path: Path) -> dict[str, NDArray[np.generic]]:
    damaged = f"{path}: is damaged or cut short, or is no .npz file; copy or download it again"
    if not zipfile.is_zipfile(path):
        raise DataError("unreadable", damaged)
    try:
        # Never unpickle: a pickle in a data file runs whatever code its author wrote.
        with np.load(path, allow_pickle=False) as archive:
            names = set(archive.files)
            wanted = [*_NPZ_REQUIRED, *(_NPZ_OPTIONAL if names.intersection(_NPZ_OPTIONAL) else ())]
            missing = [name for name in wanted if name not in names]
            if missing:
                raise DataError(
                    "missing-keys",
                    f"{path}: lacks {', '.join(missing)}; it holds {_listed(sorted(names)) or 'nothing'}. "
                    "A MedMNIST-format file is needed",
                )
            return {name: archive[name] for name in wanted}
    except ValueError as error:
        if "pickle" in str(error).lower() or "object array" in str(error).lower():
            raise DataError(
                "pickled",
                f"{path}: holds pickled objects, which can run code and are never loaded; "
                "save plain numeric arrays with numpy.savez",
            ) from error
        raise DataError("unreadable", damaged) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError("unreadable", damaged) from error


def _images(path: Path, key: str, images: NDArray[np.generic]) -> FloatArray:
    """Channels-first float32 images in -1 .. 1, shape ``(n, 1 or 3, height, width)``."""
    grey = images.ndim == 3
    if not grey and (images.ndim != 4 or images.shape[-1] not in (1, 3)):
        raise DataError(
            "wrong-shape",
            f"{path}: {key} has shape {images.shape}; expected (n, height, width) or (n, height, width, 3)",
        )
    if images.dtype != np.uint8:
        raise DataError("wrong-type", f"{path}: {key} is {images.dtype}; expected uint8 grey levels 0 .. 255")
    if images.size == 0:
        raise DataError("empty", f"{path}: {key} holds no images")
    channels_last = images[..., np.newaxis] if grey else images
    scaled = channels_last.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
    return np.ascontiguousarray(np.moveaxis(scaled, -1, 1))


def _labels(path: Path, key: str, labels: NDArray[np.generic], rows: int) -> LabelArray:
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise DataError(
            "multi-label",
            f"{path}: {key} has {labels.shape[1]} labels per image; only one class per image is supported, "
            "keep one column",
        )
    if labels.ndim not in (1, 2) or labels.shape[0] != rows:
        raise DataError("wrong-shape", f"{path}: {key} has shape {labels.shape}; expected ({rows},) or ({rows}, 1)")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError("wrong-type", f"{path}: {key} is {labels.dtype}; expected whole numbers")
    return labels.reshape(rows).astype(np.int64)


# --- CSV tables ------------------------------------------------------------------------------------------------------


def _load_csv(path: Path, label: str | None, rng: np.random.Generator, test_fraction: float) -> Dataset:
    try:
        # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as handle:
            header, label_column, x, label_texts = _read_table(path, handle, label)
    except UnicodeDecodeError as error:
        raise DataError("unreadable", f"{path}: is not UTF-8 text; export the table as CSV in UTF-8") from error
    except csv.Error as error:
        raise DataError("unreadable", f"{path}: is not a well-formed CSV file ({error}); export it again") from error
    y, class_names = _encoded(path, header[label_column], label_texts)
    features = [column for column in range(len(header)) if column != label_column]
    notes: list[str] = []
    for column in [column for column in features if not header[column]]:
        # A nameless 0, 1, 2, ... column is the index that some tools write. It is no measurement, and in a file
        # sorted by class it gives the class away.
        if not np.array_equal(x[:, column], np.arange(len(x)) + x[0, column]):
            raise DataError("no-column-name", f"{path}: column {column + 1} has no name; name it or remove it")
        notes.append(f"column {column + 1} has no name and only counts the rows: left out")
        features.remove(column)
    if not features:
        raise DataError("no-features", f"{path}: has no column besides {header[label_column]!r} to learn from")
    names = [header[column] for column in features]
    return _split_table(path.name, x[:, features], y, class_names, names, rng, test_fraction, notes)


def _read_table(path: Path, handle: TextIO, label: str | None) -> tuple[list[str], int, NDArray[np.float64], list[str]]:
    """Header, label column, all cells as float64 (0 in the label column), and the label's texts."""
    first = handle.readline()
    if not first.strip():
        raise DataError("empty", f"{path}: is empty; expected a header row and rows of numbers")
    handle.seek(0)
    reader = csv.reader(handle, delimiter=max(",;\t", key=first.count), strict=True)
    header = [cell.strip() for cell in next(reader)]
    label_column = _label_column(path, header, label)
    cells = array("d")
    label_texts: list[str] = []
    for row in reader:
        if row:
            cells.extend(_numbers(path, header, label_column, row, reader.line_num))
            label_texts.append(row[label_column].strip())
    if not label_texts:
        raise DataError("empty", f"{path}: has a header row but no data rows")
    return header, label_column, np.asarray(cells).reshape(len(label_texts), len(header)), label_texts


def _label_column(path: Path, header: Sequence[str], label: str | None) -> int:
    if all(_is_number(cell) for cell in header):
        raise DataError("no-header", f"{path}: the first line holds numbers; put a row with the column names on top")
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise DataError("repeated-column", f"{path}: column name {repeated[0]!r} occurs twice; rename one")
    columns = _listed([name for name in header if name])
    if not label:
        raise DataError("no-label", f"{path}: say which column holds the class with --label; columns: {columns}")
    if label not in header:
        close = difflib.get_close_matches(label, header, n=1, cutoff=0.6)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise DataError("label-not-in-header", f"{path}: has no column {label!r}{hint}; columns: {columns}")
    return header.index(label)


def _numbers(path: Path, header: Sequence[str], label_column: int, row: Sequence[str], line: int) -> Iterator[float]:
    if len(row) != len(header):
        raise DataError(
            "wrong-width",
            f"{path}: line {line} has {len(row)} values but the header names {len(header)} columns; "
            "the file may be cut short, complete or remove that line",
        )
    for column, text in enumerate(row):
        if column == label_column:
            if text.strip().lower() in _MISSING:
                raise _bad_cell(path, header, column, text, line)
            yield 0.0
            continue
        try:
            value = float(text)
        except ValueError:
            raise _bad_cell(path, header, column, text, line) from None
        if not math.isfinite(value):
            raise _bad_cell(path, header, column, text, line)
        yield value


def _bad_cell(path: Path, header: Sequence[str], column: int, text: str, line: int) -> DataError:
    where = f"{path}: line {line}, column {header[column] or column + 1!r}"
    if text.strip().lower() in _MISSING:
        found = f"{text.strip()!r}" if text.strip() else "an empty cell"
        return DataError("missing-value", f"{where}: value missing ({found}); fill it in or remove the row")
    if _is_number(text):
        return DataError(
            "non-finite", f"{where}: {text.strip()!r} is not a finite number; replace it or remove the row"
        )
    return DataError(
        "text-value", f"{where}: {text.strip()[:40]!r} is not a number; encode the column as numbers or remove it"
    )


def _encoded(path: Path, label: str, texts: Sequence[str]) -> tuple[LabelArray, list[str]]:
    """Labels ``0 .. k-1`` and their names, sorted as numbers if all are numbers, else as text."""
    names = {text: text for text in set(texts)}
    if all(_is_number(text) for text in names):
        # "1" and "1.0" are one class.
        names = {text: f"{float(text):.15g}" for text in names}
        ordered = sorted(set(names.values()), key=float)
    else:
        ordered = sorted(set(names.values()))
    if len(ordered) < 2:
        raise DataError("one-class", f"{path}: column {label!r} holds the single class {ordered[0]!r}; two are needed")
    code = {name: index for index, name in enumerate(ordered)}
    y = np.array([code[names[text]] for text in texts], dtype=np.int64)
    counts = np.bincount(y)
    if counts.min() < 2:
        rare = ordered[int(counts.argmin())]
        raise DataError(
            "class-too-small",
            f"{path}: column {label!r} has {len(ordered)} different values and {rare!r} occurs once; every class needs "
            "two rows, one to learn from and one to test with. Is it a class and not a measurement?",
        )
    return y, ordered


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > _NAMES_SHOWN else shown
