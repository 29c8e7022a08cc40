"""The explorer finds the historical mistakes of discovery and rescind (races.md A2 to A6) without a schedule.

Each mistake is put back into the real guest by hand here; nothing else is told.
"""

from __future__ import annotations

import errno
from typing import Any

import pytest

from emu.syncpoint import Point
from emu.wire.messages import MessageType
from guestproc.protocol import offers, opening, pending, rescinds
from guestproc.protocol.triage import Triage
from guestproc.vmbus import channel, channel_mgmt
from guestproc.vmbus.connection import vmbus_post_msg
from guestproc.vmbus.requests import enter_request, leave_request, wait_for_reply
from tools.explore_cores import Setting
from tools.explore_search import Explorer, Violation

STUCK = "INV-15: OPENCHANNEL of relid 1 is never answered"


def found(setting: Setting, depth: int) -> Violation | None:
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


def probe_in_the_offer(monkeypatch: pytest.MonkeyPatch, *, counted: bool) -> None:
    """The offer's work runs the driver's probe itself, while the offer still counts or not."""

    def process(current: Any, newchannel: Any, item: Any) -> None:
        connection, actor = current.connection, current.actor
        with connection.cpus_mutex.hold(actor), connection.channel_mutex.hold(actor):
            assert offers.enter_channel(current.tables, newchannel).refusal is None
        if not counted:
            channel_mgmt.offer_done(current)
        channel_mgmt.vmbus_add_channel_work(current, item)
        current.tables.work_queues.discard(item)
        if counted:
            channel_mgmt.offer_done(current)

    monkeypatch.setattr(channel_mgmt, "vmbus_process_offer", process)


@pytest.mark.parametrize("threads", [False, True])
def test_a_rescind_behind_its_own_offer_is_found(threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One ordered queue for both (A2): the rescind that would release the probe is queued behind it."""
    probe_in_the_offer(monkeypatch, counted=False)
    monkeypatch.setattr(Triage, "queue", lambda _self, era: era.offer_queue)

    violation = found(Setting(1, 0, threads), 30)

    assert violation is not None and STUCK in violation.problems


def test_an_open_inside_the_offer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe while the offer counts (A3): the rescind that would release it waits for the count."""
    probe_in_the_offer(monkeypatch, counted=True)

    violation = found(Setting(1, 0), 9)

    assert violation is not None and STUCK in violation.problems
    assert "INV-28: queue 1 of the guest waits for ever" in violation.problems


def test_a_rescind_that_misses_the_waiter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An opener that looks for a rescind before it joins the list, and not after (A4): it waits for ever."""

    def open_on_host(current: Any, one: Any, userdata: bytes) -> int:
        message = opening.open_message(one, userdata)
        if one.rescind.load():
            return -errno.ENODEV
        if current.armed[Point.OPEN_BEFORE_LIST_ADD]:
            current.reach(Point.OPEN_BEFORE_LIST_ADD, one.relid)
        request = enter_request(
            current, MessageType.OPENCHANNEL, child_relid=one.relid, openid=one.openid, channel=one.handle
        )
        assert request is not None
        try:
            result = vmbus_post_msg(current, message) or wait_for_reply(current, request)
            return result or pending.open_result(request, rescinded=one.rescind.load() != 0)
        finally:
            leave_request(current, request)

    monkeypatch.setattr(channel, "_open_on_host", open_on_host)

    violation = found(Setting(1, 0, threads=True), 30)

    assert violation is not None and STUCK in violation.problems
    assert Point.OPEN_BEFORE_LIST_ADD.text in [event.get("until") for event in violation.schedule]
    assert found(Setting(1, 0), 12) is None


def test_a_rescind_that_wakes_after_the_probe_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rescind that waits for the probe before it wakes who waits (A5): the probe is who waits."""
    clean_up = channel_mgmt.vmbus_rescind_cleanup

    def late(current: Any, one: Any) -> None:
        current.connection.state_wait.wait_until_timeout(
            current.actor, lambda: one.probe_done.load() == 1, channel_mgmt.HANDLED_TIMEOUT_NS
        )
        clean_up(current, one)

    monkeypatch.setattr(channel_mgmt, "vmbus_rescind_cleanup", late)

    violation = found(Setting(1, 0), 9)

    assert violation is not None and STUCK in violation.problems


@pytest.mark.soak
def test_a_twin_rescind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rescinds that both work on what they looked up (A6), where two workers take them: a record that is gone."""
    reset = channel.vmbus_reset_channel_cb

    def looked_up(current: Any, one: Any) -> None:
        if current.armed[Point.RESCIND_AFTER_LOOKUP]:
            current.reach(Point.RESCIND_AFTER_LOOKUP)
        reset(current, one)

    monkeypatch.setattr(rescinds, "claim", lambda tables, relid: tables.relids.lookup(relid))
    monkeypatch.setattr(channel_mgmt, "vmbus_reset_channel_cb", looked_up)

    violation = found(Setting(1, 0, threads=True, era="seed", twice=True), 30)

    assert violation is not None
    assert any("stale" in one or "INV-13" in one for one in violation.problems)


@pytest.mark.soak
@pytest.mark.parametrize("era", ["current", "seed"])
def test_the_right_machine_breaks_nothing_however_deep(era: str) -> None:
    """Two devices, a sub-channel, twin rescinds, threads in every order to depth 12: no violation."""
    assert found(Setting(threads=True, era=era, twice=True), 12) is None
