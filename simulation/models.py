"""Models small enough to learn on two processor cores, and plain local training for them.

Nothing here reads or changes global state: initial weights and batches come from their own generator, so several sites
may train in several threads of one process and still be repeatable. The models have no dropout and no running
statistics: all that is learnt is in their parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from quorsum.errors import UsageError

__all__ = ["Metrics", "build_model", "evaluate", "train_locally"]

Metrics: TypeAlias = dict[str, float]
"""Measures of a model by name; each is finite."""

_HIDDEN = 32
# Epochs and step length with which ten sites learn the usual sets well within 20 rounds of federated averaging.
_TABLE_TRAINING = (5, 0.1)
_IMAGE_TRAINING = (2, 0.05)
_EVALUATION_BATCH = 1024


def build_model(shape: Sequence[int], classes: int, *, seed: int, hidden: int = _HIDDEN) -> nn.Module:
    """A model for inputs of one shape.

    ``(columns,)`` gives a perceptron with one hidden layer, 32 wide by default (2 410 parameters for digits);
    ``(1 or 3, height, width)`` gives a network with two convolutions, 8 and 16 channels (2 946 parameters for grey
    images and 2 classes, whatever their size).

    Args:
        shape: shape of one input.
        classes: k, at least 2.
        seed: decides the initial weights, ``0 <= seed < 2**63``.
        hidden: width of the hidden layer of the perceptron, at least 1.

    Returns:
        A model that maps float32 ``(n, *shape)`` to logits ``(n, k)``.

    Raises:
        UsageError: the shape, the number of classes or the seed is out of range.
    """
    if classes < 2:
        raise UsageError(f"classes must be 2 or more, got {classes}")
    if hidden < 1:
        raise UsageError(f"hidden must be 1 or more, got {hidden}")
    generator = _generator(seed)
    if len(shape) == 1 and shape[0] >= 1:
        model = nn.Sequential(
            nn.Linear(shape[0], _HIDDEN, device="meta"),
            nn.ReLU(),
            nn.Linear(_HIDDEN, classes, device="meta"),
        )
    elif len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= 8:
        model = nn.Sequential(
            nn.Conv2d(shape[0], 8, kernel_size=5, stride=2, padding=2, device="meta"),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, kernel_size=3, padding=1, device="meta"),
            nn.ReLU(),
            # Changes nothing for 28 x 28; it makes larger images cost no further parameters.
            nn.AdaptiveAvgPool2d((7, 7)),
            nn.Flatten(),
            nn.Linear(16 * 7 * 7, classes, device="meta"),
        )
    else:
        raise UsageError(
            f"no model for inputs of shape {tuple(shape)}; use (columns,) or (1 or 3, height, width) from 8 x 8"
        )
    # Layers draw their first weights from global state; on the meta device they cannot.
    model = model.to_empty(device="cpu")
    for layer in model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def train_locally(
    model: nn.Module,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    *,
    seed: int,
    epochs: int | None = None,
    batch_size: int = 32,
    lr: float | None = None,
    momentum: float = 0.9,
) -> float:
    """Train a model in place by stochastic gradient descent on cross-entropy.

    Args:
        model: gives logits; changed in place.
        x: inputs, float32, shape ``(n, *shape)``.
        y: labels, int64, shape ``(n,)``.
        seed: decides the order of the rows, ``0 <= seed < 2**63``.
        epochs: passes over the rows, at least 1; unless given, 5 for tables and 2 for images.
        batch_size: rows per step, at least 1.
        lr: step length, above 0; unless given, 0.1 for tables and 0.05 for images.
        momentum: 0 .. 1 (exclusive); starts from rest at every call.

    Returns:
        Mean loss per row over the last epoch, while it was being learnt; not finite if training diverged.

    Raises:
        UsageError: there are no rows, or an argument is out of range.
    """
    if len(x) == 0 or len(x) != len(y):
        raise UsageError(f"x and y must have the same number of rows, at least 1, got {len(x)} and {len(y)}")
    usual_epochs, usual_lr = _TABLE_TRAINING if x.ndim == 2 else _IMAGE_TRAINING
    epochs = usual_epochs if epochs is None else epochs
    lr = usual_lr if lr is None else lr
    if epochs < 1 or batch_size < 1:
        raise UsageError(f"epochs and batch_size must be 1 or more, got {epochs} and {batch_size}")
    if not (0.0 < lr < math.inf and 0.0 <= momentum < 1.0):
        raise UsageError(f"lr must be above 0 and momentum in 0 .. 1 (exclusive), got {lr} and {momentum}")
    generator = _generator(seed)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    loss_sum = 0.0
    model.train()
    for _ in range(epochs):
        loss_sum = 0.0
        for rows in torch.split(torch.randperm(len(labels), generator=generator), batch_size):
            loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
            gradients = torch.autograd.grad(loss, parameters)
            # By hand, because the first step of torch.optim imports the whole compiler, a second or more.
            with torch.no_grad():
                for parameter, v, gradient in zip(parameters, velocity, gradients, strict=True):
                    v.mul_(momentum).add_(gradient)  # v <- momentum v + g
                    parameter.sub_(v, alpha=lr)  # w <- w - lr v
            loss_sum += float(loss.detach()) * len(rows)
    return loss_sum / len(labels)


def evaluate(model: nn.Module, x: NDArray[np.float32], y: NDArray[np.int64]) -> Metrics:
    """Measure a model on labelled rows.

    Args:
        model: gives logits of shape ``(n, k)``; not changed.
        x: inputs, float32, shape ``(n, *shape)``, n at least 1.
        y: labels, int64, shape ``(n,)``.

    Returns:
        ``accuracy`` always, 0 .. 1; a row whose logits are not all finite counts as wrong. ``loss``, the mean
        cross-entropy in nats, if it is finite. For two classes, where the rows hold both and all logits are finite,
        also ``balanced_accuracy``, ``auc_roc`` and ``average_precision``, 0 .. 1, with class 1 as the positive one.
        A measure that is not defined is left out, so that every value can be written to JSON.

    Raises:
        UsageError: there are no rows, or x and y differ in length.
    """
    if len(x) == 0 or len(x) != len(y):
        raise UsageError(f"x and y must have the same number of rows, at least 1, got {len(x)} and {len(y)}")
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(rows) for rows in torch.split(torch.from_numpy(x), _EVALUATION_BATCH)])
        loss = float(nn.functional.cross_entropy(logits, torch.from_numpy(y)))
    model.train(was_training)
    scores = logits.double().numpy()
    finite = np.isfinite(scores).all(axis=1)
    predicted = np.where(finite, scores.argmax(axis=1), -1)
    metrics: Metrics = {"accuracy": float(np.mean(predicted == y))}
    if math.isfinite(loss):
        metrics["loss"] = loss
    if scores.shape[1] == 2 and finite.all() and np.unique(y).size == 2:
        metrics |= _two_class_metrics(y, predicted, scores[:, 1] - scores[:, 0])
    return metrics


def _two_class_metrics(y: NDArray[np.int64], predicted: NDArray[np.int64], margin: NDArray[np.float64]) -> Metrics:
    # Here, because importing scikit-learn takes about a second that tasks with more classes need not spend.
    from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

    return {
        "balanced_accuracy": float(balanced_accuracy_score(y, predicted)),
        "auc_roc": float(roc_auc_score(y, margin)),
        "average_precision": float(average_precision_score(y, margin)),
    }


def _generator(seed: int) -> torch.Generator:
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed must lie in 0 .. 2**63 - 1, got {seed}")
    return torch.Generator().manual_seed(seed)
