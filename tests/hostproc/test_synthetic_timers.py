"""Synthetic timers: what their registers do, when they expire, and the rule of the slot; through MSRs, as a guest does.

Times are reference time, 100 ns. VP 0's timers post to SINT 3, vector 0xB3.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.layout import Fault
from emu.wire.synic import (
    HV_MESSAGE_FLAG_PENDING,
    HV_STIMER_DIRECT_MODE,
    HV_STIMER_ENABLE,
    HV_STIMER_VECTOR_SHIFT,
    HV_SYNIC_STIMER_COUNT,
    HV_X64_MSR_RESET,
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_STIMER0_CONFIG,
    HV_X64_MSR_STIMER0_COUNT,
    HVMSG_TIMER_EXPIRED,
    TIMER_PAYLOAD,
    sint_value,
    stimer_config,
    stimer_sint,
)
from hostproc.synthetic_timers import NEVER, SHORTEST_PERIOD
from tests.hostproc.test_partition import MESSAGE_SINT, TYPE, Guest

SINT, VECTOR = 3, 0xB3
NOW = 10_000
PERIOD = 10_000
U64 = (1 << 64) - 1


@pytest.fixture
def guest() -> Guest:
    """One whose SINT 3 is ready, at reference time 10,000."""
    return new_guest()


def new_guest() -> Guest:
    """See the fixture."""
    guest = Guest()
    guest.sint(0, SINT, sint_value(VECTOR))
    guest.time = NOW
    return guest


def write(guest: Guest, timer: int = 0, *, config: int | None = None, count: int | None = None) -> None:
    """Write CONFIG, then COUNT, those that are given."""
    for base, value in ((HV_X64_MSR_STIMER0_CONFIG, config), (HV_X64_MSR_STIMER0_COUNT, count)):
        if value is not None:
            assert guest.wrmsr(0, base + 2 * timer, value) == Fault.NONE


def config_of(guest: Guest, timer: int = 0) -> int:
    """STIMERn_CONFIG."""
    return guest.rdmsr(0, HV_X64_MSR_STIMER0_CONFIG + 2 * timer)


def enabled(guest: Guest, timer: int = 0) -> bool:
    """Bit 0 of CONFIG."""
    return bool(config_of(guest, timer) & HV_STIMER_ENABLE)


def arm(guest: Guest, count: int, timer: int = 0, *, sint: int = SINT) -> None:
    """A one-shot timer."""
    write(guest, timer, config=stimer_config(sint, auto_enable=True), count=count)


def at(guest: Guest, time: int) -> list[tuple[int, int, int]]:
    """Let it be `time`; the messages that come one after the other until the slot stays empty, as payloads."""
    guest.time = time
    guest.partition.timers.run_due()
    return taken(guest)


def taken(guest: Guest) -> list[tuple[int, int, int]]:
    """Take what comes into the slot, each with its EOM."""
    found = []
    while (message := guest.slot(0, SINT)).message_type:
        assert (message.message_type, message.sender) == (HVMSG_TIMER_EXPIRED, 0)
        found.append(TIMER_PAYLOAD.unpack(message.payload))
        guest.free(0, SINT)
        guest.eom(0)
    return found


def pending(guest: Guest) -> bool:
    """msg_pending of the slot."""
    return bool(guest.slot(0, SINT).message_flags & HV_MESSAGE_FLAG_PENDING)


def occupy(guest: Guest) -> None:
    """A message lies in the slot."""
    guest.memory.write(guest.simp(0) + 256 * SINT, TYPE.to_bytes(4, "little"))


# -- registers --------------------------------------------------------------------------------------------

FLAGS = ("enable", "periodic", "lazy", "auto_enable")


@pytest.mark.parametrize("count", [0, NOW - 1, NOW, NOW + 1, U64])
def test_each_configuration_with_each_count_in_either_order(count: int) -> None:
    """Enable: by CONFIG, by AutoEnable with a COUNT that is not 0, never with SINT 0, and COUNT 0 takes it away."""
    for *flags, sint, count_first in product(*[(False, True)] * 4, (0, SINT), (False, True)):
        guest = new_guest()
        given_flags: dict[str, Any] = dict(zip(FLAGS, flags, strict=True))
        value = stimer_config(sint, **given_flags)
        enable, auto = given_flags["enable"] and sint, given_flags["auto_enable"] and sint
        if count_first:
            write(guest, count=count)
            write(guest, config=value)
            should_run = bool(enable)
        else:
            write(guest, config=value, count=count)
            should_run = bool(count and (enable or auto))
        what = (given_flags, sint, count, count_first)

        assert config_of(guest) & ~HV_STIMER_ENABLE == value & ~HV_STIMER_ENABLE, what
        assert guest.rdmsr(0, HV_X64_MSR_STIMER0_COUNT) == count, what
        assert enabled(guest) is should_run, what
        # An enabled timer without a count does not count.
        assert (guest.partition.timers.next_expiration != NEVER) is (should_run and count > 0), what


@pytest.mark.parametrize("timer", range(HV_SYNIC_STIMER_COUNT))
def test_registers_are_zero_at_first_and_after_a_reset(guest: Guest, timer: int) -> None:
    """Every timer of every VP; nothing of what was armed or waited comes any more."""
    arm(guest, NOW + 5, timer)
    occupy(guest)
    arm(guest, NOW, (timer + 1) % 4)
    guest.partition.timers.run_due()
    assert guest.partition.queues.total_waiting == 1

    guest.wrmsr(0, HV_X64_MSR_RESET, 1)

    registers = [HV_X64_MSR_STIMER0_CONFIG + number for number in range(8)]
    assert [guest.rdmsr(position, msr) for position in (0, 1) for msr in registers] == [0] * 16
    assert guest.partition.queues.total_waiting == 0
    guest.time = U64
    assert guest.partition.timers.run_due() is False


@pytest.mark.parametrize("bit", [13, 14, 15, *range(20, 64), 12])
def test_bits_that_must_be_zero_are_a_fault(guest: Guest, bit: int) -> None:
    """#GP for reserved bits, and for direct mode (bit 12), which CPUID does not announce; the timer is as it was."""
    arm(guest, NOW + 7)
    before = config_of(guest)

    assert guest.wrmsr(0, HV_X64_MSR_STIMER0_CONFIG, stimer_config(SINT) | 1 << bit) == Fault.GENERAL_PROTECTION
    assert config_of(guest) == before
    assert at(guest, NOW + 7) == [(0, NOW + 7, NOW + 7)]


