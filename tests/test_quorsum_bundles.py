"""Bundles: the same folder gives the same bytes everywhere, and a bundle from outside does no harm."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from fleet_harness import app_folder

from quorsum import bundles, flower
from quorsum.errors import Refusal, UsageError

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "quickstart"


def archive(entries: dict[str, bytes], *, compress: bool = False) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as made:
        for name, content in entries.items():
            made.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED)
    return buffer.getvalue()


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    first = bundles.build(app_folder(tmp_path / "a"))
    other = app_folder(tmp_path / "b_with_another_name")
    (other / "tiny" / "__pycache__").mkdir()
    (other / "tiny" / "__pycache__" / "client_app.cpython-311.pyc").write_bytes(b"compiled")
    (other / "notes.txt").write_text("not part of an app")
    (other / "link.py").symlink_to("/etc/hostname")
    for path in other.rglob("*"):
        if not path.is_symlink():
            os.utime(path, (1_000_000_000, 1_000_000_000))
            path.chmod(0o700)
    assert bundles.build(other) == first
    assert bundles.build(other) == first


def test_the_bytes_do_not_depend_on_the_machine(tmp_path: Path) -> None:
    # Written down, so that a run on another machine, system or Python compares with this one.
    folder = app_folder(tmp_path / "app", code="app = 1\n")
    digest = "eec8d309ab95b7b21768c56921dd2438950f8af0191540b18f78a20b51992fb7"
    assert bundles.digest(bundles.build(folder)) == digest
    with zipfile.ZipFile(io.BytesIO(bundles.build(folder))) as made:
        entries = made.infolist()
    assert all(e.compress_type == zipfile.ZIP_STORED and e.create_system == 3 for e in entries)
    assert {e.date_time for e in entries} == {(2024, 10, 1, 0, 0, 0)}


def test_another_byte_is_another_bundle(tmp_path: Path) -> None:
    folder = app_folder(tmp_path / "app")
    first = bundles.digest(bundles.build(folder))
    (folder / "tiny" / "__init__.py").write_text("#")
    assert bundles.digest(bundles.build(folder)) != first


def test_what_a_bundle_says_about_itself(tmp_path: Path) -> None:
    told = bundles.describe(bundles.build(app_folder(tmp_path / "app")))
    assert (told.name, told.version) == ("tests/tiny", "1.0.0")
    assert told.components == {"clientapp": "tiny.client_app:app", "serverapp": "tiny.server_app:app"}
    assert told.config == {"rounds": 2, "depth.layers": 3}
    assert bundles.configured(told, {"rounds": 9}) == {"rounds": 9, "depth.layers": 3}
    with pytest.raises(Refusal, match=r"no setting 'round'; it has: depth\.layers, rounds") as caught:
        bundles.configured(told, {"round": 9})
    assert caught.value.code == "unknown-setting"


def test_the_example_can_be_built_and_unpacked(tmp_path: Path) -> None:
    bundle = bundles.build(EXAMPLE)
    bundles.unpack(bundle, tmp_path / "apps" / "quickstart")
    for path in (EXAMPLE / "quickstart").glob("*.py"):
        assert (tmp_path / "apps" / "quickstart" / "quickstart" / path.name).read_bytes() == path.read_bytes()


def test_unpacking_replaces_what_was_there(tmp_path: Path) -> None:
    bundle = bundles.build(app_folder(tmp_path / "app"))
    folder = tmp_path / "apps" / "x"
    bundles.unpack(bundle, folder)
    (folder / "tiny" / "stale.py").write_text("")
    (folder / "tiny" / "client_app.py").write_text("changed")
    bundles.unpack(bundle, folder)
    assert not (folder / "tiny" / "stale.py").exists()
    assert (folder / "tiny" / "client_app.py").read_text() != "changed"
    assert stat.S_IMODE((folder / "tiny" / "client_app.py").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [p.name for p in folder.parent.iterdir()] == ["x"]


def test_a_bundle_of_flwr_build_can_be_read(tmp_path: Path) -> None:
    fab = flower.build_fab(app_folder(tmp_path / "app"))
    bundles.unpack(fab, tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "tiny" / "client_app.py").is_file()


# --- refusals ---


def test_what_is_no_app_cannot_be_built(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        bundles.build(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"not a Flower app: pyproject.toml not found"):
        bundles.build(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'a'\n")
    with pytest.raises(UsageError, match="not a Flower app"):
        bundles.build(tmp_path)


def test_too_large_an_app_cannot_be_built(tmp_path: Path) -> None:
    folder = app_folder(tmp_path / "app")
    (folder / "data.json").write_bytes(b" " * (bundles.LONGEST + 1))
    with pytest.raises(UsageError, match="fab-exclude"):
        bundles.build(folder)


@pytest.mark.parametrize("name", ["quorsum", "flwr", "torch", "numpy", "json", "pytest"])
def test_names_of_installed_packages_cannot_be_in_an_app(tmp_path: Path, name: str) -> None:
    folder = app_folder(tmp_path / "app")
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("")
    with pytest.raises(UsageError, match=f"holds {name}, which"):
        bundles.build(folder)


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("numpy.py", ("numpy",)),
        ("flwr/app.py", ("flwr",)),
        ("quorsum.cpython-311-x86_64-linux-gnu.so", ("quorsum",)),
        ("torch.pyc", ("torch",)),
        ("mine/numpy.py", ()),
        ("numpy.md", ()),
    ],
)
def test_names_of_installed_packages_are_found(name: str, taken: tuple[str, ...]) -> None:
    assert bundles.shadowed(archive({name: b""})) == taken


@pytest.mark.parametrize(
    "name",
    ["../evil.py", "/evil.py", "a/../../evil.py", "a//b.py", "./a.py", "C:/evil.py", "a\\..\\evil.py", "a/. /b.py",
     "", " ", "a\nb.py", "x" * 500, "a:b", ".. /evil.py"],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refusal) as caught:
        bundles.unpack(archive({"ok.py": b"", name: b"x"}), tmp_path / "deep" / "folder")
    assert caught.value.code == "unsafe-bundle"
    assert list(tmp_path.iterdir()) == []


def test_a_name_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    bundle = archive({"goodXpy": b"x"}).replace(b"goodXpy", b"go\x00dXpy")
    with pytest.raises(Refusal) as caught:
        bundles.unpack(bundle, tmp_path / "folder")
    assert caught.value.code == "unsafe-bundle"


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFBLK])
def test_links_and_devices_are_refused(tmp_path: Path, kind: int) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        entry = zipfile.ZipInfo("a.py")
        entry.external_attr = (kind | 0o777) << 16
        made.writestr(entry, "/etc/passwd")
    with pytest.raises(Refusal, match="ordinary file"):
        bundles.unpack(buffer.getvalue(), tmp_path / "folder")


def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="twice"):
        bundles.unpack(archive({"a.py": b"1", "A.py": b"2"}), tmp_path / "folder")


def test_too_much_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="bytes that are allowed"):
        bundles.unpack(archive({"a.json": bytes(bundles.LONGEST + 1)}, compress=True), tmp_path / "folder")
    with pytest.raises(Refusal, match="bytes that are allowed"):
        bundles.unpack(bytes(bundles.LONGEST + 1), tmp_path / "folder")
    with pytest.raises(Refusal, match="files that are allowed"):
        bundles.unpack(archive({f"{k}.py": b"" for k in range(bundles.MOST_FILES + 1)}), tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_lies_is_found_out(tmp_path: Path) -> None:
    bundle = bytearray(archive({"a.json": bytes(bundles.LONGEST + 1)}, compress=True))
    # The uncompressed size, in the local header and in the directory.
    struct.pack_into("<I", bundle, 22, 5)
    struct.pack_into("<I", bundle, bundle.rindex(b"PK\x01\x02") + 24, 5)
    with pytest.raises(Refusal):
        bundles.unpack(bytes(bundle), tmp_path / "folder")


def test_encrypted_entries_are_refused(tmp_path: Path) -> None:
    bundle = bytearray(archive({"a.py": b"x"}))
    bundle[bundle.rindex(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(Refusal, match="encrypted"):
        bundles.unpack(bytes(bundle), tmp_path / "folder")


@pytest.mark.parametrize("data", [b"", b"PK", b"x" * 1000, archive({"a.py": b"hello"})[:-30]])
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    for read in (bundles.describe, bundles.shadowed, lambda b: bundles.unpack(b, tmp_path / "folder")):
        with pytest.raises(Refusal) as caught:
            read(data)
        assert caught.value.code == "not-a-bundle"


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="damaged"):
        bundles.unpack(archive({"a.py": b"hello"}).replace(b"hello", b"jello"), tmp_path / "folder")


@pytest.mark.parametrize("project", [None, b"", b"\xff", b"[project]\nname = 'a'\n", b"x = "])
def test_an_archive_that_is_no_app_is_refused(project: bytes | None) -> None:
    entries = {"a.py": b""} if project is None else {"pyproject.toml": project}
    with pytest.raises(Refusal, match="not a bundle of a Flower app") as caught:
        bundles.describe(archive(entries))
    assert caught.value.code == "not-a-bundle"
