"""What the coordinator and tau sites know of a sealed update, and what tau + 1 sites know.

Everything is done on a real round of full size: a second key and a second masked content are worked out that explain
every byte of the view, share by share; nothing secret is searched for and found in what travels; and one site more
than tau opens an update, as the documents say.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray
from sealed_federation import Federation, context_for, identity, names, updates_for

from quorsum.crypto import field, labels, ring
from quorsum.crypto.labels import tagged
from quorsum.crypto.mask import draw_key, unmask
from quorsum.crypto.quantise import dequantise, quantise
from quorsum.crypto.randomness import stretched
from quorsum.crypto.sealed_geometry import pairs_of, plan_of, root_of, scale_of, seed_of
from quorsum.crypto.sealed_parameters import SEALED_V1
from quorsum.crypto.sealed_site import _gram_points, challenge_of
from quorsum.crypto.share_checks import check_values
from quorsum.crypto.sharing import Deal, deal_length, interpolate_at_zero, lagrange_matrix
from quorsum.crypto.sketch import public_sketch, sketch
from quorsum.crypto.suite import Blocks, RandomBytes, Site
from quorsum.selection import select

N_SITES, DIMENSION, TAU = 7, 20_000, 1
SITES = names(N_SITES)
HOLDERS = range(1, N_SITES + 1)
SIZE = SEALED_V1.degree
COLLUDER = 7
FieldArray = NDArray[np.uint64]


class Recorded:
    """The operating system's randomness, kept so that a test can look at a site's secrets afterwards."""

    def __init__(self) -> None:
        self.drawn: list[bytes] = []

    def __call__(self, count: int) -> bytes:
        self.drawn.append(os.urandom(count))
        return self.drawn[-1]

    def again(self) -> RandomBytes:
        """The same bytes once more."""
        drawn = iter(self.drawn)
        return lambda count: next(drawn)


@dataclass
class Secrets:
    integers: NDArray[np.int32]
    key: NDArray[np.int8]
    deals: list[Deal]


@dataclass
class World:
    """A finished round, and every secret in it."""

    round: Federation
    chosen: tuple[Site, ...]
    mean: NDArray[np.float64]
    gram: NDArray[np.float64]
    secrets: dict[Site, Secrets]
    seed: bytes
    sketches: FieldArray


def deals_of(round_: Federation, dealer: Site) -> list[Deal]:
    """What a dealer gave to each holder; the one to itself from its own state."""
    sealed, length = round_.sent[dealer][1], deal_length(N_SITES, sealed=True)
    place = SITES.index(dealer)
    deals, at = [], 0
    for holder, site in enumerate(SITES):
        if holder == place:
            with np.load(io.BytesIO(round_.states[dealer])) as parts:
                deals.append(Deal.from_bytes(parts["own"].tobytes(), N_SITES))
            continue
        info = tagged(labels.HPKE_INFO, round_.context.digest(), dealer.encode(), site.encode())
        deals.append(Deal.from_bytes(identity(holder + 1).open(sealed[at : at + length], info), N_SITES))
        at += length
    return deals


def blocks_of(blocks: Blocks) -> FieldArray:
    return np.frombuffer(b"".join(blocks[2:]), "<u8").reshape(-1, SIZE)


@pytest.fixture(scope="module")
def world() -> World:
    round_ = Federation(context_for(N_SITES, DIMENSION, collude=TAU), updates_for(N_SITES, DIMENSION))
    sources = {site: Recorded() for site in SITES}
    uploads = {}
    for site, update in round_.updates.items():
        round_.states[site], round_.sent[site] = round_.sites[site].seal(round_.context, update, sources[site])
        uploads[site] = round_.round.accept(round_.context, site, round_.sent[site])
    measured = round_.measure(uploads)
    assert measured.sites == SITES
    assert measured.tolerate is not None
    chosen = select(round_.context, measured.sites, measured.gram, measured.tolerate)
    opened = round_.combine(uploads, chosen)
    secrets = {}
    for site, source in sources.items():
        replay = source.again()
        key, many = draw_key(replay), stretched(replay)
        integers = quantise(round_.updates[site], scale_of(round_.context), round_.context.digest(), many)
        secrets[site] = Secrets(integers, key, deals_of(round_, site))
    # What every site was shown: root, seed, sketches.
    asked = dict(round_.asked)["check"][SITES[0]]
    root = root_of(round_.context, {site: uploads[site].commitment for site in SITES})
    seed = seed_of(root, round_.round._nonce)
    sketches = np.frombuffer(asked[3], "<u8").reshape(N_SITES, 4, SIZE)
    return World(round_, tuple(s for s in SITES if s in chosen), opened.total, measured.gram, secrets, seed, sketches)


def shares_at(world: World, holder: int) -> FieldArray:
    """Key shares that one holder has of all dealers, shape (n, N)."""
    return np.stack([world.secrets[site].deals[holder - 1].key for site in SITES])


def zero_points(deals: list[list[Deal]], holder: int) -> FieldArray:
    """``b_ij(k) + b_ji(k)`` for all pairs."""
    return np.array(
        [
            field.add(deals[i][holder - 1].zeros[j : j + 1], deals[j][holder - 1].zeros[i : i + 1])[0]
            for i, j in pairs_of(SITES)
        ]
    )


def times(vector: FieldArray, scalar: int) -> FieldArray:
    return field.mul(vector, np.full_like(vector, scalar % field.P))


def ring_row(public: FieldArray, delta: FieldArray) -> FieldArray:
    """``A^k delta`` for all sketches, flat."""
    return np.stack([ring.multiply(one, delta) for one in public]).reshape(-1)


def transposed(a: FieldArray, z: FieldArray) -> FieldArray:
    """The vector v with <v, delta> = <a delta, z>: multiplication by a(1/X)."""
    reversed_ = field.neg(np.concatenate([a[:1], a[:0:-1]]))
    reversed_[0] = a[0]
    return ring.multiply(reversed_, z)


def solve_zero(rows: FieldArray, rng: np.random.Generator) -> FieldArray:
    """A random delta with rows @ delta = 0: random in all coordinates but the first few, which are solved for."""
    count = len(rows)
    delta = rng.integers(0, field.P, SIZE, dtype=np.uint64)
    delta[:count] = 0
    right = [-int(v) % field.P for v in field.matmul(rows, delta[:, None])[:, 0]]
    matrix = [[int(v) for v in row[:count]] + [right[k]] for k, row in enumerate(rows)]
    for c in range(count):
        pivot = next(r for r in range(c, count) if matrix[r][c])
        matrix[c], matrix[pivot] = matrix[pivot], matrix[c]
        inverse = pow(matrix[c][c], -1, field.P)
        matrix[c] = [v * inverse % field.P for v in matrix[c]]
        for r in range(count):
            if r != c:
                factor = matrix[r][c]
                matrix[r] = [(v - factor * w) % field.P for v, w in zip(matrix[r], matrix[c], strict=True)]
    delta[:count] = [matrix[r][count] for r in range(count)]
    assert not field.matmul(rows, delta[:, None]).any()
    return delta


def test_second_update_explains_the_whole_view(world: World) -> None:
    """Two honest sites of the opened set get other keys and other contents, and nobody outside them sees a change.

    Site a gets the key s_a + delta, site b the key s_b - delta, so that the sum over the set stays. Their masked
    updates y stay as they are byte by byte, so what is masked changes by t = -a_j delta at a and by +a_j delta at b.
    The Gram matrix stays the same if <t, z_l> = 0 for all others, <t, z_a + z_b> = 0 (these are linear in delta) and
    2 <t, z_a> + <t, t> = 0 (a matter of scale). The shares move by delta L(X), where L is 1 at zero and 0 at the
    colluder; the zero sharings take up what the products of shares change by; the check masks take up the rest.

    Without the shortness of what is masked, then, the view leaves 4096 - n numbers of each key open. Shortness itself
    is hidden by the lattice assumption of the mask (Hint-LWE), which no test can show.
    """
    a, b = (SITES.index(site) for site in world.chosen[:2])
    assert COLLUDER - 1 not in (a, b)
    context = world.round.context
    public = public_sketch(context.digest(), plan_of(context, world.seed))
    keys = np.stack([field.from_signed(world.secrets[site].key.astype(np.int64)) for site in SITES])
    z = np.stack([field.sub(world.sketches[i].reshape(-1), ring_row(public, keys[i])) for i in range(N_SITES)])

    # delta, from the linear conditions, then its scale
    def functional(vector: FieldArray) -> FieldArray:
        parts = vector.reshape(4, SIZE)
        return field.sum_mod(np.stack([transposed(public[k], parts[k]) for k in range(4)]), axis=0)

    others = [i for i in range(N_SITES) if i not in (a, b)]
    rows = np.stack([functional(z[i]) for i in others] + [functional(field.add(z[a], z[b]))])
    delta = solve_zero(rows, np.random.default_rng(1))
    t = field.neg(ring_row(public, delta))
    scale = -2 * field.dot(t, z[a]) * pow(field.dot(t, t), -1, field.P) % field.P
    delta, t = times(delta, scale), times(t, scale)
    z_new = z.copy()
    z_new[a], z_new[b] = field.add(z[a], t), field.sub(z[b], t)
    assert delta.any()

    # The same Gram matrix, and it is the one that was opened.
    np.testing.assert_array_equal(field.matmul(z_new, z_new.T), field.matmul(z, z.T))
    opened = field.centred(field.matmul(z, z.T)) / (4 * scale_of(context) ** 2)
    np.testing.assert_allclose(opened, world.gram, rtol=1e-12)

    # Deals: s'(k) = s(k) +- delta L(k)
    new = {site: [replace(deal) for deal in world.secrets[site].deals] for site in SITES}
    # L has degree tau, is 1 at zero and 0 at the colluder.
    bump = [int(w) for w in _polynomial_through({0: 1, COLLUDER: 0})]
    assert bump[COLLUDER - 1] == 0
    challenge = challenge_of(context, world.seed)
    hint = field.dot(challenge.gamma, delta)
    for k in HOLDERS:
        for place, sign in ((a, 1), (b, -1)):
            old = world.secrets[SITES[place]].deals[k - 1]
            new[SITES[place]][k - 1] = replace(
                old,
                key=field.add(old.key, times(delta, sign * bump[k - 1])),
                # gamma . s(k) + mask(k) stays
                key_mask=(old.key_mask - sign * hint * bump[k - 1]) % field.P,
                zeros=old.zeros.copy(),
            )

    # Zero sharings: b'(k) = b(k) + <z_i(k), z_j(k)> - <z_i'(k), z_j'(k)>, in the row of the honest one of the two.
    upper = pairs_of(SITES)
    for k in HOLDERS:
        before = _gram_points(world.sketches, public, shares_at(world, k))
        after = _gram_points(world.sketches, public, np.stack([new[site][k - 1].key for site in SITES]))
        change = field.sub(before, after)
        if k == COLLUDER:
            assert not change.any(), "the colluder computes what it has computed"
        for pair, (i, j) in enumerate(upper):
            if not change[pair]:
                continue
            owner, column = (i, j) if i in (a, b) else (j, i)
            # On the diagonal b_ii counts twice.
            amount = int(change[pair]) * (pow(2, -1, field.P) if i == j else 1) % field.P
            deal = new[SITES[owner]][k - 1]
            deal.zeros[column] = (int(deal.zeros[column]) + amount) % field.P
    for k in HOLDERS:
        for place in (a, b):
            old, deal = world.secrets[SITES[place]].deals[k - 1], new[SITES[place]][k - 1]
            moved = (
                field.dot(challenge.gamma_zeros, deal.zeros) - field.dot(challenge.gamma_zeros, old.zeros)
            ) % field.P
            new[SITES[place]][k - 1] = replace(deal, zeros_mask=(deal.zeros_mask - moved) % field.P)

    # They are honest sharings: of the new keys, and of zero.
    for place, key in ((a, field.add(keys[a], delta)), (b, field.sub(keys[b], delta))):
        _is_honest_sharing(new[SITES[place]], key)

    _is_the_view(world, new, public)

    # And the contents are others: what is under site a's mask, and what its key would open.
    y = blocks_of(world.round.sent[SITES[a]])
    old_content, new_content = (
        np.concatenate(list(unmask(context.digest(), y, key))) for key in (keys[a], field.add(keys[a], delta))
    )
    assert np.mean(old_content == new_content) < 1e-3
    plan = plan_of(context, world.seed)
    np.testing.assert_array_equal(sketch(plan, [field.from_signed(new_content)]).reshape(-1), z_new[a])


def _is_the_view(world: World, new: dict[Site, list[Deal]], public: FieldArray) -> None:
    """The colluder's deals, all check answers, all points and all sum shares are those that were seen."""
    challenge = challenge_of(world.round.context, world.seed)
    answers = {phase: dict(given) for phase, given in world.round.answered}
    rows_chosen = [SITES.index(site) for site in world.chosen]
    for k, site in enumerate(SITES, 1):
        mine = [new[dealer][k - 1] for dealer in SITES]
        if k == COLLUDER:
            assert [deal.to_bytes() for deal in mine] == [world.secrets[s].deals[k - 1].to_bytes() for s in SITES]
        checks = np.stack([check_values(deal, challenge) for deal in mine])
        assert field.to_bytes(checks) == answers["check"][site][1]
        shares = np.stack([deal.key for deal in mine])
        points = field.add(
            _gram_points(world.sketches, public, shares), zero_points([new[dealer] for dealer in SITES], k)
        )
        assert field.to_bytes(points) == answers["gram"][site][1]
        assert field.to_bytes(field.sum_mod(shares[rows_chosen], axis=0)) == answers["sum"][site][1]


