"""`struct hv_per_cpu_context` of this processor: its SynIC pages and its tasklets, at hand for the ISR.

The record in guest RAM says where the pages lie; this object holds the atomic words over them, made once
when the processor comes online. Other processes look at the record, never at this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from emu.ipc.atomics import AtomicU64
from emu.syncpoint import Point
from emu.tracing import E_FLAG_CLEAR
from emu.wire.synic import VMBUS_MESSAGE_SINT
from guestproc.kernel.tasklet import TaskletQueue
from guestproc.protocol.era import SHARED_INTERRUPT_VERSIONS
from guestproc.vmbus.chan_points import Find, Schedule, find_of, schedule_of
from guestproc.vmbus.event_lane import EVENT_WORDS, MOST_LANES, EventLane

if TYPE_CHECKING:
    from guestproc.current import Current
    from guestproc.kernel.layout import Channel

_AFTER_FLAG_LOAD: Final = int(Point.ISR_AFTER_FLAG_LOAD)
INT_PAGE_WORDS: Final = 4
"""256 bits of the interrupt page: no more channels are looked for below 2.4 (MAX_NUM_CHANNELS_SUPPORTED)."""


class FlagWord(Protocol):
    """64 event flags."""

    def exchange(self, value: int) -> int:
        """Take them all."""

    def fetch_and(self, value: int) -> int:
        """Keep those of `value`; what there was."""

    def fetch_or(self, value: int) -> int:
        """Add those of `value`; what there was."""


class PointedFlags:
    """A word of event flags in a machine that runs schedules, or whose ISR takes them the wrong way (races.md C2)."""

    __slots__ = ("_current", "_word")

    def __init__(self, current: Current, word: AtomicU64) -> None:
        self._current = current
        self._word = word

    def exchange(self, value: int) -> int:
        """Take the word; wrong on purpose: load it, and store behind whatever the host sets meanwhile."""
        current, atomic = self._current, self._current.fix.atomic_flag_clear
        bits = self._word.exchange(value) if atomic else self._word.load()
        if not bits:
            return 0  # the ISR exchanges its first word without a look: nothing was loaded that could be lost
        if current.armed[_AFTER_FLAG_LOAD]:
            current.reach(_AFTER_FLAG_LOAD, (bits & -bits).bit_length() - 1)
        if not atomic:
            self._word.store(value)
        return bits

    def fetch_and(self, value: int) -> int:
        """As the word itself."""
        return self._word.fetch_and(value)

    def fetch_or(self, value: int) -> int:
        """As the word itself."""
        return self._word.fetch_or(value)


class FlagPage:
    """Where channels have their flags: the words, and what looks at those behind the first of them.

    The first is all that most machines have: relids below 64.
    """

    __slots__ = ("behind", "none_behind", "words")

    def __init__(self, gpa: int, words: tuple[FlagWord, ...]) -> None:
        """`gpa`: of the first word."""
        self.words: Final = words
        self.behind: Final = slice(gpa + 8, gpa + 8 * len(words))
        self.none_behind: Final = bytes(8 * len(words) - 8)


class PerCpuContext:
    """What this processor's ISR and tasklets use."""

    def __init__(self, current: Current, tasklets: TaskletQueue) -> None:
        cpu = current.cpu_record()
        atomics = current.tables.ram.atomics
        self.tasklets: Final = tasklets
        self.msg_dpc: Final = cpu.msg_dpc
        self.slot_gpa: Final[int] = cpu.synic_message_page_gpa + VMBUS_MESSAGE_SINT * 256
        self.event_gpa: Final[int] = cpu.synic_event_page_gpa + VMBUS_MESSAGE_SINT * 256
        message_type = atomics.cell_u32(self.slot_gpa)
        self.load_message_type: Final = message_type.load
        self.cas_message_type: Final = message_type.cas
        self.load_message_flags: Final = atomics.cell_u8(self.slot_gpa + 5).load
        event_words = (atomics.cell_u64(self.event_gpa + 8 * word) for word in range(EVENT_WORDS))
        # Chosen here, once: a machine that runs no schedule has no sync point in its ISR.
        pointed = current.machine.races or not current.fix.atomic_flag_clear
        self.event_words: Final[tuple[FlagWord, ...]] = (
            tuple(PointedFlags(current, word) for word in event_words) if pointed else tuple(event_words)
        )
        self.event_flags: Final = FlagPage(self.event_gpa, self.event_words)
        """Where channels have their flags, unless they share an interrupt (`channel_flags`)."""
        self.serial_gate: Final = current.machine.control.view.cell_u64(
            current.machine.control.serial_offset(current.hooks.position, VMBUS_MESSAGE_SINT)
        ).load
        self.find: Final[Find] = find_of(current)
        self.schedule: Final[Schedule] = schedule_of(current)
        self._atomics: Final = atomics
        self._trace: Final = current.trace
        self.flag_cleared: Final = current.trace.bind_first(E_FLAG_CLEAR, VMBUS_MESSAGE_SINT) if current.trace else None
        """Records that a channel's flag was taken."""
        self._connection: Final = current.connection
        self.may_share: Final = not SHARED_INTERRUPT_VERSIONS.isdisjoint(current.era.versions)
        self._int_page_gpa = 0
        self._int_page: FlagPage | None = None
        self.buffer: Final = current.tables.ram.buffer
        self._relids: Final = current.tables.relids
        self.lanes: Final[dict[int, EventLane]] = {}
        """By handle: a record that is used anew has another one."""
        self.known: Final[dict[int, EventLane]] = {}
        """By relid: the channel that had it last, as far as it interrupted this processor."""
        self.randomness = 0

    def lane_of(self, channel: Channel) -> EventLane:
        """The lane of a channel; made at its first interrupt on this processor."""
        lane = self.lanes.get(channel.handle)
        if lane is None:
            if len(self.lanes) >= MOST_LANES:
                self.lanes.clear()  # most are of lives that are over
                self.known.clear()  # or those that live would be found there, and by their handles never again
            published = self._relids.cell(channel.relid).load
            lane = self.lanes[channel.handle] = EventLane(channel, published, self._trace)
        return lane

    def shares_interrupt(self) -> bool:
        """Whether the negotiated version has one interrupt for all channels (below 2.4)."""
        return self.may_share and self._connection.vmbus_proto_version in SHARED_INTERRUPT_VERSIONS

    def channel_flags(self) -> FlagPage | None:
        """Where this version's channels have their flags; None: there is no page (any more)."""
        if not self.may_share or not self.shares_interrupt():
            return self.event_flags
        gpa = self._connection.int_page_gpa
        if gpa != self._int_page_gpa:
            self._int_page_gpa, self._int_page = gpa, None
            if gpa:
                words = tuple(self._atomics.cell_u64(gpa + 8 * word) for word in range(INT_PAGE_WORDS))
                self._int_page = FlagPage(gpa, words)
        return self._int_page

    def add_interrupt_randomness(self) -> None:
        """The entropy hook: mixes something of each interrupt into a word nobody depends on."""
        self.randomness = (self.randomness << 1 ^ self.tasklets.runs + 1) & 0x1FFFFFFF
