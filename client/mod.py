"""The sealing mod: the site's end of a round, wrapped around any existing ClientApp.

Rules it keeps, whatever the coordinator asks:

1. An update leaves the site only sealed. An instruction to train that does not speak quorsum is refused, and of
   the app's reply nothing else goes out than the sealed difference and the metrics named in ``share_metrics``.
2. A site trains for at most one update per round of a run, and rounds only go up. A later attempt at a round seals
   the same integers again, at most twice more, and never after the site has signed for a set.
3. A question is answered only about the round sealed last, and only as the suite allows (see its ``answer``).
4. A refusal carries a fixed sentence: no text from the site's data, code or files reaches the coordinator.
5. Every reply is signed with the site's own key for the one instruction that it answers (``quorsum.envelope``).

Adopting it is two lines in a Flower app::

    from quorsum.client import seal
    app = ClientApp(mods=[seal()])
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from numpy.typing import NDArray

from quorsum import arrays, envelope, messages
from quorsum.client import ledger
from quorsum.client.keys import HOME, configured_suite, load_identity
from quorsum.crypto.identity import Identity
from quorsum.crypto.suite import Blocks, RandomBytes, RoundContext, SiteSuite
from quorsum.errors import CoordinatorFault, KeyMaterialError, Refusal, UsageError

__all__ = ["SealingMod", "seal"]

# Below Flower's own logger, so that it goes where the log of the node goes.
log = logging.getLogger("flwr.quorsum")

EXAMPLES = "num-examples"

# The phase in which a site binds itself to one set: it joins no other attempt at the round.
BINDING = "ticket"

# True while an app runs inside a sealing mod: one further in, which the app brought itself, lets everything through, so
# that what seals is the outermost one.
_around: ContextVar[bool] = ContextVar("quorsum_sealing", default=False)


def seal(
    suite: SiteSuite | Callable[[Context], SiteSuite] = configured_suite,
    *,
    site: str | None = None,
    share_metrics: Sequence[str] = (),
    minimum_sites: int = 3,
    home: Path | None = None,
    random_bytes: RandomBytes = os.urandom,
    check: Callable[[RoundContext], None] | None = None,
) -> Mod:
    """A Flower mod that seals what a ClientApp trained.

    Args:
        suite: the site's end of a cipher suite, or a function that makes it from the node's context (called once per
            node, when first needed). By default the key file that the node's config names under ``quorsum-key``.
        site: name of this site; without it ``site-name`` of the node's config, else a name from its partition or node.
        share_metrics: names of the app's training metrics that may travel in the clear. The number of examples
            always does.
        minimum_sites: the smallest round this site takes part in; a mean over fewer sites would show too much.
        home: folder for the site's records; without it ``quorsum-home`` of the node's config, else they are kept in the
            memory of the node.
        random_bytes: source of randomness; leave the operating system's in production.
        check: raises ``CoordinatorFault`` for rounds that this site's own policy refuses.
    """
    return SealingMod(suite, site, tuple(share_metrics), minimum_sites, home, random_bytes, check)


@dataclass(frozen=True)
class SealingMod:
    """See :func:`seal`. Callable as a Flower mod."""

    source: SiteSuite | Callable[[Context], SiteSuite]
    site: str | None = None
    share_metrics: tuple[str, ...] = ()
    minimum_sites: int = 3
    home: Path | None = None
    random_bytes: RandomBytes = field(default=os.urandom, repr=False)
    check: Callable[[RoundContext], None] | None = None
    # Made when first needed, so that the mod itself can be sent to another process.
    _suites: dict[int, SiteSuite] = field(default_factory=dict, repr=False, compare=False)

    def suite(self, context: Context) -> SiteSuite:
        """The suite of the node the context belongs to."""
        if not callable(self.source):
            return self.source
        if context.node_id not in self._suites:
            self._suites[context.node_id] = self.source(context)
        return self._suites[context.node_id]

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Handle one message of the coordinator."""
        if _around.get():
            return call_next(message, context)
        asked: envelope.Asked | None = None
        try:
            asked = envelope.asked_in(message.content)
            if messages.has_header(message.content):
                content = self._dispatch(message, context, call_next)
            else:
                content = self._plain(message, context, call_next)
        except KeyMaterialError as error:
            # Names files of this site: it goes into the site's log only.
            log.error("%s", error)
            content = _fault(error.code, "this site's key or records cannot be used; its own log says why")
        except Refusal as refusal:
            log.warning("refused %s: %s", message.metadata.message_type, refusal)
            content = _fault(refusal.code, refusal.message)
        except Exception:
            # Flower would send the text of the error to the coordinator.
            log.exception("an error in the site's own software")
            content = _fault("site-error", "an error in the site's own software; its own log says which")
        return Message(self._signed(content, asked, context), reply_to=message)

    def _signed(self, content: RecordDict, asked: envelope.Asked | None, context: Context) -> RecordDict:
        """The reply with this site's signature (rule 5), where it has an identity and was given a nonce."""
        try:
            identity = self._identity(context)
        except Exception:
            # Its text names files of this site. A reply that is not signed costs the site its part, not its secrets.
            log.exception("this site's own keys cannot be used")
            return content
        return content if asked is None or identity is None else envelope.sign(content, asked, identity)

    def _identity(self, context: Context) -> Identity | None:
        home = self.home or context.node_config.get(HOME)
        if home is not None:
            return load_identity(Path(str(home)))
        identity: Identity | None = getattr(self.suite(context), "identity", None)
        return identity

    def _dispatch(self, message: Message, context: Context, call_next: ClientAppCallable) -> RecordDict:
        request, blocks = messages.unpack(message.content)
        if isinstance(request, messages.Hello):
            return self._introduce(request, context)
        book = self._ledger(context)
        with book.hold():
            match request:
                case messages.Train():
                    return self._train(request, message, context, call_next, book)
                case messages.Again():
                    return self._seal_again(request, context, book)
                case messages.Question():
                    return self._answer(request, blocks, context, book)
        raise CoordinatorFault("unexpected", f"a site does not answer a message of kind {request.kind!r}")

    def _plain(self, message: Message, context: Context, call_next: ClientAppCallable) -> RecordDict:
        """An evaluation goes through and returns numbers only; anything else would leave the site unsealed (rule 1)."""
        if message.metadata.message_type.split(".")[0] != "evaluate":
            raise CoordinatorFault(
                "not-sealed",
                f"this site only trains in sealed rounds, and got a plain {message.metadata.message_type!r} message; "
                "the coordinator must use QuorumStrategy",
            )
        reply = _run_app(call_next, _without_header(message), context, "evaluation-failed")
        return RecordDict(
            {
                name: MetricRecord({k: v for k, v in record.items() if isinstance(v, int | float)})
                for name, record in reply.metric_records.items()
            }
        )

    def _introduce(self, request: messages.Hello, context: Context) -> RecordDict:
        suite = self.suite(context)
        _same_suite(suite, request.suite)
        introduction = messages.Introduction(site=self._name(context), suite=suite.name, key_id=suite.key_id)
        return messages.pack(introduction, (suite.public_key,) if suite.public_key else ())

    def _train(
        self,
        request: messages.Train,
        message: Message,
        context: Context,
        call_next: ClientAppCallable,
        book: ledger.Ledger,
    ) -> RecordDict:
        round_context = request.context.round_context()
        suite = self.suite(context)
        _same_suite(suite, request.suite)
        model = _only_arrays(message.content)
        self._acceptable(round_context, request.site)
        _same_model(round_context, model)
        if (before := ledger.submitted(book, round_context)) is not None:
            return messages.pack(messages.parse(before[0]), before[1])
        ledger.take_round(book, round_context)

        started = time.perf_counter()
        reply = _run_app(call_next, _without_header(message), context, "training-failed")
        trained = time.perf_counter()
        metrics = {
            k: float(v) for r in reply.metric_records.values() for k, v in r.items() if isinstance(v, int | float)
        }
        update = clipped(_learnt(reply, model), round_context)
        # What has been trained is as large as the update; it is not needed while the update is sealed.
        del reply
        state, blocks = _sealable(
            round_context, lambda: suite.seal(round_context, update, self.random_bytes, book.write_kept)
        )
        submission = messages.Submission(
            context=round_context.digest().hex(),
            key_id=suite.key_id,
            examples=_count(metrics.get(EXAMPLES)),
            metrics={name: metrics[name] for name in self.share_metrics if math.isfinite(metrics.get(name, math.nan))},
            train_seconds=trained - started,
            seal_seconds=time.perf_counter() - trained,
        )
        return _submit(book, round_context, suite, state, submission, blocks)

    def _seal_again(self, request: messages.Again, context: Context, book: ledger.Ledger) -> RecordDict:
        """Another attempt at the round: no training, the app is not called, the same integers."""
        round_context = request.context.round_context()
        suite = self.suite(context)
        _same_suite(suite, request.suite)
        self._acceptable(round_context, request.site)
        if (sent := ledger.submitted(book, round_context)) is not None:
            return messages.pack(messages.parse(sent[0]), sent[1])
        before = ledger.earlier_attempt(book, round_context)
        started = time.perf_counter()
        state, blocks = _sealable(
            round_context, lambda: suite.reseal(round_context, before, book.read_kept(), self.random_bytes)
        )
        # The attempt before ends here: its state goes first, then its upload.
        ledger.take_attempt(book, round_context)
        submission = messages.Submission(
            context=round_context.digest().hex(),
            key_id=suite.key_id,
            examples=0,
            metrics={},
            train_seconds=0.0,
            seal_seconds=time.perf_counter() - started,
        )
        return _submit(book, round_context, suite, state, submission, blocks)

    def _answer(self, request: messages.Question, blocks: Blocks, context: Context, book: ledger.Ledger) -> RecordDict:
        suite = self.suite(context)
        round_context, state = ledger.recall(book, request.context)
        upload = book.read_upload() if suite.keeps_upload else ()
        state, answer = suite.answer(round_context, state, request.phase, blocks, self.random_bytes, upload)
        # Saved before the answer leaves: what was answered must not be forgotten.
        ledger.remember(book, round_context, state)
        if request.phase == BINDING:
            # No other attempt follows, and what was kept for one is the update in the clear.
            book.write_kept(())
        return messages.pack(messages.Answer(context=request.context, phase=request.phase), answer)

    def _ledger(self, context: Context) -> ledger.Ledger:
        folder = self.home or context.node_config.get(HOME)
        return ledger.StateLedger(context.state) if folder is None else ledger.FolderLedger(Path(str(folder)))

    def _acceptable(self, round_context: RoundContext, site: str) -> None:
        sites = round_context.sites
        if self.check is not None:
            self.check(round_context)
        if site not in sites or list(sites) != sorted(set(sites)):
            raise CoordinatorFault("wrong-roster", "the roster is not sorted and unique, or does not hold this site")
        if len(sites) < self.minimum_sites:
            raise CoordinatorFault(
                "too-few-sites", f"a round over {len(sites)} sites, this site's policy asks for {self.minimum_sites}"
            )
        if not 0 <= 2 * round_context.tolerate < len(sites):
            raise CoordinatorFault(
                "wrong-bound", f"{len(sites)} sites cannot tolerate {round_context.tolerate} malicious ones"
            )

    def _name(self, context: Context) -> str:
        config = context.node_config
        if self.site is not None:
            return self.site
        if "site-name" in config:
            return str(config["site-name"])
        if "partition-id" in config:
            return f"site-{int(config['partition-id']) + 1:02d}"
        return f"node-{context.node_id}"


