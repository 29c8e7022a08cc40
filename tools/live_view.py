"""A machine seen from outside, as one asks of it whether it is settled and what is wrong then.

Both ends in one: the guest's records in RAM, the host's mirror, the words of the processors and of the doorbells, the
process table. Nothing is locked and nothing written; each word is as it was when it was read. What is asked of a
machine that moves is a guess; of one that is settled (`tools.settled`) it is its state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from struct import Struct
from typing import Final

from emu.control import ActorKind, ActorRow, ActorState
from emu.host_tables import HostTables, HostVp
from emu.ipc.atomics import ACQUIRE
from emu.layout import (
    CONNECTIONS,
    D_CONNECTION,
    D_CONNECTION_SUMMARY,
    D_EXIT_BELL,
    D_HOST_RUN_STATE,
    EXIT_SLOT,
    EXIT_SLOTS,
    MAX_VPS,
    VECTOR_WORDS,
    VP_EXIT_SLOT,
    VP_IN_SERVICE,
    VP_REQUEST,
    VP_RUN_STATE,
    X_CLAIMER,
    X_OPERATION,
    X_STATE,
    ExitState,
    RunState,
    vp_page_offset,
)
from emu.machine import Machine
from emu.memory import reserve_ram
from emu.mirror import Mirror
from emu.wire.message_relid import relid_of
from emu.wire.messages import MessageType
from emu.wire.ring_layout import CONTROL_PAGE_SIZE
from emu.wire.synic import (
    HV_EVENT_FLAGS_BYTE_COUNT,
    HV_MESSAGE_FLAG_PENDING,
    HV_MESSAGE_SIZE,
    HV_SYNIC_CONTROL_ENABLE,
    HV_SYNIC_SINT_COUNT,
    HVMSG_CHANNEL_MESSAGE,
    MESSAGE_FLAGS_OFFSET,
    MESSAGE_PAYLOAD_OFFSET,
    message_slot,
    page_register_enabled,
    page_register_gpa,
)
from guestproc.kernel.layout import BOOT_MAGIC, BOOT_RECORD_GPA, Channel, KernelTables
from guestproc.kernel.work_records import WorkItem
from guestproc.kernel.workqueue import WORKERS, QueueNumber
from guestproc.protocol.era import ERAS
from guestproc.protocol.numbers import Works
from guestproc.protocol.triage import payload_of
from guestproc.view import GuestView
from tools.nouns import counted, noun

INNER: Final = (ActorKind.HYPERVISOR, ActorKind.VCPU, ActorKind.TASK, ActorKind.WORKER)
"""Kinds of actors that move a machine; the workqueue process's first thread only waits for the others."""
_U32: Final = Struct("<I")
_SUMMARY_WORDS: Final = CONNECTIONS // 64 // 64


@dataclass(frozen=True, slots=True)
class ExitInFlight:
    """An exit slot that is in use, by the claimer's own word for itself."""

    position: int
    slot: int
    state: ExitState
    claimer: int
    operation: int


@dataclass(frozen=True, slots=True)
class SlotMessage:
    """A message slot: its type (0: empty), its pending bit, and what channel message it holds."""

    sint: int
    message_type: int
    pending: bool
    payload: bytes

    @property
    def text(self) -> str:
        """The message for people."""
        return message_text(self.payload) if self.message_type == HVMSG_CHANNEL_MESSAGE else hex(self.message_type)


@dataclass(frozen=True, slots=True)
class Work:
    """A work item that waits on its queue, or that `worker` (an actor number, else 0) runs."""

    item: WorkItem
    queue: QueueNumber
    worker: int
    payload: bytes
    """The message that it is about; empty for work that is about none."""

    @property
    def msgtype(self) -> int:
        """Type of that message, 0 for none."""
        return int.from_bytes(self.payload[:4], "little")

    @property
    def relid(self) -> int:
        """The channel that the message names, 0 for none."""
        return relid_of(self.payload)

    @property
    def text(self) -> str:
        """The work for people."""
        return message_text(self.payload) if self.payload else Works(self.item.function).name.lower()


