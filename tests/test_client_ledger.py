"""What a site remembers: one context per attempt, attempts only go up, and one process at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import context, honest_update, learning_app, send, train_content
from flwr.app import RecordDict

from quorsum import messages
from quorsum.client import seal
from quorsum.client.ledger import (
    FolderLedger,
    Ledger,
    StateLedger,
    earlier_attempt,
    recall,
    remember,
    take_attempt,
    take_round,
)
from quorsum.crypto.plain import PlainSite
from quorsum.crypto.suite import RoundContext
from quorsum.errors import CoordinatorFault, KeyMaterialError, Refusal
from quorsum.simulation.grid import LocalGrid

KEYS = tuple(f"{k:02x}" * 64 for k in range(5))
FIRST = replace(context(3), keys=KEYS, commitment="aa" * 32, rule="spectral")


def second(**changes: Any) -> RoundContext:
    return replace(FIRST, **({"attempt": 2, "commitment": "bb" * 32} | changes))


@pytest.fixture(params=["memory", "folder"])
def book(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    return StateLedger(RecordDict()) if request.param == "memory" else FolderLedger(tmp_path)


def code_of(step: Callable[[], object]) -> str:
    with pytest.raises(CoordinatorFault) as fault:
        step()
    return fault.value.code


def sealed(book: Ledger) -> None:
    take_round(book, FIRST)
    book.write_kept((b"rounded", b"integers"))
    remember(book, FIRST, b"state", (b"upload", b"more"))


# --- attempts ---


def test_attempt_at_the_round_taken_last_goes_on_from_its_state(book: Ledger) -> None:
    sealed(book)
    assert earlier_attempt(book, second()) == b"state"
    assert book.read_kept() == (b"rounded", b"integers")
    take_attempt(book, second())
    remember(book, second(), b"another", (b"other",))
    assert recall(book, second().digest().hex()) == (second(), b"another")
    assert book.read_upload() == (b"other",)
    third = second(attempt=3, commitment="cc" * 32)
    assert earlier_attempt(book, third) == b"another"
    assert book.read_kept() == (b"rounded", b"integers"), "all attempts seal what the first has rounded"


def test_looking_at_an_attempt_takes_nothing(book: Ledger) -> None:
    """Another one may still come, as long as nothing has been stored and so nothing has left."""
    sealed(book)
    earlier_attempt(book, second())
    assert recall(book, FIRST.digest().hex()) == (FIRST, b"state")
    assert earlier_attempt(book, second(commitment="dd" * 32)) == b"state"


def test_sites_may_be_left_out_and_attempts_skipped(book: Ledger) -> None:
    sealed(book)
    assert earlier_attempt(book, second(attempt=3, sites=FIRST.sites[1:4], keys=KEYS[1:4])) == b"state"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "the first attempt": ({"attempt": 1}, "replayed-attempt"),
    "a fourth attempt": ({"attempt": 4}, "too-many-attempts"),
    "another run": ({"run": "other"}, "wrong-round"),
    "the round before": ({"round": 2}, "wrong-round"),
    "the round after": ({"round": 4}, "wrong-round"),
    "another dimension": ({"dimension": 13}, "changed-round"),
    "another unit": ({"unit": 1.0000000000000002}, "changed-round"),
    "other clipping": ({"clip": True}, "changed-round"),
    "another model": ({"model": "ab" * 32}, "changed-round"),
    "another f": ({"tolerate": 0}, "changed-round"),
    "another tau": ({"collude": 2}, "changed-round"),
    "another rule": ({"rule": "mean"}, "changed-round"),
    "another reference": ({"reference": "site-01"}, "changed-round"),
    "more sketches": ({"sketches": 16}, "changed-round"),
    "a site more": ({"sites": (*FIRST.sites, "site-06"), "keys": (*KEYS, "ff" * 64)}, "wrong-roster"),
    "another site": ({"sites": (*FIRST.sites[:4], "site-06")}, "wrong-roster"),
    "another key": ({"keys": (*KEYS[:4], "ff" * 64)}, "wrong-roster"),
    "keys exchanged": ({"keys": KEYS[::-1]}, "wrong-roster"),
    "a key less": ({"keys": KEYS[:4]}, "wrong-roster"),
    "no keys": ({"keys": ()}, "wrong-roster"),
    "the nonce that was shown": ({"commitment": FIRST.commitment}, "same-commitment"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attempt_that_is_not_another_at_the_same_round_is_refused(book: Ledger, name: str) -> None:
    changes, code = REFUSED[name]
    sealed(book)
    assert code_of(lambda: earlier_attempt(book, second(**changes))) == code
    assert recall(book, FIRST.digest().hex()) == (FIRST, b"state"), "a refusal changes nothing"


def test_every_field_of_a_round_is_fixed_unless_it_is_named(book: Ledger) -> None:
    free = {"attempt", "sites", "keys", "commitment"}
    tried = {name for changes, _ in REFUSED.values() for name in changes}
    assert tried | free == set(vars(FIRST))


def test_attempt_before_any_round_is_refused(book: Ledger) -> None:
    assert code_of(lambda: earlier_attempt(book, second())) == "unknown-round"


def test_round_does_not_begin_with_a_later_attempt(book: Ledger) -> None:
    assert code_of(lambda: take_round(book, second())) == "no-earlier-attempt"
    take_round(book, FIRST)


def test_site_that_sealed_nothing_sits_the_round_out(book: Ledger) -> None:
    """Training failed, or the site was killed before the first attempt was stored."""
    take_round(book, FIRST)
    assert code_of(lambda: earlier_attempt(book, second())) == "no-earlier-attempt"


def test_site_killed_while_it_changed_attempts_sits_the_round_out(book: Ledger) -> None:
    sealed(book)
    take_attempt(book, second())
    book.write_upload((b"other",))
    assert code_of(lambda: earlier_attempt(book, second(attempt=3, commitment="cc" * 32))) == "no-earlier-attempt"
    assert recall(book, second().digest().hex()) == (second(), b"")


def test_first_attempt_is_over_when_the_second_is_taken(book: Ledger) -> None:
    sealed(book)
    take_attempt(book, second())
    remember(book, second(), b"another")
    assert code_of(lambda: recall(book, FIRST.digest().hex())) == "wrong-round"
    assert code_of(lambda: take_round(book, FIRST)) == "replayed-round"
    assert code_of(lambda: earlier_attempt(book, second())) == "replayed-attempt"
    assert code_of(lambda: earlier_attempt(book, second(commitment="cc" * 32))) == "replayed-attempt"


@pytest.mark.parametrize("name", ["kept.bin", "upload.bin"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: b"{",
        lambda whole: b"7\nrounded",
        lambda whole: b"\xff\n",
        lambda whole: b"[7, 8]\nroundedintegers",
        lambda whole: b'[[7, 8], "00"]\nroundedintegers',
        lambda whole: whole.replace(b"[[7,", b"[[7e99,").replace(b"[[6,", b"[[6e99,"),
        lambda whole: whole.replace(b"[[7,", b"[[-7, 14,").replace(b"[[6,", b"[[-6, 12,"),
        lambda whole: whole[:-1],
        lambda whole: whole + b"+",
        lambda whole: whole.replace(b"e", b"d", 1),
        lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
        lambda whole: whole.replace(b"[[7, 8]", b"[[8, 7]").replace(b"[[6, 4]", b"[[4, 6]"),
    ],
    ids=["empty", "cut in the line", "no list", "no text", "no digest", "another digest", "huge length",
         "negative length", "shorter", "longer", "digest",
         "one bit", "lengths exchanged"],
)  # fmt: skip
def test_damaged_blocks_are_named_and_not_used(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    book = FolderLedger(tmp_path)
    sealed(book)
    before = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(damage(before))
    with pytest.raises(KeyMaterialError, match=rf"{name} is not what this site wrote .* move the file away") as error:
        (book.read_kept if name == "kept.bin" else book.read_upload)()
    assert error.value.code == "ledger-damaged"


def test_what_was_never_kept_is_nothing(book: Ledger) -> None:
    assert book.read_kept() == ()
    assert book.read_upload() == ()


def test_kept_update_is_for_its_owner_only(tmp_path: Path) -> None:
    sealed(FolderLedger(tmp_path))
    assert (tmp_path / "kept.bin").stat().st_mode & 0o077 == 0


# --- one process at a time ---

HOLDER = """
import sys
from pathlib import Path
from quorsum.client.ledger import FolderLedger
with FolderLedger(Path(sys.argv[1])).hold():
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(home: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process of the site that is at work until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.communicate()


def test_second_process_of_a_site_is_refused_after_a_short_wait(tmp_path: Path) -> None:
    book = FolderLedger(tmp_path)
    with another_process(tmp_path):
        started = time.monotonic()
        with pytest.raises(Refusal) as refusal, book.hold():
            raise AssertionError
        assert 1.0 < time.monotonic() - started < 10.0
        assert refusal.value.code == "ledger-busy"
        assert str(tmp_path) not in refusal.value.message, "the coordinator reads it"
    with book.hold():
        sealed(book)


def test_process_that_is_killed_lets_the_ledger_go(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with FolderLedger(tmp_path).hold():
            pass


def test_ledger_is_held_for_one_message_at_a_time(tmp_path: Path) -> None:
    for _ in range(3):
        with FolderLedger(tmp_path).hold():
            pass
    with pytest.raises(RuntimeError), FolderLedger(tmp_path).hold():
        raise RuntimeError
    with FolderLedger(tmp_path).hold():
        pass


def test_home_that_takes_no_lock_is_refused(tmp_path: Path) -> None:
    book = FolderLedger(tmp_path)
    (tmp_path / "lock").mkdir()
    with pytest.raises(KeyMaterialError, match="quorsum-home"), book.hold():
        raise AssertionError


def test_node_whose_home_is_at_work_elsewhere_trains_and_answers_nothing(tmp_path: Path) -> None:
    trained: list[int] = []

    def learn(partition: int, number: int) -> np.ndarray:
        trained.append(number)
        return honest_update(partition, number)

    app = learning_app([seal(PlainSite(), home=tmp_path)], learn)
    question = messages.pack(messages.Question(context=context(1).digest().hex(), phase="gram"))
    with LocalGrid([app]) as grid:
        with another_process(tmp_path):
            for content in (train_content(1), question):
                fault, _ = messages.unpack(send(grid, content).content)
                assert isinstance(fault, messages.Fault)
                assert fault.code == "ledger-busy"
        assert trained == []
        reply, _ = messages.unpack(send(grid, train_content(1)).content)
        assert isinstance(reply, messages.Submission), "the round was not used up by the refusal"


TRAINER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from federation import honest_update, learning_app, send, train_content
from quorsum import messages
from quorsum.client import seal
from quorsum.crypto.plain import PlainSite
from quorsum.simulation.grid import LocalGrid

def learn(partition, number):
    print("training", flush=True)
    sys.stdin.readline()
    return honest_update(partition, number)

with LocalGrid([learning_app([seal(PlainSite(), home=Path(sys.argv[1]))], learn)]) as grid:
    print(messages.unpack(send(grid, train_content(1)).content)[0].kind, flush=True)
"""


def test_two_nodes_with_one_home_train_for_a_round_once(tmp_path: Path) -> None:
    """While one trains the other is refused; afterwards what the one has submitted is what the other sends."""
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path), os.path.dirname(__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n"
        with LocalGrid([learning_app([seal(PlainSite(), home=tmp_path)])]) as grid:
            busy, _ = messages.unpack(send(grid, train_content(1)).content)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "submission\n"
            assert process.wait() == 0
            late, _ = messages.unpack(send(grid, train_content(1)).content)
    assert isinstance(busy, messages.Fault)
    assert busy.code == "ledger-busy"
    assert isinstance(late, messages.Submission)
