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

Where the suite lets a round have several **attempts**, phases 1 to 3 may be repeated without phase 1's training: fewer
sites seal the same updates again under a new context. That is done only as long as nothing was asked that opens a sum:
measuring has failed, or too few sites signed for the set. What has failed later is never opened again.

A round that cannot be finished leaves the model as it was and says why; the run goes on.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from quorsum import arrays, messages
from quorsum.aggregation import Judgement, Rule, check_gram, judge, norm_gate
from quorsum.aggregation.gram import lowest
from quorsum.aggregation.reputation import Seen
from quorsum.crypto.checks import check_opened
from quorsum.crypto.dialogue import run_dialogue
from quorsum.crypto.suite import Ask, Blocks, CoordinatorSuite, RandomBytes, RoundContext, RoundSuite, Site
from quorsum.errors import HidingSuspected, Refusal, RoundFailed, SiteFault, UsageError
from quorsum.server.exchange import Network, Traffic
from quorsum.server.records import RoundRecord

__all__ = ["WINDOW", "Plan", "RoundOutcome", "expect", "next_unit", "play_round"]


# Sketches in the round after one in which somebody may have hidden from them.
CAREFUL_SKETCHES = 16
# The phase in which a site binds itself to one set for the whole round, and the one that opens a sum over it.
BINDING, OPENING = "ticket", "sum"
# Rounds whose norms decide together about the next reference norm, so that none does alone.
WINDOW = 5
# An update that was clipped to C is measured a little shorter or longer than C.
AT_BOUND = 0.95


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
        attempts: how many attempts at a round the suite allows.
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
    attempts: int = 1
    on_phase: Callable[[int, str], None] = lambda number, phase: None


@dataclass(frozen=True)
class RoundOutcome:
    """What came out of a round.

    Attributes:
        model: the model after it.
        norm: what the round says about the reference norm, for :func:`next_unit`; None where nothing was opened.
        sketches: their number in the next round.
        record: of the round.
        seen: what it says about its sites.
    """

    model: ArrayRecord
    norm: float | None
    sketches: int
    record: RoundRecord
    seen: Seen


class _Unopened(RoundFailed):
    """Measuring failed, or too few signed for the set. Nothing was asked that opens a sum: it may be tried again."""


@dataclass
class _Ledger:
    """What is known of the sites while an attempt runs.

    Attributes:
        faults: the first fault of each site, its reason for this attempt.
        notes: what happened without costing anybody the round.
        proven: sites that are shown to have left the protocol, by what they signed.
        asked: the phases that were asked.
        answered: how many questions each site has answered.
        bound: sites that answered in the phase in which sites bind themselves.
        train_seconds: what each site reports.
        seal_seconds: what each site reports.
    """

    faults: dict[Site, SiteFault] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    proven: dict[Site, SiteFault] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    answered: Counter[Site] = field(default_factory=Counter)
    bound: set[Site] = field(default_factory=set)
    train_seconds: dict[Site, float] = field(default_factory=dict)
    seal_seconds: dict[Site, float] = field(default_factory=dict)

    def blame(self, fault: SiteFault) -> None:
        """The first fault of a site is its reason for this round."""
        self.faults.setdefault(fault.site, fault)
        self._convict(fault)

    def note(self, fault: SiteFault) -> None:
        """Say what a site did without taking its update out."""
        self.notes.append(str(fault))
        self._convict(fault)

    def _convict(self, fault: SiteFault) -> None:
        if fault.proven:
            self.proven.setdefault(fault.site, fault)


@dataclass(frozen=True)
class _Selection:
    """What phase 2 decided.

    Attributes:
        kept: the sites whose rows the rule saw, in the order of ``gram``.
        gram: float64, shape (m, m).
        weights: the sites with a weight other than zero.
        tolerate: how many of these sites may still be malicious.
        out: those of ``kept`` that the rule left out, worst first; where it weighs everybody, its f worst.
    """

    kept: tuple[Site, ...]
    gram: NDArray[np.float64]
    weights: dict[Site, float]
    tolerate: int
    out: tuple[Site, ...] = ()


