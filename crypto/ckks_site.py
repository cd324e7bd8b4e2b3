"""The site's end of the suite ``ckks``: sealing an update, answering two questions about it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import tenseal as ts
from numpy.typing import NDArray

from quorsum.crypto.checks import check_context, check_update, squared_norm
from quorsum.crypto.ckks_keys import CkksSiteKey
from quorsum.crypto.ckks_parameters import (
    BATCH,
    CKKS_V1,
    GRAM_LABEL,
    MAX_NORM,
    SUM_LABEL,
    ciphertext_count,
    gram_step,
    sketch_count,
    slot_factor,
    sum_step,
)
from quorsum.crypto.ckks_wire import (
    Context,
    MalformedError,
    ciphertext_bytes,
    context_bytes,
    load_ciphertext,
    pack_blocks,
    read_blocks,
)
from quorsum.crypto.flatten import flatten
from quorsum.crypto.flooding import flooding_noise
from quorsum.crypto.randomness import tagged_hash
from quorsum.crypto.suite import Blocks, Keep, RandomBytes, RoundContext, Vector
from quorsum.errors import CoordinatorFault, UsageError

__all__ = ["CkksSite"]

_PHASES = ("gram", "sum")
# Nobody's honest update reaches the ends, so cutting there harms nobody, and a garbled one cannot raise.
_INT32 = np.iinfo(np.int32)
_INT64_BOUND = 2.0**62


@dataclass(frozen=True)
class CkksSite:
    """The site's end of ``ckks``.

    Attributes:
        key: the key that all sites share.
    """

    key: CkksSiteKey
    _context: Context = field(init=False, repr=False, compare=False)
    _public: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Load the key once; loading costs 5 ms and every call needs it."""
        context = self.key.load()
        object.__setattr__(self, "_context", context)
        object.__setattr__(self, "_public", context_bytes(context, public_key=True, secret_key=False))

    @property
    def name(self) -> str:
        """Name of the suite and its parameters, equal at both ends."""
        return "ckks/v1"

    @property
    def key_id(self) -> str:
        """Public fingerprint of the site key, 32 hexadecimal digits."""
        return self.key.key_id

    @property
    def public_key(self) -> bytes:
        """The public half of the site key as a serialised context (393 kB); the coordinator gets it once per run."""
        return self._public

    @property
    def keeps_upload(self) -> bool:
        """No."""
        return False

    def seal(
        self, context: RoundContext, update: Vector, random_bytes: RandomBytes, keep: Keep | None = None
    ) -> tuple[bytes, Blocks]:
        """Encrypt one update, shape (d,), float32 or float64, finite, at most ``MAX_NORM`` units long.

        The update is not clipped here, whatever ``context.clip`` says: the caller does that. ``random_bytes`` is not
        used: SEAL draws encryption randomness from its own generator, seeded by the operating system.

        Returns:
            the private state, and the blocks: the ciphertexts, 64 per block.

        Raises:
            UsageError: the update has the wrong shape or type, is not finite, or is so long that sums of
                it would wrap round the modulus.
        """
        check_update(context, update)
        with np.errstate(over="ignore"):
            norm = math.sqrt(squared_norm(update))
        if not norm <= MAX_NORM * context.unit:
            raise UsageError(
                f"the update is {norm / context.unit:.3g} units long and ckks can carry at most {MAX_NORM:g}: "
                f"clip it to the unit {context.unit:g}, or agree on a larger unit"
            )
        slots = flatten(context.digest(), update.astype(np.float64, copy=False)) * slot_factor(context)
        return _write_state(context, {}), pack_blocks(self._encrypt(slots))

    def reseal(
        self, context: RoundContext, state: bytes, kept: Blocks, random_bytes: RandomBytes
    ) -> tuple[bytes, Blocks]:
        """Refuse: an answer is noisy, and answers of several attempts would average the noise away.

        Raises:
            CoordinatorFault: always.
        """
        raise CoordinatorFault("one-attempt", "the suite ckks has one attempt at a round")

    def _encrypt(self, slots: NDArray[np.float64]) -> Iterator[bytes]:
        """Yield the ciphertexts of consecutive runs of 4096 slots, the last one padded with zeros."""
        for start in range(0, slots.size, CKKS_V1.slots):
            # Always all 4096: TenSEAL fills a shorter vector up with copies of itself, which would be measured too.
            run = np.zeros(CKKS_V1.slots)
            part = slots[start : start + CKKS_V1.slots]
            run[: part.size] = part
            yield ciphertext_bytes(ts.ckks_vector(self._context, run.tolist()))

    def answer(
        self,
        context: RoundContext,
        state: bytes,
        phase: str,
        question: Blocks,
        random_bytes: RandomBytes,
        upload: Blocks = (),
    ) -> tuple[bytes, Blocks]:
        """Answer the question ``gram`` or ``sum``, each once per sealed update.

        Asked the very same question again, the site gives the very same answer. Nothing in an answer is random:
        its noise is derived from the flooding secret, the round and the question.

        Returns:
            the new state, and one block: int64 grid steps per pair (``gram``), or int32 ones per parameter (``sum``).

        Raises:
            UsageError: the state is not one of this round.
            CoordinatorFault: ``unknown-phase``, ``asked-twice`` (another question than before), or what is wrong
                with the question: ``wrong-shape``, ``undecodable``, ``wrong-level``, ``wrong-scale``, ``plaintext``.
        """
        check_context(context)
        asked = _read_state(context, state)
        if phase not in _PHASES:
            raise CoordinatorFault(
                "unknown-phase", f"the suite ckks has the phases gram and sum, but {phase!r} was asked"
            )
        digest = tagged_hash("ckks-question", phase.encode(), *question)
        if asked.get(phase, digest.hex()) != digest.hex():
            raise CoordinatorFault(
                "asked-twice", f"the coordinator asks a second, different question of the phase {phase}"
            )
        try:
            answer = self._gram(context, question, digest) if phase == "gram" else self._sum(context, question, digest)
        except MalformedError as error:
            raise CoordinatorFault(error.code, f"its question of the phase {phase}: {error.message}") from error
        return _write_state(context, {**asked, phase: digest.hex()}), (answer,)

    def _decrypt(self, data: bytes, *, size: int) -> NDArray[np.float64]:
        vector = load_ciphertext(self._context, data, size=size, moduli=1)
        return np.array(vector.decrypt())

    def _gram(self, context: RoundContext, question: Blocks, digest: bytes) -> bytes:
        """One entry ``<x_i, x_j> / C^2`` per pair, averaged over the sketches, in noisy grid steps."""
        pairs = _pairs_in(question, len(context.sites))
        factor = GRAM_LABEL / sketch_count(context)
        values = np.array([self._decrypt(item, size=3).mean() * factor for item in read_blocks(question, pairs)])
        step, deviation = gram_step(context)
        noise = flooding_noise(self.key.flooding, context.digest(), "gram", digest, 0, pairs)
        steps = np.rint((values + deviation * noise) / step)
        return np.clip(steps, -_INT64_BOUND, _INT64_BOUND).astype("<i8").tobytes()

    def _sum(self, context: RoundContext, question: Blocks, digest: bytes) -> bytes:
        """The slots of the sum in noisy grid steps, the padding cut off."""
        step, deviation = sum_step(context)
        round_digest = context.digest()
        out = np.empty(context.dimension, dtype="<i4")
        for number, item in enumerate(read_blocks(question, ciphertext_count(context))):
            part = out[number * CKKS_V1.slots : (number + 1) * CKKS_V1.slots]
            values = self._decrypt(item, size=2)[: part.size] * SUM_LABEL
            noise = flooding_noise(self.key.flooding, round_digest, "sum", digest, number, part.size)
            part[:] = np.clip(np.rint((values + deviation * noise) / step), _INT32.min, _INT32.max)
        return out.tobytes()


def _pairs_in(question: Blocks, most: int) -> int:
    """Number of pairs that a Gram question is about, found without trusting it.

    Raises:
        MalformedError: it is not m (m + 1) / 2 for any m from 1 to ``most``.
    """
    for rows in range(1, most + 1):
        pairs = rows * (rows + 1) // 2
        if -(-pairs // BATCH) == len(question):
            try:
                for _ in read_blocks(question, pairs):
                    pass
            except MalformedError:
                continue
            return pairs
    raise MalformedError("wrong-shape", f"not the products of all pairs of at most {most} sites")


def _write_state(context: RoundContext, asked: Mapping[str, str]) -> bytes:
    return json.dumps({"suite": "ckks/v1", "context": context.digest().hex(), "asked": asked}, sort_keys=True).encode()


def _read_state(context: RoundContext, state: bytes) -> dict[str, str]:
    try:
        read = json.loads(state)
        suite, digest, asked = read["suite"], read["context"], dict(read["asked"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("this is not a state that seal of the suite ckks returned") from error
    if suite != "ckks/v1" or digest != context.digest().hex():
        raise UsageError("this state belongs to another round, attempt or suite; keep one state per context")
    return asked
