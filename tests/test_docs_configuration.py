"""docs/configuration.md against the schemas: every key, its type and its default, in order and nothing else."""

from __future__ import annotations

import re
import tomllib
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from quorsum.client.commands import app as site
from quorsum.client.settings import changed, parse_settings
from quorsum.config import CoordinatorConfig, SiteConfig
from quorsum.server.commands import coordinator

TEXT = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
SCHEMAS: dict[str, type[BaseModel]] = {"coordinator.toml": CoordinatorConfig, "site.toml": SiteConfig}
SITE = SiteConfig(
    site="north", federation="lab", enrollment_address="a:1", members_address="a:2", fleet_address="a:3"
)  # fmt: skip


def rows(name: str) -> list[list[str]]:
    """The cells of a file's table."""
    section = TEXT.partition(f"## `{name}`")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def kind(annotation: Any) -> str:
    """A type in the words of the document."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(arguments[0])
    if origin in (Union, types.UnionType):
        (other,) = [one for one in arguments if one is not type(None)]
        return kind(other)
    if origin is Literal:
        return " or ".join(f'`"{one}"`' for one in arguments)
    if origin is list:
        return f"list of {kind(arguments[0])}"
    if origin is dict:
        return "table"
    return {str: "text", int: "integer", float: "number", bool: "boolean"}[annotation]


def default(field: FieldInfo) -> object:
    return "required" if field.is_required() else field.default


def documented_default(cell: str) -> object:
    if cell in ("required", "none"):
        return {"required": "required", "none": None}[cell]
    return tomllib.loads(f"value = {cell.strip('`')}")["value"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_key_is_documented_in_order_with_its_type_and_default(name: str) -> None:
    fields = SCHEMAS[name].model_fields
    table = rows(name)
    assert [row[0].strip("`") for row in table] == list(fields)
    assert [row[1] for row in table] == [kind(field.annotation) for field in fields.values()]
    assert [documented_default(row[2]) for row in table] == [default(field) for field in fields.values()]
    assert all(row[-1] for row in table)


def test_what_sets_a_key_sets_it() -> None:
    commands = [
        row[3].strip("`") for row in rows("site.toml") if row[3].startswith("`site set") and "VALUE" not in row[3]
    ]
    assert len(commands) == 4
    for row in rows("site.toml"):
        command, key = row[3].strip("`"), row[0].strip("`")
        if command in commands:
            made = changed(SITE, parse_settings([command.removeprefix("site set ")]))
            assert [name for name in SiteConfig.model_fields if getattr(made, name) != getattr(SITE, name)] == [key]


def test_the_homes_are_named_as_the_commands_take_them() -> None:
    for app, name in ((coordinator, "coordinator"), (site, "site")):
        variable = f"QUORSUM_{name.upper()}_HOME"
        assert re.search(rf"`{variable}`, else `\./quorsum-{name}`", TEXT)
        assert app.info.help
