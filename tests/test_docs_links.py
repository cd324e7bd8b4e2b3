"""What the documents name is there: files, headings, tests; and the kit in deploy/ can be read."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "deploy/*.md", "examples/*.md") for path in ROOT.glob(pattern)
)
UNITS = sorted((ROOT / "deploy").glob("*.service"))


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        there = (document.parent / name) if name else document
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_that_are_named_exist(document: Path) -> None:
    file = None
    for named, test in re.findall(r"`(tests/test_\w+\.py)?(?:::(test_\w+))?`", document.read_text(encoding="utf-8")):
        file = ROOT / named if named else file
        if named or test:
            assert file is not None
            assert not test or f"def {test}(" in file.read_text(encoding="utf-8"), f"{named}::{test}"


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_services_are_kept_in_and_come_back(unit: Path) -> None:
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    # Options of systemd are told apart by case.
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(unit.read_text(encoding="utf-8"))
    service = parser["Service"]
    assert service["ExecStart"].split()[1:] == [unit.stem.partition("-")[2], "start", "--log-json"]
    assert service["StateDirectory"] in service["Environment"]
    wanted = {
        "NoNewPrivileges": "yes", "ProtectSystem": "strict", "LimitCORE": "0", "Restart": "always",
        "StateDirectoryMode": "0700", "UMask": "0077", "CapabilityBoundingSet": "",
    }  # fmt: skip
    assert {name: service[name] for name in wanted} == wanted
    assert "64" in service["RestartPreventExitStatus"].split()


def test_both_ends_have_a_service() -> None:
    assert [unit.name for unit in UNITS] == ["quorsum-coordinator.service", "quorsum-site.service"]
