"""What ``quorsum lab run`` reads: a grid of simulations, as TOML, and the cells that it spans.

    name = "smoke"
    honest = 10                 # sites = honest + poisoned, in every cell
    [base]                      # what all cells share: any field of Simulation
    data = "digits"
    [grid]                      # lists; their product is run, the last one varies fastest
    attack = ["none", "sign-flip"]
    poisoned = [1, 2]
    seed = [1, 2, 3]

Everything is checked before anything runs. A combination that cannot be (a rule that does not tolerate so many
malicious sites, one that has to see updates under a suite that hides them, an attack on the sealed protocol under
another suite) becomes a cell that is *not applicable*, with the reason; a value that is wrong by itself stops the grid.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Final, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from quorsum import __version__
from quorsum.aggregation import parse_rule
from quorsum.aggregation.errors import ClearSuiteError
from quorsum.errors import BoundError, UsageError
from quorsum.simulation.attacks import parse_attack
from quorsum.simulation.data import load_dataset
from quorsum.simulation.dataset import Dataset
from quorsum.simulation.models import new_model
from quorsum.simulation.run import DEFAULT_RULE, Simulation

__all__ = ["MAX_CELLS", "Grid", "PlannedCell", "cell_id", "check_data", "data_digest", "plan_cells", "read_grid"]

MAX_CELLS: Final = 20_000
"""Most cells of one grid; a month on two cores, at four minutes each."""

_LONGEST_BYTES: Final = 1 << 20
_ID_LENGTH: Final = 24
_CHUNK: Final = 1 << 20


@dataclass(frozen=True)
class Grid:
    """A grid as it was written, checked field by field.

    Attributes:
        name: what the report calls it.
        base: settings that all cells share.
        axes: name and values of each list, in the order of the file.
        honest: number of honest sites, to which the poisoned ones are added; None where ``sites`` says it.
        source: the bytes of the file.
    """

    name: str
    base: Mapping[str, Any]
    axes: tuple[tuple[str, tuple[Any, ...]], ...]
    honest: int | None
    source: bytes


@dataclass(frozen=True)
class PlannedCell:
    """One simulation of a grid.

    Attributes:
        id: 24 hexadecimal digits that stand for the settings, the data and the version of quorsum.
        settings: as they will be run, with what was left open filled in.
        label: the values that tell this cell from the others, for people.
        unfit: why this combination cannot be run; None if it can.
    """

    id: str
    settings: Simulation
    label: str
    unfit: str | None = None


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[\w .,+-]{1,80}$")]
    honest: Annotated[int, Field(ge=1)] | None = None
    base: dict[str, Any] = {}
    grid: Annotated[dict[str, Any], Field(min_length=1)]


def read_grid(path: Path, *, data: str | None = None) -> Grid:
    """Read and check a grid file.

    Args:
        path: of the file.
        data: what to use in place of ``data`` in ``[base]``, such as a path on this machine.

    Raises:
        UsageError: the file cannot be read, is not TOML, or a key is unknown, missing, doubled or of the wrong type.
            The message names the file, the key and where possible the line.
    """
    source, text, tree = _parsed(path)
    try:
        file = _File.model_validate(tree)
    except ValidationError as error:
        raise _complaint(path, text, error, (), list(_File.model_fields)) from None
    if data is not None and "data" in file.grid:
        raise UsageError(f"{path}: [grid] lists several data sets, so that --data can replace none; leave --data out")
    base = _settings(path, text, "base", {**file.base, **({} if data is None else {"data": data})})
    lists = _settings(path, text, "grid", file.grid)
    _check_keys(path, file, base, lists)
    axes = tuple((key, tuple(_distinct(path, key, lists[key]))) for key in file.grid)
    cells = math.prod(len(values) for _, values in axes)
    if cells > MAX_CELLS:
        raise UsageError(f"{path}: {cells} cells are more than {MAX_CELLS}; shorten a list, or make it several grids")
    return Grid(file.name, base, axes, file.honest, source)


def plan_cells(grid: Grid, *, name: str = "grid") -> tuple[PlannedCell, ...]:
    """All cells of a grid, in order; settings that come to the same are one cell.

    Args:
        grid: from :func:`read_grid`.
        name: what error messages call the grid: its file.

    Raises:
        UsageError: a setting is out of range, or no combination at all can be run; the message names the cell.
    """
    cells: dict[str, PlannedCell] = {}
    for values in product(*(values for _, values in grid.axes)):
        chosen = dict(zip((key for key, _ in grid.axes), values, strict=True))
        label = " ".join(f"{key}={value}" for key, value in chosen.items())
        settings = Simulation(**{**grid.base, **chosen})
        if grid.honest is not None:
            settings = replace(settings, sites=grid.honest + settings.poisoned)
        try:
            settings, unfit = _checked(settings)
            cell = PlannedCell(cell_id(settings), settings, label, unfit)
        except UsageError as error:
            raise UsageError(f"{name}: the cell {label}: {error}") from None
        cells.setdefault(cell.id, cell)
    planned = tuple(cells.values())
    if all(cell.unfit is not None for cell in planned):
        raise UsageError(f"{name}: no cell can be run; the first one, {planned[0].label}: {planned[0].unfit}")
    return planned


def cell_id(settings: Simulation) -> str:
    """What tells a cell from all others: settings, contents of the data files, version of quorsum."""
    identity = {"settings": asdict(settings), "data": data_digest(settings.data), "quorsum": __version__}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_LENGTH]


@lru_cache(maxsize=64)
def data_digest(spec: str) -> str | None:
    """SHA-256 of a data file, or of the files in a folder of data, 64 hexadecimal digits; None for built-in data.

    Raises:
        UsageError: it is there and cannot be read.
    """
    path = Path(spec)
    try:
        if path.is_file():
            return _file_digest(path)
        if path.is_dir():
            files = sorted(one for one in path.iterdir() if one.is_file())
            listing = [(one.name, _file_digest(one)) for one in files]
            return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read {spec}: {error.strerror or error}; check its permissions") from None
    return None


def check_data(cells: Sequence[PlannedCell]) -> None:
    """Load each data set of these cells once and make each model for it, so that a wrong one is found before all runs.

    Raises:
        DataError: a data set cannot be used.
        UsageError: a model is unknown, or not one for these data; the message names the cell.
    """
    sets: dict[tuple[str, str | None, str | None], Dataset] = {}
    models: set[tuple[Any, ...]] = set()
    for cell in cells:
        settings = cell.settings
        data = (settings.data, settings.label, settings.key)
        if cell.unfit is not None or (*data, settings.model) in models:
            continue
        if data not in sets:
            sets[data] = load_dataset(settings.data, label=settings.label, key=settings.key, seed=settings.seed)
        models.add((*data, settings.model))
        try:
            # Whether the model suits the data does not hang on its width, and a narrow one is made at once.
            new_model(sets[data], model=settings.model, hidden=min(settings.hidden, 8), seed=settings.seed)
        except UsageError as error:
            raise UsageError(f"the cell {cell.label}: {error}") from None


def _checked(settings: Simulation) -> tuple[Simulation, str | None]:
    if not 0 <= settings.seed < 2**63:
        raise UsageError(f"seed must lie in 0 .. 2**63 - 1, got {settings.seed}")
    rule = parse_rule(settings.rule or DEFAULT_RULE.get(settings.suite, "mean"), suite="plain")
    if not rule.needs_reference:
        # Rules with and without a trusted site can so stand in one grid.
        settings = replace(settings, reference=None)
    tolerate = settings.poisoned if settings.tolerate is None else settings.tolerate
    filled = replace(settings, rule=rule.name, tolerate=tolerate)
    try:
        if parse_attack(settings.attack).on_protocol and settings.suite != "sealed":
            replace(settings, attack="none").checked()
            return filled, f"{settings.attack} attacks the sealed protocol, and this is {settings.suite}"
        return settings.checked(), None
    except (BoundError, ClearSuiteError) as error:
        return filled, str(error)


def _parsed(path: Path) -> tuple[bytes, str, dict[str, Any]]:
    try:
        with path.open("rb") as file:
            source = file.read(_LONGEST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; give the path of a grid file") from None
    if len(source) > _LONGEST_BYTES:
        raise UsageError(f"{path} has more than {_LONGEST_BYTES} bytes; this is not a grid")
    try:
        text = source.decode()
        return source, text, tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from None


@lru_cache(maxsize=2)
def _schema(section: str) -> type[BaseModel]:
    """What may stand in ``[base]`` and ``[grid]``: the fields of Simulation, there one value, here a list of them."""
    hints = get_type_hints(Simulation)
    kinds: dict[str, Any] = {}
    for field in fields(Simulation):
        value: Any = hints[field.name]
        kinds[field.name] = (value if section == "base" else Annotated[list[value], Field(min_length=1)], None)
    config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    return create_model(section, __config__=config, **kinds)


def _settings(path: Path, text: str, section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return _schema(section).model_validate(values).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise _complaint(path, text, error, (section,), [field.name for field in fields(Simulation)]) from None


def _check_keys(path: Path, file: _File, base: Mapping[str, Any], lists: Mapping[str, Any]) -> None:
    if twice := sorted(base.keys() & lists.keys()):
        raise UsageError(f"{path}: {twice[0]} stands in [base] and in [grid]; leave it in one of them")
    if file.honest is not None and ("sites" in base or "sites" in lists):
        raise UsageError(f"{path}: with honest = {file.honest} the number of sites follows; leave sites out, or honest")
    if "runtime" in lists:
        raise UsageError(f"{path}: runtime says how the whole grid is run; give it in [base]")


def _distinct(path: Path, key: str, values: Sequence[Any]) -> Iterator[Any]:
    seen: list[Any] = []
    for value in values:
        if value in seen:
            raise UsageError(f"{path}: grid.{key} lists {value!r} twice; leave one out")
        seen.append(value)
        yield value


def _complaint(
    path: Path, text: str, error: ValidationError, section: tuple[str, ...], known: Sequence[str]
) -> UsageError:
    # A key that is spelt wrong is also missing under its right name, and the spelling is what there is to mend.
    details = error.errors(include_url=False, include_context=False)
    detail = next((one for one in details if one["type"] == "extra_forbidden"), details[0])
    place = [str(part) for part in (*section, *detail["loc"])]
    where, key = ".".join(place), place[min(len(section), len(place) - 1)]
    line = next((n for n, s in enumerate(text.splitlines(), 1) if re.match(rf"\s*\[?\s*{re.escape(key)}\b", s)), None)
    start = f"{path}, line {line}" if line else f"{path}"
    if detail["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return UsageError(f"{start}: {where}: unknown key{hint}; known: {', '.join(known)}")
    if detail["type"] == "missing":
        return UsageError(f"{start}: {where}: missing; a grid has a name, and lists in [grid]")
    if detail["type"] == "too_short":
        return UsageError(f"{start}: {where}: this is empty; give it at least one value, or leave it out")
    if detail["type"] == "string_pattern_mismatch":
        allowed = "letters, digits, spaces and . , + - _"
        return UsageError(f"{start}: {where}: 1 to 80 {allowed} are allowed, got {_short(detail['input'])}; correct it")
    wants = detail["msg"][:1].lower() + detail["msg"][1:]
    return UsageError(f"{start}: {where}: {wants}, got {_short(detail['input'])}; correct it")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
