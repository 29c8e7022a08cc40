"""A guest that does what no guest should, by a seed: `python -m tests.system.hostile_guest MACHINE --seed N`.

It attaches to a machine by its name like any foreign guest, reaches what every guest reaches (RAM, processor
pages, doorbells, semaphores, nothing else), and stores, posts and rings whatever the seed says: garbage, and, since
garbage alone does not come far, honest steps in between and messages that are nearly right. It ends by the seed,
too: in good order, without a word, by SIGKILL, or by a timer at some instruction.

It prints its seed first and what it did last. Its own troubles (an exit that it spoilt itself is not answered) are
no failure; an exception that it did not expect is.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from struct import pack
from typing import Final
from uuid import UUID

from emu.errors import VmbusError
from emu.layout import (
    ABI_MAJOR,
    D_CONNECTION,
    D_EXIT_BELL,
    D_HOST_RUN_STATE,
    DOORBELLS,
    EXIT_SLOT,
    EXIT_SLOTS,
    M_STATE,
    PAGE_SIZE,
    VP_EXIT_SLOT,
    VP_REQUEST,
    VP_RUN_STATE,
    X_STATE,
    ExitOperation,
    ExitState,
    vp_page_offset,
)
from emu.wire.hypercalls import HVCALL_POST_MESSAGE, HVCALL_SIGNAL_EVENT
from emu.wire.messages import (
    CloseChannel,
    CloseReservedChannel,
    GpadlBody,
    GpadlHeader,
    GpadlTeardown,
    InitiateContact,
    Message,
    ModifyChannel,
    OfferChannel,
    OpenChannel,
    OpenReservedChannel,
    RelidReleased,
    RequestOffers,
    TlConnectRequest,
    Unload,
)
from emu.wire.ring_layout import (
    FEATURE_BITS,
    INTERRUPT_MASK,
    PENDING_SEND_SZ,
    READ_INDEX,
    WRITE_INDEX,
)
from emu.wire.synic import (
    HV_X64_MSR_HYPERCALL,
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SIEFP,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SINT0,
    MSR_NAMES,
    VMBUS_MESSAGE_SINT,
)
from emu.wire.versions import KNOWN_VERSIONS, VERSION_WIN10_V5_3
from tests.system.python_guest import (
    FIRST_HANDLE,
    HYPERCALL_PAGE,
    INPUT_PAGE,
    SIEFP_PAGE,
    SIMP_PAGE,
    EchoChannel,
    PythonGuest,
)

EXIT_DEADLINE_S: Final = 0.12
"""The host answers within 100 ms, whatever stands in its run state; later it is our own slot that is spoilt."""
UNSEEN_PID: Final = (1 << 22) - 1
BOOT_RECORD_GPA: Final = 0x1000
ENDINGS: Final = ("detach", "leave", "kill", "alarm")


class HostileGuest(PythonGuest):
    """A guest with a random source, and with what it has seen of the host to make nonsense from."""

    def __init__(self, machine: str, seed: int) -> None:
        super().__init__(machine, deadline_s=EXIT_DEADLINE_S)
        self.rng = random.Random(seed)
        self.clients = [self.exit_client(position) for position in range(self.vp_count)]
        self.relids = [1, 2, 3]
        self.offered: list[OfferChannel] = []
        self.channels: list[EchoChannel] = []
        self.did: Counter[str] = Counter()

    def stopping(self) -> bool:
        """Never: the machine page may be our own nonsense."""
        return False

    def number(self, bits: int) -> int:
        """A number at which something might break: an end, a power of two or beside it, small, or any."""
        kind = self.rng.randrange(6)
        most = (1 << bits) - 1
        if kind == 0:
            return self.rng.choice((0, 1, most, most - 7, most >> 1, (most >> 1) + 1))
        if kind == 1:
            return min(most, max(0, (1 << self.rng.randrange(bits)) + self.rng.randrange(-1, 2)))
        if kind == 2:
            return self.rng.randrange(64)
        if kind == 3:
            return self.rng.randrange(0, 1 << min(bits, 16), 8)
        return self.rng.getrandbits(bits)

    def field(self) -> int:
        """A u32 for a message: often one that means something to the host."""
        if self.rng.random() < 0.6:
            return self.rng.choice([*self.relids, *[FIRST_HANDLE + relid for relid in self.relids], 0, 2, 4])
        return self.number(32)

    def gpa(self) -> int:
        """Where something lies, or cannot lie."""
        places = (0, HYPERCALL_PAGE, SIMP_PAGE, SIEFP_PAGE, INPUT_PAGE, self.ram.size - PAGE_SIZE, self.ram.size)
        page = self.rng.choice(places) if self.rng.random() < 0.7 else self.number(64)
        if self.channels and self.rng.random() < 0.2:
            page = self.rng.choice(self.rng.choice(self.channels).gpas)
        return page

    def do_exit(self, operation: int, a0: int = 0, a1: int = 0, a2: int = 0) -> int:
        """An exit on any VP; result 0, or 0 for one that faulted or was never answered."""
        client = self.rng.choice(self.clients) if self.rng.random() < 0.3 else self.clients[self.position]
        try:
            return client.exit(operation, a0, a1, a2)[0]
        except VmbusError as error:
            self.did[type(error).__name__] += 1
            self.free_own_slots()
            return 0

    def free_own_slots(self) -> None:
        """Slots that were spoilt would stop us, not the host."""
        for at in self.slots():
            self.vps.view.store_u32(at + X_STATE, ExitState.FREE)

    def slots(self) -> list[int]:
        """Where every exit slot lies."""
        pages = [vp_page_offset(position) + VP_EXIT_SLOT for position in range(self.vp_count)]
        return [page + EXIT_SLOT.size * slot for page in pages for slot in range(EXIT_SLOTS)]

    def try_post(self, payload: bytes, connection_id: int, message_type: int = 1) -> None:
        """Post, whatever the status."""
        data = pack("<IIII240s", connection_id, 0, message_type, len(payload), payload)
        self.memory.write(INPUT_PAGE, data)
        self.do_exit(ExitOperation.HYPERCALL, HVCALL_POST_MESSAGE, INPUT_PAGE)

    def try_send(self, message: Message | bytes) -> None:
        """Post a channel message where a connected guest posts it, and empty the slot."""
        self.try_post(message if isinstance(message, bytes) else message.pack(), self.connection_id)
        self.take_messages()


# -- honest steps: garbage comes further behind them ----------------------------------------------------------


def boot(guest: HostileGuest) -> None:
    """Everything up to the list of offers."""
    guest.free_own_slots()
    guest.inbox.clear()
    guest.bring_up()
    guest.take_messages()
    guest.inbox.clear()
    guest.contact(guest.rng.choice((VERSION_WIN10_V5_3, VERSION_WIN10_V5_3, *KNOWN_VERSIONS)))
    guest.offered = guest.offers()
    guest.relids = [offer.child_relid for offer in guest.offered[:4]] or [1]
    guest.channels = []


def open_channel(guest: HostileGuest) -> None:
    """An echo channel more, its pages in order, in disorder, or all the same one."""
    if not guest.offered:
        boot(guest)
    first = 0x400 + guest.rng.randrange(16) * 0x40
    pfns = list(range(first, first + 2 * guest.rng.randrange(2, 12)))
    kind = guest.rng.randrange(4)
    if kind == 0:
        guest.rng.shuffle(pfns)
    elif kind == 1:
        pfns = [first] * len(pfns)
    guest.channels.append(guest.open(guest.rng.choice(guest.offered[:4]), pfns=pfns))


def echo(guest: HostileGuest) -> None:
    """Some packets there and back."""
    if guest.channels:
        guest.rng.choice(guest.channels).echo(guest.rng.randrange(1, 30))


def close_channel(guest: HostileGuest) -> None:
    """Close and tear down, or half of it, or the other way round."""
    if not guest.channels:
        return
    channel = guest.channels.pop(guest.rng.randrange(len(guest.channels)))
    steps: list[Message] = [
        CloseChannel(channel.relid),
        GpadlTeardown(channel.relid, channel.handle),
        RelidReleased(channel.relid),
    ]
    guest.rng.shuffle(steps)
    for message in steps[: guest.rng.randrange(1, 4)]:
        guest.try_send(message)


# -- hypercalls and messages ----------------------------------------------------------------------------------


def post_garbage(guest: HostileGuest) -> None:
    """Random bytes of any length, on any connection, of any type."""
    rng = guest.rng
    payload = rng.randbytes(rng.randrange(241))
    connection = rng.choice((1, 4, 4, 4, 2, 3, 0x2001, guest.number(32)))
    guest.try_post(payload, connection, rng.choice((1, 1, 1, 0, 1 << 31, guest.number(32))))


def post_raw(guest: HostileGuest) -> None:
    """An input block of HvCallPostMessage whose every field lies."""
    rng = guest.rng
    fields = rng.choice((1, 4, guest.number(32))), guest.number(32) & -rng.randrange(2), guest.number(32)
    size = rng.choice((0, 1, 240, 241, 255, 256, 0xFFFF_FFFF, guest.number(32)))
    guest.memory.write(INPUT_PAGE, pack("<IIII", *fields, size) + rng.randbytes(240))
    guest.do_exit(ExitOperation.HYPERCALL, HVCALL_POST_MESSAGE, INPUT_PAGE)


def post_nearly_right(guest: HostileGuest) -> None:
    """A known or nearly known message type, with fields that mean something, cut or padded anywhere."""
    rng = guest.rng
    msgtype = rng.choice((rng.randrange(32), rng.randrange(5, 15), guest.number(32)))
    body = b"".join(pack("<I", guest.field()) for _ in range(58))
    guest.try_send((pack("<II", msgtype, rng.choice((0, 0, 0, guest.number(32)))) + body)[: rng.randrange(4, 241)])


def post_out_of_place(guest: HostileGuest) -> None:
    """A message that is whole and does not belong here."""
    rng, field = guest.rng, guest.field
    endpoint = UUID(int=rng.getrandbits(128))
    messages: tuple[Message, ...] = (
        OpenChannel(field(), field(), field(), rng.choice((0, 1, 2, 0xFFFF_FFFF)), rng.choice((0, 1, 2, 3, 0xFFFF))),
        CloseChannel(field()),
        GpadlTeardown(field(), field()),
        RelidReleased(field()),
        ModifyChannel(field(), rng.choice((0, 1, 2, 0xFFFF_FFFF, field()))),
        TlConnectRequest(endpoint, endpoint),
        OpenReservedChannel(field(), 0, 2, field(), field()),
        CloseReservedChannel(field(), field(), field()),
        RequestOffers(),
        Unload(),
        InitiateContact(
            vmbus_version_requested=rng.choice((*KNOWN_VERSIONS, guest.number(32))),
            target_vcpu=rng.choice((0, 0, 1, field())),
            msg_sint=rng.choice((2, 2, 5, guest.number(8))),
            msg_vtl=rng.choice((0, 0, guest.number(8))),
            monitor_page1=rng.choice((0, 0, guest.gpa())) % (1 << 64),
            monitor_page2=rng.choice((0, 0, guest.gpa())) % (1 << 64),
        ),
    )
    guest.try_send(rng.choice(messages))


def lend_badly(guest: HostileGuest) -> None:
    """A page list that lies somewhere: counts, lengths, pages, missing or surplus bodies."""
    rng = guest.rng
    handle = rng.choice((FIRST_HANDLE + rng.randrange(8), guest.number(32)))
    pages = rng.choice((1, 4, 26, 27, 54, 55, 200))
    pfns = [rng.choice((0x800 + index, 0x800, guest.number(64))) for index in range(pages)]
    byte_count = rng.choice((pages * PAGE_SIZE, pages * PAGE_SIZE, 0, 1, guest.number(32)))
    ranges = pack(f"<II{pages}Q", byte_count, rng.choice((0, 0, 8, 4095, 4096, guest.number(32))), *pfns)
    buflen = rng.choice((len(ranges), len(ranges), len(ranges) - 8, len(ranges) + 8, 0xFFFF, guest.number(16)))
    header = GpadlHeader(guest.field(), handle, buflen, rng.choice((1, 1, 1, 0, 2, 0xFFFF)), ranges[:216])
    guest.try_send(header)
    for start in range(216, len(ranges) + rng.randrange(3) * 224, 224):
        if rng.random() < 0.9:
            guest.try_send(GpadlBody(guest.number(32), handle, ranges[start : start + 224]))


def lend_without_end(guest: HostileGuest) -> None:
    """Many page lists begun and none finished."""
    first = guest.number(24)
    for number in range(guest.rng.randrange(20, 90)):
        guest.try_send(GpadlHeader(guest.field(), first + number, 8 + 8 * 30, 1, bytes(216)))


def call(guest: HostileGuest) -> None:
    """A hypercall with any control word and any input address."""
    rng = guest.rng
    code = rng.choice((HVCALL_POST_MESSAGE, HVCALL_SIGNAL_EVENT, 0, 0xC0, guest.number(16)))
    control = code | rng.choice((0, 0, 1 << 16, 1 << 31, 1 << 32, guest.number(64)))
    argument = rng.choice((guest.gpa() + rng.choice((0, 1, 4, 8, 4088, 4089, 3841)), guest.number(64)))
    guest.do_exit(ExitOperation.HYPERCALL, control, argument % (1 << 64))


def signal_connection(guest: HostileGuest) -> None:
    """HvCallSignalEvent of connections that are there or not, flags beyond the port's, reserved bits."""
    connection = guest.rng.choice((0x2000 + guest.rng.choice(guest.relids), guest.number(32)))
    value = connection | guest.rng.choice((0, 0, 1, 0xFFFF)) << 32 | guest.rng.choice((0, 0, 1)) << 48
    guest.do_exit(ExitOperation.HYPERCALL, HVCALL_SIGNAL_EVENT | 1 << 16, value)


