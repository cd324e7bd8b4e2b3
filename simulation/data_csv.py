"""CSV tables: a header row, numeric columns, one column that holds the class, perhaps one that says whose row it is."""

from __future__ import annotations

import csv
import difflib
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from quorsum.errors import DataError
from quorsum.simulation.dataset import Dataset, LabelArray, listed, split_table

__all__ = ["load_csv"]

_MISSING = frozenset({"", "?", "na", "n/a", "nan", "null", "none"})


@dataclass(frozen=True)
class _Table:
    """A table as it was read.

    Attributes:
        header: names of all columns.
        label: number of the column that holds the class.
        key: number of the column that says whose row it is, or None.
        cells: all cells, shape ``(n, columns)``; 0 in the label and the key column.
        labels: the texts of the label column.
        keys: the texts of the key column; empty without one.
    """

    header: list[str]
    label: int
    key: int | None
    cells: NDArray[np.float64]
    labels: list[str]
    keys: list[str]


def load_csv(path: Path, label: str | None, key: str | None, rng: np.random.Generator, test_fraction: float) -> Dataset:
    """Read a table and split it by class.

    Args:
        path: comma, semicolon or tab; UTF-8, with or without a byte order mark.
        label: the column that holds the class.
        key: the column that says whose row it is, such as a hospital or a patient; it is no input to learn from.
        rng: decides which rows are test rows.
        test_fraction: share of every class kept for the test.

    Raises:
        DataError: the table cannot be used as it is.
        OSError: the file cannot be read.
    """
    try:
        # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as handle:
            table = _read_table(path, handle, label, key)
    except UnicodeDecodeError as error:
        raise DataError("unreadable", f"{path}: is not UTF-8 text; export the table as CSV in UTF-8") from error
    except csv.Error as error:
        raise DataError("unreadable", f"{path}: is not a well-formed CSV file ({error}); export it again") from error
    header, x = table.header, table.cells
    y, class_names = _encoded(path, header[table.label], table.labels)
    features = [column for column in range(len(header)) if column not in (table.label, table.key)]
    notes: list[str] = []
    for column in [column for column in features if not header[column]]:
        # A nameless 0, 1, 2, ... column is the index that some tools write. It is no measurement, and in a file
        # sorted by class it gives the class away.
        if not np.array_equal(x[:, column], np.arange(len(x)) + x[0, column]):
            raise DataError("no-column-name", f"{path}: column {column + 1} has no name; name it or remove it")
        notes.append(f"column {column + 1} has no name and only counts the rows: left out")
        features.remove(column)
    if not features:
        raise DataError("no-features", f"{path}: has no column besides {header[table.label]!r} to learn from")
    names = [header[column] for column in features]
    keys = None if table.key is None else _numbered(table.keys)
    return split_table(path.name, x[:, features], y, class_names, names, rng, test_fraction, notes, keys)


def _read_table(path: Path, handle: TextIO, label: str | None, key: str | None) -> _Table:
    first = handle.readline()
    if not first.strip():
        raise DataError("empty", f"{path}: is empty; expected a header row and rows of numbers")
    handle.seek(0)
    reader = csv.reader(handle, delimiter=max(",;\t", key=first.count), strict=True)
    header = [cell.strip() for cell in next(reader)]
    label_column = _label_column(path, header, label)
    key_column = None if key is None else _key_column(path, header, key, label_column)
    texts = {label_column} if key_column is None else {label_column, key_column}
    cells = array("d")
    labels: list[str] = []
    keys: list[str] = []
    for row in reader:
        if row:
            cells.extend(_numbers(path, header, texts, row, reader.line_num))
            labels.append(row[label_column].strip())
            if key_column is not None:
                keys.append(row[key_column].strip())
    if not labels:
        raise DataError("empty", f"{path}: has a header row but no data rows")
    return _Table(header, label_column, key_column, np.asarray(cells).reshape(len(labels), len(header)), labels, keys)


def _label_column(path: Path, header: Sequence[str], label: str | None) -> int:
    if all(_is_number(cell) for cell in header):
        raise DataError("no-header", f"{path}: the first line holds numbers; put a row with the column names on top")
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise DataError("repeated-column", f"{path}: column name {repeated[0]!r} occurs twice; rename one")
    if not label:
        columns = listed([name for name in header if name])
        raise DataError("no-label", f"{path}: say which column holds the class with --label; columns: {columns}")
    return _column(path, header, label, "label-not-in-header")


def _key_column(path: Path, header: Sequence[str], key: str, label_column: int) -> int:
    column = _column(path, header, key, "key-not-in-header")
    if column == label_column:
        raise DataError(
            "key-is-label", f"{path}: {key!r} cannot be both the class and the key; name two columns, or no key"
        )
    return column


def _column(path: Path, header: Sequence[str], name: str, code: str) -> int:
    if not name or name not in header:
        close = difflib.get_close_matches(name, header, n=1, cutoff=0.6)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        columns = listed([name for name in header if name])
        raise DataError(code, f"{path}: has no column {name!r}{hint}; columns: {columns}")
    return header.index(name)


def _numbered(texts: Sequence[str]) -> tuple[LabelArray, tuple[str, ...]]:
    names, numbers = np.unique(np.array(texts), return_inverse=True)
    return numbers.astype(np.int64), tuple(str(name) for name in names)


def _numbers(path: Path, header: Sequence[str], texts: set[int], row: Sequence[str], line: int) -> Iterator[float]:
    if len(row) != len(header):
        raise DataError(
            "wrong-width",
            f"{path}: line {line} has {len(row)} values but the header names {len(header)} columns; "
            "the file may be cut short, complete or remove that line",
        )
    for column, text in enumerate(row):
        if column in texts:
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
