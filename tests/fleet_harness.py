"""A fleet for tests: a throw-away authority, a coordinator's listener, and sites over real sockets of this machine.

Run as a program it is one site in a process of its own: ``fleet_harness.py ADDRESS HOME DIGEST NODE-CONFIG AHEAD``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Message, RecordDict

from quorsum import flower
from quorsum.client import fleet
from quorsum.client.worker import Worker
from quorsum.crypto import certificates
from quorsum.server.fleet import FleetServer

APP = """
import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, Message, RecordDict
from flwr.clientapp import ClientApp
{imports}
app = ClientApp({mods})

@app.train()
def train(message, context):
    model = message.content.array_records["arrays"]
    step = 0.01 * (1 + context.node_config["partition-id"] / 10)
    moved = {{k: Array((a.numpy() + step).astype(np.float32)) for k, a in model.items()}}
    metrics = MetricRecord({{"num-examples": 10}})
    return Message(RecordDict({{"arrays": ArrayRecord(moved), "metrics": metrics}}), reply_to=message)

@app.evaluate()
def evaluate(message, context):
    return Message(RecordDict({{"metrics": MetricRecord({{"num-examples": 5, "accuracy": 0.75}})}}), reply_to=message)
"""

PYPROJECT = """
[project]
name = "{name}"
version = "1.0.0"

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
clientapp = "{package}.client_app:app"
serverapp = "{package}.server_app:app"

[tool.flwr.app.config]
rounds = 2
depth.layers = 3
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def until(happened: Callable[[], Any], seconds: float = 30) -> Any:
    """Wait for something and return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = happened()
        if result:
            return result
        time.sleep(0.02)
    raise TimeoutError("it did not happen")


def app_folder(
    folder: Path, *, name: str = "tiny", package: str = "tiny", code: str | None = None, sealed: bool = False
) -> Path:
    """An app of Flower with NumPy only."""
    (folder / package).mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT.format(name=name, package=package))
    (folder / package / "__init__.py").write_text("")
    mods, imports = ("mods=[seal()]", "from quorsum.client import seal") if sealed else ("", "")
    (folder / package / "client_app.py").write_text(APP.format(mods=mods, imports=imports) if code is None else code)
    (folder / package / "server_app.py").write_text("from flwr.serverapp import ServerApp\napp = ServerApp()\n")
    return folder


class Authority:
    """A certificate authority in a folder."""

    def __init__(self, folder: Path, name: str = "test federation") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.key, certificate = certificates.make_authority(name, datetime.now(UTC))
        self.certificate = folder / "ca.crt"
        self.certificate.write_bytes(certificate)

    def issue(
        self, name: str, *, server: bool = False, lifetime: timedelta = timedelta(hours=1), ago: timedelta = timedelta()
    ) -> tuple[Path, Path]:
        """Certificate and key of somebody."""
        key = certificates.make_key()
        hosts = ("localhost", "127.0.0.1") if server else ()
        certificate = certificates.issue(
            self.key,
            self.certificate.read_bytes(),
            certificates.make_request(key, name),
            datetime.now(UTC) - ago,
            lifetime,
            hosts=hosts,
            server=server,
        )
        paths = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        paths[0].write_bytes(certificate)
        paths[1].write_bytes(key)
        return paths


@dataclass
class Site:
    """One site: its files, and what answers there."""

    name: str
    home: Path
    authority: Authority
    node_id: int = 0
    states: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.home.mkdir(mode=0o700, parents=True)
        certificate, key = self.authority.issue(self.name)
        (self.home / "tls.crt").write_bytes(certificate.read_bytes())
        (self.home / "tls.key").write_bytes(key.read_bytes())
        (self.home / "ca.crt").write_bytes(self.authority.certificate.read_bytes())
        (self.home / "node.key").write_bytes(certificates.make_key())

    @property
    def credentials(self) -> fleet.Credentials:
        return credentials(self.home)

    @property
    def public_node_key(self) -> bytes:
        return certificates.public_key((self.home / "node.key").read_bytes())

    def client(self, address: str, **options: Any) -> flower.FleetClient:
        """Flower's Fleet API as this site, by hand."""
        return flower.FleetClient(address, self.credentials.context(), self.credentials.node(), **options)

    def run_here(self, address: str, handle: fleet.Handler, **options: Any) -> None:
        """Serve in a thread of this process."""
        self.stop.clear()
        self.thread = threading.Thread(
            target=fleet.serve,
            args=(address, self.credentials, handle),
            kwargs={"stop": self.stop, "on_state": self.states.append, "beat": 0.5, **options},
            daemon=True,
        )
        self.thread.start()

    def run_in_process(self, address: str, digest: str, node_config: dict[str, Any], *, ahead: int = 0) -> None:
        """Serve in a process of its own, with a worker, and with a clock that is fast by so many seconds."""
        log = (self.home / "log").open("ab")
        arguments = [sys.executable, __file__, address, str(self.home), digest, json.dumps(node_config), str(ahead)]
        self.process = subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True)

    def kill(self) -> None:
        """As if the power had failed."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def end(self) -> None:
        self.kill()
        self.stop.set()
        if self.thread is not None:
            self.thread.join(15)


def credentials(home: Path) -> fleet.Credentials:
    return fleet.Credentials(home / "tls.crt", home / "tls.key", home / "ca.crt", home / "node.key")


class Fleet:
    """A coordinator's listener and its sites."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.authority = Authority(folder / "authority")
        self.certificate, self.key = self.authority.issue("coordinator", server=True)
        self.options = {"lease": 3.0, "hold": 0.3, **options}
        self.port = free_port()
        self.sites: list[Site] = []
        self.server = self.make_server()

    def make_server(self) -> FleetServer:
        return FleetServer(
            "127.0.0.1", self.port, self.certificate, self.key, self.authority.certificate, **self.options
        )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def add_site(self, *, register: bool = True) -> Site:
        site = Site(f"site-{len(self.sites) + 1:02d}", self.folder / f"home{len(self.sites) + 1}", self.authority)
        if register:
            site.node_id = self.server.register(site.public_node_key, site.name)
        self.sites.append(site)
        return site

    def online(self) -> int:
        return sum(node.online for node in self.server.nodes().values())

    def restart(self) -> None:
        """A new process of the coordinator, as far as sites can tell."""
        self.server.stop()
        self.server = self.make_server()
        for site in self.sites:
            site.node_id = self.server.register(site.public_node_key, site.name)
        self.server.start()


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[Fleet]:
    fleet_ = Fleet(folder, **options)
    fleet_.server.start()
    try:
        yield fleet_
    finally:
        for site in fleet_.sites:
            site.stop.set()
        for site in fleet_.sites:
            site.end()
        fleet_.server.stop()


