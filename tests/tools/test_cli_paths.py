"""Where files go: the XDG directories, or their defaults in the home directory."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from emu.errors import UserError
from tools.paths import cache_dir, made, state_dir

PLACES = [
    (state_dir, "XDG_STATE_HOME", ".local/state"),
    (cache_dir, "XDG_CACHE_HOME", ".cache"),
]


@pytest.mark.parametrize(("directory", "variable", "_fallback"), PLACES)
def test_variable_says_where(
    monkeypatch: pytest.MonkeyPatch, directory: Callable[[], Path], variable: str, _fallback: str
) -> None:
    """An absolute path in the variable is taken."""
    monkeypatch.setenv(variable, "/somewhere/else")

    assert directory() == Path("/somewhere/else/vmbus-emu")


@pytest.mark.parametrize("value", ["", "relative/path"])
@pytest.mark.parametrize(("directory", "variable", "fallback"), PLACES)
def test_unusable_variable_counts_as_unset(
    monkeypatch: pytest.MonkeyPatch,
    directory: Callable[[], Path],
    variable: str,
    fallback: str,
    value: str,
    tmp_path: Path,
) -> None:
    """Empty and relative values are ignored, as the specification asks."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, value)

    assert directory() == tmp_path / fallback / "vmbus-emu"


def test_directory_is_made_for_its_user_alone(tmp_path: Path) -> None:
    """A directory that was not there is made, and nobody else may read it."""
    directory = made(tmp_path / "a" / "b")

    assert directory.stat().st_mode & 0o777 == 0o700
    assert made(directory) == directory


def test_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    """A file is in its way: the user's to mend, or an OSError for who can go on without."""
    (tmp_path / "a").write_text("")

    for kind in (UserError, OSError):
        with pytest.raises(kind, match="cannot make .*/a/b: Not a directory; set HOME"):
            made(tmp_path / "a" / "b")


@pytest.mark.parametrize("home", [None, "", ".", "here"])
def test_home_that_is_no_place_counts_as_unset(monkeypatch: pytest.MonkeyPatch, home: str | None) -> None:
    """Nothing goes into the root or the current directory: the user's home is the one in /etc/passwd."""
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: SimpleNamespace(pw_dir=tempfile.gettempdir()))
    if home is None:
        monkeypatch.delenv("HOME", raising=False)
    else:
        monkeypatch.setenv("HOME", home)

    assert state_dir() == Path(tempfile.gettempdir()) / ".local/state/vmbus-emu"


def test_user_without_a_home_has_a_place_of_his_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No HOME, and no line in /etc/passwd either."""

    def nobody(_uid: int) -> NoReturn:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)

    assert state_dir() == Path(tempfile.gettempdir()) / f"vmbus-emu-{os.getuid()}" / ".local/state/vmbus-emu"


@pytest.mark.parametrize("theirs", [False, True])
def test_home_that_takes_nothing_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, theirs: bool) -> None:
    """A container's user without a name has HOME=/, where he may make nothing; nothing of anybody else's is used."""
    place = tmp_path / f"vmbus-emu-{os.getuid()}"
    if theirs:
        place.mkdir()
        place.chmod(0o777)
    monkeypatch.setenv("HOME", "/")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))

    below = Path("/") if theirs else place
    assert state_dir() == below / ".local/state/vmbus-emu"


def test_home_that_is_to_be_made_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home below a directory of the user's is made with what goes into it, as it always was."""
    monkeypatch.setenv("HOME", str(tmp_path / "new"))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)

    assert made(state_dir()) == tmp_path / "new" / ".local/state/vmbus-emu"
