from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorsum.errors import DataError
from quorsum.simulation.data import load_dataset
from quorsum.simulation.data_text import UNKNOWN, WINDOW


def write_text(folder: Path, text: str, name: str = "play.txt") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def speech(who: str, letter: str, length: int) -> str:
    return f"{who}:\n{letter * length}\n\n"


def spoken(loaded_x: np.ndarray, names: tuple[str, ...]) -> list[str]:
    return ["".join(names[token] for token in window) for window in loaded_x]


def refusal(spec: str) -> DataError:
    with pytest.raises(DataError) as caught:
        load_dataset(spec)
    return caught.value


def test_windows_belong_to_their_speakers(tmp_path: Path) -> None:
    # Twenty windows of ROMEO in two speeches, ten of JULIET.
    text = speech("ROMEO", "a", 640) + speech("JULIET", "b", 650) + speech("ROMEO", "c", 650)
    loaded = load_dataset(write_text(tmp_path, text))
    assert loaded.kind == "text"
    assert loaded.name == "play.txt"
    assert loaded.key_names == ("JULIET", "ROMEO")
    assert loaded.train_keys is not None
    assert loaded.train_keys.tolist() == [0] * 9 + [1] * 18
    assert loaded.shape == (WINDOW,)
    assert loaded.class_names == ("\n", "a", "b", "c", UNKNOWN)
    assert loaded.classes == 5
    assert loaded.positive_rate is None
    assert loaded.train_x.dtype == loaded.train_y.dtype == loaded.test_x.dtype == np.int64
    windows = spoken(loaded.train_x, loaded.class_names)
    assert set(windows[:9]) == {"b" * WINDOW}
    assert windows[18] == "a" * WINDOW
    assert windows[19] == "\n\n" + "c" * (WINDOW - 2)
    assert spoken(loaded.test_x, loaded.class_names) == ["b" * WINDOW, "c" * WINDOW, "c" * WINDOW]
    assert loaded.notes == ()


def test_labels_are_the_characters_that_follow(tmp_path: Path) -> None:
    text = "".join(chr(ord("a") + (position * position) % 23) for position in range(5000))
    loaded = load_dataset(write_text(tmp_path, text))
    assert len(loaded.train_x) == 4999 // WINDOW - len(loaded.test_x)
    assert len(loaded.test_x) == 8
    stream = np.concatenate([loaded.train_x.ravel(), loaded.test_x.ravel()])
    ahead = np.concatenate([loaded.train_y.ravel(), loaded.test_y.ravel()])
    assert np.array_equal(stream[1:], ahead[:-1])
    assert "".join(loaded.class_names[token] for token in stream) == text[: stream.size]


def test_a_text_without_speakers_is_one_stream(tmp_path: Path) -> None:
    loaded = load_dataset(write_text(tmp_path, "ONLY:\n" + "x" * 700))
    assert loaded.train_keys is None
    assert loaded.key_names == ()
    assert "taken as one text" in loaded.notes[0]


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    text = "A foreword.\n\n" + speech("A", "a", 650) + speech("B", "b", 650) + speech("C", "c", 30)
    loaded = load_dataset(write_text(tmp_path, text))
    assert loaded.key_names == ("A", "B")
    assert "before the first speaker" in loaded.notes[0]
    assert loaded.notes[1].startswith("1 of 3 speakers")


def test_lines_that_only_look_like_speakers(tmp_path: Path) -> None:
    inner = "And thus he said:\n" + "d" * 100 + "\n\n" + "A line far too long to be the name of anybody at all:\n"
    loaded = load_dataset(write_text(tmp_path, speech("A", "a", 650) + "B:\n" + inner + "b" * 650))
    assert loaded.key_names == ("A", "B")


def test_characters_of_the_test_part_only_are_unknown(tmp_path: Path) -> None:
    loaded = load_dataset(write_text(tmp_path, "ab" * 320 + "z" * 65))
    assert "z" not in loaded.class_names
    assert loaded.test_x.max() == loaded.classes - 1
    assert loaded.train_x.max() < loaded.classes - 1


def test_line_ends_and_byte_order_marks_make_no_difference(tmp_path: Path) -> None:
    text = speech("A", "a", 650) + speech("Ödön", "b", 650)
    plain = load_dataset(write_text(tmp_path, text))
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    other = load_dataset(str(path))
    assert other.class_names == plain.class_names
    assert other.key_names == plain.key_names == ("A", "Ödön")
    assert np.array_equal(other.train_x, plain.train_x)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 700), min_size=2, max_size=6))
def test_every_speaker_keeps_a_window_to_learn_from(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    text = "".join(speech(f"S{number}", "xy"[number % 2], length) for number, length in enumerate(lengths))
    path = write_text(tmp_path_factory.mktemp("text"), text)
    # An empty line ends every speech; the last one has the end of the file too.
    said = [length + 1 for length in lengths[:-1]] + [lengths[-1] + 2]
    if max(said) <= 2 * WINDOW:
        assert refusal(path).code == "too-short"
        return
    loaded = load_dataset(path)
    assert loaded.train_x.shape == loaded.train_y.shape
    assert loaded.test_x.shape == loaded.test_y.shape
    assert len(loaded.test_x) >= 1
    for part in (loaded.train_x, loaded.train_y, loaded.test_x, loaded.test_y):
        assert 0 <= part.min() <= part.max() < loaded.classes
    if loaded.train_keys is not None:
        assert set(loaded.train_keys) == set(range(len(loaded.key_names)))


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"", "empty", "is empty"),
        (b" \n \n", "empty", "is empty"),
        (b"\xff\xfe\x41", "unreadable", "not UTF-8"),
        (b"abc\0def" * 100, "unreadable", "zero bytes"),
        (b"x" * 128, "too-short", "it needs 129 characters"),
        (b"A:\n" + b"a" * 100 + b"\n\nB:\n" + b"b" * 100, "too-short", "a speaker needs 129"),
    ],
)
def test_refusals(tmp_path: Path, content: bytes, code: str, says: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    error = refusal(str(path))
    assert error.code == code
    assert says in error.message
    assert str(path) in error.message
