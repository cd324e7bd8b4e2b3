"""The coordinator: rounds as phases on Flower's Grid, behind a class that looks like a Flower strategy."""

from quorsum.server.records import QuorumResult, RoundRecord
from quorsum.server.strategy import QuorumStrategy

__all__ = ["QuorumResult", "QuorumStrategy", "RoundRecord"]
