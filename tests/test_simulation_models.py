import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from quorsum.errors import UsageError
from quorsum.simulation.data import load_dataset
from quorsum.simulation.models import build_model, evaluate, train_locally
from quorsum.simulation.partition import partition


def vector(model: torch.nn.Module) -> torch.Tensor:
    return parameters_to_vector(model.parameters()).detach().clone()


def blobs(rows: int = 60, shape: tuple[int, ...] = (4,)) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    y = np.arange(rows, dtype=np.int64) % 2
    noise = np.random.default_rng(0).normal(0.0, 0.3, (rows, *shape))
    return (noise + (2 * y - 1).reshape(-1, *[1] * len(shape))).astype(np.float32), y


@pytest.mark.parametrize(
    ("shape", "classes", "parameters"),
    [((64,), 10, 2410), ((30,), 2, 1058), ((1, 28, 28), 2, 2946), ((3, 28, 28), 9, 8841), ((3, 64, 40), 9, 8841)],
)
def test_models_give_logits_and_are_small(shape: tuple[int, ...], classes: int, parameters: int) -> None:
    model = build_model(shape, classes, seed=0)
    assert model(torch.zeros(5, *shape)).shape == (5, classes)
    assert vector(model).numel() == parameters
    assert not list(model.buffers())
    assert torch.isfinite(vector(model)).all()


@pytest.mark.parametrize("shape", [(6,), (1, 28, 28)])
def test_all_is_decided_by_the_seed_and_global_randomness_is_left_alone(shape: tuple[int, ...]) -> None:
    x, y = blobs(40, shape)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - it must not move
    models = []
    for seed in (1, 1, 2):
        model = build_model(shape, 2, seed=seed)
        train_locally(model, x, y, seed=seed)
        evaluate(model, x, y)
        models.append(vector(model))
        torch.manual_seed(99)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])
    torch.set_rng_state(before)
    build_model(shape, 2, seed=1)
    train_locally(build_model(shape, 2, seed=1), x, y, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


def test_threads_train_as_one_after_the_other() -> None:
    x, y = blobs(64)

    def trained(seed: int) -> torch.Tensor:
        model = build_model((4,), 2, seed=0)
        train_locally(model, x, y, seed=seed)
        return vector(model)

    alone = [trained(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(trained, range(8)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_steps_are_those_of_torch_sgd() -> None:
    x, y = blobs(20)
    ours, theirs = build_model((4,), 2, seed=3), build_model((4,), 2, seed=3)
    train_locally(ours, x, y, seed=0, epochs=4, batch_size=20, lr=0.1, momentum=0.9)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(theirs(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    assert torch.allclose(vector(ours), vector(theirs), atol=1e-6)


def test_loss_falls_and_data_stay_as_they_were() -> None:
    x, y = blobs()
    x_before, y_before = x.copy(), y.copy()
    model = build_model((4,), 2, seed=0)
    first = train_locally(model, x, y, seed=0, epochs=1)
    later = train_locally(model, x, y, seed=1, epochs=5)
    assert later < first
    assert np.array_equal(x, x_before)
    assert np.array_equal(y, y_before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    # Steps this small are lost in handing them to other threads, most of all on a busy machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "alpha", "wanted"), [("digits", None, 0.95), ("breast-cancer", 1.0, 0.94)])
def test_federated_averaging_over_ten_sites_learns(name: str, alpha: float | None, wanted: float) -> None:
    data = load_dataset(name)
    parts = partition(data.train_y, 10, alpha=alpha, rng=np.random.default_rng(0))
    model = build_model(data.shape, data.classes, seed=0)
    for number in range(20):
        start, updates = vector(model), []
        for site, rows in enumerate(parts):
            vector_to_parameters(start.clone(), model.parameters())
            train_locally(model, data.train_x[rows], data.train_y[rows], seed=100 * number + site)
            updates.append(vector(model))
        vector_to_parameters(torch.stack(updates).mean(dim=0), model.parameters())
    assert evaluate(model, data.test_x, data.test_y)["accuracy"] >= wanted


class Fixed(torch.nn.Module):
    """Gives the inputs back as logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_two_class_metrics_by_hand() -> None:
    logits = np.array([[0, 3], [0, 2], [0, 1], [0, -1], [0, -2]], dtype=np.float32)
    y = np.array([1, 0, 1, 0, 0])
    metrics = evaluate(Fixed(), logits, y)
    assert metrics["accuracy"] == pytest.approx(4 / 5)
    assert metrics["balanced_accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics["auc_roc"] == pytest.approx(5 / 6)
    assert metrics["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    losses = [math.log1p(math.exp(-margin)) for margin in (3, -2, 1, 1, 2)]
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_measures_that_are_not_defined_are_left_out() -> None:
    logits = np.array([[5, 0, 0], [0, 5, 0]], dtype=np.float32)
    assert set(evaluate(Fixed(), logits, np.array([0, 1]))) == {"accuracy", "loss"}
    one_class = evaluate(Fixed(), logits[:, :2], np.array([0, 0]))
    assert set(one_class) == {"accuracy", "loss"}


def test_rows_without_finite_logits_count_as_wrong() -> None:
    logits = np.array([[np.nan, 0], [5, 0], [np.inf, 0]], dtype=np.float32)
    assert evaluate(Fixed(), logits, np.array([0, 0, 0])) == {"accuracy": pytest.approx(1 / 3)}


def test_training_mode_is_given_back() -> None:
    x, y = blobs()
    model = build_model((4,), 2, seed=0)
    for training in (True, False):
        model.train(training)
        evaluate(model, x, y)
        assert model.training is training


@pytest.mark.parametrize("shape", [(), (0,), (2, 28, 28), (1, 4, 28), (28, 28)])
def test_shapes_without_a_model(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="no model for inputs of shape"):
        build_model(shape, 2, seed=0)


def test_build_refusals() -> None:
    with pytest.raises(UsageError, match="classes must be 2 or more"):
        build_model((4,), 1, seed=0)
    with pytest.raises(UsageError, match="seed must lie in"):
        build_model((4,), 2, seed=-1)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"epochs": 0}, "epochs and batch_size"),
        ({"batch_size": 0}, "epochs and batch_size"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": math.nan}, "lr must be above 0"),
        ({"momentum": 1.0}, "momentum"),
        ({"seed": 2**63}, "seed must lie in"),
    ],
)
def test_training_refusals(changed: dict[str, float], says: str) -> None:
    x, y = blobs()
    with pytest.raises(UsageError, match=says):
        train_locally(build_model((4,), 2, seed=0), x, y, **({"seed": 0} | changed))  # type: ignore[arg-type]


def test_rows_must_be_there_and_match() -> None:
    x, y = blobs()
    model = build_model((4,), 2, seed=0)
    for some_x, some_y in ((x[:0], y[:0]), (x, y[:-1])):
        with pytest.raises(UsageError, match="same number of rows"):
            train_locally(model, some_x, some_y, seed=0)
        with pytest.raises(UsageError, match="same number of rows"):
            evaluate(model, some_x, some_y)
