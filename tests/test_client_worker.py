"""The worker: only allowed bundles run, always behind the sealing mod of the installation."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import model, train_content
from fleet_harness import APP, Fleet, app_folder, running, until
from flwr.app import Array, ArrayRecord, Message, RecordDict

from quorsum import bundles, flower, messages
from quorsum.client.mod import seal
from quorsum.client.worker import Worker
from quorsum.crypto import PlainSite
from quorsum.server import QuorumStrategy

CONFIG = {"partition-id": 0, "num-partitions": 3, "site-name": "site-01"}


class Bench:
    """A worker with an app, and messages for it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.allowed: set[str] = set()
        options = {"sealing": seal(PlainSite(), home=folder / "home"), **options}
        self.worker = Worker(folder / "home", lambda: self.allowed, CONFIG, **options)
        self.run = flower.Run.create_empty(run_id=7)
        flower.become_coordinator(self.run)

    def app(self, *, allow: bool = True, **options: Any) -> bytes:
        bundle = bundles.build(app_folder(self.folder / f"app{len(list(self.folder.iterdir()))}", **options))
        if allow:
            self.allowed.add(bundles.digest(bundle))
        return bundle

    def send(self, bundle: bytes, content: RecordDict | None = None, kind: str = "train", node: int = 5) -> Message:
        message = Message(train_content() if content is None else content, node, kind)
        message.metadata.__dict__["_message_id"] = "question"
        return self.worker.handle(message, bundle, self.run)

    def fault(self, *arguments: Any, **options: Any) -> messages.Fault:
        answer, _ = messages.unpack(self.send(*arguments, **options).content)
        assert isinstance(answer, messages.Fault), answer
        return answer


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def submitted(reply: Message) -> messages.Submission:
    answer, _ = messages.unpack(reply.content)
    assert isinstance(answer, messages.Submission), answer
    return answer


def evaluation() -> RecordDict:
    return RecordDict({"arrays": model()})


@pytest.mark.parametrize("sealed", [False, True])
def test_an_app_is_sealed_whether_it_names_the_mod_or_not(bench: Bench, sealed: bool) -> None:
    reply = bench.send(bench.app(sealed=sealed))
    assert submitted(reply).examples == 10
    assert set(reply.content) <= {messages.HEADER, messages.BLOCKS}


def test_an_evaluation_goes_through(bench: Bench) -> None:
    reply = bench.send(bench.app(), evaluation(), "evaluate")
    assert reply.content.metric_records["metrics"]["accuracy"] == 0.75


def test_a_plain_message_to_train_is_refused(bench: Bench) -> None:
    assert bench.fault(bench.app(), evaluation()).code == "not-sealed"


def test_a_mod_that_the_app_brings_cannot_say_what_leaves(bench: Bench) -> None:
    mods = "mods=[seal(share_metrics=['loss'], minimum_sites=1)]"
    code = APP.format(mods=mods, imports="from quorsum.client import seal").replace(
        '{"num-examples": 10}', '{"num-examples": 10, "loss": 0.5}'
    )
    assert submitted(bench.send(bench.app(code=code))).metrics == {}


