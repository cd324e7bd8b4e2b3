import gzip
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.errors import DataError, UsageError
from quorsum.simulation import data
from quorsum.simulation.data import BUILT_IN, load_dataset


def write_csv(folder: Path, text: str, name: str = "table.csv") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def table(rows: int = 10, classes: int = 2, header: str = "a,b,class") -> str:
    lines = [f"{row * 0.5},{row * row},{row % classes}" for row in range(rows)]
    return "\n".join([header, *lines]) + "\n"


def write_npz(folder: Path, **changed: Any) -> str:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "train_images": rng.integers(0, 256, (6, 28, 28), dtype=np.uint8),
        "train_labels": np.array([[0], [1], [0], [1], [0], [1]], dtype=np.uint8),
        "test_images": rng.integers(0, 256, (4, 28, 28), dtype=np.uint8),
        "test_labels": np.array([[0], [1], [0], [1]], dtype=np.uint8),
    }
    arrays |= changed
    path = folder / "images.npz"
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def refusal(spec: str, label: str | None = "class") -> DataError:
    with pytest.raises(DataError) as caught:
        load_dataset(spec, label=label if spec.endswith(".csv") else None)
    return caught.value


# --- built-in


@pytest.mark.parametrize(
    ("name", "shape", "rows", "classes"), [("digits", (64,), 1797, 10), ("breast-cancer", (30,), 569, 2)]
)
def test_built_in_sets_have_the_published_size(name: str, shape: tuple[int, ...], rows: int, classes: int) -> None:
    loaded = load_dataset(name)
    assert loaded.name == name
    assert loaded.shape == shape
    assert loaded.classes == classes
    assert len(loaded.train_x) == len(loaded.train_y)
    assert len(loaded.test_x) == len(loaded.test_y)
    assert len(loaded.train_y) + len(loaded.test_y) == rows
    assert len(loaded.feature_names) == shape[0]
    assert loaded.train_x.dtype == loaded.test_x.dtype == np.float32
    assert loaded.train_y.dtype == loaded.test_y.dtype == np.int64
    assert abs(len(loaded.test_y) / rows - 0.2) < 0.01


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    loaded, original = load_dataset("digits"), load_digits()
    assert 0.0 <= loaded.train_x.min() < loaded.train_x.max() <= 1.0
    ours = np.column_stack([np.concatenate([loaded.train_x, loaded.test_x]) * 16, [*loaded.train_y, *loaded.test_y]])
    theirs = np.column_stack([original.data, original.target])
    assert np.array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


def test_breast_cancer_is_that_of_scikit_learn_standardised_by_training_rows() -> None:
    from sklearn.datasets import load_breast_cancer

    loaded, original = load_dataset("breast-cancer"), load_breast_cancer()
    assert loaded.class_names == tuple(original.target_names)
    assert loaded.feature_names == tuple(original.feature_names)
    assert loaded.positive_rate == pytest.approx(np.mean(original.target))
    assert np.allclose(loaded.train_x.mean(axis=0), 0.0, atol=1e-5)
    assert np.allclose(loaded.train_x.std(axis=0), 1.0, atol=1e-5)
    # Standardising is affine, so that it keeps every correlation of a column with the class.
    x, y = np.concatenate([loaded.train_x, loaded.test_x]), np.concatenate([loaded.train_y, loaded.test_y])
    ours = [np.corrcoef(column, y)[0, 1] for column in x.T]
    theirs = [np.corrcoef(column, original.target)[0, 1] for column in original.data.T]
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_seed_decides_the_split() -> None:
    one, again, other = load_dataset("digits", seed=3), load_dataset("digits", seed=3), load_dataset("digits", seed=4)
    assert np.array_equal(one.train_x, again.train_x)
    assert np.array_equal(one.test_y, again.test_y)
    assert not np.array_equal(one.train_x, other.train_x)


def test_positive_rate_is_for_two_classes_only() -> None:
    assert load_dataset("digits").positive_rate is None


def test_missing_file_of_scikit_learn_says_what_to_install() -> None:
    with pytest.raises(DataError, match=r"pip install 'quorsum\[simulation\]'") as caught:
        data._bundled("no-such-file.csv")
    assert caught.value.code == "not-installed"


def test_unknown_name_suggests_and_lists() -> None:
    error = refusal("breast_cancr")
    assert error.code == "unknown-name"
    assert "did you mean breast-cancer?" in error.message
    assert all(name in error.message for name in BUILT_IN)
    assert "did you mean" not in refusal("xyzzy").message


