"""Where files of ours go: the XDG directories, never the current one.

A variable that is unset, empty or relative counts as unset, as the XDG specification says; HOME does so, too.
"""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from pathlib import Path
from typing import Final

from emu.errors import UserError

_DIRECTORY: Final = "vmbus-emu"


class NotMade(UserError, OSError):
    """A directory of ours cannot be made: a line for the user, unless it is caught as the OSError that it is, too."""


def state_dir() -> Path:
    """What outlives a run and is not to be had again, such as crash records: `$XDG_STATE_HOME/vmbus-emu`."""
    return _base("XDG_STATE_HOME", ".local/state")


def cache_dir() -> Path:
    """What can be made again: `$XDG_CACHE_HOME/vmbus-emu`."""
    return _base("XDG_CACHE_HOME", ".cache")


def made(directory: Path) -> Path:
    """The same directory, made if it was not there, for this user alone."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        cure = "set HOME, or XDG_STATE_HOME and XDG_CACHE_HOME, to directories that can be written"
        raise NotMade(f"cannot make {directory}: {error.strerror}; {cure}") from None
    return directory


def _base(variable: str, fallback: str) -> Path:
    value = os.environ.get(variable, "")
    base = Path(value) if value.startswith("/") else _below_home(fallback)
    return base / _DIRECTORY


def _below_home(fallback: str) -> Path:
    """A place in the user's home; who has none that takes anything has one of his own for temporary files.

    A container's user without a name lives in / or nowhere, a system's user in /nonexistent.
    """
    temporary = Path(tempfile.gettempdir()) / f"{_DIRECTORY}-{os.getuid()}"
    try:
        # A HOME that is no place (empty, or ".") would be the root or the current directory.
        home = os.environ.get("HOME", "")
        place = Path(home if home.startswith("/") else pwd.getpwuid(os.getuid()).pw_dir) / fallback
    except KeyError:
        return temporary / fallback
    there = next((one for one in (place, *place.parents) if os.access(one, os.F_OK)), place)
    return place if os.access(there, os.W_OK) or not _is_ours(temporary) else temporary / fallback


def _is_ours(directory: Path) -> bool:
    """Whether a directory among everybody's is this user's, or still to be made: no link, and nobody else's."""
    try:
        found = directory.lstat()
    except FileNotFoundError:
        return True
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
