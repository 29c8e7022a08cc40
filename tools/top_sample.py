"""What `top` shows of a machine: two looks at its counts, and the rates between them.

A `Look` is what the counts were at one moment; `rows_between` makes a `Frame` of two of them. Everything comes from
shared memory and /proc: the guest's records, the host's mirror and traffic (which the host publishes while we say
that we look), the process table's counters. A count that fell began anew: then it is the rate by itself.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import psutil

from emu.control import ActorKind, ActorState
from emu.host_tables import HostTables, Traffic
from emu.layout import VP_RUN_STATE, RunState, vp_page_offset
from emu.machine import Machine
from emu.mirror import Mirror, MirrorChannel, MirrorHead
from emu.wire.device_classes import class_of
from guestproc.kernel.layout import Channel
from guestproc.kernel.layout import ChannelState as GuestState
from guestproc.kernel.rqstor import Requestor
from guestproc.view import INBOUND, OUTBOUND, GuestView, RingFigures
from hostproc.protocol.states import ChannelState
from tools.profile_samples import KINDS, Watched
from tools.state_tree import StateTree

WATCH_NS: Final = 5_000_000_000
"""For so long after a look the host goes on publishing traffic."""
PUBLISHED_S: Final = 2.0
"""The host notices within a second that somebody looks; longer only when it is starved or dead."""
PUBLISHED_POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class ChannelLook:
    """One channel: `out` and `inward` are the guest's rings, None while it has none that we may read."""

    relid: int
    class_name: str
    cpu: int
    state: str
    traffic: Traffic
    interrupts: int
    doorbells: int
    out: RingFigures | None = None
    inward: RingFigures | None = None
    unanswered: int = 0
    oldest_ns: int = 0


@dataclass(frozen=True, slots=True)
class VpLook:
    """One processor: `callbacks` counts vector 0xF3, `counters` are its process's (empty of a foreign guest's)."""

    index: int
    cpu: int
    run_state: str
    callbacks: int
    counters: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ProcessLook:
    """One process: `cpu_share` of a core since the last look, `pss` in bytes, `switches` of both kinds so far."""

    name: str
    pid: int
    cpu_share: float
    pss: int
    switches: int


@dataclass(frozen=True, slots=True)
class Look:
    """All counts of a machine at `at_s` (monotonic seconds)."""

    at_s: float
    head: MirrorHead
    channels: tuple[ChannelLook, ...]
    vps: tuple[VpLook, ...]
    processes: tuple[ProcessLook, ...]
    totals: Mapping[str, int] = field(default_factory=dict)
    traffic_ns: int | None = None
    """When the host published the channels' traffic; 0: not since we look; None: at this moment."""


