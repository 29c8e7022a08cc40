"""A small correct guest in Python, from docs/abi.md: it boots, opens an echo channel, and gives everything back.

It is one thread that looks for itself: its SINTs are polled, so it takes no interrupts and needs no vCPU. What
misbehaves (`tests.system.hostile_guest`) is built on it, since one has to come far in order to do harm there.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Final, TypeVar
from uuid import UUID

from emu.doorbells import make_bell
from emu.errors import DeadlinePassed
from emu.ipc.segments import Segment, object_name
from emu.ipc.semaphores import Wakeup
from emu.layout import ABI_MAJOR, M_STATE, PAGE_SIZE, VP_INDEX, ExitOperation, MachineState, vp_page_offset
from emu.memory import GuestMemory
from emu.ring import Packet, RingConsumer, RingMemory, RingProducer
from emu.vmexit import ExitClient, HostBell
from emu.wire.hypercalls import HVCALL_POST_MESSAGE, HvStatus, PostMessageInput
from emu.wire.messages import (
    AllOffersDelivered,
    CloseChannel,
    GpadlCreated,
    GpadlTeardown,
    GpadlTorndown,
    InitiateContact,
    Message,
    OfferChannel,
    OpenChannel,
    OpenChannelResult,
    RelidReleased,
    RequestOffers,
    Unload,
    UnloadResponse,
    VersionResponse,
    gpadl_messages,
    parse,
)
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP
from emu.wire.synic import (
    HV_X64_MSR_EOM,
    HV_X64_MSR_GUEST_OS_ID,
    HV_X64_MSR_HYPERCALL,
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SIEFP,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SINT0,
    HYPERVISOR_CALLBACK_VECTOR,
    MESSAGE_HEADER,
    VMBUS_MESSAGE_SINT,
    message_slot,
    page_register,
    sint_value,
)
from emu.wire.versions import VERSION_WIN10_V5_3

HYPERCALL_PAGE: Final = 0x100_000
SIMP_PAGE: Final = 0x110_000
SIEFP_PAGE: Final = 0x111_000
INPUT_PAGE: Final = 0x120_000
FIRST_RING_PAGE: Final = 0x200
"""A PFN; a channel's rings are RING_PAGES from there on, each way half of them."""
RING_PAGES: Final = 8
FIRST_HANDLE: Final = 0xE1E10
CONTACT_CONNECTION: Final = 4
CHANNEL_MESSAGE: Final = 1

M = TypeVar("M", bound=Message)


class EchoChannel:
    """An open echo channel: the guest's ends of both rings, and its doorbell."""

    def __init__(self, guest: PythonGuest, offer: OfferChannel, handle: int, pfns: Sequence[int]) -> None:
        self.guest = guest
        self.relid = offer.child_relid
        self.handle = handle
        self.gpas = [pfn * PAGE_SIZE for pfn in pfns]
        self.split = len(pfns) // 2
        self.ring_bell = guest.bell(offer.connection_id)
        to_host = RingMemory.of_pages(guest.memory, self.gpas[: self.split])
        to_guest = RingMemory.of_pages(guest.memory, self.gpas[self.split :])
        for ring in (to_host, to_guest):
            ring.init()
        guest.rings += to_host, to_guest
        self.outgoing = RingProducer(to_host)
        self.incoming = RingConsumer(to_guest)

    def echo(self, count: int, payload: bytes = b"sixteen bytes...") -> list[Packet]:
        """Send packets that ask for completions and wait until as many came back."""
        # All of them, then the bell: a host that stops at the first packet has seen what a batch has.
        numbers = range(1, count + 1)
        must_signal = [self.outgoing.write(payload, number, COMPLETION_REQUESTED) for number in numbers]
        if any(must_signal):
            self.ring_bell()
        answers: list[Packet] = []

        def answered() -> bool:
            answers.extend(self.incoming.drain())
            if self.incoming.take_signal():
                self.ring_bell()
            return len(answers) >= count

        self.guest.wait(answered, f"{count} packets to come back on channel {self.relid}")
        return answers


