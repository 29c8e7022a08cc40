"""A tree of state: values at its leaves, branches by name, and branches that are looked at only when asked for.

A path names a node by the branches that lead to it (`channels/7/host/state`). Who asks for one leaf of a big
machine pays for the way to it and not for the rest.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from emu.errors import DeadlinePassed

Value = int | str | float | bool | list[Any] | None
Node = Any
"""A `Value`, a mapping of names to nodes, or a callable that gives one of the two."""

ATTEMPTS: Final = 100
UNREADABLE: Final = "unreadable"


def opened(node: Node) -> Node:
    """The node itself, looked at if it was not yet.

    What goes while one looks is looked at again; what cannot be read at all says so and spoils nothing else.
    """
    while callable(node):
        node = _looked_at(node)
    return node


def _looked_at(look: Callable[[], Node]) -> Node:
    trouble: Exception | None = None
    for _ in range(ATTEMPTS):
        try:
            return look()
        except AssertionError as stale:  # a name outlived its record between two looks
            trouble = stale
        except (ValueError, IndexError, OverflowError, UnicodeDecodeError, DeadlinePassed) as nonsense:
            return {UNREADABLE: str(nonsense)}
    return {UNREADABLE: str(trouble)}


def whole(node: Node) -> Node:
    """The node with everything below it looked at: mappings and values only, as JSON has them."""
    node = opened(node)
    if isinstance(node, Mapping):
        return {str(name): whole(child) for name, child in node.items()}
    return node


def parts_of(path: str) -> list[str]:
    """The names that a path is made of; slashes in front, behind and doubled mean nothing."""
    return [part for part in path.split("/") if part]


@dataclass(frozen=True, slots=True)
class NoSuchNode(Exception):
    """Nothing is at a path; `nearest` is the most similar one that exists."""

    path: str
    nearest: str

    def __str__(self) -> str:
        return f"nothing is at {self.path}; the nearest is {self.nearest or 'the whole tree (leave the path out)'}"


def find(root: Node, path: str) -> Node:
    """The opened node at a path (an empty one: the root). Raises NoSuchNode."""
    node = opened(root)
    walked: list[str] = []
    parts = parts_of(path)
    while parts:
        name, count = _child(node, parts)
        if not count:
            raise NoSuchNode("/".join(parts_of(path)), _nearest(node, walked, parts))
        node = opened(node[name])
        walked.append(name)
        parts = parts[count:]
    return node


def _child(node: Node, parts: list[str]) -> tuple[str, int]:
    """The branch that the first of these parts name, and how many of them: a thread's name has slashes in it."""
    if isinstance(node, Mapping):
        for count in range(len(parts), 0, -1):
            if (name := "/".join(parts[:count])) in node:
                return name, count
    return "", 0


def _nearest(node: Node, walked: list[str], missing: list[str]) -> str:
    """From the last node that exists on by the most similar names, as far as there are any."""
    path = list(walked)
    for part in missing:
        names = [str(name) for name in node] if isinstance(node, Mapping) else []
        similar = difflib.get_close_matches(part, names, n=1, cutoff=0.5)
        if not similar:
            # A number that is not there is most like its neighbour.
            similar = _neighbour(part, names)
        if not similar:
            break
        path += similar
        node = opened(node[similar[0]])
    return "/".join(path)


def _neighbour(part: str, names: list[str]) -> list[str]:
    numbers = [name for name in names if name.isdecimal()]
    if not part.isdecimal() or not numbers:
        return []
    return [min(numbers, key=lambda name: abs(int(name) - int(part)))]


def text_of(value: Value) -> str:
    """A leaf as text: lists separated by spaces, yes and no, `-` for what is not there."""
    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def flat(node: Node, path: str = "") -> Iterator[tuple[str, Value]]:
    """Every leaf below a node with its path, in the order of the tree; an empty branch is a leaf without value."""
    node = opened(node)
    if not isinstance(node, Mapping):
        yield path, node
        return
    if not node and path:
        yield path, None
    for name, child in node.items():
        yield from flat(child, f"{path}/{name}" if path else str(name))


def indented(node: Node, depth: int | None = None, level: int = 0) -> Iterator[str]:
    """The branches and leaves below a node as lines, two spaces a level; below `depth` levels only how many."""
    node = opened(node)
    assert isinstance(node, Mapping)
    leaves = {name: opened(child) for name, child in node.items()} if depth != 0 else {}
    width = max((len(str(name)) for name, child in leaves.items() if not isinstance(child, Mapping)), default=0)
    for name, child in leaves.items():
        if not isinstance(child, Mapping):
            yield f"{'  ' * level}{name:<{width}}  {text_of(child)}"
        elif depth == 1:
            yield f"{'  ' * level}{name}/  {_entries(child)}"
        else:
            yield f"{'  ' * level}{name}/" + ("  -" if not child else "")
            yield from indented(child, None if depth is None else depth - 1, level + 1)


SHOWN_NAMES: Final = 8


def _entries(node: Mapping[str, Node]) -> str:
    names = [str(name) for name in node]
    shown = " ".join(names[:SHOWN_NAMES])
    return f"{shown} … ({len(names)})" if len(names) > SHOWN_NAMES else shown or "-"
