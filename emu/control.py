"""The harness's segment: configuration, process table, clock, counters, serials, tasks, the host's mirror, faults.

No guest reaches `control`. The launcher makes it and writes the process table's states of life; each actor
writes its own row and its own counters; the host writes the mirror. What each part is for stands at its
offset below; sizes are in bytes.
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import msgpack

from emu.counters import COUNTED_BY_BOTH, COUNTER_ROW, COUNTERS, Counters
from emu.ipc.atomics import AtomicU32, AtomicU64, AtomicView
from emu.ipc.clock import MachineClock
from emu.ipc.rows import load_row, store_row
from emu.ipc.segments import Segment
from emu.values import valueclass

CONTROL_MAGIC: Final = int.from_bytes(b"VMBUSCTL", "little")
ACTORS: Final = 160
ACTOR_ROW: Final = 128
COUNTER_WORDS: Final = 32
TASKS: Final = 64
TASK_ROW: Final = 512
MIRROR_CHANNELS: Final = 2_048
MIRROR_CHANNEL_ROW: Final = 64
MIRROR_HEAD: Final = 1_024
CONFIG_BYTES: Final = 1 << 18
MAP_GRANULARITY: Final = 1 << 16
REFUSALS_BYTES: Final = 1 << 16
ORDER_SLOTS: Final = 16
ORDER_BYTES: Final = 1 << 14
HOST_TABLES_BYTES: Final = 768 << 10
POINT_BYTES: Final = 64
POINT_TICKETS: Final = 32
TICKET_BYTES: Final = 64
FAULT_ROWS: Final = 64
FAULT_ROW: Final = 256
LOG_BYTES: Final = 1 << 14
LINE_BEGIN: Final = 512
LINE_END: Final = 2_048
"""Characters that are kept of a longer line of the log, such as a traceback: both together always have room."""
ORDER_TEXT_BYTES: Final = ORDER_BYTES - 64
"""What a letter may say; the rest of its slot is its head (see `emu.orders`)."""

_HEAD: Final = 0
_CLOCK: Final = 256
_ACTORS: Final = 4_096
_COUNTERS: Final = _ACTORS + ACTORS * ACTOR_ROW
_SERIALS: Final = _COUNTERS + ACTORS * COUNTER_WORDS * 8
_TASKS: Final = _SERIALS + 64 * 16 * 8
_MIRROR: Final = _TASKS + TASKS * TASK_ROW
_MIRROR_CHANNELS: Final = _MIRROR + MIRROR_HEAD
_REFUSALS: Final = _MIRROR_CHANNELS + MIRROR_CHANNELS * MIRROR_CHANNEL_ROW
_CONFIG: Final = _REFUSALS + REFUSALS_BYTES
_ORDERS: Final = _CONFIG + CONFIG_BYTES
_ORDER_BELLS: Final = _ORDERS + ORDER_SLOTS * ORDER_BYTES
_HOST_TABLES: Final = _ORDER_BELLS + 4096
# On pages of its own, whatever size the computer's have: who comes to points maps it once more (`armed`).
_POINTS: Final = -(-(_HOST_TABLES + HOST_TABLES_BYTES) // MAP_GRANULARITY) * MAP_GRANULARITY
_TICKETS: Final = _POINTS + 128
_FAULTS: Final = _TICKETS + POINT_TICKETS * TICKET_BYTES
_LOG: Final = _FAULTS + 64 + FAULT_ROWS * FAULT_ROW
CONTROL_BYTES: Final = _LOG + LOG_BYTES

_MOST_LOOKS: Final = 20_000
"""How often a reader looks again for a writer that is just writing, before it takes that one for dead."""

# Words of the head, after the magic (u64 at 0).
_CONFIG_LENGTH: Final = 8
_READY: Final = 16
_RECORDING: Final = 20
_TASKS_ORDERED: Final = 24
"""How many programs were ever put on the task board (u64)."""
_SHUTDOWN: Final = 32
_SHUTDOWN_DONE: Final = 36
_LEAKED: Final = 40
_FORMATTED: Final = 56
_STAGE_NS: Final = 64
"""Machine time of each stage of `Ready`, a u64 each."""
_STATE: Final = 44
_WATCHED_UNTIL: Final = 112
_HOST_WAKES_NS: Final = 232
"""When the host's halt ends by itself (u64 machine ns); written where somebody has to know."""