class Sampler:
    """Looks at one machine, again and again."""

    def __init__(self, machine: Machine) -> None:
        self._machine: Final = machine
        self._control: Final = machine.control
        self._mirror: Final = Mirror(machine.control)
        self._tables: Final = HostTables(machine.control)
        self._view: GuestView | None = None
        self._watched: dict[tuple[str, int], Watched] = {}
        self._first_seen: dict[tuple[int, int, int], int] = {}
        """When an unanswered packet was first seen, in machine ns: by (channel's handle, id, address), and where nobody
        reads by (channel's handle, -1, read_index)."""
        # What was published before anybody looked is old: a rate from it would be that of a whole life.
        self._since_ns = 0 if machine.control.watched else machine.clock.now()

    def look(self) -> Look:
        """Every count now; the host publishes traffic for the next seconds."""
        self._control.watch_for(WATCH_NS)
        published_ns = self._tables.traffic_ns
        if self._view is None:
            # A guest may boot after we began.
            self._view = StateTree(self._machine).guest
        return Look(
            time.monotonic(),
            self._mirror.head(),
            tuple(self._channels()),
            tuple(self._vp(position) for position in range(self._machine.vp_count)),
            tuple(self._processes()),
            self._control.counter_totals(),
            published_ns if published_ns >= self._since_ns else 0,
        )

    def look_published(self, later_than_ns: int = 0) -> Look:
        """A look at traffic that the host published while we look, and later than that; an older one after a while."""
        self._control.watch_for(WATCH_NS)
        end_s = time.monotonic() + PUBLISHED_S
        while self._tables.traffic_ns <= max(later_than_ns, self._since_ns - 1) and time.monotonic() < end_s:
            time.sleep(PUBLISHED_POLL_S)
        return self.look()

    # -- channels ------------------------------------------------------------------------------------

    def _channels(self) -> list[ChannelLook]:
        hosts = {channel.relid: channel for channel in self._mirror.channels()}
        guests: dict[int, Channel] = {}
        requests: dict[int, int] = {}
        if self._view is not None:
            with contextlib.suppress(AssertionError):  # records went meanwhile: the rest comes with the next look
                guests = {channel.relid: channel for channel in self._view.tables.channels.live()}
                for request in self._view.tables.requests.live():
                    since = requests.get(request.child_relid, request.entered_ns)
                    requests[request.child_relid] = min(since, request.entered_ns)
        found, seen = [], {}
        for relid in sorted(hosts.keys() | guests.keys()):
            guest, host = guests.get(relid), hosts.get(relid)
            with contextlib.suppress(AssertionError):
                if guest is not None:
                    unanswered, unread = self._unanswered(guest), self._unread(guest)
                    seen.update(unanswered | unread)
                    # What the host had no time for yet is under way; what lay there at the last look waits.
                    unanswered |= {key: since for key, since in unread.items() if key in self._first_seen}
                    oldest = [since for since in (requests.get(relid), *unanswered.values()) if since]
                    waiting = len(unanswered) + (relid in requests)
                    found.append(self._guest_channel(guest, host, waiting, min(oldest, default=0)))
                    continue
            if host is not None:
                found.append(self._host_channel(host))
        self._first_seen = seen
        return found

    def _guest_channel(self, guest: Channel, host: MirrorChannel | None, waiting: int, since: int) -> ChannelLook:
        assert self._view is not None
        state = guest.state.load()
        known = class_of(_uuid(guest.if_type))
        return ChannelLook(
            guest.relid,
            known.name if known else "unknown",
            guest.target_cpu.load(),
            GuestState(state).name.removesuffix("_STATE").lower() if state in set(GuestState) else f"?{state}",
            self._tables.traffic(guest.relid) if host is not None else Traffic(0, 0, 0),
            guest.interrupts,
            guest.sig_events.load(),
            self._view.ring(guest, OUTBOUND),
            self._view.ring(guest, INBOUND),
            waiting,
            max(0, self._machine.clock.now() - since) if since else 0,
        )

    def _host_channel(self, host: MirrorChannel) -> ChannelLook:
        known = class_of(host.if_type)
        traffic = self._tables.traffic(host.relid)
        state = ChannelState(host.state).name.lower() if host.state in set(ChannelState) else f"?{host.state}"
        vp = host.target_vp if host.target_vp != 0xFFFFFFFF else 0
        return ChannelLook(host.relid, known.name if known else "unknown", vp, state, traffic, traffic.signals, 0)

    def _unanswered(self, channel: Channel) -> dict[tuple[int, int, int], int]:
        """Ids of a channel's requestor that are out, and when each was first seen so; none without a requestor."""
        assert self._view is not None
        ram, gpa, size = self._view.tables.ram, channel.rqstor_gpa, channel.rqstor_size
        if not gpa or not size or gpa + Requestor.footprint(size) > ram.size:
            return {}
        now = self._machine.clock.now()
        ids = ((channel.handle, number, address) for number, address in Requestor(ram, gpa, size).out().items())
        return {key: self._first_seen.get(key, now) for key in ids}

    def _unread(self, channel: Channel) -> dict[tuple[int, int, int], int]:
        """The packet at which the host's reader stands, if there is one, and when it was first seen there."""
        assert self._view is not None
        ring = self._view.ring(channel, OUTBOUND)
        if ring is None or ring.read_index == ring.write_index:
            return {}
        key = (channel.handle, -1, ring.read_index)
        return {key: self._first_seen.get(key, self._machine.clock.now())}

    # -- processors and processes --------------------------------------------------------------------

    def _vp(self, position: int) -> VpLook:
        positions = self._machine.config.get("cpu_positions", list(range(self._machine.vp_count)))
        cpu = positions.index(position)
        run_state = self._machine.vps.view.load_u32(vp_page_offset(position) + VP_RUN_STATE)
        row = self._machine.find_actor(ActorKind.VCPU, cpu)
        callbacks = 0
        if self._view is not None and cpu < self._view.tables.layout.ncpus:
            callbacks = self._view.tables.cpus.at(cpu).irq_hv_callback_count
        return VpLook(
            self._machine.vp_index(position),
            cpu,
            RunState(run_state).name if run_state in set(RunState) else f"?{run_state}",
            callbacks,
            {} if row is None else self._control.counter_values(row.slot),
        )

    def _processes(self) -> list[ProcessLook]:
        found, now_s = [], time.monotonic()
        for row in self._control.rows():
            if row.state != ActorState.ALIVE or row.kind not in KINDS:
                continue
            key = row.name, row.pid
            with contextlib.suppress(psutil.Error, OSError):
                if key not in self._watched:
                    self._watched[key] = Watched(row.name, KINDS[row.kind], row.pid, now_s, from_birth=False)
                watched = self._watched[key]
                watched.sample(now_s)
                cost = watched.cost
                share = cost.timeline[-1][2] if cost.timeline else 0.0
                cost.timeline.clear()
                switches = cost.voluntary + cost.involuntary
                found.append(ProcessLook(row.name, row.pid, share, cost.pss, switches))
        return found


