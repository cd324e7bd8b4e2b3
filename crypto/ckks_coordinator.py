"""The coordinator's end of the suite ``ckks``: it computes on ciphertexts and holds no secret.

Measuring. The B ciphertexts of each upload are added up with random signs, r times, drawn once all uploads are
in: ``z_i^k = sum_b s_kb ct_ib``. Whole ciphertexts get a sign, so this needs no rotation key, and over the signs
``E <z_i, z_j> = <x_i, x_j>``. For all pairs i <= j, ``P_ij = sum_k z_i^k z_j^k`` (plus, for i = j, a probe, see
``ckks_probe``) is masked (see ``ckks_mask``) and sent to all sites, who return the noisy sum of its slots. What
f + 1 of them say is believed.

Combining. ``sum_i w_i ct_i`` is sent to 2 f + 1 sites, or to all where there are fewer; if those do not agree, to
the rest as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import combinations_with_replacement

import numpy as np
import tenseal as ts
from numpy.typing import NDArray

from quorsum.crypto.checks import EXACT_TOLERANCE, RATIO_TOLERANCE, check_context, check_weights
from quorsum.crypto.ckks_keys import check_public_context
from quorsum.crypto.ckks_mask import hide_all_but_sum
from quorsum.crypto.ckks_parameters import (
    WEIGHT_LIFT,
    ciphertext_count,
    gram_step,
    sketch_count,
    slot_factor,
    sum_step,
)
from quorsum.crypto.ckks_probe import draw_probe
from quorsum.crypto.ckks_wire import (
    CipherVector,
    Context,
    MalformedError,
    ciphertext_bytes,
    load_ciphertext,
    pack_blocks,
    parameters_only,
    read_blocks,
)
from quorsum.crypto.flatten import flatten
from quorsum.crypto.randomness import draw_signs
from quorsum.crypto.suite import Ask, Blocks, Dialogue, Measured, Opened, RandomBytes, RoundContext, Site
from quorsum.crypto.voting import Verdict, count_votes, read_ballots
from quorsum.errors import KeyMaterialError, RoundFailed, SiteFault, UsageError

__all__ = ["CkksCoordinator", "CkksUpload"]


@dataclass(frozen=True)
class CkksUpload:
    """A sealed update whose form has been checked. It stays serialised: 64 bytes per parameter.

    Attributes:
        blocks: framed ciphertexts.
    """

    blocks: Blocks = field(repr=False)


@dataclass(frozen=True)
class CkksCoordinator:
    """The coordinator's end of ``ckks``.

    Without arguments it knows the frozen parameters only, which is enough to accept uploads. To measure and to
    combine it needs the sites' public key, which it gets once per run (see ``adopt``): what it sends to be opened
    must be rerandomised by fresh encryptions of zero (see ``ckks_mask``).

    Attributes:
        public: serialised context with the sites' public key, or None before ``adopt``.
    """

    public: bytes | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Name of the suite and its parameters, equal at both ends."""
        return "ckks/v1"

    @property
    def selects(self) -> bool:
        """No: it takes any weights."""
        return False

    @property
    def least_opened(self) -> int:
        """Fewest sites whose sum may be opened."""
        return 3

    def least_sites(self, tolerate: int, collude: int) -> int:
        """Fewest sites of a run: an honest majority."""
        return 2 * tolerate + 1

    def adopt(
        self, introduced: Mapping[Site, tuple[str, bytes]]
    ) -> tuple[CkksCoordinator, Mapping[Site, KeyMaterialError]]:
        """The coordinator with the key that most sites hold; ties go to the smaller fingerprint.

        Args:
            introduced: each site's ``key_id`` and ``public_key``.

        Returns:
            the coordinator, and the sites refused: ``wrong-key`` (another key than most), or a public key that is
            ``secret-key`` (it holds the secret too), ``no-public-key``, ``wrong-parameters``, ``evaluation-keys`` or
            ``unreadable``.
        """
        refused: dict[Site, KeyMaterialError] = {}
        holders: dict[tuple[str, bytes], list[Site]] = {}
        for site, (key_id, public_key) in introduced.items():
            try:
                holders.setdefault((key_id, check_public_context(public_key)), []).append(site)
            except KeyMaterialError as error:
                refused[site] = error
        if not holders:
            return self, refused
        common = min(holders, key=lambda key: (-len(holders[key]), key))
        foreign = KeyMaterialError("wrong-key", "it holds another key than most sites")
        refused |= {site: foreign for key, sites in holders.items() if key != common for site in sites}
        return CkksCoordinator(common[1]), refused

    def prepare(self, context: RoundContext, random_bytes: RandomBytes) -> tuple[RoundContext, CkksCoordinator]:
        """Nothing to prepare."""
        return context, self

    def gram_noise(self, context: RoundContext) -> float:
        """Standard deviation of the noise of every opened Gram entry: 2^-12 unit^2."""
        _, noise = gram_step(context)
        return noise * context.unit**2

    def noise_floor(self, context: RoundContext, weights: Mapping[Site, float]) -> float:
        """Squared norm that noise alone may add to an opened sum or take from the promised one.

        Returns:
            the noise energy of the sum, plus six standard deviations of ``w' G w`` from the noise of the Gram matrix.
        """
        magnitude = float(sum(abs(weight) for weight in weights.values()))
        _, sum_noise = sum_step(context)
        energy = context.dimension * (sum_noise * magnitude / slot_factor(context)) ** 2
        spread = self.gram_noise(context) * math.sqrt(2) * sum(weight * weight for weight in weights.values())
        return energy + 6 * spread

    def ratio_tolerance(self, context: RoundContext) -> float:
        """Largest honest ratio for ``check_opened``: 1.01 when the Gram is exact, else 1.08, scaled as 1 / sqrt(r)."""
        if ciphertext_count(context) == 1:
            return EXACT_TOLERANCE
        return 1.0 + (RATIO_TOLERANCE - 1.0) * math.sqrt(4 / context.sketches)

    def accept(self, context: RoundContext, site: Site, blocks: Blocks) -> CkksUpload:
        """Check all that can be checked without a key. The bytes are kept, not copied. About 1 ms per ciphertext.

        Raises:
            SiteFault: ``wrong-shape``, ``undecodable``, ``wrong-level``, ``wrong-scale``, ``plaintext``,
                ``repeated`` (one ciphertext twice, which encryption never gives).
        """
        check_context(context)
        seen: set[bytes] = set()
        loader = _working_context(parameters_only())
        number = 0
        try:
            for item in read_blocks(blocks, ciphertext_count(context)):
                load_ciphertext(loader, item, size=2, moduli=2)
                seen.add(sha256(item).digest())
                number += 1
        except MalformedError as error:
            raise SiteFault(site, error.code, f"ciphertext {number} of its upload: {error.message}") from error
        if len(seen) != number:
            raise SiteFault(site, "repeated", "its upload holds one ciphertext twice, which encryption never gives")
        return CkksUpload(blocks)

    def _public(self) -> bytes:
        if self.public is None:
            raise UsageError("the sites' public key is missing: call adopt() with what the sites introduce")
        return self.public

    def measure(
        self, context: RoundContext, uploads: Mapping[Site, CkksUpload], random_bytes: RandomBytes
    ) -> Dialogue[Measured]:
        """Open the Gram matrix of all uploads; asks all of their sites ``gram``.

        What was sealed under another key shows as an absurd norm, for a check of the Gram matrix to find.

        Every entry carries noise of standard deviation 2^-12 unit^2, so the matrix may be indefinite by that much.

        Returns (by the dialogue):
            rows for all uploads that could be multiplied. ``faults`` has ``vanishing`` (left out of the rows),
            ``silent``, ``wrong-shape`` and ``outvoted`` (the answer was bad, the row is there).

        Raises:
            UsageError: there is no upload, or no public key yet.
            RoundFailed: no answer has f + 1 sites behind it and more than any other.
        """
        check_context(context)
        if not uploads:
            raise UsageError("there is no upload")
        worker = _working_context(self._public())
        signs = draw_signs(random_bytes, sketch_count(context), ciphertext_count(context))
        voters = sorted(uploads)
        sites, products, faults = _products(worker, context, uploads, signs, random_bytes)
        if not sites:
            raise RoundFailed("no upload could be measured", dict(faults))
        pairs = list(combinations_with_replacement(sites, 2))
        question = pack_blocks(products[pair] for pair in pairs)
        del products
        answers = yield Ask("gram", dict.fromkeys(voters, question))
        del question
        verdict = _vote(voters, answers, len(pairs), "<i8", context.tolerate)
        step, _ = gram_step(context)
        gram = np.zeros((len(sites), len(sites)))
        gram[np.triu_indices(len(sites))] = verdict.value * (step * context.unit**2)
        return Measured(sites, gram + np.triu(gram, 1).T, {**verdict.faults, **faults})

    def combine(
        self,
        context: RoundContext,
        uploads: Mapping[Site, CkksUpload],
        weights: Mapping[Site, float],
        random_bytes: RandomBytes,
    ) -> Dialogue[Opened]:
        """Open one weighted sum; asks 2 f + 1 sites ``sum``, beginning with another one each round.

        Every site in ``uploads`` may be asked, so pass those only that are in good standing after ``measure``. The
        sum carries noise per parameter of ``2^-10 unit / sqrt(d)``, times the sum of the weights' magnitudes.

        Raises:
            UsageError: a weight is not finite, or its site has no upload, or all are zero; or no public key yet.
            RoundFailed: no answer has f + 1 sites behind it and more than any other, or the sum cancels.
        """
        check_context(context)
        check_weights(tuple(uploads), weights)
        worker = _working_context(self._public())
        magnitude = sum(abs(weight) for weight in weights.values())
        shares = {site: weights[site] / magnitude for site in sorted(weights)}
        # The library refuses to multiply by what it rounds to zero, and so small a share adds nothing.
        chosen = {site: share for site, share in shares.items() if abs(share) > _LEAST_SHARE}
        try:
            question = pack_blocks(_weighted(worker, context, uploads, chosen))
        except RuntimeError as error:
            raise RoundFailed("the ciphertexts of the chosen sites cancel each other; measure them first") from error
        order = _rotated(sorted(uploads), context.round)
        first, rest = order[: 2 * context.tolerate + 1], order[2 * context.tolerate + 1 :]
        answers = yield Ask("sum", dict.fromkeys(first, question))
        try:
            verdict = _vote(first, answers, context.dimension, "<i4", context.tolerate)
        except RoundFailed:
            if not rest:
                raise
            more = yield Ask("sum", dict.fromkeys(rest, question))
            verdict = _vote(order, {**answers, **more}, context.dimension, "<i4", context.tolerate)
        step, _ = sum_step(context)
        slots = verdict.value.astype(np.float64) * (step * magnitude / slot_factor(context))
        return Opened(flatten(context.digest(), slots), verdict.faults)


