"""Ports: sixteen buffers each, flags within their range, and a status for everything else."""

from __future__ import annotations

import pytest

from emu.memory import GuestMemory
from emu.synic import Synic
from emu.wire.hv_message import HvMessage
from emu.wire.hypercalls import PORT_MESSAGE_BUFFERS, HvStatus
from emu.wire.synic import (
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SIEFP,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SINT0,
    page_register,
    sint_value,
)
from hostproc.event_ports import EventPort, HostEventPort
from hostproc.message_queues import MessageQueues
from hostproc.ports import HostMessagePort, MessagePort
from hostproc.posted import PostedMessage

SIMP_GPA = (0x1000, 0x3000)
SIEFP_GPA = (0x2000, 0x4000)
SINT = 2
VECTOR = 0xF3


class TwoVps:
    """Two VPs with their pages placed, queues over them, and the interrupts that were requested."""

    def __init__(self) -> None:
        self.memory = GuestMemory.on(bytearray(0x5000))
        self.synics = [Synic(self.memory), Synic(self.memory)]
        self.interrupts: list[tuple[int, int]] = []
        self.queues = MessageQueues(self.synics, self.request, lambda *_serial: None)
        for position, synic in enumerate(self.synics):
            synic.write_msr(HV_X64_MSR_SIMP, page_register(SIMP_GPA[position]))
            synic.write_msr(HV_X64_MSR_SIEFP, page_register(SIEFP_GPA[position]))
            synic.write_msr(HV_X64_MSR_SCONTROL, 1)
            synic.write_msr(HV_X64_MSR_SINT0 + SINT, sint_value(VECTOR))

    def request(self, position: int, vector: int) -> None:
        """An interrupt was requested."""
        self.interrupts.append((position, vector))

    def slot(self, position: int) -> HvMessage:
        """The message slot of SINT 2."""
        return HvMessage.unpack(self.memory.read(SIMP_GPA[position] + 0x200, 256))

    def end_of_message(self, position: int) -> None:
        """Empty the slot and scan the queues."""
        self.memory.write(SIMP_GPA[position] + 0x200, bytes(4))
        self.queues.pump_vp(position)

    def flag(self, position: int, flag: int) -> bool:
        """An event flag of SINT 2."""
        byte = self.memory.read(SIEFP_GPA[position] + 0x200 + flag // 8, 1)[0]
        return bool(byte >> flag % 8 & 1)

    def event_port(self, base_flag: int, flag_count: int = 1, position: int = 0) -> EventPort:
        """A port on event flags of one VP."""
        return EventPort(self.synics, self.request, position, SINT, base_flag, flag_count)


# -- messages to the guest ------------------------------------------------------------------------


def test_message_carries_its_port_as_sender() -> None:
    """Type, size, sender and payload of a message in the slot; flags and reserved bytes are zero."""
    vps = TwoVps()
    status = MessagePort(vps.queues, 7, 1, SINT).post(1, b"payload")

    assert status is HvStatus.SUCCESS
    assert vps.slot(1) == HvMessage(1, b"payload", sender=7)
    assert vps.interrupts == [(1, VECTOR)]


def test_seventeenth_message_finds_no_buffer() -> None:
    """A buffer is taken from the post until the message lies in its slot: one resident, sixteen waiting."""
    vps = TwoVps()
    port = MessagePort(vps.queues, 1, 0, SINT)
    statuses = [port.post(1, bytes([number])) for number in range(18)]

    assert statuses == [HvStatus.SUCCESS] * 17 + [HvStatus.INSUFFICIENT_BUFFERS]
    assert port.in_use == PORT_MESSAGE_BUFFERS == 16
    vps.end_of_message(0)
    assert port.post(1, b"x") is HvStatus.SUCCESS


def test_refused_message_is_never_delivered() -> None:
    """What found no buffer leaves no trace; order across a long queue is that of the posts."""
    vps = TwoVps()
    port = MessagePort(vps.queues, 1, 0, SINT)
    for number in range(20):
        port.post(1, bytes([number]))
    taken = []
    while vps.slot(0).message_type:
        taken.append(vps.slot(0).payload[0])
        vps.end_of_message(0)

    assert taken == list(range(17))
    assert port.in_use == 0


def test_ports_have_buffers_of_their_own() -> None:
    """A port that is full does not fill another one, of the same slot or not."""
    vps = TwoVps()
    full = MessagePort(vps.queues, 1, 0, SINT)
    for _ in range(17):
        full.post(1, b"x")

    assert MessagePort(vps.queues, 2, 0, SINT).post(1, b"y") is HvStatus.SUCCESS
    assert MessagePort(vps.queues, 3, 1, SINT).post(1, b"z") is HvStatus.SUCCESS


def test_owner_is_told_of_a_free_buffer() -> None:
    """Each message that leaves for its slot tells whoever waits for a buffer."""
    vps = TwoVps()
    port = MessagePort(vps.queues, 1, 0, SINT)
    freed: list[int] = []
    port.on_buffer_free = lambda: freed.append(port.in_use)
    for _ in range(3):
        port.post(1, b"x")
    before = list(freed)
    vps.end_of_message(0)

    assert (before, freed) == ([0], [0, 1])


def test_retargeted_port_delivers_elsewhere() -> None:
    """Messages posted from now on go to the new VP; those that wait stay where they are."""
    vps = TwoVps()
    port = MessagePort(vps.queues, 1, 0, SINT)
    port.post(1, b"a")
    port.post(1, b"b")
    port.retarget(1, SINT)
    port.post(1, b"c")

    assert (vps.slot(0).payload, vps.slot(1).payload) == (b"a", b"c")
    vps.end_of_message(0)
    assert vps.slot(0).payload == b"b"


# -- messages to the host -------------------------------------------------------------------------


def test_host_reads_what_was_posted() -> None:
    """The host's port keeps type, payload, serial and the connection it came through, and wakes its reader."""
    woken: list[int] = []
    port = HostMessagePort(4, lambda: woken.append(1))

    assert port.post(1, b"contact", serial=9) is HvStatus.SUCCESS
    assert list(port.queue) == [PostedMessage(4, 1, b"contact", 9)]
    assert woken == [1]


def test_host_port_has_sixteen_buffers() -> None:
    """The seventeenth unread message is refused; reading one makes room."""
    port = HostMessagePort(1, lambda: None)
    statuses = [port.post(1, b"x") for _ in range(17)]
    port.queue.popleft()

    assert statuses == [HvStatus.SUCCESS] * 16 + [HvStatus.INSUFFICIENT_BUFFERS]
    assert port.post(1, b"y") is HvStatus.SUCCESS


# -- events ---------------------------------------------------------------------------------------


def test_event_sets_its_flag_and_interrupts_once() -> None:
    """A flag that was clear raises one interrupt; set already, it raises none, and both succeed."""
    vps = TwoVps()
    port = vps.event_port(1)

    assert (port.signal(), port.signal()) == (HvStatus.SUCCESS, HvStatus.SUCCESS)
    assert vps.flag(0, 1) is True
    assert vps.interrupts == [(0, VECTOR)]


@pytest.mark.parametrize("flag", [0, 1, 63, 64, 2047])
def test_flag_of_a_port_is_relative_to_its_base(flag: int) -> None:
    """The base flag of one port, or a flag number of a port that starts at 0: the same bit."""
    vps = TwoVps()
    vps.event_port(flag).signal(0)
    vps.event_port(0, 2048, position=1).signal(flag)

    assert (vps.flag(0, flag), vps.flag(1, flag)) == (True, True)


def test_port_that_was_moved_signals_where_it_leads_now() -> None:
    """Where a flag lies is kept from one signal to the next, but not beyond a move (MODIFYCHANNEL)."""
    vps = TwoVps()
    port = vps.event_port(5)
    port.signal()
    port.position = 1
    port.signal()

    assert vps.flag(1, 5)
    assert vps.interrupts == [(0, VECTOR), (1, VECTOR)]


def test_port_whose_synic_changed_signals_by_what_it_is_now() -> None:
    """Nor beyond a write to a register of that SynIC: its flags lie on another page, then it is masked."""
    vps = TwoVps()
    port = vps.event_port(5)
    port.signal()
    vps.synics[0].write_msr(HV_X64_MSR_SIEFP, page_register(SIEFP_GPA[1]))
    port.signal()
    assert vps.flag(1, 5)

    vps.synics[0].write_msr(HV_X64_MSR_SINT0 + SINT, sint_value(VECTOR, masked=True))
    assert port.signal() is HvStatus.INVALID_SYNIC_STATE


def test_flag_beyond_the_port_is_refused() -> None:
    """A flag number that the port does not have sets nothing."""
    vps = TwoVps()

    assert vps.event_port(5, 2).signal(2) is HvStatus.INVALID_PARAMETER
    assert HostEventPort(lambda: None).signal(1) is HvStatus.INVALID_PARAMETER
    assert vps.interrupts == []


def test_port_beyond_the_flags_is_our_mistake() -> None:
    """No port reaches beyond flag 2047."""
    vps = TwoVps()

    with pytest.raises(AssertionError):
        vps.event_port(2047, 2)


def test_masked_sint_is_no_target() -> None:
    """An event for a masked SINT is INVALID_SYNIC_STATE and sets nothing; unmasked it works."""
    vps = TwoVps()
    port = vps.event_port(9)
    vps.synics[0].write_msr(HV_X64_MSR_SINT0 + SINT, sint_value(VECTOR, masked=True))
    masked = port.signal()
    set_while_masked = vps.flag(0, 9)
    vps.synics[0].write_msr(HV_X64_MSR_SINT0 + SINT, sint_value(VECTOR))

    assert (masked, set_while_masked) == (HvStatus.INVALID_SYNIC_STATE, False)
    assert port.signal() is HvStatus.SUCCESS


@pytest.mark.parametrize(("msr", "value"), [(HV_X64_MSR_SCONTROL, 0), (HV_X64_MSR_SIEFP, 0)])
def test_vp_without_synic_is_no_target(msr: int, value: int) -> None:
    """SynIC off, or no event-flag page: INVALID_SYNIC_STATE."""
    vps = TwoVps()
    vps.synics[0].write_msr(msr, value)

    assert vps.event_port(9).signal() is HvStatus.INVALID_SYNIC_STATE
    assert vps.interrupts == []


def test_polled_sint_gets_its_flag_without_an_interrupt() -> None:
    """Polling mode delivers and raises nothing."""
    vps = TwoVps()
    vps.synics[0].write_msr(HV_X64_MSR_SINT0 + SINT, sint_value(VECTOR, polling=True))

    assert vps.event_port(9).signal() is HvStatus.SUCCESS
    assert (vps.flag(0, 9), vps.interrupts) == (True, [])


def test_host_event_wakes_its_device() -> None:
    """A signal to the host calls the device's doorbell, each time."""
    woken: list[int] = []
    port = HostEventPort(lambda: woken.append(1), flag_count=4)

    assert [port.signal(flag) for flag in range(4)] == [HvStatus.SUCCESS] * 4
    assert len(woken) == 4