_BLOCKED: Final = 120
"""In an actor's row, behind what is copied as one: an `emu.blocked.Blocked` (u32), the actor's own."""


class ActorState(IntEnum):
    """Life of a row in the process table; only the launcher writes DEAD."""

    FREE = 0
    STARTING = 1
    ALIVE = 2
    DEAD = 3


class ActorKind(IntEnum):
    """What sort of process or thread a row stands for."""

    NONE = 0
    LAUNCHER = 1
    ZYGOTE = 2
    SWEEPER = 3
    HYPERVISOR = 4
    VCPU = 5
    WORKQUEUE = 6
    WORKER = 7
    FOREIGN = 8
    TASK = 9  # one of several tasks of a vCPU, in its process and its thread


class Ready(IntEnum):
    """How far the machine has come; each stage is reached once and never left by a guest."""

    MADE = 0
    HOST_RUNS = 1
    CONNECTED = 2
    OFFERS_DELIVERED = 3
    CHANNELS_OPEN = 4


_ROW: Final = struct.Struct("<IIIIIIQ40s")
"""state, generation, pid, kind, cpu, exit status, start time (clock ticks since boot), name."""
_BEHIND_STATE: Final = struct.Struct("<IIIIIQ40s")

_COUNTER_INDEX: Final = {name: index for index, name in enumerate(COUNTERS)}


_STAT_BYTES: Final = 4096
_FLAGS: Final = 6
"""Where it has the kernel's flags of the first thread, counted from the state."""
_PF_EXITING: Final = 4
_THREADS: Final = 17
"""And how many threads there are."""


def start_time_of(pid: int) -> int:
    """When a process started, in clock ticks since boot (0 when it is gone): tells a reused pid apart."""
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def is_over(pid: int) -> bool:
    """Whether nothing is left of a process, or only what its parent has not asked for yet."""
    fields = _stat(pid)
    # A zombie is the first thread; others of the process may still run for a moment.
    return len(fields) <= _THREADS or (fields[0] in (b"Z", b"X") and int(fields[_THREADS]) <= 1)


def is_ending(pid: int) -> bool:
    """Whether a process will run no more of its own code: it is over, on its way out, or SIGKILL waits for it."""
    # First, as who leaves has been killed before. The process's signals, as a thread takes its own off early.
    killed = _pending(pid) & 1 << signal.SIGKILL - 1
    fields = _stat(pid)
    return bool(killed) or len(fields) <= _FLAGS or fields[0] in (b"Z", b"X") or bool(int(fields[_FLAGS]) & _PF_EXITING)


def _pending(pid: int) -> int:
    """Signals that wait for a process as a whole, one bit each from 1 on; none when it is gone."""
    try:
        with Path("/proc", str(pid), "status").open("rb") as status:
            return next((int(line.split()[1], 16) for line in status if line.startswith(b"ShdPnd:")), 0)
    except OSError:
        return 0


def _shortened(line: str) -> str:
    """The line; of a very long one its begin and its end, which of a traceback say where and what."""
    return line if len(line) <= LINE_BEGIN + LINE_END else f"{line[:LINE_BEGIN]} … {line[-LINE_END:]}"


def is_asleep(pid: int) -> bool:
    """Whether a process's first thread sleeps in the kernel: one that only waits for a core does not."""
    return _stat(pid)[:1] == [b"S"]


def _stat(pid: int) -> list[bytes]:
    """What follows the name in `/proc/PID/stat`: state, parent and so on; empty when it is gone."""
    # By system calls alone: each inner process asks, and Python's file objects would un-share 50 kB in each.
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:
        return []
    try:
        return os.read(descriptor, _STAT_BYTES).rsplit(b")", 1)[-1].split()
    except OSError:
        return []
    finally:
        os.close(descriptor)


@valueclass()
class ActorRow:
    """One row of the process table, copied out.

    `cpu`: of a vCPU its number, of a worker that of its semaphore (`actor.N`); otherwise 0.
    """

    slot: int
    state: ActorState
    generation: int
    pid: int
    kind: ActorKind
    cpu: int
    status: int
    start_time: int
    name: str

    @property
    def number(self) -> int:
        """The actor number that locks and waiters carry: generation over slot, never 0."""
        return actor_number(self.slot, self.generation)


