"""The tree of state: a path looks at nothing beside it, a wrong one is told what is near."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from tools.state_node import UNREADABLE, NoSuchNode, find, flat, indented, text_of, whole


def never() -> NoReturn:
    """A branch that nobody may look at."""
    pytest.fail("looked at beside the path")


TREE: dict[str, Any] = {
    "channels": {
        "1": {"host": {"state": "OPEN", "open": True}, "guest": {"state": "OPENED"}},
        "12": {"host": {"state": "CLOSED", "open": False}},
    },
    "vps": lambda: {"0": {"sint": {"2": {"vector": "0xf3"}}}},
    "queues": {},
    "processes": {"user": {"pid": 1}, "user/1": {"pid": 2}},
    "counters": {"interrupts": 7, "names": ["a", "b"], "none": None},
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("channels/1/host/state", "OPEN"),
        ("/channels//1/guest/state/", "OPENED"),
        ("vps/0/sint/2/vector", "0xf3"),
        ("queues", {}),
        ("counters/interrupts", 7),
        ("processes/user/pid", 1),
        ("processes/user/1/pid", 2),
    ],
)
def test_path_finds_its_node(path: str, value: object) -> None:
    """Branches that are looked at on demand are; slashes too many mean nothing."""
    assert find(TREE, path) == value


def test_path_looks_at_nothing_beside_it() -> None:
    """One leaf of a big machine costs the way to it."""
    assert find({"big": never, "small": {"leaf": lambda: 3, "other": never}}, "small/leaf") == 3


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("chanels/1/host", "channels/1/host"),
        ("channels/9/host/state", "channels/12/host/state"),
        ("channels/1/host/stat", "channels/1/host/state"),
        ("channels/1/host/state/more", "channels/1/host/state"),
        ("zzzzzz", ""),
        ("vps/7/sint/2", "vps/0/sint/2"),
    ],
)
def test_unknown_path_is_told_the_nearest(path: str, nearest: str) -> None:
    """Names by their letters, numbers by their distance, as deep as anything is similar."""
    with pytest.raises(NoSuchNode) as caught:
        find(TREE, path)

    assert caught.value.nearest == nearest
    assert path.split("/")[0] in str(caught.value)


def test_stale_look_is_made_again() -> None:
    """A record that goes between two looks is met by another look."""
    tries = iter(range(3))

    def look() -> int:
        assert next(tries, None) is None, "stale"
        return 5

    assert whole({"a": look}) == {"a": 5}


def stale() -> NoReturn:
    """A record that is damaged for good."""
    raise AssertionError("channels[3]: stale")


def nonsense() -> NoReturn:
    """Bytes that are nothing."""
    raise ValueError("no such state")


@pytest.mark.parametrize("look", [stale, nonsense])
def test_what_cannot_be_read_spoils_nothing_else(look: Callable[[], NoReturn]) -> None:
    """A damaged record says so in its place; its neighbours are shown."""
    tree = whole({"bad": look, "good": 1})

    assert list(tree["bad"]) == [UNREADABLE]
    assert tree["good"] == 1


def test_flat_lines_are_paths_that_can_be_asked_for() -> None:
    """Each leaf once, under the path that finds it; an empty branch is a line, too."""
    lines = dict(flat(TREE))

    assert lines["channels/12/host/state"] == "CLOSED"
    assert lines["queues"] is None
    assert all(find(TREE, path) == value for path, value in lines.items() if value is not None)


def test_indented_lines_stop_at_their_depth() -> None:
    """Below the depth a branch says what is in it, and is not looked at."""
    assert list(indented({"a": {"b": 1, "c": {"d": 2}}, "e": {}}, 1)) == ["a/  b c", "e/  -"]
    assert list(indented({"a": {"b": 1, "c": {"d": 2}}})) == ["a/", "  b  1", "  c/", "    d  2"]


def test_leaves_are_words() -> None:
    """What a shell can use: yes and no, lists by spaces, a dash for nothing."""
    assert [text_of(value) for value in (True, False, None, [], [1, "x"], 0, "s")] == [
        "yes",
        "no",
        "-",
        "-",
        "1 x",
        "0",
        "s",
    ]
