"""A text to learn from character by character: windows of 64 characters, each with the characters that follow.

A line ``NAME:`` after an empty line (or at the start) begins a speech, as in a play; what a speaker says in all
speeches is one stream of characters, and the speaker is the natural key of its windows. A text in which fewer than two
speakers are found is one stream, without keys.

Source of the task: next-character prediction on Shakespeare by speaking role, McMahan et al. (2017),
"Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from quorsum.errors import DataError
from quorsum.simulation.dataset import Dataset, LabelArray

__all__ = ["WINDOW", "load_text"]

WINDOW = 64
"""T, characters per window."""

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What stands for every character that the training part does not hold."""

# Longer ones are sentences that end in a colon.
_SPEAKER = re.compile(r"[^\W\d_][^\n:]{0,39}:")
_TEST_SHARE = 10


def load_text(path: Path) -> Dataset:
    """Read a text and cut it into windows.

    The last tenth of each speaker's windows are test windows (none where a speaker has only one). The vocabulary is
    made of the training windows alone.

    Args:
        path: UTF-8 text, with or without a byte order mark.

    Returns:
        A data set of kind ``"text"``, in the order of the speakers' names and, within, of the text.

    Raises:
        DataError: the file is not UTF-8 text, or too short to learn from.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("unreadable", f"{path}: is not UTF-8 text; save it as plain text in UTF-8") from error
    if "\0" in text:
        raise DataError("unreadable", f"{path}: holds zero bytes, so it is no text; save it as plain text in UTF-8")
    if not text.strip():
        raise DataError("empty", f"{path}: is empty; expected text to learn from")
    before, speeches = _by_speaker(text)
    notes = []
    if len(speeches) < 2:
        speeches = {"": text}
        notes.append("no two speakers were found (lines NAME: after an empty line): taken as one text")
    elif before.strip():
        notes.append(f"{len(before)} characters before the first speaker: left out")
    # One window is WINDOW inputs, and the character after the last one to foretell.
    counts = {name: max(len(said) - 1, 0) // WINDOW for name, said in speeches.items()}
    short = [name for name, windows in counts.items() if windows == 0]
    if short:
        notes.append(f"{len(short)} of {len(speeches)} speakers say less than {WINDOW + 1} characters: left out")
    kept = sorted(name for name, windows in counts.items() if windows)
    held_out = {name: -(-counts[name] // _TEST_SHARE) if counts[name] > 1 else 0 for name in kept}
    if sum(held_out.values()) == 0:
        who = "a speaker" if len(speeches) > 1 else "it"
        raise DataError(
            "too-short",
            f"{path}: is too short: {who} needs {2 * WINDOW + 1} characters, a window to learn from and one to test "
            "with; give a longer text",
        )
    return _dataset(path.name, {name: speeches[name] for name in kept}, counts, held_out, notes)


def _by_speaker(text: str) -> tuple[str, dict[str, str]]:
    """What stands before the first speaker, and what each one says; lines between speeches stay, names do not."""
    before: list[str] = []
    said: dict[str, list[str]] = {}
    lines = before
    after_gap = True
    for line in text.split("\n"):
        if after_gap and _SPEAKER.fullmatch(line.rstrip()):
            lines = said.setdefault(line.rstrip()[:-1], [])
        else:
            lines.append(line)
        after_gap = not line.strip()
    return "\n".join(before), {name: "\n".join(parts) for name, parts in said.items()}


def _dataset(
    name: str, speeches: dict[str, str], counts: dict[str, int], held_out: dict[str, int], notes: list[str]
) -> Dataset:
    learnt = {who: WINDOW * (counts[who] - held_out[who]) for who in speeches}
    # The character that a training window ends by foretelling is seen in training too.
    characters = sorted({c for who, said in speeches.items() for c in said[: learnt[who] + 1]} - {UNKNOWN})
    code = {character: number for number, character in enumerate(characters)}
    train: list[tuple[LabelArray, LabelArray]] = []
    test: list[tuple[LabelArray, LabelArray]] = []
    for who, said in speeches.items():
        tokens = np.fromiter((code.get(c, len(code)) for c in said), dtype=np.int64, count=len(said))
        span = WINDOW * counts[who]
        x, y = tokens[:span].reshape(-1, WINDOW), tokens[1 : span + 1].reshape(-1, WINDOW)
        rows = counts[who] - held_out[who]
        train.append((x[:rows], y[:rows]))
        test.append((x[rows:], y[rows:]))
    by_key = [len(x) for x, _ in train]
    named = len(speeches) > 1
    return Dataset(
        name=name,
        train_x=np.concatenate([x for x, _ in train]),
        train_y=np.concatenate([y for _, y in train]),
        test_x=np.concatenate([x for x, _ in test]),
        test_y=np.concatenate([y for _, y in test]),
        class_names=(*characters, UNKNOWN),
        notes=tuple(notes),
        kind="text",
        train_keys=np.repeat(np.arange(len(by_key)), by_key).astype(np.int64) if named else None,
        key_names=tuple(speeches) if named else (),
    )
