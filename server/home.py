"""The coordinator's folder.

    coordinator.toml  configuration          state.db       who may join, who has, runs, rounds, the log
    ca.key, ca.crt    the authority          server.key, server.crt  of the ports, renewed by the process
    runs/ID/          app and journal of each run            status.json  what the process says of itself
    coordinator.lock  held by the process

The folder has mode 0700, its files 0600. The keys are made here, never sent, and never overwritten.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from quorsum.config import CoordinatorConfig, load, write
from quorsum.errors import KeyMaterialError, UsageError
from quorsum.homes import COORDINATOR_HOME
from quorsum.server.authority import create_authority
from quorsum.server.store import Store

__all__ = ["DEFAULT_HOME", "HOME_VARIABLE", "CoordinatorHome"]

HOME_VARIABLE: Final = COORDINATOR_HOME.variable
DEFAULT_HOME: Final = COORDINATOR_HOME.folder


@dataclass(frozen=True)
class CoordinatorHome:
    """The coordinator's folder.

    Attributes:
        path: of the folder.
    """

    path: Path

    def command(self, *words: str) -> str:
        """A command of quorsum as it must be typed to mean this folder."""
        return COORDINATOR_HOME.command(self.path, *words)

    @property
    def config_file(self) -> Path:
        """The configuration."""
        return self.path / "coordinator.toml"

    @property
    def state_file(self) -> Path:
        """The state that process and command line share."""
        return self.path / "state.db"

    @property
    def runs(self) -> Path:
        """One folder for each run."""
        return self.path / "runs"

    @property
    def status_file(self) -> Path:
        """What the process says of itself."""
        return self.path / "status.json"

    @property
    def lock_file(self) -> Path:
        """Held by the process."""
        return self.path / "coordinator.lock"

    def create(self, config: CoordinatorConfig, now: datetime) -> None:
        """Make the folder, the authority, the state and the configuration.

        Raises:
            UsageError: there is something in the folder already, or it cannot be made.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                raise UsageError(f"{self.path} is not empty and is left as it is; choose another --home")
            # A folder that was there, empty, may have been open to others.
            self.path.chmod(0o700)
        except OSError as error:
            raise UsageError(f"cannot make {self.path}: {error.strerror}; choose another --home") from None
        create_authority(self.path, config.federation, now)
        Store(self.state_file).close()
        # Last: a home without it was not finished and is not taken for one.
        write(self.config_file, config)

    def config(self) -> CoordinatorConfig:
        """The configuration.

        Raises:
            UsageError: this is no coordinator's home, or the file is wrong.
            KeyMaterialError: ``home-readable``: others may look into the folder.
        """
        if not self.config_file.exists():
            raise UsageError(
                f"{self.path} is no coordinator's home; make one with: {self.command('coordinator', 'init')}"
            )
        mode = stat.S_IMODE(self.path.stat().st_mode)
        if os.name == "posix" and mode & 0o077:
            raise KeyMaterialError(
                "home-readable", f"others may look into {self.path} (mode {mode:04o}); run: chmod 700 {self.path}"
            )
        return load(self.config_file, CoordinatorConfig)

    def store(self) -> Store:
        """The state, opened.

        Raises:
            UsageError: this is no coordinator's home.
            KeyMaterialError: others may read it.
            DataError: it cannot be used.
        """
        self.config()
        if not self.state_file.exists():
            raise UsageError(f"{self.state_file} is missing; restore it from a backup, or begin anew with another home")
        return Store(self.state_file)

    def run_folder(self, run: int) -> Path:
        """The folder of a run."""
        return self.runs / str(run)