def echo(message: Message, bundle: bytes, run: flower.Run) -> Message:
    """Answers with what it was sent."""
    return Message(message.content, reply_to=message)


def raw(data: bytes, name: str = "data") -> RecordDict:
    """A content with one array of raw bytes."""
    return RecordDict({name: ArrayRecord({"0": Array("uint8", (len(data),), "raw", data)})})


def data_of(message: Message, name: str = "data") -> bytes:
    return message.content.array_records[name]["0"].data


def ask(fleet_: Fleet, path: str, body: bytes = b"", *, method: str = "POST", who: Path | None = None) -> bytes:
    """A request written by hand, as the holder of a home's certificate; the answer, as far as it came."""
    context = ssl.create_default_context(cafile=fleet_.authority.certificate)
    if who is not None:
        context.load_cert_chain(who / "tls.crt", who / "tls.key")
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/protobuf\r\nConnection: close\r\n"
    with (
        socket.create_connection(("127.0.0.1", fleet_.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as s,
    ):
        s.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return b"".join(iter(lambda: s.recv(65536), b""))


def main() -> None:
    address, home, digest, node_config, ahead = sys.argv[1:]
    flower.quiet()
    right = flower.now
    flower.now = lambda: right() + timedelta(seconds=int(ahead))  # type: ignore[attr-defined]
    worker = Worker(Path(home), lambda: {digest}, json.loads(node_config))
    fleet.serve(
        address,
        credentials(Path(home)),
        worker.handle,
        stop=threading.Event(),
        on_state=lambda state: print(f"{time.time():.2f} {state}", flush=True),
        clock_offset=lambda: -float(ahead),
        memory=Path(home) / "connected",
        beat=0.5,
    )


if __name__ == "__main__":
    main()
