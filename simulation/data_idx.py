"""MNIST and Fashion-MNIST as they are published: a folder with four IDX files, gzipped or not.

An IDX file is a big-endian header (two zero bytes, the type of a number, the number of dimensions, every dimension as
32 bits) and then the numbers. Sources: LeCun, Cortes & Burges (1998), "The MNIST database of handwritten digits",
which describes the format; Xiao, Rasul & Vollgraf (2017), "Fashion-MNIST".
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quorsum.errors import DataError
from quorsum.simulation.dataset import Dataset, FloatArray, LabelArray, scaled_images

__all__ = ["holds_idx", "load_idx"]

_PARTS = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 0x08
# No image set that a simulation can hold in memory is larger; a header that says more is damaged.
_MOST_BYTES = 2**31


def holds_idx(folder: Path) -> bool:
    """Whether a folder holds a file that is called like one of MNIST's."""
    return any(True for pattern in ("*-idx?-ubyte*", "*.idx?-ubyte*") for _ in folder.glob(pattern))


def load_idx(folder: Path) -> Dataset:
    """Read the four files of MNIST, or of a set published in the same form.

    Args:
        folder: holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
            ``t10k-labels-idx1-ubyte``, each with or without ``.gz``. A file that is there both ways is read unpacked.

    Returns:
        Grey images ``(1, height, width)`` and the classes that the training labels hold.

    Raises:
        DataError: a file is missing, damaged or cut short, or the four do not belong together.
        OSError: a file cannot be read.
    """
    train_x, train_y = _part(folder, "train")
    test_x, test_y = _part(folder, "test")
    if test_x.shape[1:] != train_x.shape[1:]:
        raise DataError(
            "wrong-shape",
            f"{folder}: test images are {test_x.shape[2]} x {test_x.shape[3]} but training images {train_x.shape[2]} x "
            f"{train_x.shape[3]}; take all four files from one set",
        )
    values = np.unique(train_y)
    if values.size < 2:
        raise DataError(
            "one-class", f"{folder}: the training labels hold the single class {values[0]}; at least two are needed"
        )
    unseen = np.setdiff1d(test_y, values)
    if unseen.size:
        raise DataError(
            "unseen-class",
            f"{folder}: class {unseen[0]} occurs among the test labels only; take all four files from one set",
        )
    return Dataset(
        name=folder.resolve().name,
        train_x=train_x,
        train_y=np.searchsorted(values, train_y).astype(np.int64),
        test_x=test_x,
        test_y=np.searchsorted(values, test_y).astype(np.int64),
        class_names=tuple(str(value) for value in values),
    )


def _part(folder: Path, part: str) -> tuple[FloatArray, LabelArray]:
    images_path, labels_path = _file(folder, part, "images", 3), _file(folder, part, "labels", 1)
    images, labels = _read(images_path, 3), _read(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(
            "wrong-count",
            f"{labels_path}: holds {len(labels)} labels but {images_path.name} holds {len(images)} images; "
            "take both from one set",
        )
    if images.size == 0:
        raise DataError("empty", f"{images_path}: holds no images; download it again")
    return scaled_images(images[:, np.newaxis]), labels.astype(np.int64)


def _file(folder: Path, part: str, what: str, dimensions: int) -> Path:
    name = f"{_PARTS[part]}-{what}-idx{dimensions}-ubyte"
    # Some copies have a dot where the published names have a dash.
    for candidate in (name, name.replace("-idx", ".idx")):
        for ending in ("", ".gz"):
            path = folder / f"{candidate}{ending}"
            if path.is_file():
                return path
    raise DataError("missing-file", f"{folder}: lacks {name} (or {name}.gz); put all four files of the set there")


def _read(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The numbers of one IDX file of unsigned bytes, in its own shape."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            header = handle.read(4 + 4 * dimensions)
            shape = _shape(path, header, dimensions)
            size = int(np.prod(shape, dtype=object))
            if size > _MOST_BYTES:
                raise DataError("too-large", f"{path}: its header announces {size} bytes; it is damaged, copy it again")
            # One byte more than announced, to see whether anything follows.
            content = handle.read(size + 1)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(
            "unreadable", f"{path}: is damaged or cut short, or is no gzip file; copy or download it again"
        ) from error
    if len(content) != size:
        found = f"holds {len(content)}" if len(content) < size else "more follow"
        raise DataError(
            "wrong-length", f"{path}: announces {size} bytes but {found}; it is damaged, copy or download it again"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _shape(path: Path, header: bytes, dimensions: int) -> tuple[int, ...]:
    if len(header) != 4 + 4 * dimensions:
        raise DataError("wrong-length", f"{path}: ends within its header; copy or download it again")
    magic, wanted = header[:4], bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if magic != wanted:
        hint = "it is gzipped, give it the ending .gz" if magic[:2] == b"\x1f\x8b" else "is it another file, renamed?"
        raise DataError(
            "wrong-magic",
            f"{path}: begins with {magic.hex()} where an IDX file of this name has {wanted.hex()}; {hint}",
        )
    return struct.unpack(f">{dimensions}I", header[4:])
