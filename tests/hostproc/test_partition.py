"""SynIC conformance: the portable cases of other systems' suites, and every status of the two hypercalls.

Each VP has message connection 0x10 + vp (SINT 8, vector 0xB0) and event connection 0x20 + vp (SINT 9, 0xB1).
"""

from __future__ import annotations

import struct
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.counters import COUNTERS, Counters
from emu.cpuid import leaves
from emu.errors import OutOfMemory
from emu.interrupts import InterruptRequester, Lapic
from emu.ipc.atomics import AtomicView
from emu.layout import ABI_MAJOR, PAGE_SIZE, VP_AUTO_EOI, ExitOperation, Fault, vp_page_offset, vps_bytes
from emu.memory import GuestMemory
from emu.wire.hv_message import HvMessage
from emu.wire.hypercalls import (
    FAST_SIGNAL_EVENT,
    HV_HYPERCALL_FAST,
    HVCALL_POST_MESSAGE,
    HVCALL_SIGNAL_EVENT,
    HvStatus,
    PostMessageInput,
    signal_event_input,
)
from emu.wire.synic import (
    HV_X64_MSR_CRASH_CTL,
    HV_X64_MSR_EOI,
    HV_X64_MSR_EOM,
    HV_X64_MSR_GUEST_OS_ID,
    HV_X64_MSR_HYPERCALL,
    HV_X64_MSR_REFERENCE_TSC,
    HV_X64_MSR_RESET,
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SIEFP,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SINT0,
    HV_X64_MSR_STIMER0_CONFIG,
    HV_X64_MSR_STIMER3_COUNT,
    HV_X64_MSR_SVERSION,
    HV_X64_MSR_TIME_REF_COUNT,
    HV_X64_MSR_VP_INDEX,
    HV_X64_MSR_VP_RUNTIME,
    MSR_NAMES,
    SINT_RESET,
    page_register,
    sint_value,
)
from hostproc.event_ports import EventPort
from hostproc.partition import Partition
from hostproc.ports import HostMessagePort, MessagePort

MESSAGE_SINT, MESSAGE_VECTOR = 8, 0xB0
EVENT_SINT, EVENT_VECTOR = 9, 0xB1
TYPE = 0x12345678
PAYLOAD = b"payload!"
RAM = 64 * PAGE_SIZE
INPUT = 0x30000
U64 = (1 << 64) - 1


