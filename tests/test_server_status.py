"""What the process says of itself, and what people see of it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from enrollment_federation import Coordinator, Liar
from rich.console import Console

from quorsum.errors import SiteFault
from quorsum.server import status
from quorsum.server.records import RoundRecord
from quorsum.server.status import BUCKETS, Board, Histogram


def record(number: int, *, failed: str | None = None) -> RoundRecord:
    return RoundRecord(
        round=number, invited=("a", "b", "c"), accepted=("a", "b"), rejected=("c",), reasons={"c": "came late"},
        codes={"c": "late"}, weights={"a": 0.5, "b": 0.5}, notes=(), failed=failed, unit=1.0, seconds={"total": 2.0},
        bytes={"up_per_site": 10.0, "down_per_site": 20.0}, metrics={"accuracy": 0.5 + number / 10},
    )  # fmt: skip


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator(tmp_path / "home")
    yield made
    made.stop()


def board_of(coordinator: Coordinator) -> Board:
    return Board(coordinator.home / "status.json", "lab")


def shown(seen: dict[str, Any]) -> str:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(status.table(seen, time.time(), Path("elsewhere")))
    return console.export_text()


def test_the_file_is_private_whole_and_written_once_a_second(tmp_path: Path) -> None:
    board = Board(tmp_path / "status.json", "lab")
    board.listens(fleet="localhost:7403")
    board.write()
    first = status.read(tmp_path / "status.json")
    assert first is not None
    assert (first["pid"], first["listeners"]) == (os.getpid(), {"fleet": "localhost:7403"})
    assert stat.S_IMODE((tmp_path / "status.json").stat().st_mode) == 0o600
    board.listens(members="localhost:7402")
    board.write()
    assert status.read(tmp_path / "status.json") == first
    board.write(now=True)
    assert status.read(tmp_path / "status.json") != first


def test_a_run_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    board = Board(tmp_path / "status.json", "lab")
    assert board.snapshot()["run"] is None
    board.begin_run(4, "lab/app 1.0.0")
    board.waiting(["c"])
    board.left_out(SiteFault("c", "bundle-not-allowed", "does not allow the bundle"))
    run = board.snapshot()["run"]
    assert (run["id"], run["phase"], run["waiting"]) == (4, "waiting", ["c"])
    assert run["left_out"] == {"c": "does not allow the bundle (bundle-not-allowed)"}
    board.waiting([])
    board.phase(1, "train")
    board.phase(1, "geometry")
    assert board.snapshot()["run"]["phase"] == "geometry"
    board.round(record(1))
    board.phase(2, "train")
    board.round(record(2, failed="too few"))
    assert board.snapshot()["run"]["left_out"] == {}
    board.trouble("the disk is full")
    assert board.snapshot()["run"]["trouble"] == "the disk is full"
    board.end_run()
    assert board.snapshot()["run"] is None
    tally = board.counted()
    assert tally.rounds == {"finished": 1, "failed": 1}
    assert (tally.up, tally.down) == (60.0, 120.0)
    assert tally.refusals == {"bundle-not-allowed": 1, "late": 2}
    assert {phase: sum(h.counts) for phase, h in tally.phases.items()} == {"train": 2, "geometry": 1}


def test_who_was_seen_when_outlives_the_process(tmp_path: Path) -> None:
    first = Board(tmp_path / "status.json", "lab")
    first.online({"a": True, "b": False})
    first.write(now=True)
    second = Board(tmp_path / "status.json", "lab")
    second.online({"a": False, "b": False})
    assert set(second.snapshot()["last_seen"]) == {"a"}
    assert second.counted().online == 0


def test_durations_fall_into_classes() -> None:
    histogram = Histogram()
    for seconds in (0.05, 0.1, 0.11, 8000.0):
        histogram.add(seconds)
    assert histogram.counts[:2] == [2, 1]
    assert histogram.counts[-1] == 1
    assert len(histogram.counts) == len(BUCKETS) + 1
    assert histogram.total == pytest.approx(8000.26)


def test_a_process_that_is_gone_or_silent_is_said() -> None:
    now = time.time()
    here = {"pid": os.getpid(), "updated": now, "started": now}
    assert status.alive(None, now) == (False, "the coordinator has not been started here")
    assert status.alive(here, now)[0]
    lives, sentence = status.alive({**here, "updated": now - 60}, now)
    assert not lives
    assert "not said anything" in sentence
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lives, sentence = status.alive({**here, "pid": gone.pid}, now)
    assert not lives
    assert "not running; it was last seen" in sentence


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 2}'])
def test_a_file_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    assert status.read(tmp_path / "status.json") is None


def test_the_view_of_a_federation(coordinator: Coordinator) -> None:
    for name in ("a", "b"):
        invitation = coordinator.invite(name)
        Liar(site=name).present(coordinator, invitation.secret)
    coordinator.approve("a")
    store, board = coordinator.store, board_of(coordinator)
    assert "no run has been asked for" in shown(status.view(store, None, "lab", time.time()))
    number = store.queue_run("lab/app 1.0.0", b"bundle", "{}", time.time())
    store.queue_run("lab/next 1.0.0", b"bundle", "{}", time.time())
    store.set_run_state(number, "running", time.time())
    for one in (record(1), record(2)):
        store.append_round(number, one.round, json.dumps(asdict(one)), time.time())
    board.listens(fleet="localhost:7403")
    board.online({"a": True})
    board.begin_run(number, "lab/app 1.0.0")
    board.phase(3, "gram")
    board.waiting(["c"])
    board.left_out(SiteFault("c", "wrong-key", "has another key"))
    board.trouble("the disk is full")
    seen = status.view(store, board.snapshot(), "lab", time.time())
    json.dumps(seen, allow_nan=False)
    assert seen["running"]
    states = {
        site["site"]: (site["state"], site["online"], site["accepted"], site["rejected"]) for site in seen["sites"]
    }
    assert states == {"a": ("approved", True, 2, 0), "b": ("pending", None, 2, 0)}
    run = seen["run"]
    assert (run["id"], run["state"], run["rounds_played"], run["round"]) == (number, "running", 2, 3)
    assert run["metrics"] == {"accuracy": 0.7}
    assert [(r["round"], r["site"], r["code"]) for r in seen["refusals"]] == [(1, "c", "late"), (2, "c", "late")]
    text = shown(seen)
    for part in (
        "localhost:7403", "round 3, interrupted", "waits for c; there: quorsum site start", "has another key",
        "the disk is full", "accuracy 0.7", "1 more queued", "round 2: c: came late (late)",
    ):  # fmt: skip
        assert part in text
    # What the process said last is worth nothing when it is gone; what is in the state is.
    gone = status.view(store, {**board.snapshot(), "updated": 0.0}, "lab", time.time())
    assert not gone["running"]
    assert gone["run"]["phase"] == ""
    assert gone["sites"][0]["online"] is None
    assert gone["sites"][0]["last_seen"] is not None