class PythonGuest:
    """A guest attached to a machine by its name; a context manager that closes what it opened, and no more."""

    def __init__(self, machine: str, *, position: int = 0, deadline_s: float = 10.0) -> None:
        self.name = machine
        self.position = position
        self.deadline_s = deadline_s
        self.ram, self.vps, self.doorbells = (
            Segment.attach(object_name(machine, part)) for part in ("ram", "vps", "doorbells")
        )
        self.memory = GuestMemory(self.ram.fd, self.ram.memory, self.ram.size)
        self.vp_count = self.vps.size // PAGE_SIZE - 1
        self._vps_memory = memoryview(self.vps.memory)
        self._wakeups: dict[str, Wakeup] = {}
        self.host = HostBell(self.doorbells.view, self.wakeup("host"))
        self.exits = self.exit_client(position)
        self.simp = SIMP_PAGE
        self.connection_id = CONTACT_CONNECTION
        self.inbox: deque[bytes] = deque()
        self.rings: list[RingMemory] = []

    def exit_client(self, position: int) -> ExitClient:
        """Exits of one VP."""
        return ExitClient(
            self.vps.view,
            self._vps_memory,
            self.doorbells.view,
            position,
            self.host,
            lambda slot: self.wakeup(f"exit.{position}.{slot}"),
            stopping=self.stopping,
            deadline_ns=int(self.deadline_s * 1e9),
        )

    def stopping(self) -> bool:
        """Whether the machine page says that the machine ends."""
        return self.vps.view.load_u32(M_STATE) == MachineState.STOPPING

    def wakeup(self, part: str) -> Wakeup:
        """A semaphore of the machine, opened once."""
        if part not in self._wakeups:
            self._wakeups[part] = Wakeup.attach(object_name(self.name, part))
        return self._wakeups[part]

    def bell(self, connection_id: int) -> Callable[[], None]:
        """What rings a connection id below 16,384."""
        return make_bell(self.doorbells.view, connection_id, self.wakeup("host").post)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Look until it is so; DeadlinePassed when it never is."""
        end = time.monotonic() + self.deadline_s
        while not condition():
            if time.monotonic() > end:
                raise DeadlinePassed(what, int(self.deadline_s * 1e9))
            os.sched_yield()

    # -- exits ----------------------------------------------------------------------------------------

    def attach(self, pid: int | None = None) -> int:
        """ATTACH in the name of this process; the attach generation."""
        return self.exits.exit(ExitOperation.ATTACH, os.getpid() if pid is None else pid, ABI_MAJOR << 16)[0]

    def detach(self) -> None:
        """DETACH."""
        self.exits.exit(ExitOperation.DETACH)

    def write_msr(self, msr: int, value: int) -> None:
        """WRMSR; GeneralProtection for a #GP."""
        self.exits.exit(ExitOperation.WRMSR, msr, value)

    def read_msr(self, msr: int) -> int:
        """RDMSR; GeneralProtection for a #GP."""
        return self.exits.exit(ExitOperation.RDMSR, msr)[0]

    def hypercall(self, control: int, argument: int) -> int:
        """A hypercall; its status."""
        return self.exits.exit(ExitOperation.HYPERCALL, control, argument)[0]

    def post(self, payload: bytes, *, connection_id: int | None = None, message_type: int = CHANNEL_MESSAGE) -> int:
        """HvCallPostMessage, once; its status."""
        connection = self.connection_id if connection_id is None else connection_id
        self.memory.write(INPUT_PAGE, PostMessageInput.of(connection, message_type, payload).pack())
        return self.hypercall(HVCALL_POST_MESSAGE, INPUT_PAGE)

    def send(self, message: Message | bytes) -> None:
        """Post a channel message, taking messages while the host has no buffer for it."""
        payload = message if isinstance(message, bytes) else message.pack()

        def posted() -> bool:
            status = self.post(payload)
            self.take_messages()
            assert status in (HvStatus.SUCCESS, HvStatus.INSUFFICIENT_BUFFERS), HvStatus(status)
            return status == HvStatus.SUCCESS

        self.wait(posted, "a buffer for a message")

    # -- messages -------------------------------------------------------------------------------------

    def take_messages(self) -> None:
        """Empty the slot of SINT 2 for as long as there is something in it."""
        words = self.memory.atomics
        slot = self.simp + message_slot(VMBUS_MESSAGE_SINT)
        while (kind := words.load_u32(slot)) != 0:
            _type, size, _flags, _sender = MESSAGE_HEADER.unpack(self.memory.read(slot, MESSAGE_HEADER.size))
            self.inbox.append(self.memory.read(slot + MESSAGE_HEADER.size, min(size, 240)))
            words.cas_u32(slot, kind, 0)
            if words.load_u8(slot + 5) & 1:
                self.write_msr(HV_X64_MSR_EOM, 0)

    def message(self) -> Message:
        """The next message of the host."""

        def there() -> bool:
            self.take_messages()
            return bool(self.inbox)

        self.wait(there, "a message")
        return parse(self.inbox.popleft())

    def expect(self, kind: type[M]) -> M:
        """The next message, which must be of this kind."""
        message = self.message()
        assert isinstance(message, kind), message
        return message

    def answered(self, message: Message | bytes, kind: type[M]) -> M:
        """Send, and take the answer."""
        self.send(message)
        return self.expect(kind)

    # -- its life -------------------------------------------------------------------------------------

    def bring_up(self) -> None:
        """Attach; hypercalls, message page and event-flag page of one VP, SINT 2 polled."""
        self.attach()
        self.enable_hypercalls()
        self.enable_synic()

    def enable_hypercalls(self) -> None:
        """Say who we are, and enable the hypercall page."""
        self.write_msr(HV_X64_MSR_GUEST_OS_ID, 0x8100 << 48)
        self.write_msr(HV_X64_MSR_HYPERCALL, page_register(HYPERCALL_PAGE))

    def enable_synic(self) -> None:
        """Both pages, SINT 2, SCONTROL."""
        self.simp = SIMP_PAGE
        self.write_msr(HV_X64_MSR_SIMP, page_register(SIMP_PAGE))
        self.write_msr(HV_X64_MSR_SIEFP, page_register(SIEFP_PAGE))
        self.write_msr(HV_X64_MSR_SINT0 + VMBUS_MESSAGE_SINT, sint_value(HYPERVISOR_CALLBACK_VECTOR, polling=True))
        self.write_msr(HV_X64_MSR_SCONTROL, 1)

    def vp_index(self) -> int:
        """VP index of our VP, from its page."""
        return self.vps.view.load_u32(vp_page_offset(self.position) + VP_INDEX)

    def contact(
        self, version: int = VERSION_WIN10_V5_3, *, features: int = 0, client_id: UUID | None = None
    ) -> VersionResponse:
        """INITIATE_CONTACT on connection 4; further messages go to the connection that the host names."""
        self.connection_id = CONTACT_CONNECTION
        contact = InitiateContact(
            vmbus_version_requested=version,
            target_vcpu=self.vp_index(),
            msg_sint=VMBUS_MESSAGE_SINT,
            feature_flags=features,
            client_id=client_id,
        )
        response = self.answered(contact, VersionResponse)
        if response.version_supported:
            self.connection_id = response.msg_conn_id
        return response

    def offers(self) -> list[OfferChannel]:
        """REQUESTOFFERS, and what comes of it."""
        self.send(RequestOffers())
        offers = []
        while isinstance(message := self.message(), OfferChannel):
            offers.append(message)
        assert isinstance(message, AllOffersDelivered), message
        return offers

    def connect(self) -> list[OfferChannel]:
        """From nothing to the list of offers."""
        self.bring_up()
        assert self.contact().version_supported == 1
        return self.offers()

    def lend(self, relid: int, handle: int, pfns: Sequence[int]) -> int:
        """Establish a GPADL; the creation status."""
        for message in gpadl_messages(relid, handle, pfns):
            self.send(message)
        created = self.expect(GpadlCreated)
        assert (created.child_relid, created.gpadl) == (relid, handle)
        return created.creation_status

    def open(
        self,
        offer: OfferChannel,
        *,
        pfns: Sequence[int] | None = None,
        connection_id: int | None = None,
        event_flag: int = 0,
    ) -> EchoChannel:
        """Lend the rings' pages and open the channel; its signals are polled for.

        `connection_id` and `event_flag`: the signals that the guest chooses itself (6.0).
        """
        relid = offer.child_relid
        if pfns is None:
            first = FIRST_RING_PAGE + RING_PAGES * relid
            pfns = range(first, first + RING_PAGES)
        handle = FIRST_HANDLE + relid
        assert self.lend(relid, handle, pfns) == 0
        if connection_id is not None:
            offer = replace(offer, connection_id=connection_id)
        channel = EchoChannel(self, offer, handle, pfns)
        request = OpenChannel(
            relid,
            relid,
            handle,
            self.vp_index(),
            channel.split,
            connection_id=connection_id,
            event_flag=event_flag,
        )
        assert self.answered(request, OpenChannelResult).status == 0
        return channel

    def close_channel(self, channel: EchoChannel) -> None:
        """CLOSECHANNEL, and the pages back."""
        self.send(CloseChannel(channel.relid))
        torn = self.answered(GpadlTeardown(channel.relid, channel.handle), GpadlTorndown)
        assert torn.gpadl == channel.handle

    def leave(self, offers: Sequence[OfferChannel]) -> None:
        """Let go of every offer, unload, detach."""
        for offer in offers:
            self.send(RelidReleased(offer.child_relid))
        self.answered(Unload(), UnloadResponse)
        self.detach()

    def live(self, packets: int = 20) -> int:
        """The whole life of a correct guest; how many offers it got."""
        offers = self.connect()
        channel = self.open(offers[0])
        answers = channel.echo(packets)
        assert [(kind, trans_id) for kind, _flags, trans_id, _payload in answers] == [
            (VM_PKT_COMP, number) for number in range(1, packets + 1)
        ]
        self.close_channel(channel)
        self.leave(offers)
        return len(offers)

    def close(self) -> None:
        """Unmap and close everything; the machine is told nothing."""
        self._vps_memory.release()
        for ring in self.rings:
            ring.close()
        self.memory.close()
        for wakeup in self._wakeups.values():
            wakeup.close()
        for segment in (self.ram, self.vps, self.doorbells):
            segment.close()

    def __enter__(self) -> PythonGuest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