class Guest:
    """A partition of `vp_count` VPs whose guest made its pages, ports and hypercall page ready."""

    def __init__(self, vp_count: int = 2, *, ready: bool = True) -> None:
        self.memory = GuestMemory.on(bytearray(RAM))
        self.vps = AtomicView(bytearray(vps_bytes(vp_count)))
        self.counters = Counters(bytearray(8 * len(COUNTERS)), 0)
        self.lapics = [Lapic(self.vps, position) for position in range(vp_count)]
        self.requested: list[tuple[int, int]] = []
        self.serials: list[tuple[int, int, int]] = []
        self.attached: list[int] = []
        self.detached = 0
        self.time = 0
        requesters = [InterruptRequester(self.vps, p, self, self.counters) for p in range(vp_count)]

        def request(position: int, vector: int) -> None:
            self.requested.append((position, vector))
            requesters[position].request(vector)

        # VP indices run backwards: position and index are two things.
        self.partition = Partition(
            self.memory,
            list(reversed(range(vp_count))),
            cpuid=leaves(),
            reference_time=lambda: self.time,
            request_interrupt=request,
            set_auto_eoi=self._set_auto_eoi,
            reset_words=self._reset_words,
            note_serial=lambda *serial: self.serials.append(serial),
            attached=self._attached,
            detached=self._detached,
        )
        if ready:
            self.make_ready()

    def post(self) -> None:
        """Nobody halts here."""

    def interrupt(self) -> bool:
        """Nobody computes here."""
        return False

    def _set_auto_eoi(self, position: int, vectors: list[int]) -> None:
        for word in range(4):
            bits = sum(1 << (vector & 63) for vector in set(vectors) if vector >> 6 == word)
            self.vps.store_u64(vp_page_offset(position) + VP_AUTO_EOI + 8 * word, bits)

    def _reset_words(self, position: int) -> None:
        self._set_auto_eoi(position, [])

    def _attached(self, pid: int) -> int:
        self.attached.append(pid)
        return len(self.attached)

    def _detached(self) -> None:
        self.detached += 1

    # -- what a guest does ------------------------------------------------------------------------

    def exit(self, position: int, operation: int, *arguments: int) -> tuple[tuple[int, int], int]:
        """One exit: result words and fault."""
        a0, a1, a2 = (*arguments, 0, 0, 0)[:3]
        return self.partition.execute(position, operation, (a0, a1, a2))

    def rdmsr(self, position: int, msr: int) -> int:
        """A register; an assertion for a fault."""
        (value, _zero), fault = self.exit(position, ExitOperation.RDMSR, msr)
        assert fault == Fault.NONE, MSR_NAMES.get(msr, hex(msr))
        return value

    def wrmsr(self, position: int, msr: int, value: int) -> int:
        """Write a register; the fault."""
        return self.exit(position, ExitOperation.WRMSR, msr, value)[1]

    def make_ready(self) -> None:
        """Guest id, hypercall page, SIMP, SIEFP, SCONTROL, then the SINTs; and the ports."""
        self.wrmsr(0, HV_X64_MSR_GUEST_OS_ID, 0x8100 << 48)
        self.wrmsr(0, HV_X64_MSR_HYPERCALL, page_register(0x2000))
        for position in range(len(self.lapics)):
            assert self.wrmsr(position, HV_X64_MSR_SIMP, page_register(self.simp(position))) == 0
            assert self.wrmsr(position, HV_X64_MSR_SIEFP, page_register(self.siefp(position))) == 0
            assert self.wrmsr(position, HV_X64_MSR_SCONTROL, 1) == 0
            self.sint(position, MESSAGE_SINT, sint_value(MESSAGE_VECTOR))
            self.sint(position, EVENT_SINT, sint_value(EVENT_VECTOR))
            partition = self.partition
            partition.connections.messages[0x10 + position] = MessagePort(
                partition.queues, 0x100 + position, position, MESSAGE_SINT
            )
            partition.connections.events[0x20 + position] = EventPort(
                partition.synics, partition.request_interrupt, position, EVENT_SINT, 0, 2048
            )

    def sint(self, position: int, sint: int, value: int) -> None:
        """Write a SINT."""
        assert self.wrmsr(position, HV_X64_MSR_SINT0 + sint, value) == Fault.NONE

    def simp(self, position: int) -> int:
        """GPA of a VP's message page."""
        return 0x10000 + 0x2000 * position

    def siefp(self, position: int) -> int:
        """GPA of a VP's event-flag page."""
        return 0x11000 + 0x2000 * position

    def hypercall(self, control: int, argument: int, position: int = 0) -> HvStatus:
        """A hypercall; its status."""
        (result, _zero), fault = self.exit(position, ExitOperation.HYPERCALL, control, argument)
        assert fault == Fault.NONE
        return HvStatus(result & 0xFFFF)

    def post_message(self, connection_id: int, payload: bytes = PAYLOAD, message_type: int = TYPE) -> HvStatus:
        """HvCallPostMessage from memory."""
        self.memory.write(INPUT, PostMessageInput.of(connection_id, message_type, payload).pack())
        return self.hypercall(HVCALL_POST_MESSAGE, INPUT)

    def signal_event(self, connection_id: int, flag: int = 0) -> HvStatus:
        """HvCallSignalEvent, fast."""
        return self.hypercall(FAST_SIGNAL_EVENT, signal_event_input(connection_id, flag))

    def slot(self, position: int, sint: int = MESSAGE_SINT) -> HvMessage:
        """A message slot."""
        return HvMessage.unpack(self.memory.read(self.simp(position) + 256 * sint, 256))

    def free(self, position: int, sint: int = MESSAGE_SINT) -> None:
        """Clear the type of a slot."""
        self.memory.write(self.simp(position) + 256 * sint, bytes(4))

    def eom(self, position: int) -> None:
        """Write EOM."""
        assert self.wrmsr(position, HV_X64_MSR_EOM, 0) == Fault.NONE

    def flags(self, position: int, sint: int = EVENT_SINT) -> list[int]:
        """Event flags that are set."""
        data = int.from_bytes(self.memory.read(self.siefp(position) + 256 * sint, 256), "little")
        return [flag for flag in range(2048) if data >> flag & 1]

    def interrupts(self, position: int) -> list[int]:
        """Vectors that the VP takes now, each ended before the next."""
        taken = []
        while vector := self.lapics[position].take():
            taken.append(vector)
            self.lapics[position].eoi()
        return taken


@pytest.fixture
def guest() -> Guest:
    """Two VPs, ready."""
    return Guest()


# -- registers ------------------------------------------------------------------------------------


def test_registers() -> None:
    """Every SynIC register of every VP reads back what was written to it; EOM reads 0; VPs do not share."""
    guest = Guest(ready=False)
    values = {
        HV_X64_MSR_SCONTROL: 1,
        HV_X64_MSR_SIEFP: page_register(0x5000),
        HV_X64_MSR_SIMP: page_register(0x6000),
        **{HV_X64_MSR_SINT0 + sint: sint_value(0x30 + sint) for sint in range(16)},
    }
    for msr, value in values.items():
        assert guest.wrmsr(1, msr, value) == Fault.NONE
    guest.wrmsr(1, HV_X64_MSR_EOM, 0xFFFF)

    assert {msr: guest.rdmsr(1, msr) for msr in values} == values
    assert guest.rdmsr(1, HV_X64_MSR_EOM) == 0
    assert guest.rdmsr(0, HV_X64_MSR_SINT0) == SINT_RESET


def test_reset_values() -> None:
    """What a fresh VP reads."""
    guest = Guest(ready=False)

    expected = {HV_X64_MSR_SVERSION: 1, HV_X64_MSR_SCONTROL: 0, HV_X64_MSR_SIMP: 0, HV_X64_MSR_SIEFP: 0}
    expected |= {HV_X64_MSR_SINT0 + sint: 0x10000 for sint in range(16)}
    expected |= {HV_X64_MSR_GUEST_OS_ID: 0, HV_X64_MSR_HYPERCALL: 0, HV_X64_MSR_RESET: 0}
    assert {msr: guest.rdmsr(0, msr) for msr in expected} == expected


