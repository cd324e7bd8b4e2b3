"""Models small enough to learn on two processor cores, and plain local training for them.

Nothing here reads or changes global state: initial weights and batches come from their own generator, so several sites
may train in several threads of one process and still be repeatable. The models have no dropout and no running
statistics: all that is learnt is in their parameters.

================  ==================================================================================================
model             is
================  ==================================================================================================
linear            logistic regression
mlp               a perceptron with one hidden layer; 2 410 parameters for digits
cnn               two convolutions of 8 and 16 channels and a linear layer; 2 946 parameters for grey images and 2
                  classes, whatever their size
transformer       for text: two causal blocks 64 wide (see ``transformer``); 112 577 parameters for 65 characters
transformer+lora  the same with the matrices inside the blocks frozen at their first, random values, the same at every
                  site, and low-rank adapters learnt for them; 29 505 parameters are learnt for 65 characters
================  ==================================================================================================

``auto`` takes ``mlp`` for tables, ``cnn`` for images and ``transformer`` for text.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quorsum.errors import UsageError
from quorsum.simulation.dataset import Dataset, InputArray
from quorsum.simulation.gradients import gradient_of
from quorsum.simulation.metrics import Metrics, attack_success, evaluate
from quorsum.simulation.transformer import Transformer

__all__ = [
    "MODELS",
    "Metrics",
    "attack_success",
    "build_model",
    "evaluate",
    "learnable",
    "load_learnable",
    "new_model",
    "train_locally",
]

MODELS = ("auto", "linear", "mlp", "cnn", "transformer", "transformer+lora")

_HIDDEN = 32
# Size of the feature maps that the linear layer of the convolutional network sees.
_SMALL = (7, 7)
# Epochs and step length with which ten sites learn the usual sets well within 20 rounds of federated averaging.
_TABLE_TRAINING = (5, 0.1)
_IMAGE_TRAINING = (2, 0.05)
_TEXT_TRAINING = (1, 0.003)
# Decay of the squared gradients in Adam; faster than the usual 0.999, because it starts anew in every round.
_SQUARES_DECAY = 0.99
_ADAM_FLOOR = 1e-8


def new_model(data: Dataset, *, model: str = "auto", hidden: int = _HIDDEN, seed: int) -> nn.Module:
    """A model for a data set, with the first weights of the seed.

    Args:
        data: what it is to learn.
        model: one of ``MODELS``.
        hidden: width of the hidden layer of ``mlp``, at least 1.
        seed: decides the initial weights, ``0 <= seed < 2**63``.

    Returns:
        A model that maps ``(n, *data.shape)`` to logits ``(n, k)``, or for text ``(n, T, k)``.

    Raises:
        UsageError: the model is unknown or not for such data, or an argument is out of range.
    """
    _check_name(model)
    if data.kind == "text":
        if not model.startswith("transformer") and model != "auto":
            raise UsageError(f"model {model} is not for text; use transformer or transformer+lora")
        lora = model.endswith("+lora")
        return Transformer(data.classes, data.shape[0], _generator(seed), lora=lora)
    return build_model(data.shape, data.classes, model=model, hidden=hidden, seed=seed)


def build_model(
    shape: Sequence[int], classes: int, *, model: str = "auto", hidden: int = _HIDDEN, seed: int
) -> nn.Module:
    """A model that tells classes apart, for inputs of one shape.

    Args:
        shape: shape of one input, ``(columns,)`` or ``(1 or 3, height, width)``.
        classes: k, at least 2.
        model: ``"auto"``, ``"linear"``, ``"mlp"`` or ``"cnn"``; the last one is for images from 8 x 8.
        hidden: width of the hidden layer of ``mlp``, at least 1.
        seed: decides the initial weights, ``0 <= seed < 2**63``.

    Returns:
        A model that maps float32 ``(n, *shape)`` to logits ``(n, k)``.

    Raises:
        UsageError: the shape, the model, the number of classes or the seed is out of range.
    """
    _check_name(model)
    if classes < 2:
        raise UsageError(f"classes must be 2 or more, got {classes}")
    if hidden < 1:
        raise UsageError(f"hidden must be 1 or more, got {hidden}")
    generator = _generator(seed)
    flat = len(shape) == 1 and shape[0] >= 1
    image = len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= 8
    if not (flat or image):
        raise UsageError(
            f"no model for inputs of shape {tuple(shape)}; use (columns,) or (1 or 3, height, width) from 8 x 8"
        )
    if model.startswith("transformer"):
        raise UsageError(f"model {model} is for text; use auto, linear, mlp or cnn")
    if model == "cnn" and flat:
        raise UsageError(f"model cnn is for images, and these are rows of {shape[0]} numbers; use auto, linear or mlp")
    layers = _convolutions(shape, classes) if image and model in ("auto", "cnn") else _dense(shape, classes, hidden)
    if model == "linear":
        layers = [nn.Linear(math.prod(shape), classes, device="meta")]
    # Layers draw their first weights from global state; on the meta device they cannot.
    network = nn.Sequential(*([nn.Flatten()] if image and not isinstance(layers[0], nn.Conv2d) else []), *layers)
    network = network.to_empty(device="cpu")
    for layer in network:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network


def _dense(shape: Sequence[int], classes: int, hidden: int) -> list[nn.Module]:
    return [
        nn.Linear(math.prod(shape), hidden, device="meta"),
        nn.ReLU(),
        nn.Linear(hidden, classes, device="meta"),
    ]


def _convolutions(shape: Sequence[int], classes: int) -> list[nn.Module]:
    # Half as large after the first layer, rounded up, and half of that, rounded down, after the pooling.
    small = tuple((size + 1) // 2 // 2 for size in shape[1:])
    return [
        nn.Conv2d(shape[0], 8, kernel_size=5, stride=2, padding=2, device="meta"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, kernel_size=3, padding=1, device="meta"),
        nn.ReLU(),
        # Larger images so cost no further parameters; for 28 x 28 there is nothing to average.
        nn.Identity() if small == _SMALL else nn.AdaptiveAvgPool2d(_SMALL),
        nn.Flatten(),
        nn.Linear(16 * math.prod(_SMALL), classes, device="meta"),
    ]


def learnable(model: nn.Module) -> dict[str, Tensor]:
    """What of a model is learnt and so travels in a federation: its parameters but the frozen ones.

    Returns:
        The tensors by name, in the order of the model, cut off from autograd; they share the model's memory.
    """
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_learnable(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put what :func:`learnable` gave, or a mean of such, into a model of the same kind, in place.

    Raises:
        UsageError: a tensor is missing, unknown, or of another shape.
    """
    held = learnable(model)
    if held.keys() != state.keys():
        odd = sorted(held.keys() ^ state.keys())
        raise UsageError(f"state and model must have the same tensors, but {odd[0]!r} is in one of them only")
    for name, target in held.items():
        if state[name].shape != target.shape:
            raise UsageError(f"{name} must have shape {tuple(target.shape)}, got {tuple(state[name].shape)}")
    for name, target in held.items():
        target.copy_(state[name])


