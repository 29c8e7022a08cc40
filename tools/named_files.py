"""Files that the user names to be written: looked at before long work, and told in one line when they cannot be."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from emu.errors import UserError


def write_text(path: Path, text: str, option: str) -> None:
    """Write a file that the user asked for; UserError when it cannot be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, option, error.strerror) from None


def check_writable(path: Path | None, option: str) -> None:
    """UserError when a file of this name cannot be written: told before a long measurement, not behind it."""
    if path is None:
        return
    if path.is_dir():
        trouble = errno.EISDIR
    elif not path.exists() and not path.parent.is_dir():
        trouble = errno.ENOENT
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        trouble = errno.EACCES
    else:
        return
    raise _unwritable(path, option, os.strerror(trouble))


def _unwritable(path: Path, option: str, why: str | None) -> UserError:
    return UserError(f"{option} {path}: {why}; choose a file that can be written")
