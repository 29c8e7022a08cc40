"""The explorer finds the historical mistakes of discovery and rescind (races.md, group A) without a schedule.

Nothing is told but the switch that is off. A7 and A8 are not among them: A7 needs a packet and a driver's stack, A8 a
device's stream that ends late, and neither is in this small world.
"""

from __future__ import annotations

import pytest

from emu.wire.messages import MessageType, RelidReleased, parse
from tools.explore_cores import Setting
from tools.explore_host import Host
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


def connected() -> list[bytes]:
    """What a guest says until it has asked for offers."""
    explorer = Explorer(Setting(1, 0))
    try:
        return explorer.said_by_guest()
    finally:
        explorer.close()


@pytest.mark.parametrize("switch", ["rescind_own_queue", "wake_before_probe_wait"])
def test_a_mistake_in_the_order_of_messages_is_found(switch: str) -> None:
    """A rescind behind its own offer (A2), and one that wakes after the probe (A5): the opener waits for ever."""
    violation = found(Setting(1, 0, without=(switch,)))

    assert violation is not None and STUCK in violation.problems


def test_an_offer_inside_whose_work_something_is_opened_is_found() -> None:
    """A3: a second offer, of any device, is counted behind one whose work waits for the host; a rescind waits for both.

    It takes two offers at once. One device with one sub-channel has none: the sub-channel's is sent only once the
    primary is open, and that device's next life only once the relid of the one before was given back.
    """
    violation = found(Setting(2, 0, without=("addchan_offload",)))

    assert violation is not None and STUCK in [one.replace("relid 2", "relid 1") for one in violation.problems]


@pytest.mark.soak
def test_a_sub_channel_that_is_opened_inside_its_offer_is_found() -> None:
    """A3 as it was met: two sub-channels of one device, the first of which is opened in the work of its offer."""
    violation = found(Setting(1, 2, without=("addchan_offload",)))

    assert violation is not None and "INV-15: OPENCHANNEL of relid 2 is never answered" in violation.problems
    assert found(Setting(1, 1, without=("addchan_offload",)), 20) is None


def test_no_rescind_is_said_again_once_the_relid_was_offered_again() -> None:
    """A host that says it twice means the same life of the relid."""
    host = Host(Setting(1, 0, twice=True))
    for payload in connected():
        host.do("receive", payload)
    host.do("offer", 0)
    host.do("revoke", 0)
    assert ("rescind-again", 1) in host.actions()

    host.do("receive", RelidReleased(1).pack())
    sent, _ = host.do("offer", 0)

    assert parse(sent[0]).TYPE is MessageType.OFFERCHANNEL
    assert ("rescind-again", 1) not in host.actions()


@pytest.mark.soak
def test_a_twin_rescind_is_found() -> None:
    """Two rescinds that are both handled (A6): one of them goes on with a channel that the other has freed."""
    violation = found(Setting(1, 0, threads=True, without=("rescind_once",), era="seed", twice=True), 20)

    assert violation is not None and any("stale, generation" in one for one in violation.problems)


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
