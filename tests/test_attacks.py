"""What a malicious site, or a coordinator that strays, must not achieve: each attack is played on the real code."""

from __future__ import annotations

import json
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenseal as ts
from crypto_federation import Federation, context_for, shared_site, updates_for
from federation import DIMENSION, context, honest_update, learning_app, model, send, train_content
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from tenseal import sealapi

from quorsum import arrays, messages
from quorsum.client import seal
from quorsum.crypto import CKKS_V1, CkksCoordinator, CkksSite, PlainCoordinator, PlainSite
from quorsum.crypto.ckks_keys import check_public_context
from quorsum.crypto.ckks_parameters import GRAM_LABEL, slot_factor
from quorsum.crypto.ckks_wire import ciphertext_bytes, load_ciphertext, pack_blocks, read_blocks
from quorsum.crypto.flatten import flatten
from quorsum.crypto.suite import Blocks
from quorsum.errors import KeyMaterialError
from quorsum.server import QuorumResult, QuorumStrategy
from quorsum.simulation.grid import Handler, LocalGrid

SITE: CkksSite = shared_site()
KEYED = SITE.key.load()
SEALED = learning_app([seal(SITE)])
CLEAR = learning_app([seal(PlainSite())])
BAD = "site-04"
Tamper = Callable[[Message, Message], Message | None]


def run(
    apps: list[Any], *, suite: str = "plain", rounds: int = 1, timeout: float = 20.0, start: float = 0.0, **options: Any
) -> Any:
    coordinator = PlainCoordinator() if suite == "plain" else CkksCoordinator()
    with LocalGrid(apps, workers=8) as grid:
        strategy = QuorumStrategy(coordinator, **({"tolerate": 1, "fraction_evaluate": 0.0} | options))
        return strategy.start(grid, model(start), num_rounds=rounds, timeout=timeout)


def kind_of(message: Message) -> str:
    if not messages.has_header(message.content):
        return "plain"
    header = messages.unpack(message.content)[0]
    return getattr(header, "phase", header.kind)


def tampering(honest: Any, kind: str, change: Tamper) -> Handler:
    """A site that is honest but for its replies to one kind of message ("train", "gram", "hello", "plain", ...)."""

    def handle(message: Message, node: Context) -> Message | None:
        reply = honest(message, node)
        return change(message, reply) if kind_of(message) == kind else reply

    return handle


def one_bad(honest: Any, bad: Any, sites: int = 7) -> list[Any]:
    return [bad if partition == 3 else honest for partition in range(sites)]


def moved(result: QuorumResult) -> np.ndarray:
    return np.concatenate([result.arrays[name].numpy().ravel() for name in result.arrays])


def upload_of(blocks: Blocks) -> Tamper:
    def change(message: Message, reply: Message) -> Message:
        header, _ = messages.unpack(reply.content)
        return Message(messages.pack(header, blocks), reply_to=message)

    return change


def poisoned(honest: Any, learn: Callable[[int, int], np.ndarray]) -> ClientApp:
    return learning_app([seal(SITE if honest is SEALED else PlainSite())], learn)


# --- what one site can learn about another one (ckks) ---


def written(ciphertext: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "ciphertext")
        ciphertext.save(path)
        return Path(path).read_bytes()


def seal_complex(slots: np.ndarray) -> bytes:
    """A perfectly formed ciphertext of numbers that are not real; the library's own encoder makes it."""
    library = KEYED.seal_context().data
    plain, cipher = sealapi.Plaintext(), sealapi.Ciphertext()
    sealapi.CKKSEncoder(library).encode([complex(v) for v in slots], CKKS_V1.scale, plain)
    sealapi.Encryptor(library, KEYED.public_key().data).encrypt(plain, cipher)
    return written(cipher)


def decrypt_complex(item: bytes) -> np.ndarray:
    library = KEYED.seal_context().data
    plain = sealapi.Plaintext()
    cipher = load_ciphertext(KEYED, item, size=3, moduli=1).ciphertext()[0]
    sealapi.Decryptor(library, KEYED.secret_key().data).decrypt(cipher, plain)
    return np.array(sealapi.CKKSEncoder(library).decode_complex(plain)) * GRAM_LABEL


