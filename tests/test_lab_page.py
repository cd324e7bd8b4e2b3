"""The report of a lab run in a real browser: it renders, and the console stays empty."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from lab_cells import STEADY, cell, grid, write_lab

from quorsum.simulation.lab_report import write_report

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CONSOLE = re.compile(r":CONSOLE[:(]|Refused to|Uncaught")


@pytest.fixture(scope="session")
def browser() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    assert found, "these tests need Chromium: apt-get install chromium (or leave them out: pytest -m 'not browser')"
    return found


def look(browser: str, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page and wait until it has loaded; stderr has what its console says."""
    return subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--enable-logging=stderr", f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> Path:
    cells = grid(STEADY) + grid(STEADY, poisoned=3, tolerate=3) + grid(STEADY, split="similarity:0")
    cells += grid({("mean", "trigger"): (0.9, 0.9, 0.9), ("spectral", "trigger"): (0.9, 0.9, 0.9)},
                  success={"trigger": 0.7})  # fmt: skip
    cells.append(cell(None, rule="krum", failed="<script>alert(1)</script>", state="not applicable"))
    return write_report(write_lab(tmp_path / "lab", cells, name="<img src=x onerror=alert(1)>"))[0]


def test_page_shows_its_parts_and_says_nothing_on_the_console(browser: str, page: Path) -> None:
    done = look(browser, page, "--dump-dom")
    assert not CONSOLE.search(done.stderr), done.stderr
    for part in ("worst", "heat", "curves", "backdoors", "rejected", "price", "gaps", "method", "repeat"):
        assert f'<section id="{part}"' in done.stdout
    assert "In all 3 conditions, no defence is better in the worst case than" in done.stdout
    assert "<script" not in done.stdout
    assert "<img" not in done.stdout


@pytest.mark.parametrize("width", [1280, 500])
def test_screenshot_shows_a_page_with_colours(browser: str, page: Path, width: int) -> None:
    from matplotlib.image import imread

    shot = page.with_suffix(".png")
    done = look(browser, page, f"--screenshot={shot}", f"--window-size={width},2400")
    assert not CONSOLE.search(done.stderr), done.stderr
    pixels = (255 * imread(shot)[..., :3]).round().astype(int)
    assert pixels.shape[:2] == (2400, width)
    colours = {tuple(colour) for colour in pixels.reshape(-1, 3)[::7]}
    assert len(colours) > 60
    # The style sheet was let in: without it the page is white up to its edges.
    assert tuple(pixels[5, 5]) == (0xF6, 0xF7, 0xF9)
    # An orange cell of the plain mean and a blue one of a defence, from the heat map.
    assert any(red > 180 and 90 < green < 140 and blue < 80 for red, green, blue in colours)
    assert any(red < 110 and 130 < green < 180 and blue > 180 for red, green, blue in colours)


def test_a_page_with_an_error_would_be_noticed(browser: str, tmp_path: Path) -> None:
    for name, body in (
        ("script.html", "<script>nowhere.to.be.found()</script>"),
        ("policy.html", "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\"><style>a{}</style>"),
    ):
        (tmp_path / name).write_text(f"<!DOCTYPE html>{body}")
        assert CONSOLE.search(look(browser, tmp_path / name, "--dump-dom").stderr), name
