"""What this computer lacks for some tests: they are deselected, and the summary names each with its cure.

Workers of `pytest-xdist` collect, and only the controller writes a summary: so a worker hands its list over when
it ends.
"""

from __future__ import annotations

from typing import Any, Final

import pytest

_LISTED: Final = pytest.StashKey[dict[str, str]]()
_HANDED_OVER: Final = "vmbus_emu_lacking"


def deselect(config: pytest.Config, items: list[pytest.Item], lacking: dict[pytest.Item, str]) -> None:
    """Take tests out of `items`; `lacking` says for each what is missing and how to have it."""
    if not lacking:
        return
    items[:] = [item for item in items if item not in lacking]
    config.hook.pytest_deselected(items=list(lacking))
    listed = config.stash.setdefault(_LISTED, {})
    listed.update((item.nodeid, why) for item, why in lacking.items())


def hand_over(config: pytest.Config) -> None:
    """In a worker that ends: give the controller the list."""
    if hasattr(config, "workeroutput"):
        config.workeroutput[_HANDED_OVER] = config.stash.get(_LISTED, {})


def take_over(config: pytest.Config, node: Any) -> None:
    """In the controller: take a worker's list (all workers collect the same)."""
    listed = config.stash.setdefault(_LISTED, {})
    listed.update(getattr(node, "workeroutput", {}).get(_HANDED_OVER, {}))


def summary(config: pytest.Config) -> list[str]:
    """A line for each test that was left out."""
    return [f"deselected, {why}: {nodeid}" for nodeid, why in config.stash.get(_LISTED, {}).items()]
