"""What a malicious site sends instead of an honest update, and what it trains on.

Every attack is made of small pure functions of what its attacker can see: an :class:`AttackView` for what it sends, its
own rows and the data set for what it trains on. Updates are flat vectors x of dimension d, "new local model minus
global model"; n is the number of sites, m the number of malicious ones, h = n - m; mu and sigma are the mean and the
standard deviation of the honest updates, coordinate by coordinate.

===================  ==========================================  ============  =======================================
name                 sends                                       knows         source
===================  ==========================================  ============  =======================================
none                 x                                           own data
sign-flip            -strength x                                 own data      Li et al., "RSA", AAAI 2019
scaling              strength x                                  own data      Bagdasaryan et al., AISTATS 2020
gaussian             N(0, I) strength |x| / sqrt(d)              own data      Blanchard et al., NeurIPS 2017
nan                  x with one coordinate not a number          own data      a crashed site as much as an attacker
free-rider           the last movement of the model, or noise    own data      Fraboni et al., AISTATS 2021
label-flip           x learnt from y -> k - 1 - y                own data      Fang et al., USENIX Security 2020
alie                 mu - z sigma                                all honest    Baruch et al., NeurIPS 2019
ipm                  -epsilon mu                                 all honest    Xie et al., UAI 2020
min-max, min-sum     mu + gamma p, the largest gamma unseen      all honest    Shejwalkar & Houmansadr, NDSS 2021
fang                 against trimmed mean, or against Krum       all honest    Fang et al., USENIX Security 2020
mimic                the honest update with most to say          all honest    Karimireddy et al., ICLR 2022
opt-ipm, opt-alie    the same with the strength that hurts most  and the rule  Allouah et al., AISTATS 2023 (ByzFL)
opt-spread           against the mean, and no two alike          and the rule  a search of quorsum's own
gram-aware           the worst that the rule lets through        and the rule  a search of quorsum's own
backdoor             boost x, learnt with a trigger              own data      Bagdasaryan et al., AISTATS 2020
dba                  the same, each a part of the trigger        own data      Xie et al., ICLR 2020
neurotoxin           x where the model hardly moves              own data      Zhang et al., ICML 2022
constrain-and-scale  x pulled to the honest, at the norm bound   own data      Bagdasaryan et al., AISTATS 2020
edge-case            x learnt from mislabelled rare inputs       own data      Wang et al., NeurIPS 2020
text-trigger         boost x, learnt with trigger characters     own data      Bagdasaryan et al., AISTATS 2020
===================  ==========================================  ============  =======================================

Attackers that know "all honest" updates are omniscient: stronger than any site of a sealed federation, in which
updates are hidden. They bound what collusion can do. Those that know "the rule" besides can compute what the
coordinator will make of a round before they send (``AttackView.defence``). What everybody sees counts for nothing:
the last movement of the model and, under ``sealed``, the opened Gram matrices.

The functions are in ``untargeted``, ``adaptive`` and ``backdoors``; what breaks the sealed protocol itself is in
``protocol_attacks``. docs/attacks.md lists all options.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quorsum.errors import UsageError
from quorsum.simulation import adaptive, backdoors, untargeted
from quorsum.simulation.data import Dataset
from quorsum.simulation.protocol_attacks import PROTOCOL_ATTACKS
from quorsum.simulation.untargeted import alie_z_max

__all__ = ["ATTACKS", "Attack", "AttackView", "Defence", "Knowledge", "alie_z_max", "parse_attack"]

Knowledge: TypeAlias = Literal["own data", "all honest", "all honest and the rule"]
Defence: TypeAlias = Callable[[NDArray[np.float64]], NDArray[np.floating]]
Inputs: TypeAlias = NDArray[np.float32 | np.int64]
Labels: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class AttackView:
    """What an attacker sees in one round.

    Attributes:
        own: the update that the site would send if it sent what it has learnt, floating, shape ``(d,)``.
        sites: n, number of sites in the round.
        malicious: m, how many of them are malicious, at least 1 and at most n.
        rng: the attacker's source of randomness.
        honest: the updates of the h honest sites, shape ``(h, d)``, where the attacker knows them.
        round: number of the round, from 1.
        position: this attacker's number among the m, from 0.
        unit: C, the norm that sites clip to; infinite without clipping.
        defence: what the coordinator makes of n updates, shape ``(n, d) -> (d,)``, the honest rows first, where the
            attacker knows the rule: clipping and rule together. Zeros where the round would fail; raises nothing. With
            an attribute ``isometric`` that is true, searches may ask about rotated updates.
        last: how the model moved in the last round, shape ``(d,)``; None in the first one.
        past: opened Gram matrices of past rounds, oldest first, each of shape ``(n, n)``, the honest rows first and the
            malicious ones after them; NaN for what was not opened.
    """

    own: NDArray[np.floating]
    sites: int
    malicious: int
    rng: np.random.Generator
    honest: NDArray[np.floating] | None = None
    round: int = 1
    position: int = 0
    unit: float = math.inf
    defence: Defence | None = None
    last: NDArray[np.floating] | None = None
    past: tuple[NDArray[np.float64], ...] = ()

    def __post_init__(self) -> None:
        if self.own.ndim != 1 or not np.issubdtype(self.own.dtype, np.floating):
            raise UsageError(f"own must be a floating vector (d,), got {self.own.dtype} {self.own.shape}")
        if not 1 <= self.malicious <= self.sites:
            raise UsageError(f"malicious must lie in 1 .. {self.sites} (sites), got {self.malicious}")
        if self.honest is not None and (self.honest.ndim != 2 or self.honest.shape[1] != self.own.size):
            raise UsageError(f"honest must have shape (h, {self.own.size}), got {self.honest.shape}")
        if self.round < 1:
            raise UsageError(f"round must be 1 or more, got {self.round}")
        if not 0 <= self.position < self.malicious:
            raise UsageError(f"position must lie in 0 .. {self.malicious - 1} (malicious - 1), got {self.position}")
        if not self.unit > 0.0:
            raise UsageError(f"unit must be above 0, got {self.unit}")
        if self.last is not None and self.last.shape != self.own.shape:
            raise UsageError(f"last must have shape ({self.own.size},), got {self.last.shape}")
        for gram in self.past:
            if gram.shape != (self.sites, self.sites):
                raise UsageError(f"past must hold matrices ({self.sites}, {self.sites}), got {gram.shape}")


@dataclass(frozen=True)
class _Option:
    """One parameter of an attack: a number above 0 and up to ``high``, or one of a few words.

    A number whose default is NaN is worked out where it is needed.
    """

    default: float | str = math.nan
    high: float = math.inf
    whole: bool = False
    from_zero: bool = False
    words: tuple[str, ...] = ()

    def read(self, attack: str, key: str, text: str) -> float | str:
        """The value that a text stands for.

        Raises:
            UsageError: it is none of the words, or no number in range.
        """
        if self.words:
            if text not in self.words:
                raise UsageError(f"attack {attack}: {key} must be one of {', '.join(self.words)}, got {text!r}")
            return text
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        above = value >= 0.0 if self.from_zero else value > 0.0
        if not (math.isfinite(value) and above and value <= self.high) or (self.whole and value != int(value)):
            raise UsageError(f"attack {attack}: {key} must be {self._range()}, got {text!r}")
        return value

    def _range(self) -> str:
        number = "a whole number" if self.whole else "a finite number"
        least = "from 0" if self.from_zero else "above 0"
        return f"{number} {least}" + (f" and at most {self.high:g}" if math.isfinite(self.high) else "")


Parameters: TypeAlias = Mapping[str, float | str]
UpdateAttack: TypeAlias = Callable[[AttackView, Parameters], NDArray[np.floating]]
Rows: TypeAlias = tuple[Inputs, Labels]


@dataclass(frozen=True)
class _Site:
    """What a malicious site knows besides its rows when it poisons them."""

    data: Dataset
    position: int
    malicious: int
    target: int
    rng: np.random.Generator


RowAttack: TypeAlias = Callable[[Inputs, Labels, _Site, Parameters], Rows]
Measure: TypeAlias = Callable[[Inputs, Labels, Dataset, int, Parameters], Rows]


@dataclass(frozen=True)
class _Kind:
    """What is known about an attack before its parameters are chosen."""

    send: UpdateAttack
    options: Mapping[str, _Option] = field(default_factory=dict)
    knows: Knowledge = "own data"
    alike: bool = False
    train: RowAttack | None = None
    measure: Measure | None = None


@dataclass(frozen=True)
class Attack:
    """An attack with its parameters; made by :func:`parse_attack`.

    Attributes:
        name: its name in ``ATTACKS``.
        parameters: every parameter with its value, sorted by name. A value of NaN means "worked out per round".
    """

    name: str
    parameters: tuple[tuple[str, float | str], ...] = ()

    @property
    def on_protocol(self) -> bool:
        """Whether it attacks the sealed protocol itself (see ``protocol_attacks``), and not the update."""
        return self.name in PROTOCOL_ATTACKS

    @property
    def knows(self) -> Knowledge:
        """What the threat model grants the attacker."""
        return self._kind.knows

    @property
    def needs_honest(self) -> bool:
        """Whether the attacker must know the honest updates."""
        return self._kind.knows != "own data"

    @property
    def needs_defence(self) -> bool:
        """Whether the attacker must know what the coordinator makes of a round."""
        return self._kind.knows == "all honest and the rule"

    @property
    def on_data(self) -> bool:
        """Whether it poisons the rows that a site trains on; what is sent may be changed besides."""
        return self._kind.train is not None

    @property
    def on_update(self) -> bool:
        """Whether it replaces what the site has learnt by something else."""
        return self._kind.send is not _own

    @property
    def backdoor(self) -> bool:
        """Whether it aims at inputs with a trigger, so that its success is measured on :meth:`triggered` rows."""
        return self._kind.measure is not None

    @property
    def same_for_all(self) -> bool:
        """Whether all attackers of a round send the same, whatever their position, own update and generator."""
        return self._kind.alike

    @property
    def _kind(self) -> _Kind:
        return _KINDS.get(self.name, _HONEST_UPDATE)

    def __str__(self) -> str:
        """The text that ``parse_attack`` reads back, with all parameters that have a fixed value."""
        fixed = ",".join(
            f"{key}={value}" if isinstance(value, str) else f"{key}={value:.15g}"
            for key, value in self.parameters
            if isinstance(value, str) or not math.isnan(value)
        )
        return f"{self.name}:{fixed}" if fixed else self.name

    def poison_update(self, view: AttackView) -> NDArray[np.floating]:
        """The update that the malicious site sends, shape ``(d,)``, in the type of ``view.own``.

        For an attack on data alone this is ``view.own``: the poison is in it already. The length is not limited to what
        a suite carries.

        Raises:
            UsageError: the attack needs the honest updates or the defence, and the view has none.
        """
        if self.needs_honest and (view.honest is None or len(view.honest) == 0):
            raise UsageError(f"{self.name} needs the honest updates; fill AttackView.honest")
        if self.needs_defence and view.defence is None:
            raise UsageError(f"{self.name} needs what the coordinator makes of a round; fill AttackView.defence")
        sent = self._kind.send(view, dict(self.parameters))
        return sent.astype(view.own.dtype)

    def poison_data(
        self, x: Inputs, y: Labels, *, data: Dataset, position: int, malicious: int, target: int,
        rng: np.random.Generator,
    ) -> Rows:  # fmt: skip
        """The rows that a malicious site trains on; the same arrays for attacks that leave data alone.

        Args:
            x: the site's own inputs, shape ``(n, *shape)``.
            y: the site's own labels, shape ``(n,)``; for texts ``(n, T)``.
            data: the data set that they are from.
            position: the attacker's number among the malicious, from 0.
            malicious: m, at least 1.
            target: the class (or, for texts, character) that a backdoor should lead to.
            rng: draws which rows are poisoned.

        Raises:
            UsageError: the attack does not fit the data, ``target`` is no class of it, or a label is out of range.
        """
        if self._kind.train is None:
            return x, y
        if not 0 <= position < malicious:
            raise UsageError(f"position must lie in 0 .. {malicious - 1} (malicious - 1), got {position}")
        site = _Site(data, position, malicious, target, rng)
        return self._kind.train(x, y, site, dict(self.parameters))

    def triggered(self, x: Inputs, y: Labels, *, data: Dataset, target: int) -> Rows:
        """The rows on which a backdoor's success is measured, and what the attacker wants them taken for.

        Of test rows those that are not of the target class, with the whole trigger in; of an edge-case attack the rows
        in the tail of its class. The labels of texts are -1 where nothing is measured.

        Raises:
            UsageError: the attack is no backdoor, does not fit the data, or ``target`` is no class of it.
        """
        if self._kind.measure is None:
            raise UsageError(f"{self.name} is no backdoor: there is no trigger to measure its success on")
        return self._kind.measure(x, y, data, target, dict(self.parameters))


def parse_attack(text: str) -> Attack:
    """Read an attack from text: ``"none"``, ``"sign-flip:strength=8"``, ``"fang:against=krum"``.

    Raises:
        UsageError: the name or a parameter is unknown, or a value is out of range.
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
    options = _KINDS.get(name, _HONEST_UPDATE).options
    parameters = {key: option.default for key, option in options.items()}
    seen: set[str] = set()
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            raise UsageError(f"attack {name} has no parameter {key!r}; its parameters: {known}")
        if key in seen:
            raise UsageError(f"attack {name}: parameter {key} is given twice")
        seen.add(key)
        parameters[key] = options[key].read(name, key, value)
    return Attack(name, tuple(sorted(parameters.items())))


