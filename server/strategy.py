"""``QuorumStrategy``: what a Flower user puts where ``FedAvg(...)`` stood.

It looks like a Flower strategy from outside (``start(grid, initial_arrays, num_rounds=...)`` returning a ``Result``)
and works on the ``Grid`` inside, because a sealed round has more phases than Flower's train and evaluate.

What it does in ``start``:

1. **roster**: ask every connected node which suite it has, and for the public key of its suite: the one time that
   key material travels. Nodes with another suite, or with another key than most, are left out and named.
2. play the rounds (``round.py``), evaluating after each.

On a quorsum coordinator (``deployment.py``) names and keys are those that were enrolled, the roster is taken before
every round, because sites come and go, a failed round is followed by another one instead of counting, and the run is
kept on disk after every step: ``start`` goes on where it was.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp import Grid

from quorsum import arrays, messages
from quorsum.aggregation import parse_rule
from quorsum.aggregation.reputation import Reputation, ReputationPolicy, in_quarantine, judged, serving
from quorsum.crypto import SealedCoordinator
from quorsum.crypto.randomness import stretched
from quorsum.crypto.suite import MOST_ATTEMPTS, CoordinatorSuite, RandomBytes, Site
from quorsum.errors import BoundError, RoundFailed, SiteFault, UsageError
from quorsum.selection import one_attempt, select
from quorsum.server.checkpoint import NoRun, RoundJournal, RunState
from quorsum.server.deployment import TOO_FEW, Deployment, Member, RunStopped, deployment_of
from quorsum.server.exchange import Network, Traffic
from quorsum.server.gate import COORDINATOR, Gate, Verdict, Votes, Watched, decide, read, watched
from quorsum.server.records import QuorumResult, RoundRecord
from quorsum.server.replay import RememberingNetwork
from quorsum.server.round import WINDOW, Plan, RoundOutcome, expect, next_unit, play_round

__all__ = ["QuorumStrategy"]

# Below Flower's own logger, so that what a run says goes where Flower's log goes.
log = logging.getLogger("flwr.quorsum")

# Nodes connect one after the other; the roster is taken when enough are there.
NODE_PAUSE = 0.2
# A member whose process hangs is connected and says nothing; introducing oneself takes no time.
HELLO_TIMEOUT = 20.0
# Failed rounds in a row after which a run ends: something is wrong that waiting does not mend.
FAILURES = 10
# No node has this number.
NOBODY = 0
# Leaves room for the node's number in a name of at most 128 characters.
NAME_LENGTH = 100
# Flower's name for a count that weighs replies; it is no measure of the model.
EXAMPLES = "num-examples"


@dataclass(frozen=True)
class _Roster:
    """Who takes part in a run.

    Attributes:
        network: the sites and the way to them.
        suite: the suite with the keys of these sites.
        keys: each site's ``key_id`` and ``public_key``.
        left_out: who does not take part, and why.
    """

    network: Network
    suite: CoordinatorSuite
    keys: Mapping[Site, tuple[str, bytes]]
    left_out: list[SiteFault]


class QuorumStrategy:
    """Sealed, robust federated averaging.

    Args:
        suite: the coordinator's end of a cipher suite, ``sealed`` by default. It must match the sites'.
        rule: name of the robust rule, pre-aggregators first: ``"spectral"``, ``"nnm+multi-krum"``, ``"mean"``, ...
            By default spectral where sites repeat the selection, else nnm+multi-krum.
        tolerate: f, how many sites may be malicious. None takes as many as the rule can with the sites present.
        collude: tau, how many sites may pool what they know with a malicious coordinator, for suites that hide updates
            from such a coordinator. None takes as many as ``tolerate``, and at least one.
        min_available_nodes: how many nodes to wait for before the roster is taken.
        clip: whether sites clip their update to the reference norm C, which follows the median norm of accepted
            updates (at most a factor of two per round). By default where the suite combines with equal weights only:
            what weights would give, clipping gives.
        sketches: r, random sketches from which the Gram matrix is measured.
        reference: name of a trusted site, for rules that need a reference row. Every site learns it. It is one of the
            n; if it is the coordinator's own, it is one of the tau as well.
        fraction_evaluate: share of sites that evaluate the new model after each round; 0 for none.
        reputation: when a site that is left out again and again is not invited for a while; None for never.
        gate: what a new model must not do, or it is not adopted; None adopts what the rule gives. It needs what sites
            evaluate, or ``evaluate_fn``.
        random_bytes: source of randomness; leave the operating system's in production.
        on_round: told the record of every finished round.
        on_phase: told round number and phase as they begin.

    Raises:
        UsageError: unknown rule, or a rule that the suite cannot serve.
    """

    def __init__(
        self,
        suite: CoordinatorSuite | None = None,
        *,
        rule: str | None = None,
        tolerate: int | None = None,
        min_available_nodes: int = 3,
        collude: int | None = None,
        clip: bool | None = None,
        sketches: int = 4,
        reference: Site | None = None,
        fraction_evaluate: float = 1.0,
        reputation: ReputationPolicy | None = None,
        gate: Gate | None = None,
        random_bytes: RandomBytes = os.urandom,
        on_round: Callable[[RoundRecord], None] | None = None,
        on_phase: Callable[[int, str], None] | None = None,
    ) -> None:
        if not 0.0 <= fraction_evaluate <= 1.0:
            raise UsageError(f"fraction_evaluate must lie between 0 and 1, got {fraction_evaluate}")
        if tolerate is not None and tolerate < 0:
            raise UsageError(f"tolerate must be 0 or more, got {tolerate}")
        suite = SealedCoordinator(select) if suite is None else suite
        rule = rule or ("spectral" if suite.selects else "nnm+multi-krum")
        self.suite = suite
        self.rule = parse_rule(rule, suite=suite.name)
        if self.rule.needs_reference and reference is None:
            raise UsageError(f"rule {rule!r} needs a reference: name a trusted site with reference=...")
        if suite.selects and self.rule.needs_generator:
            raise UsageError(
                f"suite {suite.name!r} has every site repeat the selection, which {rule!r} does not allow: it draws at "
                "random, and whoever draws for all of them chooses the set; use for instance 'spectral'"
            )
        self.tolerate = tolerate
        self.collude = collude
        self.min_available_nodes = min_available_nodes
        self.clip = suite.selects if clip is None else clip
        if suite.selects and not self.clip:
            raise UsageError(f"suite {suite.name!r} needs clipping: leave clip out, or set it to True")
        self.sketches = sketches
        self.reference = reference if self.rule.needs_reference else None
        self.fraction_evaluate = fraction_evaluate
        self.reputation = reputation
        self.gate = gate
        self.random_bytes = random_bytes
        self.on_round = on_round or _log_round
        self.on_phase = on_phase or (lambda number, phase: None)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> QuorumResult:
        """Train; same arguments and meaning as ``flwr.serverapp.strategy.Strategy.start``.

        Raises:
            BoundError: too few sites for the rule and the number of malicious ones to tolerate.
            RoundFailed: no usable site answered the roster call; or, on a quorsum coordinator, too many rounds failed.
            RunStopped: the run was stopped; what it has finished is kept.
            UsageError: there is a gate and nobody who evaluates.
        """
        if self.gate is not None and evaluate_fn is None and self.fraction_evaluate == 0:
            raise UsageError("a gate needs somebody who evaluates: set fraction_evaluate above 0, or pass evaluate_fn")
        deployment = deployment_of(grid)
        journal = NoRun() if deployment is None else deployment.journal()
        state = journal.load()
        run = self.random_bytes(16).hex() if state is None else state.run
        roster = self._roster(grid, run, timeout) if deployment is None else None
        if state is None:
            present = roster or self._gathered(grid, deployment, run, timeout, self.min_available_nodes, None)
            tolerate = self._tolerance(len(present.network.nodes))
            state = RunState(run, tolerate, 0, 0, first_unit(initial_arrays), self.sketches, initial_arrays)
            journal.commit(state)
        result = QuorumResult(arrays=state.model, rounds=list(state.records))
        result.evaluate_metrics_clientapp = {
            record.round: MetricRecord(dict(record.metrics)) for record in state.records if record.metrics
        }
        if state.number == 0:
            _evaluate_centrally(evaluate_fn, 0, state.model, result)
        while state.finished < num_rounds:
            open_round = journal.round(state.number + 1)
            now = self._roster_of(open_round, grid, deployment, state, timeout) if roster is None else roster
            if deployment is None:
                now = self._less(now, self._serving(state, now.network.nodes))
            config = ConfigRecord({**(train_config or {}), "server-round": state.finished + 1})
            asked = ConfigRecord({**(evaluate_config or {}), "server-round": state.finished + 1})
            state = self._round(now, open_round, state, config, asked, evaluate_fn, result)
            journal.commit(state)
            record = state.records[-1]
            result.arrays = state.model
            result.rounds.append(record)
            # A deployment says itself what it is told.
            if deployment is None or self.on_round is not _log_round:
                self.on_round(record)
            if deployment is not None:
                deployment.round(record)
                _not_for_ever(state)
        return result

    def _round(
        self,
        roster: _Roster,
        open_round: RoundJournal,
        state: RunState,
        config: ConfigRecord,
        evaluate_config: ConfigRecord,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
        result: QuorumResult,
    ) -> RunState:
        """Play one round and evaluate; the run after it."""
        number, network = state.number + 1, roster.network
        sentenced = in_quarantine(state.reputation, number) if self.reputation is not None else {}
        away = {site: reason for site, reason in sentenced.items() if site not in network.nodes}
        random_bytes = stretched(lambda count: open_round.seed(self.random_bytes))
        plan = Plan(
            run=state.run,
            suite=roster.suite,
            keys=roster.keys,
            rule=self.rule,
            tolerate=self._left(state.tolerate, len(away)),
            # Whoever pools what it knows with the coordinator does so in quarantine as well.
            collude=self._colluding(state.tolerate),
            clip=self.clip,
            sketches=state.sketches,
            reference=self.reference,
            random_bytes=random_bytes,
            # Sites that repeat the selection bind themselves to one set, which is what makes a second attempt safe;
            # rules that may keep few sites may choose a set in which those who are bound are not.
            attempts=MOST_ATTEMPTS if roster.suite.selects and not one_attempt(self.rule) else 1,
            on_phase=self._phase_of(network.grid),
        )
        remembering = RememberingNetwork(
            network.grid, network.nodes, network.timeout, network.identities, network.random_bytes, journal=open_round
        )
        evaluation = _Evaluation(self, remembering, evaluate_config, evaluate_fn, result, random_bytes)
        before = state.watched
        if self.gate is not None and not before.reported:
            before = watched(before, evaluation.votes(state.number, state.model, state.tolerate), self.gate)
        outcome = play_round(plan, remembering, number, state.model, state.unit, config)
        plan.on_phase(number, "evaluate")
        record, after = self._passed(evaluation, number, state, before, outcome)
        adopted = record.failed is None
        reputation = state.reputation
        if self.reputation is not None:
            trusted = () if self.reference is None else (self.reference,)
            reputation = judged(self.reputation, reputation, outcome.seen, number, state.tolerate, trusted)
            record = _with_quarantine(record, away, state.reputation, reputation)
        norms = state.norms
        if adopted and outcome.norm is not None:
            norms = (*norms, outcome.norm)[-WINDOW:]
        # On a coordinator of ours a failed round is followed by another one; elsewhere as many rounds are played as
        # were asked for.
        counts = adopted or deployment_of(network.grid) is None
        return replace(
            state,
            number=number,
            finished=state.finished + counts,
            unit=next_unit(state.unit, norms) if adopted else state.unit,
            # More sketches for one round after somebody may have hidden from them.
            sketches=outcome.sketches if record.failed else self.sketches,
            model=outcome.model if adopted else state.model,
            records=(*state.records, record),
            norms=norms,
            reputation=reputation,
            watched=after,
        )

    def _passed(
        self, evaluation: _Evaluation, number: int, state: RunState, before: Watched, outcome: RoundOutcome
    ) -> tuple[RoundRecord, Watched]:
        """The record of a round with the evaluation of the model that is in force after it, and what to remember."""
        votes = evaluation.votes(number, outcome.model, state.tolerate)
        record = outcome.record
        if self.gate is None or record.failed is not None:
            return replace(record, metrics=_metrics(votes)), before
        verdict = _verdict(self.gate, before, votes, state.tolerate)
        after = watched(before, votes, self.gate, verdict)
        if verdict.adopt:
            unseen = () if verdict.voters else ("gate: nobody could compare the new model; it was adopted",)
            return replace(record, metrics=_metrics(votes), notes=(*record.notes, *unseen)), after
        attention = after.turned_down >= self.gate.attention
        if attention:
            log.warning("[quorsum] round %d: %s", number, _attention(after))
        evaluation.in_force(number, state.model, after.reported)
        return _turned_down(record, verdict, after, _metrics(votes), attention=attention), after

    def _left(self, tolerate: int, away: int) -> int:
        """F of a round in which so many sites are in quarantine."""
        counted = away if self.reputation is not None and self.reputation.count_off else 0
        return max(0, tolerate - counted)

    def _serving(self, state: RunState, present: Collection[Site]) -> frozenset[Site]:
        """Who of those present is in quarantine in the next round, as far as enough others remain."""
        if self.reputation is None:
            return frozenset()
        number = state.number + 1
        sentenced = in_quarantine(state.reputation, number).keys()
        absent = len(sentenced - set(present))
        for away in range(len(sentenced) - absent, 0, -1):
            need = self._least_sites(self._left(state.tolerate, absent + away), self._colluding(state.tolerate))
            if len(present) - away >= need:
                return serving(state.reputation, number, present, len(present) - away)
        return frozenset()

    def _less(self, roster: _Roster, away: Collection[Site]) -> _Roster:
        """The roster without some sites."""
        if not away:
            return roster
        nodes = {site: node for site, node in roster.network.nodes.items() if site not in away}
        keys = {site: key for site, key in roster.keys.items() if site not in away}
        return self._adopted(replace(roster.network, nodes=nodes), keys, roster.left_out)

    def _phase_of(self, grid: Grid) -> Callable[[int, str], None]:
        deployment = deployment_of(grid)
        if deployment is None:
            return self.on_phase

        def begins(number: int, phase: str) -> None:
            deployment.phase(number, phase)
            self.on_phase(number, phase)

        return begins

    def _roster(self, grid: Grid, run: str, timeout: float) -> _Roster:
        """Who takes part, with which key, and who was left out and why."""
        nodes = _wait_for_nodes(grid, self.min_available_nodes, timeout)
        labels = {f"node-{node}": node for node in nodes}
        introductions, left_out = self._introductions(Network(grid, labels, timeout), run)
        # A name is a courtesy, not an identity: a second site with the same name is told apart by its node.
        members: dict[Site, int] = {}
        introduced: dict[Site, tuple[str, bytes]] = {}
        for label in sorted(introductions, key=labels.__getitem__):
            introduction, public_key = introductions[label]
            name = introduction.site
            if name in members:
                name = f"{name[:NAME_LENGTH]}#{labels[label]}"
            members[name] = labels[label]
            introduced[name] = (introduction.key_id, public_key)
        roster = self._adopted(Network(grid, members, timeout), introduced, left_out)
        if not roster.network.nodes:
            raise RoundFailed(
                "no site answered the roster call in a usable way: "
                + "; ".join(str(fault) for fault in roster.left_out),
                {fault.site: fault for fault in roster.left_out},
            )
        if self.reference is not None and self.reference not in roster.network.nodes:
            raise UsageError(f"the reference site {self.reference!r} is not among {sorted(roster.network.nodes)}")
        for fault in roster.left_out:
            log.warning("left out: %s", fault)
        return roster

    def _introductions(
        self, network: Network, run: str
    ) -> tuple[dict[Site, tuple[messages.Introduction, bytes]], list[SiteFault]]:
        """What every site of a network says of itself, and who said nothing usable."""
        hello = messages.pack(messages.Hello(run=run, suite=self.suite.name))
        introductions: dict[Site, tuple[messages.Introduction, bytes]] = {}
        left_out: list[SiteFault] = []
        for label, reply in network.exchange(dict.fromkeys(network.nodes, hello), "roster", Traffic()):
            try:
                if isinstance(reply, SiteFault):
                    raise reply
                introduction, blocks = expect(messages.Introduction, label, reply)
                if introduction.suite != self.suite.name:
                    raise SiteFault(label, "wrong-suite", f"uses suite {introduction.suite!r}, not {self.suite.name!r}")
                introductions.setdefault(label, (introduction, b"".join(blocks)))
            except SiteFault as fault:
                left_out.append(fault)
        return introductions, left_out

    def _adopted(
        self, network: Network, introduced: Mapping[Site, tuple[str, bytes]], left_out: list[SiteFault]
    ) -> _Roster:
        """The roster of those whose key the suite can use."""
        suite, refused = self.suite.adopt(introduced)
        faults = [*left_out, *(SiteFault(name, error.code, error.message) for name, error in refused.items())]
        nodes = {name: node for name, node in network.nodes.items() if name in introduced and name not in refused}
        return _Roster(replace(network, nodes=nodes), suite, {name: introduced[name] for name in nodes}, faults)

    # --- on a quorsum coordinator ---

    def _roster_of(
        self,
        open_round: RoundJournal,
        grid: Grid,
        deployment: Deployment | None,
        state: RunState,
        timeout: float,
    ) -> _Roster:
        """The roster of an open round: the one it began with, or a fresh one."""
        begun = open_round.roster()
        if begun is None:
            sentenced = in_quarantine(state.reputation, state.number + 1) if self.reputation is not None else {}
            need = self._least_sites(self._left(state.tolerate, len(sentenced)), self._colluding(state.tolerate))
            last = state.records[-1].invited if state.records else None
            roster = self._gathered(grid, deployment, state.run, timeout, need, last, partial(self._serving, state))
            open_round.begin(roster.keys)
            return roster
        members = deployment.members() if deployment is not None else {}
        nodes = {member.site: node for node, member in members.items()}
        # Who has been sent away since then is named, and not asked: no node has this number.
        network = _member_network(grid, members, {site: nodes.get(site, NOBODY) for site in begun}, timeout)
        return self._adopted(network, begun, [])

    def _gathered(
        self,
        grid: Grid,
        deployment: Deployment | None,
        run: str,
        timeout: float,
        need: int,
        last: Collection[Site] | None,
        away: Callable[[Collection[Site]], Collection[Site]] = lambda present: (),
    ) -> _Roster:
        """Members that are connected and have introduced themselves: all that are expected, or after a while enough.

        Expected are the sites of the last round, at first all members: who has been away for a round is not waited for,
        and who is in quarantine, of those present as ``away`` says, not asked.

        Raises:
            RunStopped: the run is to end while it waits.
        """
        assert deployment is not None  # noqa: S101 - for the type checker: only deployments gather
        patience = time.monotonic() + deployment.patience
        told: list[str] = []
        while True:
            if deployment.stopped():
                raise RunStopped("the run was stopped while it waited for sites")
            members, online = deployment.members(), deployment.online()
            present = {member.site: node for node, member in members.items() if node in online}
            serve = away(present)
            present = {site: node for site, node in present.items() if site not in serve}
            members = {node: member for node, member in members.items() if member.site not in serve}
            expected = {member.site for member in members.values() if last is None or member.site in last}
            late = time.monotonic() > patience
            roster = None
            if len(present) >= need and (late or expected <= present.keys()):
                network = _member_network(grid, members, present, timeout)
                roster = self._introduced(replace(network, timeout=min(timeout, HELLO_TIMEOUT)), members, run)
                said = [str(fault) for fault in roster.left_out]
                if said != told:
                    told = said
                    for fault in roster.left_out:
                        log.warning("left out: %s", fault)
                if len(roster.network.nodes) >= need and (late or expected <= roster.network.nodes.keys()):
                    deployment.waiting(())
                    return replace(roster, network=replace(roster.network, timeout=timeout))
            there = roster.network.nodes if roster is not None else present
            awaited = sorted(member.site for member in members.values() if member.site not in there)
            short = need - len(members) - len(serve)
            deployment.waiting([*awaited, f"{short} {TOO_FEW}"] if short > 0 else awaited)
            time.sleep(NODE_PAUSE)

    def _introduced(self, network: Network, members: Mapping[int, Member], run: str) -> _Roster:
        introductions, left_out = self._introductions(network, run)
        identities = {member.site: member.identity.to_bytes() for member in members.values()}
        introduced: dict[Site, tuple[str, bytes]] = {}
        for site, (introduction, public_key) in introductions.items():
            # Suites that select are those whose sites sign with keys of their own.
            if self.suite.selects and public_key != identities[site]:
                left_out.append(SiteFault(site, "wrong-key", "introduced itself with another key than it enrolled"))
            else:
                introduced[site] = (introduction.key_id, public_key)
        return self._adopted(network, introduced, left_out)

    def _tolerance(self, sites: int) -> int:
        """F of this run.

        Raises:
            BoundError: rule and suite cannot tolerate that many with the sites present.
        """
        if self.tolerate is None:
            able = [f for f in range(sites) if self._least_sites(f, self._colluding(f)) <= sites]
            if not able:
                least = self._least_sites(0, self._colluding(0))
                raise BoundError(
                    f"{self.rule.name} under {self.suite.name} needs at least {least} sites, {sites} are there; "
                    "connect more or choose another rule"
                )
            return max(able)
        need = self._least_sites(self.tolerate, self._colluding(self.tolerate))
        if sites < need:
            raise BoundError(
                f"{self.rule.name} under {self.suite.name} needs at least {need} sites to tolerate {self.tolerate} "
                f"malicious ones, {sites} are there; connect more, tolerate fewer, or choose another rule"
            )
        return self.tolerate

    def _least_sites(self, tolerate: int, collude: int) -> int:
        voices = self.rule.minimum_sites(tolerate) + (self.reference is not None)
        return max(voices, self.suite.least_sites(tolerate, collude))

    def _colluding(self, tolerate: int) -> int:
        """Tau: as many as f, and at least one."""
        return max(1, tolerate) if self.collude is None else self.collude


@dataclass(frozen=True)
class _Evaluation:
    """How the models of one round are evaluated: at sites, and with the coordinator's own data.

    Attributes:
        strategy: whose settings hold.
        network: the sites, with the memory of the round, so that a coordinator that comes back decides the same.
        config: for the sites' apps.
        evaluate_fn: the coordinator's own evaluation, or None.
        result: told the outcome.
        random_bytes: the coordinator's randomness in this round.
    """

    strategy: QuorumStrategy
    network: Network
    config: ConfigRecord
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None
    result: QuorumResult
    random_bytes: RandomBytes

    def votes(self, number: int, model: ArrayRecord, tolerate: int) -> Votes:
        """What sites and coordinator say of a model."""
        central = self.central(number, model)
        at_sites = self._at_sites(number, model, tolerate) if self.strategy.fraction_evaluate > 0 else {}
        if self.strategy.fraction_evaluate > 0:
            self.result.evaluate_metrics_clientapp[number] = MetricRecord(dict(_metrics(at_sites)))
        return {**at_sites, **({COORDINATOR: central} if central else {})}

    def central(self, number: int, model: ArrayRecord) -> dict[str, float]:
        """What the coordinator says of a model."""
        return _evaluate_centrally(self.evaluate_fn, number, model, self.result)

    def in_force(self, number: int, model: ArrayRecord, reported: Votes) -> None:
        """Say in the result of the round how the model is that goes on, in place of one that was turned down."""
        self.central(number, model)
        if self.strategy.fraction_evaluate > 0:
            at_sites = {site: said for site, said in reported.items() if site != COORDINATOR}
            self.result.evaluate_metrics_clientapp[number] = MetricRecord(dict(_metrics(at_sites)))

    def _at_sites(self, number: int, model: ArrayRecord, tolerate: int) -> dict[Site, dict[str, float]]:
        names = sorted(self.network.nodes)
        draw = np.random.default_rng(int.from_bytes(self.random_bytes(16), "little"))
        size = max(1, math.ceil(self.strategy.fraction_evaluate * len(names)))
        chosen = [names[k] for k in sorted(draw.choice(len(names), size, replace=False))]
        content = RecordDict({"arrays": model, "config": self.config})
        said: dict[Site, dict[str, float]] = {}
        asked = dict.fromkeys(chosen, content)
        for site, reply in self.network.exchange(asked, f"{number}", Traffic(), "evaluate"):
            if isinstance(reply, RecordDict):
                for record in reply.metric_records.values():
                    for name, value in record.items():
                        if name != EXAMPLES and isinstance(value, int | float) and math.isfinite(value):
                            # One vote per site and measure: the first.
                            said.setdefault(site, {}).setdefault(name, float(value))
        # A measure that no more sites report than may be malicious may be invented.
        reporting = Counter(name for one in said.values() for name in one)
        return {
            site: {name: value for name, value in one.items() if reporting[name] > tolerate}
            for site, one in said.items()
        }


def _metrics(votes: Votes) -> dict[str, float]:
    """Median over the sites of every measure, which a site that lies moves little; the coordinator's own go first."""
    values: dict[str, list[float]] = {}
    for site, said in votes.items():
        if site != COORDINATOR:
            for name, value in said.items():
                values.setdefault(name, []).append(value)
    return {name: statistics.median(seen) for name, seen in values.items()} | dict(votes.get(COORDINATOR, {}))


