from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quorsum.simulation.gradients import _Autograd, _Dense, gradient_of


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # Products this small are lost in handing them to other threads, most of all on a busy machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def networks(columns: int, hidden: int, classes: int) -> list[nn.Sequential]:
    return [
        nn.Sequential(nn.Linear(columns, classes)),
        nn.Sequential(nn.Linear(columns, hidden), nn.ReLU(), nn.Linear(hidden, classes)),
        nn.Sequential(nn.Flatten(), nn.Linear(columns, hidden), nn.ReLU(), nn.Linear(hidden, classes)),
    ]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(2, 6), st.integers(1, 12)),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_the_chain_rule_written_out_is_that_of_autograd(
    sizes: tuple[int, int, int, int], scale: float, seed: int
) -> None:
    columns, hidden, classes, rows = sizes
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * scale
    y = torch.randint(classes, (rows,), generator=generator)
    for network in networks(columns, hidden, classes):
        for parameter in network.parameters():
            nn.init.normal_(parameter, generator=generator)
        ours, theirs = gradient_of(network), _Autograd(network)
        assert isinstance(ours, _Dense)
        with torch.no_grad():
            loss = ours.at(x, y, loss=True)
        assert loss == pytest.approx(theirs.at(x, y, loss=True), rel=1e-5, abs=1e-6)
        expected = torch.cat([g.reshape(-1) for g in theirs.gradients])
        assert torch.allclose(ours.gradients[0], expected, rtol=1e-4, atol=1e-5 * max(1.0, scale))
        assert ours.at(x, y, loss=False) == 0.0


def test_weights_come_back_into_the_model_at_the_end() -> None:
    network = networks(3, 4, 2)[1]
    before = [p.detach().clone() for p in network.parameters()]
    gradient = gradient_of(network)
    with torch.no_grad():
        gradient.weights[0].add_(1.0)
        assert all(torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))
        gradient.finish()
    assert all(torch.equal(p, old + 1.0) for p, old in zip(network.parameters(), before, strict=True))


def test_images_are_flattened() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    ours, theirs = gradient_of(network), _Autograd(network)
    x, y = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 3, 2, 2)).astype(np.float32)), torch.arange(5) % 3
    with torch.no_grad():
        ours.at(x, y, loss=False)
    theirs.at(x, y, loss=False)
    assert torch.allclose(ours.gradients[0], torch.cat([g.reshape(-1) for g in theirs.gradients]), atol=1e-6)


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(3, 2, bias=False)),
        nn.Sequential(nn.Linear(3, 2)).double(),
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(3, 2).requires_grad_(False), nn.ReLU(), nn.Linear(2, 2)),
        nn.Linear(3, 2),
    ],
)
def test_all_other_models_are_left_to_autograd(network: nn.Module) -> None:
    assert isinstance(gradient_of(network), _Autograd)


def test_what_is_frozen_has_no_gradient() -> None:
    network = nn.Sequential(nn.Linear(3, 2).requires_grad_(False), nn.ReLU(), nn.Linear(2, 2))
    gradient = gradient_of(network)
    gradient.at(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), loss=False)
    assert len(gradient.weights) == len(gradient.gradients) == 2
