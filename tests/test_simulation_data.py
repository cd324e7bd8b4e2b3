from pathlib import Path

import numpy as np
import pytest

from quorsum.errors import DataError, UsageError
from quorsum.simulation import data
from quorsum.simulation.data import BUILT_IN, load_dataset


def refusal(spec: str) -> DataError:
    with pytest.raises(DataError) as caught:
        load_dataset(spec)
    return caught.value


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
    assert refusal(str(tmp_path)).code == "unknown-folder"
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    assert refusal(str(tmp_path / "table.parquet")).code == "unknown-format"
    with pytest.raises(DataError, match=r"label column .* \.csv file only"):
        load_dataset("digits", label="class")
    with pytest.raises(DataError, match=r"key column .* \.csv file only"):
        load_dataset("digits", key="hospital")
    with pytest.raises(UsageError, match="test_fraction"):
        load_dataset("digits", test_fraction=1.0)
    with pytest.raises(UsageError, match="seed"):
        load_dataset("digits", seed=-1)
