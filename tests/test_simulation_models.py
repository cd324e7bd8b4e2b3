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
from quorsum.simulation.dataset import Dataset
from quorsum.simulation.models import (
    MODELS,
    build_model,
    evaluate,
    learnable,
    load_learnable,
    new_model,
    train_locally,
)
from quorsum.simulation.partition import partition


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # Steps this small are lost in handing them to other threads, most of all on a busy machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize(
    ("model", "shape"), [("linear", (4,)), ("mlp", (4,)), ("linear", (1, 8, 9)), ("mlp", (1, 8, 9)), ("cnn", (1, 8, 9))]
)
def test_steps_are_those_of_torch_sgd(model: str, shape: tuple[int, ...]) -> None:
    x, y = blobs(20, shape)
    ours, theirs = (build_model(shape, 2, model=model, seed=3) for _ in range(2))
    loss = train_locally(ours, x, y, seed=0, epochs=4, batch_size=20, lr=0.1, momentum=0.9)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        expected = torch.nn.functional.cross_entropy(theirs(torch.from_numpy(x)), torch.from_numpy(y))
        expected.backward()
        optimizer.step()
    assert torch.allclose(vector(ours), vector(theirs), atol=1e-6)
    assert loss == pytest.approx(expected.item(), abs=1e-6)


def text(windows: int = 24, keys: int = 3) -> Dataset:
    """A language of six characters in which each one decides the next but one."""
    stream = np.array([0, 1, 2, 3, 4, 5, 3, 1] * (2 * windows + 1), dtype=np.int64)
    x, y = stream[: 16 * windows].reshape(windows, 16), stream[1 : 16 * windows + 1].reshape(windows, 16)
    train = windows * 3 // 4
    return Dataset(
        name="toy", train_x=x[:train], train_y=y[:train], test_x=x[train:], test_y=y[train:],
        class_names=tuple("abcdef"), kind="text", train_keys=np.arange(train, dtype=np.int64) % keys,
        key_names=("a", "b", "c"),
    )  # fmt: skip


def test_text_is_learnt_with_the_steps_of_torch_adam() -> None:
    data = text()
    ours, theirs = (new_model(data, seed=3) for _ in range(2))
    train_locally(ours, data.train_x, data.train_y, seed=0, steps=4, batch_size=99, lr=0.003, momentum=0.8)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.003, betas=(0.8, 0.99))
    for _ in range(4):
        optimizer.zero_grad()
        logits = theirs(torch.from_numpy(data.train_x))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(data.train_y).flatten()).backward()
        optimizer.step()
    # Adam divides by the root of squares that begin near zero, so that rounding weighs more than in descent.
    assert torch.allclose(vector(ours), vector(theirs), atol=1e-4)


@pytest.mark.parametrize("model", ["linear", "mlp", "cnn"])
def test_steps_count_batches_over_passes_shuffled_anew(model: str) -> None:
    x, y = blobs(20, (1, 8, 8))

    def trained(**how: int) -> torch.Tensor:
        network = build_model((1, 8, 8), 2, model=model, seed=0)
        train_locally(network, x, y, seed=4, batch_size=8, **how)
        return vector(network)

    # Three batches a pass: 8, 8 and 4 rows.
    assert torch.equal(trained(steps=6), trained(epochs=2))
    assert torch.equal(trained(steps=1), trained(steps=1))
    assert not torch.equal(trained(steps=4), trained(steps=3))


def test_a_step_looks_at_one_batch_only() -> None:
    x, y = blobs(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(9)).numpy()
    garbled = x.copy()
    garbled[order[16:]] = np.nan
    models = []
    for rows in (x, garbled):
        model = build_model((4,), 2, seed=0)
        loss = train_locally(model, rows, y, seed=9, steps=2, batch_size=8)
        assert math.isfinite(loss)
        models.append(vector(model))
    assert torch.equal(*models)


def test_loss_falls_and_data_stay_as_they_were() -> None:
    x, y = blobs()
    x_before, y_before = x.copy(), y.copy()
    model = build_model((4,), 2, seed=0)
    first = train_locally(model, x, y, seed=0, epochs=1)
    later = train_locally(model, x, y, seed=1, epochs=5)
    assert later < first
    assert np.array_equal(x, x_before)
    assert np.array_equal(y, y_before)


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


@pytest.mark.parametrize("shape", [(), (0,), (2, 28, 28), (1, 4, 28), (28, 28)])
def test_shapes_without_a_model(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="no model for inputs of shape"):
        build_model(shape, 2, seed=0)


