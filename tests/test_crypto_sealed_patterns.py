"""Every pattern of wrong and silent sites for small federations: the round ends at the first attempt, rightly.

With f liars, ``n - 2 tau - 2 f - 1`` honest sites may be silent while the Gram matrix is opened, and ``tau`` more while
the sum is, whose sharing has the lower degree; with fewer liars among the answers, more may be silent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from sealed_federation import Federation, context_for, names, updates_for

from quorsum.crypto import field
from quorsum.crypto.decoding import decode
from quorsum.crypto.sealed_parameters import SealedBounds
from quorsum.crypto.sharing import interpolate_at_zero, share
from quorsum.crypto.suite import Blocks, Site
from quorsum.errors import CoordinatorFault, RoundFailed
from quorsum.selection import select
from quorsum.simulation.protocol_attacks import _WrongPoints, _WrongSum

SMALL = [(5, 1, 1), (6, 1, 1), (7, 1, 1), (7, 2, 1), (9, 2, 2)]
ENTRIES = 6


def patterns(n: int, degree: int, f: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All (liars, silent) that leave ``degree + f + 1`` right answers and can be told apart."""
    holders = range(1, n + 1)
    for lies in range(f + 1):
        for liars in combinations(holders, lies):
            others = [k for k in holders if k not in liars]
            for absent in range(n - degree - f - 1 - lies + 1):
                for silent in combinations(others, absent):
                    yield liars, silent


def answers(n: int, degree: int, liars: tuple[int, ...], silent: tuple[int, ...], single: bool) -> tuple:  # type: ignore[type-arg]
    secrets = field.random_vector(os.urandom, ENTRIES)
    shares = share(secrets, degree, n, os.urandom)
    for nth, liar in enumerate(liars):
        # Either everything is wrong, or one entry of each liar's, another one each time.
        where = slice(None) if not single else slice(nth, nth + 1)
        shares[liar - 1, where] = field.add(shares[liar - 1, where], np.ones_like(shares[liar - 1, where]))
    return secrets, {k: shares[k - 1] for k in range(1, n + 1) if k not in silent}


@pytest.mark.parametrize(("n", "tau", "f"), SMALL)
@pytest.mark.parametrize("phase", ["gram", "sum"])
@pytest.mark.parametrize("single", [False, True])
def test_every_pattern_decodes_to_the_truth_and_names_the_liars(
    n: int, tau: int, f: int, phase: str, single: bool
) -> None:
    degree = 2 * tau if phase == "gram" else tau
    tried, most_silent = 0, 0
    for liars, silent in patterns(n, degree, f):
        secrets, given = answers(n, degree, liars, silent, single)
        decoded = decode(given, degree, f, os.urandom)
        assert np.array_equal(decoded.values, secrets)
        assert decoded.liars == set(liars)
        tried += 1
        if len(liars) == f:
            most_silent = max(most_silent, len(silent))
    assert most_silent == n - degree - 2 * f - 1
    assert tried > n


@pytest.mark.parametrize(("n", "tau", "f"), SMALL)
@pytest.mark.parametrize("phase", ["gram", "sum"])
def test_one_more_silent_site_ends_the_attempt_and_never_gives_a_wrong_value(
    n: int, tau: int, f: int, phase: str
) -> None:
    degree = 2 * tau if phase == "gram" else tau
    for liars in combinations(range(1, n + 1), f):
        others = [k for k in range(1, n + 1) if k not in liars]
        for silent in combinations(others, n - degree - 2 * f):
            _, given = answers(n, degree, liars, silent, single=False)
            with pytest.raises(RoundFailed, match="missing"):
                decode(given, degree, f, os.urandom)


@pytest.mark.parametrize(("n", "tau", "f"), SMALL)
@pytest.mark.parametrize("phase", ["gram", "sum"])
def test_codeword_forged_to_tie_is_not_accepted(n: int, tau: int, f: int, phase: str) -> None:
    """f liars agree on another polynomial through ``degree`` honest answers: as near as a forgery can come."""
    degree = 2 * tau if phase == "gram" else tau
    for liars in combinations(range(1, n + 1), f):
        honest = [k for k in range(1, n + 1) if k not in liars]
        secrets = field.random_vector(os.urandom, ENTRIES)
        shares = share(secrets, degree, n, os.urandom)
        base = honest[:degree]
        # Another polynomial that equals the true one at ``base`` only.
        bump = np.array([[_through(base, k)] for k in range(1, n + 1)], dtype=np.uint64)
        forged = field.add(shares, field.mul(bump, np.full_like(shares, 12345)))
        for liar in liars:
            shares[liar - 1] = forged[liar - 1]
        everybody = {k: shares[k - 1] for k in range(1, n + 1)}
        decoded = decode(everybody, degree, f, os.urandom)
        assert np.array_equal(decoded.values, secrets)
        assert decoded.liars == set(liars)
        # With so many others silent that both polynomials have degree + f answers, neither is believed.
        tied = {k: everybody[k] for k in (*base, *liars, *honest[degree : degree + f])}
        with pytest.raises(RoundFailed):
            decode(tied, degree, f, os.urandom)


