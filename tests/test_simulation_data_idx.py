import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from quorsum.errors import DataError
from quorsum.simulation.data import load_dataset

TRAIN_LABELS = [0, 1, 2, 0, 1, 2]
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(numbers: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, numbers.ndim]) + struct.pack(f">{numbers.ndim}I", *numbers.shape) + numbers.tobytes()


def write_idx(folder: Path, *, packed: bool = False, **changed: bytes | None) -> str:
    """A set of six training and three test images of 9 x 8; ``changed`` are contents by name without the ending."""
    images = np.arange(6 * 9 * 8, dtype=np.int64).astype(np.uint8).reshape(6, 9, 8)
    labels = np.array(TRAIN_LABELS, dtype=np.uint8)
    contents = dict(zip(FILES, map(idx, (images, labels, images[:3], labels[:3])), strict=True))
    for name, content in contents.items():
        content = changed.get(name.replace("-", "_").removesuffix("_ubyte"), content)
        if content is not None:
            (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return str(folder)


def refusal(spec: str) -> DataError:
    with pytest.raises(DataError) as caught:
        load_dataset(spec)
    return caught.value


@pytest.mark.parametrize("packed", [False, True])
def test_the_four_files_of_mnist(tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "fashion"
    folder.mkdir()
    loaded = load_dataset(write_idx(folder, packed=packed))
    assert loaded.name == "fashion"
    assert loaded.shape == (1, 9, 8)
    assert loaded.train_y.tolist() == TRAIN_LABELS
    assert loaded.test_y.tolist() == TRAIN_LABELS[:3]
    assert loaded.class_names == ("0", "1", "2")
    assert loaded.train_x.dtype == np.float32
    assert loaded.train_x[0, 0, 0, 0] == -1.0
    assert loaded.train_x[0, 0, 0, 1] == pytest.approx(1 / 127.5 - 1)


def test_names_with_a_dot_are_known_too(tmp_path: Path) -> None:
    write_idx(tmp_path)
    for name in FILES:
        (tmp_path / name).rename(tmp_path / name.replace("-idx", ".idx"))
    assert len(load_dataset(str(tmp_path)).train_y) == 6


def test_a_file_that_is_there_both_ways_is_read_unpacked(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / f"{FILES[0]}.gz").write_bytes(b"junk")
    assert len(load_dataset(str(tmp_path)).train_y) == 6


IMAGES = idx(np.zeros((6, 9, 8), np.uint8))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        ({"t10k_labels_idx1": None}, "missing-file", "lacks t10k-labels-idx1-ubyte"),
        ({"train_images_idx3": IMAGES[:-1]}, "wrong-length", "announces 432 bytes but holds 431"),
        ({"train_images_idx3": IMAGES + b"\0"}, "wrong-length", "more follow"),
        ({"train_images_idx3": IMAGES[:10]}, "wrong-length", "within its header"),
        ({"train_images_idx3": b""}, "wrong-length", "within its header"),
        ({"train_images_idx3": b"\0\0\x0d\3" + IMAGES[4:]}, "wrong-magic", "begins with 00000d03"),
        ({"train_images_idx3": idx(np.zeros(30, np.uint8))}, "wrong-magic", "has 00000803"),
        ({"train_images_idx3": gzip.compress(IMAGES)}, "wrong-magic", "give it the ending .gz"),
        ({"train_images_idx3": b"\0\0\x08\3" + b"\xff" * 12}, "too-large", "is damaged"),
        ({"train_images_idx3": idx(np.zeros((5, 9, 8), np.uint8))}, "wrong-count", "6 labels but"),
        ({"train_images_idx3": idx(np.zeros((6, 0, 8), np.uint8))}, "empty", "no images"),
        ({"t10k_images_idx3": idx(np.zeros((3, 8, 8), np.uint8))}, "wrong-shape", "8 x 8 but training images 9 x 8"),
        ({"train_labels_idx1": idx(np.zeros(6, np.uint8))}, "one-class", "single class 0"),
        ({"t10k_labels_idx1": idx(np.array([0, 1, 9], np.uint8))}, "unseen-class", "class 9"),
    ],
)
def test_refusals(tmp_path: Path, packed: bool, changed: dict[str, bytes | None], code: str, says: str) -> None:
    spec = write_idx(tmp_path, packed=packed, **changed)
    error = refusal(spec)
    assert error.code == code
    assert says in error.message
    assert spec in error.message


def test_gzip_files_that_are_damaged_or_none(tmp_path: Path) -> None:
    write_idx(tmp_path, packed=True)
    path = tmp_path / f"{FILES[0]}.gz"
    whole = path.read_bytes()
    for content in (IMAGES, whole[:-9], whole[:20] + bytes(8) + whole[28:]):
        path.write_bytes(content)
        assert refusal(str(tmp_path)).code == "unreadable"
