"""Configuration files: what is wrong is named with its file, key and line."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from quorsum.config import CoordinatorConfig, SiteConfig, load, replace_file, write
from quorsum.errors import UsageError

SITE: dict[str, Any] = {
    "site": "a",
    "federation": "lab",
    "enrollment_address": "localhost:7401",
    "members_address": "localhost:7402",
    "fleet_address": "[::1]:7403",
}


def test_defaults_listen_on_this_machine_only(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text('federation = "lab"\n')
    config = load(path, CoordinatorConfig)
    assert (config.host, config.enrollment_port, config.members_port, config.fleet_port) == (
        *("127.0.0.1", 7401),
        *(7402, 7403),
    )
    assert (config.metrics_port, config.certificate_hours, config.invitation_hours) == (None, 72, 72)
    assert config.address(7401) == "localhost:7401"
    assert CoordinatorConfig(federation="x", advertise=["::1"]).address(5) == "[::1]:5"


@pytest.mark.parametrize(
    "config",
    [
        CoordinatorConfig(federation="lab", advertise=["a.example", "10.0.0.1"], metrics_port=9100, log_format="json"),
        SiteConfig(
            **SITE, allow=["ab" * 32], node_config={"x": 1, "y": "z", "b": True}, suite_key="/k", least_collude=2
        ),
    ],
)
def test_written_is_read_again(tmp_path: Path, config: CoordinatorConfig | SiteConfig) -> None:
    path = tmp_path / "c.toml"
    write(path, config)
    assert load(path, type(config)) == config
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["c.toml"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("hots = 'x'", "line 3: hots: unknown key"),
        ("host = 5", "line 3: host: "),
        ("members_port = '7402'", "line 3: members_port: "),
        ("members_port = 70000", "line 3: members_port: "),
        ("certificate_hours = 0", "line 3: certificate_hours: "),
        ("certificate_hours = inf", "line 3: certificate_hours: "),
        ("advertise = []", "line 3: advertise: "),
        ("advertise = ['a', 'b:1']", "line 3: advertise.1: "),
        ("log_format = 'xml'", "line 3: log_format: "),
        ("[table]", "line 3: table: unknown key"),
        ("a = = b", "not TOML.*line 3"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text(f'# a comment\nfederation = "lab"\n{line}\n')
    with pytest.raises(UsageError, match=f"coordinator.toml.*{complaint}"):
        load(path, CoordinatorConfig)


def test_hours_may_be_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('federation = "lab"\ncertificate_hours = 1\ninvitation_hours = 0.5\n')
    assert load(path, CoordinatorConfig).certificate_hours == 1.0


def test_missing_key(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text("")
    with pytest.raises(UsageError, match="federation: missing"):
        load(path, CoordinatorConfig)


@pytest.mark.parametrize("changes", [{"allow": ["xyz"]}, {"fleet_address": "host"}, {"minimum_sites": 0}, {"site": ""}])
def test_site_is_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        SiteConfig(**{**SITE, **changes})


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        load(tmp_path / "none.toml", SiteConfig)
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not TOML"):
        load(binary, SiteConfig)
    binary.write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(UsageError, match="not a configuration"):
        load(binary, SiteConfig)
    with pytest.raises(UsageError, match="cannot write"):
        replace_file(tmp_path / "none" / "x", b"")
