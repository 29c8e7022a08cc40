"""STRESS: a program that sends everything that may be sent, from every CPU into every echo channel, and checks it all.

Each CPU owns the channels whose interrupts it takes: it alone gets what comes back there, whoever sent it. It sends
into its own channels and into those of the other CPUs, so that a ring has several senders. What a packet holds follows
from its sender and its number in that sender's row, so whoever gets it knows every byte of it: a packet that is lost,
doubled, out of order or changed is seen by its owner, in whatever process it was made.

Four words of each device's driver state are changed by all CPUs, atomically. Two count what was sent and what came
back: an owner goes on until they agree. A third has a bit for each of the device's channels whose owner is there:
nobody sends without it, since what comes back to nobody is dropped by the driver. The fourth has a bit for each CPU
that may still send: an owner stays until it is empty. A channel that is taken away takes with it what was under
way: that is no loss.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from emu.ipc.atomics import AtomicU64
from emu.ring import Packet
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP, ring_bytes
from guestproc.drivers.claims import being_removed, state_word
from guestproc.drivers.echo import claim_channels, release_channel
from guestproc.echo_session import EchoSession
from guestproc.kernel.layout import Channel, Device
from guestproc.tally import ChannelGone, Stalled, Tally, write_report
from guestproc.vcpu import raise_if_stopping

if TYPE_CHECKING:
    from emu.task_board import TaskRow
    from guestproc.current import Current
    from guestproc.vcpu import Vcpu

SENDERS: Final = 28
OWNED: Final = 29
SENT: Final = 30
RECEIVED: Final = 31
"""Words of a device's driver state (`hv_echo` uses the first eight)."""
_ALL: Final = (1 << 64) - 1
POOL_BYTES: Final = 1 << 18
_OFFSETS: Final = 0xFFFF
_SEQUENCE_BITS: Final = 40
MOST_BURST: Final = 64
REFRESH_NS: Final = 50_000_000
SETTLE_NS: Final = 20_000_000_000
STUCK_NS: Final = 8_000_000_000
"""When nothing at all has moved for so long, what is missing was lost."""
LOOK_NS: Final = 5_000_000
COMPUTE_STARTS: Final = 300
MOST_COMPLAINTS: Final = 8


class Payloads:
    """What each packet holds: a slice of a pool of random bytes, chosen by sender and sequence; the same everywhere."""

    def __init__(self, seed: int) -> None:
        self._pool = random.Random(seed).randbytes(POOL_BYTES)

    def of(self, sender: int, sequence: int, limit: int) -> bytes:
        """The payload of a packet on a channel whose packets have at most `limit` bytes."""
        mixed = (sequence * 0x9E37_79B1 + sender * 0x85EB_CA6B + 0x27D4_EB2F) & 0xFFFF_FFFF
        mixed ^= mixed >> 15
        offset = (mixed >> 4) & _OFFSETS
        return self._pool[offset : offset + self.length(mixed, limit)]

    @staticmethod
    def length(mixed: int, limit: int) -> int:
        """Mostly short, some as long as an Ethernet frame or a page, a few as long as the ring allows, some empty."""
        kind, value = mixed & 15, mixed >> 8
        if kind < 7:
            return min(limit, value & 63)
        if kind < 12:
            return min(limit, value % 1_501)
        if kind < 14:
            return min(limit, value % 4_097)
        if kind == 14 or value & 15:
            return min(limit, value % 16_385)
        return limit - value // 16 % 9 if limit > 8 else limit


@dataclass(slots=True)
class Lane:
    """One channel as this CPU uses it."""

    session: EchoSession
    handle: int
    relid: int
    device: int
    owned: bool
    limit: int
    owner_bit: int
    owned_word: AtomicU64
    sent_word: AtomicU64
    received_word: AtomicU64
    senders_word: AtomicU64
    sequence: int = 0
    received: Counter[int] = field(default_factory=Counter)
    """By sender: how many came back, which is also the number that the next one must have."""
    nbytes: int = 0
    """Of payload that came back, of these packets."""
    corrupt: int = 0
    gone: bool = False

    def report(self) -> dict[str, Any]:
        """What the launcher adds up."""
        return {
            "handle": self.handle,
            "relid": self.relid,
            "owned": self.owned,
            "sent": self.sequence,
            "received": {str(sender): count for sender, count in self.received.items()},
            "corrupt": self.corrupt,
            "gone": self.gone,
            "bytes": self.nbytes,
        }


