"""Files to be written are looked at before long work: whatever is the matter with a name is one line."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import click
import pytest

from emu.errors import UserError
from tools import cli
from tools.cli import COMMANDS
from tools.exit_status import ExitStatus
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


def test_a_file_system_that_takes_nothing_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's permissions are in the way of who writes to a read-only mount, root's neither."""
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_flag=os.ST_RDONLY))

    with pytest.raises(UserError, match="Read-only file system; choose a file that can be written"):
        check_writable(tmp_path / "out.svg", "--plot")


def test_a_file_that_can_be_written_is_neither_made_nor_touched(tmp_path: Path) -> None:
    """A new name stays free, an old file keeps its bytes."""
    old = tmp_path / "old"
    old.write_bytes(b"old")

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
        check_apart({"--record": None, "--junit": other}, None, source)


def test_files_apart_are_no_trouble(tmp_path: Path) -> None:
    """Neither another file nor one that is not there yet, nor no file at all, is one that is read."""
    for name in ("a", "b"):
        (tmp_path / name).write_text("same", encoding="utf-8")

    check_apart({"-o": tmp_path / "a", "--junit": tmp_path / "c"}, tmp_path / "b", None)
    check_apart({"-o": tmp_path / "new", "--junit": tmp_path / "newer"}, tmp_path / "b")
    check_apart({"-o": None, "--junit": None}, tmp_path / "b")


@pytest.mark.parametrize("there", [False, True])
def test_one_file_is_not_written_twice(tmp_path: Path, there: bool) -> None:
    """Two outputs under two names of one file, whether it is there yet or not: the second would end the first."""
    one, other = tmp_path / "out", tmp_path / "folder" / ".." / "out"
    (tmp_path / "folder").mkdir()
    if there:
        one.write_text("old", encoding="utf-8")

    with pytest.raises(UserError, match=r"--junit .*/folder/\.\./out: --record is written there; name another file"):
        check_apart({"--record": one, "--junit": other})


def test_a_device_takes_as_many_outputs_as_one_likes() -> None:
    """What is not wanted goes to /dev/null, twice if need be."""
    check_apart({"--hgrm": Path("/dev/null"), "--hlog": Path("/dev/null")}, Path("/dev/null"))


READ: Final = {"--stream", "--compare", "--from", "--replay", "--plugin", "--dir"}
"""Options that name a file or a folder that is read, or made."""


def options_that_write() -> list[tuple[tuple[str, ...], str]]:
    """Every option of a file to be written: the words of its command, and its own name."""
    found = []
    group = cli.vmbus_emu
    commands: list[tuple[tuple[str, ...], click.Command]] = [
        ((name,), command) for name in COMMANDS if (command := group.get_command(click.Context(group), name))
    ]
    for words, command in commands:
        if isinstance(command, click.Group):
            commands += [((*words, name), one) for name, one in command.commands.items()]
        for one in command.params:
            if isinstance(one, click.Option) and isinstance(one.type, click.Path) and not READ & set(one.opts):
                found.append((words, one.opts[0]))
    return found


@pytest.mark.parametrize(("words", "option"), options_that_write())
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("new/", "that names a folder; name the file in it"),
        ("there/", "that names a folder; name the file in it"),
        ("there/.", "that names a folder; name the file in it"),
        ("there", "Is a directory; choose a file that can be written"),
        ("", "that is no name; name a file"),
        ("nowhere/out", "No such file or directory; choose a file that can be written"),
    ],
)
def test_every_option_that_names_a_file_refuses_what_is_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    option: str,
    name: str,
    why: str,
) -> None:
    """One line and status 2, before anything is run or made: also of a name whose end a path forgets."""
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)

    assert cli.main([*words, option, name]) == ExitStatus.USAGE

    assert capsys.readouterr() == ("", f"vmbus-emu: {option} {name}: {why}\n")
    assert [one.name for one in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(("words", "option"), [one for one in options_that_write() if one[1] != "-o"])
def test_a_file_beside_the_output_is_not_stdout(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], option: str
) -> None:
    """`-` is stdout where it is the output itself; a file of that name was never meant."""
    assert cli.main([*words, option, "-"]) == ExitStatus.USAGE

    said = "this goes into a file, not to stdout; name it (./- if it is to be called that)"
    assert capsys.readouterr() == ("", f"vmbus-emu: {option} -: {said}\n")


@pytest.mark.parametrize(
    "words",
    [
        ("explore", "--schedule-out", "{file}", "--replay", "{file}"),
        ("races", "show", "{file}", "--svg", "{file}"),
        ("races", "show", "--from", "{file}", "--svg", "{file}"),
        ("races", "run", "{file}", "--record", "{file}"),
        ("races", "run", "{file}", "--junit", "{file}"),
        ("run", "--plugin", "{file}", "--record", "{file}"),
    ],
)
def test_what_a_command_reads_is_not_its_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    """The file keeps its bytes, and one line says which option named it again."""
    file = tmp_path / "file.toml"
    file.write_text("[machine]\n", encoding="utf-8")

    assert cli.main([word.format(file=file) for word in words]) == ExitStatus.USAGE

    said = capsys.readouterr().err
    assert f"{file}: that is {file} itself, which is read; name another file" in said
    assert file.read_text(encoding="utf-8") == "[machine]\n"


@pytest.mark.parametrize(
    ("words", "last"),
    [
        (("latency", "--hgrm", "out", "--hlog", "out"), "--hlog out: --hgrm"),
        (("latency", "--plot", "out", "--record", "./out"), "--plot out: --record"),
        (("stress", "--junit", "out", "--record", "out"), "--junit out: --record"),
        (("races", "run", "A1", "--junit", "out", "--record", "out"), "--junit out: --record"),
        (("profile", "--plot", "out", "--flame", "out"), "--flame out: --plot"),
    ],
)
def test_no_command_writes_one_file_twice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    last: str,
) -> None:
    """Told before anything is run."""
    monkeypatch.chdir(tmp_path)

    assert cli.main(list(words)) == ExitStatus.USAGE

    assert capsys.readouterr() == ("", f"vmbus-emu: {last} is written there; name another file\n")
    assert list(tmp_path.iterdir()) == []


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