# Far below the noise of the sum, and far above 2^-62, which the encoding of weights rounds to zero.
_LEAST_SHARE = 2.0**-40


def _working_context(public: bytes) -> Context:
    """The context that the coordinator computes in: products are rescaled, levels are matched."""
    context = ts.context_from(public, 1)
    context.auto_rescale = True
    context.auto_mod_switch = True
    return context


def _rotated(sites: list[Site], by: int) -> list[Site]:
    start = by % len(sites)
    return sites[start:] + sites[:start]


def _sketch(worker: Context, upload: CkksUpload, signs: NDArray[np.int8]) -> list[CipherVector]:
    """``z^k = sum_b s_kb ct_b`` for all k, loading each ciphertext once (the first one r times)."""
    sketches: list[CipherVector] = []
    for number, item in enumerate(read_blocks(upload.blocks, signs.shape[1])):
        if number == 0:
            for sign in signs[:, 0]:
                first = load_ciphertext(worker, item, size=2, moduli=2)
                sketches.append(first if sign > 0 else first.neg_())
            continue
        vector = load_ciphertext(worker, item, size=2, moduli=2)
        for sketch, sign in zip(sketches, signs[:, number], strict=True):
            if sign > 0:
                sketch.add_(vector)
            else:
                sketch.sub_(vector)
    return sketches