def _is_honest_sharing(deals: list[Deal], key: FieldArray) -> None:
    _on_degree(np.stack([deal.key for deal in deals]), TAU)
    np.testing.assert_array_equal(interpolate_at_zero(np.stack([d.key for d in deals[: TAU + 1]]), [1, 2]), key)
    _on_degree(np.array([[deal.key_mask] for deal in deals], np.uint64), TAU)
    zeros = np.stack([np.append(deal.zeros, np.uint64(deal.zeros_mask)) for deal in deals])
    _on_degree(zeros, 2 * TAU)
    assert not interpolate_at_zero(zeros[: 2 * TAU + 1], list(HOLDERS)[: 2 * TAU + 1]).any()


def _polynomial_through(points: dict[int, int]) -> FieldArray:
    """Values at the holders 1..n of the polynomial of degree len(points) - 1 through these points."""
    p = field.P
    values = []
    for k in HOLDERS:
        total = 0
        for x, y in points.items():
            term = y
            for other in points:
                if other != x:
                    term = term * (k - other) * pow(x - other, -1, p) % p
            total = (total + term) % p
        values.append(total)
    return np.array(values, np.uint64)


def _on_degree(values: FieldArray, degree: int) -> None:
    """Whether all columns, received at holders 1..n, lie on polynomials of this degree."""
    base = list(HOLDERS)[: degree + 1]
    np.testing.assert_array_equal(field.matmul(lagrange_matrix(base, list(HOLDERS)), values[: degree + 1]), values)