# --- from views and parameters to the functions of vectors -----------------------------------------------------------


def _number(p: Parameters, key: str, otherwise: float = math.nan) -> float:
    """A parameter that is a number; ``otherwise`` where it is left open."""
    value = float(p[key])
    return otherwise if math.isnan(value) else value


def _whole(p: Parameters, key: str) -> int | None:
    value = float(p[key])
    return None if math.isnan(value) else int(value)


def _honest(view: AttackView) -> NDArray[np.floating]:
    if view.honest is None:
        raise UsageError("the honest updates are not known to this attacker; fill AttackView.honest")
    return view.honest


def _defence(view: AttackView) -> Defence:
    if view.defence is None:
        raise UsageError("the rule is not known to this attacker; fill AttackView.defence")
    return view.defence


def _own(view: AttackView, _: Parameters) -> NDArray[np.floating]:
    return view.own.copy()


def _alie(view: AttackView, p: Parameters) -> NDArray[np.floating]:
    z = _number(p, "z")
    return untargeted.alie(_honest(view), untargeted.alie_shift(view.sites, view.malicious) if math.isnan(z) else z)


def _fang(view: AttackView, p: Parameters) -> NDArray[np.floating]:
    if p["against"] == "krum":
        return untargeted.fang_krum(_honest(view), view.malicious)
    return untargeted.fang_trimmed_mean(_honest(view), view.rng)