def test_vp_index_is_the_vps_own() -> None:
    """VP indices are a name space of their own, here the reverse of the positions."""
    guest = Guest(vp_count=3, ready=False)

    assert [guest.rdmsr(position, HV_X64_MSR_VP_INDEX) for position in range(3)] == [2, 1, 0]


def test_reference_time_is_read_and_not_written(guest: Guest) -> None:
    """TIME_REF_COUNT gives 100 ns units of the partition; a write is a #GP."""
    guest.time = 123456

    assert guest.rdmsr(1, HV_X64_MSR_TIME_REF_COUNT) == 123456
    assert guest.wrmsr(1, HV_X64_MSR_TIME_REF_COUNT, 0) == Fault.GENERAL_PROTECTION


READ_ONLY = (HV_X64_MSR_SVERSION, HV_X64_MSR_VP_INDEX, HV_X64_MSR_TIME_REF_COUNT)
NOT_THERE = (
    HV_X64_MSR_VP_RUNTIME,
    HV_X64_MSR_REFERENCE_TSC,
    HV_X64_MSR_EOI,
    HV_X64_MSR_STIMER0_CONFIG - 1,
    HV_X64_MSR_STIMER3_COUNT + 1,
    HV_X64_MSR_CRASH_CTL,
    0,
    0x3FFFFFFF,
    HV_X64_MSR_EOM + 1,
    HV_X64_MSR_SINT0 - 1,
    HV_X64_MSR_SINT0 + 16,
    U64,
)


@pytest.mark.parametrize("msr", READ_ONLY)
def test_write_of_a_read_only_register_is_a_fault(guest: Guest, msr: int) -> None:
    """#GP, whatever the value."""
    assert guest.wrmsr(0, msr, 1) == Fault.GENERAL_PROTECTION


@pytest.mark.parametrize("msr", NOT_THERE)
def test_register_that_is_not_there_is_a_fault(guest: Guest, msr: int) -> None:
    """Read and write of what CPUID does not promise are #GPs, counted."""
    assert guest.exit(0, ExitOperation.RDMSR, msr) == ((0, 0), Fault.GENERAL_PROTECTION)
    assert guest.exit(0, ExitOperation.WRMSR, msr, 1) == ((0, 0), Fault.GENERAL_PROTECTION)
    assert guest.partition.refused["general-protection"] == 2


@pytest.mark.parametrize("vector", [0, 15])
def test_unmasked_sint_with_a_bad_vector_is_a_fault(guest: Guest, vector: int) -> None:
    """Vectors below 16 do not exist."""
    assert guest.wrmsr(0, HV_X64_MSR_SINT0 + 3, vector) == Fault.GENERAL_PROTECTION
    assert guest.rdmsr(0, HV_X64_MSR_SINT0 + 3) == SINT_RESET


@pytest.mark.parametrize("msr", [HV_X64_MSR_SIMP, HV_X64_MSR_SIEFP, HV_X64_MSR_HYPERCALL])
@pytest.mark.parametrize("gpa", [RAM, 1 << 52, U64 & ~0xFFF])
def test_page_beyond_ram_is_a_fault(guest: Guest, msr: int, gpa: int) -> None:
    """No page of the hypervisor's lies where there is no RAM."""
    before = guest.rdmsr(0, msr)

    assert guest.wrmsr(0, msr, page_register(gpa)) == Fault.GENERAL_PROTECTION
    assert guest.rdmsr(0, msr) == before


def test_unknown_exit_is_an_invalid_opcode(guest: Guest) -> None:
    """An operation that is none is a #UD, and counted."""
    assert guest.exit(0, 0)[1] == guest.exit(0, 77)[1] == Fault.INVALID_OPCODE
    assert guest.partition.refused["unknown-exit-operation"] == 2


def test_cpuid_gives_its_leaves(guest: Guest) -> None:
    """EAX and EBX in the first word, ECX and EDX in the second; unknown leaves are zero."""
    for leaf, eax, ebx, ecx, edx in leaves():
        assert guest.exit(1, ExitOperation.CPUID, leaf) == ((eax | ebx << 32, ecx | edx << 32), Fault.NONE)
    assert guest.exit(1, ExitOperation.CPUID, 0x40000006) == ((0, 0), Fault.NONE)


# -- the hypercall page ---------------------------------------------------------------------------


def test_hypercall_before_its_page_is_an_invalid_opcode() -> None:
    """No page, no instruction to call."""
    guest = Guest(ready=False)
    before_id = guest.wrmsr(0, HV_X64_MSR_HYPERCALL, page_register(0x2000))
    refused = guest.rdmsr(0, HV_X64_MSR_HYPERCALL)
    guest.wrmsr(0, HV_X64_MSR_GUEST_OS_ID, 1)

    assert (before_id, refused) == (Fault.NONE, 0x2000)
    assert guest.exit(0, ExitOperation.HYPERCALL, FAST_SIGNAL_EVENT)[1] == Fault.INVALID_OPCODE
    guest.wrmsr(0, HV_X64_MSR_HYPERCALL, page_register(0x2000))
    assert guest.exit(0, ExitOperation.HYPERCALL, FAST_SIGNAL_EVENT)[1] == Fault.NONE


