import base64
import csv
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from lab_cells import STEADY, cell, grid, write_lab

from quorsum.errors import DataError, QuorsumError, UsageError
from quorsum.simulation.lab_report import Origin, cells_csv, render_page, worst_csv, write_report
from quorsum.simulation.lab_summary import summarise

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = "<img src=x onerror=alert(1)>\"'$&{{7*7}}</title><script>alert(1)</script>"
VOID = {"meta", "link", "br", "img", "wbr", "hr"}


class Page(HTMLParser):
    """Elements of a page; refuses tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in {*self.open, "page"}:
            self.words[tag] = self.words.get(tag, "") + data

    def named(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


def origin(**changes: Any) -> Origin:
    return Origin(**{"name": "a lab", "command": "quorsum lab run a.toml --out lab", "grid": "[grid]\nseed = [1]\n",
                     "planned": 27, "versions": {"quorsum": "1.2.3"}} | changes)  # fmt: skip


def page(cells: list[dict[str, Any]], **changes: Any) -> tuple[str, Page]:
    text = render_page(summarise(cells, changes.get("planned")), origin(planned=len(cells)) if not changes
                       else origin(**changes), ["cells.csv"])  # fmt: skip
    return text, Page(text)


def full() -> list[dict[str, Any]]:
    """Two panels, a backdoor, a failed cell, one that cannot be, a failed round."""
    cells = grid(STEADY) + grid(STEADY, split="similarity:0") + grid(STEADY, poisoned=3, tolerate=3)
    for split in (None, "similarity:0"):
        cells += grid(
            {(rule, "trigger"): (0.9, 0.91, 0.9) for rule in ("mean", "spectral", "multi-krum")},
            success={"trigger": 0.6}, split=split,
        )  # fmt: skip
    cells.append(cell(None, rule="krum", failed="krum needs more sites", state="not applicable"))
    cells.append(cell(None, rule="mda", failed="the file is gone"))
    cells.append(cell(0.5, rule="mda", seed=2, failed_round="nobody answered"))
    return cells


def test_page_has_its_parts_and_is_well_formed() -> None:
    _, parsed = page(full())
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"verdict", "worst", "heat", "curves", "backdoors", "rejected", "price", "gaps", "method", "repeat"} <= set(
        ids
    )
    links = [attributes["href"] for attributes in parsed.named("a")]
    assert all(link is not None and link.startswith("#") and link[1:] in ids for link in links)
    words = re.sub(r"\s+", " ", parsed.words["page"])
    for said in (
        "no defence is better in the worst case than spectral and multi-krum",
        "quorsum lab run a.toml --out lab", "krum needs more sites", "the file is gone", "nobody answered",
        "± 5.9 =1st", "usual split, 2 of 10 malicious", "1.2.3", "[grid] seed = [1]", "Every attack, condition",
        "Not compared", "83.7", "60.0",
    ):  # fmt: skip
        assert said in words, said


def test_page_loads_nothing_and_runs_nothing() -> None:
    text, parsed = page(full())
    assert not parsed.named("script", "iframe", "object", "embed", "base", "form", "img")
    for tag, attributes in parsed.elements:
        assert not {"src", "srcset", "style", "action"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
        assert tag == "a" or attributes.get("href") in (None, "data:,")
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in parsed.words["style"]
    assert "@import" not in parsed.words["style"]


def test_policy_lets_in_this_very_style_and_nothing_else() -> None:
    _, parsed = page(full())
    digest = base64.b64encode(hashlib.sha256(parsed.words["style"].encode()).digest()).decode()
    (policy,) = (m["content"] for m in parsed.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def test_every_picture_and_table_has_words() -> None:
    _, parsed = page(full())
    for attributes in parsed.named("svg"):
        assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label")
    assert len(parsed.named("svg")) > 10
    for attributes in parsed.named("th"):
        assert attributes.get("scope") in ("row", "col")
    assert parsed.named("html")[0]["lang"] == "en"


def test_names_from_outside_stay_text(tmp_path: Path) -> None:
    cells = grid({(rule, f"a{HOSTILE}"): (0.9, 0.8, 0.7) for rule in (f"x{HOSTILE}", "mean")}, data=f"/data/{HOSTILE}")
    cells += grid({("mean", f"a{HOSTILE}"): (0.9, 0.8, 0.7)}, data="digits")
    cells.append(cell(None, failed=HOSTILE, rule=HOSTILE))
    cells[0]["result"]["sites"][0]["id"] = HOSTILE
    cells[0]["result"]["versions"][HOSTILE] = HOSTILE
    text, parsed = page(cells, name=HOSTILE, command=HOSTILE, grid=HOSTILE, versions={HOSTILE: HOSTILE})
    assert not parsed.named("img", "script")
    assert "49" not in parsed.words["title"]
    assert parsed.words["title"].startswith("<img src=x")
    assert text.count("<img") == 0
    # Matplotlib takes a dollar sign for mathematics.
    folder = write_lab(tmp_path / "lab", cells, name=HOSTILE, grid=HOSTILE)
    assert len(write_report(folder)) == 5


def test_report_is_written_beside_the_cells(tmp_path: Path) -> None:
    folder = write_lab(tmp_path / "lab", full(), missing=2)
    written = write_report(folder)
    assert [path.name for path in written] == [
        "report.html", "worst-case.png", "curves.png", "cells.csv", "worst-case.csv",
    ]  # fmt: skip
    assert all(path.parent == folder for path in written)
    assert written[1].read_bytes().startswith(PNG)
    assert written[2].read_bytes().startswith(PNG)
    text = written[0].read_text(encoding="utf-8")
    assert "2 of 104 cells have not ended yet" in text
    assert "worst-case.png, curves.png, cells.csv, worst-case.csv" in text


def test_same_cells_give_the_same_bytes(tmp_path: Path) -> None:
    folder = write_lab(tmp_path / "lab", full())
    first = [path.read_bytes() for path in write_report(folder)]
    assert [path.read_bytes() for path in write_report(folder)] == first


def test_without_an_attack_there_is_no_worst_case_and_no_picture(tmp_path: Path) -> None:
    folder = write_lab(tmp_path / "lab", grid({("spectral", "none"): (0.9,)}))
    written = write_report(folder)
    assert [path.name for path in written] == ["report.html", "cells.csv"]
    assert "No attack was run" in written[0].read_text(encoding="utf-8")


def test_one_seed_is_shown_without_spread_or_rank() -> None:
    text, parsed = page(grid({(rule, "a"): (0.9,) for rule in ("mean", "spectral")}))
    assert "No ranking: 1 seed." in text
    assert "1st<" not in text
    assert "nan" not in parsed.words["main"].replace("finance", "")


def test_many_conditions_give_no_more_than_six_charts() -> None:
    cells = []
    for number in range(9):
        cells += grid({("spectral", "a"): (0.9,), ("mean", "a"): (0.1,)}, split=f"dirichlet:{number}")
    text, parsed = page(cells)
    assert sum(attributes.get("class") == "chart" for attributes in parsed.named("svg")) == 6
    assert "Not drawn here: 3 more conditions." in text


def test_different_versions_are_pointed_at() -> None:
    cells = grid(STEADY)
    cells[0]["result"]["versions"]["quorsum"] = "9.9"
    text, _ = page(cells)
    assert "different versions of quorsum" in text


def test_cells_csv_has_one_row_a_cell_and_every_number() -> None:
    rows = list(csv.DictReader(io.StringIO(cells_csv(full()), newline="")))
    assert len(rows) == len(full())
    first = rows[0]
    assert (first["state"], first["rule"], first["attack"], first["accuracy"]) == ("done", "mean", "none", "0.95")
    assert first["alpha"] == ""
    assert first["gate"] == "no"
    assert first["poisoned_rejected"] == str(2 / 3)
    assert rows[-1]["failed_rounds"] == "1"
    assert (rows[-2]["state"], rows[-2]["failed"], rows[-2]["accuracy"]) == ("failed", "the file is gone", "")
    assert rows[-4]["attack_success"] == "0.6"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1+cmd", "@sum", "\t=1", "\r=1", " =1", "\n@x"])
def test_spreadsheets_get_no_formulas(text: str) -> None:
    for table in (
        cells_csv([cell(data=text, attack=text), cell(None, failed=text)]),
        worst_csv(summarise(grid({(f"{text}", "a"): (0.9,)}))),
    ):
        cells = [value for row in csv.reader(io.StringIO(table, newline="")) for value in row]
        assert f"'{text}" in cells
        assert text not in cells


def test_worst_csv_has_one_row_a_defence_and_condition() -> None:
    rows = list(csv.DictReader(io.StringIO(worst_csv(summarise(grid(STEADY))), newline="")))
    assert [(row["defence"], row["rank"], row["shared"], row["seeds"]) for row in rows] == [
        ("mean", "3", "no", "3"), ("spectral", "1", "yes", "3"), ("multi-krum", "1", "yes", "3"),
    ]  # fmt: skip
    assert float(rows[2]["worst_case"]) == pytest.approx(0.8366666)
    assert rows[2]["attack"] == "alie"


def test_refusals_name_the_folder_or_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no lab run"):
        write_report(tmp_path)
    folder = write_lab(tmp_path / "lab", grid({("spectral", "a"): (0.9,)}))
    (path,) = (folder / "cells").iterdir()
    path.write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(DataError, match=path.name):
        write_report(folder)


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    folder = write_lab(tmp_path / "lab", grid({("spectral", "none"): (0.9,)}))
    (folder / "report.html").mkdir()
    with pytest.raises(QuorsumError, match=r"cannot write .*report\.html"):
        write_report(folder)
    folder = write_lab(tmp_path / "other", grid({("spectral", "a"): (0.9,)}))
    (folder / "worst-case.png").mkdir()
    with pytest.raises(QuorsumError, match=r"cannot write .*worst-case\.png"):
        write_report(folder)


def test_report_without_its_grid_file_says_so(tmp_path: Path) -> None:
    folder = write_lab(tmp_path / "lab", grid({("spectral", "none"): (0.9,)}))
    (folder / "grid.toml").unlink()
    assert "(grid.toml is not there)" in write_report(folder)[0].read_text(encoding="utf-8")