def test_site_that_seals_imaginary_numbers_reads_no_other_update_out_of_the_products() -> None:
    """Products with i have their slots on the imaginary axis; a mask of real slots leaves those bare."""
    about = context_for(4000)
    federation = Federation(about, updates_for(about))
    uploads = federation.upload()
    crafted = pack_blocks([seal_complex(np.full(CKKS_V1.slots, 1j))])
    uploads["s0"] = federation.coordinator.accept(about, "s0", crafted)
    question = next(federation.coordinator.measure(about, uploads, os.urandom)).questions["s0"]
    # Pairs in order: (s0, s0), (s0, s1), ...
    seen = decrypt_complex(list(read_blocks(question, 6))[1]).imag[: about.dimension]
    guess = flatten(about.digest(), seen) / slot_factor(about)
    assert abs(np.corrcoef(guess, federation.updates["s1"])[0, 1]) < 0.1


# --- what one site can do to a round (ckks) ---


def bare_ciphertext(first: np.ndarray, second: np.ndarray) -> bytes:
    """A ciphertext with these two polynomials (each given for both moduli), as the library writes it uncompressed."""
    reference = written(ts.ckks_vector(KEYED, [1.0] * CKKS_V1.slots).ciphertext()[0])
    identifier = reference[28:60]
    numbers = np.concatenate([first, second]).astype("<u8")

    def framed(body: bytes) -> bytes:
        return reference[:5] + b"\0\0\0" + struct.pack("<Q", 16 + len(body)) + body

    array = framed(struct.pack("<Q", numbers.size) + numbers.tobytes())
    return framed(identifier + b"\1" + struct.pack("<QQQdQ", 2, CKKS_V1.degree, 2, CKKS_V1.scale, 1) + array)


def test_upload_whose_square_vanishes_does_not_end_the_run() -> None:
    """The square of (0, 1) is (0, 0, 1), and 1 divided by q2 is 0: the library refuses the result."""
    size = 2 * CKKS_V1.degree
    crafted = pack_blocks([bare_ciphertext(np.zeros(size), np.ones(size))])
    bad = tampering(SEALED, "train", upload_of(crafted))
    (record,) = run(one_bad(SEALED, bad), suite="ckks").rounds
    assert record.failed is None
    assert BAD in record.rejected


def test_two_uploads_whose_product_vanishes_do_not_end_the_run() -> None:
    """Two sites share out the places of the transform: each upload is sound, their product is zero everywhere."""
    size = 2 * CKKS_V1.degree
    places = np.arange(size) % 2 == 0

    def half(chosen: np.ndarray) -> Handler:
        numbers = np.where(chosen, 2**40 + 7, 0)
        return tampering(SEALED, "train", upload_of(pack_blocks([bare_ciphertext(numbers, numbers)])))

    apps = [half(places), half(~places), *[SEALED] * 7]
    (record,) = run(apps, suite="ckks", tolerate=2).rounds
    assert record.failed is None
    assert {"site-01", "site-02"} <= set(record.rejected)


def test_update_whose_norm_wraps_round_does_not_cost_everybody_every_round() -> None:
    """One site that looks like the others in the Gram matrix and is longer: its squared norm wraps round the modulus.

    What makes it wrap stands in the padding, where nobody else has anything and what is opened is cut off.
    """

    def crafted(message: Message, reply: Message) -> Message | None:
        header, _ = messages.unpack(message.content)
        assert isinstance(header, messages.Train)
        about = header.context.round_context()
        number = about.round
        others = np.stack([honest_update(p, number) for p in range(7) if p != 3]).astype(np.float64)
        honest = others.mean(axis=0)
        # At right angles to all others; in a model of a million parameters almost every direction is.
        aside = np.linalg.svd(others)[2][-1]
        update = honest + 5 * aside
        slots = np.zeros(CKKS_V1.slots)
        slots[:DIMENSION] = flatten(about.digest(), update) * slot_factor(about)
        # The sum of squares that is measured is (sum of slots squared) / 4096 in units of C^2, modulo 2^20.
        honest_square = float(honest @ honest) * 1.003 / about.unit**2
        missing = (2.0**20 + honest_square) * CKKS_V1.slots - float(slots @ slots)
        slots[DIMENSION:] = np.sqrt(missing / (CKKS_V1.slots - DIMENSION))
        blocks = pack_blocks([seal_complex(slots)])
        return upload_of(blocks)(message, reply)

    bad = tampering(SEALED, "train", crafted)
    result = run(one_bad(SEALED, bad), suite="ckks", rounds=3, rule="multi-krum")
    assert [record.failed for record in result.rounds][1:] == [None, None], "one lost round may be the price, not all"


