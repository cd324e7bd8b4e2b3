"""What is kept of a run: a commit counts whole or not at all, and an open round comes back as it was."""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from quorsum import durable
from quorsum.aggregation.reputation import Reputation, Standing
from quorsum.aggregation.sybils import Similarity
from quorsum.errors import Refusal, SiteFault
from quorsum.server.checkpoint import FolderRun, NoRun, RunState, Said
from quorsum.server.gate import COORDINATOR, Gate, Watched, watched
from quorsum.server.records import RoundRecord

MODEL = ArrayRecord({"layer/weight": Array(np.arange(6, dtype=np.float32).reshape(2, 3)), "n": Array(np.array(7))})
RECORD = RoundRecord(
    round=1,
    invited=("a", "b", "c"),
    accepted=("a", "b"),
    rejected=("c",),
    reasons={"c": "left out"},
    codes={"c": "rule"},
    weights={"a": 0.5, "b": 0.5},
    notes=("a note",),
    failed=None,
    unit=1.25,
    seconds={"total": 0.5},
    bytes={"up_per_site": 10.0},
    metrics={"accuracy": 0.1 + 0.2},
)
STATE = RunState("ab" * 16, 1, 3, 2, 0.1 + 0.2, 4, MODEL, (RECORD, RECORD))


def same(one: RunState | None, other: RunState) -> bool:
    assert one is not None
    return (
        replace(one, model=other.model) == other
        and list(one.model) == list(other.model)
        and all(
            a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.numpy(), b.numpy())
            for a, b in zip(one.model.values(), other.model.values(), strict=True)
        )
    )


def test_a_run_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    assert FolderRun(tmp_path / "run").load() is None
    FolderRun(tmp_path / "run").commit(STATE)
    assert same(FolderRun(tmp_path / "run").load(), STATE)


def test_a_run_of_an_earlier_version_goes_on_with_a_clean_record(tmp_path: Path) -> None:
    FolderRun(tmp_path / "run").commit(STATE)
    path = tmp_path / "run" / "state.npz"
    with np.load(path) as parts:
        kept = dict(parts)
    head = json.loads(kept.pop("head").tobytes())
    for name in ("norms", "reputation", "watched"):
        del head[name]
    for record in head["records"]:
        del record["quarantined"]
    np.savez(path, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **kept)
    state = FolderRun(tmp_path / "run").load()
    assert same(state, STATE)
    assert state is not None
    assert (state.norms, state.reputation, state.watched) == ((), Reputation(), Watched())


def test_what_is_remembered_over_rounds_comes_back(tmp_path: Path) -> None:
    reputation = Reputation({"a": Standing(0.1 + 0.2, 1, 9, "left out")}, 7, Similarity({("a", "b"): (1 / 3, 4)}))
    memory = watched(Watched(), {COORDINATOR: {"accuracy": 1 / 3}, "a": {"accuracy": 0.5}}, Gate())
    state = replace(STATE, norms=(0.1, 1 / 3), reputation=reputation, watched=memory)
    FolderRun(tmp_path / "run").commit(state)
    assert same(FolderRun(tmp_path / "run").load(), state)


def test_only_the_owner_reads_it(tmp_path: Path) -> None:
    FolderRun(tmp_path / "run").commit(STATE)
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "run" / "state.npz").stat().st_mode) == 0o600


def test_a_full_disk_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FolderRun(tmp_path / "run")
    run.commit(STATE)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.commit(replace(STATE, number=4))
    monkeypatch.undo()
    assert same(run.load(), STATE)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["state.npz"]


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_state_is_refused_by_name(tmp_path: Path, damage: bytes | None) -> None:
    FolderRun(tmp_path).commit(STATE)
    path = tmp_path / "state.npz"
    path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
    with pytest.raises(Refusal, match=r"state\.npz cannot be read") as caught:
        FolderRun(tmp_path).load()
    assert caught.value.code == "checkpoint-damaged"


def test_an_open_round_comes_back(tmp_path: Path) -> None:
    opened = FolderRun(tmp_path).round(4)
    seed = opened.seed(os.urandom)
    assert opened.roster() is None
    opened.begin({"a": ("id", b"key"), "b": ("", b"")})
    log = opened.exchange(0)
    assert log is not None
    said = [
        Said("site/ä" * 20, '{"head": 1}', (b"", b"abc", bytes(1000))),
        Said("b", "", fault=SiteFault("b", "late", "no answer within 3 s", proven=False)),
        Said("c", "{}"),
    ]
    for one in said:
        log.add(one)

    again = FolderRun(tmp_path).round(4)
    assert again.roster() == {"a": ("id", b"key"), "b": ("", b"")}
    assert again.seed(os.urandom) == seed
    kept = again.exchange(0)
    assert kept is not None
    back = list(kept.said())
    assert [(one.site, one.header, one.blocks) for one in back] == [(one.site, one.header, one.blocks) for one in said]
    fault = back[1].fault
    assert fault is not None
    assert (fault.site, fault.code, fault.message, fault.proven) == ("b", "late", "no answer within 3 s", False)
    assert not kept.finished()
    kept.add(Said("d", "{}"))
    kept.finish()
    over = FolderRun(tmp_path).round(4).exchange(0)
    assert over is not None
    assert over.finished()
    assert [one.site for one in over.said()] == [*(one.site for one in said), "d"]


def test_a_commit_forgets_the_rounds_that_are_over_and_keeps_the_open_one(tmp_path: Path) -> None:
    run = FolderRun(tmp_path)
    for number in (3, 4):
        run.round(number).seed(os.urandom)
    run.commit(STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000004", "state.npz"]


@pytest.mark.parametrize("name", ["exchange-000/reply-00000.bin", "roster.bin"])
@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b"\xff" + b, lambda b: b"[7, []]\n", lambda b: b"7\n"]
)
def test_damage_in_an_open_round_is_refused(tmp_path: Path, name: str, damage: object) -> None:
    opened = FolderRun(tmp_path).round(1)
    opened.begin({"a": ("id", b"key")})
    log = opened.exchange(0)
    assert log is not None
    log.add(Said("a", "{}", (b"abc",)))
    path = tmp_path / "round-000001" / name
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(Refusal, match="cannot be read"):
        opened.roster() if name == "roster.bin" else list(log.said())


def test_a_short_seed_is_refused(tmp_path: Path) -> None:
    opened = FolderRun(tmp_path).round(1)
    opened.seed(os.urandom)
    (tmp_path / "round-000001" / "seed").write_bytes(b"short")
    with pytest.raises(Refusal, match="5 bytes instead of 32"):
        opened.seed(os.urandom)


def test_without_a_folder_nothing_is_kept() -> None:
    run = NoRun()
    run.commit(STATE)
    assert run.load() is None
    opened = run.round(1)
    opened.begin({})
    assert (opened.roster(), opened.exchange(0)) == (None, None)
    assert opened.seed(os.urandom) != opened.seed(os.urandom)


def test_replacing_a_file_needs_no_other_name_afterwards(tmp_path: Path) -> None:
    durable.replace_file(tmp_path / "x", [b"one", memoryview(b"two")])
    durable.replace_file(tmp_path / "x", [b"three"])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"three")]