def test_other_refusals_of_the_call(tmp_path: Path) -> None:
    assert refusal(str(tmp_path / "none.csv")).code == "not-found"
    folder = tmp_path / "folder.npz"
    folder.mkdir()
    assert "is a folder" in refusal(str(folder)).message
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    assert refusal(str(tmp_path / "table.parquet")).code == "unknown-format"
    with pytest.raises(DataError, match=r"\.csv file only"):
        load_dataset("digits", label="class")
    with pytest.raises(UsageError, match="test_fraction"):
        load_dataset("digits", test_fraction=1.0)
    with pytest.raises(UsageError, match="seed"):
        load_dataset("digits", seed=-1)


# --- CSV


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


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(2, 40), min_size=2, max_size=6),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_stratified_split_uses_every_row_once_and_leaves_every_class_on_both_sides(
    counts: list[int], fraction: float, seed: int
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    train, test = data._stratified(labels, np.random.default_rng(seed), fraction)
    assert sorted([*train, *test]) == list(range(len(labels)))
    for side in (train, test):
        assert set(labels[side]) == set(range(len(counts)))


# --- npz


def test_npz_grey_and_colour(tmp_path: Path) -> None:
    grey = load_dataset(write_npz(tmp_path))
    assert grey.shape == (1, 28, 28)
    assert -1.0 <= grey.train_x.min() < grey.train_x.max() <= 1.0
    assert grey.feature_names == ()
    images = np.zeros((6, 32, 30, 3), dtype=np.uint8)
    images[..., 0] = 255
    colour = load_dataset(write_npz(tmp_path, train_images=images, test_images=images[:4]))
    assert colour.shape == (3, 32, 30)
    assert colour.train_x[:, 0].min() == 1.0
    assert colour.train_x[:, 1].max() == -1.0


def test_npz_validation_rows_serve_as_training_rows(tmp_path: Path) -> None:
    path = write_npz(tmp_path, val_images=np.zeros((2, 28, 28), np.uint8), val_labels=np.array([1, 0]))
    loaded = load_dataset(path)
    assert len(loaded.train_y) == 8
    assert loaded.train_y[-2:].tolist() == [1, 0]


def test_npz_labels_may_be_flat_and_need_not_start_at_zero(tmp_path: Path) -> None:
    path = write_npz(tmp_path, train_labels=np.array([3, 7, 3, 7, 3, 7]), test_labels=np.array([7, 3, 7, 3]))
    loaded = load_dataset(path)
    assert loaded.class_names == ("3", "7")
    assert loaded.test_y.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        ({"test_labels": None}, "missing-keys", "lacks test_labels"),
        ({"val_images": np.zeros((2, 28, 28), np.uint8)}, "missing-keys", "lacks val_labels"),
        ({"train_labels": np.zeros((6, 14), np.uint8)}, "multi-label", "14 labels per image"),
        ({"train_labels": np.zeros((6, 1), np.uint8)}, "one-class", "single class 0"),
        ({"train_labels": np.zeros((5, 1), np.uint8)}, "wrong-shape", "expected (6,)"),
        ({"train_labels": np.zeros(6)}, "wrong-type", "float64"),
        ({"test_labels": np.array([0, 1, 2, 0])}, "unseen-class", "class 2"),
        ({"train_images": np.zeros((6, 28, 28, 28), np.uint8)}, "wrong-shape", "expected (n, height, width)"),
        ({"train_images": np.zeros((6, 28, 28))}, "wrong-type", "expected uint8"),
        ({"train_images": np.zeros((0, 28, 28), np.uint8)}, "empty", "no images"),
        ({"test_images": np.zeros((4, 64, 64), np.uint8)}, "wrong-shape", "one size"),
        ({"train_labels": np.array([{"a": 1}] * 6, dtype=object)}, "pickled", "never loaded"),
    ],
)
def test_npz_refusals(tmp_path: Path, changed: dict[str, Any], code: str, says: str) -> None:
    path = write_npz(tmp_path, **changed)
    error = refusal(path)
    assert error.code == code
    assert says in error.message
    assert path in error.message


@pytest.mark.parametrize("kept", [0, 10, 1000, -30])
def test_npz_cut_short(tmp_path: Path, kept: int) -> None:
    path = Path(write_npz(tmp_path))
    path.write_bytes(path.read_bytes()[:kept])
    assert refusal(str(path)).code == "unreadable"


def test_npz_with_a_flipped_byte(tmp_path: Path) -> None:
    path = Path(write_npz(tmp_path))
    content = bytearray(path.read_bytes())
    content[2000] ^= 0xFF
    path.write_bytes(content)
    assert refusal(str(path)).code == "unreadable"


def test_npz_that_is_a_pickle_or_holds_junk(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    path.write_bytes(pickle.dumps({"train_images": [1]}))
    assert refusal(str(path)).code == "unreadable"
    with zipfile.ZipFile(path, "w") as archive:
        for key in ("train_images", "train_labels", "test_images", "test_labels"):
            archive.writestr(f"{key}.npy", b"\x93NUMPY\x01\x00junk")
    assert refusal(str(path)).code == "unreadable"
