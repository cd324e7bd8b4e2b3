"""The site: the mod that seals what any Flower ClientApp trained."""

from quorsum.client.mod import SealingMod, seal
from quorsum.client.momentum import site_momentum

__all__ = ["SealingMod", "seal", "site_momentum"]
