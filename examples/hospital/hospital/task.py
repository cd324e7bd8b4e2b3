"""Model, data and training: ordinary PyTorch, nothing of quorsum.

The data are scikit-learn's digits, 1797 images of 8 x 8 pixels. A site that holds data of its own replaces ``load``.
Nothing here depends on anything but its arguments, so that a run can be repeated to the last bit.
"""

import hashlib
from itertools import pairwise

import numpy as np
import torch
from sklearn.datasets import load_digits

TEST_ROWS = 360
SHARDS = 3
# 132 810 parameters: enough for them to hide in each other, so that no site has to accept a small model.
WIDTHS = (64, 1024, 64, 10)


def new_model(seed: int = 0) -> torch.nn.Module:
    """The model before it is trained, the same at all sites."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[torch.nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        layer = torch.nn.Linear(inputs, outputs)
        bound = inputs**-0.5
        for parameter in layer.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound, generator=generator)
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def shard_of(node_config: dict[str, str | int | float | bool]) -> int:
    """Which part of the data a site holds: its setting ``data-shard``, else one that follows from its name."""
    if "data-shard" in node_config:
        return int(node_config["data-shard"])
    return hashlib.sha256(str(node_config["site-name"]).encode()).digest()[0]


def load(shard: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training rows of one site, and the test rows that all share."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = torch.tensor(digits.data[order] / 16.0, dtype=torch.float32)
    y = torch.tensor(digits.target[order])
    mine = torch.arange(TEST_ROWS, len(y))[shard % SHARDS :: SHARDS]
    return x[mine], y[mine], x[:TEST_ROWS], y[:TEST_ROWS]


def train(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, *, epochs: int, learning_rate: float, seed: int
) -> None:
    """Train in an order that follows from the seed."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of rows that are recognised."""
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == y).float().mean())