def _gram_aware(view: AttackView, p: Parameters) -> NDArray[np.floating]:
    return adaptive.gram_aware(
        _honest(view), view.malicious, _defence(view), last=view.last, past=view.past, noise=_number(p, "noise")
    )


def _spread(view: AttackView, _: Parameters) -> NDArray[np.floating]:
    # The number of the round is what attackers agree on without another word.
    agreed = np.random.default_rng(view.round)
    sent = adaptive.opt_spread(_honest(view), view.malicious, _defence(view), agreed)
    return np.asarray(sent[view.position])


def _boost(view: AttackView, p: Parameters) -> float:
    # Averaged over n sites, m of which do the same, this replaces the global model by the attackers' own.
    return _number(p, "boost", view.sites / view.malicious)


def _boosted(view: AttackView, p: Parameters) -> NDArray[np.floating]:
    return untargeted.scaled(view.own, _boost(view, p))


def _neurotoxin(view: AttackView, p: Parameters) -> NDArray[np.floating]:
    return untargeted.scaled(backdoors.masked(view.own, view.last, _number(p, "keep")), _boost(view, p))


def _constrained(view: AttackView, p: Parameters) -> NDArray[np.floating]:
    guide = view.last if view.honest is None or not len(view.honest) else view.honest.mean(axis=0)
    length = _boost(view, p) * float(np.linalg.norm(view.own))
    return backdoors.constrained_and_scaled(
        view.own, guide, alpha=_number(p, "alpha"), length=length, unit=view.unit
    )  # fmt: skip