def test_honest_sites_are_not_accused_of_the_noise_of_opening() -> None:
    """The first unit is the norm of the model; small, similar updates drown in noise that is sized by the unit."""
    result = run([SEALED] * 7, suite="ckks", rounds=2, start=10.0, rule="multi-krum")
    for record in result.rounds:
        assert record.failed is None
        assert not set(record.codes.values()) & {"inconsistent", "negative-norm"}


def test_site_that_has_nothing_to_add_is_not_accused_of_a_negative_norm() -> None:
    def learn(partition: int, number: int) -> np.ndarray:
        return honest_update(partition, number) * (0 if partition in (2, 3, 4) else 1)

    result = run([poisoned(SEALED, learn)] * 9, suite="ckks", rounds=3, rule="mean", tolerate=0)
    codes = {code for record in result.rounds for code in record.codes.values()}
    assert "negative-norm" not in codes


def fields_of(data: bytes) -> list[tuple[int, bytes]]:
    """The fields of a protocol buffer that holds numbers of fixed size and byte strings only."""
    found, at = [], 0
    while at < len(data):
        tag, at = data[at], at + 1
        if tag & 7 == 1:
            length = 8
        else:
            length = shift = 0
            while True:
                byte, at = data[at], at + 1
                length |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
        found.append((tag, data[at : at + length]))
        at += length
    return found


def field_with(tag: int, data: bytes) -> bytes:
    length, out = len(data), bytearray([tag])
    while length >= 128:
        out.append(length & 127 | 128)
        length >>= 7
    return bytes(out) + bytes([length]) + data


def swollen_public_key(keys: int) -> bytes:
    """A public key with rotation keys beside it that hold nothing but zeros: small on the wire, large in memory."""
    (_, parameters), (_, public) = fields_of(SITE.public_key)
    library = KEYED.seal_context().data
    head = written(ts.ckks_vector(KEYED, [1.0]).ciphertext()[0])[:5]
    identifier = struct.pack("<4Q", *library.key_parms_id())

    def framed(body: bytes) -> bytes:
        return head + b"\0\0\0" + struct.pack("<Q", 16 + len(body)) + body

    count = 2 * 3 * CKKS_V1.degree
    array = framed(struct.pack("<Q", count) + bytes(8 * count))
    key = framed(identifier + b"\1" + struct.pack("<QQQdQ", 2, CKKS_V1.degree, 3, 1.0, 1) + array)
    filled = struct.pack("<Q", 2) + key * 2
    body = identifier + struct.pack("<Q", CKKS_V1.degree) + filled * keys + bytes(8 * (CKKS_V1.degree - keys))
    small = zlib.compress(body, 9)
    rotation = head + b"\1\0\0" + struct.pack("<Q", 16 + len(small)) + small
    return field_with(0x0A, parameters) + field_with(0x12, public + field_with(0x2A, rotation))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux tells it")
def test_small_public_key_takes_no_large_memory_at_the_coordinator() -> None:
    """With all 8192 keys it would be 6 GB out of less than 10 MB, before anybody is refused."""

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) // 1024

    swollen = swollen_public_key(300)
    assert len(swollen) < 2**20
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    with pytest.raises(KeyMaterialError):
        check_public_context(swollen)
    assert peak() - before < 50


# --- who is counted off f ---


def test_honest_site_that_is_silent_while_opening_is_not_counted_off() -> None:
    """One crash of an honest site must not buy the malicious one a rule that tolerates nobody."""

    def learn(partition: int, number: int) -> np.ndarray:
        return honest_update(partition, number) * (-8 if partition == 5 else 1)

    app = poisoned(SEALED, learn)
    silent = tampering(app, "gram", lambda message, reply: None)
    result = run(one_bad(app, silent), suite="ckks", rule="multi-krum", timeout=2.0)
    (record,) = result.rounds
    assert "site-06" not in record.accepted


