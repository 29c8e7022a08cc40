"""Clock event devices: armed on their own processor, expired by the machine's clock, taken out by the ISR."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from emu.wire.messages import RescindChannelOffer
from emu.wire.synic import HV_STIMER_ENABLE, HVMSG_NONE, HVMSG_TIMER_EXPIRED, VMBUS_MESSAGE_SINT, stimer_config
from guestproc.user import run_call
from guestproc.vmbus.hyperv_timer import TICK_NS, hv_ce_set_next_event
from hostproc.synthetic_timers import NEVER, SyntheticTimer
from tests.guestproc.vmbus.test_vmbus_messages import message_type
from tests.guestproc.world import SECOND_NS, World

MS = SECOND_NS // 1_000


def timer_of(world: World, cpu: int) -> SyntheticTimer:
    """Timer 0 of a processor, as the host has it."""
    return world.partition.timers.of_vp(world.cpus[cpu].position)[0]


def clock_events(world: World) -> list[int]:
    """How many each processor has had."""
    return [cpu.clock_events for cpu in world.tables.cpus.live()]


def arm(world: World, after_ns: int, *, cpu: int = 0) -> None:
    """A guest task on that processor arms its timer."""
    world.call(lambda current: hv_ce_set_next_event(current, after_ns // TICK_NS), cpu=cpu)


@pytest.mark.parametrize("era", ["current", "seed"])
def test_each_processor_has_its_clock_event_device(booted: World) -> None:
    """One-shot on SINT 2, enabled, and not counting: an idle machine has no timer that runs."""
    for cpu in (0, 1):
        timer = timer_of(booted, cpu)
        assert (timer.config, timer.count) == (stimer_config(VMBUS_MESSAGE_SINT, auto_enable=True), 0)
    assert booted.partition.timers.next_expiration == NEVER


def test_next_event_comes_on_its_own_processor(booted: World) -> None:
    """Not before its time; handled in the interrupt, whose record has both times, and the slot is empty again."""
    arm(booted, 5 * MS, cpu=1)
    booted.pass_time(0.004)
    assert clock_events(booted) == [0, 0]
    booted.events.clear()

    booted.pass_time(0.002)

    assert clock_events(booted) == [0, 1]
    assert message_type(booted, 1) == HVMSG_NONE
    event = next(event for event in booted.events if event.name == "clock_event")
    expiration_time = timer_of(booted, 1).count
    assert event.arguments[:3] == (0, expiration_time, expiration_time)
    assert not timer_of(booted, 1).config & HV_STIMER_ENABLE


def test_the_next_event_replaces_the_one_before(booted: World) -> None:
    """One device, one event; armed again after it, it comes again."""
    arm(booted, 5 * MS)
    arm(booted, 50 * MS)
    booted.pass_time(0.04)
    assert clock_events(booted) == [0, 0]
    booted.pass_time(0.02)
    arm(booted, MS)
    booted.pass_time(0.01)

    assert clock_events(booted) == [2, 0]


def test_it_waits_for_the_message_in_its_slot(booted: World) -> None:
    """A channel message that is there delays the tick; its EOM brings the tick, and both are handled."""
    booted.host.device(500)
    booted.settle()
    arm(booted, MS)
    booted.host.send(RescindChannelOffer(500))
    booted.host.step()
    booted.clock.time_ns += MS
    booted.partition.timers.run_due()
    position = booted.cpus[0].position
    assert booted.partition.queues.waiting(position, VMBUS_MESSAGE_SINT) == 1
    assert message_type(booted) not in (HVMSG_NONE, HVMSG_TIMER_EXPIRED)

    booted.settle()

    assert clock_events(booted) == [1, 0]
    assert booted.tables.relids.lookup(500) is None
    assert message_type(booted) == HVMSG_NONE
    assert booted.refused() == {}


def test_nothing_comes_once_the_synic_is_down(booted: World) -> None:
    """The device is shut down with its processor's SynIC, whatever it was about to say."""
    arm(booted, 5 * MS)
    assert booted.shut_down() == {}
    booted.pass_time(0.01)

    assert [(timer_of(booted, cpu).config, timer_of(booted, cpu).count) for cpu in (0, 1)] == [(0, 0)] * 2
    assert clock_events(booted) == [0, 0]


def call(world: World, **arguments: Any) -> dict[str, Any]:
    """The letter `timer`, from CPU 0."""
    return world.call(lambda current: run_call(current, "timer", arguments))


def test_letter_arms_another_processors_device(booted: World) -> None:
    """By a call on that processor; it says how many events there had been."""
    assert call(booted, cpu=1, after_ns=MS) == {"cpu": 1, "clock_events": 0}
    booted.pass_time(0.01)
    assert call(booted, cpu=1, after_ns=MS) == {"cpu": 1, "clock_events": 1}


@pytest.mark.parametrize(
    ("cpu", "after_ns", "number"),
    [(2, MS, errno.EINVAL), (-1, MS, errno.EINVAL), (1, 99, errno.EINVAL), (1, 1 << 60, errno.EINVAL)],
)
def test_letter_with_what_cannot_be(booted: World, cpu: int, after_ns: int, number: int) -> None:
    """No such CPU, no such time: an errno, and nothing is armed."""
    assert call(booted, cpu=cpu, after_ns=after_ns)["errno"] == number
    assert booted.partition.timers.next_expiration == NEVER


def test_letter_without_a_device(booted: World) -> None:
    """A CPU whose SynIC is down, or a host without timers: -ENODEV."""
    booted.tables.cpus.at(1).stimer0_message_sint = 0

    assert call(booted, cpu=1, after_ns=MS)["errno"] == errno.ENODEV
