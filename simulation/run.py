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
from typing import Any, TypeAlias

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecordValues, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from quorsum.aggregation import Rule, parse_rule
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
from quorsum.simulation.attacks import parse_attack
from quorsum.simulation.data import Dataset, load_dataset
from quorsum.simulation.federation import Training, World, client_app, site_name
from quorsum.simulation.grid import LocalGrid
from quorsum.simulation.models import evaluate
from quorsum.simulation.partition import partition

__all__ = ["RUNTIMES", "SUITES", "Simulation", "simulate"]

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
        data: name of an embedded data set, or path of an ``.npz`` or CSV file.
        label: the label column of a CSV file.
        sites: n, number of sites.
        poisoned: how many of them are malicious; which ones, the seed decides.
        attack: what the malicious ones do, such as ``"sign-flip:strength=8"``.
        rule: the robust rule; None takes the usual one of the suite.
        reference: the trusted site of rules that need one, such as ``"site-01"``; it is never a poisoned one.
        tolerate: f; None takes as many as are poisoned.
        suite: ``"sealed"``, ``"ckks"`` or ``"plain"``.
        rounds: how many.
        alpha: Dirichlet concentration of the partition, or None for iid.
        clip: whether sites clip their updates to the moving reference norm; None takes what the suite needs.
        seed: decides data split, partition, who is poisoned, initial model, training and attacks.
        runtime: ``"local"`` (threads of this process) or ``"ray"`` (Flower's simulation runtime).
        epochs: local epochs per round; None takes what suits the model.
        batch_size: rows per step of local training.
        lr: learning rate of local training; None takes what suits the model.
        momentum: momentum of local training.
        hidden: width of the model's hidden layer, for tables and flat inputs.
        sketches: r, random sketches per round for the suites that sketch.
        timeout: seconds a site has for one reply.
    """

    data: str = "digits"
    label: str | None = None
    sites: int = 10
    poisoned: int = 2
    attack: str = "sign-flip"
    rule: str | None = None
    reference: str | None = None
    tolerate: int | None = None
    suite: str = "sealed"
    rounds: int = 15
    alpha: float | None = None
    clip: bool | None = None
    seed: int = 1
    runtime: str = "local"
    epochs: int | None = None
    batch_size: int = 32
    lr: float | None = None
    momentum: float = 0.9
    hidden: int = 32
    sketches: int = 4
    timeout: float = 600.0

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
        if self.runtime not in RUNTIMES:
            raise UsageError(f"no runtime is called {self.runtime!r}; known: {', '.join(RUNTIMES)}")
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
    on_phase: Callable[[int, str], None] | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> Result:
    """Run one federation and return its result as plain values, ready for JSON.

    Raises:
        UsageError: a setting is out of range.
        DataError: the data file cannot be used.
    """
    settings = settings.checked()
    world = world or build_world(settings)
    app = client_app(world, _site_suites(settings), os.urandom)
    strategy = QuorumStrategy(
        _coordinator(settings.suite),
        rule=str(settings.rule),
        tolerate=settings.tolerate,
        min_available_nodes=settings.sites,
        clip=settings.clip,
        sketches=settings.sketches,
        reference=settings.reference,
        fraction_evaluate=0.0,
        # Seeded, so that a simulation can be repeated. A deployment leaves the operating system's randomness in.
        random_bytes=np.random.default_rng([settings.seed, 7]).bytes,
        on_round=on_round or (lambda record: None),
        on_phase=on_phase,
    )

    def run(grid: Grid) -> QuorumResult:
        model = ArrayRecord(world.new_model().state_dict())
        return strategy.start(
            grid,
            model,
            num_rounds=settings.rounds,
            timeout=settings.timeout,
            evaluate_fn=lambda _, arrays: _evaluated(world, arrays),
        )

    with _quiet_flower(), _one_thread_per_site():
        outcome = (
            _run_on_ray(run, app, settings.sites) if settings.runtime == "ray" else _run_locally(run, app, settings)
        )
    return result_of(settings, world, outcome)


def build_world(settings: Simulation) -> World:
    """Data, partition and who is poisoned, all from the settings."""
    data: Dataset = load_dataset(settings.data, label=settings.label, seed=settings.seed)
    rng = np.random.default_rng([settings.seed, 0])
    parts = partition(data.train_y, settings.sites, alpha=settings.alpha, rng=rng)
    # A trusted site that is poisoned would be the end of any rule that trusts it.
    candidates = [partition for partition in range(settings.sites) if site_name(partition) != settings.reference]
    poisoned = rng.choice(candidates, size=settings.poisoned, replace=False)
    training = Training(settings.epochs, settings.batch_size, settings.lr, settings.momentum)
    return World(
        data=data,
        parts=tuple(parts),
        poisoned=frozenset(int(p) for p in poisoned),
        attack=parse_attack(settings.attack),
        training=training,
        seed=settings.seed,
        hidden=settings.hidden,
    )


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
            "poisoned_rejected": _share(outcome.rounds, lambda site: site in poisoned),
            "honest_rejected": _share(outcome.rounds, lambda site: site not in poisoned),
        },
    }


def _share(rounds: list[RoundRecord], counts: Callable[[str], bool]) -> float | None:
    """Share of site-rounds that were rejected, among the sites that count; None when there are none."""
    invited = sum(counts(site) for record in rounds for site in record.invited)
    rejected = sum(counts(site) for record in rounds for site in record.rejected)
    return rejected / invited if invited else None


def _evaluated(world: World, model: ArrayRecord) -> MetricRecord:
    network = world.new_model()
    network.load_state_dict(model.to_torch_state_dict())
    return MetricRecord(dict(evaluate(network, world.data.test_x, world.data.test_y)))


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


def _run_locally(run: Callable[[Grid], QuorumResult], app: ClientApp, settings: Simulation) -> QuorumResult:
    with LocalGrid([app] * settings.sites) as grid:
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