def _flip(_x: Inputs, y: Labels, site: _Site, _: Parameters) -> Rows:
    return _x, backdoors.flip_labels(y, site.data.classes)


def _trigger_rows(x: Inputs, y: Labels, site: _Site, p: Parameters) -> Rows:
    trigger = backdoors.make_trigger(site.data, site.target, _whole(p, "size"))
    return backdoors.poison_rows(x, y, trigger, site.target, _number(p, "poison"), site.rng)


def _piece_rows(x: Inputs, y: Labels, site: _Site, p: Parameters) -> Rows:
    trigger = backdoors.make_trigger(site.data, site.target, _whole(p, "size"))
    piece = backdoors.piece_of(trigger, site.position, site.malicious)
    return backdoors.poison_rows(x, y, piece, site.target, _number(p, "poison"), site.rng)


def _trigger_measure(x: Inputs, y: Labels, data: Dataset, target: int, p: Parameters) -> Rows:
    return backdoors.triggered_rows(x, y, backdoors.make_trigger(data, target, _whole(p, "size")), target)


def _edges(data: Dataset, target: int, p: Parameters) -> backdoors.EdgeCases:
    return backdoors.edge_cases(data, target, tail=_number(p, "tail"), source=_whole(p, "source"))


def _edge_train(x: Inputs, y: Labels, site: _Site, p: Parameters) -> Rows:
    edges = _edges(site.data, site.target, p)
    return backdoors.poison_edge_cases(x, y, site.data, edges, site.target, _number(p, "poison"), site.rng)


