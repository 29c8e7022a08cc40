"""A tree copied into a tmpfs and kept current, for computers where FUSE is not to be had.

A copy is as old as its last refresh, and cannot say an error: an attribute whose read would fail is not there
until it can be read. A file's text is replaced by renaming, so nobody reads half of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Final, TypeAlias

from tools.sysfs_nodes import Attribute, Directory, Link

_FRESH: Final = ".fresh"

Entry: TypeAlias = Link | tuple[int, str] | None
"""A link, (mode, text) of a file, None for a directory."""


class TmpfsCopy:
    """Trees by name, each in a directory of its own below the directory `root_fd`."""

    def __init__(self, root_fd: int, trees: dict[str, Directory]) -> None:
        self._root_fd: Final = root_fd
        self._trees: Final = trees
        self._have: dict[str, Entry] = {}

    def refresh(self) -> None:
        """Make the copy what the trees are now; what did not change is not touched."""
        want = dict(self._walk())
        # Links come last and go first, as the kernel has it: no link of the bus leads to a device that is half there.
        gone = reversed([path for path in self._have if self._differs(path, want)])
        for path in sorted(gone, key=lambda path: not isinstance(self._have[path], Link)):
            self._remove(path)
        new = [path for path, entry in want.items() if path not in self._have or self._have[path] != entry]
        for path in sorted(new, key=lambda path: isinstance(want[path], Link)):
            self._put(path, want[path])
        self._have = want

    def _differs(self, path: str, want: dict[str, Entry]) -> bool:
        """Whether what is there must go before the new can come: it is not wanted, or of another kind."""
        return path not in want or type(want[path]) is not type(self._have[path])

    def _walk(self) -> Iterator[tuple[str, Entry]]:
        """Every entry by path, behind the directory that holds it."""
        for name, directory in self._trees.items():
            yield name, None
            yield from _below(name, directory)

    def _remove(self, path: str) -> None:
        if self._have[path] is None:
            os.rmdir(path, dir_fd=self._root_fd)
        else:
            os.unlink(path, dir_fd=self._root_fd)
        del self._have[path]

    def _put(self, path: str, entry: Entry) -> None:
        if entry is None:
            os.mkdir(path, 0o755, dir_fd=self._root_fd)
            return
        with suppress(FileNotFoundError):
            os.unlink(_FRESH, dir_fd=self._root_fd)
        if isinstance(entry, Link):
            os.symlink(entry.target, _FRESH, dir_fd=self._root_fd)
        else:
            mode, text = entry
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(os.open(_FRESH, flags, mode, dir_fd=self._root_fd), "w") as file:
                os.fchmod(file.fileno(), mode)
                file.write(text)
        os.rename(_FRESH, path, src_dir_fd=self._root_fd, dst_dir_fd=self._root_fd)


def _below(path: str, directory: Directory) -> Iterator[tuple[str, Entry]]:
    for name in directory.names():
        entry = directory.find(name)
        place = f"{path}/{name}"
        match entry:
            case Directory():
                yield place, None
                yield from _below(place, entry)
            case Link():
                yield place, entry
            case Attribute() if not entry.mode & 0o444:
                yield place, (entry.mode, "")
            case Attribute():
                # A read that fails has no text that a file could hold.
                with suppress(OSError):
                    yield place, (entry.mode, entry.show())