def _uuid(guid: bytes) -> Any:
    from uuid import UUID

    return UUID(bytes_le=guid)


# -- rates -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChannelRow:
    """A channel as it is shown: rates a second, fill as a share of the ring, None without one."""

    relid: int
    class_name: str
    cpu: int
    state: str
    out_fill: float | None
    in_fill: float | None
    packets: float
    bytes_in: float
    interrupts: float
    mask: str
    unanswered: int
    oldest_s: float


@dataclass(frozen=True, slots=True)
class VpRow:
    """A processor as it is shown: rates a second, interrupts by vector."""

    index: int
    cpu: int
    run_state: str
    vectors: Mapping[str, float]
    halts: float
    polls_paid: float
    polls_vain: float


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """A process as it is shown: percent of a core, PSS in bytes, switches a second."""

    name: str
    pid: int
    cpu_percent: float
    pss: int
    switches: float


@dataclass(frozen=True, slots=True)
class Frame:
    """What one refresh shows."""

    seconds: float
    head: MirrorHead
    channels: list[ChannelRow]
    vps: list[VpRow]
    processes: list[ProcessRow]
    packets: float
    """A second, of the guest's end of all channels; published when a processor halts."""


def rows_between(before: Look, after: Look) -> Frame:
    """Rates between two looks at a machine."""
    seconds = max(after.at_s - before.at_s, 1e-9)
    traffic_s = _traffic_seconds(before, after, seconds)
    channels = {one.relid: one for one in before.channels}
    vps = {one.index: one for one in before.vps}
    processes = {(one.name, one.pid): one for one in before.processes}
    return Frame(
        seconds,
        after.head,
        [_channel_row(channels.get(one.relid), one, seconds, traffic_s) for one in after.channels],
        [_vp_row(vps.get(one.index), one, seconds) for one in after.vps],
        [_process_row(processes.get((one.name, one.pid)), one, seconds) for one in after.processes],
        _rate(before.totals.get("packets", 0), after.totals.get("packets", 0), seconds),
    )


def _rate(before: int, after: int, seconds: float) -> float:
    return (after - before if after >= before else after) / seconds


def _traffic_seconds(before: Look, after: Look, seconds: float) -> float:
    """What lies between two publications of traffic, which are not made when we look; infinite without two."""
    if before.traffic_ns is None or after.traffic_ns is None:
        return seconds
    if not before.traffic_ns or after.traffic_ns <= before.traffic_ns:
        return math.inf
    return (after.traffic_ns - before.traffic_ns) / 1e9


def _channel_row(before: ChannelLook | None, after: ChannelLook, seconds: float, traffic_s: float) -> ChannelRow:
    # A channel that came meanwhile has no rate yet: its counts may be those of the one that had its number before.
    before = before or after
    masks = [("g", after.inward), ("h", after.out)]
    return ChannelRow(
        after.relid,
        after.class_name,
        after.cpu,
        after.state,
        _fill(after.out),
        _fill(after.inward),
        _rate(before.traffic.packets, after.traffic.packets, traffic_s),
        _rate(before.traffic.bytes_written, after.traffic.bytes_written, traffic_s),
        # Of a channel whose rings we may not read, the host's signals are all that we know.
        _rate(before.interrupts, after.interrupts, traffic_s if after.inward is None else seconds),
        "".join(letter for letter, ring in masks if ring is not None and ring.interrupt_mask) or "-",
        after.unanswered,
        after.oldest_ns / 1e9,
    )


def _fill(ring: RingFigures | None) -> float | None:
    if ring is None or not ring.data_size:
        return None
    return min(1.0, ring.bytes_to_read / ring.data_size)


def _vp_row(before: VpLook | None, after: VpLook, seconds: float) -> VpRow:
    before = before or after

    def rate(name: str) -> float:
        return _rate(before.counters.get(name, 0), after.counters.get(name, 0), seconds)

    callbacks = _rate(before.callbacks, after.callbacks, seconds)
    reschedules = rate("reschedules")
    # The third vector has no count of its own. A process publishes its counts when it halts, so the sum may lag.
    calls = max(0.0, rate("interrupts") - callbacks - reschedules - rate("spurious"))
    return VpRow(
        after.index,
        after.cpu,
        after.run_state,
        {"f3": callbacks, "fd": reschedules, "fb": calls},
        rate("blocks"),
        rate("polls_paid"),
        rate("polls_vain"),
    )


def _process_row(before: ProcessLook | None, after: ProcessLook, seconds: float) -> ProcessRow:
    switches = 0.0 if before is None else _rate(before.switches, after.switches, seconds)
    return ProcessRow(after.name, after.pid, 100 * after.cpu_share, after.pss, switches)