def actor_number(slot: int, generation: int) -> int:
    """Actor number (u32) of a slot (12 bits) in a generation (20 bits, from 1, so never 0)."""
    return (generation & 0xFFFFF) << 12 | slot


def slot_of(number: int) -> int:
    """Slot in the process table of an actor number."""
    return number & 0xFFF


_RECORD, _RECORD_BYTES = 1, 2
"""Bits of the recording word."""


def _packed(config: dict[str, Any]) -> bytes:
    """A configuration as it is stored."""
    blob: bytes = msgpack.packb(config)
    assert len(blob) <= CONFIG_BYTES, f"configuration of {len(blob)} bytes"
    return blob


class Control:
    """Typed access to the `control` segment."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.memory = segment.memory
        self.view: AtomicView = segment.view
        self.clock = MachineClock(self.view, _CLOCK)
        self._ready = self.view.cell_u32(_READY)
        self._recording = self.view.cell_u32(_RECORDING)
        self.state_word = self.view.cell_u32(_STATE)
        """A MachineState that no guest can write; the machine page holds a copy for guests to read."""

    @classmethod
    def create(cls, name: str, config: dict[str, Any]) -> Control:
        """Make the segment and store the configuration (a msgpack map of at most 256 KiB)."""
        blob = _packed(config)  # before anything is made
        control = cls(Segment.create(name, CONTROL_BYTES, reserved=CONTROL_BYTES))
        control._store_config(blob)
        control.clock.start()
        control.view.store_u64(_HEAD, CONTROL_MAGIC)
        return control

    def store_config(self, config: dict[str, Any]) -> None:
        """Store the configuration; of a machine that is there already only while nobody is in it."""
        self._store_config(_packed(config))

    def _store_config(self, blob: bytes) -> None:
        self.memory[_CONFIG : _CONFIG + len(blob)] = blob
        self.view.store_u64(_CONFIG_LENGTH, len(blob))

    def wipe(self) -> None:
        """As new, but for the configuration, what to record, and the launcher's and the zygote's rows: nobody else is
        there any more (the launcher, when it resets the machine)."""
        kept = [(_HEAD, 8), (_CONFIG_LENGTH, 8), (_RECORDING, 4), (_CONFIG, CONFIG_BYTES)]
        kept += [
            (self._row_offset(row.slot), ACTOR_ROW)
            for row in self.rows()
            if row.kind in (ActorKind.LAUNCHER, ActorKind.ZYGOTE)
        ]
        # What is kept is never written, not even for a moment: the zygote may be reading the configuration now.
        start = 0
        for at, size in [*sorted(kept), (CONTROL_BYTES, 0)]:
            self.memory[start:at] = bytes(at - start)
            start = at + size
        self.clock.start()

    @classmethod
    def attach(cls, name: str) -> Control:
        """Attach to the segment of a running machine."""
        return cls(Segment.attach(name))

    @property
    def made(self) -> bool:
        """Whether the launcher has finished making this segment."""
        return self.view.load_u64(_HEAD) == CONTROL_MAGIC

    def config(self) -> dict[str, Any]:
        """The machine's configuration as the launcher stored it."""
        length = self.view.load_u64(_CONFIG_LENGTH)
        value: dict[str, Any] = msgpack.unpackb(self.memory[_CONFIG : _CONFIG + length])
        return value

    def close(self) -> None:
        """Unmap."""
        self.segment.close()

    # -- progress ---------------------------------------------------------------------------------

    @property
    def ready(self) -> Ready:
        """How far the machine has come."""
        return Ready(self._ready.load())

    def reach(self, stage: Ready) -> None:
        """Note that a stage is reached (stages only rise; every writer reaches them in order)."""
        current = self._ready.load()
        while current < stage:
            # The time before the stage: whoever sees the stage reads when.
            self.view.store_u64(_STAGE_NS + 8 * stage, self.clock.now())
            if (previous := self._ready.cas(current, stage)) == current:
                return
            current = previous

    def stage_ns(self, stage: Ready) -> int:
        """Machine time at which a stage was reached; 0 before."""
        return self.view.load_u64(_STAGE_NS + 8 * stage)

    @property
    def booted_ns(self) -> int:
        """Machine time when all channels were open; 0 before."""
        return self.stage_ns(Ready.CHANNELS_OPEN)

    @property
    def recording(self) -> bool:
        """Whether processes shall record from the moment they attach."""
        return self._recording.load() != 0

    @property
    def recording_bytes(self) -> bool:
        """Whether they shall also keep the bytes of messages and of what rings publish."""
        return self._recording.load() & _RECORD_BYTES != 0

    def set_recording(self, *, with_bytes: bool = False) -> None:
        """Ask every process that attaches from now on to record."""
        self._recording.store(_RECORD | (_RECORD_BYTES if with_bytes else 0))

    @property
    def guest_formatted(self) -> bool:
        """Whether the boot CPU has laid guest RAM out, so that others may attach to it."""
        return self.view.load_u32(_FORMATTED) != 0

    def set_guest_formatted(self) -> None:
        """The boot CPU's word that RAM is laid out."""
        self.view.store_u32(_FORMATTED, 1)

    def watch_for(self, duration_ns: int) -> None:
        """Ask the host to publish its channels' traffic for so long: somebody looks at it."""
        self.view.store_u64(_WATCHED_UNTIL, self.clock.now() + duration_ns)

    @property
    def watched(self) -> bool:
        """Whether somebody looks at the traffic now."""
        return self.view.load_u64(_WATCHED_UNTIL) > self.clock.now()

    # -- shutting the guest down ------------------------------------------------------------------

    def request_shutdown(self) -> None:
        """Ask the guest to remove its devices and unload (the launcher; like a power button)."""
        self.view.store_u32(_SHUTDOWN, 1)

    @property
    def shutdown_requested(self) -> bool:
        """Whether the guest is to shut down."""
        return self.view.load_u32(_SHUTDOWN) != 0

    def shutdown_complete(self, leaked: int) -> None:
        """The guest's word that it unloaded, and how many pages, records or relids it could not give back."""
        self.view.store_u32(_LEAKED, leaked)
        self.view.store_u32(_SHUTDOWN_DONE, 1)

    @property
    def shutdown_done(self) -> bool:
        """Whether the guest has unloaded."""
        return self.view.load_u32(_SHUTDOWN_DONE) != 0

    @property
    def leaked(self) -> int:
        """What the guest could not give back; 0 before it has unloaded."""
        return self.view.load_u32(_LEAKED)

    def forget_guest(self) -> None:
        """The guest is gone and another one will boot: nothing of its progress holds (the launcher)."""
        for word in (_SHUTDOWN, _SHUTDOWN_DONE, _LEAKED, _FORMATTED):
            self.view.store_u32(word, 0)
        self._ready.store(Ready.HOST_RUNS)

    # -- process table ----------------------------------------------------------------------------

    def _row_offset(self, slot: int) -> int:
        return _ACTORS + slot * ACTOR_ROW

    def row(self, slot: int) -> ActorRow:
        """Copy one row out."""
        state, generation, pid, kind, cpu, status, start, name = load_row(self.memory, self._row_offset(slot), _ROW)
        # A name cut at 40 bytes, or copied while it is being written, may end in half a character.
        text = name.rstrip(b"\0").decode(errors="replace")
        return ActorRow(slot, ActorState(state), generation, pid, ActorKind(kind), cpu, status, start, text)

    def rows(self) -> Iterator[ActorRow]:
        """All rows in use, dead ones included."""
        for slot in range(ACTORS):
            if self.view.load_u32(self._row_offset(slot)) != ActorState.FREE:
                yield self.row(slot)

    def enlist(self, kind: ActorKind, name: str, *, cpu: int = 0, pid: int | None = None) -> ActorRow:
        """Claim a free row for the calling thread, or for `pid`; AssertionError when all 160 are taken."""
        return self.arrive(self.claim(kind, name, cpu=cpu), os.getpid() if pid is None else pid)

    def claim(self, kind: ActorKind, name: str, *, cpu: int = 0) -> ActorRow:
        """A row for a process that is still to come: it has its number, and is STARTING until it arrives."""
        for slot in range(ACTORS):
            at = self._row_offset(slot)
            if self.view.cas_u32(at, ActorState.FREE, ActorState.STARTING) != ActorState.FREE:
                continue
            generation = self.view.load_u32(at + 4) + 1
            store_row(self.memory, at + 4, _BEHIND_STATE, generation, 0, kind, cpu, 0, 0, name.encode()[:40])
            return self.row(slot)
        raise AssertionError(f"process table full: no row for {name}")

    def arrive(self, row: ActorRow, pid: int) -> ActorRow:
        """The process of a claimed row is there."""
        at, text = self._row_offset(row.slot), row.name.encode()[:40]
        start_time = start_time_of(pid)
        store_row(self.memory, at + 4, _BEHIND_STATE, row.generation, pid, row.kind, row.cpu, 0, start_time, text)
        # Last, when the row is whole. Until here it was STARTING, for one that is FREE could be claimed again.
        self.view.store_u32(at, ActorState.ALIVE)
        return self.row(row.slot)

    def blocked_word(self, slot: int) -> AtomicU32:
        """Whether the actor in `slot` is inside a wait; 0 for those who do not say (see `emu.blocked`)."""
        return self.view.cell_u32(self._row_offset(slot) + _BLOCKED)

    @property
    def host_wakes_ns(self) -> AtomicU64:
        """Machine time at which the host's present halt ends by itself."""
        return self.view.cell_u64(_HOST_WAKES_NS)

    def set_dead(self, slot: int, status: int) -> None:
        """The launcher's word that an actor is gone; `status` is its wait status."""
        at = self._row_offset(slot)
        self.view.store_u32(at + 20, status & 0xFFFFFFFF)
        self.view.store_u32(at, ActorState.DEAD)

    def is_dead(self, number: int) -> bool:
        """Whether the launcher wrote this actor off, or its row has gone to a later generation.

        A number that no row ever had (it may come from guest RAM) is dead.
        """
        if slot_of(number) >= ACTORS:
            return True
        at = self._row_offset(slot_of(number))
        generation = self.view.load_u32(at + 4)
        return self.view.load_u32(at) == ActorState.DEAD or (generation & 0xFFFFF) != number >> 12

    def name_of(self, number: int) -> str:
        """The name of an actor for a report."""
        if number >> 12 == 0 or slot_of(number) >= ACTORS:
            return f"nobody ({number:#x})"
        return self.row(slot_of(number)).name

    # -- counters ---------------------------------------------------------------------------------

    def counters(self, slot: int) -> Counters:
        """The counters of the actor in `slot`, for that actor alone to write."""
        return Counters(self.memory, _COUNTERS + slot * COUNTER_WORDS * 8)

    def counter_values(self, slot: int) -> dict[str, int]:
        """What an actor has published so far."""
        values = load_row(self.memory, _COUNTERS + slot * COUNTER_WORDS * 8, COUNTER_ROW)
        return dict(zip(COUNTERS, values, strict=True))

    def counter_totals(self) -> dict[str, int]:
        """Sums over all actors that ever were in this machine; what both ends count, once."""
        totals = dict.fromkeys(COUNTERS, 0)
        for row in self.rows():
            for name, value in self.counter_values(row.slot).items():
                if row.kind is ActorKind.HYPERVISOR or name not in COUNTED_BY_BOTH:
                    totals[name] += value
        return totals

    # -- serials ----------------------------------------------------------------------------------

    def serial_offset(self, position: int, sint: int) -> int:
        """Where the serial of the message in a slot stands: written before the type, read with the copy."""
        return _SERIALS + (position * 16 + sint) * 8

    # -- guest tasks ------------------------------------------------------------------------------

    @property
    def tasks_ordered(self) -> AtomicU64:
        """How many programs were ever ordered: whoever finds none waiting need not look again before it rises."""
        return self.view.cell_u64(_TASKS_ORDERED)

    def task_offset(self, index: int) -> int:
        """Where the board's row for guest task `index` begins (see `emu.task_board`)."""
        return _TASKS + index * TASK_ROW

    # -- orders -----------------------------------------------------------------------------------

    def order_offset(self, slot: int) -> int:
        """Where an order's slot begins (see `emu.orders`)."""
        return _ORDERS + slot * ORDER_BYTES

    def order_bell_offset(self, recipient: int) -> int:
        """Where the bell of a recipient of orders stands, on a cache line of its own."""
        return _ORDER_BELLS + 64 * recipient

    # -- sync points ------------------------------------------------------------------------------

    @property
    def armed_offset(self) -> int:
        """Where the bytes of armed points begin (see `emu.syncpoint`)."""
        return _POINTS

    @property
    def points_bell_offset(self) -> int:
        """The word by which a director tells the host that one of its parked tasks may go on."""
        return _POINTS + POINT_BYTES

    @property
    def tickets_offset(self) -> int:
        """Where the tickets of a director begin."""
        return _TICKETS

    # -- faults -----------------------------------------------------------------------------------

    @property
    def faults_offset(self) -> int:
        """Where the fault plan begins (see `emu.fault_plan`)."""
        return _FAULTS

    # -- the host's mirror ------------------------------------------------------------------------

    @property
    def mirror_offset(self) -> int:
        """Where the mirror's head begins (see `emu.mirror`)."""
        return _MIRROR

    def mirror_channel_offset(self, relid: int) -> int:
        """Where the mirror's row for `relid` begins."""
        return _MIRROR_CHANNELS + relid * MIRROR_CHANNEL_ROW

    @property
    def host_tables_offset(self) -> int:
        """Where registers, GPADLs and ports of the host are mirrored (see `emu.host_tables`)."""
        return _HOST_TABLES

    def store_refusals(
        self, refusals: dict[str, int], last: list[dict[str, Any]], ignored: dict[str, int] | None = None
    ) -> None:
        """Publish what the host refused, what was legal and led to nothing, and the newest records (host only)."""
        ignored = ignored or {}
        # `str` for a value of more than 64 bits: what a peer broke a rule with may be anything.
        blob = msgpack.packb([refusals, last, ignored], default=str)
        if len(blob) > REFUSALS_BYTES - 8:
            blob = msgpack.packb([refusals, [], ignored])
        if len(blob) <= REFUSALS_BYTES - 8:
            self._store_blob(_REFUSALS, blob)

    def _store_blob(self, at: int, blob: bytes) -> None:
        """Its length (u32), a word that is odd while it is being written, the bytes."""
        self.view.fetch_add_u32(at + 4, 1)
        self.memory[at + 8 : at + 8 + len(blob)] = blob
        self.view.store_u32(at, len(blob))
        self.view.fetch_add_u32(at + 4, 1)

    def _load_blob(self, at: int) -> bytes:
        """What was stored last; nothing, if who wrote it died meanwhile."""
        for _ in range(_MOST_LOOKS):
            change = self.view.load_u32(at + 4)
            blob = bytes(self.memory[at + 8 : at + 8 + self.view.load_u32(at)])
            if not change & 1 and self.view.load_u32(at + 4) == change:
                return blob
            os.sched_yield()
        return b""

    def refusals(self) -> tuple[dict[str, int], list[dict[str, Any]]]:
        """What the host refused so far: counts by rule, and the newest kinds in full, each with its count."""
        counts, last, _ignored = self._refusals()
        return counts, last

    def ignored(self) -> dict[str, int]:
        """What was legal and led to nothing (it crossed something of the host's), by rule."""
        return self._refusals()[2]

    def _refusals(self) -> tuple[dict[str, int], list[dict[str, Any]], dict[str, int]]:
        blob = self._load_blob(_REFUSALS)
        counts, last, ignored = msgpack.unpackb(blob) if blob else ({}, [], {})
        return counts, last, ignored

    # -- the machine's log ------------------------------------------------------------------------

    def store_log(self, lines: Sequence[str]) -> None:
        """Publish the newest lines of the machine's log, as many as there is room for (the launcher: it hears them)."""
        kept: list[str] = []
        # Of msgpack: 5 bytes before the list and before each line, at most.
        left = LOG_BYTES - 8 - 5
        for line in map(_shortened, reversed(lines)):
            left -= len(line.encode()) + 5
            if left < 0:
                break
            kept.append(line)
        self._store_blob(_LOG, msgpack.packb(kept[::-1]))

    def log(self) -> list[str]:
        """The newest lines of the machine's log, the oldest first."""
        blob = self._load_blob(_LOG)
        return msgpack.unpackb(blob) if blob else []