def test_site_that_is_silent_while_opening_costs_nobody_the_round_at_the_least_number_of_sites() -> None:
    """Its update is there and the others open its row as well: silence here is no reason to drop the row."""
    silent = tampering(SEALED, "gram", lambda message, reply: None)
    (record,) = run(one_bad(SEALED, silent, sites=5), suite="ckks", timeout=1.5).rounds
    assert record.failed is None


def test_malicious_minority_does_not_win_by_making_the_majority_look_proven() -> None:
    """More proven faults than f contradict the assumption that at most f sites lie: nothing may be opened."""

    def learn(partition: int, number: int) -> np.ndarray:
        return np.full(DIMENSION, -0.2, np.float32) if partition < 2 else honest_update(partition, number) * 100

    result = run([poisoned(CLEAR, learn)] * 5, rule="geometric-median", tolerate=2)
    (record,) = result.rounds
    assert set(record.accepted) != {"site-01", "site-02"}
    assert (moved(result) >= 0).all()


# --- what a reply may contain ---


def test_one_site_has_one_vote_on_the_quality_of_the_model() -> None:
    def stuffed(message: Message, reply: Message) -> Message:
        content = RecordDict()
        for k in range(50):
            content[f"metrics-{k}"] = MetricRecord({"accuracy": 0.01})
        return Message(content, reply_to=message)

    result = run(one_bad(CLEAR, tampering(CLEAR, "plain", stuffed)), fraction_evaluate=1.0)
    assert result.rounds[0].metrics["accuracy"] >= 0.5


def test_a_measure_that_one_site_made_up_is_not_reported_as_the_federations() -> None:
    def invented(message: Message, reply: Message) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"accuracy": 0.8, "auc": 0.999})}), reply_to=message)

    result = run(one_bad(CLEAR, tampering(CLEAR, "plain", invented)), fraction_evaluate=1.0)
    assert "auc" not in result.rounds[0].metrics


def test_reference_that_has_nothing_to_add_fails_the_round_and_not_the_run() -> None:
    def learn(partition: int, number: int) -> np.ndarray:
        return honest_update(partition, number) * (0 if (partition, number) == (1, 1) else 1)

    result = run([poisoned(CLEAR, learn)] * 7, rule="fltrust", reference="site-02", rounds=2)
    assert [record.failed is None for record in result.rounds] == [False, True]


def test_sites_do_not_choose_by_their_names_who_evaluates() -> None:
    asked: set[int] = set()

    def noting(message: Message, node: Context) -> Message | None:
        if kind_of(message) == "plain":
            asked.add(int(node.node_config["partition-id"]))
        return CLEAR(message, node)

    run([noting] * 9, fraction_evaluate=0.3, rounds=4)
    assert len(asked) > 3, "the same three names that sort first were asked in every round"


def test_reason_of_a_refusal_is_short_and_printable_whatever_the_site_sends() -> None:
    def change(message: Message, reply: Message) -> Message:
        header, blocks = messages.unpack(reply.content)
        key = "\\n[quorsum] round 1: accuracy 1" * 20_000
        text = header.model_dump_json().replace('"metrics":{}', f'"metrics":{{"{key}":"x"}}')
        content = messages.pack(header, blocks)
        content[messages.HEADER] = ConfigRecord({"header": text})
        return Message(content, reply_to=message)

    (record,) = run(one_bad(CLEAR, tampering(CLEAR, "train", change))).rounds
    assert BAD in record.rejected
    assert len(record.reasons[BAD]) < 3000
    assert record.reasons[BAD].isprintable()


def test_own_words_of_a_site_do_not_start_a_line_of_the_coordinators_log() -> None:
    fault = messages.Fault(code="x", message="gone\n[quorsum] round 1: accuracy 1; left out: nobody")

    def change(message: Message, reply: Message) -> Message:
        return Message(messages.pack(fault), reply_to=message)

    (record,) = run(one_bad(CLEAR, tampering(CLEAR, "train", change))).rounds
    assert record.reasons[BAD].isprintable()