def test_direct_mode_needs_more_than_its_bit(guest: Guest) -> None:
    """A vector without the mode is kept and means nothing."""
    vector = 0xED << HV_STIMER_VECTOR_SHIFT
    write(guest, config=stimer_config(SINT) | vector, count=NOW)

    assert config_of(guest) & vector == vector
    assert guest.wrmsr(0, HV_X64_MSR_STIMER0_CONFIG, vector | HV_STIMER_DIRECT_MODE | 1) == Fault.GENERAL_PROTECTION
    assert at(guest, NOW) == [(0, NOW, NOW)]
    assert guest.requested == [(0, VECTOR)]


# -- one-shot ---------------------------------------------------------------------------------------------


def test_one_shot_expires_once_and_not_before_its_time(guest: Guest) -> None:
    """One message with one interrupt, with both times; Enable clears itself, COUNT stays."""
    arm(guest, NOW + 100)
    assert at(guest, NOW + 99) == []
    assert enabled(guest)

    assert at(guest, NOW + 103) == [(0, NOW + 100, NOW + 103)]
    assert not enabled(guest)
    assert guest.rdmsr(0, HV_X64_MSR_STIMER0_COUNT) == NOW + 100
    assert guest.requested == [(0, VECTOR)]
    assert at(guest, U64) == []


def test_time_that_is_past_expires_at_once(guest: Guest) -> None:
    """At the next look at the clock."""
    arm(guest, 1)

    assert guest.partition.timers.due()
    assert at(guest, NOW) == [(0, 1, NOW)]


