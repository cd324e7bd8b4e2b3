"""A site's folder: keys are made once and kept, and a roster only changes as it may."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from quorsum.client.home import SiteHome, check_roster
from quorsum.crypto import Identity
from quorsum.enrollment import Member
from quorsum.errors import CoordinatorFault, KeyMaterialError

KEYS = {name: Identity.generate(os.urandom).public().hex for name in ("a", "b", "c", "b2")}


def member(name: str, state: str = "approved", key: str | None = None) -> Member:
    return Member.model_validate({"site": name, "identity": KEYS[key or name], "state": state})


def test_keys_are_made_once_readable_by_their_owner_only(tmp_path: Path) -> None:
    home = SiteHome(tmp_path / "x" / "home")
    home.create()
    made = (home.identity().to_bytes(), home.node_key(), home.tls_key())
    assert (home.identity().to_bytes(), home.node_key(), home.tls_key()) == made
    assert home.node_key() != home.tls_key()
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.path.iterdir()} == dict.fromkeys(
        ["identity.key", "node.key", "tls.key"], 0o600
    )


def test_two_that_make_the_keys_at_once_get_the_same(tmp_path: Path) -> None:
    home = SiteHome(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: (home.node_key(), home.identity().to_bytes()), range(16)))
    assert len(keys) == 1


@pytest.mark.parametrize("name", ["identity", "node_key", "tls_key"])
def test_key_that_others_can_read_or_that_is_damaged_is_refused(tmp_path: Path, name: str) -> None:
    home = SiteHome(tmp_path)
    read: Callable[[], object] = getattr(home, name)
    read()
    (path,) = tmp_path.iterdir()
    path.chmod(0o644)
    with pytest.raises(KeyMaterialError, match="chmod 600"):
        read()
    path.chmod(0o600)
    path.write_bytes(b"")
    with pytest.raises(KeyMaterialError):
        read()
    assert path.read_bytes() == b""


def test_folder_that_others_look_into(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o755)
    with pytest.raises(KeyMaterialError, match="chmod 700") as refusal:
        SiteHome(tmp_path / "home").create()
    assert refusal.value.code == "home-readable"
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyMaterialError, match="another home"):
        SiteHome(tmp_path / "file" / "home").create()


def test_roster_is_pinned(tmp_path: Path) -> None:
    home = SiteHome(tmp_path)
    own = Member(site="a", identity=home.identity().public().hex, state="approved")
    assert home.roster() == ()
    home.pin([own, member("b")], "a")
    assert home.roster() == (own, member("b"))
    epoch = home.epoch()
    home.pin([own, member("b", "revoked"), member("b", key="b2")], "a")
    assert home.epoch() != epoch
    with pytest.raises(CoordinatorFault):
        home.pin([own, member("b", key="b2")], "a")
    home.roster_file.write_text("{}")
    with pytest.raises(KeyMaterialError) as refusal:
        home.roster()
    assert refusal.value.code == "roster-damaged"


def test_damaged_list_of_keys(tmp_path: Path) -> None:
    home = SiteHome(tmp_path)
    home.write_suite_key(b"one", "id", "ab" * 32)
    assert home.suite_epochs() == {"ab" * 32: "id"}
    home.suite_epochs_file.write_text("[]")
    with pytest.raises(KeyMaterialError) as refusal:
        home.suite_epochs()
    assert refusal.value.code == "suite-damaged"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], [member("a")]),
        ([member("a")], [member("a"), member("b")]),
        ([member("a"), member("b")], [member("b"), member("a")]),
        ([member("a"), member("b")], [member("a"), member("b", "revoked")]),
        ([member("a"), member("b")], [member("a"), member("b", "left"), member("b", key="b2")]),
        ([member("a"), member("b", "revoked")], [member("a"), member("b", "revoked"), member("b", key="b2")]),
    ],
)
def test_what_may_follow(before: list[Member], after: list[Member]) -> None:
    check_roster(before, after, "a", KEYS["a"])


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ([member("a"), member("b")], [member("a")], "never revoked"),
        ([member("a"), member("b")], [member("a"), member("b", key="b2")], "never revoked"),
        ([member("a"), member("b")], [member("a"), member("b"), member("b", key="b2")], "two approved keys"),
        ([member("a"), member("b", "revoked")], [member("a"), member("b")], "was revoked and is approved"),
        ([member("a"), member("b", "left")], [member("a"), member("b", "revoked")], "was left and is revoked"),
        ([member("a"), member("b", "revoked")], [member("a")], "never revoked"),
        ([], [member("a"), member("a", "revoked")], "twice"),
        ([], [member("b")], "this site, a"),
        ([], [member("a", "revoked")], "this site, a"),
        ([], [member("a", key="b2")], "this site, a"),
    ],
)
def test_what_may_not_follow(before: list[Member], after: list[Member], complaint: str) -> None:
    with pytest.raises(CoordinatorFault, match=complaint) as fault:
        check_roster(before, after, "a", KEYS["a"])
    assert fault.value.code == "roster-changed"
