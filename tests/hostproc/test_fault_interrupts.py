"""Interrupts that come late or for nothing, and messages that change in their slots."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emu.fault_plan import FaultPlan, Faults
from emu.faults import parse
from emu.memory import GuestMemory
from emu.synic import Synic
from emu.wire.hv_message import HvMessage
from emu.wire.messages import OpenChannelResult
from emu.wire.synic import (
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SIEFP,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SINT0,
    HVMSG_CHANNEL_MESSAGE,
    page_register,
    sint_value,
)
from hostproc import fault_interrupts
from hostproc.event_ports import EventPort
from hostproc.fault_interrupts import FaultyInterrupts, FaultyQueues
from hostproc.message_queues import QueuedMessage
from tests.emu.bare_control import bare_control

SINT = 2
VECTOR = 0xF3
SLOT = 0x1000 + 256 * SINT
VP_INDICES = [1, 0]
"""VP indices run against the positions of the pages."""


class FaultyHost:
    """Two VPs, their queues, and the host's timers."""

    def __init__(self) -> None:
        self.memory = GuestMemory.on(bytearray(0x8000))
        self.synics = [Synic(self.memory), Synic(self.memory)]
        for position, synic in enumerate(self.synics):
            synic.write_msr(HV_X64_MSR_SINT0 + SINT, sint_value(VECTOR))
            synic.write_msr(HV_X64_MSR_SIMP, page_register(0x1000 + 0x4000 * position))
            synic.write_msr(HV_X64_MSR_SIEFP, page_register(0x2000 + 0x4000 * position))
            synic.write_msr(HV_X64_MSR_SCONTROL, 1)
        self.plan = FaultPlan(control := bare_control())
        self.requested: list[tuple[int, int]] = []
        self.timers: list[tuple[int, Callable[[], None]]] = []
        self.interrupts = FaultyInterrupts(
            Faults(control),
            VP_INDICES,
            lambda position, vector: self.requested.append((position, vector)),
            lambda ns, action: self.timers.append((ns, action)),
        )
        self.queues = FaultyQueues(
            Faults(control),
            self.interrupts,
            self.memory,
            VP_INDICES,
            self.synics,
            lambda position, vector: self.requested.append((position, vector)),
            lambda *_serial: None,
        )

    def turn_on(self, text: str) -> None:
        """Turn a fault on."""
        self.plan.add(parse(text))

    def post(self, relid: int = 7) -> None:
        """Post an OPENCHANNEL_RESULT to the VP at position 0."""
        data = HvMessage(HVMSG_CHANNEL_MESSAGE, OpenChannelResult(relid, 1, 0).pack()).pack()
        self.queues.post(0, SINT, QueuedMessage(data, 1, lambda: None))

    def resident(self) -> OpenChannelResult:
        """What lies in the slot of position 0."""
        return OpenChannelResult.unpack(HvMessage.unpack(self.memory.read(SLOT, 256)).payload)

    def run_timers(self) -> list[int]:
        """Let every timer come; how long each one was."""
        timers, self.timers = self.timers, []
        for _ns, action in timers:
            action()
        return [ns for ns, _action in timers]


def event(host: FaultyHost, relid: int) -> EventPort:
    """An event port of a channel, on position 0."""
    request = host.interrupts.of_event(SINT, relid)
    return EventPort(host.synics, request, 0, SINT, relid)


def test_interrupt_of_one_channel_is_late() -> None:
    """Its flag is set at once; the other channel's interrupt comes at once, too."""
    host = FaultyHost()
    host.turn_on("delay_irq=200us@relid=7")
    late, prompt = event(host, 7), event(host, 8)

    late.signal()
    fetch_or, bit = host.synics[0].flag_cell(SINT, 7)
    assert host.requested == [] and fetch_or(0) & bit
    prompt.signal()
    assert host.requested == [(0, VECTOR)]
    assert host.run_timers() == [200_000]
    assert host.requested == [(0, VECTOR)] * 2


def test_late_interrupts_have_a_bound_and_give_their_places_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many on their way as there may be the next one comes at once; behind them others are late again."""
    monkeypatch.setattr(fault_interrupts, "MOST_LATE", 2)
    host = FaultyHost()
    host.turn_on("delay_irq=200us")
    said = []
    for _ in range(2):
        for relid in (7, 8, 9):
            host.interrupts.request(0, VECTOR, SINT, relid)
        said.append((len(host.requested), len(host.run_timers())))
        host.requested.clear()

    assert said == [(1, 2), (1, 2)]


def test_interrupt_of_a_message_is_late() -> None:
    """By the VP's index, not by the position of its page; the message lies in its slot meanwhile."""
    host = FaultyHost()
    host.turn_on("delay_irq=1ms@vp=0")
    host.turn_on("delay_irq=2ms@vp=1,sint=2")
    host.post()

    assert host.resident().child_relid == 7
    assert host.requested == []
    assert host.run_timers() == [2_000_000]
    assert host.requested == [(0, VECTOR)]


def test_message_changes_in_its_slot() -> None:
    """After it was written: the guest that copies it now copies the changed one."""
    host = FaultyHost()
    host.turn_on("host.mutate_slot=8:0x63@kind=openchannel_result,relid=7")
    host.post()

    assert host.resident() == OpenChannelResult(0x63, 1, 0)
    assert host.requested == [(0, VECTOR)]


def test_resident_message_changes_when_the_fault_is_turned_on() -> None:
    """What a guest has looked at already, and has not taken yet."""
    host = FaultyHost()
    host.post()
    host.turn_on("host.mutate_slot=16:0xff")
    host.queues.mutate_residents()

    assert host.resident() == OpenChannelResult(7, 1, 0xFF)
    assert [row.hits for row in host.plan.rows()] == [1]


def test_spurious_interrupts_come_while_their_fault_is_on() -> None:
    """Again and again, of the VP that was named, with nothing set; none any more when they are spent."""
    host = FaultyHost()
    host.interrupts.begin_spurious(host.synics)
    assert host.timers == []
    host.turn_on("irq.spurious=3ms@vp=1,times=2")
    for _ in range(2):  # whoever says it twice gets one series
        host.interrupts.begin_spurious(host.synics)

    assert host.run_timers() == [3_000_000]
    assert host.requested == [(0, VECTOR)]
    assert host.run_timers() == [3_000_000]
    assert host.requested == [(0, VECTOR)] * 2
    assert host.run_timers() == []
