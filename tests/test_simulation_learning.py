"""What sites learn: once per round, whoever asks, with momentum over rounds."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from flwr.app import ArrayRecord

from quorsum import arrays
from quorsum.errors import UsageError
from quorsum.simulation.learning import Learner
from quorsum.simulation.models import learnable
from quorsum.simulation.run import Simulation, build_world
from quorsum.simulation.world import World


def world(**changes: object) -> World:
    settings: dict[str, object] = {"sites": 5, "poisoned": 1, "steps": 2, "seed": 3, "suite": "plain", "tolerate": 0}
    return build_world(Simulation(**(settings | changes)).checked())  # type: ignore[arg-type]


def first(world: World) -> ArrayRecord:
    return ArrayRecord(learnable(world.new_model()))


def test_without_momentum_it_is_the_difference_of_training_and_the_same_for_all_who_ask() -> None:
    here = world()
    learner = Learner(here)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: learner.update(0, 1, first(here)), range(8)))
    assert all(answer is answers[0] for answer in answers)
    assert np.array_equal(answers[0], Learner(here).update(0, 1, first(here)))
    assert not np.array_equal(answers[0], learner.update(1, 1, first(here)))
    with pytest.raises(ValueError, match="read-only"):
        answers[0][0] = 1


def test_momentum_by_hand() -> None:
    plain, heavy = world(), world(site_momentum=0.75)
    model = first(plain)
    x1, x2 = Learner(plain).update(0, 1, model), Learner(plain).update(0, 2, model)
    learner = Learner(heavy)
    np.testing.assert_allclose(learner.update(0, 1, model), 0.25 * x1, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(learner.update(0, 2, model), 0.75 * 0.25 * x1 + 0.25 * x2, rtol=1e-5, atol=1e-8)


def test_a_learner_in_another_process_starts_afresh() -> None:
    here = world()
    learner = Learner(here)
    update = learner.update(2, 1, first(here))
    assert np.array_equal(pickle.loads(pickle.dumps(learner)).update(2, 1, first(here)), update)  # noqa: S301


def test_data_are_dealt_to_honest_sites_only_if_the_others_hoard_nothing() -> None:
    here = world(hoard=False, poisoned=2, sites=6)
    held = np.concatenate([here.parts[p] for p in here.honest])
    assert np.array_equal(np.sort(held), np.arange(len(here.data.train_y)))
    for p in here.poisoned:
        assert any(np.array_equal(here.parts[p], here.parts[q]) for q in here.honest)


def test_an_attacker_trains_on_poisoned_rows_and_an_honest_site_does_not() -> None:
    here = world(attack="backdoor", target=7)
    (bad,) = here.poisoned
    _, y = here.rows(bad)
    assert np.mean(y == 7) > 0.3
    good = here.honest[0]
    assert np.array_equal(here.rows(good)[1], here.data.train_y[here.parts[good]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"site_momentum": 1.0}, "site-momentum must lie in 0"),
        ({"site_momentum": 0.5, "runtime": "ray"}, "needs --runtime local"),
        ({"alpha": 1.0, "split": "iid"}, "give one of them"),
        ({"epochs": 1}, "exclude each other"),
        ({"model": "resnet"}, "no model is called 'resnet'"),
        ({"split": "by-eye"}, "by-eye"),
        ({"attack": "backdoor", "target": 10}, "target must be a class"),
    ],
)
def test_what_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        world(**changes)


def test_the_difference_to_the_model_survives_the_way_there_and_back() -> None:
    here = world()
    model = first(here)
    update = Learner(here).update(0, 1, model)
    np.testing.assert_allclose(arrays.difference(arrays.apply_update(model, update), model), update, atol=1e-6)
