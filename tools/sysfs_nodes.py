"""What a tree of attributes is made of: directories, links and attributes, as kernfs has them.

A tree is asked, never stored: a directory finds its entries, and an attribute's text is made, when somebody
looks. `show` says what a read gives, or raises OSError with the errno that a read gets; so does `store` for a write.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias


class Directory(ABC):
    """Entries by name; what went away is not found any more."""

    @abstractmethod
    def names(self) -> list[str]:
        """Names of the entries that are there now."""

    @abstractmethod
    def find(self, name: str) -> Node | None:
        """The entry of that name, None if there is none."""


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True, slots=True)
class Attribute:
    """A file of one value, a text of at most a page; `mode` is the kernel's. What has no `store` cannot be written."""

    show: Callable[[], str]
    mode: int = 0o444
    store: Callable[[str], None] | None = None


def write_only(store: Callable[[str], None]) -> Attribute:
    """A file that is only written."""

    def show() -> str:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    return Attribute(show, 0o200, store)


Node: TypeAlias = Directory | Link | Attribute


class FixedDirectory(Directory):
    """A directory whose entries are known when it is made."""

    def __init__(self, entries: Mapping[str, Node]) -> None:
        self._entries: Final = entries

    def names(self) -> list[str]:
        """All of them."""
        return list(self._entries)

    def find(self, name: str) -> Node | None:
        """One of them."""
        return self._entries.get(name)


class ListedDirectory(Directory):
    """A directory whose entries somebody else lists and finds."""

    def __init__(self, names: Callable[[], list[str]], find: Callable[[str], Node | None]) -> None:
        self._names: Final = names
        self._find: Final = find

    def names(self) -> list[str]:
        """What is listed now."""
        return self._names()

    def find(self, name: str) -> Node | None:
        """What is found now, listed or not."""
        return self._find(name)
