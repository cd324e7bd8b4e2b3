"""quorsum: federated learning that is sealed and honest at the same time."""

from __future__ import annotations

__version__ = "0.1.0"
