"""One round, as phases. The same code for every cipher suite and every rule.

1. **train**: every invited site gets the model and the round's context, trains, seals its difference, sends it.
   Each submission is checked when it arrives. One that fails a check costs its sender this round and nothing else.
2. **geometry**: the suite *measures* the Gram matrix of what was accepted (it may ask the sites); rows that cannot
   belong to an honest update are taken out; the rule turns the rest into weights.
3. **open**: the suite *combines* the updates with those weights (it may ask the sites) and the opened sum is compared
   with what the Gram matrix predicts. Then, and only then, the model moves.
4. **evaluate**: outside this module, on the new model.

Of the f sites that may be malicious, those proven in this round to have left the protocol could be counted off before
the rule sees the rest. That is done only for what sites repeat from signed messages (suites that select): elsewhere a
malicious node can send rubbish in an honest site's name, and would lower f by it. Silence proves nothing anywhere.

A round that cannot be finished leaves the model as it was and says why; the run goes on.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from quorsum import arrays, messages
from quorsum.aggregation import Judgement, Rule, check_gram, judge, norm_gate
from quorsum.crypto.checks import check_opened
from quorsum.crypto.dialogue import run_dialogue
from quorsum.crypto.suite import Ask, Blocks, CoordinatorSuite, RandomBytes, RoundContext, RoundSuite, Site
from quorsum.errors import HidingSuspected, Refusal, RoundFailed, SiteFault, UsageError
from quorsum.server.exchange import Network, Traffic
from quorsum.server.records import RoundRecord

__all__ = ["Plan", "RoundOutcome", "expect", "play_round"]


# Sketches in the round after one in which somebody may have hidden from them.
CAREFUL_SKETCHES = 16


@dataclass(frozen=True)
class Plan:
    """What stays the same over a run.

    Attributes:
        run: random identifier of the run.
        suite: the coordinator's end of the cipher suite.
        keys: each site's key as it was introduced: fingerprint and public key.
        rule: the robust rule.
        tolerate: f, number of malicious sites to tolerate.
        collude: tau, number of sites that may pool what they know with a malicious coordinator.
        clip: whether sites clip to the reference norm.
        sketches: r, random sketches per round.
        reference: the site whose row serves rules that need a trusted reference.
        random_bytes: source of the coordinator's randomness.
        on_phase: told the number of the round and the name of the phase that begins.
    """

    run: str
    suite: CoordinatorSuite
    keys: Mapping[Site, tuple[str, bytes]]
    rule: Rule
    tolerate: int
    collude: int
    clip: bool
    sketches: int
    reference: Site | None
    random_bytes: RandomBytes = field(repr=False)
    on_phase: Callable[[int, str], None] = lambda number, phase: None


@dataclass(frozen=True)
class RoundOutcome:
    """The model after a round, the reference norm and the number of sketches of the next one, and the record."""

    model: ArrayRecord
    unit: float
    sketches: int
    record: RoundRecord


@dataclass
class _Ledger:
    """What is known of the sites while a round runs."""

    faults: dict[Site, SiteFault] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    train_seconds: dict[Site, float] = field(default_factory=dict)
    seal_seconds: dict[Site, float] = field(default_factory=dict)

    def blame(self, fault: SiteFault) -> None:
        """The first fault of a site is its reason for this round."""
        self.faults.setdefault(fault.site, fault)


@dataclass(frozen=True)
class _Selection:
    """What phase 2 decided.

    Attributes:
        kept: the sites whose rows the rule saw, in the order of ``gram``.
        gram: float64, shape (m, m).
        weights: the sites with a weight other than zero.
        tolerate: how many of these sites may still be malicious.
    """

    kept: tuple[Site, ...]
    gram: NDArray[np.float64]
    weights: dict[Site, float]
    tolerate: int


@dataclass(frozen=True)
class _Play:
    """Everything that the phases of one round share."""

    plan: Plan
    suite: RoundSuite[Any]
    network: Network
    context: RoundContext
    ledger: _Ledger = field(default_factory=_Ledger)
    traffic: Traffic = field(default_factory=Traffic)


def play_round(
    plan: Plan, network: Network, number: int, model: ArrayRecord, unit: float, config: ConfigRecord
) -> RoundOutcome:
    """Play one round and return what came out; never raises for what sites or bad luck did."""
    started = time.perf_counter()
    context = RoundContext(
        run=plan.run,
        round=number,
        attempt=1,
        sites=tuple(sorted(network.nodes)),
        dimension=arrays.dimension(model),
        tolerate=plan.tolerate,
        unit=unit,
        clip=plan.clip,
        sketches=plan.sketches,
        collude=plan.collude,
        rule=plan.rule.name,
        model=arrays.fingerprint(model),
    )
    context, suite = plan.suite.prepare(context, plan.random_bytes)
    play = _Play(plan, suite, network, context)
    ledger = play.ledger
    seconds = {"geometry": 0.0, "open": 0.0}
    weights: dict[Site, float] = {}
    failed: str | None = None
    next_unit, sketches = unit, plan.sketches
    try:
        plan.on_phase(number, "train")
        uploads = _collect(play, model, config)

        plan.on_phase(number, "geometry")
        clock = time.perf_counter()
        selection = _select(play, uploads)
        seconds["geometry"] = time.perf_counter() - clock

        plan.on_phase(number, "open")
        clock = time.perf_counter()
        total = _open(play, uploads, selection)
        model = arrays.apply_update(model, total)
        seconds["open"] = time.perf_counter() - clock
        weights, next_unit = selection.weights, _next_unit(unit, selection)
    except RoundFailed as error:
        failed = str(error)
        sketches = CAREFUL_SKETCHES if isinstance(error, HidingSuspected) else plan.sketches
        for fault in error.faults.values():
            if isinstance(fault, SiteFault):
                ledger.blame(fault)
    seconds |= {
        "train": statistics.median(ledger.train_seconds.values()) if ledger.train_seconds else 0.0,
        "seal": statistics.median(ledger.seal_seconds.values()) if ledger.seal_seconds else 0.0,
        "total": time.perf_counter() - started,
    }
    return RoundOutcome(model, next_unit, sketches, _record(play, weights, failed, seconds))


def _collect(play: _Play, model: ArrayRecord, config: ConfigRecord) -> dict[Site, Any]:
    """Phase 1: the accepted uploads, by site in roster order."""
    plan, network, context, ledger = play.plan, play.network, play.context, play.ledger
    users = RecordDict({"arrays": model, "config": config})
    wire = messages.Context.of(context)
    instructions = {
        site: messages.pack(messages.Train(site=site, suite=play.suite.name, context=wire), beside=users)
        for site in context.sites
    }
    uploads: dict[Site, Any] = {}
    for site, reply in network.exchange(instructions, f"{context.round}", play.traffic):
        try:
            if site in uploads or isinstance(reply, SiteFault):
                _second_or_missing(site, reply, uploads, ledger)
                continue
            submission, blocks = expect(messages.Submission, site, reply)
            if submission.context != context.digest().hex():
                raise SiteFault(site, "wrong-round", "sealed for another round than the one it was asked for")
            if submission.key_id != plan.keys[site][0]:
                raise SiteFault(site, "wrong-key", "sealed with another key than it introduced itself with")
            uploads[site] = play.suite.accept(context, site, blocks)
            ledger.train_seconds[site] = submission.train_seconds
            ledger.seal_seconds[site] = submission.seal_seconds
        except SiteFault as fault:
            ledger.blame(fault)
    return {site: uploads[site] for site in context.sites if site in uploads}


def _second_or_missing(site: Site, reply: object, uploads: Mapping[Site, Any], ledger: _Ledger) -> None:
    if site in uploads or site in ledger.faults:
        ledger.notes.append(str(reply) if isinstance(reply, SiteFault) else f"site {site}: answered twice")
    elif isinstance(reply, SiteFault):
        ledger.blame(reply)


def expect(kind: type[Any], site: Site, content: RecordDict) -> tuple[Any, Blocks]:
    """The reply as the message that is due.

    Raises:
        SiteFault: it is another message, none at all, or the site's own refusal (which proves nothing).
    """
    try:
        message, blocks = messages.unpack(content)
    except Refusal as refusal:
        raise SiteFault(site, refusal.code, refusal.message) from None
    if isinstance(message, messages.Fault):
        raise SiteFault(site, f"says-{message.code}", f"says: {message.message}", proven=False)
    if not isinstance(message, kind):
        raise SiteFault(site, "unexpected", f"sent a message of kind {message.kind!r} where another was due")
    return message, blocks


def _asker(play: _Play) -> Callable[[Ask], Mapping[Site, Blocks]]:
    """How a suite's dialogue reaches the sites: one exchange per Ask, faults noted, answers returned."""
    context, ledger = play.context, play.ledger

    def ask(question: Ask) -> Mapping[Site, Blocks]:
        header = messages.Question(context=context.digest().hex(), phase=question.phase)
        contents = {site: messages.pack(header, blocks) for site, blocks in question.questions.items()}
        answers: dict[Site, Blocks] = {}
        for site, reply in play.network.exchange(contents, f"{context.round}", play.traffic):
            if site in answers or isinstance(reply, SiteFault):
                if isinstance(reply, SiteFault):
                    ledger.notes.append(str(reply))
                continue
            try:
                answer, blocks = expect(messages.Answer, site, reply)
                if (answer.context, answer.phase) != (header.context, header.phase):
                    raise SiteFault(site, "wrong-round", f"answered another question than {question.phase!r}")
                answers[site] = blocks
            except SiteFault as fault:
                ledger.notes.append(str(fault))
        return answers

    return ask


