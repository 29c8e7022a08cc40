"""A machine as one process sees it: its segments, its semaphores, its clock, its row in the process table.

The launcher creates all objects; every other process attaches by the machine's name. Nothing here decides
anything: it opens and maps.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any, Final

from emu.control import ActorKind, ActorRow, ActorState, Control, start_time_of
from emu.counters import Counters
from emu.errors import UserError
from emu.ipc.atomics import AtomicView
from emu.ipc.segments import Segment, object_name, refused_memory, unlink_segment, unlink_semaphore
from emu.ipc.semaphores import Wakeup
from emu.layout import (
    ABI_MAJOR,
    ABI_MINOR,
    CONNECTIONS,
    CPUID_ENTRIES,
    DOORBELLS,
    EXIT_SLOTS,
    M_ABI_MAJOR,
    M_ABI_MINOR,
    M_CONNECTIONS,
    M_CPUID,
    M_CPUID_COUNT,
    M_EXIT_SLOTS,
    M_MAGIC,
    M_RAM_BYTES,
    M_STATE,
    M_VP_COUNT,
    MAGIC,
    MAX_VPS,
    PAGE_SIZE,
    RAM_HEAD_BYTES,
    VP_INDEX,
    VP_POSITION,
    MachineState,
    vp_page_offset,
    vps_bytes,
)
from emu.syncpoint import RACE_WAKEUPS
from emu.tracing import NO_VP, TRACE_BYTES, TRACE_HEAD_BYTES, BytesRecorder, Context, Recorder

KICK_SIGNAL: Final = int(signal.SIGRTMIN) + 1
"""The real-time signal that interrupts a computing vCPU."""

SEGMENTS: Final = ("ram", "vps", "doorbells", "control", "trace")
ACTOR_WAKEUPS: Final = 24
"""Semaphores for waiting threads of the workqueue process and of harness tools."""
USER_WAKEUP: Final = 16
"""The semaphore of the guest's user space (its first thread; the others' are behind it)."""


MachinePage = tuple[int, list[int], list[tuple[int, int, int, int, int]]]
"""Bytes of RAM, VP index of each page, rows of CPUID leaves: what the machine page says."""


def wakeup_names(vp_count: int, *, races: bool = False) -> list[str]:
    """The part names of all semaphores of a machine; `races`: with those of sync points."""
    names = ["host"]
    names += [f"vp.{position}" for position in range(vp_count)]
    names += [f"exit.{position}.{slot}" for position in range(vp_count) for slot in range(EXIT_SLOTS)]
    names += [f"actor.{number}" for number in range(ACTOR_WAKEUPS)]
    return [*names, *RACE_WAKEUPS] if races else names


class Machine:
    """The shared objects of one machine, mapped into this process."""

    def __init__(self, name: str, segments: dict[str, Segment], control: Control) -> None:
        self.name = name
        self.ram = segments["ram"]
        self.vps = segments["vps"]
        self.doorbells = segments["doorbells"]
        self.trace = segments["trace"]
        self.control = control
        self.clock = control.clock
        self.config: dict[str, Any] = control.config()
        self.vps_memory = memoryview(self.vps.memory)
        # From the segment's size: what the machine page says, a guest may have changed.
        self.vp_count = self.vps.size // PAGE_SIZE - 1
        self._state = control.state_word
        self.races: bool = self.config.get("races", False)
        """Whether a director may hold its actors: processes then attach with sync points."""
        self._wakeups: dict[str, Wakeup] = {}
        self._page: MachinePage | None = None

    # -- making and attaching -----------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        name: str,
        config: dict[str, Any],
        *,
        ram_bytes: int,
        vp_indices: list[int],
        cpuid: list[tuple[int, int, int, int, int]],
    ) -> Machine:
        """Make all objects of a new machine, and hold it; what a failure half made is removed again.

        `vp_indices[position]` is the VP index of each page, `cpuid` rows are (leaf, eax, ebx, ecx, edx). RAM stays
        sparse, but for its head and `config["ram_reserved"]` (GPA, length), if there is such.
        Raises UserError when the name is taken, MissingPrerequisite when shared memory is missing or full.
        """
        vp_count = len(vp_indices)
        assert 0 < vp_count <= MAX_VPS and len(cpuid) <= CPUID_ENTRIES
        # Size, and what of it gets memory now: most of RAM and the actors' trace rings stay sparse.
        sizes: dict[str, tuple[int, Sequence[int]]] = {
            "ram": (ram_bytes, (0, RAM_HEAD_BYTES)),
            "vps": (vps_bytes(vp_count), (0, vps_bytes(vp_count))),
            "doorbells": (DOORBELLS.size, (0, DOORBELLS.size)),
            "trace": (TRACE_BYTES, (0, TRACE_HEAD_BYTES)),
        }
        made: list[Segment | Wakeup] = []
        try:
            # `control` first: it is what makes the name taken.
            control = Control.create(object_name(name, "control"), config)
            made.append(control.segment)
            control.segment.hold()
            segments = {}
            for part, (size, (first, reserved)) in sizes.items():
                segments[part] = Segment.create(object_name(name, part), size, first=first, reserved=reserved)
                made.append(segments[part])
            _reserve(segments["ram"], config.get("ram_reserved", (0, 0)))
            for part in wakeup_names(vp_count, races=config.get("races", False)):
                wakeup = Wakeup.create(object_name(name, part))
                made.append(wakeup)
                wakeup.close()
            write_machine_page(segments["vps"].view, ram_bytes, vp_indices, cpuid)
        except BaseException:
            _unmake(made)
            raise
        machine = cls(name, segments, control)
        machine._page = ram_bytes, vp_indices, cpuid
        return machine

    @property
    def ram_reserved(self) -> tuple[int, int]:
        """GPA and length of the RAM that has had memory since the launch, for the rings of the scenario's devices."""
        gpa, length = self.config.get("ram_reserved", (0, 0))
        return gpa, length

    def read_config(self) -> None:
        """Read the configuration again: its maker has stored another one."""
        self.config = self.control.config()
        self.races = self.config.get("races", False)

    def wipe(self) -> None:
        """Power off: no RAM, no interrupt, no doorbell, no token, no record is left; names and configuration are.

        For whoever made it, once every process of the machine is gone; they may then be started again.
        """
        assert self._page is not None, "a machine is reset by its maker"
        self.ram.memory.madvise(mmap.MADV_REMOVE)
        _reserve(self.ram, (0, RAM_HEAD_BYTES))
        _reserve(self.ram, self.ram_reserved)
        for segment in (self.vps, self.doorbells):
            segment.memory[:] = bytes(segment.size)
        self.trace.memory[:TRACE_HEAD_BYTES] = bytes(TRACE_HEAD_BYTES)
        self.control.wipe()
        for part in wakeup_names(self.vp_count, races=self.races):
            while self.wakeup(part).try_take():
                pass
        write_machine_page(self.vps.view, *self._page)

    @classmethod
    def attach(cls, name: str) -> Machine:
        """Attach to a machine that exists; UserError when there is none, or it is half made or half gone."""
        control = Control.attach(object_name(name, "control"))
        segments: dict[str, Segment] = {}
        try:
            if not control.made:
                raise UserError(f"machine {name} is still being made; try again")
            for part in SEGMENTS:
                if part != "control":
                    segments[part] = Segment.attach(object_name(name, part))
            view = segments["vps"].view
            # The magic is what its maker writes last.
            if view.load_u64(M_MAGIC) != MAGIC:
                raise UserError(f"machine {name} is still being made; try again")
            if (major := view.load_u16(M_ABI_MAJOR)) != ABI_MAJOR:
                raise UserError(f"machine {name} has ABI {major}, this program speaks {ABI_MAJOR}")
        except BaseException:
            for segment in segments.values():
                segment.close()
            control.close()
            raise
        return cls(name, segments, control)

    def close(self) -> None:
        """Unmap everything; names stay."""
        self.vps_memory.release()
        for wakeup in self._wakeups.values():
            wakeup.close()
        for segment in (self.ram, self.vps, self.doorbells, self.trace):
            segment.close()
        self.control.close()

    # -- state --------------------------------------------------------------------------------------

    @property
    def stopping(self) -> bool:
        """Whether the machine is to end; every loop and every long wait looks at this."""
        return self._state.load() == MachineState.STOPPING

    def set_state(self, state: MachineState) -> None:
        """Write the state word and the guests' copy of it (launcher only; STOPPING is final)."""
        self._state.store(state)
        self.vps.view.store_u32(M_STATE, state)

    @property
    def state(self) -> MachineState:
        """The state word."""
        return MachineState(self._state.load())

    def wake_everybody(self) -> None:
        """One token to every semaphore: after STOPPING, so that all sleepers look."""
        for part in wakeup_names(self.vp_count, races=self.races):
            # A name that somebody removed has no sleeper that this could reach.
            with contextlib.suppress(UserError):
                self.wakeup(part).post()

    def vp_index(self, position: int) -> int:
        """VP index of the page at `position`."""
        return self.vps.view.load_u32(vp_page_offset(position) + VP_INDEX)

    def position_of_vp(self, vp_index: int) -> int:
        """Page position of a VP index; -1 when there is no such VP."""
        for position in range(self.vp_count):
            if self.vp_index(position) == vp_index:
                return position
        return -1

    # -- semaphores ---------------------------------------------------------------------------------

    def wakeup(self, part: str) -> Wakeup:
        """The semaphore of that part name, opened once."""
        wakeup = self._wakeups.get(part)
        if wakeup is None:
            wakeup = self._wakeups[part] = Wakeup.attach(object_name(self.name, part))
        return wakeup

    def exit_wakeups(self, position: int) -> Callable[[int], Wakeup]:
        """Opens the exit semaphores of one VP page as they are needed."""
        return lambda slot: self.wakeup(f"exit.{position}.{slot}")

    # -- actors -------------------------------------------------------------------------------------

    def enlist(self, kind: ActorKind, name: str, *, cpu: int = 0) -> tuple[ActorRow, Counters]:
        """Claim a row of the process table for the calling thread."""
        row = self.control.enlist(kind, name, cpu=cpu)
        return row, self.control.counters(row.slot)

    def recorder(self, row: ActorRow, *, vp: int = NO_VP, context: int = Context.HOST) -> Recorder | None:
        """A recorder for an actor, or None when this machine does not record.

        Raises MissingPrerequisite when there is no room for the actor's ring.
        """
        if not self.control.recording:
            return None
        kind = BytesRecorder if self.control.recording_bytes else Recorder
        return kind(self.trace, row.slot, vp=vp, context=context)

    def find_actor(self, kind: ActorKind, cpu: int = 0) -> ActorRow | None:
        """The living actor of a kind (and CPU number, for vCPUs), if any."""
        for row in self.control.rows():
            if row.kind == kind and row.state == ActorState.ALIVE and (kind != ActorKind.VCPU or row.cpu == cpu):
                return row
        return None


