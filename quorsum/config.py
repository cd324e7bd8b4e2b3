"""What a coordinator and a site are told in their TOML files, checked strictly."""

from __future__ import annotations

import ipaddress
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from quorsum import durable
from quorsum.errors import UsageError
from quorsum.invitation import FEDERATION_PATTERN, SITE_PATTERN, split_address

__all__ = ["CoordinatorConfig", "SiteConfig", "load", "replace_file", "write"]

_LONGEST_BYTES = 1 << 20


def _address(text: str) -> str:
    split_address(text)
    return text


def _host(text: str) -> str:
    if ":" in text:
        ipaddress.IPv6Address(text)
    elif not re.fullmatch(r"[^\s/@\[\]]+", text):
        raise ValueError("this is neither a host name nor an IP address")
    return text


Port = Annotated[int, Field(ge=0, le=65535)]
Hours = Annotated[float, Field(gt=0, le=24 * 366, allow_inf_nan=False, strict=False)]
Address = Annotated[str, AfterValidator(_address)]
Host = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_host)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CoordinatorConfig(_Config):
    """``coordinator.toml``.

    Attributes:
        federation: its name.
        host: address to listen on.
        advertise: names and IP addresses under which sites reach this machine; the first one goes into invitations,
            all of them into the server's certificate.
        enrollment_port, members_port, fleet_port: TCP ports; 0 lets the system choose.
        metrics_port: for Prometheus, on 127.0.0.1; none by default.
        invitation_hours: how long an invitation can be used.
        certificate_hours: how long a site's certificate lasts.
        patience: seconds to wait at the beginning of a round for sites of the last one, when enough others are there.
        log_format: ``text`` for people, ``json`` for machines.
    """

    federation: Annotated[str, Field(pattern=FEDERATION_PATTERN)]
    host: Host = "127.0.0.1"
    advertise: Annotated[list[Host], Field(min_length=1, max_length=32)] = ["localhost", "127.0.0.1"]
    enrollment_port: Port = 7401
    members_port: Port = 7402
    fleet_port: Port = 7403
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    invitation_hours: Hours = 72.0
    certificate_hours: Hours = 72.0
    patience: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False, strict=False)] = 30.0
    log_format: Literal["text", "json"] = "text"

    def address(self, port: int) -> str:
        """``host:port`` as sites are told it."""
        host = self.advertise[0]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class SiteConfig(_Config):
    """``site.toml``, written by enrollment and edited by the site's administrator.

    Attributes:
        site: its name.
        federation: the name of its federation.
        enrollment_address, members_address, fleet_address: where the coordinator is, ``host:port``.
        allow: SHA-256 of each bundle that may run here, 64 hexadecimal digits.
        node_config: what the app reads as its node config.
        minimum_sites: fewest sites of a round in which this site takes part.
        accept_small_models: whether it seals models that are too small to hide in each other.
        least_collude: smallest tau with which it takes part.
        suite_key: file of the key shared by all sites, for the suite ``ckks``; none by default.
    """

    site: Annotated[str, Field(pattern=SITE_PATTERN)]
    federation: Annotated[str, Field(pattern=FEDERATION_PATTERN)]
    enrollment_address: Address
    members_address: Address
    fleet_address: Address
    allow: list[Digest] = []
    node_config: dict[str, str | int | float | bool] = {}
    minimum_sites: Annotated[int, Field(ge=1, le=10_000)] = 3
    accept_small_models: bool = False
    least_collude: Annotated[int, Field(ge=1, le=10_000)] = 1
    suite_key: str | None = None


Config = TypeVar("Config", CoordinatorConfig, SiteConfig)


def load(path: Path, schema: type[Config]) -> Config:
    """Read and check a file.

    Raises:
        UsageError: it cannot be read, is not TOML, or a key is unknown, missing or has the wrong type; the message
            names the file, the key and where possible the line.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LONGEST_BYTES + 1)
        if len(data) > _LONGEST_BYTES:
            raise UsageError(f"{path} has more than {_LONGEST_BYTES} bytes; this is not a configuration")
        text = data.decode()
        return schema.model_validate(tomllib.loads(text))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    except ValidationError as error:
        raise UsageError(_complaint(path, text, error)) from None


def write(path: Path, config: CoordinatorConfig | SiteConfig) -> None:
    """Replace a file in one step, mode 0600; comments in the old one are lost.

    Raises:
        UsageError: it cannot be written.
    """
    replace_file(path, tomli_w.dumps(config.model_dump(exclude_none=True)).encode())


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file in one step, mode 0600; it is on the disk when this returns.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        durable.replace_file(path, [data])
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def _complaint(path: Path, text: str, error: ValidationError) -> str:
    detail = error.errors(include_url=False, include_context=False)[0]
    key = str(detail["loc"][0]) if detail["loc"] else ""
    where = ".".join(str(part) for part in detail["loc"])
    line = next((n for n, s in enumerate(text.splitlines(), 1) if re.match(rf"\s*\[?\s*{re.escape(key)}\b", s)), None)
    place = f"{path}, line {line}" if key and line else f"{path}"
    reason = {"extra_forbidden": "unknown key", "missing": "missing"}.get(detail["type"], detail["msg"])
    return f"{place}: {where}: {reason}"
