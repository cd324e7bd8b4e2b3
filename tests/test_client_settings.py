"""What an administrator can set, and what is refused."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from filelock import FileLock
from fleet_harness import app_folder
from hypothesis import given
from hypothesis import strategies as st

from quorsum import bundles
from quorsum.client import settings
from quorsum.client.home import SiteHome
from quorsum.client.keys import ACCEPT_SMALL, LEAST_COLLUDE, NODE_CONFIG_KEY
from quorsum.config import SiteConfig
from quorsum.errors import KeyMaterialError, Refusal, UsageError

CONFIG = SiteConfig(
    site="a", federation="lab", enrollment_address="x:1", members_address="x:2", fleet_address="x:3"
)  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> SiteHome:
    made = SiteHome(tmp_path / "home")
    made.create()
    made.write_config(CONFIG)
    return made


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x=3", 3), ("x=-3", -3), ("x=0.5", 0.5), ("x=true", True), ("x=false", False), ("x=/srv/data", "/srv/data"),
        ('x="3"', "3"), ("x=", ""), ("x=a=b", "a=b"), ("x=nan", "nan"), ("x=[1]", "[1]"),
        ("x=2026-01-01", "2026-01-01"), ("x=True", "True"),
    ],
)  # fmt: skip
def test_values_are_typed(text: str, value: object) -> None:
    (found,) = settings.parse_settings([text]).values()
    assert (found, type(found)) == (value, type(value))


@given(st.text(max_size=60))
def test_any_text_is_a_setting_or_refused(text: str) -> None:
    try:
        found = settings.parse_settings([text])
    except UsageError:
        return
    assert len(found) == 1


@given(st.one_of(st.booleans(), st.integers(-(2**63) + 1, 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False)))
def test_scalars_come_back(value: bool | int | float) -> None:
    assert settings.parse_settings([f"x={json.dumps(value)}"]) == {"x": value}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data-path", "write key=value"),
        ("9=1", "write key=value"),
        ("=1", "write key=value"),
        (f"x={2**63}", "63 bits"),
        ("x=a\nb", "one line"),
        ("x=" + "y" * 4097, "4096"),
    ],
)
def test_what_is_no_setting_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        settings.parse_settings([text])


def test_policy_and_node_config_are_told_apart(home: SiteHome) -> None:
    wanted = settings.parse_settings(
        ["minimum-sites=5", "least-collude=2", "accept-small-models=true", "suite=ckks", "data-path=/srv"]
    )
    new = settings.change(home, wanted)
    assert new == home.config()
    assert (new.minimum_sites, new.least_collude, new.accept_small_models, new.suite_key) == (5, 2, True, "suite.key")
    assert settings.node_config(new) == {
        "data-path": "/srv", "site-name": "a", ACCEPT_SMALL: True, LEAST_COLLUDE: 2
    }  # fmt: skip
    back = settings.change(home, settings.parse_settings(["suite=sealed", "data-path=", "never-set="]))
    assert (back.suite_key, back.node_config) == (None, {})


def test_a_key_of_ones_own_is_named_to_the_mod() -> None:
    config = settings.changed(CONFIG, {"suite-key": "/k"})
    assert settings.node_config(config)[NODE_CONFIG_KEY] == "/k"
    assert settings.changed(config, {"suite-key": ""}).suite_key is None


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("minimum-sites", "three", "minimum-sites: input should be a valid integer"),
        ("minimum-sites", 0, "minimum-sites: input should be greater"),
        ("least-collude", 0, "least-collude"),
        ("accept-small-models", 1, "accept-small-models"),
        ("suite", "rot13", "sealed or ckks"),
        ("site-name", "b", "set by the site itself"),
        ("quorsum-home", "/srv", "set by the site itself"),
        ("quorsum-accept-small-models", True, "set by the site itself"),
    ],
)
def test_what_may_not_be_set_is_refused(key: str, value: settings.Value, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        settings.changed(CONFIG, {key: value})


def test_an_app_is_allowed_and_disallowed(home: SiteHome, tmp_path: Path) -> None:
    folder = app_folder(tmp_path / "app")
    entry = settings.bundle_of(str(folder))
    assert entry == settings.Allowed(bundles.digest(bundles.build(folder)), "tests/tiny 1.0.0")
    other = settings.bundle_of("0" * 64)
    settings.allow(home, [entry, other, entry], clock=lambda: 0)
    assert home.config().allow == [entry.digest, other.digest]
    assert settings.allowed(home) == (
        settings.Allowed(entry.digest, "tests/tiny 1.0.0", "1970-01-01T00:00:00Z"),
        settings.Allowed("0" * 64, "", "1970-01-01T00:00:00Z"),
    )
    # A digest alone does not make its name forgotten.
    settings.allow(home, [settings.Allowed(entry.digest)])
    assert settings.allowed(home)[0].name == "tests/tiny 1.0.0"
    settings.disallow(home, [entry.digest])
    assert [one.digest for one in settings.allowed(home)] == ["0" * 64]
    with pytest.raises(Refusal, match="not on the list") as caught:
        settings.disallow(home, ["0" * 64, entry.digest])
    assert caught.value.code == "not-allowed"
    assert home.config().allow == ["0" * 64]


def test_damaged_names_are_no_harm(home: SiteHome) -> None:
    settings.allow(home, [settings.Allowed("0" * 64, "x")])
    (home.path / "allowed.json").write_text("{")
    assert settings.allowed(home) == (settings.Allowed("0" * 64),)


@pytest.mark.parametrize("text", ["nowhere", "0" * 63, "A" * 64])
def test_neither_folder_nor_digest(text: str) -> None:
    with pytest.raises(UsageError, match="neither a folder nor a digest"):
        settings.bundle_of(text)


def test_a_folder_that_is_no_app(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a Flower app"):
        settings.bundle_of(str(tmp_path))


def test_a_site_that_is_not_enrolled_has_no_settings(tmp_path: Path) -> None:
    with pytest.raises(KeyMaterialError, match="quorsum site enroll"):
        settings.change(SiteHome(tmp_path), {"x": 1})


def test_commands_at_the_same_time_lose_nothing(home: SiteHome) -> None:
    digests = [f"{k:064x}" for k in range(20)]
    threads = [
        threading.Thread(target=settings.allow, args=(home, [settings.Allowed(digest)])) for digest in digests
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(home.config().allow) == digests


def test_a_lock_that_is_held_is_named(home: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_PATIENCE", 0.1)
    with FileLock(home.path / "site.toml.lock"), pytest.raises(UsageError, match="another quorsum site command"):
        settings.change(home, {"x": 1})
