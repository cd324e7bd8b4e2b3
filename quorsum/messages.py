"""The typed messages between coordinator and site, and their one encoding.

On the wire a message is a Flower ``RecordDict`` with a header (one JSON object, checked strictly) and, where
there is bulk, an ``ArrayRecord`` of raw byte blocks. The bulk never goes into a ``ConfigRecord``: Flower sends
that in one body, while arrays are cut into chunks.

==============  ====================  =======================  ==========================================
direction       instruction           reply                    purpose
==============  ====================  =======================  ==========================================
once per run    :class:`Hello`        :class:`Introduction`    which suite and which key a site has
every round     :class:`Train`        :class:`Submission`      train, seal the difference, send it
later attempts  :class:`Again`        :class:`Submission`      seal the same difference again, send it
every phase     :class:`Question`     :class:`Answer`          what the suite asks to measure and to open
any             any                   :class:`Fault`           the site cannot or will not do what was asked
==============  ====================  =======================  ==========================================

Every instruction travels as Flower message type ``train``: that is the one handler every trainable ClientApp
has, so that the sealing mod alone is enough to adopt quorsum. The header tells them apart.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from quorsum.crypto.suite import Blocks, RoundContext
from quorsum.errors import Refusal

__all__ = [
    "Again",
    "Answer",
    "Fault",
    "Hello",
    "Introduction",
    "Question",
    "Submission",
    "Train",
    "has_header",
    "pack",
    "parse",
    "strip",
    "unpack",
]

HEADER = "quorsum"
BLOCKS = "quorsum.blocks"
RAW = "quorsum.raw"
MESSAGE_TYPE = "train"
MAX_HEADER_BYTES = 1 << 20

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\w.@:+#/-]+$")]
Text = Annotated[str, Field(max_length=2000)]
# Flower keeps a site's memory as 64-bit numbers; nothing that is counted here comes near.
Count = Annotated[int, Field(ge=0, le=2**53)]
Ordinal = Annotated[int, Field(ge=1, le=2**31)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Phase = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    protocol: Literal[1] = 1


class Hello(_Message):
    """Coordinator to site, once: who are you, and which suite and key do you use?"""

    kind: Literal["hello"] = "hello"
    run: Name
    suite: Name


class Introduction(_Message):
    """Site to coordinator: answer to :class:`Hello`; the public key of its suite, if any, is in the blocks."""

    kind: Literal["introduction"] = "introduction"
    site: Name
    suite: Name
    key_id: Annotated[str, Field(max_length=128)]


class Context(_Message):
    """A :class:`~quorsum.crypto.suite.RoundContext` as it travels."""

    run: Name
    round: Ordinal
    attempt: Ordinal
    sites: Annotated[list[Name], Field(min_length=1, max_length=10_000)]
    dimension: Annotated[int, Field(ge=1, le=2**40)]
    tolerate: Annotated[int, Field(ge=0, le=10_000)]
    unit: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    clip: bool
    sketches: Annotated[int, Field(ge=1, le=64)]
    collude: Annotated[int, Field(ge=0, le=10_000)]
    rule: Text
    reference: Annotated[str, Field(max_length=128, pattern=r"^[\w.@:+#/-]*$")]
    model: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    keys: list[Annotated[str, Field(pattern=r"^[0-9a-f]{0,4096}$")]]
    commitment: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]

    @classmethod
    def of(cls, context: RoundContext) -> Context:
        """The context as a message."""
        fields = {**vars(context), "sites": list(context.sites), "keys": list(context.keys)}
        return cls(**fields)

    def round_context(self) -> RoundContext:
        """The message as a context."""
        fields = self.model_dump(exclude={"protocol"})
        return RoundContext(**{**fields, "sites": tuple(self.sites), "keys": tuple(self.keys)})


class Train(_Message):
    """Coordinator to site: train from this model, then seal the difference for this context."""

    kind: Literal["train"] = "train"
    site: Name
    suite: Name
    context: Context


class Again(_Message):
    """Coordinator to site: seal for another attempt at the round what was sealed in the first; nothing is trained."""

    kind: Literal["again"] = "again"
    site: Name
    suite: Name
    context: Context


class Submission(_Message):
    """Site to coordinator: the sealed difference (in the blocks).

    The answer to :class:`Again` says nothing of the training: 0 examples, no metrics, 0 seconds.
    """

    kind: Literal["submission"] = "submission"
    context: Digest
    key_id: Annotated[str, Field(max_length=128)]
    examples: Count
    metrics: dict[Name, float]
    train_seconds: Seconds
    seal_seconds: Seconds


class Question(_Message):
    """Coordinator to site: one phase of measuring or combining (the question is in the blocks)."""

    kind: Literal["question"] = "question"
    context: Digest
    phase: Phase


class Answer(_Message):
    """Site to coordinator: answer to a :class:`Question` (in the blocks)."""

    kind: Literal["answer"] = "answer"
    context: Digest
    phase: Phase


class Fault(_Message):
    """Site to coordinator: no answer, and why. Carries a fixed sentence, never text from the site's data or code."""

    kind: Literal["fault"] = "fault"
    code: Annotated[str, Field(pattern=r"^[a-z][a-z-]{0,40}$")]
    message: Text