class VpKick:
    """Kicks one VP: a token to its semaphore, or the real-time signal through a pidfd.

    The pid comes from the process table in `control`, never from memory that a guest can reach.
    """

    def __init__(self, machine: Machine, position: int, cpu: int) -> None:
        self._machine = machine
        self.position = position
        self._cpu = cpu
        self._pidfd = -1
        self._post: Callable[[], None] | None = None

    def post(self) -> None:
        """Post one token to the VP's semaphore."""
        if self._post is None:
            self._post = self._machine.wakeup(f"vp.{self.position}").post
        self._post()

    def interrupt(self) -> bool:
        """Send the kick signal to our own vCPU process; False when there is none (a foreign VP)."""
        return self._send(KICK_SIGNAL)

    def freeze(self) -> bool:
        """Let it run no further, wherever it is, until `thaw`; False when there is no such process."""
        return self._send(signal.SIGSTOP)

    def thaw(self) -> bool:
        """Let it run on."""
        return self._send(signal.SIGCONT)

    def _send(self, number: int) -> bool:
        if self._pidfd < 0:
            row = self._machine.find_actor(ActorKind.VCPU, self._cpu)
            if row is None:
                return False
            try:
                pidfd = os.pidfd_open(row.pid)
            except OSError:
                return False
            # The pid may have gone to somebody else, whom this signal would kill. Asked behind the pidfd: a
            # pid whose start time is still right cannot change hands any more unseen.
            if start_time_of(row.pid) != row.start_time:
                os.close(pidfd)
                return False
            self._pidfd = pidfd
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except OSError:
            # It is dead; the processor may get another process.
            os.close(self._pidfd)
            self._pidfd = -1
            return False
        return True