def _select(play: _Play, uploads: Mapping[Site, Any]) -> _Selection:
    """Phase 2: measure, take out rows that no honest update can have, and let the rule decide on the rest."""
    plan, suite, context, ledger = play.plan, play.suite, play.context, play.ledger
    _enough(play, len(uploads))
    measured = run_dialogue(suite.measure(context, uploads, plan.random_bytes), _asker(play))
    for fault in measured.faults.values():
        # Silence while opening takes no row away: the update is there and the others opened it. Neither does a lie
        # where the sites repeat the selection, which they make from the opened matrix alone.
        if fault.site in measured.sites and (suite.selects or not fault.proven):
            ledger.notes.append(str(fault))
        else:
            ledger.blame(fault)
    rows = [row for row, site in enumerate(measured.sites) if site not in ledger.faults]
    sites = tuple(measured.sites[row] for row in rows)
    gram = measured.gram[np.ix_(rows, rows)]
    # Where the suite has counted off proven liars, the sites will repeat the decision with its number.
    tolerate = plan.tolerate if measured.tolerate is None else measured.tolerate
    if plan.rule.needs == "updates":
        return _coordinates(play, sites, gram)
    if plan.reference is not None and plan.reference not in sites:
        raise RoundFailed(f"the reference site {plan.reference} has no usable update in this round", _faults(ledger))
    try:
        verdict = judge(
            gram,
            plan.rule,
            tolerate,
            norm_bound=norm_gate(context.unit, context.clip),
            norm_proves=context.clip,
            noise=suite.gram_noise(context),
            count_off=suite.selects,
            equal=suite.selects,
            rng=np.random.default_rng(int.from_bytes(plan.random_bytes(16), "little")),
            reference=None if plan.reference is None else sites.index(plan.reference),
        )
    except UsageError as error:
        # Too few rows for the bound, or a reference with which the rule can do nothing.
        raise RoundFailed(f"{error}; the model stays as it was", _faults(ledger)) from error
    _blame_rows(play, sites, verdict)
    weights = {site: float(w) for site, w in zip(sites, verdict.weights, strict=True) if w != 0.0}
    if len(weights) < suite.least_opened:
        raise RoundFailed(
            f"{plan.rule.name} keeps {len(weights)} sites, and a sum over fewer than {suite.least_opened} shows "
            "too much of each; the model stays as it was",
            _faults(ledger),
        )
    index = list(verdict.rows)
    kept = tuple(sites[row] for row in index)
    return _Selection(kept, gram[np.ix_(index, index)], weights, verdict.tolerate)