def test_guest_without_a_name_has_no_hypercalls(guest: Guest) -> None:
    """Writing 0 to GUEST_OS_ID disables the page."""
    guest.wrmsr(0, HV_X64_MSR_GUEST_OS_ID, 0)

    assert guest.rdmsr(0, HV_X64_MSR_HYPERCALL) == 0x2000
    assert guest.exit(0, ExitOperation.HYPERCALL, FAST_SIGNAL_EVENT)[1] == Fault.INVALID_OPCODE


def test_locked_hypercall_page_stays_until_reset(guest: Guest) -> None:
    """The lock bit makes writes ignored; a reset clears it."""
    guest.wrmsr(0, HV_X64_MSR_HYPERCALL, page_register(0x4000) | 2)
    guest.wrmsr(0, HV_X64_MSR_HYPERCALL, 0)
    locked = guest.rdmsr(0, HV_X64_MSR_HYPERCALL)
    guest.wrmsr(0, HV_X64_MSR_RESET, 1)

    assert (locked, guest.rdmsr(0, HV_X64_MSR_HYPERCALL)) == (0x4003, 0)


# -- messages -------------------------------------------------------------------------------------

pairs = pytest.mark.parametrize("target", [0, 1], ids=["self", "other"])


@pairs
def test_message(guest: Guest, target: int) -> None:
    """To self and to another VP: status 0; type, size, payload in the slot; pending 0; exactly 1 interrupt."""
    assert guest.post_message(0x10 + target) is HvStatus.SUCCESS
    assert guest.slot(target) == HvMessage(TYPE, PAYLOAD, sender=0x100 + target)
    assert guest.interrupts(target) == [MESSAGE_VECTOR]
    assert guest.interrupts(1 - target) == []
    assert guest.requested == [(target, MESSAGE_VECTOR)]


@pairs
def test_message_to_a_busy_slot(guest: Guest, target: int) -> None:
    """Status 0; the old payload stays; pending 1; no interrupt."""
    guest.post_message(0x10 + target, b"old")
    guest.interrupts(target)

    assert guest.post_message(0x10 + target, b"new") is HvStatus.SUCCESS
    assert (guest.slot(target).payload, guest.slot(target).message_flags) == (b"old", 1)
    assert guest.interrupts(target) == []


@pairs
def test_receive_pending(guest: Guest, target: int) -> None:
    """Clear the type, write EOM: the new payload is in the slot, 1 interrupt, pending 0."""
    guest.post_message(0x10 + target, b"old")
    guest.post_message(0x10 + target, b"new")
    guest.interrupts(target)
    guest.free(target)
    before = guest.interrupts(target)
    guest.eom(target)

    assert before == []
    assert (guest.slot(target).payload, guest.slot(target).message_flags) == (b"new", 0)
    assert guest.interrupts(target) == [MESSAGE_VECTOR]


def test_unknown_connection(guest: Guest) -> None:
    """INVALID_CONNECTION_ID, never INVALID_HYPERCALL_CODE; ids have 24 bits."""
    for connection_id in (0, 0x12, 0xFFFFFF, 0x1000010, U64 & 0xFFFFFFFF):
        assert guest.post_message(connection_id) is HvStatus.INVALID_CONNECTION_ID
        assert guest.signal_event(connection_id) is HvStatus.INVALID_CONNECTION_ID
    assert guest.partition.refused["unknown-message-connection"] == 5
    assert guest.partition.refused["unknown-event-connection"] == 5


def test_queue_keeps_its_order(guest: Guest) -> None:
    """Deeper than one: messages arrive as they were posted, each with an interrupt of its own."""
    for number in range(10):
        guest.post_message(0x11, bytes([number]))
    arrived = []
    while guest.slot(1).message_type:
        arrived.append((guest.slot(1).payload[0], guest.slot(1).message_flags, len(guest.interrupts(1))))
        guest.free(1)
        guest.eom(1)

    assert arrived == [(number, int(number < 9), 1) for number in range(10)]


def test_seventeenth_waiting_message_finds_no_buffer(guest: Guest) -> None:
    """A port has 16 buffers: with the slot full the 17th message has to come again, by nobody's fault; 16 arrive."""
    guest.post_message(0x11, b"resident")
    statuses = [guest.post_message(0x11, bytes([number])) for number in range(17)]
    arrived = 0
    while guest.slot(1).message_type:
        arrived += 1
        guest.free(1)
        guest.eom(1)

    assert statuses == [HvStatus.SUCCESS] * 16 + [HvStatus.INSUFFICIENT_BUFFERS]
    assert arrived == 17
    assert (guest.partition.refused, guest.partition.ignored) == ({}, {"port-insufficient-buffers": 1})