@dataclass(frozen=True)
class _Play:
    """Everything that the phases of one attempt at a round share; the traffic is that of the round."""

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
    first = RoundContext(
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
        reference=plan.reference or "",
        model=arrays.fingerprint(model),
    )
    traffic = Traffic()
    roster: tuple[Site, ...] | None = first.sites
    plays: list[_Play] = []
    ends: list[_End] = []
    while roster is not None:
        attempt = replace(first, attempt=len(plays) + 1, sites=roster)
        context, suite = plan.suite.prepare(attempt, plan.random_bytes)
        plays.append(_Play(plan, suite, network, context, traffic=traffic))
        ends.append(_attempt(plays[-1], model, config))
        roster = _next_roster(plays[-1], ends[-1])
    last = ends[-1]
    trained = plays[0].ledger.train_seconds
    sealed = {
        site: sum(play.ledger.seal_seconds.get(site, 0.0) for play in plays) for site in plays[0].ledger.seal_seconds
    }
    seconds = {
        "geometry": sum(end.geometry for end in ends),
        "open": sum(end.opening for end in ends),
        "train": statistics.median(trained.values()) if trained else 0.0,
        "seal": statistics.median(sealed.values()) if sealed else 0.0,
        "total": time.perf_counter() - started,
    }
    return RoundOutcome(
        last.model,
        None if last.selection is None else _norm(plays[-1].context, last.selection),
        CAREFUL_SKETCHES if last.hidden else plan.sketches,
        _record(plays, ends, seconds),
        _seen(plays, last.selection),
    )


def _seen(plays: list[_Play], selection: _Selection | None) -> Seen:
    """What a round says about its sites. A round that was not finished says only what is proven."""
    # Elsewhere than under suites whose sites repeat it from signed messages, a proof may be somebody else's doing.
    proven = {site: fault.message for play in plays if play.suite.selects for site, fault in play.ledger.proven.items()}
    if selection is None:
        return Seen((), (), proven)
    return Seen(selection.kept, selection.out, proven, selection.gram)


@dataclass(frozen=True)
class _End:
    """How an attempt ended.

    Attributes:
        model: the model after it.
        submitted: the sites whose update was usable, in roster order.
        selection: what was opened, or None where nothing was.
        failed: why nothing was, or None. Not the error itself, which would hold the uploads in memory.
        unopened: whether it failed before anything was asked that opens a sum, so that it may be tried again.
        hidden: whether it failed because somebody hid from the sketches.
        geometry: seconds spent on phase 2.
        opening: seconds spent on phase 3.
    """

    model: ArrayRecord
    submitted: tuple[Site, ...]
    selection: _Selection | None
    failed: str | None
    unopened: bool
    hidden: bool
    geometry: float
    opening: float


def _attempt(play: _Play, model: ArrayRecord, config: ConfigRecord) -> _End:
    """Phases 1 to 3, once."""
    plan, number = play.plan, play.context.round
    selection: _Selection | None = None
    failed: str | None = None
    unopened = hidden = False
    uploads: dict[Site, Any] = {}
    clocks = []
    try:
        plan.on_phase(number, "train")
        uploads = _collect(play, model, config)
        clocks.append(time.perf_counter())

        plan.on_phase(number, "geometry")
        chosen = _select(play, uploads)
        clocks.append(time.perf_counter())

        plan.on_phase(number, "open")
        model = arrays.apply_update(model, _open(play, uploads, chosen))
        selection = chosen
    except RoundFailed as error:
        failed, unopened, hidden = str(error), isinstance(error, _Unopened), isinstance(error, HidingSuspected)
        for fault in error.faults.values():
            if isinstance(fault, SiteFault):
                play.ledger.blame(fault)
    clocks.append(time.perf_counter())
    geometry, opening = [*(b - a for a, b in pairwise(clocks)), 0.0, 0.0][:2]
    return _End(model, tuple(uploads), selection, failed, unopened, hidden, geometry, opening)