def train_locally(
    model: nn.Module,
    x: InputArray,
    y: NDArray[np.int64],
    *,
    seed: int,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 32,
    lr: float | None = None,
    momentum: float = 0.9,
) -> float:
    """Train a model in place on cross-entropy; frozen parameters stay as they are.

    Classes are learnt by stochastic gradient descent with momentum, text by Adam (Kingma & Ba, ICLR 2015), because
    descent with one step length for all weights makes a transformer learn much more slowly.

    Args:
        model: gives logits; changed in place.
        x: inputs, shape ``(n, *shape)``.
        y: labels, int64, shape ``(n,)``; for text ``(n, T)``, and the loss is the mean over all characters.
        seed: decides the order of the rows, ``0 <= seed < 2**63``.
        epochs: passes over the rows, at least 1; unless given, 5 for tables, 2 for images and 1 for text.
        steps: batches instead of passes, at least 1; as many passes, shuffled anew, as it takes. The last batch of a
            pass is smaller where ``batch_size`` does not divide the rows.
        batch_size: rows per step, at least 1.
        lr: step length, above 0; unless given, 0.1 for tables, 0.05 for images and 0.003 for text.
        momentum: 0 .. 1 (exclusive); for text Adam's decay of the mean gradient. Starts from rest at every call.

    Returns:
        Mean loss per row over the last pass, finished or not, while it was being learnt; not finite if training
        diverged.

    Raises:
        UsageError: there are no rows, or an argument is out of range.
    """
    if len(x) == 0 or len(x) != len(y):
        raise UsageError(f"x and y must have the same number of rows, at least 1, got {len(x)} and {len(y)}")
    usual_epochs, usual_lr = _usual_training(x, y)
    if epochs is not None and steps is not None:
        raise UsageError(f"epochs and steps both say how long to train, got {epochs} and {steps}; leave one out")
    epochs = usual_epochs if epochs is None else epochs
    lr = usual_lr if lr is None else lr
    for name, value in (("epochs", epochs), ("steps", steps), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be 1 or more, got {value}")
    if not (0.0 < lr < math.inf and 0.0 <= momentum < 1.0):
        raise UsageError(f"lr must be above 0 and momentum in 0 .. 1 (exclusive), got {lr} and {momentum}")
    per_pass = -(-len(x) // batch_size)
    total = epochs * per_pass if steps is None else steps
    last_pass = (total - 1) // per_pass * per_pass
    gradient = gradient_of(model)
    step = (_Adam if y.ndim == 2 else _Descent)(gradient.weights, lr, momentum)
    loss_sum, rows = 0.0, 0
    model.train()
    with torch.no_grad():
        for number, (inputs, labels) in enumerate(_batches(x, y, _generator(seed), batch_size, total)):
            measured = number >= last_pass
            loss = gradient.at(inputs, labels, loss=measured)
            step(gradient.gradients)
            if measured:
                loss_sum += loss * len(labels)
                rows += len(labels)
        gradient.finish()
    return loss_sum / rows


# By hand, because the first step of torch.optim imports the whole compiler, a second or more.
class _Descent:
    """``v <- momentum v + g``, ``w <- w - lr v``."""

    def __init__(self, weights: Sequence[Tensor], lr: float, momentum: float) -> None:
        self._weights, self._lr, self._momentum = weights, lr, momentum
        self._velocity = [torch.zeros_like(w) for w in weights]

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        for w, v, g in zip(self._weights, self._velocity, gradients, strict=True):
            v.mul_(self._momentum).add_(g)
            w.sub_(v, alpha=self._lr)


class _Adam:
    """Adam: ``m <- b m + (1 - b) g``, ``s <- c s + (1 - c) g^2``, ``w <- w - lr m' / sqrt(s')``, both unbiased."""

    def __init__(self, weights: Sequence[Tensor], lr: float, momentum: float) -> None:
        self._weights, self._lr, self._momentum = weights, lr, momentum
        self._means = [torch.zeros_like(w) for w in weights]
        self._squares = [torch.zeros_like(w) for w in weights]
        self._steps = 0

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        self._steps += 1
        # m' = m / (1 - b^t), s' = s / (1 - c^t)
        length = self._lr / (1.0 - self._momentum**self._steps)
        correction = math.sqrt(1.0 - _SQUARES_DECAY**self._steps)
        for w, m, s, g in zip(self._weights, self._means, self._squares, gradients, strict=True):
            m.lerp_(g, 1.0 - self._momentum)
            s.mul_(_SQUARES_DECAY).addcmul_(g, g, value=1.0 - _SQUARES_DECAY)
            w.addcdiv_(m, s.sqrt().div_(correction).add_(_ADAM_FLOOR), value=-length)


def _usual_training(x: InputArray, y: NDArray[np.int64]) -> tuple[int, float]:
    if y.ndim == 2:
        return _TEXT_TRAINING
    return _TABLE_TRAINING if x.ndim == 2 else _IMAGE_TRAINING


def _batches(
    x: InputArray, y: NDArray[np.int64], generator: torch.Generator, batch_size: int, total: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """So many batches, from one shuffled pass after the other."""
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    left = total
    while left > 0:
        # Gathered once per pass, and no more of it than is used: a batch is then a view.
        order = torch.randperm(len(labels), generator=generator)[: left * batch_size]
        pieces = zip(
            torch.split(inputs.index_select(0, order), batch_size),
            torch.split(labels.index_select(0, order), batch_size),
            strict=True,
        )
        for pair in pieces:
            yield pair
            left -= 1


def _check_name(model: str) -> None:
    if model not in MODELS:
        close = difflib.get_close_matches(model, MODELS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(f"no model is called {model!r}{hint}; known: {', '.join(MODELS)}")


def _generator(seed: int) -> torch.Generator:
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed must lie in 0 .. 2**63 - 1, got {seed}")
    return torch.Generator().manual_seed(seed)
