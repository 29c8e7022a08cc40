"""Files that the user names to be written: looked at before long work, and told in one line when they cannot be."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
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


def check_writable(path: Path, option: str) -> None:
    """UserError when a file of this name cannot be written: told before a long measurement, not behind it."""
    trouble = _trouble(path)
    if trouble:
        raise _unwritable(path, option, os.strerror(trouble))


def check_apart(written: Mapping[str, Path | None], *read: Path | None) -> None:
    """UserError when a file to be written, by whatever name, is one of those that are read, or is written twice.

    `written` has the files by their options.
    """
    before: list[tuple[str, Path]] = []
    for option, path in written.items():
        if path is None:
            continue
        for one in read:
            if one is not None and _same(path, one):
                raise UserError(f"{option} {path}: that is {one} itself, which is read; name another file")
        for other, one in before:
            if _same(path, one):
                raise UserError(f"{option} {path}: {other} is written there; name another file")
        before.append((option, path))


def _same(one: Path, other: Path) -> bool:
    """Whether two names are of one file, also of one that is yet to be made; a pipe or a device takes both."""
    with contextlib.suppress(OSError, RuntimeError):
        if one.exists() and not one.is_file():
            return False
        return one.resolve() == other.resolve() or one.samefile(other)
    return False


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
    if os.access(path, os.W_OK):
        return 0
    return errno.EROFS if os.statvfs(path).f_flag & os.ST_RDONLY else errno.EACCES


def _unwritable(path: Path, option: str, why: str | None) -> UserError:
    return UserError(f"{option} {path}: {why}; choose a file that can be written")
