"""The house keeps its rules: who may import whom, and what the wheel holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The leaf that everybody may import, and what else each room may import of quorsum and of other packages.
LEAF = "quorsum.errors"
SHARED = {
    "quorsum.__version__",
    "quorsum.arrays",
    "quorsum.bundles",
    "quorsum.config",
    "quorsum.durable",
    "quorsum.enrollment",
    "quorsum.envelope",
    "quorsum.flower",
    "quorsum.homes",
    "quorsum.invitation",
    "quorsum.logs",
    "quorsum.messages",
    "quorsum.selection",
    "quorsum.words",
}
ALLOWED = {
    "aggregation": (set(), {"numpy"}),
    "crypto": (set(), {"numpy", "scipy", "tenseal", "flint", "cryptography"}),
    "quorsum": (
        {
            "quorsum.aggregation",
            "quorsum.crypto",
            "quorsum.server",
            "quorsum.client",
            "quorsum.simulation",
        }
        | SHARED,
        {
            "numpy",
            "flwr",
            "pydantic",
            "typer",
            "click",
            "rich",
            "mnemonic",
            "tomli_w",
            # What Flower is made of, in quorsum/flower.py only.
            "cryptography",
            "fastapi",
            "starlette",
            "httpx",
            "google",
        },
    ),
    "server": (
        {"quorsum.aggregation", "quorsum.crypto"} | SHARED,
        {"numpy", "flwr", "grpc", "pydantic", "uvicorn", "filelock", "prometheus_client", "rich", "typer"},
    ),
    "client": (
        {"quorsum.crypto"} | SHARED,
        {"filelock", "numpy", "flwr", "grpc", "pydantic", "httpx", "rich", "typer"},
    ),
    "simulation": (
        {
            "quorsum.aggregation",
            "quorsum.crypto",
            "quorsum.server",
            "quorsum.client",
        }
        | SHARED,
        {
            "filelock",
            "flwr",
            "jinja2",
            "markupsafe",
            "matplotlib",
            "numpy",
            "pydantic",
            "ray",
            "rich",
            "scipy",
            "sklearn",
            "torch",
            "typer",
        },
    ),
}


# What the lab's report is made of besides modules.
FILES = (".json", ".html", ".css")


def modules() -> list[Path]:
    return sorted(path for room in ALLOWED for path in (ROOT / room).glob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            base = node.module or ""
            names |= {f"{base}.{alias.name}" for alias in node.names} if base == "quorsum" else {base}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_inside_what_the_room_may_use(path: Path) -> None:
    room = path.parent.name
    inside, outside = ALLOWED[room]
    own = {f"quorsum.{room}"} if room != "quorsum" else {"quorsum.errors", "quorsum.__version__", "quorsum.cli"}
    for name in imported(path):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or name == LEAF:
            continue
        if top == "quorsum":
            assert any(name == a or name.startswith(a + ".") for a in inside | own), f"{path}: may not import {name}"
        else:
            assert top in outside, f"{path}: may not import {name}"


def test_wheel_holds_every_module_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith((".py", ".typed", *FILES))}
        licences = {Path(name).name for name in archive.namelist() if "licenses" in name}
    tree = {
        f"quorsum/{path.name}" if path.parent.name == "quorsum" else f"quorsum/{path.parent.name}/{path.name}"
        for path in modules()
    }
    beside = {f"quorsum/simulation/{path.name}" for path in (ROOT / "simulation").iterdir() if path.suffix in FILES}
    assert packed == tree | beside | {"quorsum/py.typed"}
    assert "quorsum/simulation/lab_report.html" in beside
    assert licences == {"LICENSE", "NOTICE"}


def test_folders_are_flat() -> None:
    for room in ALLOWED:
        nested = [p for p in (ROOT / room).iterdir() if p.is_dir() and not p.is_symlink() and p.name != "__pycache__"]
        assert nested == []
