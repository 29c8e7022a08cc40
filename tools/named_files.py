"""Files that the user names to be written: looked at before long work, and told in one line when they cannot be."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from emu.errors import UserError

OTHER_PICTURES: Final = frozenset({".png", ".gif", ".jpg", ".jpeg", ".webp", ".pdf"})


def write_text(path: Path, text: str, option: str) -> None:
    """Write a file that the user asked for; UserError when it cannot be, and no half of it is left."""
    try:
        with whole(path), path.open("w", encoding="utf-8") as out:
            out.write(text)
    except OSError as error:
        raise _unwritable(path, option, error.strerror) from None


@contextlib.contextmanager
def whole(path: Path) -> Iterator[None]:
    """Remove a file that is not finished: half of it looks like all of it to some readers.

    A pipe or a device is not ours to remove, nor a file that could not even be opened.
    """
    before = _identity(path)
    try:
        yield
    except BaseException:
        after = _identity(path)
        if after is not None and after != before:
            path.unlink()
        raise


def _identity(path: Path) -> tuple[int, ...] | None:
    """What tells one content of a regular file from another; None where there is no such file."""
    with contextlib.suppress(OSError):
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    return None


def check_writable(path: Path | None, option: str) -> None:
    """UserError when a file of this name cannot be written: told before a long measurement, not behind it."""
    if path is None:
        return
    trouble = _trouble(path)
    if trouble:
        raise _unwritable(path, option, os.strerror(trouble))


def check_apart(path: Path | None, option: str, *read: Path | None) -> None:
    """UserError when the file to be written is, by whatever name, one of those that are read."""
    for one in read:
        with contextlib.suppress(OSError):
            if path is not None and one is not None and path.samefile(one):
                raise UserError(f"{option} {path}: that is {one} itself, which is read; name another file")


def check_svg(path: Path | None, option: str, what: str) -> None:
    """UserError when a picture, `what`, is to go into a file that says it is one of another kind."""
    if path is not None and path.suffix.lower() in OTHER_PICTURES:
        raise UserError(f"{option} {path}: {what} written as SVG; name the file {path.with_suffix('.svg')}")


def _trouble(path: Path) -> int:
    """The errno of an attempt to write it, or 0; nothing is opened, nor made."""
    try:
        try:
            found = path.stat()
        except FileNotFoundError:
            path = path.parent
            path.stat()
        else:
            if stat.S_ISDIR(found.st_mode):
                return errno.EISDIR
    except OSError as error:  # also a name that is too long, or in a folder that is somebody else's
        return error.errno or errno.EIO
    return 0 if os.access(path, os.W_OK) else errno.EACCES


def _unwritable(path: Path, option: str, why: str | None) -> UserError:
    return UserError(f"{option} {path}: {why}; choose a file that can be written")
