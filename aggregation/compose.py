"""Rules by name: ``parse_rule("nnm+multi-krum")``.

A name is any number of pre-aggregators and then one rule, joined by ``+``; options stand in brackets:
``bucketing(size=3)+krum``, ``multi-krum(m=5)``, ``clip(norm=0.5)+mean``. The result is a :class:`Rule`, which looks
the same for all of them.

Two kinds of rules meet here. Most need only inner products and are applied to a Gram matrix (:meth:`Rule.apply`);
these run under every cipher suite. A few need the updates themselves (``Rule.needs == "updates"``) and exist only
where updates are in the clear (:meth:`Rule.aggregate`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quorsum.aggregation import rules
from quorsum.aggregation.clear import coordinate_median, trimmed_mean
from quorsum.aggregation.crowd import alikeness, apart, crowd_clipping
from quorsum.aggregation.errors import ClearSuiteError, UnknownRuleError
from quorsum.aggregation.gram import (
    KRUM_MAJORITY,
    MAJORITY,
    ONE_HONEST,
    Bound,
    Gram,
    Mask,
    Scores,
    Weights,
    as_count,
    as_gram,
    as_positive,
    as_row,
    as_updates,
    distances_to,
    gram_matrix,
    lowest,
    mix,
    require_sites,
    squared_distances,
    uniform,
)
from quorsum.aggregation.mixing import arc_matrix, bucketing_matrix, clip_matrix, nnm_matrix
from quorsum.errors import UsageError

__all__ = ["CLEAR_SUITES", "Outcome", "Rule", "known_rules", "parse_rule", "select"]

CLEAR_SUITES = frozenset({"plain"})
"""Suites in which the coordinator sees updates. Every other suite is taken for an encrypted one."""

Options: TypeAlias = Mapping[str, int | float]
Check: TypeAlias = Callable[[str, int | float], int | float]
ScalarT = TypeVar("ScalarT", bound=np.generic)


@dataclass(frozen=True)
class Outcome:
    """What a rule decided. All arrays have one entry per row of the Gram matrix and are read-only.

    Attributes:
        rule: full name of the rule.
        weights: float64; the aggregate is ``sum_i weights_i x_i``.
        scores: float64, higher is worse, comparable within one outcome only. After a pre-aggregator a row carries
            the score of its mixed row (NNM, ARC, clipping) or of its bucket.
        keep: the rule as a plain selection, for suites that add up a set of updates with equal weights. Rules that
            select keep what they selected; of those that weigh, the geometric median keeps all but its f worst scores,
            centred clipping all, crowd clipping all but what repeats others; the mean keeps all.
            An extra reference row is never kept. With NNM the selection is that of the mixed rows: a kept row was
            judged by its neighbourhood.
    """

    rule: str
    weights: Weights
    scores: Scores
    keep: Mask

    @property
    def selected(self) -> Mask:
        """Rows that enter the aggregate: those with a weight other than zero."""
        return np.asarray(self.weights != 0)


def select(outcome: Outcome) -> Mask:
    """The outcome as a selection: a fresh mask, True for the rows to add up with equal weights."""
    return outcome.keep.copy()


class _Verdict(NamedTuple):
    """What one rule says about the rows it was shown."""

    weights: Weights
    scores: Scores
    keep: Mask


Reference: TypeAlias = Literal["none", "site", "extra", "optional extra"]
"""What a rule does with a reference row: nothing; one of the sites; a row besides the sites; the same, if given."""


@dataclass(frozen=True)
class _Final:
    """A rule in the table of names. Exactly one of ``judge`` and ``aggregate`` is there."""

    bound: Bound
    judge: Callable[[Gram, int, int | None, Options], _Verdict] | None = None
    aggregate: Callable[[ArrayLike, int], NDArray[np.float64]] | None = None
    options: Mapping[str, Check] = field(default_factory=dict)
    reference: Reference = "none"
    robust: bool = True


@dataclass(frozen=True)
class _Mixer:
    """A pre-aggregator in the table of names.

    Attributes:
        inputs: how many rows must come in so that this many go out.
    """

    bound: Bound
    matrix: Callable[[Gram, int, np.random.Generator | None, Options], NDArray[np.float64]]
    inputs: Callable[[int, Options], int] = lambda outputs, _options: outputs
    options: Mapping[str, Check] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    buckets: bool = False


@dataclass(frozen=True)
class _Part:
    """One part of a composed name with its options."""

    name: str
    pairs: tuple[tuple[str, int | float], ...] = ()

    @property
    def options(self) -> Options:
        return dict(self.pairs)

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={value}" for key, value in self.pairs)
        return f"{self.name}({inside})" if inside else self.name


@dataclass(frozen=True)
class Rule:
    """A rule, alone or behind pre-aggregators; made by :func:`parse_rule`.

    Attributes:
        parts: the parts of the name, the rule last.
    """

    parts: tuple[_Part, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """Full name, which :func:`parse_rule` reads back."""
        return "+".join(map(str, self.parts))

    @property
    def needs(self) -> Literal["gram", "updates"]:
        """What the rule must see: ``"gram"`` (every suite) or ``"updates"`` (the clear suite only)."""
        return "gram" if self._final.judge is not None else "updates"

    @property
    def needs_reference(self) -> bool:
        """Whether a reference row must be given."""
        return self._final.reference in ("site", "extra")

    @property
    def needs_generator(self) -> bool:
        """Whether random numbers are drawn, so that ``rng`` must be given."""
        return any(mixer.buckets for _, mixer in self._mixers)

    @property
    def robust(self) -> bool:
        """Whether the rule has a breakdown point above zero; false for anything that ends in ``mean``."""
        return self._final.robust

    @property
    def bound(self) -> str:
        """The bound on f as text, every part with its own."""
        bounds = [f"{part.name}: {mixer.bound.text}" for part, mixer in self._mixers]
        if not bounds:
            return self._final.bound.text
        return "; ".join([*bounds, f"{self.parts[-1].name}: {self._final.bound.text}"])

    def minimum_sites(self, f: int) -> int:
        """Smallest number of sites with which the rule tolerates f malicious ones.

        Raises:
            UsageError: f is not a whole number from 0.
        """
        tolerated = as_count("f", f, 0)
        rows = self._final.bound.minimum(tolerated)
        for part, mixer in reversed(self._mixers):
            rows = max(mixer.bound.minimum(tolerated), mixer.inputs(rows, part.options))
        return rows

    def apply(
        self, gram: ArrayLike, f: int, *, rng: np.random.Generator | None = None, reference: int | None = None
    ) -> Outcome:
        """Judge the rows of a Gram matrix.

        Args:
            gram: shape (n, n); with an extra reference row (FLTrust, centred clipping) one row more than sites.
            f: how many sites may be malicious.
            rng: source of randomness, for ``bucketing`` only.
            reference: row of the reference. FLTrust and centred clipping take it for an extra row beside the sites
                and hide it from pre-aggregators; for MoNNA it is one of the sites.

        Raises:
            BoundError: too few sites for f, by any part.
            ClearSuiteError: the rule needs the updates.
            NonFiniteGramError: some rows are not finite.
            RoundFailed: the rule has no answer (``NoConvergenceError``, ``NoTrustError``).
            UsageError: an argument is malformed, missing, or given to a rule that has no use for it.
        """
        judge = self._final.judge
        if judge is None:
            raise ClearSuiteError(_why_clear(self.name, "this is a Gram matrix"))
        inner = as_gram(gram)
        pivot = self._checked_reference(reference, len(inner))
        self._require(len(inner) - self._extra(pivot), f)
        matrix, owners = self._mixing(inner, f, rng, pivot)
        mixed = inner if matrix is None else mix(inner, matrix)
        verdict = judge(mixed, f, None if pivot is None else int(owners[pivot]), self.parts[-1].options)
        weights = verdict.weights if matrix is None else matrix.T @ verdict.weights
        return Outcome(self.name, _sealed(weights), _sealed(verdict.scores[owners]), _sealed(verdict.keep[owners]))

    def aggregate(
        self, updates: ArrayLike, f: int, *, rng: np.random.Generator | None = None, reference: int | None = None
    ) -> NDArray[np.float64]:
        """Aggregate updates in the clear; the only way to use a rule that needs them.

        Args:
            updates: shape (n, d), finite; with an extra reference row as in :meth:`apply`.
            f: how many sites may be malicious.
            rng: source of randomness, for ``bucketing`` only.
            reference: row of the reference, as in :meth:`apply`.

        Returns:
            float64, shape (d,).

        Raises:
            NonFiniteUpdateError: some rows are not finite.
            QuorsumError: whatever :meth:`apply` raises.
        """
        matrix = as_updates(updates)
        final = self._final.aggregate
        if final is None:
            return np.asarray(
                self.apply(gram_matrix(matrix), f, rng=rng, reference=reference).weights @ matrix, dtype=np.float64
            )
        self._checked_reference(reference, len(matrix))
        self._require(len(matrix), f)
        if not self._mixers:
            return final(matrix, f)
        mixing, _ = self._mixing(as_gram(gram_matrix(matrix)), f, rng, None)
        return final(matrix if mixing is None else mixing @ matrix, f)

    @property
    def _final(self) -> _Final:
        return _RULES[self.parts[-1].name]

    @property
    def _mixers(self) -> list[tuple[_Part, _Mixer]]:
        return [(part, _MIXERS[part.name]) for part in self.parts[:-1]]

    def _require(self, n: int, f: int) -> None:
        require_sites(self.name, n, f, Bound(self.bound, self.minimum_sites))

    def _checked_reference(self, reference: int | None, n: int) -> int | None:
        if reference is None:
            if self.needs_reference:
                raise UsageError(f"{self.name} needs a trusted row: pass its number as reference")
            return None
        if self._final.reference == "none":
            raise UsageError(f"{self.name} has no use for a reference row: leave reference out, and the row too")
        return as_row("reference", reference, n)

    def _extra(self, reference: int | None) -> int:
        """How many rows are no sites: 0 or 1."""
        return int(reference is not None and self._final.reference in ("extra", "optional extra"))

    def _mixing(
        self, gram: Gram, f: int, rng: np.random.Generator | None, reference: int | None
    ) -> tuple[NDArray[np.float64] | None, NDArray[np.intp]]:
        """The product of all mixing matrices (None without any), and which mixed row stands for each row."""
        owners = np.arange(len(gram))
        total: NDArray[np.float64] | None = None
        current, pivot = gram, reference
        for part, mixer in self._mixers:
            sites = np.ones(len(current), dtype=np.bool_)
            if pivot is not None and self._extra(pivot):
                sites[pivot] = False
            among = mixer.matrix(current[np.ix_(sites, sites)], f, rng, part.options)
            matrix = _beside(among, sites)
            # A bucket stands for all in it. An NNM mixture has many entries too, but stands for the row it is around.
            stands = np.argmax(matrix != 0, axis=0) if mixer.buckets else np.arange(len(current))
            owners = stands[owners]
            pivot = None if pivot is None else int(stands[pivot])
            total = matrix if total is None else matrix @ total
            current = mix(current, matrix)
        return total, owners


def known_rules() -> dict[str, str]:
    """Every rule and pre-aggregator that :func:`parse_rule` knows, with its bound."""
    mixers = {name: mixer.bound.text for name, mixer in _MIXERS.items()}
    return mixers | {name: final.bound.text for name, final in _RULES.items()}


def parse_rule(text: str, *, suite: str | None = None) -> Rule:
    """Read the name of a rule.

    Args:
        text: pre-aggregators and one rule joined by ``+``, case does not matter, such as ``"nnm+multi-krum"``.
        suite: cipher suite it must run under, such as ``"plain"`` or ``"ckks"``; what follows the first word is
            ignored. Without it no suite is assumed.

    Raises:
        UnknownRuleError: a part is not known; the error lists what is and suggests the closest.
        ClearSuiteError: the rule needs the updates and the suite hides them.
        UsageError: the name has the wrong form, an option has a wrong value or is missing.
    """
    # A plus sign inside brackets belongs to a number such as 1e+3.
    pieces = re.split(r"\+(?![^()]*\))", text.strip().lower())
    parts = tuple(_parse_part(piece.strip(), text, last=place == len(pieces)) for place, piece in enumerate(pieces, 1))
    rule = Rule(parts)
    if suite is not None and rule.needs == "updates" and not _is_clear(suite):
        raise ClearSuiteError(_why_clear(rule.name, f"suite {suite!r} reveals only inner products and one sum"))
    return rule


def _parse_part(piece: str, text: str, *, last: bool) -> _Part:
    match = re.fullmatch(r"([a-z][a-z0-9-]*)\s*(?:\((.*)\))?", piece)
    if match is None:
        raise UsageError(f"{text!r} is not the name of a rule: expected something like 'nnm+multi-krum' or 'krum'")
    name = _ALIASES.get(match[1], match[1])
    table: Mapping[str, _Final | _Mixer] = _RULES if last else _MIXERS
    entry = table.get(name)
    if entry is None:
        raise UnknownRuleError(_why_unknown(name, text, last=last))
    options = dict(_parse_option(option, name, entry.options) for option in (match[2] or "").split(",") if option)
    for key in entry.required if isinstance(entry, _Mixer) else ():
        if key not in options:
            raise UsageError(f"{name} has no sensible default for {key}: write {name}({key}=...)")
    return _Part(name, tuple(options.items()))


def _parse_option(option: str, rule: str, known: Mapping[str, Check]) -> tuple[str, int | float]:
    key, _, value = (piece.strip() for piece in option.partition("="))
    if key not in known:
        listed = ", ".join(known) or "none"
        raise UnknownRuleError(f"{rule} has no option {key!r}; its options: {listed}")
    try:
        number: int | float = int(value)
    except ValueError:
        try:
            number = float(value)
        except ValueError:
            raise UsageError(f"option {key} of {rule} must be a number, got {value!r}") from None
    return key, known[key](key, number)


def _why_unknown(name: str, text: str, *, last: bool) -> str:
    if last and name in _MIXERS:
        return f"{name} only prepares updates and {text!r} ends with it: add a rule, such as {name}+multi-krum"
    if not last and name in _RULES:
        return f"{name} is a rule and comes last, in {text!r} something follows it"
    table, kind = (_RULES, "rule") if last else (_MIXERS, "pre-aggregator")
    close = get_close_matches(name, [*table, *_ALIASES], n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown {kind} {name!r} in {text!r}: {hint}known: {', '.join(table)}"


def _why_clear(name: str, because: str) -> str:
    return (
        f"{name} needs every coordinate of every update, and {because}: "
        "use a rule of the Gram matrix, such as nnm+multi-krum, or the clear suite"
    )


def _is_clear(suite: str) -> bool:
    return re.split(r"[^a-z]", suite.strip().lower(), maxsplit=1)[0] in CLEAR_SUITES


def _beside(among: NDArray[np.float64], sites: Mask) -> NDArray[np.float64]:
    """A mixing matrix of the sites, with the extra row (if any) passed through, as the last of the mixed rows.

    Square matrices keep the extra row where it is, so that rows and mixed rows have the same numbers.
    """
    if sites.all():
        return among
    outputs = len(among) + 1
    places = sites if len(among) == np.count_nonzero(sites) else np.arange(outputs) < outputs - 1
    matrix = np.zeros((outputs, len(sites)))
    matrix[np.ix_(places, sites)] = among
    matrix[np.ix_(~places, ~sites)] = 1.0
    return matrix


def _sealed(array: NDArray[ScalarT]) -> NDArray[ScalarT]:
    frozen = array.copy()
    frozen.setflags(write=False)
    return frozen


def _check_count(name: str, value: int | float) -> int:
    # Type narrowing is as_count's work: 2.0 is refused there like any other non-integer.
    return as_count(name, value, 1)  # type: ignore[arg-type]


def _selection(scores: Scores, keep: Mask) -> _Verdict:
    return _Verdict(uniform(keep), scores, keep)


def _judge_mean(gram: Gram, f: int, _reference: int | None, _options: Options) -> _Verdict:
    return _Verdict(rules.mean(gram, f), np.zeros(len(gram)), np.ones(len(gram), dtype=np.bool_))


def _judge_krum(gram: Gram, f: int, _reference: int | None, _options: Options) -> _Verdict:
    scores = rules.krum_scores(gram, f)
    return _selection(scores, lowest(scores, 1))


def _judge_multi_krum(gram: Gram, f: int, _reference: int | None, options: Options) -> _Verdict:
    scores = rules.krum_scores(gram, f)
    m = int(options["m"]) if "m" in options else None
    return _selection(scores, lowest(scores, rules.multi_krum_count(len(gram), f, m)))


def _judge_mda(gram: Gram, f: int, _reference: int | None, _options: Options) -> _Verdict:
    keep = rules.mda(gram, f) > 0
    # The distance to the farthest chosen row: what the diameter would be with this row in.
    return _selection(np.sqrt(squared_distances(gram)[:, keep].max(axis=1)), keep)


def _judge_geometric_median(gram: Gram, f: int, _reference: int | None, options: Options) -> _Verdict:
    weights = rules.geometric_median(gram, f, **options)  # type: ignore[arg-type]
    scores = distances_to(gram, weights)
    return _Verdict(weights, scores, lowest(scores, len(gram) - f))


def _judge_centred_clipping(gram: Gram, f: int, reference: int | None, options: Options) -> _Verdict:
    weights = rules.centred_clipping(gram, f, reference=reference, **options)  # type: ignore[arg-type]
    sites = np.arange(len(gram)) != (-1 if reference is None else reference)
    # Where updates are clipped to a common norm already, the mean of all of them is one step around zero: dropping
    # anybody would take robustness away, not add it.
    return _Verdict(weights, distances_to(gram, (~sites).astype(np.float64)), sites)


def _judge_crowd_clipping(gram: Gram, f: int, _reference: int | None, options: Options) -> _Verdict:
    weights = crowd_clipping(gram, f, **options)
    # In how many others' company a row is.
    return _Verdict(weights, alikeness(gram, f).sum(axis=1) - 1.0, apart(gram, f))


def _judge_monna(gram: Gram, f: int, reference: int | None, _options: Options) -> _Verdict:
    keep = rules.monna(gram, f, reference=_given(reference)) > 0
    return _selection(np.sqrt(squared_distances(gram)[_given(reference)]), keep)


def _judge_fltrust(gram: Gram, f: int, reference: int | None, _options: Options) -> _Verdict:
    weights = rules.fltrust(gram, f, reference=_given(reference))
    return _Verdict(weights, 1 - rules.cosines(gram, _given(reference)), weights > 0)


def _judge_spectral(gram: Gram, f: int, _reference: int | None, _options: Options) -> _Verdict:
    return _selection(*rules.spectral_filter(gram, f))


def _given(reference: int | None) -> int:
    if reference is None:
        raise UsageError("this rule needs a trusted row: pass its number as reference")
    return reference


def _bucketing(gram: Gram, _f: int, rng: np.random.Generator | None, options: Options) -> NDArray[np.float64]:
    if rng is None:
        raise UsageError("bucketing draws its groups at random: pass rng, a numpy Generator")
    return bucketing_matrix(len(gram), rng, int(options.get("size", 2)))


_MIXERS: dict[str, _Mixer] = {
    "nnm": _Mixer(MAJORITY, lambda gram, f, _rng, _options: nnm_matrix(gram, f)),
    "bucketing": _Mixer(
        Bound("the rule behind sees ceil(n / size) rows", lambda _f: 1),
        _bucketing,
        inputs=lambda outputs, options: int(options.get("size", 2)) * (outputs - 1) + 1,
        options={"size": _check_count},
        buckets=True,
    ),
    "arc": _Mixer(MAJORITY, lambda gram, f, _rng, _options: arc_matrix(gram, f)),
    "clip": _Mixer(
        Bound("no bound of its own", lambda _f: 1),
        lambda gram, _f, _rng, options: clip_matrix(gram, options["norm"]),
        options={"norm": as_positive},
        required=("norm",),
    ),
}

_RULES: dict[str, _Final] = {
    "mean": _Final(ONE_HONEST, _judge_mean, robust=False),
    "krum": _Final(KRUM_MAJORITY, _judge_krum),
    "multi-krum": _Final(KRUM_MAJORITY, _judge_multi_krum, options={"m": _check_count}),
    "mda": _Final(MAJORITY, _judge_mda),
    "geometric-median": _Final(
        MAJORITY,
        _judge_geometric_median,
        options={"smoothing": as_positive, "tolerance": as_positive, "iterations": _check_count},
    ),
    "centred-clipping": _Final(
        MAJORITY,
        _judge_centred_clipping,
        options={"radius": as_positive, "steps": _check_count},
        reference="optional extra",
    ),
    "crowd-clipping": _Final(MAJORITY, _judge_crowd_clipping, options={"radius": as_positive}),
    "monna": _Final(MAJORITY, _judge_monna, reference="site"),
    "fltrust": _Final(ONE_HONEST, _judge_fltrust, reference="extra"),
    "spectral": _Final(MAJORITY, _judge_spectral),
    "median": _Final(MAJORITY, aggregate=coordinate_median),
    "trimmed-mean": _Final(MAJORITY, aggregate=trimmed_mean),
}

_ALIASES = {"centered-clipping": "centred-clipping", "multikrum": "multi-krum", "average": "mean"}
