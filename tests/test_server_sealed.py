"""Sealed rounds over the whole stack: what the coordinator gets to see, and what lying sites achieve."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from federation import DIMENSION, context, honest_update, learning_app, model
from flwr.app import ConfigRecord, Context, Message, RecordDict

from quorsum import messages
from quorsum.client import seal
from quorsum.crypto import CkksCoordinator, CkksSite, generate_site_key
from quorsum.crypto.ckks_wire import read_blocks
from quorsum.crypto.flatten import flatten
from quorsum.crypto.suite import Blocks
from quorsum.server import QuorumResult, QuorumStrategy
from quorsum.simulation.grid import Handler, LocalGrid

KEY = generate_site_key(os.urandom)
SITE, OTHER = CkksSite(KEY), CkksSite(generate_site_key(os.urandom))
HONEST = learning_app([seal(SITE)])
BAD = "site-04"


class Listening(LocalGrid):
    """Keeps everything that the coordinator receives."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heard: list[Message] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        self.heard += replies
        return replies


def run(bad: Any = HONEST, *, rounds: int = 1, grid: type[LocalGrid] = LocalGrid, **options: Any) -> Any:
    with grid([bad if partition == 3 else HONEST for partition in range(7)]) as running:
        strategy = QuorumStrategy(CkksCoordinator(), **({"tolerate": 1, "fraction_evaluate": 0.0} | options))
        result = strategy.start(running, model(), num_rounds=rounds, timeout=20)
    return (result, running) if grid is Listening else result


def changing(phase: str, change: Callable[[Blocks], Blocks | None]) -> Handler:
    """A site that is honest but for the blocks of one phase ("submission" is the upload); None is silence."""

    def handle(message: Message, context: Context) -> Message | None:
        reply = HONEST(message, context)
        header, blocks = messages.unpack(reply.content)
        if phase not in (header.kind, getattr(header, "phase", "")):
            return reply
        changed = change(blocks)
        return None if changed is None else Message(messages.pack(header, changed), reply_to=message)

    return handle


def moved(result: QuorumResult) -> np.ndarray:
    return np.concatenate([result.arrays[name].numpy().ravel() for name in result.arrays])


def mean_of(partitions: Iterable[int]) -> np.ndarray:
    return np.mean([honest_update(p, 1) for p in partitions], axis=0)


def received_bytes(content: RecordDict) -> bytes:
    """Every byte of a message: headers, names and data."""
    parts: list[bytes] = []
    for name, record in content.items():
        parts.append(name.encode())
        if isinstance(record, ConfigRecord):
            parts += [f"{key}={value}".encode() for key, value in record.items()]
        else:
            for key, value in record.items():
                parts.append(key.encode())
                parts.append(value.data if hasattr(value, "data") else repr(value).encode())
    return b"|".join(parts)


def forms_of(update: np.ndarray) -> list[bytes]:
    """How an update would look if it were there in the clear: 8 numbers in a row, in any usual number format."""
    return [
        update[start : start + 2].astype(kind).tobytes()
        for kind in ("<f4", "<f8", ">f4", ">f8")
        for start in range(DIMENSION - 2)
    ]


def test_coordinator_receives_ciphertext_and_opened_numbers_and_nothing_else() -> None:
    result, grid = run(rounds=2, grid=Listening)
    assert all(record.failed is None for record in result.rounds)
    kinds: dict[str, int] = {}
    everything = b""
    for message in grid.heard:
        header, blocks = messages.unpack(message.content)
        kind = getattr(header, "phase", header.kind)
        kinds[kind] = kinds.get(kind, 0) + 1
        assert set(message.content) <= {messages.HEADER, messages.BLOCKS}
        everything += received_bytes(message.content)
        match kind:
            case "introduction":
                assert blocks == (SITE.public_key,)
            case "submission":
                assert header.metrics == {}
                (ciphertext,) = read_blocks(blocks, 1)
                assert 262_144 <= len(ciphertext) < 262_144 + 1024
                # A ciphertext looks like noise: nothing in it can be compressed but the top bits of its residues.
                assert len(zlib.compress(ciphertext)) > 0.9 * len(ciphertext)
            case "gram":
                assert [len(block) for block in blocks] == [8 * 28]
            case "sum":
                assert [len(block) for block in blocks] == [4 * DIMENSION]
            case _:
                raise AssertionError(kind)
    assert kinds == {"introduction": 7, "submission": 14, "gram": 14, "sum": 6}
    for partition in range(7):
        for number in (1, 2):
            assert not any(form in everything for form in forms_of(honest_update(partition, number)))
    secret = KEY.load().serialize(
        save_public_key=False, save_secret_key=True, save_galois_keys=False, save_relin_keys=False
    )
    assert not any(secret[at : at + 16] in everything for at in range(256, len(secret) - 256, 500))
    assert KEY.flooding not in everything
    assert KEY.to_bytes() not in everything


def test_the_listener_would_have_noticed() -> None:
    """The same inspection finds an update that is sent in the clear."""
    update = honest_update(3, 1)
    content = messages.pack(messages.Answer(context="0" * 64, phase="gram"), (update.tobytes(),))
    assert any(form in received_bytes(content) for form in forms_of(update))