def test_shares_of_tau_sites_are_consistent_with_every_key(world: World) -> None:
    """Whatever key somebody supposes, there is a polynomial of degree tau through it and the colluders' shares."""
    rng = np.random.default_rng(2)
    share = world.secrets[SITES[0]].deals[COLLUDER - 1].key
    supposed = rng.integers(0, field.P, SIZE, dtype=np.uint64)
    slope = times(field.sub(share, supposed), pow(COLLUDER, -1, field.P))
    shares = np.stack([field.add(supposed, times(slope, k)) for k in HOLDERS])
    np.testing.assert_array_equal(shares[COLLUDER - 1], share)
    np.testing.assert_array_equal(interpolate_at_zero(shares[:2], [1, 2]), supposed)


def test_tau_plus_one_sites_and_the_coordinator_open_an_update(world: World) -> None:
    """As the documents say: it is the bound. The same happens where a coordinator invents tau + 1 of the sites."""
    victim = SITES[0]
    shares = np.stack([world.secrets[victim].deals[k - 1].key for k in (6, 7)])
    key = interpolate_at_zero(shares, [6, 7])
    np.testing.assert_array_equal(field.centred(key), world.secrets[victim].key)
    context = world.round.context
    content = np.concatenate(list(unmask(context.digest(), blocks_of(world.round.sent[victim]), key))).reshape(-1)
    error = content[:DIMENSION] - world.secrets[victim].integers
    assert np.abs(error).max() <= SEALED_V1.eta_error
    opened = dequantise(content[:DIMENSION], scale_of(context), context.digest())
    update = world.round.updates[victim]
    assert np.corrcoef(opened, update)[0, 1] > 0.999
    # With tau shares the same computation gives noise: the share of one site is no key.
    wrong = np.concatenate(list(unmask(context.digest(), blocks_of(world.round.sent[victim]), shares[1]))).reshape(-1)
    assert abs(np.corrcoef(wrong[:DIMENSION].astype(float), content[:DIMENSION].astype(float))[0, 1]) < 0.05


