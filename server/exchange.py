"""Sending one message to each of some sites and taking the replies one at a time.

A reply is pulled, handed on and forgotten before the next one is pulled, so the coordinator holds one reply at a
time, not one per site. Whatever a site does wrong here (silence, an error, a node that is gone, a reply in another
site's name) becomes a :class:`~quorsum.errors.SiteFault` for that site and never an exception for the round.

Where the grid can tell that a site's process has begun anew, the site gets the same instruction once more, with the
same nonce: the process that had taken it is gone, and sites give the same answer to the same question.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from quorsum import envelope
from quorsum.crypto.identity import PublicIdentity
from quorsum.crypto.suite import RandomBytes, Site
from quorsum.errors import Refusal, SiteFault
from quorsum.messages import MESSAGE_TYPE

__all__ = ["Network", "Traffic", "WatchedGrid"]

# The pause between two looks for replies grows from the first to the second while nothing arrives.
FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.25
# Flower's words for: the upload of the reply was never finished, the node is gone, its process is gone.
GONE = frozenset({3, 5, 8})
# A site that comes back and breaks down at once is not asked more often than this, in seconds.
PUSH_AGAIN = 2.0


@runtime_checkable
class WatchedGrid(Protocol):
    """A grid that knows when the process behind a node began, and who may still take part."""

    def activation(self, node_id: int) -> str | None:
        """Something that changes with every process of the node; None while there is none."""

    def registered(self, node_id: int) -> bool:
        """Whether the node still belongs to the federation."""


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


@dataclass
class _Pending:
    """An instruction that has not been answered.

    Attributes:
        content: what was asked, with its nonce.
        asked: what the reply must be signed for.
        ids: Flower's ids of it, one for each time it was pushed.
        process: the process of the site that it was pushed for.
        pushed: when it was pushed last.
    """

    content: RecordDict
    asked: envelope.Asked
    ids: list[str] = field(default_factory=list)
    process: str | None = None
    pushed: float = 0.0


@dataclass(frozen=True)
class Network:
    """The sites of a run, and the way to them.

    Attributes:
        grid: Flower's way to the nodes.
        nodes: Flower's node id for each site. It is a routing label, not an identity.
        timeout: seconds a site has for one reply.
        identities: keys of the sites whose replies must be signed.
        random_bytes: source of nonces.
    """

    grid: Grid
    nodes: Mapping[Site, int]
    timeout: float
    identities: Mapping[Site, PublicIdentity] = field(default_factory=dict)
    random_bytes: RandomBytes = field(default=os.urandom, repr=False)

    def exchange(
        self, contents: Mapping[Site, RecordDict], group: str, traffic: Traffic, message_type: str = MESSAGE_TYPE
    ) -> Iterator[tuple[Site, RecordDict | SiteFault]]:
        """Send ``contents`` and yield each site's reply as it arrives, then a fault for each that did not reply.

        A second reply to the same message comes as a fault with code ``"answered-twice"`` after the first.
        """
        pending: dict[Site, _Pending] = {}
        # The model is one record in the instructions of all sites.
        known: dict[int, bytes] = {}
        for site, content in contents.items():
            nonce = self.random_bytes(envelope.NONCE_LENGTH)
            digest = envelope.content_digest(content, known) if site in self.identities else b""
            asked = _Pending(envelope.address(content, nonce), envelope.Asked(nonce, digest))
            # A member that has not connected yet is asked as soon as it does.
            awaited = isinstance(self.grid, WatchedGrid) and self.grid.registered(self.nodes[site])
            if self._push(site, asked, group, message_type) or awaited:
                pending[site] = asked
                traffic.sent(site, content)
            else:
                yield site, SiteFault(site, "unreachable", "Flower knows no such node any more", proven=False)
        yield from self._replies(pending, group, message_type, traffic)

    def _push(self, site: Site, asked: _Pending, group: str, message_type: str) -> bool:
        node = self.nodes[site]
        if isinstance(self.grid, WatchedGrid):
            asked.process = self.grid.activation(node)
        message = Message(asked.content, node, message_type, group_id=group, ttl=self.timeout)
        sent = list(self.grid.push_messages([message]))
        asked.ids += [one for one in sent if one]
        asked.pushed = time.monotonic()
        return bool(sent)

    def _replies(
        self, pending: dict[Site, _Pending], group: str, message_type: str, traffic: Traffic
    ) -> Iterator[tuple[Site, RecordDict | SiteFault]]:
        deadline = time.monotonic() + self.timeout
        pause = FIRST_PAUSE
        while pending:
            # The last look comes when the time is up, not before.
            last = time.monotonic() >= deadline
            before = len(pending)
            for site, asked in list(pending.items()):
                for message_id in list(asked.ids):
                    replies = self._pull(message_id, site)
                    if not replies:
                        continue
                    asked.ids.remove(message_id)
                    if self._gone(replies[0]) and not last:
                        # Its process ended; the one that follows will be asked again.
                        asked.process = None
                        continue
                    del pending[site]
                    for nth, reply in enumerate(replies):
                        yield site, self._content(site, asked, reply, nth, traffic)
                    break
            if last:
                break
            yield from self._look_after(pending, group, message_type)
            if len(pending) == before:
                time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                pause = FIRST_PAUSE
        for site in pending:
            yield site, SiteFault(site, "late", f"no answer within {self.timeout:g} s", proven=False)

    def _look_after(
        self, pending: dict[Site, _Pending], group: str, message_type: str
    ) -> Iterator[tuple[Site, SiteFault]]:
        """Ask sites again whose process is a new one; give up on those that were sent away."""
        if not isinstance(self.grid, WatchedGrid):
            return
        for site, asked in list(pending.items()):
            if not self.grid.registered(self.nodes[site]):
                del pending[site]
                yield site, SiteFault(site, "revoked", "was revoked while it was asked", proven=False)
                continue
            process = self.grid.activation(self.nodes[site])
            if process not in (None, asked.process) and time.monotonic() - asked.pushed > PUSH_AGAIN:
                self._push(site, asked, group, message_type)

    def _gone(self, reply: Message | SiteFault) -> bool:
        """Whether this is not a reply but Flower's word that nobody is there to give one."""
        watched = isinstance(self.grid, WatchedGrid)
        return watched and isinstance(reply, Message) and reply.has_error() and reply.error.code in GONE

    def _pull(self, message_id: str, site: Site) -> list[Message | SiteFault]:
        try:
            return list(self.grid.pull_messages([message_id]))
        except Exception as error:  # noqa: BLE001 - Flower puts the site's objects together here, and they may be anything
            # The transport may fail too, so this proves nothing; the site has lost the round all the same.
            text = f"Flower could not put its reply together ({type(error).__name__})"
            return [SiteFault(site, "undecodable", text, proven=False)]

    def _content(
        self, site: Site, asked: _Pending, reply: Message | SiteFault, nth: int, traffic: Traffic
    ) -> RecordDict | SiteFault:
        if isinstance(reply, SiteFault):
            return reply
        if nth > 0:
            sentence = "answered the same message twice; only the first answer counts"
            return SiteFault(site, "answered-twice", sentence, proven=False)
        if reply.has_error():
            # Flower puts the site's exception text here: it is the site's business and is not repeated.
            return SiteFault(site, "error", f"replied with Flower error {reply.error.code}", proven=False)
        if not isinstance(reply.content, RecordDict):
            return SiteFault(site, "undecodable", "replied with something that is not a RecordDict", proven=False)
        traffic.received(site, reply.content)
        if site not in self.identities:
            return envelope.strip(reply.content)
        try:
            return envelope.open_envelope(reply.content, asked.asked, self.identities[site])
        except Refusal as refusal:
            # Whoever sent it, it was not the site, or not the site's word on this.
            return SiteFault(site, refusal.code, f"its reply: {refusal.message}", proven=False)
