"""Numbers for Prometheus."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fleet_harness import free_port

from quorsum.errors import UsageError
from quorsum.server import metrics
from quorsum.server.status import Histogram, Tally


@contextmanager
def served(tally: Tally) -> Iterator[int]:
    port = free_port()
    stop = metrics.serve(lambda: tally, port)
    try:
        yield port
    finally:
        stop()


def asked(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_what_is_counted_has_a_name() -> None:
    train = Histogram()
    for seconds in (0.2, 3.0, 9000.0):
        train.add(seconds)
    tally = Tally(
        rounds=Counter(finished=3, failed=1), phases={"train": train}, up=10.0, down=20.0,
        refusals=Counter({"late": 2}), enrollment_refusals=Counter({"invitation-used": 5}), online=4,
    )  # fmt: skip
    with served(tally) as port:
        text = asked(port)
        tally.online = 5
        assert "quorsum_sites_online 5.0" in asked(port)
    for line in (
        'quorsum_rounds_total{result="finished"} 3.0',
        'quorsum_rounds_total{result="failed"} 1.0',
        'quorsum_refusals_total{code="late"} 2.0',
        'quorsum_enrollment_refusals_total{code="invitation-used"} 5.0',
        'quorsum_bytes_total{direction="up"} 10.0',
        'quorsum_bytes_total{direction="down"} 20.0',
        'quorsum_phase_seconds_bucket{le="0.25",phase="train"} 1.0',
        'quorsum_phase_seconds_bucket{le="5.0",phase="train"} 2.0',
        'quorsum_phase_seconds_bucket{le="+Inf",phase="train"} 3.0',
        'quorsum_phase_seconds_count{phase="train"} 3.0',
        'quorsum_phase_seconds_sum{phase="train"} 9003.2',
        "quorsum_sites_online 4.0",
    ):
        assert line in text.splitlines()
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    assert all(name.startswith("quorsum_") for name in names)
    assert {label for found in re.findall(r"\{(.*?)\}", text) for label in re.findall(r"(\w+)=", found)} == {
        "result", "code", "direction", "phase", "le",
    }  # fmt: skip


def test_only_this_machine_is_answered() -> None:
    with served(Tally()) as port:
        for address in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)}:
            if not str(address).startswith("127."):
                with pytest.raises(OSError), socket.create_connection((address, port), timeout=2):  # noqa: PT011
                    pass
        with pytest.raises(UsageError, match="metrics_port"):
            metrics.serve(Tally, port)
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):  # noqa: PT011
        pass