def _coordinates(play: _Play, sites: tuple[Site, ...], gram: NDArray[np.float64]) -> _Selection:
    """For rules that work on single coordinates: no weights, only rows that cannot be honest are taken out."""
    plan, context, ledger = play.plan, play.context, play.ledger
    gate = norm_gate(context.unit, context.clip)
    findings = check_gram(gram, plan.tolerate, norm_bound=gate, norm_proves=context.clip)
    for row, finding in findings.items():
        ledger.blame(SiteFault(sites[row], finding.code, finding.reason, finding.proven))
    index = list(findings.remaining)
    kept = tuple(sites[row] for row in index)
    _enough(play, len(kept))
    return _Selection(kept, gram[np.ix_(index, index)], dict.fromkeys(kept, 1 / len(kept)), plan.tolerate)


def _blame_rows(play: _Play, sites: tuple[Site, ...], verdict: Judgement) -> None:
    """Say of each row without a weight why it has none."""
    plan, ledger = play.plan, play.ledger
    for row, site in enumerate(sites):
        if row in verdict.findings:
            finding = verdict.findings[row]
            ledger.blame(SiteFault(site, finding.code, finding.reason, finding.proven))
        elif site == plan.reference:
            ledger.blame(SiteFault(site, "reference", "served as the reference, not as a voice", proven=False))
        elif verdict.weights[row] == 0.0:
            sentence = f"left out by {plan.rule.name} with score {verdict.scores[row]:.3g}"
            ledger.blame(SiteFault(site, "rule", sentence, proven=False))


