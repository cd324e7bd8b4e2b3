"""Sending one message to each of some sites and taking the replies one at a time.

A reply is pulled, handed on and forgotten before the next one is pulled, so the coordinator holds one reply at a
time, not one per site. Whatever a site does wrong here (silence, an error, a node that is gone) becomes a
:class:`~quorsum.errors.SiteFault` for that site and never an exception for the round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from quorsum.crypto.suite import Site
from quorsum.errors import SiteFault
from quorsum.messages import MESSAGE_TYPE

__all__ = ["Network", "Traffic"]

# The pause between two looks for replies grows from the first to the second while nothing arrives.
FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.25


@dataclass
class Traffic:
    """Bytes of blocks and arrays moved, per site: what one round costs on the wire."""

    up: dict[Site, int] = field(default_factory=dict)
    down: dict[Site, int] = field(default_factory=dict)

    def sent(self, site: Site, content: RecordDict) -> None:
        """Count an instruction."""
        self.down[site] = self.down.get(site, 0) + payload_bytes(content)

    def received(self, site: Site, content: RecordDict) -> None:
        """Count a reply."""
        self.up[site] = self.up.get(site, 0) + payload_bytes(content)


def payload_bytes(content: RecordDict) -> int:
    """Bytes of all arrays of a message; headers are left out."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


@dataclass(frozen=True)
class Network:
    """The sites of a run, and the way to them.

    Attributes:
        grid: Flower's way to the nodes.
        nodes: Flower's node id for each site. It is a routing label, not an identity.
        timeout: seconds a site has for one reply.
    """

    grid: Grid
    nodes: Mapping[Site, int]
    timeout: float

    def exchange(
        self, contents: Mapping[Site, RecordDict], group: str, traffic: Traffic, message_type: str = MESSAGE_TYPE
    ) -> Iterator[tuple[Site, RecordDict | SiteFault]]:
        """Send ``contents`` and yield each site's reply as it arrives, then a fault for each that did not reply.

        A second reply to the same message comes as a fault with code ``"answered-twice"`` after the first.
        """
        pending: dict[str, Site] = {}
        for site, content in contents.items():
            message = Message(content, self.nodes[site], message_type, group_id=group, ttl=self.timeout)
            sent = list(self.grid.push_messages([message]))
            if sent:
                pending[sent[0]] = site
                traffic.sent(site, content)
            else:
                yield site, SiteFault(site, "unreachable", "Flower knows no such node any more", proven=False)
        yield from self._replies(pending, traffic)

    def _replies(self, pending: dict[str, Site], traffic: Traffic) -> Iterator[tuple[Site, RecordDict | SiteFault]]:
        deadline = time.monotonic() + self.timeout
        pause = FIRST_PAUSE
        while pending:
            # The last look comes when the time is up, not before.
            last = time.monotonic() >= deadline
            before = len(pending)
            for message_id in list(pending):
                replies = self._pull(message_id, pending[message_id])
                if replies:
                    site = pending.pop(message_id)
                    for nth, reply in enumerate(replies):
                        yield site, _content(site, reply, nth, traffic)
            if last:
                break
            if len(pending) == before:
                time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                pause = FIRST_PAUSE
        for site in pending.values():
            yield site, SiteFault(site, "late", f"no answer within {self.timeout:g} s", proven=False)

    def _pull(self, message_id: str, site: Site) -> list[Message | SiteFault]:
        try:
            return list(self.grid.pull_messages([message_id]))
        except Exception as error:  # noqa: BLE001 - Flower puts the site's objects together here, and they may be anything
            # The transport may fail too, so this proves nothing; the site has lost the round all the same.
            text = f"Flower could not put its reply together ({type(error).__name__})"
            return [SiteFault(site, "undecodable", text, proven=False)]


def _content(site: Site, reply: Message | SiteFault, nth: int, traffic: Traffic) -> RecordDict | SiteFault:
    if isinstance(reply, SiteFault):
        return reply
    if nth > 0:
        return SiteFault(site, "answered-twice", "answered the same message twice; only the first answer counts")
    if reply.has_error():
        # Flower puts the site's exception text here: it is the site's business and is not repeated.
        return SiteFault(site, "error", f"replied with Flower error {reply.error.code}", proven=False)
    if not isinstance(reply.content, RecordDict):
        return SiteFault(site, "undecodable", "replied with something that is not a RecordDict")
    traffic.received(site, reply.content)
    return reply.content
