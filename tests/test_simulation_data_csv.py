import gzip
from pathlib import Path

import numpy as np
import pytest

from quorsum.errors import DataError
from quorsum.simulation.data import load_dataset


def write_csv(folder: Path, text: str, name: str = "table.csv") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def table(rows: int = 10, classes: int = 2, header: str = "a,b,class") -> str:
    lines = [f"{row * 0.5},{row * row},{row % classes}" for row in range(rows)]
    return "\n".join([header, *lines]) + "\n"


def refusal(spec: str, label: str | None = "class", key: str | None = None) -> DataError:
    with pytest.raises(DataError) as caught:
        load_dataset(spec, label=label, key=key)
    return caught.value


def test_csv_is_split_by_class_and_standardised(tmp_path: Path) -> None:
    path = write_csv(tmp_path, table(rows=50))
    loaded = load_dataset(path, label="class", seed=1)
    assert loaded.name == "table.csv"
    assert loaded.shape == (2,)
    assert loaded.feature_names == ("a", "b")
    assert loaded.class_names == ("0", "1")
    assert loaded.positive_rate == 0.5
    assert np.bincount(loaded.test_y).tolist() == [5, 5]
    assert np.allclose(loaded.train_x.mean(axis=0), 0.0, atol=1e-5)
    assert np.allclose(loaded.train_x.std(axis=0), 1.0, atol=1e-5)
    assert loaded.notes == ()


def test_csv_labels_of_any_kind_are_sorted(tmp_path: Path) -> None:
    text = "x,y\n1,10\n2,9\n3,10.0\n4,9\n"
    assert load_dataset(write_csv(tmp_path, text), label="y").class_names == ("9", "10")
    text = "x,y\n1,sick\n2,healthy\n3,sick\n4,healthy\n"
    assert load_dataset(write_csv(tmp_path, text), label="y").class_names == ("healthy", "sick")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_csv_with_other_separators_blank_lines_and_byte_order_mark(tmp_path: Path, separator: str) -> None:
    path = write_csv(tmp_path, "\ufeff" + table().replace(",", separator) + "\n\n")
    assert load_dataset(path, label="class").feature_names == ("a", "b")


def test_csv_columns_of_extreme_or_constant_size_stay_finite(tmp_path: Path) -> None:
    rows = [f"{1e300 * (row - 5)},0.1,{1e-300 * row},{1.6e9 + row},{row % 2}" for row in range(20)]
    loaded = load_dataset(write_csv(tmp_path, "\n".join(["big,constant,tiny,time,y", *rows])), label="y")
    x = np.concatenate([loaded.train_x, loaded.test_x])
    assert np.isfinite(x).all()
    assert np.allclose(x[:, 1], 0.0, atol=1e-6)
    assert np.allclose(loaded.train_x[:, [0, 2, 3]].std(axis=0), 1.0, atol=1e-4)


def test_csv_nameless_row_counter_is_left_out_and_noted(tmp_path: Path) -> None:
    rows = [f"{row},{row * row},{int(row > 5)}" for row in range(12)]
    loaded = load_dataset(write_csv(tmp_path, "\n".join([",v,y", *rows])), label="y")
    assert loaded.feature_names == ("v",)
    assert "column 1" in loaded.notes[0]