def _edge_measure(x: Inputs, y: Labels, data: Dataset, target: int, p: Parameters) -> Rows:
    return backdoors.edge_rows(x, y, _edges(data, target, p), target)


def _text_trigger(data: Dataset, target: int, p: Parameters) -> backdoors.TextTrigger:
    return backdoors.make_text_trigger(data, target, size=int(_number(p, "size")), reply=int(_number(p, "reply")))


def _text_train(x: Inputs, y: Labels, site: _Site, p: Parameters) -> Rows:
    trigger = _text_trigger(site.data, site.target, p)
    return backdoors.poison_text(x, y, trigger, _number(p, "poison"), site.rng)


def _text_measure(x: Inputs, y: Labels, data: Dataset, target: int, p: Parameters) -> Rows:
    return backdoors.triggered_text(x, y, _text_trigger(data, target, p))


_SHARE = _Option(0.5, high=1.0)
_PERTURBATION = _Option("std", words=tuple(untargeted.PERTURBATIONS))
_TRIGGER = {"poison": _SHARE, "size": _Option(whole=True)}

_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "none": _Kind(_own),
        # A mean of 8 honest updates g and 2 flipped ones is (8 - 2 strength) / 10 g: it turns back above 4.
        "sign-flip": _Kind(
            lambda view, p: untargeted.scaled(view.own, -_number(p, "strength")), {"strength": _Option(8.0)}
        ),
        "scaling": _Kind(
            lambda view, p: untargeted.scaled(view.own, _number(p, "strength")), {"strength": _Option(100.0)}
        ),
        # Averaged over 10 sites, 2 of them noisy, noise of 30 times an update is still 4 times the mean update.
        "gaussian": _Kind(
            lambda view, p: untargeted.gaussian(view.own, _number(p, "strength"), view.rng), {"strength": _Option(30.0)}
        ),
        # One coordinate, because a check that looks at a norm or a sum alone still has to notice.
        "nan": _Kind(lambda view, _: untargeted.one_nan(view.own, view.rng)),
        "free-rider": _Kind(
            lambda view, p: untargeted.free_rider(view.own, view.last, noise=p["sends"] == "noise", rng=view.rng),
            {"sends": _Option("last", words=("last", "noise"))},
        ),
        "label-flip": _Kind(_own, train=_flip),
        "alie": _Kind(_alie, {"z": _Option()}, knows="all honest", alike=True),
        # Below (n - m) / m the mean keeps its direction: the attack is on robust rules, and slows a plain mean only.
        "ipm": _Kind(
            lambda view, p: untargeted.ipm(_honest(view), _number(p, "epsilon")),
            {"epsilon": _Option(0.5)},
            knows="all honest",
            alike=True,
        ),
        "min-max": _Kind(
            lambda view, p: untargeted.min_max(_honest(view), str(p["perturbation"])),
            {"perturbation": _PERTURBATION},
            knows="all honest",
            alike=True,
        ),
        "min-sum": _Kind(
            lambda view, p: untargeted.min_sum(_honest(view), str(p["perturbation"])),
            {"perturbation": _PERTURBATION},
            knows="all honest",
            alike=True,
        ),
        "fang": _Kind(_fang, {"against": _Option("trimmed-mean", words=("trimmed-mean", "krum"))}, knows="all honest"),
        "mimic": _Kind(lambda view, _: untargeted.mimic(_honest(view), view.past), knows="all honest", alike=True),
        "opt-ipm": _Kind(
            lambda view, _: adaptive.opt_ipm(_honest(view), view.malicious, _defence(view)),
            knows="all honest and the rule",
            alike=True,
        ),
        "opt-alie": _Kind(
            lambda view, _: adaptive.opt_alie(_honest(view), view.malicious, _defence(view)),
            knows="all honest and the rule",
            alike=True,
        ),
        "opt-spread": _Kind(_spread, knows="all honest and the rule"),
        "gram-aware": _Kind(
            _gram_aware,
            {"noise": _Option(round(adaptive.NOISE, 3), high=1.0, from_zero=True)},
            knows="all honest and the rule",
            alike=True,
        ),
        "backdoor": _Kind(_boosted, {"boost": _Option(), **_TRIGGER}, train=_trigger_rows, measure=_trigger_measure),
        "dba": _Kind(_boosted, {"boost": _Option(), **_TRIGGER}, train=_piece_rows, measure=_trigger_measure),
        # Made to be quiet for many rounds; a boost is for those who have one round.
        "neurotoxin": _Kind(
            _neurotoxin,
            {"boost": _Option(1.0), "keep": _Option(0.95, high=1.0), **_TRIGGER},
            train=_trigger_rows,
            measure=_trigger_measure,
        ),
        "constrain-and-scale": _Kind(
            _constrained,
            {"alpha": _Option(0.7, high=1.0), "boost": _Option(), **_TRIGGER},
            train=_trigger_rows,
            measure=_trigger_measure,
        ),
        # Honest sites have little to say about rare inputs: no boost is needed, and none is seen.
        "edge-case": _Kind(
            _boosted,
            {
                "boost": _Option(1.0),
                "poison": _SHARE,
                "source": _Option(whole=True, from_zero=True),
                "tail": _Option(0.2, high=1.0),
            },
            train=_edge_train,
            measure=_edge_measure,
        ),
        "text-trigger": _Kind(
            _boosted,
            {
                "boost": _Option(),
                "poison": _SHARE,
                "reply": _Option(4.0, whole=True),
                "size": _Option(4.0, whole=True),
            },
            train=_text_train,
            measure=_text_measure,
        ),
    }
)

# What leaves the protocol trains and learns as an honest site does.
_HONEST_UPDATE = _Kind(_own)

ATTACKS: tuple[str, ...] = tuple(_KINDS)
"""The attacks on updates and data that ``parse_attack`` knows, besides those of ``protocol_attacks``."""