@pytest.mark.parametrize(
    ("model", "shape", "parameters"),
    [
        ("linear", (64,), 650),
        ("mlp", (64,), 2410),
        ("linear", (1, 28, 28), 7850),
        ("mlp", (3, 8, 8), 6506),
        ("cnn", (1, 28, 28), 9226),
    ],
)
def test_models_by_name(model: str, shape: tuple[int, ...], parameters: int) -> None:
    network = build_model(shape, 10, model=model, seed=0)
    assert network(torch.zeros(5, *shape)).shape == (5, 10)
    assert vector(network).numel() == parameters


def test_hidden_is_the_width_of_the_hidden_layer() -> None:
    assert vector(build_model((4,), 2, hidden=7, seed=0)).numel() == 4 * 7 + 7 + 7 * 2 + 2


def test_new_model_follows_the_data() -> None:
    digits, words = load_dataset("digits"), text()
    assert torch.equal(vector(new_model(digits, hidden=9, seed=5)), vector(build_model((64,), 10, hidden=9, seed=5)))
    assert new_model(words, seed=0)(torch.from_numpy(words.train_x)).shape == (18, 16, 6)
    for name in MODELS:
        for data in (digits, words):
            fits = name == "auto" or name.startswith("transformer") is (data.kind == "text")
            if fits and name != "cnn":
                assert learnable(new_model(data, model=name, seed=0))
            else:
                with pytest.raises(UsageError, match=f"model {name.replace('+', '.')} is"):
                    new_model(data, model=name, seed=0)


def test_unknown_models_are_named() -> None:
    for build in (
        lambda name: build_model((4,), 2, model=name, seed=0),
        lambda name: new_model(text(), model=name, seed=0),
    ):
        with pytest.raises(UsageError, match=r"no model is called 'transfomer' \(did you mean transformer\?\)"):
            build("transfomer")


def test_learnable_goes_to_another_model_and_is_all_that_training_changes() -> None:
    data = text()
    one, other = new_model(data, model="transformer+lora", seed=1), new_model(data, model="transformer+lora", seed=1)
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    train_locally(one, data.train_x, data.train_y, seed=0, steps=3)
    state = learnable(one)
    assert all(not tensor.requires_grad for tensor in state.values())
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, before[name]) is (name not in state)
    load_learnable(other, state)
    assert torch.equal(vector(one), vector(other))
    train_locally(one, data.train_x, data.train_y, seed=0, steps=1)
    assert not torch.equal(vector(one), vector(other))


def test_without_frozen_parameters_all_is_learnable() -> None:
    model = build_model((1, 28, 28), 2, seed=0)
    state = learnable(model)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_states_that_do_not_fit_change_nothing() -> None:
    model = build_model((4,), 2, seed=0)
    before, state = vector(model), learnable(build_model((4,), 2, seed=1))
    for wrong, says in (
        ({name: tensor for name, tensor in state.items() if name != "0.bias"}, "'0.bias' is in one of them only"),
        (state | {"extra": torch.zeros(1)}, "'extra' is in one of them only"),
        (state | {"2.bias": torch.zeros(3)}, r"2.bias must have shape \(2,\), got \(3,\)"),
    ):
        with pytest.raises(UsageError, match=says):
            load_learnable(model, wrong)
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize("model", ["transformer", "transformer+lora"])
def test_federated_averaging_learns_a_small_language(model: str) -> None:
    data = text(windows=64)
    parts = partition(data, 3, split="key", rng=np.random.default_rng(0))
    network = new_model(data, model=model, seed=0)
    for number in range(15):
        start = {name: tensor.clone() for name, tensor in learnable(network).items()}
        mean = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        for site, rows in enumerate(parts):
            load_learnable(network, start)
            train_locally(network, data.train_x[rows], data.train_y[rows], seed=10 * number + site, steps=4)
            for name, tensor in learnable(network).items():
                mean[name] += tensor / len(parts)
        load_learnable(network, mean)
    # One character alone foretells the next in six of eight places.
    assert evaluate(network, data.test_x, data.test_y)["accuracy"] > 0.9


def test_build_refusals() -> None:
    with pytest.raises(UsageError, match="classes must be 2 or more"):
        build_model((4,), 1, seed=0)
    with pytest.raises(UsageError, match="hidden must be 1 or more"):
        build_model((4,), 2, hidden=0, seed=0)
    with pytest.raises(UsageError, match="model cnn is for images"):
        build_model((4,), 2, model="cnn", seed=0)
    with pytest.raises(UsageError, match=r"model transformer is for text"):
        build_model((4,), 2, model="transformer", seed=0)
    with pytest.raises(UsageError, match="seed must lie in"):
        build_model((4,), 2, seed=-1)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"epochs": 1, "steps": 1}, "leave one out"),
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