def chi_square(values: NDArray[np.uint64], cells: int) -> float:
    counts = np.bincount(values.astype(np.int64), minlength=cells)
    expected = values.size / cells
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("site", SITES[:3])
def test_masked_update_looks_uniform(world: World, site: Site) -> None:
    """Top eight bits and bottom eight bits; the statistic has mean 255 and deviation 22.6. Zero updates look alike."""
    y = blocks_of(world.round.sent[site]).reshape(-1)
    for part in (y >> np.uint64(53), y & np.uint64(255)):
        assert abs(chi_square(part, 256) - 255) < 6 * 22.6
    # The same update sealed again, or another, is nowhere near: differences are uniform, too.
    _, other = world.round.sites[site].seal(world.round.context, np.zeros(DIMENSION), os.urandom)
    difference = field.sub(y, blocks_of(other).reshape(-1))
    assert abs(chi_square(difference >> np.uint64(53), 256) - 255) < 6 * 22.6


def test_what_is_masked_does_not_look_uniform(world: World) -> None:
    """The yardstick of the test above: without the mask the statistic is a hundred thousand times larger."""
    integers = field.from_signed(world.secrets[SITES[0]].integers.astype(np.int64))
    assert chi_square(integers >> np.uint64(53), 256) > 1e6


def pieces(data: bytes, length: int = 16) -> list[bytes]:
    return [data[:length], data[len(data) // 2 // 8 * 8 :][:length], data[-length:]]


def secret_patterns(world: World) -> dict[str, list[bytes]]:
    patterns: dict[str, list[bytes]] = {}
    for number, site in enumerate(SITES, 1):
        secret, update = world.secrets[site], world.round.updates[site]
        key = secret.key.astype(np.int64)
        for name, array in (
            ("key", secret.key),
            ("key as field elements", field.from_signed(key)),
            ("key as integers", key),
            ("key as floats", key.astype(np.float64)),
            ("integers", secret.integers),
            ("integers, 64 bits", secret.integers.astype(np.int64)),
            ("integers as field elements", field.from_signed(secret.integers.astype(np.int64))),
            ("update", update),
            ("update, single precision", update.astype(np.float32)),
        ):
            patterns[f"{name} of {site}"] = pieces(array.tobytes())
        own = identity(number)
        patterns[f"identity of {site}"] = [own.signing_seed, own.sealing_seed]
        for holder, deal in enumerate(secret.deals, 1):
            # A share of zero or a mask alone is eight random bytes: a chance hit has probability 2^-40.
            alone = [int(v).to_bytes(8, "little") for v in (*deal.zeros, deal.key_mask, deal.zeros_mask)]
            patterns[f"deal of {site} for {holder}"] = pieces(field.to_bytes(deal.key)) + alone
    return patterns


def test_nothing_secret_is_in_what_the_coordinator_receives(world: World) -> None:
    """All submissions and all answers, as bytes and as hexadecimal digits: no key, share, mask, integer or identity."""
    received = [block for blocks in world.round.sent.values() for block in blocks]
    received += [block for _, given in world.round.answered for blocks in given.values() for block in blocks]
    assert len(received) > 7 * 3 + 7 * 5
    everything = b"|".join(received)
    for name, patterns in secret_patterns(world).items():
        for pattern in patterns:
            assert pattern not in everything, name
            assert pattern.hex().encode() not in everything, name


def test_the_search_finds_secrets_where_they_are(world: World) -> None:
    """The yardstick of the test above: in the sites' private states, which stay at home, every site's deal shows."""
    patterns = secret_patterns(world)
    for number, site in enumerate(SITES, 1):
        assert all(pattern in world.round.states[site] for pattern in patterns[f"deal of {site} for {number}"])


def test_nothing_secret_shows_in_refusals(world: World) -> None:
    """What a site says when it refuses ends up in messages and logs."""
    round_ = world.round
    for site in SITES:
        round_.put(site, "check", (b"{}", b"", b"", b""))
        round_.put(site, "sum", (b"{}",))
    texts = [str(fault) for fault in round_.refusals.values()]
    assert len(texts) == 2 * N_SITES
    joined = "|".join(texts).encode()
    for patterns in secret_patterns(world).values():
        assert not any(pattern in joined or pattern.hex().encode() in joined for pattern in patterns)