def _products(
    worker: Context,
    context: RoundContext,
    uploads: Mapping[Site, CkksUpload],
    signs: NDArray[np.int8],
    random_bytes: RandomBytes,
) -> tuple[tuple[Site, ...], dict[tuple[Site, Site], bytes], dict[Site, SiteFault]]:
    """The masked products of all pairs of uploads that can be multiplied.

    Returns:
        the sites whose products are all there, sorted; the products, at least of all their pairs; and ``vanishing``
        for the others. Where a product of two sites vanishes both made it so: the second polynomial of an honest
        ciphertext is uniform, and nothing but zero times that is zero.

    Raises:
        RoundFailed: the library refuses for a reason that no site is known to cause.
    """
    faults: dict[Site, SiteFault] = {}
    sketches: dict[Site, list[CipherVector]] = {}
    products: dict[tuple[Site, Site], bytes] = {}
    try:
        probe = draw_probe(worker, context, random_bytes)
    except RuntimeError as error:
        raise RoundFailed(f"the library cannot encrypt with the sites' public key: {error}") from error
    for site in sorted(uploads):
        try:
            sketches[site] = _sketch(worker, uploads[site], signs)
        except RuntimeError as error:
            faults |= _vanishing(error, site)
    for i, j in combinations_with_replacement(tuple(sketches), 2):
        if i in faults or j in faults:
            continue
        try:
            total = _product(sketches[i], sketches[j])
            if i == j:
                *_, last = read_blocks(uploads[i].blocks, ciphertext_count(context))
                total.add_(probe.apply(worker, sketches[i], last))
            hide_all_but_sum(total, worker, random_bytes)
        except RuntimeError as error:
            faults |= _vanishing(error, i, j)
            continue
        products[i, j] = ciphertext_bytes(total)
    return tuple(site for site in sketches if site not in faults), products, faults