@pytest.mark.parametrize("size", [0, 1, 8, 239, 240])
def test_payload_of_any_size_up_to_240(guest: Guest, size: int) -> None:
    """The slot says the size and holds the bytes."""
    payload = bytes(range(size))

    assert guest.post_message(0x10, payload) is HvStatus.SUCCESS
    raw = guest.memory.read(guest.simp(0) + 256 * MESSAGE_SINT, 256)
    assert (raw[4], raw[16 : 16 + size]) == (size, payload)


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", 241), ("size", 256), ("size", 0xFFFFFFFF), ("type", 0), ("type", 0x80000001), ("reserved", 1)],
)
def test_message_with_a_bad_field_is_refused(guest: Guest, field: str, value: int) -> None:
    """Type 0, a hypervisor's type, a size beyond 240, a reserved word: INVALID_PARAMETER, nothing delivered."""
    words = {"connection": 0x10, "reserved": 0, "type": TYPE, "size": 8, field: value}
    guest.memory.write(INPUT, struct.pack("<IIII", *words.values()) + bytes(240))

    assert guest.hypercall(HVCALL_POST_MESSAGE, INPUT) is HvStatus.INVALID_PARAMETER
    assert guest.slot(0).message_type == 0
    assert guest.partition.refused["post-message-parameter"] == 1


def test_pages_are_overlays() -> None:
    """Enabling over stale contents shows a zeroed page, not what an earlier life left in RAM."""
    guest = Guest(ready=False)
    guest.memory.write(guest.simp(0), b"\xff" * PAGE_SIZE)
    guest.memory.write(guest.siefp(0), b"\xff" * PAGE_SIZE)
    guest.make_ready()

    assert guest.slot(0).message_type == 0
    assert guest.flags(0) == []
    assert guest.post_message(0x10) is HvStatus.SUCCESS
    assert guest.signal_event(0x20, 5) is HvStatus.SUCCESS
    assert guest.interrupts(0) == [EVENT_VECTOR, MESSAGE_VECTOR]


def test_message_posted_before_the_page_arrives_with_it() -> None:
    """A queue waits for SIMP and SCONTROL; their writes move it."""
    guest = Guest()
    guest.wrmsr(1, HV_X64_MSR_SCONTROL, 0)
    guest.wrmsr(1, HV_X64_MSR_SIMP, 0)
    status = guest.post_message(0x11)
    guest.wrmsr(1, HV_X64_MSR_SIMP, page_register(0x20000))
    without_control = guest.memory.read(0x20000, PAGE_SIZE)
    guest.wrmsr(1, HV_X64_MSR_SCONTROL, 1)

    assert status is HvStatus.SUCCESS
    assert without_control == bytes(PAGE_SIZE)
    assert HvMessage.unpack(guest.memory.read(0x20000 + 0x800, 256)).payload == PAYLOAD
    assert guest.interrupts(1) == [MESSAGE_VECTOR]


def test_end_of_message_with_nothing_pending(guest: Guest) -> None:
    """EOM writes are idempotent."""
    for _ in range(3):
        guest.eom(0)
    guest.post_message(0x10)
    guest.eom(0)

    assert guest.slot(0).payload == PAYLOAD
    assert guest.interrupts(0) == [MESSAGE_VECTOR]


def test_unmasking_with_a_message_in_the_slot(guest: Guest) -> None:
    """Masked, the message comes without an interrupt, which unmasking does not make up for; EOM drains on."""
    guest.sint(0, MESSAGE_SINT, sint_value(MESSAGE_VECTOR, masked=True))
    guest.post_message(0x10, b"one")
    guest.post_message(0x10, b"two")
    masked = guest.slot(0).payload, guest.slot(0).message_flags, guest.interrupts(0)
    guest.sint(0, MESSAGE_SINT, sint_value(MESSAGE_VECTOR))
    unmasked = guest.interrupts(0)
    guest.free(0)
    guest.eom(0)

    assert masked == (b"one", 1, [])
    assert unmasked == []
    assert (guest.slot(0).payload, guest.interrupts(0)) == (b"two", [MESSAGE_VECTOR])


def test_message_to_the_host(guest: Guest) -> None:
    """A port of the host takes the payload; posts are counted; the 17th unread message is refused."""
    port = guest.partition.connections.messages[4] = HostMessagePort(4, lambda: None)
    guest.memory.write(INPUT, PostMessageInput.of(4, 1, b"contact").pack())
    answers = [guest.partition.execute(0, ExitOperation.HYPERCALL, (HVCALL_POST_MESSAGE, INPUT, 0)) for _ in range(17)]

    assert [result for (result, _zero), _fault in answers] == [0] * 16 + [HvStatus.INSUFFICIENT_BUFFERS]
    assert (port.queue[0].payload, port.queue[0].serial, port.queue[0].message_type) == (b"contact", 1, 1)


# -- hypercall input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "gpa"),
    [
        (HVCALL_POST_MESSAGE, INPUT + 4),
        (HVCALL_POST_MESSAGE, INPUT + 1),
        (HVCALL_POST_MESSAGE, INPUT + PAGE_SIZE - 248),
        (HVCALL_POST_MESSAGE, RAM),
        (HVCALL_POST_MESSAGE, RAM - 8),
        (HVCALL_POST_MESSAGE, U64 & ~0xFFF),
        (HVCALL_SIGNAL_EVENT, INPUT + 4),
        (HVCALL_SIGNAL_EVENT, RAM),
        (HVCALL_SIGNAL_EVENT, U64 - 7),
    ],
)
def test_input_that_lies_badly_is_refused(guest: Guest, code: int, gpa: int) -> None:
    """Unaligned, across a page, outside RAM: INVALID_ALIGNMENT."""
    assert guest.hypercall(code, gpa) is HvStatus.INVALID_ALIGNMENT


