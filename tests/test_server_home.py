"""The coordinator's folder: made once, readable by nobody else."""

from __future__ import annotations

import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from quorsum.config import CoordinatorConfig
from quorsum.errors import KeyMaterialError, UsageError
from quorsum.server.home import CoordinatorHome

CONFIG = CoordinatorConfig(federation="lab")


def made(path: Path) -> CoordinatorHome:
    home = CoordinatorHome(path)
    home.create(CONFIG, datetime.now(UTC))
    return home


def test_everything_in_it_is_private(tmp_path: Path) -> None:
    home = made(tmp_path / "deep" / "home")
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.path.iterdir()}
    assert set(files) >= {"coordinator.toml", "state.db", "ca.key", "ca.crt"}
    assert set(files.values()) == {0o600}
    assert home.config() == CONFIG
    home.store().close()


def test_an_empty_folder_is_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o755)
    assert stat.S_IMODE(made(tmp_path / "home").path.stat().st_mode) == 0o700


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    home = made(tmp_path / "home")
    key = (home.path / "ca.key").read_bytes()
    with pytest.raises(UsageError, match="not empty"):
        home.create(CONFIG, datetime.now(UTC))
    assert (home.path / "ca.key").read_bytes() == key
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot make"):
        made(tmp_path / "file")


def test_what_is_no_home_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quorsum coordinator init"):
        CoordinatorHome(tmp_path / "nowhere").store()
    home = made(tmp_path / "home")
    home.path.chmod(0o750)
    with pytest.raises(KeyMaterialError, match="chmod 700"):
        home.config()
    home.path.chmod(0o700)
    home.state_file.unlink()
    with pytest.raises(UsageError, match="missing"):
        home.store()