class LiveView:
    """One machine. `tables` are the guest's, where the caller has them already."""

    def __init__(self, machine: Machine, tables: KernelTables | None = None) -> None:
        self.machine: Final = machine
        self.control: Final = machine.control
        self.mirror: Final = Mirror(machine.control)
        self.host: Final = HostTables(machine.control)
        self.era: Final = ERAS[machine.config["machine"]["era"]]
        self._guest = None if tables is None else GuestView(tables)
        self._positions: list[int] = machine.config["cpu_positions"]

    # -- actors --------------------------------------------------------------------------------------

    def actors(self) -> list[ActorRow]:
        """Everybody who moves this machine, dead or alive."""
        return [row for row in self.control.rows() if row.kind in INNER]

    def name_of(self, number: int) -> str:
        """An actor's name by its number."""
        return self.control.name_of(number)

    def actor_of_cpu(self, cpu: int) -> int:
        """Number of the actor that is this processor, 0 for none."""
        rows = (row for row in self.actors() if row.kind == ActorKind.VCPU and row.cpu == cpu)
        return next((row.number for row in rows if row.state == ActorState.ALIVE), 0)

    # -- the guest's records -------------------------------------------------------------------------

    @property
    def guest(self) -> GuestView | None:
        """The guest's records; None of a foreign guest, or before ours has laid out RAM."""
        if self._guest is None and not self.machine.config.get("no_guest"):
            ram = self.machine.ram
            if ram.view.load_u64(BOOT_RECORD_GPA, ACQUIRE) == BOOT_MAGIC:
                # A look at a page's column may be the first touch of it.
                tables = KernelTables.attach(ram.apart, partial(reserve_ram, ram.fd))
                self._guest = GuestView(tables)
        return self._guest

    @property
    def tables(self) -> KernelTables | None:
        """The guest's tables, as `guest`."""
        guest = self.guest
        return None if guest is None else guest.tables

    def channels(self) -> list[Channel]:
        """Every channel record of the guest."""
        return [] if self.tables is None else list(self.tables.channels.live())

    def work(self) -> Iterator[Work]:
        """What is on the guest's queues, and what its workers run."""
        tables = self.tables
        if tables is None:
            return
        for item in tables.work.live():
            if not item.sequence:
                continue
            queue = tables.queues.at(item.queue)
            running = [n for n in range(WORKERS[QueueNumber(item.queue)]) if queue.running[n] == item.sequence]
            worker = queue.worker_actors[running[0]] if running else 0
            message = item.function == Works.VMBUS_ONMESSAGE_WORK
            yield Work(item, QueueNumber(item.queue), worker, payload_of(self.era, item.message) if message else b"")

    def workers_of(self, queue: QueueNumber) -> list[int]:
        """Actor numbers of a queue's workers."""
        assert self.tables is not None
        return [number for number in self.tables.queues.at(queue).worker_actors if number]

    # -- processors ----------------------------------------------------------------------------------

    def cpu_of(self, position: int) -> int:
        """The guest's number of the processor whose page that is."""
        return self._positions.index(position)

    def position_of(self, cpu: int) -> int:
        """The page of a guest CPU."""
        return self._positions[cpu]

    def run_state(self, position: int) -> int:
        """Run state of a processor, as it is written there."""
        return self.machine.vps.view.load_u32(vp_page_offset(position) + VP_RUN_STATE)

    def requested(self, position: int) -> int:
        """Bits of the vectors that are requested."""
        return self._vectors(position, VP_REQUEST)

    def in_service(self, position: int) -> int:
        """Bits of the vectors in service."""
        return self._vectors(position, VP_IN_SERVICE)

    def deliverable(self, position: int) -> int:
        """The highest vector that this processor would take now, 0 for none."""
        requested, served = self.requested(position).bit_length() - 1, self.in_service(position).bit_length() - 1
        return requested if requested >> 4 > max(served, 0) >> 4 else 0

    def _vectors(self, position: int, field: int) -> int:
        load, at = self.machine.vps.view.load_u64, vp_page_offset(position) + field
        return sum(load(at + 8 * word) << 64 * word for word in range(VECTOR_WORDS)) & ~1

    def exits(self) -> Iterator[ExitInFlight]:
        """The exit slots in use."""
        load = self.machine.vps.view.load_u32
        for position in range(self.machine.vp_count):
            for slot in range(EXIT_SLOTS):
                at = vp_page_offset(position) + VP_EXIT_SLOT + slot * EXIT_SLOT.size
                state = load(at + X_STATE)
                if state in set(ExitState) - {ExitState.FREE}:
                    claimer, operation = load(at + X_CLAIMER), load(at + X_OPERATION)
                    yield ExitInFlight(position, slot, ExitState(state), claimer, operation)

    # -- the host ------------------------------------------------------------------------------------

    @property
    def host_halted(self) -> bool:
        """Whether the host's loop has nothing to do."""
        return self.machine.doorbells.view.load_u32(D_HOST_RUN_STATE) == RunState.HALTED

    def bells(self) -> bool:
        """Whether anything is announced to the host that it would see: a doorbell's summary, an exit."""
        load = self.machine.doorbells.view.load_u64
        summary = (load(D_CONNECTION_SUMMARY + 8 * word) for word in range(_SUMMARY_WORDS))
        exits = (load(D_EXIT_BELL + 8 * word) for word in range(MAX_VPS // 8))
        return any(summary) or any(exits)

    def rung(self) -> list[int]:
        """Connection ids whose doorbell is rung, announced or not."""
        doorbells = self.machine.doorbells.memory
        words = doorbells[D_CONNECTION : D_CONNECTION + CONNECTIONS // 8]
        bits = int.from_bytes(words, "little")
        return list(set_bits(bits))

    def synic(self, position: int) -> HostVp:
        """Registers of a processor's SynIC, and what waits for its slots."""
        return self.host.vp(position)

    def synic_on(self, position: int) -> bool:
        """Whether it delivers anything."""
        return bool(self.synic(position).scontrol & HV_SYNIC_CONTROL_ENABLE)

    def slots(self, position: int) -> Iterator[SlotMessage]:
        """The message slots of a processor that are full, or empty with their pending bit set."""
        page = self._overlay(position, self.synic(position).simp)
        for sint in range(HV_SYNIC_SINT_COUNT if page else 0):
            at = message_slot(sint)
            message_type = _U32.unpack_from(page, at)[0]
            pending = bool(page[at + MESSAGE_FLAGS_OFFSET] & HV_MESSAGE_FLAG_PENDING)
            if message_type or pending:
                payload = page[at + MESSAGE_PAYLOAD_OFFSET : at + HV_MESSAGE_SIZE]
                yield SlotMessage(sint, message_type, pending, payload)

    def flags(self, position: int, sint: int) -> list[int]:
        """The event flags of one SINT of a processor that are set."""
        page = self._overlay(position, self.synic(position).siefp)
        first = sint * HV_EVENT_FLAGS_BYTE_COUNT
        return list(set_bits(int.from_bytes(page[first : first + HV_EVENT_FLAGS_BYTE_COUNT], "little")))

    def _overlay(self, position: int, register: int) -> bytes:
        """An overlay page's bytes, none while it is off or not in RAM."""
        gpa = page_register_gpa(register)
        inside = gpa + CONTROL_PAGE_SIZE <= self.machine.ram.size
        if not (page_register_enabled(register) and inside and self.synic_on(position) and self.tables is not None):
            return b""
        return bytes(self.machine.ram.memory[gpa : gpa + CONTROL_PAGE_SIZE])

    def under_way(self) -> list[str]:
        """Messages between the two ends that nobody has taken yet, in words."""
        head = self.mirror.head()
        counts = (
            (head.incoming, "of the guest's", "to be read by the host"),
            (head.outgoing, "of the host's", "for a buffer"),
            (head.to_slots, "of the host's", "for a slot"),
        )
        found = [
            f"{counted(count, 'message')} {whose} {noun(count, 'waits', 'wait')} {what}"
            for count, whose, what in counts
            if count
        ]
        for position in range(self.machine.vp_count):
            full = [one for one in self.slots(position) if one.message_type]
            found += [f"{one.text} is in slot {one.sint} of VP {self.machine.vp_index(position)}" for one in full]
        return found


def message_text(payload: bytes) -> str:
    """A channel message for people: its type, and the channel that it names."""
    msgtype = int.from_bytes(payload[:4], "little")
    name = MessageType(msgtype).name if msgtype in set(MessageType) else f"message {msgtype}"
    relid = relid_of(payload)
    return f"{name} of relid {relid}" if relid else name


def set_bits(word: int) -> Iterator[int]:
    """Numbers of the bits that are set, lowest first."""
    while word:
        low = word & -word
        yield low.bit_length() - 1
        word ^= low
