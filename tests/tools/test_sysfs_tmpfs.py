"""The copy in a directory of real files: it becomes what the tree is, and only touches what changed."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.sysfs_nodes import Attribute, FixedDirectory, Link, Node, write_only
from tools.sysfs_tmpfs import TmpfsCopy


@pytest.fixture
def entries() -> dict[str, Node]:
    """A tree of each kind of node, to be changed by the test."""
    return {
        "device": FixedDirectory({"id": Attribute(lambda: "3\n"), "cpu": Attribute(lambda: "0\n", 0o644)}),
        "link": Link("../over/there"),
    }


@pytest.fixture
def copy(tmp_path: Path, entries: dict[str, Node]) -> Iterator[TmpfsCopy]:
    """A copy of that tree below `tree`, not yet made."""
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield TmpfsCopy(root, {"tree": FixedDirectory(entries)})
    os.close(root)


def found(root: Path) -> dict[str, str]:
    """Every entry below a directory: a link's target, a file's text."""
    return {
        str(path.relative_to(root)): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def test_copy_is_the_tree(tmp_path: Path, copy: TmpfsCopy) -> None:
    """Texts, targets and modes are those of the tree, and nothing else lies about."""
    copy.refresh()

    assert found(tmp_path) == {
        "tree/device/id": "3\n",
        "tree/device/cpu": "0\n",
        "tree/link": "../over/there",
    }
    assert stat.S_IMODE((tmp_path / "tree/device/id").stat().st_mode) == 0o444
    assert stat.S_IMODE((tmp_path / "tree/device/cpu").stat().st_mode) == 0o644


def test_file_that_is_only_written_is_there_and_empty(
    tmp_path: Path, copy: TmpfsCopy, entries: dict[str, Node]
) -> None:
    """It has no text, and that is no error."""
    entries["new_id"] = write_only(lambda text: None)
    copy.refresh()

    status = (tmp_path / "tree/new_id").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_size) == (0o200, 0)


def test_refresh_follows_what_changes(tmp_path: Path, copy: TmpfsCopy, entries: dict[str, Node]) -> None:
    """What came, went, changed its text or its kind: the copy is the new tree, to the last entry."""
    copy.refresh()
    entries["device"] = FixedDirectory({"id": Attribute(lambda: "4\n"), "new": FixedDirectory({})})
    entries["link"] = FixedDirectory({"now": Link("a directory")})
    entries["file"] = Attribute(lambda: "text")
    copy.refresh()
    between = found(tmp_path)
    entries["link"], entries["device"] = Link("again"), Attribute(lambda: "a file")
    del entries["file"]

    copy.refresh()

    assert between == {"tree/device/id": "4\n", "tree/link/now": "a directory", "tree/file": "text"}
    assert found(tmp_path) == {"tree/link": "again", "tree/device": "a file"}


def test_reader_of_a_file_never_sees_half_of_the_next(
    tmp_path: Path, copy: TmpfsCopy, entries: dict[str, Node]
) -> None:
    """A file is replaced as a whole: who has it open goes on reading the text it had."""
    texts = iter(["1\n", "a longer text\n"])
    entries["file"] = Attribute(lambda: next(texts))
    copy.refresh()

    with (tmp_path / "tree/file").open() as old:
        copy.refresh()

        assert old.read() == "1\n"
        assert (tmp_path / "tree/file").read_text() == "a longer text\n"


def test_what_did_not_change_is_not_touched(tmp_path: Path, copy: TmpfsCopy) -> None:
    """A refresh that finds nothing new leaves every file as it is."""
    copy.refresh()
    before = {path: path.lstat().st_ino for path in tmp_path.rglob("*")}

    copy.refresh()

    assert {path: path.lstat().st_ino for path in tmp_path.rglob("*")} == before


def test_link_never_leads_to_what_is_half_there(
    tmp_path: Path, copy: TmpfsCopy, entries: dict[str, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when its device is whole, and goes before anything of the device does."""
    entries["bus"] = FixedDirectory({"a": Link("../device")})
    entries.update({"device": entries.pop("device")})  # behind the link, in the order of the tree
    whole = {"id", "cpu"}
    seen = []

    def looking(call: Callable[..., None]) -> Callable[..., None]:
        def then_look(*arguments: Any, **more: Any) -> None:
            call(*arguments, **more)
            link = tmp_path / "tree/bus/a"
            if link.is_symlink():
                seen.append({path.name for path in link.iterdir()})

        return then_look

    for name in ("mkdir", "rmdir", "rename", "unlink"):
        monkeypatch.setattr(os, name, looking(getattr(os, name)))
    copy.refresh()
    entries.clear()
    copy.refresh()

    assert seen and all(names == whole for names in seen)
    assert found(tmp_path) == {}


def test_attribute_that_cannot_be_read_is_absent_until_it_can(
    tmp_path: Path, copy: TmpfsCopy, entries: dict[str, Node]
) -> None:
    """A file cannot say EINVAL, so it is not there; opening it fails as well."""
    allocated = iter([False, True, False])

    def show() -> str:
        if not next(allocated):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return "1\n"

    entries["ring"] = Attribute(show)
    seen = []
    for _ in range(3):
        copy.refresh()
        seen.append((tmp_path / "tree/ring").exists())

    assert seen == [False, True, False]