def test_csv_rare_class_is_on_both_sides(tmp_path: Path) -> None:
    rows = [f"{row},{int(row < 2)}" for row in range(100)]
    loaded = load_dataset(write_csv(tmp_path, "\n".join(["v,y", *rows])), label="y")
    assert loaded.positive_rate == 0.02
    assert loaded.train_y.sum() == loaded.test_y.sum() == 1


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("", "empty", "is empty"),
        ("a,b,class\n", "empty", "no data rows"),
        ("a,class\n1,0\n2,0\n", "one-class", "single class '0'"),
        ("1,2,0\n3,4,1\n", "no-header", "column names"),
        ("a,a,class\n1,2,0\n", "repeated-column", "'a'"),
        ("a,b\n1,0\n2,1\n", "label-not-in-header", "columns: a, b"),
        ("a,Class\n1,0\n2,1\n", "label-not-in-header", "did you mean 'Class'?"),
        ("class\n0\n1\n0\n1\n", "no-features", "no column besides"),
        ("a,b,class\n1,2,0\n3,,1\n", "missing-value", "line 3, column 'b'"),
        ("a,b,class\n1,2,0\n3,NaN,1\n", "missing-value", "line 3, column 'b'"),
        ("a,b,class\n1,2,0\n3,4,\n", "missing-value", "line 3, column 'class'"),
        ("a,b,class\n1,2,0\n3,inf,1\n", "non-finite", "line 3, column 'b'"),
        ("a,b,class\n1,2,0\n3,red,1\n", "text-value", "line 3, column 'b': 'red'"),
        ("a,,class\n1,2,0\n3,7,1\n5,1,0\n6,2,1\n", "no-column-name", "column 2"),
        ("a,b,class\n1,2,0\n3,4\n", "wrong-width", "line 3 has 2 values"),
        ("a,b,class\n1,2,0\n3,4,1\n5,6,0\n", "class-too-small", "'1' occurs once"),
        ('a,b,class\n1,2,0\n3,"4', "unreadable", "well-formed"),
    ],
)
def test_csv_refusals(tmp_path: Path, text: str, code: str, says: str) -> None:
    path = write_csv(tmp_path, text)
    error = refusal(path)
    assert error.code == code
    assert says in error.message
    assert path in error.message


def test_csv_without_a_label_lists_the_columns(tmp_path: Path) -> None:
    error = refusal(write_csv(tmp_path, table()), label=None)
    assert error.code == "no-label"
    assert "--label" in error.message
    assert "a, b, class" in error.message


def test_csv_with_many_columns_lists_some(tmp_path: Path) -> None:
    header = ",".join(f"c{column}" for column in range(100))
    assert "(100 in all)" in refusal(write_csv(tmp_path, header + "\n"), label=None).message


def test_csv_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(gzip.compress(table().encode()))
    assert refusal(str(path)).code == "unreadable"


KEYED = "v,hospital,y\n" + "".join(f"{row},{'north' if row % 3 else ' south'},{row % 2}\n" for row in range(30))


def test_csv_key_column_says_whose_row_it_is_and_is_no_input(tmp_path: Path) -> None:
    loaded = load_dataset(write_csv(tmp_path, KEYED), label="y", key="hospital", seed=2)
    assert loaded.feature_names == ("v",)
    assert loaded.key_names == ("north", "south")
    assert loaded.train_keys is not None
    assert loaded.train_keys.dtype == np.int64
    # v is row number, standardised: rows 0, 3, 6, ... are those of the south.
    v = loaded.train_x[:, 0].astype(np.float64)
    every = np.concatenate([loaded.train_x[:, 0], loaded.test_x[:, 0]]).astype(np.float64)
    numbers = np.rint((v - every.min()) / (every.max() - every.min()) * 29).astype(int)
    assert np.array_equal(loaded.train_keys, (numbers % 3 == 0).astype(np.int64))


def test_csv_without_a_key_has_none(tmp_path: Path) -> None:
    loaded = load_dataset(write_csv(tmp_path, table()), label="class")
    assert loaded.train_keys is None
    assert loaded.key_names == ()


@pytest.mark.parametrize(
    ("text", "key", "code", "says"),
    [
        (KEYED, "hopital", "key-not-in-header", "did you mean 'hospital'?"),
        (KEYED, "", "key-not-in-header", "columns: v, hospital, y"),
        (KEYED, "y", "key-is-label", "both the class and the key"),
        (KEYED + "1,,0\n", "hospital", "missing-value", "line 32, column 'hospital'"),
        ("hospital,y\na,0\nb,1\na,0\nb,1\n", "hospital", "no-features", "no column besides"),
    ],
)
def test_csv_key_refusals(tmp_path: Path, text: str, key: str, code: str, says: str) -> None:
    path = write_csv(tmp_path, text)
    error = refusal(path, "y", key)
    assert error.code == code
    assert says in error.message
    assert path in error.message