def _fault(code: str, message: str) -> RecordDict:
    return messages.pack(messages.Fault(code=code, message=message))


def _submit(
    book: ledger.Ledger,
    round_context: RoundContext,
    suite: SiteSuite,
    state: bytes,
    submission: messages.Submission,
    blocks: Blocks,
) -> RecordDict:
    """Keep what is submitted, then let it go: asked for it again, the site sends the very same."""
    kept = blocks if suite.keeps_upload or book.durable else None
    ledger.remember(book, round_context, state, kept, submission.model_dump_json())
    return messages.pack(submission, blocks)


def _same_suite(suite: SiteSuite, asked: str) -> None:
    if asked != suite.name:
        raise CoordinatorFault(
            "wrong-suite", f"the coordinator uses suite {asked!r}, this site {suite.name!r}; configure the same"
        )


def _same_model(round_context: RoundContext, model: ArrayRecord) -> None:
    dimension = arrays.dimension(model)
    if round_context.dimension != dimension:
        raise CoordinatorFault(
            "wrong-shape", f"the model has {dimension} parameters, the round says {round_context.dimension}"
        )
    if round_context.model != arrays.fingerprint(model):
        raise CoordinatorFault("wrong-model", "the model is not the one that the round is about")


def _sealable(round_context: RoundContext, step: Callable[[], tuple[bytes, Blocks]]) -> tuple[bytes, Blocks]:
    """What sealing gives; the suite's words name norms and positions of this site's data and stay in its own log."""
    try:
        return step()
    except UsageError as error:
        log.warning("round %d: cannot seal: %s", round_context.round, error)
        raise Refusal("not-sealable", "the site's update cannot be sealed (not finite or out of range)") from error