def test_input_may_end_with_its_page(guest: Guest) -> None:
    """The last place in a page where the input fits."""
    data = PostMessageInput.of(0x10, TYPE, PAYLOAD).pack()
    guest.memory.write(INPUT + PAGE_SIZE - 256, data)
    guest.memory.write(RAM - 8, signal_event_input(0x20).to_bytes(8, "little"))

    assert guest.hypercall(HVCALL_POST_MESSAGE, INPUT + PAGE_SIZE - 256) is HvStatus.SUCCESS
    assert guest.hypercall(HVCALL_SIGNAL_EVENT, RAM - 8) is HvStatus.SUCCESS


def test_input_without_memory_behind_it_is_refused(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that the full tmpfs cannot supply is INSUFFICIENT_MEMORY, not SIGBUS."""

    def full(_memory: GuestMemory, _gpa: int, _length: int) -> None:
        raise OutOfMemory("full")

    monkeypatch.setattr(GuestMemory, "reserve", full)

    assert guest.hypercall(HVCALL_POST_MESSAGE, INPUT) is HvStatus.INSUFFICIENT_MEMORY


@pytest.mark.parametrize("bit", [17, 26, 27, 30, 31, 32, 43, 44, 47, 48, 59, 60, 63])
@pytest.mark.parametrize("code", [HVCALL_POST_MESSAGE, HVCALL_SIGNAL_EVENT, FAST_SIGNAL_EVENT])
def test_control_word_is_simple(guest: Guest, code: int, bit: int) -> None:
    """Header size, nesting, repetitions and reserved bits do not go with these calls."""
    assert guest.hypercall(code | 1 << bit, INPUT) is HvStatus.INVALID_HYPERCALL_INPUT


@pytest.mark.parametrize("code", [0, 1, 0x5B, 0x5E, 0xC0, 0xC1, 0xFFFF])
def test_other_calls_do_not_exist(guest: Guest, code: int) -> None:
    """INVALID_HYPERCALL_CODE, fast or not, whatever else is wrong with them."""
    assert guest.hypercall(code, 3) is HvStatus.INVALID_HYPERCALL_CODE
    assert guest.hypercall(code | HV_HYPERCALL_FAST | 1 << 63, 3) is HvStatus.INVALID_HYPERCALL_CODE


def test_message_needs_memory(guest: Guest) -> None:
    """HvCallPostMessage has no fast form."""
    assert guest.hypercall(HVCALL_POST_MESSAGE | HV_HYPERCALL_FAST, INPUT) is HvStatus.INVALID_HYPERCALL_INPUT


# -- events ---------------------------------------------------------------------------------------


@pairs
def test_event(guest: Guest, target: int) -> None:
    """To self and to another VP: bit set, 1 interrupt, status 0."""
    assert guest.signal_event(0x20 + target) is HvStatus.SUCCESS
    assert guest.flags(target) == [0]
    assert guest.interrupts(target) == [EVENT_VECTOR]
    assert (guest.flags(1 - target), guest.interrupts(1 - target)) == ([], [])


@pairs
def test_event_already_set(guest: Guest, target: int) -> None:
    """Status 0, the bit still set, no interrupt."""
    guest.signal_event(0x20 + target)
    guest.interrupts(target)

    assert guest.signal_event(0x20 + target) is HvStatus.SUCCESS
    assert (guest.flags(target), guest.interrupts(target)) == ([0], [])


@pytest.mark.parametrize("flag", [1, 2047])
def test_any_flag_of_the_port(guest: Guest, flag: int) -> None:
    """Flag numbers up to the port's last one, in the fast form and from memory."""
    guest.memory.write(INPUT, signal_event_input(0x21, flag).to_bytes(8, "little"))

    assert guest.signal_event(0x20, flag) is HvStatus.SUCCESS
    assert guest.hypercall(HVCALL_SIGNAL_EVENT, INPUT) is HvStatus.SUCCESS
    assert guest.flags(0) == guest.flags(1) == [flag]


def test_flag_beyond_the_port(guest: Guest) -> None:
    """A flag number that the port has not is INVALID_PARAMETER; so are reserved bits."""
    assert guest.signal_event(0x20, 2048) is HvStatus.INVALID_PARAMETER
    assert guest.signal_event(0x20, 0xFFFF) is HvStatus.INVALID_PARAMETER
    assert guest.hypercall(FAST_SIGNAL_EVENT, 0x20 | 1 << 48) is HvStatus.INVALID_PARAMETER
    assert guest.flags(0) == []


@pytest.mark.parametrize("how", ["masked", "synic off", "page off"])
def test_event_without_a_target(guest: Guest, how: str) -> None:
    """A masked SINT, or a VP without SynIC or event-flag page: INVALID_SYNIC_STATE, counted."""
    if how == "masked":
        guest.sint(1, EVENT_SINT, sint_value(EVENT_VECTOR, masked=True))
    elif how == "synic off":
        guest.wrmsr(1, HV_X64_MSR_SCONTROL, 0)
    else:
        guest.wrmsr(1, HV_X64_MSR_SIEFP, 0)

    assert guest.signal_event(0x21) is HvStatus.INVALID_SYNIC_STATE
    assert guest.interrupts(1) == []
    assert guest.partition.refused["event-invalid-synic-state"] == 1


# -- interrupts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("vp_count", [2, 4])
def test_sint_storm(vp_count: int) -> None:
    """VP i asks for all 16 SINTs of VP n-1-i, both directions at once: each VP counts exactly 16."""
    guest = Guest(vp_count)
    connections, synics = guest.partition.connections, guest.partition.synics
    for position, sint in product(range(vp_count), range(16)):
        guest.sint(position, sint, sint_value(0x30 + 0x10 * (sint % 12) + sint // 12))
        connections.events[0x1000 + 16 * position + sint] = EventPort(
            synics, guest.partition.request_interrupt, position, sint, 3
        )
    taken = [0] * vp_count
    for sint in range(16):
        for position in range(vp_count):
            assert guest.signal_event(0x1000 + 16 * (vp_count - 1 - position) + sint) is HvStatus.SUCCESS
        for position in range(vp_count):
            taken[position] += len(guest.interrupts(position))

    assert taken == [16] * vp_count
    assert [guest.flags(position, sint) for position, sint in product(range(vp_count), range(16))] == [[3]] * (
        16 * vp_count
    )


def test_auto_eoi(guest: Guest) -> None:
    """SINTs 3, 8, 10 and 14 with AutoEOI; the others need an EOI before the next one of the same class."""
    auto = {3, 8, 10, 14}
    synics = guest.partition.synics
    for sint in range(16):
        # All of one class, so that only a missing EOI can hold one back.
        guest.sint(0, sint, sint_value(0x90 + sint, auto_eoi=sint in auto))
        port = EventPort(synics, guest.partition.request_interrupt, 0, sint, 1)
        guest.partition.connections.events[0x100 + sint] = port
    lapic = guest.lapics[0]
    for sint in range(16):
        guest.signal_event(0x100 + sint)
        assert lapic.take() == 0x90 + sint
        guest.partition.request_interrupt(0, 0x9F if sint != 15 else 0x90)
        blocked = lapic.take() == 0
        assert blocked == (sint not in auto), sint
        lapic.eoi()
        guest.interrupts(0)


def test_auto_eoi_follows_the_sint(guest: Guest) -> None:
    """The words are published at each write of a SINT, before anything is delivered by it."""
    words = [guest.vps.load_u64(vp_page_offset(0) + VP_AUTO_EOI + 8 * word) for word in range(4)]
    guest.sint(0, 3, sint_value(0x55, auto_eoi=True))
    on = guest.vps.load_u64(vp_page_offset(0) + VP_AUTO_EOI + 8)
    guest.sint(0, 3, sint_value(0x55, auto_eoi=True, masked=True))

    assert words == [0, 0, 0, 0]
    assert on == 1 << 0x15
    assert guest.vps.load_u64(vp_page_offset(0) + VP_AUTO_EOI + 8) == 0


# -- attach, detach, reset ------------------------------------------------------------------------


def test_attach_starts_every_vp_afresh(guest: Guest) -> None:
    """Registers, overlays, interrupt words and queues of all VPs are reset; the answer is the generation."""
    guest.post_message(0x11, b"one")
    guest.post_message(0x11, b"two")
    stale = guest.memory.read(guest.simp(1), PAGE_SIZE)
    answer = guest.exit(0, ExitOperation.ATTACH, 4321, ABI_MAJOR << 16)

    assert answer == ((1, 0), Fault.NONE)
    assert guest.attached == [4321]
    assert guest.rdmsr(1, HV_X64_MSR_SIMP) == 0
    assert guest.rdmsr(1, HV_X64_MSR_GUEST_OS_ID) == guest.rdmsr(0, HV_X64_MSR_HYPERCALL) == 0
    assert guest.memory.read(guest.simp(1), PAGE_SIZE) == bytes(PAGE_SIZE) != stale
    assert guest.partition.queues.total_waiting == 0
    port = guest.partition.connections.messages[0x11]
    assert isinstance(port, MessagePort)
    assert port.in_use == 0


@pytest.mark.parametrize("version", [0, (ABI_MAJOR + 1) << 16, U64])
def test_another_abi_is_not_attached(guest: Guest, version: int) -> None:
    """Another major is a #GP and resets nothing."""
    assert guest.exit(0, ExitOperation.ATTACH, 1, version)[1] == Fault.GENERAL_PROTECTION
    assert guest.attached == []
    assert guest.post_message(0x10) is HvStatus.SUCCESS


def test_newer_minor_is_attached(guest: Guest) -> None:
    """A higher minor only adds."""
    assert guest.exit(0, ExitOperation.ATTACH, 1, ABI_MAJOR << 16 | 9)[1] == Fault.NONE


@pytest.mark.parametrize("pid", [0, 1 << 31, U64])
def test_pid_that_is_none_is_not_attached(guest: Guest, pid: int) -> None:
    """What cannot be a process is refused before anything is reset."""
    assert guest.exit(0, ExitOperation.ATTACH, pid, ABI_MAJOR << 16)[1] == Fault.GENERAL_PROTECTION
    assert guest.post_message(0x10) is HvStatus.SUCCESS


def test_detach_is_passed_on(guest: Guest) -> None:
    """The process that knows the guest is told."""
    assert guest.exit(1, ExitOperation.DETACH) == ((0, 0), Fault.NONE)
    assert guest.detached == 1


def test_reset_register_resets_the_partition(guest: Guest) -> None:
    """Bit 0 of RESET; other values do nothing."""
    guest.wrmsr(0, HV_X64_MSR_RESET, 2)
    kept = guest.rdmsr(1, HV_X64_MSR_SCONTROL)
    guest.wrmsr(0, HV_X64_MSR_RESET, 1)

    assert (kept, guest.rdmsr(1, HV_X64_MSR_SCONTROL)) == (1, 0)


# -- anything at all ------------------------------------------------------------------------------

operations = st.sampled_from([*ExitOperation, 0, 99])
registers = st.sampled_from([*MSR_NAMES, HV_X64_MSR_SIMP, HV_X64_MSR_SIEFP, HV_X64_MSR_HYPERCALL])
numbers = st.one_of(
    st.integers(min_value=0, max_value=U64),
    registers,
    st.sampled_from([HVCALL_POST_MESSAGE, HVCALL_SIGNAL_EVENT, FAST_SIGNAL_EVENT, INPUT, 1, 0x10, 0x21]),
    st.integers(min_value=0, max_value=RAM // PAGE_SIZE + 1).map(lambda page: page_register(page * PAGE_SIZE)),
)


@given(st.lists(st.tuples(st.integers(0, 1), operations, numbers, numbers, st.binary(max_size=300)), max_size=25))
def test_partition_survives_any_exits(exits: list[tuple[int, int, int, int, bytes]]) -> None:
    """Whatever a guest asks, in whatever order, with whatever in its memory: an answer, never an exception."""
    guest = Guest()
    for position, operation, a0, a1, content in exits:
        guest.memory.write(INPUT, content)
        (first, second), fault = guest.exit(position, operation, a0, a1)

        assert 0 <= first <= U64
        assert 0 <= second <= U64
        assert fault in list(Fault)


@pytest.mark.parametrize(
    ("exit_", "rule", "field", "value", "words"),
    [
        ((ExitOperation.RDMSR, 0x40000010), "general-protection", "msr", 0x40000010, "read of 0x40000010"),
        ((ExitOperation.WRMSR, HV_X64_MSR_SINT0, 5), "general-protection", "msr", HV_X64_MSR_SINT0, "(value 0x5)"),
        ((77,), "unknown-exit-operation", "operation", 77, "operation 77"),
        ((ExitOperation.ATTACH, 1, 2 << 16), "attach-abi-version", "version", 2 << 16, "0x20000"),
        ((ExitOperation.ATTACH, 0, ABI_MAJOR << 16), "attach-pid", "pid", 0, "pid 0"),
        ((ExitOperation.HYPERCALL, 0x5E), "hypercall-code", "control", 0x5E, "INVALID_HYPERCALL_CODE"),
        ((ExitOperation.HYPERCALL, 0x1005C), "fast-post-message", "control", 0x1005C, "INVALID_HYPERCALL_INPUT"),
        ((ExitOperation.HYPERCALL, 0x5C, 4), "hypercall-input-alignment", "input GPA", 4, "INVALID_ALIGNMENT"),
        ((ExitOperation.HYPERCALL, 0x1005D, 0x777), "unknown-event-connection", "connectionid", 0x777, "0x777"),
    ],
)
def test_refused_exit_says_why(
    guest: Guest, exit_: tuple[int, ...], rule: str, field: str, value: int, words: str
) -> None:
    """Rule, offending field, what it held: of a fault or a status the guest itself is told much less."""
    operation, first, second, _third = (*exit_, 0, 0, 0)[:4]
    guest.partition.execute(1, operation, (first, second, 0))

    refusal = guest.partition.refusals.records()[-1]
    assert (refusal["rule"], refusal["field"], refusal["value"]) == (rule, field, value)
    assert words in refusal["text"]
    assert guest.partition.refused == {rule: 1}


@pytest.mark.parametrize(
    ("field", "value"), [("payload_size", 241), ("message_type", 0), ("message_type", 1 << 31), ("reserved", 9)]
)
def test_refused_post_names_the_field(guest: Guest, field: str, value: int) -> None:
    """One of four fields is no message's; which one is told."""
    fields = {"connectionid": 1, "reserved": 0, "message_type": 1, "payload_size": 8, field: value}

    guest.partition.post_message(PostMessageInput.LAYOUT.pack(*fields.values(), b""))

    (refusal,) = guest.partition.refusals.records()
    assert (refusal["rule"], refusal["field"], refusal["value"]) == ("post-message-parameter", field, value)
