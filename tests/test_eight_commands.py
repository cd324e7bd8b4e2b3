"""From nothing to a model in eight commands: a coordinator and three sites, real processes, TLS, sealed.

The same app, trained without any sealing in one process, shows what sealing costs in accuracy.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fleet_harness import until
from flwr.app import ArrayRecord, Context, Message
from process_federation import Federation, federation

from quorsum import arrays, bundles
from quorsum.client import seal
from quorsum.crypto import PlainCoordinator, PlainSite
from quorsum.server import QuorumStrategy
from quorsum.simulation.grid import Handler, LocalGrid

APP = Path(__file__).parent.parent / "examples" / "hospital"
SITES = ("north", "south", "west")
ROUNDS = 3
FLOOR = 0.9


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Federation]:
    with federation(tmp_path) as made:
        yield made


@pytest.fixture
def plainly_trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Model before and after, and accuracy, of the same app on the same data, in one process and in the clear."""
    monkeypatch.syspath_prepend(str(APP))
    client_app, task = (importlib.import_module(f"hospital.{name}") for name in ("client_app", "task"))
    config = dict(bundles.describe(bundles.build(APP)).config)

    def node() -> Handler:
        mod = seal(PlainSite())

        def handle(message: Message, context: Context) -> Message:
            context.run_config = config
            return mod(message, context, client_app.app)

        return handle

    shards = {shard: {"data-shard": shard} for shard in range(len(SITES))}
    with LocalGrid([node() for _ in SITES], node_configs=shards) as grid:
        # Sealed sites clip, so these do.
        strategy = QuorumStrategy(PlainCoordinator(), rule="mean", tolerate=0, clip=True)
        model = ArrayRecord(task.new_model().state_dict())
        result = strategy.start(grid, model, num_rounds=ROUNDS)
    yield arrays.flatten(model), arrays.flatten(result.arrays), result.rounds[-1].metrics["accuracy"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "hospital"]:
        del sys.modules[name]


def test_three_sites_train_sealed_after_eight_commands_and_one_string_each(
    lab: Federation, plainly_trained: tuple[np.ndarray, np.ndarray, float], tmp_path: Path
) -> None:
    lab.init()
    lab.start_coordinator()
    lab.enroll(SITES, APP, {name: ("--set", f"data-shard={shard}") for shard, name in enumerate(SITES)})
    run = lab.run(APP, tmp_path / "out", **{"num-server-rounds": ROUNDS})
    try:
        assert run.process.wait(240) == 0, lab.logs()
    except subprocess.TimeoutExpired:
        raise AssertionError(lab.logs()) from None

    assert len(lab.typed) == 8, lab.typed
    assert [line.split()[:2] for line in lab.typed] == [
        ["coordinator", "init"], ["coordinator", "start"], ["coordinator", "invite"],
        *[["site", "enroll"]] * 3, ["coordinator", "approve"], ["run", str(APP)],
    ]  # fmt: skip
    # The string is the only thing that is carried to a site, and it went in by a pipe.
    assert not any("qsum1-" in line for line in lab.typed)

    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["state"] == "finished"
    assert result["rounds_finished"] == result["rounds_played"] == ROUNDS
    assert all(record["accepted"] == list(SITES) and not record["codes"] for record in result["rounds"])
    start, expected, accuracy = plainly_trained
    assert result["metrics"]["accuracy"] > FLOOR
    assert abs(result["metrics"]["accuracy"] - accuracy) < 0.02
    with np.load(tmp_path / "out" / "model.npz") as model:
        trained = np.concatenate([model[name].ravel() for name in model.files])
    # Not the same model: what masks leave behind, and the length to which sites clip, which sketches have measured.
    assert np.linalg.norm(trained - expected) < 0.1 * np.linalg.norm(expected - start)

    # Sealed, by the word of every site: none is told to take small models, none has another suite.
    for name in SITES:
        shown = json.loads(lab.type("site", "status", "--home", lab.home(name), "--json").stdout)
        assert (shown["suite"], shown["accept_small_models"], shown["refusals"]) == ("sealed", False, [])
        assert [taken["phase"] for taken in shown["rounds"]] == ["sum"] * ROUNDS
    until(lambda: lab.status()["run"] is None)