def _verdict(gate: Gate, before: Watched, votes: Votes, tolerate: int) -> Verdict:
    """The gate's verdict on a model by what the sites say, f of whom may lie, and by what the coordinator says."""
    seen = {voter: read(gate, said) for voter, said in votes.items()}
    own = {voter: said for voter, said in seen.items() if voter == COORDINATOR}
    sites = {voter: said for voter, said in seen.items() if voter != COORDINATOR}
    settled = before.adopted >= gate.settle
    verdicts = [
        decide(before.votes, sites, gate, tolerate, settled=settled),
        decide(before.votes, own, gate, 0, settled=settled),
    ]
    return Verdict(
        all(verdict.adopt for verdict in verdicts),
        tuple(reason for verdict in verdicts for reason in verdict.reasons),
        sum(verdict.voters for verdict in verdicts),
    )


def _attention(after: Watched) -> str:
    return (
        f"{after.turned_down} models in a row were turned down; look at who was accepted in these rounds, and whether "
        "the gate's limits suit the noise of the validation data"
    )


def _turned_down(
    record: RoundRecord, verdict: Verdict, after: Watched, of_new: Mapping[str, float], *, attention: bool
) -> RoundRecord:
    """The record of a round whose model was not adopted: nobody's update is in the model that goes on."""
    sentence = "was in a model that the gate turned down"
    measured = ", ".join(f"{name} {value:.4g}" for name, value in sorted(of_new.items())[:8])
    notes = (
        *record.notes,
        f"gate: the sum over {', '.join(record.accepted)} was opened and is not used; it had {measured}",
        *((f"gate: {_attention(after)}",) if attention else ()),
    )
    return replace(
        record,
        accepted=(),
        rejected=record.invited,
        reasons={**record.reasons, **dict.fromkeys(record.accepted, sentence)},
        codes={**record.codes, **dict.fromkeys(record.accepted, "gate")},
        weights={},
        notes=notes,
        failed=f"gate: {'; '.join(verdict.reasons)}; the model stays as it was",
        metrics=_metrics(after.reported),
    )


