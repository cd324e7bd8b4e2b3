"""Two coordinators and six sites on one machine, each federation on a loopback address of its own."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path

import pytest
from process_federation import Federation, federation

APP = Path(__file__).parent.parent / "examples" / "hospital"
SITES = ("north", "south", "west")
LISTENING = "0A"


def listens_at(pid: int) -> set[str]:
    """IPv4 and IPv6 addresses at which a process accepts connections (Linux)."""
    sockets = set()
    for one in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(one)
        except OSError:
            continue
        if target.startswith("socket:["):
            sockets.add(target[len("socket:[") : -1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in sockets:
                words = bytes.fromhex(fields[1].split(":")[0])
                # Each group of four bytes is in the machine's own order.
                raw = b"".join(
                    struct.pack("!I", *struct.unpack("=I", words[k : k + 4])) for k in range(0, len(words), 4)
                )
                address = socket.inet_ntop(socket.AF_INET if table == "tcp" else socket.AF_INET6, raw)
                # An IPv4 address of a socket that speaks both.
                found.add(address.removeprefix("::ffff:"))
    return found


def test_nothing_can_be_reached_from_outside_unless_it_is_said(tmp_path: Path) -> None:
    with federation(tmp_path) as lab:
        lab.init()
        lab.start_coordinator()
        assert listens_at(lab.running["coordinator"].process.pid) == {"127.0.0.1"}


@pytest.mark.slow
def test_two_federations_train_side_by_side(tmp_path: Path) -> None:
    labs: list[Federation] = []
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with federation(folders[0]) as one, federation(folders[1]) as two:
        labs = [one, two]
        for lab, host in zip(labs, ("127.0.0.1", "127.0.0.2"), strict=True):
            where = ("--host", host, "--advertise", host, "--port", "0")
            lab.type("coordinator", "init", "--home", lab.coordinator_home, "--name", lab.folder.name, *where)
            lab.start_coordinator()
            assert listens_at(lab.running["coordinator"].process.pid) == {host}
        for lab in labs:
            lab.enroll(SITES, APP, {name: ("--set", f"data-shard={k}") for k, name in enumerate(SITES)})
        runs = [lab.run(APP, lab.folder / "out", **{"num-server-rounds": 2}) for lab in labs]
        for lab, run in zip(labs, runs, strict=True):
            assert run.process.wait(300) == 0, lab.logs()
        for lab in labs:
            # The sites of both have the same names, and no federation has seen a site of the other.
            rounds = json.loads((lab.folder / "out" / "result.json").read_text())["rounds"]
            assert [tuple(played["invited"]) for played in rounds] == [SITES, SITES]
            assert not any(played["failed"] for played in rounds)
        members = [
            {one["site"]: one["words"] for one in json.loads(
                lab.type("coordinator", "sites", "--home", lab.coordinator_home, "--json").stdout
            )["sites"]}
            for lab in labs
        ]  # fmt: skip
        assert set(members[0]) == set(members[1]) == set(SITES)
        assert not set(members[0].values()) & set(members[1].values())