def clipped(update: NDArray[np.float32], context: RoundContext) -> NDArray[np.float32]:
    """``min(1, C / ||x||) x`` where the round clips, else ``x``; not finite stays as it is, for the suite to refuse."""
    if not context.clip:
        return update
    norm = math.sqrt(float(np.dot(update, update)))
    return update if not norm > context.unit else update * np.float32(context.unit / norm)


def _run_app(call_next: ClientAppCallable, message: Message, context: Context, code: str) -> RecordDict:
    token = _around.set(True)
    try:
        reply = call_next(message, context)
    except Exception as error:
        log.exception("the app raised")
        raise Refusal(code, "the site's app raised an error; its own log says which") from error
    finally:
        _around.reset(token)
    if not reply.has_content():
        raise Refusal(code, "the site's app replied with an error; its own log says which")
    return reply.content


def _learnt(reply: RecordDict, model: ArrayRecord) -> NDArray[np.float32]:
    """What the app has learnt; its words and shapes stay in the site's own log (rule 4)."""
    try:
        return arrays.difference(_only_arrays(reply), model)
    except Refusal as refusal:
        log.warning("the app's reply: %s", refusal)
        raise Refusal(refusal.code, "the site's app returned no model like the one it got") from None


def _only_arrays(content: RecordDict) -> ArrayRecord:
    records = [record for name, record in content.array_records.items() if name != messages.BLOCKS]
    if len(records) != 1:
        raise Refusal("wrong-shape", f"expected one ArrayRecord with the model, got {len(records)}")
    return records[0]


def _without_header(message: Message) -> Message:
    # Flower offers no public way to a message with the same metadata and another content.
    bare: Message = Message(metadata=message.metadata, content=envelope.strip(messages.strip(message.content)))  # type: ignore[call-overload]
    return bare


def _count(value: float | None) -> int:
    return int(value) if value is not None and math.isfinite(value) and value >= 0 else 0
