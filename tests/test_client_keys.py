"""Keys and records on a site's disk: born there, readable by their owner only, never silently replaced."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from federation import context
from flwr.app import Context, RecordDict

from quorsum.client.keys import configured_suite, load_identity, load_site_key
from quorsum.client.ledger import FolderLedger, recall, remember, take_round
from quorsum.crypto import CkksSite, SealedSite, generate_site_key
from quorsum.errors import CoordinatorFault, KeyMaterialError


def node(**config: Any) -> Context:
    return Context(1, 2, dict(config), RecordDict(), {})


def test_identity_is_born_at_the_site_and_stays_the_same(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    first = load_identity(home)
    path = home / "identity.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_identity(home).public() == first.public()
    assert path.read_bytes() == first.to_bytes()


def test_identity_that_others_can_read_is_refused(tmp_path: Path) -> None:
    load_identity(tmp_path)
    (tmp_path / "identity.key").chmod(0o644)
    with pytest.raises(KeyMaterialError, match="chmod 600") as refusal:
        load_identity(tmp_path)
    assert refusal.value.code == "key-readable"


def test_identity_that_is_damaged_is_refused_and_kept(tmp_path: Path) -> None:
    load_identity(tmp_path)
    path = tmp_path / "identity.key"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(KeyMaterialError):
        load_identity(tmp_path)
    assert path.exists()


def test_home_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyMaterialError, match="quorsum-home"):
        load_identity(tmp_path / "file" / "home")


def test_site_key_is_read_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    with pytest.raises(KeyMaterialError, match="quorsum keygen") as refusal:
        load_site_key(path)
    assert refusal.value.code == "no-key"
    key = generate_site_key(os.urandom)
    path.write_bytes(key.to_bytes())
    path.chmod(0o640)
    with pytest.raises(KeyMaterialError) as refusal:
        load_site_key(path)
    assert refusal.value.code == "key-readable"
    path.chmod(0o600)
    assert load_site_key(path).key_id == key.key_id


def test_suite_follows_from_the_nodes_config(tmp_path: Path) -> None:
    sealed = configured_suite(node(**{"quorsum-home": str(tmp_path), "quorsum-least-collude": 2}))
    assert isinstance(sealed, SealedSite)
    assert (sealed.accept_small_models, sealed.least_collude) == (False, 2)
    path = tmp_path / "site.key"
    path.write_bytes(generate_site_key(os.urandom).to_bytes())
    path.chmod(0o600)
    assert isinstance(configured_suite(node(**{"quorsum-key": str(path)})), CkksSite)
    with pytest.raises(KeyMaterialError, match="quorsum-home"):
        configured_suite(node())


def test_ledger_in_a_folder_survives_a_restart(tmp_path: Path) -> None:
    take_round(FolderLedger(tmp_path), context(1))
    remember(FolderLedger(tmp_path), context(1), b"state", (b"one", b"", b"three"))
    book = FolderLedger(tmp_path)
    assert recall(book, context(1).digest().hex()) == (context(1), b"state")
    assert book.read_upload() == (b"one", b"", b"three")
    with pytest.raises(CoordinatorFault) as fault:
        take_round(book, context(1))
    assert fault.value.code == "replayed-round"


@pytest.mark.parametrize("content", ["", "{", "null", "{}", "[]", '{"seen": {}}'])
def test_damaged_ledger_is_no_empty_ledger(tmp_path: Path, content: str) -> None:
    take_round(FolderLedger(tmp_path), context(1))
    (tmp_path / "ledger.json").write_text(content)
    with pytest.raises(KeyMaterialError) as refusal:
        take_round(FolderLedger(tmp_path), context(2))
    assert refusal.value.code == "ledger-damaged"