def test_sealed_mean_is_the_mean() -> None:
    result = run(rule="mean", tolerate=0)
    unit = result.rounds[0].unit
    np.testing.assert_allclose(moved(result), mean_of(range(7)), atol=8 * 2**-10 * unit / DIMENSION**0.5)


PLAINTEXT = np.ones(DIMENSION, "<f4").tobytes()
UPLOADS: dict[str, tuple[Callable[[Blocks], Blocks], set[str]]] = {
    "plaintext": (lambda blocks: (PLAINTEXT,), {"wrong-shape", "undecodable"}),
    "framed plaintext": (lambda blocks: (len(PLAINTEXT).to_bytes(4, "little") + PLAINTEXT,), {"undecodable"}),
    "cut": (lambda blocks: (blocks[0][:-1],), {"wrong-shape"}),
    "bits flipped": (
        lambda blocks: (blocks[0][:50] + bytes(b ^ 255 for b in blocks[0][50:100]) + blocks[0][100:],),
        {"undecodable"},
    ),
    "another key": (
        lambda blocks: OTHER.seal(context(), np.ones(DIMENSION), os.urandom)[1],
        {"norm-bound", "negative-norm"},
    ),
    "secret key": (lambda blocks: (KEY.to_bytes(),), {"wrong-shape"}),
}


@pytest.mark.parametrize("name", UPLOADS)
def test_upload_that_is_no_honest_ciphertext_costs_its_sender_the_round(name: str) -> None:
    change, codes = UPLOADS[name]
    result = run(changing("submission", change), rule="multi-krum")
    (record,) = result.rounds
    assert record.failed is None
    assert record.codes.pop(BAD) in codes
    assert set(record.codes.values()) <= {"rule"}
    kept = [int(site[-2:]) - 1 for site in record.accepted]
    np.testing.assert_allclose(moved(result), mean_of(kept), atol=0.02)


def one_entry(dtype: str, by: int) -> Callable[[Blocks], Blocks]:
    def change(blocks: Blocks) -> Blocks:
        values = np.frombuffer(blocks[0], dtype).copy()
        values[-1] += by
        return (values.tobytes(),)

    return change


LIES = {
    "gram, one entry": ("gram", one_entry("<i8", 1000)),
    "gram, all zero": ("gram", lambda blocks: (bytes(len(blocks[0])),)),
    "gram, wrong length": ("gram", lambda blocks: (blocks[0][:-8],)),
    "gram, nothing": ("gram", lambda blocks: ()),
    "gram, silence": ("gram", lambda blocks: None),
    "sum, one entry": ("sum", one_entry("<i4", 1000)),
    "sum, wrong length": ("sum", lambda blocks: (blocks[0] * 2,)),
    "sum, silence": ("sum", lambda blocks: None),
}


@pytest.mark.parametrize("lie", LIES)
def test_lie_while_opening_is_outvoted_and_its_teller_named(lie: str) -> None:
    phase, change = LIES[lie]
    with LocalGrid([changing(phase, change) if p == 3 else HONEST for p in range(7)]) as grid:
        strategy = QuorumStrategy(CkksCoordinator(), tolerate=1, rule="mean", fraction_evaluate=0.0)
        strategy.tolerate = 1
        result = strategy.start(grid, model(), num_rounds=3, timeout=1.5)
    assert all(record.failed is None for record in result.rounds)
    honest = [np.mean([honest_update(p, n) for p in range(7)], axis=0) for n in (1, 2, 3)]
    np.testing.assert_allclose(moved(result), np.sum(honest, axis=0), atol=0.1)
    # The Gram matrix is opened by all; the openers of the sum change, and in these rounds it is one of them.
    assert all(BAD in str(record.reasons) + str(record.notes) for record in result.rounds)


def test_key_of_another_federation_is_left_out_at_the_roster() -> None:
    result = run(learning_app([seal(OTHER)]))
    assert BAD not in result.rounds[0].invited
    assert len(result.rounds[0].invited) == 6


def test_site_that_introduces_itself_with_the_secret_key_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    result = run(changing("introduction", lambda blocks: (KEY.context,)))
    assert BAD not in result.rounds[0].invited
    assert "could read every update" in caplog.text


def test_coordinator_that_asks_twice_gets_one_answer() -> None:
    """With a second, different question about the same round a coordinator would open something else as well."""
    refusals: list[str] = []

    def twice(message: Message, node: Context) -> Message | None:
        reply = HONEST(message, node)
        header, blocks = messages.unpack(message.content)
        if isinstance(header, messages.Question) and header.phase == "sum":
            other = Message(messages.pack(header, (blocks[0][::-1],)), 2, "train")
            fault, _ = messages.unpack(HONEST(other, node).content)
            assert isinstance(fault, messages.Fault)
            refusals.append(fault.code)
        return reply

    run(twice, rounds=3)
    assert refusals == ["asked-twice"] * 3


def test_flattening_is_undone() -> None:
    """An update with one common sign survives the round with its sign (the flattening vector is undone)."""
    signs = flatten(context().digest(), np.ones(DIMENSION))
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert (moved(run()) > 0.3).all()