def _next_roster(play: _Play, end: _End) -> tuple[Site, ...] | None:
    """Who is asked for another attempt, or None where there is none.

    Whoever has no usable update, has bound itself to a set, or is proven malicious joins no later attempt. Who has
    answered fewer questions than the others is left out as well if enough remain, since it would count as one of n.
    """
    plan, context, ledger = play.plan, play.context, play.ledger
    if not end.unopened or context.attempt >= plan.attempts:
        return None
    need = max(
        plan.suite.least_sites(plan.tolerate, plan.collude),
        plan.rule.minimum_sites(plan.tolerate) + (plan.reference is not None),
    )
    able = [site for site in end.submitted if site not in ledger.bound and site not in ledger.proven]
    for least in sorted({ledger.answered[site] for site in able}, reverse=True):
        roster = tuple(site for site in able if ledger.answered[site] >= least)
        if len(roster) >= need and (plan.reference is None or plan.reference in roster):
            _leave_out(play, roster)
            return roster
    return None


def _leave_out(play: _Play, roster: tuple[Site, ...]) -> None:
    """Say of each site that is not asked for another attempt why."""
    ledger, attempt = play.ledger, play.context.attempt
    for site in play.context.sites:
        if site in ledger.proven:
            ledger.blame(ledger.proven[site])
        elif site in ledger.bound:
            # This, and not what the rule said of it, is why its update cannot be in the model.
            sentence = f"signed for a set in attempt {attempt}, and so joins no other attempt"
            ledger.faults[site] = SiteFault(site, "ticket-signed", sentence, proven=False)
        elif site not in roster:
            sentence = f"did not answer in attempt {attempt}, and was not asked again"
            ledger.blame(SiteFault(site, "silent", sentence, proven=False))


