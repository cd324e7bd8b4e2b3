import pickle
from pathlib import Path

import numpy as np
import pytest

from quorsum.errors import DataError
from quorsum.simulation.data import load_dataset

BATCHES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")


def batch(labels: list[int], first: int = 0) -> bytes:
    records = np.zeros((len(labels), 3073), dtype=np.uint8)
    records[:, 0] = labels
    records[:, 1] = first
    records[:, 1025:2049] = 255
    return records.tobytes()


def write_cifar(folder: Path, **changed: bytes | None) -> str:
    for name in BATCHES:
        content = changed.get(name.removesuffix(".bin"), batch([0, 1, 9]))
        if content is not None:
            (folder / name).write_bytes(content)
    return str(folder)


def refusal(spec: str) -> DataError:
    with pytest.raises(DataError) as caught:
        load_dataset(spec)
    return caught.value


def test_binary_batches(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    loaded = load_dataset(write_cifar(folder, data_batch_2=batch([3, 4, 5], first=255)))
    assert loaded.name == "cifar-10-batches-bin"
    assert loaded.shape == (3, 32, 32)
    assert loaded.class_names[3] == "cat"
    assert loaded.classes == 10
    assert loaded.train_y.tolist() == [0, 1, 9, 3, 4, 5, *[0, 1, 9] * 3]
    assert loaded.test_y.tolist() == [0, 1, 9]
    # Red, green and blue follow each other, each row by row.
    assert loaded.train_x[:, 0, 0, 0].tolist() == [-1.0] * 3 + [1.0] * 3 + [-1.0] * 9
    assert (loaded.train_x[:, 1] == 1.0).all()
    assert (loaded.train_x[:, 2] == -1.0).all()


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        ({"data_batch_3": None}, "missing-file", "lacks data_batch_3.bin"),
        ({"test_batch": None}, "missing-file", "lacks test_batch.bin"),
        ({"data_batch_3": batch([0, 1, 9])[:-1]}, "wrong-length", "9218 bytes"),
        ({"test_batch": b""}, "wrong-length", "0 bytes"),
        ({"data_batch_3": batch([0, 1])}, "wrong-length", "data_batch_3.bin: holds 2 images but"),
        ({"test_batch": batch([0, 10])}, "wrong-label", "label 10"),
        ({"test_batch": batch([0, 2])}, "unseen-class", "class 2"),
    ],
)
def test_refusals(tmp_path: Path, changed: dict[str, bytes | None], code: str, says: str) -> None:
    spec = write_cifar(tmp_path, **changed)
    error = refusal(spec)
    assert error.code == code
    assert says in error.message
    assert spec in error.message


def test_the_pickled_version_is_never_loaded(tmp_path: Path) -> None:
    for name in BATCHES:
        (tmp_path / Path(name).stem).write_bytes(pickle.dumps({b"labels": [0]}))
    error = refusal(str(tmp_path))
    assert error.code == "pickled"
    assert "binary version" in error.message