AnyMessage: TypeAlias = Hello | Introduction | Train | Again | Submission | Question | Answer | Fault
_adapter: TypeAdapter[AnyMessage] = TypeAdapter(Annotated[AnyMessage, Field(discriminator="kind")])


def has_header(content: RecordDict) -> bool:
    """Whether a message speaks quorsum at all."""
    return HEADER in content


def pack(message: AnyMessage, blocks: Blocks = (), *, beside: RecordDict | None = None) -> RecordDict:
    """Encode a message with its blocks; ``beside`` are the user's own records, which travel unchanged."""
    content = RecordDict(dict(beside.items()) if beside is not None else {})
    content[HEADER] = ConfigRecord({"header": message.model_dump_json()})
    if blocks:
        content[BLOCKS] = ArrayRecord(
            {f"{k:06d}": Array(dtype="uint8", shape=(len(b),), stype=RAW, data=b) for k, b in enumerate(blocks)}
        )
    return content


def unpack(content: RecordDict) -> tuple[AnyMessage, Blocks]:
    """Decode and check a message.

    Raises:
        Refusal: ``"no-header"`` (not a quorsum message at all), ``"undecodable"`` (a header or block that does not
            follow the format).
    """
    record = content.get(HEADER)
    if record is None:
        kinds = ", ".join(f"{name!r}" for name in content) or "nothing"
        raise Refusal("no-header", f"expected a quorsum message, got a plain one with {kinds}")
    header = record.get("header") if isinstance(record, ConfigRecord) else None
    if not isinstance(header, str) or len(header) > MAX_HEADER_BYTES:
        raise Refusal("undecodable", "the header of the message is missing, not text, or too long")
    return parse(header), _blocks(content)


def parse(header: str) -> AnyMessage:
    """The message that a header stands for.

    Raises:
        Refusal: ``undecodable``.
    """
    try:
        return _adapter.validate_json(header)
    except ValidationError as error:
        raise Refusal("undecodable", f"the header of the message is malformed: {_first(error)}") from None


def strip(content: RecordDict) -> RecordDict:
    """The user's own records of a message, without ours."""
    return RecordDict({name: record for name, record in content.items() if name not in (HEADER, BLOCKS)})


def _blocks(content: RecordDict) -> Blocks:
    record = content.get(BLOCKS)
    if record is None:
        return ()
    if not isinstance(record, ArrayRecord):
        raise Refusal("undecodable", "the blocks of the message are not an ArrayRecord")
    blocks = []
    for k, (name, array) in enumerate(record.items()):
        if name != f"{k:06d}" or array.stype != RAW or array.dtype != "uint8" or array.shape != (len(array.data),):
            raise Refusal("undecodable", f"block {k} of the message is not a raw block (name {name!r})")
        blocks.append(array.data)
    return tuple(blocks)


def _first(error: ValidationError) -> str:
    detail = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(str(part) for part in detail['loc']) or 'header'}: {detail['msg']}"
