"""Files to be written are looked at before long work: whatever is the matter with a name is one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emu.errors import UserError
from tools.named_files import check_apart, check_svg, check_writable, whole, write_text


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "Is a directory"),
        ("nowhere/out.svg", "No such file or directory"),
        ("a_file/out.svg", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("loop", "Too many levels of symbolic links"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, name: str, why: str) -> None:
    """The line names the option, the file and what the system says of it."""
    (tmp_path / "a_file").write_text("", encoding="utf-8")
    (tmp_path / "loop").symlink_to("loop")

    with pytest.raises(UserError) as refused:
        check_writable(tmp_path / name, "--plot")

    assert str(refused.value) == f"--plot {tmp_path / name}: {why}; choose a file that can be written"


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_is_somebody_elses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Neither a folder that may not be entered nor one that may not be written is an error of our own."""
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    if not there:

        def shut(path: Path) -> os.stat_result:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "stat", shut)

    with pytest.raises(UserError, match="Permission denied; choose a file that can be written"):
        check_writable(tmp_path / "out.svg", "--plot")


def test_a_file_that_can_be_written_is_neither_made_nor_touched(tmp_path: Path) -> None:
    """A new name stays free, an old file keeps its bytes."""
    old = tmp_path / "old"
    old.write_bytes(b"old")

    check_writable(None, "--plot")
    check_writable(old, "--plot")
    check_writable(tmp_path / "new", "--plot")

    assert (old.read_bytes(), (tmp_path / "new").exists()) == (b"old", False)


@pytest.mark.parametrize("alias", ["name", "symlink", "hard link"])
def test_what_is_read_is_not_overwritten(tmp_path: Path, alias: str) -> None:
    """A file under another name is still the file that the command reads."""
    source, other = tmp_path / "in.rec", tmp_path / "out"
    source.write_bytes(b"VMBUSREC")
    if alias == "symlink":
        other.symlink_to(source)
    elif alias == "hard link":
        other.hardlink_to(source)
    else:
        other = tmp_path / "." / "in.rec"

    with pytest.raises(UserError, match=f"--junit {other}: that is {source} itself, which is read"):
        check_apart(other, "--junit", None, source)


def test_files_apart_are_no_trouble(tmp_path: Path) -> None:
    """Neither another file nor one that is not there yet, nor no file at all, is one that is read."""
    for name in ("a", "b"):
        (tmp_path / name).write_text("same", encoding="utf-8")

    check_apart(tmp_path / "a", "-o", tmp_path / "b", None)
    check_apart(tmp_path / "new", "-o", tmp_path / "b")
    check_apart(None, "-o", tmp_path / "b")


def test_a_picture_of_another_kind_is_refused() -> None:
    """No SVG goes into a file whose name says PNG."""
    with pytest.raises(UserError, match=r"--plot x\.PNG: the picture is written as SVG; name the file x\.svg"):
        check_svg(Path("x.PNG"), "--plot", "the picture is")
    check_svg(Path("x.svg"), "--plot", "the picture is")
    check_svg(None, "--plot", "the picture is")


@pytest.mark.parametrize("old", [None, b"", b"old"])
def test_half_a_file_is_not_left(tmp_path: Path, old: bytes | None) -> None:
    """When the file system is full, what is there of the file goes, and the line says why."""
    path = tmp_path / "out"
    if old is not None:
        path.write_bytes(old)
        os.utime(path, ns=(0, 0))

    with pytest.raises(OSError, match="No space"), whole(path), path.open("w", encoding="utf-8") as out:
        out.write("half")
        out.flush()
        raise OSError(28, "No space left on device")

    assert not path.exists()


def test_a_file_that_could_not_be_opened_stays(tmp_path: Path) -> None:
    """Somebody else's file, and a device, are not removed."""
    path = tmp_path / "theirs"
    path.write_bytes(b"theirs")

    with pytest.raises(UserError, match="Is a directory"):
        write_text(tmp_path, "x", "-o")
    with pytest.raises(UserError, match="No space left on device"):
        write_text(Path("/dev/full"), "x", "-o")
    with pytest.raises(PermissionError), whole(path):
        raise PermissionError(13, "Permission denied", str(path))

    assert (path.read_bytes(), Path("/dev/full").exists()) == (b"theirs", True)
