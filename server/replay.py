"""A network that remembers: what an open round has heard already comes from its journal, and only the rest is asked.

The round does not notice. It plays from the start each time, and its exchanges come in the same order with the same
contents, because everything that decides about them comes from the journal too: roster, randomness, earlier replies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count

from flwr.app import MetricRecord, RecordDict

from quorsum import messages
from quorsum.crypto.suite import Site
from quorsum.errors import Refusal, SiteFault
from quorsum.messages import MESSAGE_TYPE
from quorsum.server.checkpoint import ExchangeLog, RoundJournal, Said
from quorsum.server.exchange import Network, Traffic

__all__ = ["RememberingNetwork"]

# Begins what is kept of an evaluation; no message of ours begins like this.
MEASURES = "measures "


@dataclass(frozen=True)
class RememberingNetwork(Network):
    """A :class:`Network` for one round.

    Attributes:
        journal: what is kept of the round.
    """

    journal: RoundJournal = field(kw_only=True)
    _steps: Iterator[int] = field(default_factory=count, repr=False, kw_only=True)

    def exchange(
        self, contents: Mapping[Site, RecordDict], group: str, traffic: Traffic, message_type: str = MESSAGE_TYPE
    ) -> Iterator[tuple[Site, RecordDict | SiteFault]]:
        """See :meth:`Network.exchange`; every reply is kept before it is handed on."""
        log = self.journal.exchange(next(self._steps))
        if log is None:
            yield from super().exchange(contents, group, traffic, message_type)
            return
        heard = set()
        for said in log.said():
            heard.add(said.site)
            yield said.site, _told(said)
        if log.finished():
            return
        rest = {site: content for site, content in contents.items() if site not in heard}
        yield from self._kept(log, super().exchange(rest, group, traffic, message_type))
        log.finish()

    @staticmethod
    def _kept(
        log: ExchangeLog, replies: Iterator[tuple[Site, RecordDict | SiteFault]]
    ) -> Iterator[tuple[Site, RecordDict | SiteFault]]:
        for site, reply in replies:
            said = _said(site, reply)
            log.add(said)
            yield site, _told(said)


def _said(site: Site, reply: RecordDict | SiteFault) -> Said:
    if isinstance(reply, SiteFault):
        return Said(site, "", fault=reply)
    if not messages.has_header(reply) and reply.metric_records:
        return Said(site, MEASURES + json.dumps(_measures(reply), sort_keys=True))
    try:
        message, blocks = messages.unpack(reply)
    except Refusal as refusal:
        # What is not a message is not kept, only what the round would say of it.
        return Said(site, "", fault=SiteFault(site, refusal.code, refusal.message, proven=False))
    return Said(site, message.model_dump_json(), blocks)


def _measures(reply: RecordDict) -> dict[str, dict[str, int | float]]:
    """The single numbers of an evaluation; nothing else of it is used."""
    return {
        name: {key: value for key, value in record.items() if isinstance(value, int | float) and math.isfinite(value)}
        for name, record in reply.metric_records.items()
    }


def _told(said: Said) -> RecordDict | SiteFault:
    if said.fault is not None:
        return said.fault
    if said.header.startswith(MEASURES):
        # What sites say of a model has no header of ours: they answer Flower's own evaluation message.
        told = json.loads(said.header.removeprefix(MEASURES))
        return RecordDict({name: MetricRecord(values) for name, values in told.items()})
    return messages.pack(messages.parse(said.header), said.blocks)