def _through(zeros: list[int], x: int) -> int:
    value = 1
    for zero in zeros:
        value = value * (x - zero) % field.P
    return value


def test_shares_alone_do_not_show_a_lie_without_redundancy() -> None:
    secrets = field.random_vector(os.urandom, 1)
    shares = share(secrets, 2, 3, os.urandom)
    shares[0] = (int(shares[0, 0]) + 1) % field.P
    assert interpolate_at_zero(shares, [1, 2, 3])[0] != secrets[0]


# --- whole rounds ---


def play(n: int, tau: int, f: int, phase: str, liars: tuple[int, ...], silent: tuple[int, ...]) -> None:
    federation = Federation(context_for(n, 4096, tolerate=f, collude=tau), updates_for(n, 4096))
    by_number = dict(enumerate(names(n), 1))
    for liar in liars:
        site = by_number[liar]
        lie = _WrongPoints if phase == "gram" else _WrongSum
        federation.sites[site] = lie(federation.sites[site])  # type: ignore[assignment]
    mute = {by_number[k] for k in silent}
    federation.tamper = lambda site, asked, blocks: _muted(site in mute and asked == phase, blocks)
    measured, chosen, opened = federation.run()
    faults = measured.faults if phase == "gram" else opened.faults
    assert {site for site, fault in faults.items() if fault.code in {"wrong-points", "wrong-share"}} == {
        by_number[k] for k in liars
    }
    assert measured.sites == names(n)
    assert len(chosen) >= SealedBounds.of(n, tau, f).smallest_set
    assert chosen == select(federation.context, measured.sites, measured.gram, f)
    clear = np.mean([federation.updates[site] for site in chosen], axis=0)
    assert np.linalg.norm(opened.total - clear) < 0.02 * np.linalg.norm(clear)
    assert [asked for asked, _ in federation.asked] == ["root", "check", "gram", "ticket", "sum"]


def _muted(silent: bool, blocks: Blocks) -> Blocks | None:
    return None if silent else blocks


def _sampled(n: int, tau: int, f: int, phase: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The worst patterns: f liars and as many silent as may be, at both ends of the roster; and nobody wrong."""
    bounds = SealedBounds.of(n, tau, f)
    degree = 2 * tau if phase == "gram" else tau
    room = n - degree - 2 * f - 1
    # Who is silent in gram signs no ticket, and a quorum of tickets is needed too.
    spare = n - bounds.quorum if phase == "gram" else n
    few, many = min(room, spare), min(n - degree - f - 1, spare)
    first, last = tuple(range(1, n + 1)), tuple(range(n, 0, -1))
    worst = [(order[:f], order[f : f + few]) for order in (first, last)]
    return [*worst, ((), last[:many])]


@pytest.mark.parametrize(("n", "tau", "f"), SMALL)
@pytest.mark.parametrize("phase", ["gram", "sum"])
def test_worst_patterns_over_whole_rounds(n: int, tau: int, f: int, phase: str) -> None:
    for liars, silent in _sampled(n, tau, f, phase):
        if n - f < SealedBounds.of(n, tau, f).smallest_set:
            with pytest.raises(RoundFailed, match="shows too much"):
                play(n, tau, f, phase, liars, silent)
        else:
            play(n, tau, f, phase, liars, silent)


def test_a_silent_federation_of_five_names_what_is_missing() -> None:
    def tamper(site: Site, phase: str, blocks: Blocks) -> Blocks | None:
        return None if phase == "root" and site in {"site-01", "site-02"} else blocks

    federation = Federation(context_for(5, 4096), updates_for(5, 4096), tamper=tamper)
    with pytest.raises(RoundFailed, match="only 3 sites signed the root, and 4 are needed"):
        federation.run()
    assert not any(isinstance(fault, CoordinatorFault) for fault in federation.refusals.values())
