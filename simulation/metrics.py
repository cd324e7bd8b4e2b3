"""How good a model is: the measures of each kind of task, and which of them counts first."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from quorsum.errors import UsageError
from quorsum.simulation.dataset import Dataset, InputArray

__all__ = ["Metrics", "attack_success", "evaluate", "primary_metric"]

Metrics: TypeAlias = dict[str, float]
"""Measures of a model by name; each is finite."""

_EVALUATION_BATCH = 1024
_TEXT_BATCH = 256
# A class this rare makes accuracy say nothing: always answering the other one reaches 0.9.
_RARE = 0.1
_PRECISION = 0.9


def primary_metric(data: Dataset) -> str:
    """The measure that a report ranks by: ``"average_precision"`` or ``"accuracy"``.

    Average precision (the area under the precision-recall curve) is for two classes of which one has less than 10 % of
    all rows: there a model that never answers that class is right in more than 90 % of the rows.
    """
    rate = data.positive_rate
    return "average_precision" if rate is not None and not _RARE <= rate <= 1.0 - _RARE else "accuracy"


def evaluate(model: nn.Module, x: InputArray, y: NDArray[np.int64]) -> Metrics:
    """Measure a model on labelled rows.

    Args:
        model: gives logits of shape ``(n, k)``, or for text ``(n, T, k)``; not changed.
        x: inputs, shape ``(n, *shape)``, n at least 1.
        y: labels, int64, shape ``(n,)``; for text ``(n, T)``.

    Returns:
        ``accuracy`` always, 0 .. 1; what has logits that are not all finite counts as wrong. ``loss``, the mean
        cross-entropy in nats, if it is finite. For text both are over all characters, and ``perplexity`` is exp(loss),
        if it is finite. For two classes, where the rows hold both and all logits are finite, also
        ``balanced_accuracy``, ``auc_roc``, ``average_precision``, and ``recall_at_precision_90``, the largest recall
        that a threshold reaches with a precision of at least 0.9 (0 if none does), all 0 .. 1, with class 1 as the
        positive one. A measure that is not defined is left out, so that every value can be written to JSON.

    Raises:
        UsageError: there are no rows, or x and y differ in length.
    """
    _check_rows(x, y)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _text_metrics(model, x, y) if y.ndim == 2 else _class_metrics(model, x, y)
    finally:
        model.train(was_training)


def attack_success(model: nn.Module, x: InputArray, y: NDArray[np.int64]) -> float:
    """Share of the labels that an attacker wants which the model gives, 0 .. 1.

    Args:
        model: gives logits of shape ``(n, k)``, or for text ``(n, T, k)``; not changed.
        x: inputs with the trigger in, shape ``(n, *shape)``, n at least 1.
        y: the labels that the attacker wants, int64, shape ``(n,)``; for text ``(n, T)``, where a negative number
            stands for a position that does not count.

    Raises:
        UsageError: there are no rows, x and y differ in length, or no position counts.
    """
    _check_rows(x, y)
    counts = y >= 0 if y.ndim == 2 else np.ones(y.shape, dtype=np.bool_)
    if not counts.any():
        raise UsageError("y holds negative numbers only, so that nothing counts; mark what the attacker wants")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            batch = _TEXT_BATCH if y.ndim == 2 else _EVALUATION_BATCH
            predicted = [_predicted(model(rows)) for rows in torch.split(torch.from_numpy(x), batch)]
    finally:
        model.train(was_training)
    return float(np.mean((np.concatenate(predicted) == y)[counts]))


def _check_rows(x: InputArray, y: NDArray[np.int64]) -> None:
    if len(x) == 0 or len(x) != len(y):
        raise UsageError(f"x and y must have the same number of rows, at least 1, got {len(x)} and {len(y)}")


def _predicted(logits: torch.Tensor) -> NDArray[np.int64]:
    """The class with the largest logit; -1 where not all logits are finite."""
    finite = torch.isfinite(logits).all(dim=-1)
    predicted: NDArray[np.int64] = torch.where(finite, logits.argmax(dim=-1), -1).numpy()
    return predicted


def _text_metrics(model: nn.Module, x: InputArray, y: NDArray[np.int64]) -> Metrics:
    right, loss_sum = 0, 0.0
    # Batch by batch, because the logits of all windows at once would take gigabytes.
    for inputs, labels in zip(
        torch.split(torch.from_numpy(x), _TEXT_BATCH), torch.split(torch.from_numpy(y), _TEXT_BATCH), strict=True
    ):
        logits = model(inputs)
        right += int(np.sum(_predicted(logits) == labels.numpy()))
        loss_sum += float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    metrics: Metrics = {"accuracy": right / y.size}
    loss = loss_sum / y.size
    if math.isfinite(loss):
        metrics["loss"] = loss
        # exp overflows above about 709.
        if loss < 700.0:
            metrics["perplexity"] = math.exp(loss)
    return metrics


def _class_metrics(model: nn.Module, x: InputArray, y: NDArray[np.int64]) -> Metrics:
    logits = torch.cat([model(rows) for rows in torch.split(torch.from_numpy(x), _EVALUATION_BATCH)])
    loss = float(nn.functional.cross_entropy(logits, torch.from_numpy(y)))
    predicted = _predicted(logits)
    metrics: Metrics = {"accuracy": float(np.mean(predicted == y))}
    if math.isfinite(loss):
        metrics["loss"] = loss
    scores = logits.double().numpy()
    if scores.shape[1] == 2 and np.isfinite(scores).all() and np.unique(y).size == 2:
        metrics |= _two_class_metrics(y, predicted, scores[:, 1] - scores[:, 0])
    return metrics


def _two_class_metrics(y: NDArray[np.int64], predicted: NDArray[np.int64], margin: NDArray[np.float64]) -> Metrics:
    # Here, because importing scikit-learn takes about a second that tasks with more classes need not spend.
    from sklearn.metrics import (
        average_precision_score,
        balanced_accuracy_score,
        precision_recall_curve,
        roc_auc_score,
    )

    precision, recall, _ = precision_recall_curve(y, margin)
    return {
        "balanced_accuracy": float(balanced_accuracy_score(y, predicted)),
        "auc_roc": float(roc_auc_score(y, margin)),
        "average_precision": float(average_precision_score(y, margin)),
        # The curve ends at recall 0 with precision 1, so that there is always one to take.
        "recall_at_precision_90": float(recall[precision >= _PRECISION].max()),
    }