def write_machine_page(
    view: AtomicView, ram_bytes: int, vp_indices: list[int], cpuid: list[tuple[int, int, int, int, int]]
) -> None:
    """Write the machine page, but for its state, and the identity of every VP page into `vps`."""
    view.store_u16(M_ABI_MAJOR, ABI_MAJOR)
    view.store_u16(M_ABI_MINOR, ABI_MINOR)
    view.store_u64(M_RAM_BYTES, ram_bytes)
    view.store_u32(M_VP_COUNT, len(vp_indices))
    view.store_u32(M_EXIT_SLOTS, EXIT_SLOTS)
    view.store_u32(M_CONNECTIONS, CONNECTIONS)
    for entry, row in enumerate(cpuid):
        for word, value in enumerate(row):
            view.store_u32(M_CPUID + entry * 20 + word * 4, value)
    view.store_u32(M_CPUID_COUNT, len(cpuid))
    for position, vp_index in enumerate(vp_indices):
        view.store_u32(vp_page_offset(position) + VP_INDEX, vp_index)
        view.store_u32(vp_page_offset(position) + VP_POSITION, position)
    # Last: a guest that sees the magic sees the rest.
    view.store_u64(M_MAGIC, MAGIC)


def _reserve(ram: Segment, part: Sequence[int]) -> None:
    """Give a part of RAM (GPA, length; of 0 bytes: none) its memory now, or say that there is none."""
    gpa, length = part
    try:
        if length:
            ram.reserve(gpa, length)
    except OSError as error:
        raise refused_memory(ram.name, length, error) from None


def _unmake(made: list[Segment | Wakeup]) -> None:
    # Backwards, so that `control` keeps the name taken until the last moment.
    for thing in reversed(made):
        if isinstance(thing, Segment):
            thing.close()
            unlink_segment(thing.name)
        else:
            unlink_semaphore(thing.name)
