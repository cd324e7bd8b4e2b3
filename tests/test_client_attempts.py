"""A site is asked to seal again: no training, no app, the same integers, and only as long as it has signed nothing."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import SITES, context, honest_update, learning_app, model, send
from flwr.app import ConfigRecord, RecordDict
from sealed_federation import identity

from quorsum import messages
from quorsum.client import seal
from quorsum.client.keys import load_identity
from quorsum.client.ledger import FolderLedger
from quorsum.crypto import Identity, SealedSite, field
from quorsum.crypto.plain import PlainSite
from quorsum.crypto.suite import Blocks, RoundContext
from quorsum.selection import select
from quorsum.simulation.grid import LocalGrid

SITE = SealedSite(identity(1), select, accept_small_models=True)


def sealed_context(number: int = 1, own: Identity | None = None, **changes: Any) -> RoundContext:
    keys = [(own or identity(1)) if k == 1 else identity(k) for k in range(1, 6)]
    fields: dict[str, Any] = {
        "clip": True,
        "rule": "multi-krum",
        "keys": tuple(one.public().to_bytes().hex() for one in keys),
        "commitment": "aa" * 32,
    }
    return context(number, **(fields | changes))


def train(about: RoundContext, suite: str = SITE.name) -> RecordDict:
    users = RecordDict({"arrays": model(), "config": ConfigRecord({"server-round": about.round})})
    return messages.pack(messages.Train(site="site-01", suite=suite, context=messages.Context.of(about)), beside=users)


def again(about: RoundContext, suite: str = SITE.name, **changes: Any) -> RecordDict:
    about = replace(about, **({"attempt": 2, "commitment": "bb" * 32} | changes))
    return messages.pack(messages.Again(site="site-01", suite=suite, context=messages.Context.of(about)))


def answered(grid: LocalGrid, content: RecordDict) -> tuple[messages.Submission, Blocks]:
    message, blocks = messages.unpack(send(grid, content).content)
    assert isinstance(message, messages.Submission), message
    return message, blocks


def refused(grid: LocalGrid, content: RecordDict) -> messages.Fault:
    message, blocks = messages.unpack(send(grid, content).content)
    assert isinstance(message, messages.Fault), message
    assert blocks == ()
    return message


@pytest.fixture(params=["memory", "folder"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[LocalGrid, list[int]]]:
    """A site, and the rounds that its app was called for."""
    calls: list[int] = []

    def learn(partition: int, number: int) -> np.ndarray:
        calls.append(number)
        return honest_update(partition, number)

    home = tmp_path if request.param == "folder" else None
    with LocalGrid([learning_app([seal(SITE, home=home, share_metrics=["train_loss"])], learn)]) as grid:
        yield grid, calls


def test_site_seals_again_without_training_again(trained: tuple[LocalGrid, list[int]]) -> None:
    grid, calls = trained
    about = sealed_context()
    first, blocks = answered(grid, train(about))
    assert (first.examples, first.metrics) == (100, {"train_loss": 0.25})
    second, other = answered(grid, again(about))
    assert second.context == replace(about, attempt=2, commitment="bb" * 32).digest().hex()
    assert (second.examples, second.metrics, second.train_seconds) == (0, {}, 0.0)
    third, last = answered(grid, again(about, attempt=3, commitment="cc" * 32))
    assert len({first.context, second.context, third.context}) == 3
    assert calls == [1], "the app is called once per round"
    assert [len(block) for block in blocks] == [len(block) for block in other]
    assert not set(other) & (set(blocks) | set(last))
    # The masks have nothing in common either: a difference is uniform.
    a, b = (field.from_bytes(sent[2]) for sent in (blocks, other))
    assert np.abs(field.centred(field.sub(a, b)).astype(np.float64)).mean() > field.P / 5


def test_next_round_follows_any_attempt(trained: tuple[LocalGrid, list[int]]) -> None:
    grid, calls = trained
    answered(grid, train(sealed_context(1)))
    answered(grid, again(sealed_context(1), attempt=3))
    assert refused(grid, train(sealed_context(1))).code == "replayed-round"
    answered(grid, train(sealed_context(2)))
    assert refused(grid, again(sealed_context(1))).code == "wrong-round"
    answered(grid, again(sealed_context(2)))
    assert calls == [1, 2]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"attempt": 1}, "replayed-attempt"),
        ({"attempt": 4}, "too-many-attempts"),
        ({"unit": 2.0}, "changed-round"),
        ({"model": "ab" * 32}, "changed-round"),
        ({"rule": "mean"}, "changed-round"),
        ({"sites": SITES[1:]}, "wrong-roster"),
        ({"sites": SITES[::-1]}, "wrong-roster"),
        ({"sites": SITES[:2], "tolerate": 0}, "too-few-sites"),
        ({"tolerate": 3}, "wrong-bound"),
        ({"commitment": "aa" * 32}, "same-commitment"),
    ],
)
def test_coordinator_that_changes_the_round_gets_nothing(
    trained: tuple[LocalGrid, list[int]], changes: dict[str, Any], code: str
) -> None:
    grid, _ = trained
    answered(grid, train(sealed_context()))
    assert refused(grid, again(sealed_context(), **changes)).code == code
    answered(grid, again(sealed_context()))


def test_smaller_roster_must_still_hold_the_bounds(trained: tuple[LocalGrid, list[int]]) -> None:
    grid, _ = trained
    about = sealed_context()
    answered(grid, train(about))
    assert refused(grid, again(about, sites=SITES[:4], keys=about.keys[:4])).code == "wrong-bound"
    # Nothing was sealed for the attempt that was refused, so that it is not used up.
    answered(grid, again(about))


def test_no_attempt_before_or_without_the_first(trained: tuple[LocalGrid, list[int]]) -> None:
    grid, calls = trained
    assert refused(grid, again(sealed_context())).code == "unknown-round"
    later = replace(sealed_context(), attempt=2)
    assert refused(grid, train(later)).code == "no-earlier-attempt"
    assert refused(grid, again(sealed_context(), "plain/v1")).code == "wrong-suite"
    assert calls == []


def test_site_whose_training_failed_sits_the_round_out() -> None:
    def learn(partition: int, number: int) -> np.ndarray:
        raise RuntimeError

    with LocalGrid([learning_app([seal(SITE)], learn)]) as grid:
        assert refused(grid, train(sealed_context())).code == "training-failed"
        assert refused(grid, again(sealed_context())).code == "no-earlier-attempt"


def test_suite_with_one_attempt_seals_once() -> None:
    with LocalGrid([learning_app([seal(PlainSite())])]) as grid:
        answered(grid, train(context(), "plain/v1"))
        assert refused(grid, again(context(), "plain/v1")).code in {"one-attempt", "no-earlier-attempt"}


def test_site_restarted_before_every_message_goes_on(tmp_path: Path) -> None:
    """Nothing but the folder is left: another process, another mod, keys and records read from the disk."""
    own = load_identity(tmp_path)
    about = sealed_context(own=own)

    def started(content: RecordDict) -> messages.AnyMessage:
        suite = SealedSite(load_identity(tmp_path), select, accept_small_models=True)
        with LocalGrid([learning_app([seal(suite, home=tmp_path)])]) as grid:
            return messages.unpack(send(grid, content).content)[0]

    assert started(train(about)).kind == "submission"
    assert started(again(about)).kind == "submission"
    for content, code in [
        (train(about), "replayed-round"),
        (again(about, commitment="cc" * 32), "replayed-attempt"),
        (messages.pack(messages.Question(context=about.digest().hex(), phase="root")), "wrong-round"),
    ]:
        fault = started(content)
        assert isinstance(fault, messages.Fault)
        assert fault.code == code
    assert started(again(about)).kind == "submission", "the very same, once more"
    assert started(again(about, attempt=3, commitment="cc" * 32)).kind == "submission"


@pytest.mark.parametrize("name", ["kept.bin", "ledger.json"])
def test_site_that_lost_its_record_sits_out(tmp_path: Path, name: str) -> None:
    with LocalGrid([learning_app([seal(SITE, home=tmp_path)])]) as grid:
        answered(grid, train(sealed_context()))
        (tmp_path / name).unlink()
        fault = refused(grid, again(sealed_context()))
        assert fault.code == ("ledger-damaged" if name == "kept.bin" else "unknown-round")
        assert str(tmp_path) not in fault.message


def test_kept_integers_of_another_round_are_not_sealed(tmp_path: Path) -> None:
    with LocalGrid([learning_app([seal(SITE, home=tmp_path)])]) as grid:
        answered(grid, train(sealed_context(1)))
        old = (tmp_path / "kept.bin").read_bytes()
        answered(grid, train(sealed_context(2)))
        (tmp_path / "kept.bin").write_bytes(old)
        assert refused(grid, again(sealed_context(2))).code == "ledger-damaged"


def test_sealing_takes_less_memory_than_six_updates(tmp_path: Path) -> None:
    """The update itself, its integers, the upload and what is kept, which is written before the upload is made."""
    size = 4_000_000
    about, book = replace(sealed_context(), dimension=size), FolderLedger(tmp_path)
    later = replace(about, attempt=2, commitment="bb" * 32)
    tracemalloc.start()
    update = np.full(size, 1e-4, np.float32)
    state = SITE.seal(about, update, os.urandom, book.write_kept)[0]
    first = tracemalloc.get_traced_memory()[1]
    del update
    tracemalloc.reset_peak()
    SITE.reseal(later, state, book.read_kept(), os.urandom)
    second = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first < 5 * 4 * size, f"{first / (4 * size):.2f} times the update"
    assert second < 5 * 4 * size, f"{second / (4 * size):.2f} times the update"
