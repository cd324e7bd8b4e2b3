"""Sealing, measuring, combining and opening updates: numbers and bytes in, numbers and bytes out."""

from __future__ import annotations

from quorsum.crypto.checks import RATIO_TOLERANCE, check_opened
from quorsum.crypto.ckks_coordinator import CkksCoordinator, CkksUpload
from quorsum.crypto.ckks_keys import CkksSiteKey, generate_site_key
from quorsum.crypto.ckks_parameters import CKKS_V1, CkksParameters
from quorsum.crypto.ckks_site import CkksSite
from quorsum.crypto.dialogue import run_dialogue
from quorsum.crypto.identity import Identity
from quorsum.crypto.plain import PlainCoordinator, PlainSite, PlainUpload
from quorsum.crypto.sealed_coordinator import SealedCoordinator
from quorsum.crypto.sealed_site import SealedSite
from quorsum.crypto.suite import (
    Ask,
    Blocks,
    CoordinatorSuite,
    Dialogue,
    Measured,
    Opened,
    RandomBytes,
    RoundContext,
    Site,
    SiteSuite,
    Vector,
)

__all__ = [
    "CKKS_V1",
    "RATIO_TOLERANCE",
    "Ask",
    "Blocks",
    "CkksCoordinator",
    "CkksParameters",
    "CkksSite",
    "CkksSiteKey",
    "CkksUpload",
    "CoordinatorSuite",
    "Dialogue",
    "Identity",
    "Measured",
    "Opened",
    "PlainCoordinator",
    "PlainSite",
    "PlainUpload",
    "RandomBytes",
    "RoundContext",
    "SealedCoordinator",
    "SealedSite",
    "Site",
    "SiteSuite",
    "Vector",
    "check_opened",
    "generate_site_key",
    "run_dialogue",
]
