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
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp import Grid

from quorsum import arrays, messages
from quorsum.aggregation import parse_rule
from quorsum.crypto import SealedCoordinator
from quorsum.crypto.randomness import stretched
from quorsum.crypto.suite import MOST_ATTEMPTS, CoordinatorSuite, RandomBytes, Site
from quorsum.errors import BoundError, RoundFailed, SiteFault, UsageError
from quorsum.selection import one_attempt, select
from quorsum.server.checkpoint import NoRun, RoundJournal, RunState
from quorsum.server.deployment import TOO_FEW, Deployment, Member, RunStopped, deployment_of
from quorsum.server.exchange import Network, Traffic
from quorsum.server.records import QuorumResult, RoundRecord
from quorsum.server.replay import RememberingNetwork
from quorsum.server.round import Plan, expect, play_round

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
        """
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
            now = roster or self._roster_of(open_round, grid, deployment, state, timeout)
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
        plan = Plan(
            run=state.run,
            suite=roster.suite,
            keys=roster.keys,
            rule=self.rule,
            tolerate=state.tolerate,
            collude=self._colluding(state.tolerate),
            clip=self.clip,
            sketches=state.sketches,
            reference=self.reference,
            random_bytes=stretched(lambda count: open_round.seed(self.random_bytes)),
            # Sites that repeat the selection bind themselves to one set, which is what makes a second attempt safe;
            # rules that may keep few sites may choose a set in which those who are bound are not.
            attempts=MOST_ATTEMPTS if roster.suite.selects and not one_attempt(self.rule) else 1,
            on_phase=self._phase_of(network.grid),
        )
        remembering = RememberingNetwork(
            network.grid, network.nodes, network.timeout, network.identities, network.random_bytes, journal=open_round
        )
        outcome = play_round(plan, remembering, number, state.model, state.unit, config)
        plan.on_phase(number, "evaluate")
        metrics = _evaluate_centrally(evaluate_fn, number, outcome.model, result)
        if self.fraction_evaluate > 0:
            at_sites = self._evaluate_at_sites(network, number, outcome.model, evaluate_config, state.tolerate)
            result.evaluate_metrics_clientapp[number] = MetricRecord(dict(at_sites))
            metrics = {**at_sites, **metrics}
        record = replace(outcome.record, metrics=metrics)
        # On a coordinator of ours a failed round is followed by another one; elsewhere as many rounds are played as
        # were asked for.
        counts = record.failed is None or deployment_of(network.grid) is None
        return replace(
            state,
            number=number,
            finished=state.finished + counts,
            unit=outcome.unit,
            # More sketches for one round after somebody may have hidden from them.
            sketches=outcome.sketches if record.failed else self.sketches,
            model=outcome.model,
            records=(*state.records, record),
        )

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
            need = self._least_sites(state.tolerate)
            last = state.records[-1].invited if state.records else None
            roster = self._gathered(grid, deployment, state.run, timeout, need, last)
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
    ) -> _Roster:
        """Members that are connected and have introduced themselves: all that are expected, or after a while enough.

        Expected are the sites of the last round, at first all members: who has been away for a round is not waited for.

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
            short = need - len(members)
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
            able = [f for f in range(sites) if self._least_sites(f) <= sites]
            if not able:
                raise BoundError(
                    f"{self.rule.name} under {self.suite.name} needs at least {self._least_sites(0)} sites, {sites} "
                    "are there; connect more or choose another rule"
                )
            return max(able)
        need = self._least_sites(self.tolerate)
        if sites < need:
            raise BoundError(
                f"{self.rule.name} under {self.suite.name} needs at least {need} sites to tolerate {self.tolerate} "
                f"malicious ones, {sites} are there; connect more, tolerate fewer, or choose another rule"
            )
        return self.tolerate

    def _least_sites(self, tolerate: int) -> int:
        judged = self.rule.minimum_sites(tolerate) + (self.reference is not None)
        return max(judged, self.suite.least_sites(tolerate, self._colluding(tolerate)))

    def _colluding(self, tolerate: int) -> int:
        """Tau: as many as f, and at least one."""
        return max(1, tolerate) if self.collude is None else self.collude

    def _evaluate_at_sites(
        self, network: Network, number: int, model: ArrayRecord, config: ConfigRecord, tolerate: int
    ) -> dict[str, float]:
        """Median over the sites of every metric they report: a site that lies moves it little, a weighted mean much."""
        names = sorted(network.nodes)
        draw = np.random.default_rng(int.from_bytes(self.random_bytes(16), "little"))
        size = max(1, math.ceil(self.fraction_evaluate * len(names)))
        chosen = [names[k] for k in sorted(draw.choice(len(names), size, replace=False))]
        content = RecordDict({"arrays": model, "config": config})
        votes: dict[str, dict[Site, float]] = {}
        for site, reply in network.exchange(dict.fromkeys(chosen, content), f"{number}", Traffic(), "evaluate"):
            if isinstance(reply, RecordDict):
                for record in reply.metric_records.values():
                    for name, value in record.items():
                        if name != EXAMPLES and isinstance(value, int | float) and math.isfinite(value):
                            # One vote per site and measure: the first.
                            votes.setdefault(name, {}).setdefault(site, float(value))
        # A measure that no more sites report than may be malicious may be invented.
        return {name: statistics.median(seen.values()) for name, seen in votes.items() if len(seen) > tolerate}


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
