"""Numbers for Prometheus, on this machine only: how the coordinator does, nothing about anybody's data.

What is counted is in :class:`~quorsum.server.status.Tally`; here it gets its names. No label holds the name of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from quorsum.errors import UsageError
from quorsum.server.status import BUCKETS, Tally

__all__ = ["HOST", "TallyCollector", "serve"]

HOST: Final = "127.0.0.1"


class TallyCollector(Collector):
    """Turns what was counted into metrics, whenever somebody asks.

    Args:
        counted: gives the numbers.
    """

    def __init__(self, counted: Callable[[], Tally]) -> None:
        self._counted = counted

    def collect(self) -> Iterator[Metric]:
        """The metrics; every name begins with ``quorsum_``."""
        tally = self._counted()
        for name, text, label, counts in (
            ("quorsum_rounds", "Rounds played, by result.", "result", tally.rounds),
            ("quorsum_refusals", "Sites left out of a round, by reason.", "code", tally.refusals),
            (
                "quorsum_enrollment_refusals",
                "Calls refused on the ports of enrollment and members, by reason.",
                "code",
                tally.enrollment_refusals,
            ),
        ):
            counter = CounterMetricFamily(name, text, labels=[label])
            for value, count in sorted(counts.items()):
                counter.add_metric([value], count)
            yield counter
        moved = CounterMetricFamily("quorsum_bytes", "Bytes of updates, models and answers.", labels=["direction"])
        moved.add_metric(["up"], tally.up)
        moved.add_metric(["down"], tally.down)
        yield moved
        phases = HistogramMetricFamily("quorsum_phase_seconds", "How long phases took.", labels=["phase"])
        ends = [*map(str, BUCKETS), "+Inf"]
        for phase, histogram in sorted(tally.phases.items()):
            phases.add_metric([phase], list(zip(ends, accumulate(histogram.counts), strict=True)), histogram.total)
        yield phases
        yield GaugeMetricFamily("quorsum_sites_online", "Connected members.", value=tally.online)


def serve(counted: Callable[[], Tally], port: int) -> Callable[[], None]:
    """Listen on 127.0.0.1.

    Args:
        counted: gives the numbers.
        port: TCP.

    Returns:
        what ends it.

    Raises:
        UsageError: another program has the port.
    """
    registry = CollectorRegistry()
    registry.register(TallyCollector(counted))
    try:
        server, thread = start_http_server(port, HOST, registry)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {HOST}:{port}: {error.strerror}; change metrics_port in coordinator.toml"
        ) from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