# -- registers ------------------------------------------------------------------------------------------------


def registers(guest: HostileGuest) -> None:
    """Any register, any value, both ways."""
    msr = guest.rng.choice((*MSR_NAMES, guest.number(32), guest.number(64)))
    guest.do_exit(ExitOperation.RDMSR, msr)
    guest.do_exit(ExitOperation.WRMSR, msr, guest.number(64))


def place_overlays(guest: HostileGuest) -> None:
    """Message page, event-flag page, hypercall page: anywhere, also over each other."""
    for _ in range(guest.rng.randrange(1, 6)):
        msr = guest.rng.choice((HV_X64_MSR_SIMP, HV_X64_MSR_SIEFP, HV_X64_MSR_HYPERCALL))
        guest.do_exit(ExitOperation.WRMSR, msr, guest.gpa() & -PAGE_SIZE | guest.rng.choice((0, 1, 1, 3, 0xFFF)))


def switch_synic(guest: HostileGuest) -> None:
    """SCONTROL and SINTs on and off while messages are on their way."""
    guest.do_exit(ExitOperation.WRMSR, HV_X64_MSR_SCONTROL, guest.rng.choice((0, 1, guest.number(64))))
    sint = guest.rng.choice((VMBUS_MESSAGE_SINT, guest.rng.randrange(16)))
    guest.do_exit(ExitOperation.WRMSR, HV_X64_MSR_SINT0 + sint, guest.rng.choice((0xF3, 0x100F3, guest.number(20))))