def test_a_bundle_that_is_not_allowed_does_not_run(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bundle = bench.app(allow=False, code="raise SystemExit\n")
    fault = bench.fault(bundle)
    assert fault.code == "bundle-not-allowed"
    assert bundles.digest(bundle) in fault.message
    typed = f"quorsum site allow {bundles.digest(bundle)}"
    assert fault.message.endswith(typed)
    # Where the site's folder is is for its own log.
    assert f"if it may run here: {typed} --home {bench.folder / 'home'}" in caplog.text
    assert str(bench.folder) not in fault.message
    assert not (bench.folder / "home" / "apps").exists()
    bench.allowed.add(bundles.digest(bundle))
    assert bench.fault(bundle).code == "training-failed"
    bench.allowed.clear()
    assert bench.fault(bundle).code == "bundle-not-allowed"


def test_one_byte_more_is_another_bundle(bench: Bench) -> None:
    assert bench.fault(bench.app() + b"x").code == "bundle-not-allowed"


@pytest.mark.parametrize("name", ["quorsum", "numpy", "flwr", "torch"])
def test_a_bundle_with_an_installed_name_does_not_run(bench: Bench, name: str) -> None:
    buffer = io.BytesIO(bench.app())
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(f"{name}/__init__.py", "raise SystemExit")
    bench.allowed.add(bundles.digest(buffer.getvalue()))
    fault = bench.fault(buffer.getvalue())
    assert (fault.code, "installed package" in fault.message) == ("bundle-unusable", True)


def test_what_is_allowed_and_no_bundle_does_not_run(bench: Bench) -> None:
    bench.allowed.add(bundles.digest(b"nothing"))
    assert bench.fault(b"nothing").code == "not-a-bundle"


def test_an_app_without_a_site_does_not_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bench.app()
    told = bundles.describe(bundle)
    without = bundles.Description(told.name, told.version, {"serverapp": "a:b"}, {})
    monkeypatch.setattr(bundles, "describe", lambda _: without)
    assert bench.fault(bundle).message == "the bundle has no clientapp"


def test_settings_that_the_app_does_not_have_are_refused(bench: Bench) -> None:
    bench.run.override_config = {"speed": 3}
    assert bench.fault(bench.app()).code == "unknown-setting"


PATIENT = "patient 4711"
HEAD = "import sys\nfrom flwr.clientapp import ClientApp\napp = ClientApp()\n"
TRAIN = HEAD + "@app.train()\ndef train(message, context):\n    "
BROKEN = {
    "import": f"raise ValueError({PATIENT!r})\n",
    "syntax": f"{PATIENT}\n",
    "no app": "",
    "not an app": "app = 3\n",
    "no handler": HEAD,
    "exit": TRAIN + f"sys.exit({PATIENT!r})\n",
    "raise": TRAIN + f"raise KeyError({PATIENT!r})\n",
    "nothing": TRAIN + "pass\n",
    "lifespan": TRAIN + f"return message\n@app.lifespan()\ndef life(c):\n    raise OSError({PATIENT!r})\n    yield\n",
}


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_what_an_app_does_wrong_stays_here(bench: Bench, kind: str) -> None:
    fault = bench.fault(bench.app(code=BROKEN[kind]))
    assert fault.code in ("training-failed", "site-error", "wrong-shape")
    assert "4711" not in fault.message


def test_an_interrupt_is_not_held_up(bench: Bench) -> None:
    with pytest.raises(KeyboardInterrupt):
        bench.send(bench.app(code=TRAIN + "raise KeyboardInterrupt\n"))


def test_a_folder_that_cannot_be_written_is_told(bench: Bench) -> None:
    (bench.folder / "home").mkdir()
    (bench.folder / "home" / "apps").write_text("a file")
    assert bench.fault(bench.app()).code == "bundle-unusable"


STATEFUL = """
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
loaded = []

@app.evaluate()
def evaluate(message, context):
    from {package}.extra import LATE
    count = int(context.state.config_records["n"]["n"]) if "n" in context.state.config_records else 0
    context.state["n"] = ConfigRecord({{"n": count + 1}})
    loaded.append(1)
    home = context.node_config["quorsum-home"]
    return Message(RecordDict({{"metrics": MetricRecord({{
        "state": count + 1, "loaded": len(loaded), "rounds": context.run_config["rounds"], "late": LATE,
        "layers": context.run_config["depth.layers"], "home": int(home.endswith("home")), "node": context.node_id,
        "partition": context.node_config["partition-id"],
    }})}}), reply_to=message)
"""


def stateful(bench: Bench, name: str, late: int) -> bytes:
    folder = app_folder(bench.folder / name, package="shared", code=STATEFUL.format(package="shared"))
    (folder / "shared" / "extra.py").write_text(f"LATE = {late}\n")
    bundle = bundles.build(folder)
    bench.allowed.add(bundles.digest(bundle))
    return bundle


def looked(bench: Bench, bundle: bytes) -> dict[str, Any]:
    return dict(bench.send(bundle, evaluation(), "evaluate").content.metric_records["metrics"])


def test_state_lives_as_long_as_the_run_and_the_app_stays_loaded(bench: Bench) -> None:
    bundle = stateful(bench, "one", 1)
    bench.run.override_config = {"rounds": 9}
    first = looked(bench, bundle)
    assert first == {
        "state": 1, "loaded": 1, "rounds": 9, "late": 1, "layers": 3, "home": 1, "node": 5, "partition": 0
    }  # fmt: skip
    assert looked(bench, bundle)["state"] == 2
    bench.run = flower.Run.create_empty(run_id=8)
    flower.become_coordinator(bench.run)
    third = looked(bench, bundle)
    assert (third["state"], third["loaded"], third["rounds"]) == (1, 3, 2)


def test_two_apps_do_not_meet(bench: Bench) -> None:
    one, two = stateful(bench, "one", 1), stateful(bench, "two", 2)
    seen = [looked(bench, bundle) for bundle in (one, two, one, two)]
    assert [look["late"] for look in seen] == [1, 2, 1, 2]
    assert [look["loaded"] for look in seen] == [1, 1, 2, 2]
    folders = [path for path in sys.path if str(bench.folder) in path]
    assert folders == [str(bench.folder / "home" / "apps" / bundles.digest(two))]


def test_contexts_of_old_runs_are_forgotten(bench: Bench) -> None:
    bundle = bench.app()
    for run_id in range(20):
        bench.run = flower.Run.create_empty(run_id=run_id)
        flower.become_coordinator(bench.run)
        bench.send(bundle, evaluation(), "evaluate")
    assert len(bench.worker._contexts) == 4


# --- the whole of it: coordinator and sites in processes of their own ---


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with running(tmp_path / "fleet", lease=20.0) as made:
        yield made


def config(site: int) -> dict[str, Any]:
    return {"partition-id": site, "site-name": f"site-{site + 1:02d}", "quorsum-accept-small-models": True}


def start(fleet: Fleet, bundle: bytes, count: int = 3) -> None:
    for k in range(count):
        fleet.add_site().run_in_process(fleet.address, bundles.digest(bundle), config(k))
    until(lambda: fleet.online() == count, 60)


def weights(size: int) -> ArrayRecord:
    return ArrayRecord({"w": Array(np.zeros(size, np.float32))})


@pytest.mark.parametrize("sealed", [False, True])
def test_three_sites_train_sealed(fleet: Fleet, tmp_path: Path, sealed: bool) -> None:
    bundle = bundles.build(app_folder(tmp_path / "app", sealed=sealed))
    start(fleet, bundle)
    grid = fleet.server.grid(fleet.server.open_run(bundle, {}))
    result = QuorumStrategy(tolerate=0).start(grid, weights(500), num_rounds=2)
    trained = result.arrays["w"].numpy()
    assert trained == pytest.approx(np.full(500, 2 * 0.011), abs=5e-3)
    assert len(fleet.server._state.object_store) == 0


def test_a_site_that_does_not_allow_the_bundle_is_left_out_by_name(fleet: Fleet, tmp_path: Path) -> None:
    bundle = bundles.build(app_folder(tmp_path / "app"))
    start(fleet, bundle)
    stranger = fleet.add_site()
    stranger.run_in_process(fleet.address, "0" * 64, config(3))
    until(lambda: fleet.online() == 4, 60)
    grid = fleet.server.grid(fleet.server.open_run(bundle, {}))
    hello = messages.pack(messages.Hello(run="run", suite="plain/v1"))
    (reply,) = grid.send_and_receive([Message(hello, stranger.node_id, "train")], timeout=30)
    fault, _ = messages.unpack(reply.content)
    assert isinstance(fault, messages.Fault)
    assert fault.code == "bundle-not-allowed"
    result = QuorumStrategy(tolerate=0, min_available_nodes=4).start(grid, weights(50), num_rounds=1)
    assert result.arrays["w"].numpy() == pytest.approx(np.full(50, 0.011), abs=5e-3)


def test_a_killed_site_comes_back_and_answers_what_is_pushed_again(fleet: Fleet, tmp_path: Path) -> None:
    bundle = bundles.build(app_folder(tmp_path / "app"))
    start(fleet, bundle, 1)
    (site,) = fleet.sites
    grid = fleet.server.grid(fleet.server.open_run(bundle, {}))
    first = grid.activation(site.node_id)
    site.kill()
    (old,) = grid.push_messages([Message(evaluation(), site.node_id, "evaluate")])
    site.run_in_process(fleet.address, bundles.digest(bundle), config(0))
    until(lambda: grid.activation(site.node_id) not in (None, first), 15)
    (new,) = grid.push_messages([Message(evaluation(), site.node_id, "evaluate")])
    (reply,) = until(lambda: list(grid.pull_messages([new])))
    assert reply.content.metric_records["metrics"]["accuracy"] == 0.75
    grid.withdraw([old])
    log = (site.home / "log").read_text()
    assert "waiting for its former lease" not in log
