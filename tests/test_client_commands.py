"""``quorsum site ...`` as an administrator types it, against a real coordinator: words, exit status, and next steps."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_harness import app_folder, until
from site_federation import QUORSUM, Federation, federation, site, typed

from quorsum import bundles
from quorsum.client.home import SiteHome
from quorsum.crypto.sealed_parameters import SEALED_V1
from quorsum.invitation import PREFIX, Invitation, encode

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "hospital"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("lab")) as made:
        yield made


@pytest.fixture(scope="module")
def member(lab: Federation) -> str:
    """The home of a site that only looks around."""
    return lab.member("onlooker")


def test_one_pasted_line_joins(lab: Federation) -> None:
    home, invitation = lab.home("clinic"), lab.invitation("clinic")
    enrolling = lab.start(
        "enroll", "--home", home, "--allow", str(EXAMPLE), "--set", "data-shard=1", "--json", text=invitation + "\n"
    )
    said = enrolling.wait_for("quorsum coordinator approve clinic")
    kept = Path(home) / "invitation"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    words = lab.approve("clinic")
    assert enrolling.process.wait(60) == 0
    fingerprint, address = lab.coordinator.authority.fingerprint, lab.coordinator.service.enrollment_address
    assert said.splitlines() == [
        f"quorsum: clinic joins the coordinator at {address}",
        f"quorsum: its authority has the fingerprint {fingerprint}",
        f"quorsum: the six words of this site: {words}",
        "quorsum: read these words to the coordinator's operator, who runs: quorsum coordinator approve clinic",
    ]
    said = enrolling.said()
    assert "quorsum: clinic is a member of lab; its certificate is valid until" in said
    digest = bundles.digest(bundles.build(EXAMPLE))
    assert f"quorsum: allowed here: quorsum/hospital 1.0.0, {digest}" in said
    assert f"quorsum: next: quorsum site start --home {home}" in said
    result = json.loads(said[said.index("{") : said.index("}") + 1])
    assert (result["schema_version"], result["site"], result["allow"]) == (1, "clinic", [digest])
    assert invitation[6:] not in said
    assert not kept.exists()
    config = SiteHome(Path(home)).config()
    assert (config.allow, config.node_config) == ([digest], {"data-shard": 1})
    for path in Path(home).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path

    # Once more, with nothing to paste: what it has to say is said, and nothing is lost.
    again = site("enroll", "--home", home, "--set", "data-shard=2")
    assert again.returncode == 0
    assert "is the home of clinic, a member of lab already" in again.stderr
    config = SiteHome(Path(home)).config()
    assert (config.allow, config.node_config) == ([digest], {"data-shard": 2})


def test_an_enrollment_is_interrupted_and_goes_on_without_a_new_invitation(lab: Federation) -> None:
    home = lab.home("broken-off")
    first = lab.start("enroll", "--home", home, text=lab.invitation("broken-off"))
    first.wait_for("six words")
    first.process.send_signal(signal.SIGINT)
    assert first.process.wait(30) == 130
    assert f"no new invitation is needed, go on with: quorsum site enroll --home {home}" in first.said()
    keys = {name: (Path(home) / name).read_bytes() for name in ("identity.key", "node.key", "tls.key")}
    killed = lab.start("enroll", "--home", home)
    killed.wait_for("six words")
    killed.process.kill()
    killed.process.wait()
    last = lab.start("enroll", "--home", home)
    words = lab.approve("broken-off")
    assert last.process.wait(60) == 0, last.said()
    assert words in first.said()
    assert keys == {name: (Path(home) / name).read_bytes() for name in keys}


def test_on_a_terminal_the_invitation_is_asked_for_and_not_shown(lab: Federation) -> None:
    invitation = lab.invitation("ward")
    approving = threading.Thread(target=lab.approve, args=("ward",))
    approving.start()
    code, shown = typed("enroll", "--home", lab.home("ward"), answers=[("paste the invitation", invitation + "\n")])
    approving.join()
    assert code == 0, shown
    assert invitation[6:] not in shown
    assert "ward is a member of lab" in shown


def test_an_invitation_on_the_command_line_is_refused_and_not_repeated(lab: Federation) -> None:
    invitation = lab.invitation("careless")
    done = site("enroll", invitation, "--home", lab.home("careless"))
    assert done.returncode == 64
    assert "never written on the command line" in done.stderr
    assert "--invitation-file" in done.stderr
    assert invitation[6:] not in done.stderr
    assert not Path(lab.home("careless")).exists()


def changed(invitation: str) -> str:
    return invitation[:-1] + ("A" if invitation[-1] != "A" else "B")


@pytest.mark.parametrize(
    ("text", "says", "code"),
    [
        ("", "no invitation was given", 64),
        ("hello", f"not an invitation: one begins with {PREFIX}", 1),
        ("qsum9-AAAA", "install the version of quorsum", 1),
        ("changed", "incomplete or was changed", 1),
        ("cut", "incomplete or was changed", 1),
    ],
)
def test_what_is_no_invitation_is_refused(lab: Federation, tmp_path: Path, text: str, says: str, code: int) -> None:
    made = {"changed": changed, "cut": lambda invitation: invitation[:-10]}
    text = made[text](lab.invitation(f"never-{text}")) if text in made else text
    done = site("enroll", "--home", str(tmp_path / "home"), text=text)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert not (tmp_path / "home").exists()


def test_a_used_invitation_is_refused_and_forgotten(lab: Federation, tmp_path: Path) -> None:
    file = tmp_path / "invitation"
    file.write_text(lab.invitation("first-come"))
    first = lab.start("enroll", "--home", lab.home("first-come"), "--invitation-file", str(file))
    lab.approve("first-come")
    assert first.process.wait(60) == 0
    second = site("enroll", "--home", str(tmp_path / "second"), "--invitation-file", str(file))
    assert second.returncode == 1
    assert "ask" in second.stderr
    assert not (tmp_path / "second" / "invitation").exists()
    other = site("enroll", "--home", lab.home("first-come"), text="", timeout=30)
    assert other.returncode == 0


def test_expired_refused_and_wrong_authority(lab: Federation, tmp_path: Path) -> None:
    expired = site("enroll", "--home", str(tmp_path / "late"), text=lab.invitation("late", hours=-1))
    assert expired.returncode == 1
    assert "expired" in expired.stderr
    address = lab.coordinator.service.enrollment_address
    stranger = encode(Invitation(address, "ab" * 32, "lured", 2**31, b"x" * 16))
    lured = site("enroll", "--home", str(tmp_path / "lured"), text=stranger)
    assert lured.returncode == 1
    assert "somebody else than the coordinator of this invitation answers" in lured.stderr
    refused = lab.start("enroll", "--home", lab.home("unwanted"), text=lab.invitation("unwanted"))
    until(lambda: lab.coordinator.store.site("unwanted"))
    lab.coordinator.store.refuse("unwanted", lab.coordinator.clock.seconds(), "tester")
    assert refused.process.wait(60) == 1
    assert "the coordinator's operator refused it; ask them why" in refused.said()
    elsewhere = site("enroll", "--home", str(tmp_path / "none"), "--invitation-file", str(tmp_path / "none"))
    assert elsewhere.returncode == 64
    assert "cannot read an invitation" in elsewhere.stderr


def test_the_home_of_another_site_is_refused(lab: Federation, member: str, tmp_path: Path) -> None:
    file = tmp_path / "invitation"
    file.write_text(lab.invitation("somebody-else"))
    done = site("enroll", "--home", member, "--invitation-file", str(file))
    assert done.returncode == 1
    assert "is the home of site onlooker, not somebody-else; choose another" in done.stderr


def test_a_coordinator_that_is_away_is_waited_for(lab: Federation, tmp_path: Path) -> None:
    away = encode(Invitation("127.0.0.1:9", "ab" * 32, "early", 2**31, b"x" * 16))
    waiting = lab.start("enroll", "--home", str(tmp_path / "early"), text=away)
    said = waiting.wait_for("no coordinator answers at 127.0.0.1:9")
    assert "is it running" in said
    waiting.process.send_signal(signal.SIGINT)
    assert waiting.process.wait(30) == 130


def test_apps_are_allowed_shown_and_disallowed(member: str, tmp_path: Path) -> None:
    empty = site("allowed", "--home", member)
    assert (empty.returncode, empty.stdout) == (0, "")
    assert f"nothing may run here yet; next: quorsum site allow APP_DIR --home {member}" in empty.stderr
    folder = app_folder(tmp_path / "app")
    digest = bundles.digest(bundles.build(folder))
    done = site("allow", str(folder), "--home", member)
    assert (done.returncode, done.stdout) == (0, f"{digest}\ttests/tiny 1.0.0\n")
    assert site("allow", "1" * 64, "--home", member).stdout == "1" * 64 + "\n"
    listed = json.loads(site("allowed", "--home", member, "--json").stdout)
    assert [one["digest"] for one in listed["allowed"]] == [digest, "1" * 64]
    assert site("allowed", "--home", member).stdout.startswith(f"{digest}\ttests/tiny 1.0.0\t20")
    assert site("disallow", digest, "1" * 64, "--home", member).returncode == 0
    again = site("disallow", digest, "--home", member)
    assert again.returncode == 1
    assert f"not on the list; see it with: quorsum site allowed --home {member}\n" in again.stderr
    wrong = site("allow", str(tmp_path / "nowhere"), "--home", member)
    assert wrong.returncode == 64
    assert "neither a folder nor a digest" in wrong.stderr


def test_settings_and_the_sentence_about_small_models(member: str) -> None:
    assert site("set", "data-path=/srv", "minimum-sites=4", "--home", member).returncode == 0
    config = SiteHome(Path(member)).config()
    assert (config.node_config, config.minimum_sites) == ({"data-path": "/srv"}, 4)
    asked = site("set", "accept-small-models=true", "--home", member)
    assert asked.returncode == 64
    assert SEALED_V1.small_model_sentence(SEALED_V1.small_dimension - 1) in asked.stderr
    assert "only with --confirm; nothing has been set" in asked.stderr
    assert not SiteHome(Path(member)).config().accept_small_models
    done = site("set", "accept-small-models=true", "--confirm", "--json", "--home", member)
    assert json.loads(done.stdout)["accept_small_models"] is True
    code, shown = typed("set", "accept-small-models=true", "--home", member, answers=[("accept this?", "n\n")])
    assert code == 64
    assert "learns nearly single parameters" in " ".join(shown.split())
    wrong = site("set", "minimum-sites=many", "--home", member)
    assert wrong.returncode == 64
    assert "minimum-sites: input should be a valid integer" in wrong.stderr
    site("set", "accept-small-models=false", "minimum-sites=3", "data-path=", "--home", member)


@pytest.mark.parametrize(
    "arguments",
    [["start"], ["status"], ["allowed"], ["allow", "0" * 64], ["disallow", "0" * 64], ["set", "x=1"], ["leave"],
     ["share-key"], ["fetch-key"]],
    ids=lambda arguments: str(arguments[0]),
)  # fmt: skip
def test_a_site_that_is_not_enrolled_is_told_what_to_do(tmp_path: Path, arguments: list[str]) -> None:
    done = site(*arguments, "--home", str(tmp_path / "home"))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"this site has not been enrolled; run: quorsum site enroll --home {tmp_path / 'home'}" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_home_comes_from_the_environment(member: str) -> None:
    done = subprocess.run(
        [QUORSUM, "site", "status", "--json"], env={**os.environ, "QUORSUM_SITE_HOME": member},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert json.loads(done.stdout)["site"] == "onlooker"
    assert done.stderr == "quorsum: the site is not running; next: quorsum site start\n"


def test_status_fits_a_terminal(member: str) -> None:
    done = site("status", "--home", member)
    lines = done.stdout.splitlines()
    assert lines[0] == "site          onlooker in lab"
    assert "state         not running" in lines
    assert any(line.startswith("member        onlooker (approved) ") for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.slow
def test_leaving_is_confirmed_and_final(lab: Federation) -> None:
    home = lab.member("leaver", str(EXAMPLE))
    running = lab.start("start", "--home", home)
    running.wait_for("connected to")
    plan = site("leave", "--home", home)
    assert plan.returncode == 2
    assert "its keys are never accepted again" in plan.stderr
    assert f"nothing has been done yet; to do it: quorsum site leave --home {home} --confirm " in plan.stderr
    assert re.fullmatch("[0-9a-f]{16}", plan.stderr.split()[-1])
    wrong = site("leave", "--home", home, "--confirm", "123456789abcdef0")
    assert wrong.returncode == 1
    assert "is not the digest of the plan as it is now" in wrong.stderr
    assert lab.coordinator.store.site("leaver").state == "approved"  # type: ignore[union-attr]
    done = site("leave", "--home", home, "--confirm", plan.stderr.split()[-1])
    assert done.returncode == 0, done.stderr
    assert lab.coordinator.store.site("leaver").state == "left"  # type: ignore[union-attr]
    assert SiteHome(Path(home)).config().allow == []
    assert running.process.wait(30) == 1
    assert "it left the federation; its keys are never accepted again" in running.said()
    again = site("start", "--home", home)
    assert again.returncode == 1
    assert site("leave", "--home", home, "--confirm", plan.stderr.split()[-1]).returncode == 1


@pytest.mark.slow
def test_a_shared_key_is_made_looked_at_and_fetched(tmp_path: Path) -> None:
    with federation(tmp_path) as lab:
        one, two = lab.member("one"), lab.member("two")
        early = site("fetch-key", "--home", two)
        assert early.returncode == 1
        assert "one site runs: quorsum site share-key" in early.stderr
        plan = site("share-key", "--home", one)
        assert plan.returncode == 2
        assert "compare their words with them first" in plan.stderr
        for member in json.loads(site("status", "--home", one, "--json").stdout)["members"]:
            assert f"{member['site']}: {member['words']}" in plan.stderr
        done = site("share-key", "--home", one, "--confirm", plan.stderr.split()[-1])
        assert done.returncode == 0, done.stderr
        fetched = site("fetch-key", "--home", two)
        assert fetched.stdout == done.stdout
        assert site("set", "suite=ckks", "--home", two).returncode == 0
        assert json.loads(site("status", "--home", two, "--json").stdout)["suite"] == "ckks"
        lab.member("three")
        stale = site("share-key", "--home", one, "--confirm", plan.stderr.split()[-1])
        assert stale.returncode == 1
        assert "the members have changed since the roster was looked at" in stale.stderr
