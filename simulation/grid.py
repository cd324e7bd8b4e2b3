"""``LocalGrid``: Flower's ``Grid`` inside one process, so that a whole federation starts in the time of its imports.

Every node is a thread's worth of work: a message pushed to it runs the node's ClientApp with the node's own
``Context``, and the reply waits to be pulled. Nodes are independent, one node handles one message at a time, and a
ClientApp that raises becomes an error reply, all as in a deployment. Only the transport is missing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import TypeAlias

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

# Flower's own names for what a process is part of; a Message cannot be made before they are set.
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["LocalGrid", "Node"]

SUPERLINK = 1
CLIENT_APP_RAISED = 2
Handler: TypeAlias = Callable[[Message, Context], Message | None]


@dataclass
class Node:
    """One site: what runs there and what it remembers.

    Attributes:
        app: handles a message; returning None stands for a node that has died without a word.
        context: the node's own context, kept between messages.
    """

    app: ClientApp | Handler
    context: Context
    busy: threading.Lock = field(default_factory=threading.Lock, repr=False)


class LocalGrid(Grid):
    """Run ClientApps in threads of this process.

    Args:
        apps: the ClientApp of each node; node ids count from 2 (1 is Flower's coordinator), partitions from 0.
        node_configs: additional node config for each node.
        workers: how many nodes work at the same time; the number of cores by default.
    """

    def __init__(
        self,
        apps: Iterable[ClientApp | Handler],
        *,
        node_configs: Mapping[int, dict[str, bool | float | int | str]] | None = None,
        workers: int | None = None,
    ) -> None:
        apps = list(apps)
        self._run = Run.create_empty(run_id=1)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, self._run.run_id, SUPERLINK
        self.nodes: dict[int, Node] = {}
        for partition, app in enumerate(apps):
            node_id = partition + 2
            config = {"partition-id": partition, "num-partitions": len(apps), **(node_configs or {}).get(partition, {})}
            context = Context(self._run.run_id, node_id, config, RecordDict(), {})
            self.nodes[node_id] = Node(app, context)
        self._ids = count(1)
        self._pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="node")
        self._replies: dict[str, Future[Message | None]] = {}

    def close(self) -> None:
        """Stop the threads; messages still in work are abandoned."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_run(self, run: Run) -> None:
        """Set the run this grid belongs to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid belongs to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A new message (Flower's older way; ``Message(...)`` does the same)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all nodes."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand each message to its node; a message to an unknown node gets no id, as in Flower."""
        ids = []
        for message in messages:
            node = self.nodes.get(message.metadata.dst_node_id)
            if node is None:
                continue
            message_id = f"message-{next(self._ids)}"
            message.metadata.__dict__["_message_id"] = message_id
            self._replies[message_id] = self._pool.submit(_handle, node, message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there; each is handed out once."""
        ready = [m for m in message_ids if (future := self._replies.get(m)) is not None and future.done()]
        # A node that died leaves a reply of None: it stays pending until the deadline of whoever waits for it.
        return [reply for m in ready if (reply := self._replies.pop(m).result()) is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and wait for their replies."""
        ids = list(self.push_messages(messages))
        replies = []
        for message_id in ids:
            reply = self._replies.pop(message_id).result(timeout)
            if reply is not None:
                replies.append(reply)
        return replies


def _handle(node: Node, message: Message) -> Message | None:
    with node.busy:
        try:
            return node.app(message, node.context)
        except Exception as error:  # noqa: BLE001 - as Flower: whatever the app raises becomes an error reply
            return Message(Error(CLIENT_APP_RAISED, f"{type(error)}:<{error!r}>"), reply_to=message)