def _with_quarantine(
    record: RoundRecord, away: Mapping[Site, str], before: Reputation, after: Reputation
) -> RoundRecord:
    """The record with those in quarantine, and a note about each whose quarantine begins."""
    begun = (
        f"site {site}: in quarantine until round {standing.until}, offence {standing.offences}: {standing.reason}"
        for site, standing in after.standings.items()
        if standing.offences > before.of(site).offences
    )
    return replace(
        record,
        quarantined=tuple(sorted(away)),
        reasons={**record.reasons, **away},
        codes={**record.codes, **dict.fromkeys(away, "quarantined")},
        notes=(*record.notes, *begun),
    )


def first_unit(model: ArrayRecord) -> float:
    """C of the first round, when no past update is known: the norm of the initial model, at least 1."""
    return max(1.0, float(np.linalg.norm(arrays.flatten(model).astype(np.float64))))


def _wait_for_nodes(grid: Grid, enough: int, timeout: float) -> list[int]:
    deadline = time.monotonic() + timeout
    while len(nodes := sorted(grid.get_node_ids())) < enough:
        if time.monotonic() > deadline:
            raise RoundFailed(f"{len(nodes)} sites connected within {timeout:g} s, waiting for {enough}")
        time.sleep(NODE_PAUSE)
    return nodes


