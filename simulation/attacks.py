"""What a malicious site sends instead of an honest update.

Every attack is a pure function of what its attacker can see, an :class:`AttackView`, or, for an attack on data, of the
labels that the site trains on. Updates are flat vectors x of dimension d, "new local model minus global model"; n is
the number of sites, m the number of malicious ones, h = n - m; mu and sigma are the mean and the standard deviation of
the honest updates, coordinate by coordinate.

==========  ==================================  ==========  ===================================================
name        sends                               knows       source
==========  ==================================  ==========  ===================================================
none        x                                   own data
sign-flip   -strength x                         own data    Li et al., "RSA", AAAI 2019
scaling     strength x                          own data    Bagdasaryan et al., AISTATS 2020, model replacement
gaussian    N(0, I) strength ||x|| / sqrt(d)    own data    Blanchard et al., NeurIPS 2017
nan         x with one coordinate not a number  own data    a crashed site as much as an attacker
label-flip  x learnt from y -> k - 1 - y        own data    Fang et al., USENIX Security 2020
alie        mu - z sigma                        all honest  Baruch et al., "A Little Is Enough", NeurIPS 2019
ipm         -epsilon mu                         all honest  Xie et al., "Fall of Empires", UAI 2020
==========  ==================================  ==========  ===================================================

Attackers that know "all honest" updates are omniscient: stronger than any site of a sealed federation, in which
updates are hidden. They bound what collusion can do. All attackers in a round send the same ``alie`` or ``ipm`` update.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from quorsum.errors import UsageError
from quorsum.simulation.protocol_attacks import PROTOCOL_ATTACKS

__all__ = ["ATTACKS", "Attack", "AttackView", "alie_z_max", "parse_attack"]


@dataclass(frozen=True, eq=False)
class AttackView:
    """What an attacker sees in one round.

    Attributes:
        own: the update that the site would send if it were honest, floating, shape ``(d,)``.
        sites: n, number of sites in the round.
        malicious: m, how many of them are malicious, at least 1 and at most n.
        rng: the attacker's source of randomness.
        honest: the updates of the h honest sites, shape ``(h, d)``, where the attacker knows them.
    """

    own: NDArray[np.floating]
    sites: int
    malicious: int
    rng: np.random.Generator
    honest: NDArray[np.floating] | None = None

    def __post_init__(self) -> None:
        if self.own.ndim != 1 or not np.issubdtype(self.own.dtype, np.floating):
            raise UsageError(f"own must be a floating vector (d,), got {self.own.dtype} {self.own.shape}")
        if not 1 <= self.malicious <= self.sites:
            raise UsageError(f"malicious must lie in 1 .. {self.sites} (sites), got {self.malicious}")
        if self.honest is not None and (self.honest.ndim != 2 or self.honest.shape[1] != self.own.size):
            raise UsageError(f"honest must have shape (h, {self.own.size}), got {self.honest.shape}")


Parameters = Mapping[str, float]
UpdateAttack = Callable[[AttackView, Parameters], NDArray[np.floating]]


@dataclass(frozen=True)
class _Kind:
    """What is known about an attack before its parameters are chosen."""

    send: UpdateAttack
    defaults: Parameters = field(default_factory=dict)
    needs_honest: bool = False
    on_data: bool = False


@dataclass(frozen=True)
class Attack:
    """An attack with its parameters; made by :func:`parse_attack`.

    Attributes:
        name: its name in ``ATTACKS``.
        parameters: every parameter with its value, sorted by name. A value of NaN means "worked out per round".
    """

    name: str
    parameters: tuple[tuple[str, float], ...] = ()

    @property
    def on_protocol(self) -> bool:
        """Whether it attacks the sealed protocol itself (see ``protocol_attacks``), and not the update."""
        return self.name in PROTOCOL_ATTACKS

    @property
    def needs_honest(self) -> bool:
        """Whether the attacker must know the honest updates."""
        return self._kind.needs_honest

    @property
    def on_data(self) -> bool:
        """Whether it poisons the labels that a site trains on, and not the update."""
        return self._kind.on_data

    @property
    def _kind(self) -> _Kind:
        return _KINDS.get(self.name, _HONEST_UPDATE)

    def __str__(self) -> str:
        """The text that ``parse_attack`` reads back, with all parameters that have a fixed value."""
        fixed = ",".join(f"{key}={value:.15g}" for key, value in self.parameters if not math.isnan(value))
        return f"{self.name}:{fixed}" if fixed else self.name

    def poison_update(self, view: AttackView) -> NDArray[np.floating]:
        """The update that the malicious site sends, shape ``(d,)``, in the type of ``view.own``.

        For an attack on data this is ``view.own``: the poison is in it already.

        Raises:
            UsageError: the attack needs the honest updates and the view has none.
        """
        if self.needs_honest and (view.honest is None or len(view.honest) == 0):
            raise UsageError(f"{self.name} needs the honest updates; fill AttackView.honest")
        sent = self._kind.send(view, dict(self.parameters))
        return sent.astype(view.own.dtype)

    def poison_labels(self, labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
        """The labels that the malicious site trains on, shape ``(n,)``: ``classes - 1 - y``, or a copy of y.

        Raises:
            UsageError: a label is outside ``0 .. classes - 1``.
        """
        if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise UsageError(f"labels must lie in 0 .. {classes - 1}, got {int(labels.min())} .. {int(labels.max())}")
        return classes - 1 - labels if self.on_data else labels.copy()


def parse_attack(text: str) -> Attack:
    """Read an attack from text: ``"none"``, ``"sign-flip"``, ``"sign-flip:strength=8"``, ``"alie:z=1.5"``.

    Raises:
        UsageError: the name or a parameter is unknown, or a value is not a finite number in range.
    """
    name, _, rest = text.partition(":")
    name = name.strip()
    if name not in _KINDS and name not in PROTOCOL_ATTACKS:
        close = difflib.get_close_matches(name, [*ATTACKS, *PROTOCOL_ATTACKS], n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(
            f"no attack is called {name!r}{hint}; known: {', '.join(ATTACKS)}; "
            f"on the sealed protocol: {', '.join(PROTOCOL_ATTACKS)}"
        )
    parameters = dict(_KINDS.get(name, _HONEST_UPDATE).defaults)
    seen: set[str] = set()
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            raise UsageError(f"attack {name} has no parameter {key!r}; its parameters: {known}")
        if key in seen:
            raise UsageError(f"attack {name}: parameter {key} is given twice")
        seen.add(key)
        parameters[key] = _positive(name, key, value)
    return Attack(name, tuple(sorted(parameters.items())))


def _positive(name: str, key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0.0):
        raise UsageError(f"attack {name}: {key} must be a finite number above 0, got {text!r}")
    return value


def alie_z_max(sites: int, malicious: int) -> float:
    """The largest shift, in deviations, that hides among the honest (Baruch et al. 2019, Algorithm 3).

    With ``s = floor(n / 2 + 1) - m`` honest supporters needed, ``z = Phi^-1((n - m - s) / (n - m))``. It is 0, no shift
    at all, where the attackers are too few to win over anyone (n = 10, m = 2); the attack then takes z = 1.5.

    Raises:
        UsageError: there is no honest majority, so that nothing needs to be hidden.
    """
    honest = sites - malicious
    supporters = sites // 2 + 1 - malicious
    if malicious < 1 or supporters < 1:
        raise UsageError(f"alie needs 1 .. {sites // 2} malicious of {sites} sites, got {malicious}")
    # From 1/2 down the quantile is negative or zero: a shift by z >= 0 in the other direction would be the same attack.
    return max(0.0, NormalDist().inv_cdf((honest - supporters) / honest)) if honest > supporters else 0.0


def _honest(view: AttackView) -> NDArray[np.float64]:
    if view.honest is None:
        raise UsageError("the honest updates are not known to this attacker")
    return view.honest.astype(np.float64)


def _none(view: AttackView, _: Parameters) -> NDArray[np.floating]:
    return view.own.copy()


def _times_minus_strength(view: AttackView, p: Parameters) -> NDArray[np.floating]:
    sent: NDArray[np.floating] = np.multiply(view.own, -p["strength"])
    return sent


def _times_strength(view: AttackView, p: Parameters) -> NDArray[np.floating]:
    sent: NDArray[np.floating] = np.multiply(view.own, p["strength"])
    return sent


def _gaussian(view: AttackView, p: Parameters) -> NDArray[np.floating]:
    # E||N(0, s^2 I)||^2 = s^2 d, so this has about strength times the honest norm.
    deviation = p["strength"] * float(np.linalg.norm(view.own)) / math.sqrt(max(view.own.size, 1))
    return view.rng.normal(0.0, deviation, view.own.size)


def _one_nan(view: AttackView, _: Parameters) -> NDArray[np.floating]:
    sent = view.own.copy()
    if sent.size:
        sent[int(view.rng.integers(sent.size))] = math.nan
    return sent


def _alie(view: AttackView, p: Parameters) -> NDArray[np.floating]:
    honest = _honest(view)
    z = max(alie_z_max(view.sites, view.malicious), _ALIE_Z) if math.isnan(p["z"]) else p["z"]
    # mu - z sigma
    sent: NDArray[np.floating] = honest.mean(axis=0) - z * honest.std(axis=0)
    return sent


def _ipm(view: AttackView, p: Parameters) -> NDArray[np.floating]:
    # -epsilon mu
    sent: NDArray[np.floating] = -p["epsilon"] * _honest(view).mean(axis=0)
    return sent


# Where the attackers are too few for the paper's z, which is then 0 and no attack, they shift by this instead.
_ALIE_Z = 1.5

_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "none": _Kind(_none),
        # A mean of 8 honest updates g and 2 flipped ones is (8 - 2 strength) / 10 g: it turns back above 4.
        "sign-flip": _Kind(_times_minus_strength, {"strength": 8.0}),
        "scaling": _Kind(_times_strength, {"strength": 100.0}),
        # Averaged over 10 sites, 2 of them noisy, noise of 30 times an update is still 4 times the mean update.
        "gaussian": _Kind(_gaussian, {"strength": 30.0}),
        # One coordinate, because a check that looks at a norm or a sum alone still has to notice.
        "nan": _Kind(_one_nan),
        "label-flip": _Kind(_none, on_data=True),
        "alie": _Kind(_alie, {"z": math.nan}, needs_honest=True),
        # Below (n - m) / m the mean keeps its direction: the attack is on robust rules, and slows a plain mean only.
        "ipm": _Kind(_ipm, {"epsilon": 0.5}, needs_honest=True),
    }
)

# What leaves the protocol trains and learns as an honest site does.
_HONEST_UPDATE = _Kind(_none)

ATTACKS: tuple[str, ...] = tuple(_KINDS)
"""The attacks on updates and data that ``parse_attack`` knows, besides those of ``protocol_attacks``."""
