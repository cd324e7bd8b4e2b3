import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quorsum.errors import DataError
from quorsum.simulation.data import load_dataset


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


def refusal(spec: str) -> DataError:
    with pytest.raises(DataError) as caught:
        load_dataset(spec)
    return caught.value


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


def write_keras(folder: Path, **changed: Any) -> str:
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    labels = np.array([[0], [1], [2], [0], [1], [2]])
    arrays: dict[str, Any] = {"x_train": images, "y_train": labels, "x_test": images[:3], "y_test": labels[:3]}
    arrays |= changed
    path = folder / "cifar10.npz"
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def test_npz_with_the_names_of_keras(tmp_path: Path) -> None:
    loaded = load_dataset(write_keras(tmp_path))
    assert loaded.shape == (3, 32, 32)
    assert loaded.classes == 3
    assert (len(loaded.train_y), len(loaded.test_y)) == (6, 3)
    grey = load_dataset(
        write_keras(tmp_path, x_train=np.zeros((6, 9, 9), np.uint8), x_test=np.ones((3, 9, 9), np.uint8))
    )
    assert grey.shape == (1, 9, 9)
    assert grey.test_x[0, 0, 0, 0] == pytest.approx(1 / 127.5 - 1)


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        ({"y_test": None}, "missing-keys", "lacks y_test"),
        ({"x_train": np.zeros((6, 3, 32, 32), np.uint8)}, "wrong-shape", "x_train has shape"),
        ({"y_test": np.array([0, 1, 9])}, "unseen-class", "occurs in y_test only"),
        ({"y_train": np.zeros(6, np.int64)}, "one-class", "y_train hold the single class 0"),
        ({"x_test": np.zeros((3, 28, 28, 3), np.uint8)}, "wrong-shape", "in x_test but"),
        ({"x_train": np.array([None] * 6)}, "pickled", "never loaded"),
    ],
)
def test_npz_refusals_name_the_arrays_of_the_file(
    tmp_path: Path, changed: dict[str, Any], code: str, says: str
) -> None:
    path = write_keras(tmp_path, **changed)
    error = refusal(path)
    assert error.code == code
    assert says in error.message
    assert path in error.message