def other_exits(guest: HostileGuest) -> None:
    """Operations that there are not, CPUID of everything, ATTACH in any name and ABI."""
    rng = guest.rng
    guest.do_exit(guest.number(32), guest.number(64), guest.number(64), guest.number(64))
    guest.do_exit(ExitOperation.CPUID, rng.choice((0x4000_0000 + rng.randrange(16), guest.number(64))))
    pid = rng.choice((os.getpid(), os.getpid(), 0, UNSEEN_PID, 1 << 31, guest.number(64)))
    if rng.random() < 0.3:
        # No number of a living process but our own: whoever names one is mourned when that one ends.
        pid = pid if pid in (os.getpid(), UNSEEN_PID) or not Path(f"/proc/{pid}").exists() else 0
        guest.do_exit(ExitOperation.ATTACH, pid, rng.choice((ABI_MAJOR << 16, guest.number(32))))
    elif rng.random() < 0.2:
        guest.do_exit(ExitOperation.DETACH, guest.number(64))


# -- stores into what is shared -------------------------------------------------------------------------------


def scribble_slots_of_messages(guest: HostileGuest) -> None:
    """The message page, while the host delivers: types, flags, everything."""
    for _ in range(guest.rng.randrange(1, 30)):
        at = guest.simp + guest.rng.randrange(PAGE_SIZE // 4) * 4
        guest.memory.atomics.store_u32(at, guest.rng.choice((0, 1, guest.number(32))))
    guest.memory.atomics.store_u32(guest.simp + 256 * VMBUS_MESSAGE_SINT, 0)


def scribble_event_flags(guest: HostileGuest) -> None:
    """The event-flag page."""
    guest.memory.write(SIEFP_PAGE, guest.rng.randbytes(PAGE_SIZE))


def scribble_rings(guest: HostileGuest) -> None:
    """Indices, masks and wishes of an open channel's rings; then ring the host."""
    if not guest.channels:
        return
    channel = guest.rng.choice(guest.channels)
    control_page = channel.gpas[guest.rng.choice((0, channel.split))]
    for _ in range(guest.rng.randrange(1, 4)):
        word = guest.rng.choice((WRITE_INDEX, READ_INDEX, INTERRUPT_MASK, PENDING_SEND_SZ, FEATURE_BITS))
        guest.memory.atomics.store_u32(control_page + word, guest.number(32))
    channel.ring_bell()


def write_bad_packets(guest: HostileGuest) -> None:
    """A descriptor that cannot be, at the place where the host reads next; or bytes all over the ring."""
    if not guest.channels:
        return
    channel = guest.rng.choice(guest.channels)
    words = guest.memory.atomics
    at = words.load_u32(channel.gpas[0] + WRITE_INDEX) % ((channel.split - 1) * PAGE_SIZE) & -8
    descriptor = [guest.rng.choice((6, 7, 9, 11, guest.number(16)))]
    descriptor += [guest.rng.choice((2, 3, guest.number(16))) for _ in range(2)]
    descriptor += [guest.rng.choice((0, 1, guest.number(16)))]
    page, offset = divmod(at, PAGE_SIZE)
    guest.memory.write(channel.gpas[1 + page] + offset, pack("<HHHH", *descriptor))
    if guest.rng.random() < 0.2:
        guest.memory.write(channel.gpas[1], guest.rng.randbytes(PAGE_SIZE))
    end = (at + guest.rng.choice((8, 16, 24, 32, 4096))) % ((channel.split - 1) * PAGE_SIZE)
    words.store_u32(channel.gpas[0] + WRITE_INDEX, end)
    channel.ring_bell()


def scribble_processor(guest: HostileGuest) -> None:
    """Interrupt words and run states of any VP."""
    for _ in range(guest.rng.randrange(1, 20)):
        page = vp_page_offset(guest.rng.randrange(guest.vp_count))
        at = guest.rng.choice((VP_REQUEST + 8 * guest.rng.randrange(12), VP_RUN_STATE, guest.rng.randrange(0, 512, 8)))
        guest.vps.view.store_u64(page + at, guest.rng.choice((1, 2, 3, guest.number(64))))


def scribble_machine_page(guest: HostileGuest) -> None:
    """The page that says what the machine is, its state word included."""
    for _ in range(guest.rng.randrange(1, 20)):
        guest.vps.view.store_u32(guest.rng.randrange(0, 512, 4), guest.number(32))
    guest.vps.view.store_u32(M_STATE, guest.rng.choice((0, 1, 2, guest.number(32))))


def scribble_doorbells(guest: HostileGuest) -> None:
    """Every word of the doorbells, the host's run state included."""
    if guest.rng.random() < 0.1:
        guest.doorbells.memory[: DOORBELLS.size] = guest.rng.randbytes(DOORBELLS.size)
    for _ in range(guest.rng.randrange(1, 20)):
        at = guest.rng.choice((guest.rng.randrange(0, 128, 8), D_CONNECTION + guest.rng.randrange(0, PAGE_SIZE, 8)))
        guest.doorbells.view.store_u64(at, guest.number(64))
    guest.doorbells.view.store_u32(D_HOST_RUN_STATE, guest.rng.choice((0, 1, 2, guest.number(32))))


def scribble_exits(guest: HostileGuest) -> None:
    """Slots in states that they are not in, with operations that nobody asked for, and their bells."""
    for at in guest.slots():
        if guest.rng.random() < 0.5:
            operation = guest.rng.choice((1, 2, 3, 4, 6, guest.number(32)))
            words = [guest.number(64) for _ in range(6)]
            guest.vps.memory[at + 4 : at + 64] = pack("<III6Q", guest.number(32), operation, 7, *words)
            guest.vps.view.store_u32(at, guest.rng.choice((0, 1, 2, 3, 4, guest.number(32))))
    for word in range(8):
        guest.doorbells.view.store_u64(D_EXIT_BELL + 8 * word, guest.number(64))
    guest.host.wake()
    if guest.rng.random() < 0.9:
        guest.free_own_slots()


def ring_unknown_doorbells(guest: HostileGuest) -> None:
    """Connections that are nobody's."""
    for _ in range(guest.rng.randrange(1, 50)):
        guest.bell(guest.rng.randrange(16_384))()


def post_tokens(guest: HostileGuest) -> None:
    """Tokens to any semaphore, many."""
    parts = ["host", "host", *[f"vp.{position}" for position in range(guest.vp_count)], "exit.0.0", "exit.0.7"]
    wakeup = guest.wakeup(guest.rng.choice(parts))
    for _ in range(guest.rng.choice((1, 10, 3000))):
        wakeup.post()


def scribble_ram(guest: HostileGuest) -> None:
    """RAM anywhere, and a boot record such as the emulator's own guest has, of nonsense."""
    gpa = guest.rng.choice((BOOT_RECORD_GPA, guest.rng.randrange(0, 0x400_000, PAGE_SIZE)))
    guest.memory.write(gpa, guest.rng.randbytes(PAGE_SIZE))


def storm(guest: HostileGuest) -> None:
    """A second process of this guest stores into everything while this one goes on."""
    seed = guest.rng.getrandbits(32)
    pid = os.fork()
    if pid == 0:
        _store_everywhere(guest, random.Random(seed))
        os._exit(0)
    for _ in range(10):
        play(guest, guest.rng.choice(CALM))
    os.waitpid(pid, 0)


def _store_everywhere(guest: HostileGuest, rng: random.Random) -> None:
    ram, doorbells = guest.memory.atomics, guest.doorbells.view
    targets: list[Callable[[int], None]] = []
    for at in (0, 4, 16, 24):
        targets.append(ram.cell_u32(guest.simp + 256 * VMBUS_MESSAGE_SINT + at).store)
    for channel in guest.channels[:2]:
        for page in (channel.gpas[0], channel.gpas[channel.split]):
            targets += [ram.cell_u32(page + word).store for word in (WRITE_INDEX, READ_INDEX, PENDING_SEND_SZ)]
        targets.append(ram.cell_u32(channel.gpas[1]).store)
    targets.append(doorbells.cell_u32(D_HOST_RUN_STATE).store)
    targets.append(guest.vps.view.cell_u32(guest.slots()[-1]).store)
    targets.append(guest.vps.view.cell_u32(vp_page_offset(0) + VP_RUN_STATE).store)
    values = [0, 1, 2, 3, 8, 16, 64, 4096, 0xFFFF_FFFF, *[rng.getrandbits(13) & -8 for _ in range(23)]]
    for number in range(rng.choice((2_000, 30_000))):
        rng.choice(targets)(rng.choice(values))
        if number % 100 == 0:
            for channel in guest.channels[:2]:
                channel.ring_bell()


# -- the campaign ---------------------------------------------------------------------------------------------

Attack = Callable[[HostileGuest], None]

HONEST: Final[tuple[Attack, ...]] = (boot, open_channel, open_channel, echo, echo, close_channel)
CALM: Final[tuple[Attack, ...]] = (
    post_garbage,
    post_raw,
    post_nearly_right,
    post_nearly_right,
    post_out_of_place,
    lend_badly,
    lend_badly,
    lend_without_end,
    call,
    signal_connection,
    registers,
    place_overlays,
    switch_synic,
    other_exits,
    scribble_rings,
    write_bad_packets,
)
WILD: Final[tuple[Attack, ...]] = (
    scribble_slots_of_messages,
    scribble_event_flags,
    scribble_processor,
    scribble_machine_page,
    scribble_doorbells,
    scribble_exits,
    ring_unknown_doorbells,
    post_tokens,
    scribble_ram,
    storm,
)
ATTACKS: Final[Mapping[str, Attack]] = {attack.__name__: attack for attack in (*HONEST, *CALM, *WILD)}
"""Every step by its name, for `--only`."""


def play(guest: HostileGuest, attack: Attack) -> None:
    """One step. What goes wrong for a guest that spoilt its own machine is no news."""
    guest.did[attack.__name__] += 1
    try:
        attack(guest)
    except (VmbusError, AssertionError) as error:
        guest.did[type(error).__name__] += 1
        guest.free_own_slots()


def campaign(guest: HostileGuest, steps: int, seconds: float) -> None:
    """So many steps, or as many as fit into the time."""
    end = time.monotonic() + seconds
    if guest.rng.random() < 0.8:
        play(guest, boot)
    for _ in range(steps):
        if time.monotonic() > end:
            break
        kind = guest.rng.choices((HONEST, CALM, WILD), (3, 6, 3))[0]
        play(guest, guest.rng.choice(kind))


def end(guest: HostileGuest, ending: str) -> None:
    """End as the seed says; only `detach` tells the host."""
    if ending == "detach":
        guest.free_own_slots()
        guest.do_exit(ExitOperation.DETACH)
    elif ending == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """Attach to the machine named on the command line, misbehave, and end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=1.0, help="no new step after so long")
    parser.add_argument("--only", choices=sorted(ATTACKS), action="append", help="behind a boot, these steps alone")
    parser.add_argument("--ending", choices=ENDINGS, help="default: by the seed")
    options = parser.parse_args()
    guest = HostileGuest(options.machine, options.seed)
    ending = options.ending or guest.rng.choice(ENDINGS)
    print(f"hostile guest on {options.machine}: seed {options.seed}, {options.steps} steps, then {ending}", flush=True)
    if ending == "alarm":
        # Nobody handles it: it ends this process between any two instructions.
        signal.setitimer(signal.ITIMER_REAL, guest.rng.uniform(0.01, options.seconds))
    if options.only:
        play(guest, boot)
        for step in range(options.steps):
            play(guest, ATTACKS[options.only[step % len(options.only)]])
    else:
        campaign(guest, options.steps, options.seconds)
    print(json.dumps(dict(sorted(guest.did.items()))), flush=True)
    end(guest, ending)
    return 0


if __name__ == "__main__":
    sys.exit(main())