def _member_network(grid: Grid, members: Mapping[int, Member], nodes: Mapping[Site, int], timeout: float) -> Network:
    identities = {member.site: member.identity for member in members.values() if member.site in nodes}
    return Network(grid, nodes, timeout, identities)


def _not_for_ever(state: RunState) -> None:
    """End a run in which nothing succeeds any more.

    Raises:
        RoundFailed: the last rounds have all failed.
    """
    last = state.records[-FAILURES:]
    if len(last) == FAILURES and all(record.failed for record in last):
        raise RoundFailed(f"{FAILURES} rounds in a row have failed, the last one because: {last[-1].failed}")


def _evaluate_centrally(
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    number: int,
    model: ArrayRecord,
    result: QuorumResult,
) -> dict[str, float]:
    metrics = evaluate_fn(number, model) if evaluate_fn is not None else None
    if metrics is None:
        return {}
    result.evaluate_metrics_serverapp[number] = metrics
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def _log_round(record: RoundRecord) -> None:
    measures = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items()) or "not evaluated"
    kept = f"{len(record.accepted)} of {len(record.invited)} sites"
    reasons = "; ".join(f"{site} ({reason})" for site, reason in record.reasons.items()) or "nobody"
    log.info("[quorsum] round %d: %s; from %s; left out: %s", record.round, measures, kept, reasons)
    for number, reason in enumerate(record.retried, 1):
        log.warning("[quorsum] round %d, attempt %d ended: %s", record.round, number, reason)
    for note in record.notes:
        log.info("[quorsum] round %d: %s", record.round, note)
    if record.failed:
        log.warning("[quorsum] round %d failed: %s", record.round, record.failed)