def _enough(play: _Play, usable: int) -> None:
    """Refuse to go on with so few usable updates that the rule cannot tolerate f malicious ones among them.

    Raises:
        RoundFailed: with so few usable updates the rule cannot tolerate that many.
    """
    plan, context, ledger = play.plan, play.context, play.ledger
    # A reference row is a voice of its own kind, not one of the sites that are judged.
    need = plan.rule.minimum_sites(plan.tolerate) + (plan.reference is not None)
    if usable < need:
        raise RoundFailed(
            f"only {usable} of {len(context.sites)} sites sent a usable update; {plan.rule.name} needs {need} to "
            f"tolerate {plan.tolerate} malicious ones; the model stays as it was",
            _faults(ledger),
        )


def _open(play: _Play, uploads: Mapping[Site, Any], selection: _Selection) -> NDArray[np.float64]:
    """Phase 3: the opened weighted sum, checked against what the Gram matrix predicts."""
    plan, suite, context, ledger = play.plan, play.suite, play.context, play.ledger
    if plan.rule.needs == "updates":
        # Only the clear suite gets here (parse_rule refuses the others), where an upload is its blocks.
        matrix = np.stack([np.concatenate(uploads[site].blocks) for site in selection.kept])
        return plan.rule.aggregate(matrix, selection.tolerate)
    # Only sites in good standing are asked to open.
    standing = {site: uploads[site] for site in selection.kept}
    opened = run_dialogue(suite.combine(context, standing, selection.weights, plan.random_bytes), _asker(play))
    # A site that lies while the sum is opened is outvoted; its own update was measured and selected before.
    ledger.notes.extend(str(fault) for fault in opened.faults.values())
    vector = np.array([selection.weights.get(site, 0.0) for site in selection.kept])
    tolerance, floor = suite.ratio_tolerance(context), suite.noise_floor(context, selection.weights)
    check_opened(opened.total, vector, selection.gram, tolerance, floor)
    return opened.total


def _next_unit(unit: float, selection: _Selection) -> float:
    """C of the next round: the median norm of the accepted updates, moved by at most a factor of two."""
    squares = np.diagonal(selection.gram)
    norms = [
        math.sqrt(max(g, 0.0)) for g, site in zip(squares, selection.kept, strict=True) if site in selection.weights
    ]
    median = statistics.median(norms)
    return min(max(median, unit / 2), unit * 2) if median > 0 else unit


def _faults(ledger: _Ledger) -> dict[str, Refusal]:
    return dict(ledger.faults)


def _record(play: _Play, weights: dict[Site, float], failed: str | None, seconds: dict[str, float]) -> RoundRecord:
    context, ledger, traffic = play.context, play.ledger, play.traffic
    rejected = tuple(site for site in context.sites if site not in weights)
    unsaid = SiteFault("", "round-failed", failed or "not used", proven=False)
    faults = {site: ledger.faults.get(site, unsaid) for site in rejected}
    invited = len(context.sites)
    return RoundRecord(
        round=context.round,
        invited=context.sites,
        accepted=tuple(site for site in context.sites if site in weights),
        rejected=rejected,
        reasons={site: fault.message for site, fault in faults.items()},
        codes={site: fault.code for site, fault in faults.items()},
        weights=weights,
        notes=tuple(ledger.notes),
        failed=failed,
        unit=context.unit,
        seconds=seconds,
        bytes={
            "up_per_site": sum(traffic.up.values()) / invited,
            "down_per_site": sum(traffic.down.values()) / invited,
        },
    )
