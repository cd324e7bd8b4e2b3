"""``simulate``: a whole federation on this machine, with the same server and client code as a deployment."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import cycle
from typing import Any, TypeAlias

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecordValues, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from quorsum.aggregation import Rule, parse_rule
from quorsum.aggregation.reputation import ReputationPolicy
from quorsum.aggregation.sybils import SybilPolicy
from quorsum.crypto import (
    CkksCoordinator,
    CkksSite,
    CkksSiteKey,
    Identity,
    PlainCoordinator,
    PlainSite,
    SealedCoordinator,
    SealedSite,
    generate_site_key,
)
from quorsum.crypto.suite import CoordinatorSuite, SiteSuite
from quorsum.errors import BoundError, UsageError
from quorsum.selection import select
from quorsum.server import QuorumResult, QuorumStrategy, RoundRecord
from quorsum.server.gate import Gate
from quorsum.simulation.attacks import parse_attack
from quorsum.simulation.data import Dataset, load_dataset
from quorsum.simulation.defence import Defence
from quorsum.simulation.federation import client_app
from quorsum.simulation.grid import LocalGrid
from quorsum.simulation.metrics import primary_metric
from quorsum.simulation.models import MODELS, attack_success, evaluate, learnable, load_learnable
from quorsum.simulation.partition import parse_split, partition
from quorsum.simulation.world import Training, World, site_name

__all__ = ["RUNTIMES", "SUITES", "Simulation", "build_world", "simulate"]

SCHEMA_VERSION = 1
SUITES = ("sealed", "ckks", "plain")
# The rule of each suite where none is asked for: sealed opens plain means only, so it clips and then filters.
DEFAULT_RULE = {"sealed": "spectral", "ckks": "nnm+multi-krum", "plain": "nnm+multi-krum"}
RUNTIMES = ("local", "ray")
MAX_SITES = 500

Result: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Simulation:
    """What to simulate.

    Attributes:
        data: name of an embedded data set, or the path of data that ``load_dataset`` reads.
        label: the label column of a CSV file.
        key: the natural-key column of a CSV file, for ``split="key"``.
        sites: n, number of sites.
        poisoned: how many of them are malicious; which ones, the seed decides.
        attack: what the malicious ones do, such as ``"sign-flip:strength=8"``.
        rule: the robust rule; None takes the usual one of the suite.
        reference: the trusted site of rules that need one, such as ``"site-01"``; it is never a poisoned one.
        tolerate: f as it is declared; None takes as many as are poisoned.
        suite: ``"sealed"``, ``"ckks"`` or ``"plain"``.
        rounds: how many.
        alpha: Dirichlet concentration of the partition, or None; short for ``split="dirichlet:..."``.
        split: how the data are dealt to sites, such as ``"similarity:0.33"``; None is iid, unless alpha is given.
        hoard: whether malicious sites get a share of the data. If not, the honest ones get all of it, and each
            malicious one learns from the data of an honest one (the setting of ByzFL's benchmark).
        clip: whether sites clip their updates to the moving reference norm; None takes what the suite needs.
        seed: decides data split, partition, who is poisoned, initial model, training and attacks.
        runtime: ``"local"`` (threads of this process) or ``"ray"`` (Flower's simulation runtime).
        model: name of the model; ``"auto"`` takes the usual one for the data.
        epochs: local epochs per round; None takes what suits the model.
        steps: local steps per round, instead of epochs.
        batch_size: rows per step of local training.
        lr: learning rate of local training; None takes what suits the model.
        momentum: momentum of local training.
        site_momentum: beta, momentum of what a site submits, over rounds.
        hidden: width of the model's hidden layer, for tables and flat inputs.
        sketches: r, random sketches per round for the suites that sketch.
        timeout: seconds a site has for one reply.
        target: the class that backdoors aim at.
        quarantine: whether sites that are rejected much more often than chance are left out for some rounds.
        gate: whether a new model is checked before it is adopted.
    """

    data: str = "digits"
    label: str | None = None
    key: str | None = None
    sites: int = 10
    poisoned: int = 2
    attack: str = "sign-flip"
    rule: str | None = None
    reference: str | None = None
    tolerate: int | None = None
    suite: str = "sealed"
    rounds: int = 15
    alpha: float | None = None
    split: str | None = None
    hoard: bool = True
    clip: bool | None = None
    seed: int = 1
    runtime: str = "local"
    model: str = "auto"
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 32
    lr: float | None = None
    momentum: float = 0.9
    site_momentum: float = 0.0
    hidden: int = 32
    sketches: int = 4
    timeout: float = 600.0
    target: int = 0
    quarantine: bool = False
    gate: bool = False

    def checked(self) -> Simulation:
        """The same settings, with the tolerance filled in.

        Raises:
            UsageError: a setting is out of range; the message names it.
            BoundError: the rule cannot tolerate that many malicious sites among so few.
        """
        if not 3 <= self.sites <= MAX_SITES:
            raise UsageError(f"--sites must lie in 3 .. {MAX_SITES}, got {self.sites}")
        if not 0 <= self.poisoned < self.sites:
            raise UsageError(
                f"--poisoned must lie in 0 .. {self.sites - 1} for {self.sites} sites, got {self.poisoned}"
            )
        if self.rounds < 1:
            raise UsageError(f"--rounds must be 1 or more, got {self.rounds}")
        if self.suite not in SUITES:
            raise UsageError(f"no suite is called {self.suite!r}; known: {', '.join(SUITES)}")
        self._check_training()
        if parse_attack(self.attack).on_protocol and self.suite != "sealed":
            raise UsageError(f"attack {self.attack!r} is one on the sealed protocol; use it with --suite sealed")
        rule = parse_rule(self.rule or DEFAULT_RULE[self.suite], suite=self.suite)
        self._check_reference(rule)
        tolerate = self.poisoned if self.tolerate is None else self.tolerate
        coordinator = _coordinator(self.suite)
        judged = rule.minimum_sites(tolerate) + rule.needs_reference
        need = max(judged, coordinator.least_sites(tolerate, max(1, tolerate)))
        if self.sites < need:
            raise BoundError(
                f"{rule.name} under {self.suite} needs at least {need} sites to tolerate {tolerate} malicious ones, "
                f"got {self.sites}; raise --sites or lower --tolerate"
            )
        clip = coordinator.selects if self.clip is None else self.clip
        return replace(self, rule=rule.name, tolerate=tolerate, clip=clip)

    def _check_training(self) -> None:
        if self.runtime not in RUNTIMES:
            raise UsageError(f"no runtime is called {self.runtime!r}; known: {', '.join(RUNTIMES)}")
        if self.alpha is not None and self.split is not None:
            raise UsageError(
                f"--alpha {self.alpha:g} and --split {self.split} both deal out the data: give one of them"
            )
        parse_split(self.split or "iid")
        if self.model not in MODELS:
            raise UsageError(f"no model is called {self.model!r}; known: {', '.join(MODELS)}")
        if self.epochs is not None and self.steps is not None:
            raise UsageError(f"--epochs {self.epochs} and --steps {self.steps} exclude each other: give one of them")
        if not 0.0 <= self.site_momentum < 1.0:
            raise UsageError(f"--site-momentum must lie in 0 .. 1 (exclusive), got {self.site_momentum}")
        if self.site_momentum and self.runtime == "ray":
            raise UsageError("--site-momentum needs --runtime local: Ray's processes do not share what sites remember")

    def _check_reference(self, rule: Rule) -> None:
        known = [site_name(partition) for partition in range(self.sites)]
        if not rule.needs_reference and self.reference is not None:
            raise UsageError(f"rule {rule.name!r} has no use for a reference: leave --reference out")
        if rule.needs_reference and self.reference not in known:
            raise UsageError(
                f"rule {rule.name!r} needs a trusted site: --reference must name one of {known[0]} .. {known[-1]}, "
                f"got {self.reference or 'none'}"
            )


def simulate(
    settings: Simulation,
    world: World | None = None,
    *,
    workers: int | None = None,
    on_phase: Callable[[int, str], None] | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> Result:
    """Run one federation and return its result as plain values, ready for JSON.

    Args:
        settings: what to simulate.
        world: the data and sites, if they are there already (``build_world``).
        workers: how many sites work at the same time under the local runtime; the number of cores by default.
        on_phase: told round number and phase as they begin.
        on_round: told the record of every finished round.

    Raises:
        UsageError: a setting is out of range.
        DataError: the data file cannot be used.
    """
    settings = settings.checked()
    world = world or build_world(settings)
    app = client_app(world, _site_suites(settings), os.urandom, _defence(settings, world))
    measure = _measure(world)
    strategy = QuorumStrategy(
        _coordinator(settings.suite),
        rule=str(settings.rule),
        tolerate=settings.tolerate,
        min_available_nodes=settings.sites,
        clip=settings.clip,
        sketches=settings.sketches,
        reference=settings.reference,
        fraction_evaluate=0.0,
        reputation=ReputationPolicy(sybils=SybilPolicy()) if settings.quarantine else None,
        gate=Gate() if settings.gate else None,
        # Seeded, so that a simulation can be repeated. A deployment leaves the operating system's randomness in.
        random_bytes=np.random.default_rng([settings.seed, 7]).bytes,
        on_round=on_round or (lambda record: None),
        on_phase=on_phase,
    )

    def run(grid: Grid) -> QuorumResult:
        model = ArrayRecord(learnable(world.new_model()))
        return strategy.start(
            grid,
            model,
            num_rounds=settings.rounds,
            timeout=settings.timeout,
            evaluate_fn=lambda _, arrays: measure(arrays),
        )

    with _quiet_flower(), _one_thread_per_site():
        outcome = (
            _run_on_ray(run, app, settings.sites)
            if settings.runtime == "ray"
            else _run_locally(run, app, settings.sites, workers)
        )
    return result_of(settings, world, outcome)


def build_world(settings: Simulation, data: Dataset | None = None) -> World:
    """Data, partition and who is poisoned, all from the settings; the data as well, unless they are there already."""
    if data is None:
        data = load_dataset(settings.data, label=settings.label, key=settings.key, seed=settings.seed)
    rng = np.random.default_rng([settings.seed, 0])
    holders = settings.sites if settings.hoard else settings.sites - settings.poisoned
    dealt = partition(data, holders, alpha=settings.alpha, split=settings.split, rng=rng)
    # A trusted site that is poisoned would be the end of any rule that trusts it.
    candidates = [partition for partition in range(settings.sites) if site_name(partition) != settings.reference]
    poisoned = frozenset(int(p) for p in rng.choice(candidates, size=settings.poisoned, replace=False))
    attack = parse_attack(settings.attack)
    if attack.backdoor and not 0 <= settings.target < data.classes:
        raise UsageError(f"--target must be a class, 0 .. {data.classes - 1}, got {settings.target}")
    return World(
        data=data,
        parts=tuple(dealt) if settings.hoard else _dealt_to_honest(dealt, settings.sites, poisoned),
        poisoned=poisoned,
        attack=attack,
        training=Training(
            settings.epochs,
            settings.steps,
            settings.batch_size,
            settings.lr,
            settings.momentum,
            settings.site_momentum,
        ),
        seed=settings.seed,
        hidden=settings.hidden,
        model=settings.model,
        target=settings.target,
    )


def _dealt_to_honest(
    dealt: list[NDArray[np.int64]], sites: int, poisoned: frozenset[int]
) -> tuple[NDArray[np.int64], ...]:
    """One share for each honest site; the malicious ones look over the shoulders of the first honest ones."""
    honest = iter(dealt)
    borrowed = cycle(dealt)
    return tuple(next(borrowed) if site in poisoned else next(honest) for site in range(sites))


def _defence(settings: Simulation, world: World) -> Defence:
    """What attackers that know the rule try their updates out on."""
    coordinator = _coordinator(settings.suite)
    names = [site_name(p) for p in (*world.honest, *sorted(world.poisoned))]
    return Defence(
        rule=parse_rule(str(settings.rule), suite=settings.suite),
        tolerate=settings.tolerate or 0,
        clip=bool(settings.clip),
        equal=coordinator.selects,
        reference=None if settings.reference is None else names.index(settings.reference),
        seed=settings.seed,
    )


def _measure(world: World) -> Callable[[ArrayRecord], MetricRecord]:
    """How a model is measured: on the test rows, and on those with the trigger if there is a backdoor."""
    data, attack = world.data, world.attack
    triggered = (
        attack.triggered(data.test_x, data.test_y, data=data, target=world.target)
        if attack.backdoor and world.poisoned
        else None
    )

    def measure(model: ArrayRecord) -> MetricRecord:
        network = world.new_model()
        load_learnable(network, model.to_torch_state_dict())
        metrics = evaluate(network, data.test_x, data.test_y)
        if triggered is not None:
            metrics["attack_success"] = attack_success(network, *triggered)
        return MetricRecord(dict(metrics))

    return measure


def result_of(settings: Simulation, world: World, outcome: QuorumResult) -> Result:
    """The result as plain values; its shape is described in ``docs/result.md``."""
    poisoned = {site_name(p) for p in world.poisoned}
    initial = outcome.evaluate_metrics_serverapp[0]
    rounds = [
        {
            "round": record.round,
            "accuracy": record.metrics["accuracy"],
            "metrics": record.metrics,
            "accepted": list(record.accepted),
            "rejected": list(record.rejected),
            "quarantined": list(record.quarantined),
            "reasons": record.reasons,
            "codes": record.codes,
            "weights": record.weights,
            "notes": list(record.notes),
            "failed": record.failed,
            "unit": record.unit,
            "seconds": record.seconds,
            "bytes": record.bytes,
        }
        for record in outcome.rounds
    ]
    last = outcome.rounds[-1].metrics
    return {
        "schema_version": SCHEMA_VERSION,
        "config": asdict(settings),
        "versions": {name: version(name) for name in ("quorsum", "flwr", "torch", "tenseal", "numpy")}
        | {"python": platform.python_version()},
        "sites": [
            {"id": site_name(p), "poisoned": p in world.poisoned, "rows": len(part)}
            for p, part in enumerate(world.parts)
        ],
        "rounds": rounds,
        "final": {
            "initial_accuracy": float(initial["accuracy"]),  # type: ignore[arg-type]
            "accuracy": last["accuracy"],
            "metrics": last,
            "primary": primary_metric(world.data),
            "attack_success": last.get("attack_success"),
            "poisoned_rejected": _share(outcome.rounds, lambda site: site in poisoned),
            "honest_rejected": _share(outcome.rounds, lambda site: site not in poisoned),
        },
    }


def _share(rounds: list[RoundRecord], counts: Callable[[str], bool]) -> float | None:
    """Share of site-rounds that were rejected, among the sites that count; None when there are none."""
    invited = sum(counts(site) for record in rounds for site in record.invited)
    rejected = sum(counts(site) for record in rounds for site in record.rejected)
    return rejected / invited if invited else None


def _coordinator(suite: str) -> CoordinatorSuite:
    ends: dict[str, CoordinatorSuite] = {
        "sealed": SealedCoordinator(select),
        "ckks": CkksCoordinator(),
        "plain": PlainCoordinator(),
    }
    return ends[suite]


def _site_suites(settings: Simulation) -> Callable[[int], SiteSuite]:
    """What makes the suite of each partition. It holds keys as bytes, so that it can go to another process."""
    if settings.suite == "sealed":
        identities = tuple(Identity.generate(os.urandom).to_bytes() for _ in range(settings.sites))
        return partial(_sealed_site, identities)
    if settings.suite == "ckks":
        return partial(_ckks_site, generate_site_key(os.urandom).to_bytes())
    return _plain_site


def _plain_site(partition: int) -> PlainSite:
    return PlainSite()


def _sealed_site(identities: tuple[bytes, ...], partition: int) -> SealedSite:
    # Simulated data are nobody's secret, so that small models are accepted.
    return SealedSite(Identity.from_bytes(identities[partition]), select, accept_small_models=True)


def _ckks_site(key: bytes, partition: int) -> CkksSite:
    return _loaded_ckks_site(key)


@lru_cache(maxsize=4)
def _loaded_ckks_site(key: bytes) -> CkksSite:
    # Setting up a TenSEAL context takes a tenth of a second; a Ray worker plays many sites with the same key.
    return CkksSite(CkksSiteKey.from_bytes(key))


def _run_locally(run: Callable[[Grid], QuorumResult], app: ClientApp, sites: int, workers: int | None) -> QuorumResult:
    with LocalGrid([app] * sites, workers=workers) as grid:
        return run(grid)


def _run_on_ray(run: Callable[[Grid], QuorumResult], app: ClientApp, sites: int) -> QuorumResult:
    try:
        import ray  # noqa: F401 - only to give a clear error early
        from flwr.simulation import run_simulation
    except ImportError:
        raise UsageError("--runtime ray needs Flower's simulation runtime: pip install 'quorsum[ray]'") from None
    outcomes: list[QuorumResult] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, _: Any) -> None:
        outcomes.append(run(grid))

    resources: dict[str, dict[str, ConfigRecordValues]] = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, app, sites, backend_config=resources)
    if not outcomes:
        raise UsageError("Flower's simulation ended without a result; its log says why")
    return outcomes[0]


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Flower logs every phase at INFO; in a simulation the progress display says what happens."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _one_thread_per_site() -> Iterator[None]:
    """Sites train side by side, one core each; torch's own threads would only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
