"""Commands that people are told to type: complete, and quoted for a shell."""

from __future__ import annotations

from pathlib import Path

import pytest

from quorsum.homes import SITE_HOME


@pytest.mark.parametrize(
    ("variable", "home", "typed"),
    [
        (None, "quorsum-site", "quorsum site start"),
        (None, "other", "quorsum site start --home other"),
        (None, "/srv/the site", "quorsum site start --home '/srv/the site'"),
        ("/srv/site", "/srv/site", "quorsum site start"),
        ("/srv/site", "quorsum-site", "quorsum site start --home quorsum-site"),
        ("", "quorsum-site", "quorsum site start"),
    ],
)
def test_a_command_names_the_folder_it_means(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, home: str, typed: str
) -> None:
    monkeypatch.delenv(SITE_HOME.variable, raising=False)
    if variable is not None:
        monkeypatch.setenv(SITE_HOME.variable, variable)
    assert SITE_HOME.command(Path(home), "site", "start") == typed
    if not Path(home).is_absolute():
        assert SITE_HOME.command(Path(home).absolute(), "site", "start").startswith("quorsum site start")
        assert ("--home" in SITE_HOME.command(Path(home).absolute(), "site", "start")) == ("--home" in typed)
