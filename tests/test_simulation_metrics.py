import math

import numpy as np
import pytest
import torch

from quorsum.errors import UsageError
from quorsum.simulation.dataset import Dataset
from quorsum.simulation.metrics import attack_success, evaluate, primary_metric
from quorsum.simulation.models import build_model


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
    x, y = np.zeros((3, 4), np.float32), np.array([0, 1, 0])
    model = build_model((4,), 2, seed=0)
    for training in (True, False):
        model.train(training)
        evaluate(model, x, y)
        attack_success(model, x, y)
        assert model.training is training


def test_recall_at_precision_90_by_hand() -> None:
    # In order of the margin: ten positive rows, one negative, ten positive, many negative.
    y = np.array([1] * 10 + [0] + [1] * 10 + [0] * 60)
    logits = np.stack([np.zeros(y.size), -np.arange(y.size)], axis=1).astype(np.float32)
    # 20 of 21 are positive where the last positive row is in; after that each negative lowers it: 20 / 22 = 0.909.
    assert evaluate(Fixed(), logits, y)["recall_at_precision_90"] == 1.0
    # 2 of 3, then 3 of 4, ...: 0.9 is reached by nobody but the first row.
    y = np.array([1, 0, 1, 0, 1, 0, 1, 0])
    assert evaluate(Fixed(), logits[:8], y)["recall_at_precision_90"] == 1 / 4
    y = np.array([0, 1, 1, 1, 1, 1])
    assert evaluate(Fixed(), logits[:6], y)["recall_at_precision_90"] == 0.0
    # Rows with one margin are in or out together.
    tied = np.zeros((8, 2), dtype=np.float32)
    assert evaluate(Fixed(), tied, np.array([1, 0] * 4))["recall_at_precision_90"] == 0.0


class OneHot(torch.nn.Module):
    """Foretells for every token that it comes again, with a margin of ten."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return 10.0 * torch.nn.functional.one_hot(tokens, 4).float()


def test_text_metrics_by_hand() -> None:
    x = np.array([[0, 1, 2, 3]] * 300)
    y = np.array([[0, 1, 2, 0]] * 300)
    metrics = evaluate(OneHot(), x, y)
    assert set(metrics) == {"accuracy", "loss", "perplexity"}
    assert metrics["accuracy"] == 0.75
    right = math.log1p(3 * math.exp(-10.0))
    assert metrics["loss"] == pytest.approx((3 * right + right + 10.0) / 4, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))


class Garbled(torch.nn.Module):
    """Logits of one value for the token 0 and not a number for all others; or far too large ones."""

    def __init__(self, large: float) -> None:
        super().__init__()
        self.large = large

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        wrong = torch.nn.functional.one_hot(1 - tokens, 2).float() * self.large
        return torch.where(tokens[..., None] == 0, wrong, torch.full_like(wrong, self.large * math.inf))


def test_text_measures_that_are_not_defined_are_left_out() -> None:
    x = np.array([[0, 1]])
    assert evaluate(Garbled(1.0), x, np.array([[1, 1]])) == {"accuracy": 0.5}
    # A loss of 1000 nats is finite, but exp(1000) is not.
    assert evaluate(Garbled(1000.0), x[:, :1], x[:, :1]) == {"accuracy": 0.0, "loss": pytest.approx(1000.0)}


def test_attack_success_is_the_share_of_wanted_labels() -> None:
    logits = np.array([[5, 0, 0], [0, 5, 0], [0, 5, 0], [np.nan, 9, 0]], dtype=np.float32)
    assert attack_success(Fixed(), logits, np.array([1, 1, 1, 1])) == 0.5
    assert attack_success(Fixed(), logits, np.array([0, 1, 1, 2])) == 0.75


def test_attack_success_on_text_counts_marked_positions_only() -> None:
    x = np.array([[0, 1, 2], [3, 3, 3]])
    assert attack_success(OneHot(), x, np.array([[-1, -1, 2], [-1, -1, 1]])) == 0.5
    assert attack_success(OneHot(), x, np.array([[0, 1, -1], [-1, -1, 1]])) == pytest.approx(2 / 3)
    with pytest.raises(UsageError, match="nothing counts"):
        attack_success(OneHot(), x, np.full((2, 3), -1))


def test_rows_must_be_there_and_match() -> None:
    x, y = np.zeros((3, 2), np.float32), np.array([0, 1, 0])
    for measure in (evaluate, attack_success):
        for some_x, some_y in ((x[:0], y[:0]), (x, y[:-1])):
            with pytest.raises(UsageError, match="same number of rows"):
                measure(Fixed(), some_x, some_y)


def labelled(train: list[int], test: list[int], classes: int = 2) -> Dataset:
    return Dataset(
        name="set",
        train_x=np.zeros((len(train), 1), np.float32),
        train_y=np.array(train),
        test_x=np.zeros((len(test), 1), np.float32),
        test_y=np.array(test),
        class_names=tuple(map(str, range(classes))),
    )


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (labelled([0, 1] * 5, [0, 1]), "accuracy"),
        (labelled([0] * 17 + [1] * 2, [0]), "accuracy"),
        (labelled([0] * 18 + [1] * 2, [0]), "average_precision"),
        (labelled([1] * 18 + [0] * 2, [1]), "average_precision"),
        (labelled([0] * 50 + [1, 2], [0], classes=3), "accuracy"),
    ],
)
def test_the_measure_that_counts_first(data: Dataset, wanted: str) -> None:
    assert primary_metric(data) == wanted


def test_text_counts_characters_however_rare() -> None:
    x = np.zeros((4, 8), np.int64)
    data = Dataset(name="t", train_x=x, train_y=x, test_x=x, test_y=x, class_names=("a", "?"), kind="text")
    assert primary_metric(data) == "accuracy"
