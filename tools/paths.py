"""Where files of ours go: the XDG directories, never the current one.

A variable that is unset, empty or relative counts as unset, as the XDG specification says.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_DIRECTORY: Final = "vmbus-emu"


def config_dir() -> Path:
    """What the user set: `$XDG_CONFIG_HOME/vmbus-emu`."""
    return _base("XDG_CONFIG_HOME", ".config")


def state_dir() -> Path:
    """What outlives a run and is not to be had again, such as crash records: `$XDG_STATE_HOME/vmbus-emu`."""
    return _base("XDG_STATE_HOME", ".local/state")


def cache_dir() -> Path:
    """What can be made again: `$XDG_CACHE_HOME/vmbus-emu`."""
    return _base("XDG_CACHE_HOME", ".cache")


def made(directory: Path) -> Path:
    """The same directory, made if it was not there, for this user alone."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def _base(variable: str, fallback: str) -> Path:
    value = os.environ.get(variable, "")
    base = Path(value) if value.startswith("/") else Path.home() / fallback
    return base / _DIRECTORY