def _collect(play: _Play, model: ArrayRecord, config: ConfigRecord) -> dict[Site, Any]:
    """Phase 1: the accepted uploads, by site in roster order. In a later attempt sites seal again and do not train."""
    plan, network, context, ledger = play.plan, play.network, play.context, play.ledger
    users = RecordDict({"arrays": model, "config": config})
    wire = messages.Context.of(context)
    kind, beside = (messages.Train, users) if context.attempt == 1 else (messages.Again, None)
    instructions = {
        site: messages.pack(kind(site=site, suite=play.suite.name, context=wire), beside=beside)
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
                sentence = "sealed for another round than the one it was asked for"
                raise SiteFault(site, "wrong-round", sentence, proven=False)
            if submission.key_id != plan.keys[site][0]:
                sentence = "sealed with another key than it introduced itself with"
                raise SiteFault(site, "wrong-key", sentence, proven=False)
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
        SiteFault: it is another message, none at all, or the site's own refusal. Neither proves anything: the
            round does not know whether replies are signed, and a site with faulty software sends such messages too.
    """
    try:
        message, blocks = messages.unpack(content)
    except Refusal as refusal:
        raise SiteFault(site, refusal.code, refusal.message, proven=False) from None
    if isinstance(message, messages.Fault):
        raise SiteFault(site, f"says-{message.code}", f"says: {message.message}", proven=False)
    if not isinstance(message, kind):
        sentence = f"sent a message of kind {message.kind!r} where another was due"
        raise SiteFault(site, "unexpected", sentence, proven=False)
    return message, blocks


def _asker(play: _Play) -> Callable[[Ask], Mapping[Site, Blocks]]:
    """How a suite's dialogue reaches the sites: one exchange per Ask, faults noted, answers returned."""
    context, ledger = play.context, play.ledger

    def ask(question: Ask) -> Mapping[Site, Blocks]:
        header = messages.Question(context=context.digest().hex(), phase=question.phase)
        contents = {site: messages.pack(header, blocks) for site, blocks in question.questions.items()}
        answers: dict[Site, Blocks] = {}
        ledger.asked.add(question.phase)
        for site, reply in play.network.exchange(contents, f"{context.round}", play.traffic):
            if site in answers or isinstance(reply, SiteFault):
                if isinstance(reply, SiteFault):
                    ledger.notes.append(str(reply))
                continue
            try:
                answer, blocks = expect(messages.Answer, site, reply)
                if question.phase == BINDING:
                    # Whatever is in it: the site will have stored that it signed.
                    ledger.bound.add(site)
                if (answer.context, answer.phase) != (header.context, header.phase):
                    sentence = f"answered another question than {question.phase!r}"
                    raise SiteFault(site, "wrong-round", sentence, proven=False)
                answers[site] = blocks
            except SiteFault as fault:
                ledger.notes.append(str(fault))
        ledger.answered.update(answers.keys())
        return answers

    return ask


def _select(play: _Play, uploads: Mapping[Site, Any]) -> _Selection:
    """Phase 2: measure, take out rows that no honest update can have, and let the rule decide on the rest."""
    plan, suite, context, ledger = play.plan, play.suite, play.context, play.ledger
    _enough(play, len(uploads))
    _reference_among(play, uploads)
    try:
        measured = run_dialogue(suite.measure(context, uploads, plan.random_bytes), _asker(play))
    except RoundFailed as error:
        raise _Unopened(str(error), error.faults) from error
    for fault in measured.faults.values():
        # Silence while opening takes no row away: the update is there and the others opened it. Neither does a lie
        # where the sites repeat the selection, which they make from the opened matrix alone.
        if fault.site in measured.sites and (suite.selects or not fault.proven):
            ledger.note(fault)
        else:
            ledger.blame(fault)
    rows = [row for row, site in enumerate(measured.sites) if site not in ledger.faults]
    sites = tuple(measured.sites[row] for row in rows)
    gram = measured.gram[np.ix_(rows, rows)]
    # Where the suite has counted off proven liars, the sites will repeat the decision with its number.
    tolerate = plan.tolerate if measured.tolerate is None else measured.tolerate
    if plan.rule.needs == "updates":
        return _coordinates(play, sites, gram)
    _reference_among(play, sites)
    try:
        verdict = judge(
            gram,
            plan.rule,
            tolerate,
            # Suites that select have kept a bound of their own, which knows of the noise that comes with masks.
            norm_bound=None if suite.selects else norm_gate(context.unit, context.clip),
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
    out = _left_out(kept, np.array([weights.get(site, 0.0) for site in kept]), verdict.scores[index], verdict.tolerate)
    voices = tuple(site for site in out if site != plan.reference)
    return _Selection(kept, gram[np.ix_(index, index)], weights, verdict.tolerate, voices)


def _left_out(
    sites: tuple[Site, ...], weights: NDArray[np.float64], scores: NDArray[np.float64], tolerate: int
) -> tuple[Site, ...]:
    """Whom a rule left out, worst first; where it weighs everybody, those with its ``tolerate`` worst scores."""
    out = weights == 0.0
    if not out.any() and np.ptp(scores) > 0.0:
        out = ~lowest(scores, len(scores) - tolerate)
    return tuple(sites[row] for row in np.argsort(-scores, kind="stable") if out[row])


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


def _reference_among(play: _Play, sites: Collection[Site]) -> None:
    """Refuse to go on without the reference of the rule: without it there is nothing to select, so nothing is opened.

    Raises:
        RoundFailed: it is not among these sites.
    """
    reference = play.plan.reference
    if reference is not None and reference not in sites:
        raise RoundFailed(
            f"the reference site {reference!r} has no usable update in this round; the model stays as it was",
            _faults(play.ledger),
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
    try:
        opened = run_dialogue(suite.combine(context, standing, selection.weights, plan.random_bytes), _asker(play))
    except RoundFailed as error:
        # From the first question about a sum on, the updates of this round are used up.
        if BINDING not in ledger.asked or OPENING in ledger.asked:
            raise
        raise _Unopened(str(error), error.faults) from error
    # A site that lies while the sum is opened is outvoted; its own update was measured and selected before.
    for fault in opened.faults.values():
        ledger.note(fault)
    vector = np.array([selection.weights.get(site, 0.0) for site in selection.kept])
    tolerance, floor = suite.ratio_tolerance(context), suite.noise_floor(context, selection.weights)
    check_opened(opened.total, vector, selection.gram, tolerance, floor)
    return opened.total


def _norm(context: RoundContext, selection: _Selection) -> float | None:
    """What a round says about the reference norm: the median norm of the accepted updates.

    Where sites clip, a median that is C itself says only that the true one is not below. It is then taken for larger
    the more updates are at the bound: C for half of them, 2 C for all.

    Returns:
        None where the median update is zero.
    """
    norms = [
        math.sqrt(max(g, 0.0))
        for g, site in zip(np.diagonal(selection.gram), selection.kept, strict=True)
        if site in selection.weights
    ]
    median = statistics.median(norms)
    if context.clip:
        clipped = sum(norm >= AT_BOUND * context.unit for norm in norms) / len(norms)
        if clipped > 0.5:
            return context.unit * math.pow(2.0, 2.0 * clipped - 1.0)
    return median if median > 0 else None


def next_unit(unit: float, norms: Sequence[float]) -> float:
    """C of the next round: the median over the last rounds of what each said, moved by at most a factor of two.

    With f malicious sites among m accepted ones, what a round says lies between two quantiles of the honest norms,
    (m / 2 - f) / (m - f) and (m / 2) / (m - f). The median over rounds keeps a single round from deciding.

    Args:
        unit: C > 0 of this round.
        norms: what the last ``WINDOW`` rounds said, each > 0; may be empty.
    """
    if not norms:
        return unit
    return min(max(statistics.median(norms), unit / 2), unit * 2)


def _faults(ledger: _Ledger) -> dict[str, Refusal]:
    return dict(ledger.faults)


def _record(plays: list[_Play], ends: list[_End], seconds: dict[str, float]) -> RoundRecord:
    context, traffic, last = plays[0].context, plays[0].traffic, ends[-1]
    weights = last.selection.weights if last.selection is not None else {}
    rejected = tuple(site for site in context.sites if site not in weights)
    unsaid = SiteFault("", "round-failed", last.failed or "not used", proven=False)
    # The latest attempt in which something is known of a site has the last word.
    known = {site: fault for play in plays for site, fault in play.ledger.faults.items()}
    faults = {site: known.get(site, unsaid) for site in rejected}
    invited = len(context.sites)
    return RoundRecord(
        round=context.round,
        invited=context.sites,
        accepted=tuple(site for site in context.sites if site in weights),
        rejected=rejected,
        reasons={site: fault.message for site, fault in faults.items()},
        codes={site: fault.code for site, fault in faults.items()},
        weights=weights,
        notes=_notes(plays),
        failed=last.failed,
        unit=context.unit,
        seconds=seconds,
        bytes={
            "up_per_site": sum(traffic.up.values()) / invited,
            "down_per_site": sum(traffic.down.values()) / invited,
        },
        retried=tuple(end.failed or "" for end in ends[:-1]),
    )


def _notes(plays: list[_Play]) -> tuple[str, ...]:
    """What happened in all attempts; of those that were followed by another, the faults as well."""
    if len(plays) == 1:
        return tuple(plays[0].ledger.notes)
    lines = []
    for play in plays:
        faults = [] if play is plays[-1] else [str(fault) for fault in play.ledger.faults.values()]
        lines += [f"attempt {play.context.attempt}: {line}" for line in [*play.ledger.notes, *faults]]
    return tuple(lines)