def _product(first: list[CipherVector], second: list[CipherVector]) -> CipherVector:
    """``sum_k a^k b^k``, rescaled."""
    # noise: 2^10.6 from rounding each rescaled product, on 2^40: 2^-30 of unit^2 after averaging
    total, *others = [a * b for a, b in zip(first, second, strict=True)]
    for other in others:
        total.add_(other)
    return total


def _vanishing(error: RuntimeError, *sites: Site) -> dict[Site, SiteFault]:
    """Blame ``sites`` for a result that the library refuses because its ciphertext hides nothing.

    Raises:
        RoundFailed: it refused for another reason.
    """
    if "transparent" not in str(error):
        raise RoundFailed(f"the library cannot compute on the uploads of {' and '.join(sites)}: {error}") from error
    return {site: SiteFault(site, "vanishing", "its ciphertexts were made to cancel") for site in sites}


def _weighted(
    worker: Context, context: RoundContext, uploads: Mapping[Site, CkksUpload], weights: Mapping[Site, float]
) -> Iterator[bytes]:
    """``sum_i w_i ct_ib`` for each b, rescaled; all uploads are read side by side, one ciphertext at a time."""
    streams = {site: read_blocks(uploads[site].blocks, ciphertext_count(context)) for site in weights}
    for _ in range(ciphertext_count(context)):
        total: CipherVector = None
        for site, weight in weights.items():
            # noise: 2^-41 per slot from rounding each term, 2^-40 |w| from encryption
            term = load_ciphertext(worker, next(streams[site]), size=2, moduli=2) * (weight * WEIGHT_LIFT)
            if total is None:
                total = term
            else:
                total.add_(term)
        yield ciphertext_bytes(total)


def _vote(voters: list[Site], answers: Mapping[Site, Blocks], count: int, dtype: str, tolerate: int) -> Verdict:
    """Count the answers of ``voters``; the verdict's faults include the silent and the unreadable."""
    ballot = read_ballots({site: answers[site] for site in voters if site in answers}, count, dtype)
    known = {
        **{s: SiteFault(s, "silent", "it gave no answer", proven=False) for s in voters if s not in answers},
        **ballot.faults,
    }
    verdict = count_votes(ballot.answers, tolerate, known)
    return Verdict(verdict.value, verdict.agreeing, {**known, **verdict.faults})