class Stresser:
    """What one CPU does."""

    def __init__(self, current: Current, vcpu: Vcpu, row: TaskRow) -> None:
        self.current = current
        self.vcpu = vcpu
        self.cpu = row.cpu
        seed = current.machine.config["seed"]
        self.rng = random.Random(f"{seed}/{row.cpu}")
        self.payloads = Payloads(seed)
        self.lanes: dict[int, Lane] = {}
        self.finished: list[Lane] = []
        self.computed = 0
        self.complaints: list[str] = []
        """What was wrong with the first bad packets."""
        self._refreshed_ns = 0

    def run(self, wanted_ns: int) -> None:
        """Send for so long, then take what is still to come back."""
        end = time.monotonic_ns() + wanted_ns
        while time.monotonic_ns() < end:
            self.refresh()
            if self.lanes:
                self.act(self.rng.choice(list(self.lanes.values())))
            else:
                self.vcpu.idle(LOOK_NS)
            self.take_all()
        for lane in self.lanes.values():
            self.sends_no_more(lane)
        self.settle()
        for lane in list(self.lanes.values()):
            self.release(lane, gone=False)

    # -- channels -----------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Now and then: claim the channels that are new, let go of those that are wanted back."""
        now = time.monotonic_ns()
        if now - self._refreshed_ns < REFRESH_NS:
            return
        self._refreshed_ns = now
        self.let_go()
        held = frozenset(self.lanes)
        for cpu in range(self.current.machine.vp_count):
            for channel in claim_channels(self.current, cpu, but_not=held):
                self.lanes[channel.handle] = self.new_lane(channel, owned=cpu == self.cpu)

    def let_go(self) -> None:
        """Give back what is wanted back; MachineStopping when everything is."""
        raise_if_stopping(self.vcpu)
        for lane in list(self.lanes.values()):
            if being_removed(self.current, lane.session.channel):
                self.release(lane, gone=True)

    def new_lane(self, channel: Channel, *, owned: bool) -> Lane:
        """A channel that was claimed."""
        primary = self.current.channel(channel.primary_channel) if channel.primary_channel else channel
        device: Device = self.current.tables.devices.from_handle(primary.device_obj)
        owners, sent, received, senders = (
            state_word(self.current, device, word) for word in (OWNED, SENT, RECEIVED, SENDERS)
        )
        bit = 1 << (channel.sub_channel_index & 63)
        pages = min(channel.ring_send_pages, channel.ring_recv_pages) - 1
        limit = pages * 4096 - 8 - ring_bytes(0)
        session = EchoSession(self.current, self.vcpu, channel)
        lane = Lane(
            session, channel.handle, channel.relid, device.handle, owned, limit, bit, owners, sent, received, senders
        )
        # Announced before `act` looks for the owner, who takes his bit away before he looks for senders.
        senders.fetch_or(1 << self.cpu)
        if owned:
            # The inbox is there: from here on nothing that comes back is dropped.
            owners.fetch_or(bit)
        return lane

    def sends_no_more(self, lane: Lane) -> None:
        """Say that this CPU sends no more on the channel's device."""
        lane.senders_word.fetch_and(_ALL ^ 1 << self.cpu)

    def release(self, lane: Lane, *, gone: bool) -> None:
        """Give a channel back; what it did is kept for the report."""
        lane.gone = gone
        if lane.owned:
            lane.owned_word.fetch_and(_ALL ^ lane.owner_bit)
        self.finished.append(lane)
        del self.lanes[lane.handle]
        if all(other.device != lane.device for other in self.lanes.values()):
            self.sends_no_more(lane)
        release_channel(self.current, lane.session.channel)

    # -- what is done -------------------------------------------------------------------------------

    def act(self, lane: Lane) -> None:
        """One thing by chance: mostly a burst, now and then a computation or a rest."""
        chance = self.rng.random()
        try:
            if chance < 0.8 and lane.owned_word.load() & lane.owner_bit:
                self.burst(lane, self.rng.choice((1, 1, 2, 5, 16, MOST_BURST)))
            elif chance < 0.9:
                self.vcpu.compute(self.compute)
            else:
                self.vcpu.idle(self.rng.randrange(1, 2_000_000))
        except ChannelGone:
            self.release(lane, gone=True)

    def burst(self, lane: Lane, count: int) -> None:
        """So many packets into one ring, waiting for room as often as need be; what comes back meanwhile is taken."""
        first = lane.sequence
        came = lane.received_word.load()
        lane.session.begin()
        waiting = [self.payloads.of(self.cpu, first + n, lane.limit) for n in range(count)]
        while waiting:
            trans_id = (self.cpu + 1) << _SEQUENCE_BITS | lane.sequence
            sent = lane.session.send(waiting, first_trans_id=trans_id, flags=COMPLETION_REQUESTED)
            lane.sequence += sent
            lane.sent_word.fetch_add(sent)
            del waiting[:sent]
            if waiting:
                # Others' answers come to us only: who waits for room without taking them may wait for himself.
                self.take_all()
                # Others are wanted back meanwhile, and who wants them back waits for us: if this channel was
                # taken away, too, its rescind may stand behind that one, and the ring stays full until then.
                self.let_go()
                if lane.handle not in self.lanes:
                    return
                if (now := lane.received_word.load()) != came:
                    # The ring works, and others were quicker: a packet as long as the ring needs it empty, and
                    # may wait for that until they have ended.
                    came = now
                    lane.session.begin()

    def compute(self) -> None:
        """Plain bytecodes, which interrupts by signal interrupt."""
        total = 0
        for start in range(1, COMPUTE_STARTS):
            n = start
            while n != 1:
                n = 3 * n + 1 if n & 1 else n >> 1
                total += 1
        self.computed += total > 0

    def take_all(self) -> None:
        """Take and check what has come on our own channels."""
        for lane in list(self.lanes.values()):
            if lane.owned and lane.session.inbox:
                packets = lane.session.take()
                for packet in packets:
                    self.check(lane, packet)
                lane.received_word.fetch_add(len(packets))

    def check(self, lane: Lane, packet: Packet) -> None:
        """Each packet is the next one of its sender, a completion, and what it must be, byte for byte."""
        packet_type, _flags, trans_id, payload = packet
        sender, sequence = (trans_id >> _SEQUENCE_BITS) - 1, trans_id & (1 << _SEQUENCE_BITS) - 1
        expected = self.payloads.of(sender, sequence, lane.limit)
        wrong = ""
        if packet_type != VM_PKT_COMP:
            wrong = f"type {packet_type} instead of a completion"
        elif sequence != lane.received[sender]:
            wrong = f"number {sequence} instead of {lane.received[sender]}"
        # The wire knows lengths in eights; what is filled up is zeros.
        elif payload != expected.ljust(-(-len(expected) // 8) * 8, b"\0"):
            wrong = f"{len(payload)} bytes that differ from the {len(expected)} sent"
        if wrong:
            lane.corrupt += 1
            if len(self.complaints) < MOST_COMPLAINTS:
                self.complaints.append(f"relid {lane.relid}, packet {sequence} of cpu{sender}: {wrong}")
        lane.received[sender] = sequence + 1
        lane.nbytes += len(expected)

    def settle(self) -> None:
        """Go on taking until nobody sends any more, and all that was sent has come back."""
        now = time.monotonic_ns()
        deadline, stuck, moved = now + SETTLE_NS, now + STUCK_NS, self.moved()
        while time.monotonic_ns() < min(deadline, stuck):
            self.take_all()
            if self.moved() != moved:
                stuck, moved = time.monotonic_ns() + STUCK_NS, self.moved()
            self.let_go()
            if self.complete():
                self.give_up_owning()
                # A CPU that saw our bits before they went has announced itself before that: seen here, or it
                # finds no owner and does not send. A look before taking them away would lose its burst.
                if self.complete():
                    return
                self.own_again()
            self.vcpu.idle(LOOK_NS)

    def moved(self) -> tuple[int, ...]:
        """What changes as long as anything is sent, comes back, or ends."""
        return tuple(
            word.load()
            for lane in self.lanes.values()
            for word in (lane.sent_word, lane.received_word, lane.senders_word)
        )

    def complete(self) -> bool:
        """Whether all that was sent on our devices is back, and nobody will send more."""
        # Senders first: one that is found to have ended has counted all that it sent.
        return all(not lane.senders_word.load() for lane in self.lanes.values()) and all(
            lane.received_word.load() == lane.sent_word.load() for lane in self.lanes.values()
        )

    def give_up_owning(self) -> None:
        """Take the owner's bits away."""
        for lane in self.lanes.values():
            if lane.owned:
                lane.owned_word.fetch_and(_ALL ^ lane.owner_bit)

    def own_again(self) -> None:
        """Set them once more: somebody may still send."""
        for lane in self.lanes.values():
            if lane.owned:
                lane.owned_word.fetch_or(lane.owner_bit)


def stress(current: Current, vcpu: Vcpu, row: TaskRow) -> Tally:
    """Stress for `wanted` ns; what each channel did is one line of JSON more in the file `path`, that of all CPUs.

    `errors` counts bad packets.
    """
    stresser = Stresser(current, vcpu, row)
    tally = Tally()
    try:
        stresser.run(row.wanted)
    except Stalled as stalled:
        tally.errors += 1
        stresser.complaints.append(f"cpu{row.cpu} could not go on: {stalled}")
    for lane in list(stresser.lanes.values()):
        stresser.release(lane, gone=False)
    for lane in stresser.finished:
        tally.packets += sum(lane.received.values())
        tally.nbytes += lane.nbytes
        tally.errors += lane.corrupt
    report = {
        "cpu": row.cpu,
        "computed": stresser.computed,
        "complaints": stresser.complaints,
        "lanes": [lane.report() for lane in stresser.finished],
    }
    write_report(row.path, json.dumps(report).encode() + b"\n")
    return tally