def test_written_again_before_its_time(guest: Guest) -> None:
    """Only the last count counts; 0 stops it, whatever AutoEnable says, and so does CONFIG without Enable."""
    arm(guest, NOW + 10)
    write(guest, count=NOW + 20)
    assert at(guest, NOW + 19) == []
    assert at(guest, NOW + 20) == [(0, NOW + 20, NOW + 20)]
    for stop in ({"count": 0}, {"config": stimer_config(SINT, enable=False)}):
        arm(guest, NOW + 30)
        write(guest, **stop)
        assert not enabled(guest)
        assert at(guest, NOW + 40) == []


def test_timers_expire_in_the_order_of_their_times(guest: Guest) -> None:
    """Four timers of one VP, all late: the earliest is in the slot, the others follow with its EOM."""
    for timer, count in enumerate((40, 20, 30, 10)):
        arm(guest, NOW + count, timer)

    found = at(guest, NOW + 50)

    assert [(timer, expiration - NOW) for timer, expiration, _delivery in found] == [(3, 10), (1, 20), (2, 30), (0, 40)]
    assert len(guest.requested) == 4


# -- the slot rule ----------------------------------------------------------------------------------------


def test_one_shot_waits_for_a_busy_slot(guest: Guest) -> None:
    """No interrupt, the pending bit; time alone brings nothing; EOM brings it, with the time of its delivery."""
    occupy(guest)
    arm(guest, NOW + 1)
    guest.time = NOW + 1
    guest.partition.timers.run_due()
    assert (guest.slot(0, SINT).message_type, pending(guest), guest.requested) == (TYPE, True, [])
    assert not enabled(guest)
    guest.free(0, SINT)
    for time in (NOW + 2, NOW + 2_000):
        guest.time = time
        assert not guest.partition.timers.run_due()
        assert guest.slot(0, SINT).message_type == 0

    guest.eom(0)

    assert taken(guest) == [(0, NOW + 1, NOW + 2_000)]
    assert guest.requested == [(0, VECTOR)]


def test_a_timer_waits_in_the_order_of_all_messages(guest: Guest) -> None:
    """It shares its SINT with others' messages: who came first goes first."""
    guest.sint(0, MESSAGE_SINT, sint_value(VECTOR))
    for payload in (b"1", b"2"):
        guest.post_message(0x10, payload)
    arm(guest, NOW, sint=MESSAGE_SINT)
    guest.partition.timers.run_due()
    guest.post_message(0x10, b"3")
    order = []
    while (message := guest.slot(0, MESSAGE_SINT)).message_type:
        order.append("timer" if message.message_type == HVMSG_TIMER_EXPIRED else message.payload.decode())
        guest.free(0, MESSAGE_SINT)
        guest.eom(0)

    assert order == ["1", "2", "timer", "3"]


@pytest.mark.parametrize("stop", [{"count": 0}, {"config": 0}, {"count": NOW + 9}])
def test_message_that_waits_goes_with_its_timer(guest: Guest, stop: dict[str, int]) -> None:
    """One buffer a timer: who writes the timer takes back what waits."""
    occupy(guest)
    arm(guest, NOW)
    guest.partition.timers.run_due()
    assert guest.partition.queues.waiting(0, SINT) == 1

    write(guest, **stop)

    assert guest.partition.queues.waiting(0, SINT) == 0
    guest.free(0, SINT)
    guest.eom(0)
    assert guest.slot(0, SINT).message_type == 0


def test_no_slot_at_all_is_a_busy_one(guest: Guest) -> None:
    """Message page off: the one-shot waits until the SynIC is on again."""
    guest.wrmsr(0, HV_X64_MSR_SCONTROL, 0)
    arm(guest, NOW)
    guest.partition.timers.run_due()
    guest.time = NOW + 5
    guest.wrmsr(0, HV_X64_MSR_SCONTROL, 1)

    assert taken(guest) == [(0, NOW, NOW + 5)]


# -- periodic ---------------------------------------------------------------------------------------------


def periodic(guest: Guest, period: int = PERIOD, *, lazy: bool = False) -> None:
    """A periodic timer that runs from now on."""
    write(guest, config=stimer_config(SINT, periodic=True, lazy=lazy, enable=False, auto_enable=True), count=period)


