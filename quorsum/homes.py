"""Where the folders of a coordinator and of a site are, and how a command is typed so that it means one of them.

This module imports only the standard library, so that it costs a command no time.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["COORDINATOR_HOME", "SITE_HOME", "UsualHome"]


@dataclass(frozen=True)
class UsualHome:
    """Where a folder is looked for when nobody says where it is.

    Attributes:
        variable: of the environment, in place of ``folder``.
        folder: else.
    """

    variable: str
    folder: Path

    def command(self, home: Path, *words: str) -> str:
        """A command of quorsum as it must be typed to mean the folder ``home``, quoted for a shell."""
        usual = Path(os.environ.get(self.variable) or self.folder)
        where = () if home.absolute() == usual.absolute() else ("--home", str(home))
        return shlex.join(("quorsum", *words, *where))


COORDINATOR_HOME: Final = UsualHome("QUORSUM_COORDINATOR_HOME", Path("quorsum-coordinator"))
SITE_HOME: Final = UsualHome("QUORSUM_SITE_HOME", Path("quorsum-site"))