@pytest.mark.parametrize("garbled", ["submission", "plain"])
def test_reply_that_flower_cannot_decode_costs_its_sender_the_round_and_not_the_run(garbled: str) -> None:
    class Garbled(LocalGrid):
        """As Flower's own grid does, raises what comes up while a reply is put together from its objects."""

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            for reply in replies:
                if reply.metadata.src_node_id == 5 and kind_of(reply) == garbled:
                    Array.inflate(b"Array 2\x00[]")
            return replies

    with Garbled([CLEAR] * 7) as grid:
        strategy = QuorumStrategy(PlainCoordinator(), tolerate=1)
        (record,) = strategy.start(grid, model(), num_rounds=1, timeout=3).rounds
    assert record.failed is None
    if garbled == "submission":
        assert BAD in record.rejected


def test_reply_within_the_time_is_not_called_late() -> None:
    """The last look for replies comes when the time is up, not up to a quarter of a second before."""

    def slow(message: Message, reply: Message) -> Message:
        time.sleep(0.9)
        return reply

    (record,) = run(one_bad(CLEAR, tampering(CLEAR, "train", slow)), timeout=1.0).rounds
    assert record.codes.get(BAD) != "late"


def test_long_names_do_not_end_the_run() -> None:
    """Two sites with one long name: what tells them apart must still be a name."""

    def named(message: Message, reply: Message) -> Message:
        header, blocks = messages.unpack(reply.content)
        return Message(messages.pack(header.model_copy(update={"site": "x" * 128}), blocks), reply_to=message)

    bad = tampering(CLEAR, "hello", named)
    result = run([bad if p < 2 else CLEAR for p in range(9)], tolerate=2)
    assert result.rounds[0].failed is None


# --- what leaves a site ---


def fault_of(reply: Message) -> messages.Fault:
    assert reply.has_content(), f"an exception left the site: {reply.error.reason}"
    message, _ = messages.unpack(reply.content)
    assert isinstance(message, messages.Fault)
    return message


def padded_model(declared: int) -> ArrayRecord:
    array = Array(np.zeros(2, np.float32))
    array.shape = (declared,)
    return ArrayRecord({"weight": array})


def padded_content(declared: int) -> RecordDict:
    given = padded_model(declared)
    about = messages.Context.of(context(dimension=max(1, declared), model=arrays.fingerprint(given)))
    train = messages.Train(site="site-01", suite="plain/v1", context=about)
    return messages.pack(train, beside=RecordDict({"arrays": given}))


def test_model_that_declares_more_numbers_than_it_has_gets_no_memory_of_the_site() -> None:
    """The rest of the update would be what the site's process had in that memory before."""
    declared = 300_000
    app = ClientApp(mods=[seal(PlainSite())])

    @app.train()
    def train(message: Message, node: Context) -> Message:
        patients = np.full(declared, 4711.0, np.float32)
        del patients
        values = message.content.array_records["arrays"]["weight"].numpy()
        return Message(RecordDict({"arrays": ArrayRecord({"weight": Array(values + 1)})}), reply_to=message)

    with LocalGrid([app]) as grid:
        reply = send(grid, padded_content(declared))
    leaked = b"".join(messages.unpack(reply.content)[1]) if reply.has_content() else b""
    assert np.float32(4711.0).tobytes() not in leaked
    fault_of(reply)


@pytest.mark.parametrize("declared", [1, -1, 2**40])
def test_model_that_declares_another_shape_than_it_has_is_refused(declared: int) -> None:
    app = ClientApp(mods=[seal(PlainSite())])

    @app.train()
    def train(message: Message, node: Context) -> Message:
        values = message.content.array_records["arrays"]["weight"].numpy()
        return Message(RecordDict({"arrays": ArrayRecord({"weight": Array(values + 1)})}), reply_to=message)

    with LocalGrid([app]) as grid:
        fault_of(send(grid, padded_content(declared)))


def returning(make: Callable[[], ArrayRecord], *, metrics: dict[str, Any] | None = None) -> ClientApp:
    app = ClientApp(mods=[seal(PlainSite())])

    @app.train()
    def train(message: Message, node: Context) -> Message:
        content = RecordDict({"arrays": make(), "metrics": MetricRecord(metrics or {"num-examples": 1})})
        return Message(content, reply_to=message)

    return app


