"""The site: the mod that seals what any Flower ClientApp trained."""

from quorsum.client.mod import SealingMod, seal

__all__ = ["SealingMod", "seal"]