def test_periodic_timer_ticks_until_it_is_stopped(guest: Guest) -> None:
    """The first period begins when it is enabled; it stays enabled, and in step with its start."""
    periodic(guest)
    ticks = [at(guest, NOW + tick * PERIOD + tick) for tick in range(1, 1_001)]

    assert [tick[0][1] for tick in ticks] == [NOW + tick * PERIOD for tick in range(1, 1_001)]
    assert all(len(tick) == 1 for tick in ticks)
    assert enabled(guest)
    write(guest, count=0)
    assert at(guest, NOW + 2_000 * PERIOD) == []


def test_ticks_that_were_missed_are_one(guest: Guest) -> None:
    """A look that is late by periods brings the last tick, and the next one comes when it was due anyway."""
    periodic(guest)

    assert at(guest, NOW + 5 * PERIOD + 1) == [(0, NOW + 5 * PERIOD, NOW + 5 * PERIOD + 1)]
    assert at(guest, NOW + 6 * PERIOD - 1) == []
    assert at(guest, NOW + 6 * PERIOD) == [(0, NOW + 6 * PERIOD, NOW + 6 * PERIOD)]


def test_tick_into_a_busy_slot_is_dropped(guest: Guest) -> None:
    """It is not tried again and sets no pending bit; the next tick finds the slot empty."""
    periodic(guest)
    occupy(guest)
    guest.time = NOW + PERIOD
    guest.partition.timers.run_due()
    assert (pending(guest), guest.partition.queues.total_waiting) == (False, 0)
    guest.free(0, SINT)
    guest.eom(0)

    assert taken(guest) == []
    assert at(guest, NOW + 2 * PERIOD) == [(0, NOW + 2 * PERIOD, NOW + 2 * PERIOD)]


@pytest.mark.parametrize("lazy", [False, True])
def test_lazy_timer_leaves_a_late_tick_out(guest: Guest, lazy: bool) -> None:
    """One that is nearer to the next tick than to its own time; up to the middle both kinds signal it."""
    periodic(guest, lazy=lazy)

    assert len(at(guest, NOW + PERIOD + PERIOD // 2)) == 1
    assert len(at(guest, NOW + 2 * PERIOD + PERIOD // 2 + 1)) == (0 if lazy else 1)
    assert len(at(guest, NOW + 3 * PERIOD)) == 1


def test_shortest_period_bounds_the_hosts_work(guest: Guest) -> None:
    """A period of 100 ns is honoured as 100 µs."""
    periodic(guest, 1)

    assert guest.partition.timers.next_expiration == NOW + SHORTEST_PERIOD
    assert guest.rdmsr(0, HV_X64_MSR_STIMER0_COUNT) == 1


# -- whatever a guest does --------------------------------------------------------------------------------

STEPS = st.one_of(
    st.tuples(st.just("config"), st.integers(0, 3), st.integers(0, U64) | st.integers(0, 0xF_0FFF)),
    st.tuples(st.just("count"), st.integers(0, 3), st.integers(0, U64) | st.integers(0, 50_000)),
    st.tuples(st.just("time"), st.integers(0, 20_000), st.just(0)),
    st.tuples(st.just("free"), st.integers(0, 15), st.booleans()),
    st.tuples(st.just("fill"), st.integers(0, 15), st.just(0)),
)


@given(st.lists(STEPS, max_size=40))
def test_any_guest_is_survived(steps: list[tuple[str, int, int]]) -> None:
    """Never more than one message of a timer outstanding, no enabled timer at SINT 0, no expiry left behind."""
    guest = new_guest()
    for step, number, value in steps:
        match step:
            case "config":
                guest.wrmsr(0, HV_X64_MSR_STIMER0_CONFIG + 2 * number, value)
            case "count":
                guest.wrmsr(0, HV_X64_MSR_STIMER0_COUNT + 2 * number, value)
            case "time":
                guest.time += number
            case "free":
                guest.free(0, number)
                if value:
                    guest.eom(0)
            case "fill":
                guest.memory.write(guest.simp(0) + 256 * number, TYPE.to_bytes(4, "little"))
        guest.partition.timers.run_due()
        timers = guest.partition.timers.of_vp(0)

        assert guest.partition.queues.total_waiting == sum(timer.message is not None for timer in timers)
        assert all(stimer_sint(timer.config) for timer in timers if timer.config & HV_STIMER_ENABLE)
        assert guest.partition.timers.next_expiration > guest.time