def not_an_array() -> ArrayRecord:
    return ArrayRecord(
        {"weight": Array("float32", (5, 2), "numpy.ndarray", b"patient 4711"), "bias": Array(np.ones(2))}
    )


WRONG: dict[str, Callable[[], ArrayRecord]] = {
    "names": lambda: ArrayRecord({"patient 4711": Array(np.ones(2, np.float32))}),
    "many names": lambda: ArrayRecord({f"patient 4711 {k}": Array(np.ones(1, np.float32)) for k in range(200)}),
    "shape": lambda: ArrayRecord({"weight": Array(np.ones((4711, 1))), "bias": Array(np.ones(2))}),
    "type": lambda: ArrayRecord({"weight": Array(np.full((5, 2), "4711")), "bias": Array(np.ones(2))}),
    "bytes": not_an_array,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_refusal_says_nothing_of_what_the_sites_app_returned(wrong: str) -> None:
    with LocalGrid([returning(WRONG[wrong])]) as grid:
        fault = fault_of(send(grid, train_content()))
    assert "4711" not in fault.message


def test_error_in_the_sites_own_setup_says_nothing_of_its_files() -> None:
    def suite(node: Context) -> PlainSite:
        Path("/srv/ward-4711/site.key").read_bytes()
        return PlainSite()

    with LocalGrid([learning_app([seal(suite)])]) as grid:
        reply = send(grid, messages.pack(messages.Hello(run="run", suite="plain/v1")))
        assert "4711" not in str(reply)
        fault_of(reply)


def test_question_about_a_round_that_was_taken_and_not_sealed_is_refused() -> None:
    def learn(partition: int, number: int) -> np.ndarray:
        raise RuntimeError

    with LocalGrid([learning_app([seal(SITE)], learn)]) as grid:
        send(grid, train_content(suite="ckks/v1"))
        question = messages.Question(context=context().digest().hex(), phase="sum")
        fault_of(send(grid, messages.pack(question, (b"x",))))


# --- what a site must not forget ---


def opened(grid: LocalGrid, about: Any, value: float) -> messages.AnyMessage:
    """Have a site open a sum of the coordinator's own making."""
    worker = ts.context_from(SITE.public_key, 1)
    worker.auto_rescale = True
    vector = ts.ckks_vector(worker, [value] * CKKS_V1.slots) * 1.0
    question = messages.Question(context=about.digest().hex(), phase="sum")
    return messages.unpack(send(grid, messages.pack(question, pack_blocks([ciphertext_bytes(vector)]))).content)[0]


def test_going_to_another_run_and_back_opens_no_second_sum_of_a_round() -> None:
    with LocalGrid([SEALED]) as grid:
        send(grid, train_content(1, "ckks/v1"))
        assert isinstance(opened(grid, context(1), 1.0), messages.Answer)
        assert isinstance(opened(grid, context(1), 2.0), messages.Fault), "a second question is refused"
        send(grid, train_content(1, "ckks/v1", run="another"))
        again = messages.unpack(send(grid, train_content(1, "ckks/v1")).content)[0]
        assert isinstance(again, messages.Fault), "the round was sealed a second time"
        assert isinstance(opened(grid, context(1), 2.0), messages.Fault)


def test_another_attempt_is_no_second_update_of_a_round() -> None:
    with LocalGrid([CLEAR]) as grid:
        send(grid, train_content(1))
        assert fault_of(send(grid, train_content(1, attempt=2))).code == "replayed-round"


@pytest.mark.parametrize("field", ["round", "attempt"])
def test_number_that_flower_cannot_store_is_refused_before_anything_is_sealed(field: str) -> None:
    """Flower keeps a site's memory as 64-bit numbers; with a larger one the site's memory would not be saved."""
    with LocalGrid([CLEAR]) as grid:
        content = train_content()
        header = messages.unpack(content)[0].model_dump()
        header["context"][field] = 2**64
        content[messages.HEADER] = ConfigRecord({"header": json.dumps(header)})
        assert fault_of(send(grid, content)).code == "undecodable"
