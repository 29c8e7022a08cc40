"""The explorer finds the historical mistakes of discovery and rescind (races.md, group A) without a schedule.

Nothing is told but the switch that is off. A7 and A8 are not among them: A7 needs a packet and a driver's stack, A8 a
device's stream that ends late, and neither is in this small world.
"""

from __future__ import annotations

import pytest

from tools.explore_cores import Setting
from tools.explore_search import Explorer, Violation

STUCK = "INV-15: OPENCHANNEL of relid 1 is never answered"


def found(setting: Setting, depth: int = 30) -> Violation | None:
    """What an exploration finds, done again to be sure."""
    explorer = Explorer(setting)
    try:
        violation = explorer.explore(depth).violation
        if violation is not None:
            again = explorer.replay(violation.schedule).violation
            assert again is not None and again.problems == violation.problems
        return violation
    finally:
        explorer.close()


@pytest.mark.parametrize("switch", ["rescind_own_queue", "wake_before_probe_wait"])
def test_a_mistake_in_the_order_of_messages_is_found(switch: str) -> None:
    """A rescind behind its own offer (A2), and one that wakes after the probe (A5): the opener waits for ever."""
    violation = found(Setting(1, 0, without=(switch,)))

    assert violation is not None and STUCK in violation.problems


def test_a_twin_rescind_is_found() -> None:
    """Two rescinds that are both handled (A6): a relid is given back twice, the second time another device's."""
    violation = found(Setting(1, 0, without=("rescind_once",), era="seed", twice=True))

    assert violation is not None and any("INV-30: RELID_RELEASED" in one for one in violation.problems)


@pytest.mark.soak
def test_a_rescind_that_misses_the_waiter_is_found() -> None:
    """An opener that does not look again once it is on the list (A4): found with the order of threads, not without."""
    switch = ("recheck_rescind_after_enlist",)

    violation = found(Setting(1, 0, threads=True, without=switch))

    assert violation is not None and STUCK in violation.problems
    assert found(Setting(1, 0, without=switch)) is None


@pytest.mark.soak
@pytest.mark.parametrize("era", ["current", "seed"])
def test_the_right_machine_breaks_nothing_however_deep(era: str) -> None:
    """Two devices, a sub-channel, twin rescinds, threads in every order to depth 12: no violation."""
    assert found(Setting(threads=True, era=era, twice=True), 12) is None
