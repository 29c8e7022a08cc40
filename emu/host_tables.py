"""What else the host has, mirrored in `control` beside its channels: registers, GPADLs, ports, traffic.

Only the host writes here, at the end of a round with changes; only reports read it. A row is small and is
written while others read: of a GPADL one gets the whole row or none, of a VP each register as it was when it
was read.

    +0      partition: GUEST_OS_ID, HYPERCALL, the port to the guest, the host's own message ports
    +512    how many GPADL rows were ever used, how many GPADLs found none, and of how many not all pages are told
    +768    when traffic was published last, in machine ns
    +1024   a row for each VP by position: SCONTROL, SIMP, SIEFP, SINT0..15, messages that wait for each SINT,
            then of each synthetic timer CONFIG, COUNT and when it expires
    behind  GPADL rows, in no order; then a row of traffic for each relid, written while somebody looks; then chunks

A GPADL's pages are runs of neighbours, of which there is nearly always one. Four have room in its row; those of a
scattered one go on in chunks, each with the number of the next (plus 1; 0: the last).
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple

from emu.control import HOST_TABLES_BYTES, MIRROR_CHANNELS, Control
from emu.ipc.rows import load_row, store_row
from emu.layout import MAX_VPS
from emu.values import valueclass

SINTS: Final = 16
GPADL_ROWS: Final = 5_000
HOST_PORTS: Final = 8

_PARTITION: Final = Struct("<QQIIII")
_PORT: Final = Struct("<II")
_GPADL_HEAD: Final = 512
_TRAFFIC_AT: Final = 768
_VPS: Final = 1_024
_VP: Final = Struct("<3Q16Q16I12Q")
_VP_ROW: Final = 512
_GPADLS: Final = _VPS + MAX_VPS * _VP_ROW
_RUNS_IN_ROW: Final = 4
_NO_RUNS: Final = (0,) * (2 * _RUNS_IN_ROW - 2)
_GPADL: Final = Struct(f"<IIIIIII{2 * _RUNS_IN_ROW}I")
_GPADL_ROW: Final = 64
_TRAFFIC: Final = _GPADLS + GPADL_ROWS * _GPADL_ROW
_TRAFFIC_ROW: Final = Struct("<QQQ")
_CHUNKS: Final = _TRAFFIC + MIRROR_CHANNELS * _TRAFFIC_ROW.size
_RUNS_IN_CHUNK: Final = 7
_CHUNK: Final = Struct(f"<II{2 * _RUNS_IN_CHUNK}I")
CHUNKS: Final = 4_096
_MOST_LOOKS: Final = 100
assert _VP.size <= _VP_ROW and _GPADL.size <= _GPADL_ROW and _CHUNKS + CHUNKS * _CHUNK.size <= HOST_TABLES_BYTES

PageRuns = tuple[tuple[int, int], ...]
"""Pages as (first PFN, how many follow each other from there)."""


@valueclass()
class HostTimer:
    """Registers of a synthetic timer, and the reference time at which it expires next (0: it does not run)."""

    config: int
    count: int
    expiration_time: int


NO_TIMERS: Final = (HostTimer(0, 0, 0),) * 4


@valueclass()
class HostVp:
    """SynIC registers of one VP, and how many messages wait for each of its slots."""

    scontrol: int
    simp: int
    siefp: int
    sint: tuple[int, ...]
    waiting: tuple[int, ...]
    stimer: tuple[HostTimer, ...] = NO_TIMERS


class HostGpadl(NamedTuple):
    """One GPADL; `state` is a `GpadlState` value of hostproc.protocol, `pages` the most that it can name.

    `runs` are its pages, once it is whole; of one that is scattered all over RAM perhaps not all of them. A plain
    tuple: one is made and compared for each transition of a channel.
    """

    relid: int
    gpadl: int
    state: int
    pages: int
    ring: bool
    runs: PageRuns = ()


@valueclass()
class HostPartition:
    """Partition-wide registers, and where messages go.

    `guest_position` and `guest_sint` are where the port to the guest leads, `guest_in_use` how many of its 16
    buffers are taken; `ports` maps the host's message connections to how many messages wait to be read there.
    """

    guest_os_id: int
    hypercall: int
    guest_position: int
    guest_sint: int
    guest_in_use: int
    ports: dict[int, int]


@valueclass()
class Traffic:
    """What went through a channel since it was opened: packets that the host took, bytes of ring that it wrote,
    and how often it signalled the guest."""

    packets: int
    bytes_written: int
    signals: int


class HostTables:
    """Writing (host only) and reading."""

    def __init__(self, control: Control) -> None:
        self._view = control.view
        self._memory = control.memory
        self._base = control.host_tables_offset
        self._gpadls: dict[int, tuple[HostGpadl, ...]] = {}
        self._rows: dict[tuple[int, int], int] = {}
        self._free: list[int] = []
        self._used = 0
        self._unlisted = 0
        self._cut = 0
        # By row: what stands in it, and which chunks are its own.
        self._shown: dict[int, HostGpadl] = {}
        self._chunks: dict[int, list[int]] = {}
        self._free_chunks: list[int] = []
        self._used_chunks = 0

    # -- the partition and its VPs -------------------------------------------------------------------

    def write_partition(self, partition: HostPartition) -> None:
        """Publish registers and ports; of more than 8 ports the first ones."""
        ports = list(partition.ports.items())[:HOST_PORTS]
        at = self._base
        store_row(
            self._memory,
            at,
            _PARTITION,
            partition.guest_os_id,
            partition.hypercall,
            partition.guest_position,
            partition.guest_sint,
            partition.guest_in_use,
            len(ports),
        )
        for number, (connection_id, waiting) in enumerate(ports):
            store_row(self._memory, at + _PARTITION.size + number * _PORT.size, _PORT, connection_id, waiting)

    def partition(self) -> HostPartition:
        """Registers and ports; all zero before the host has written any."""
        os_id, hypercall, position, sint, in_use, count = load_row(self._memory, self._base, _PARTITION)
        at = self._base + _PARTITION.size
        ports = dict(load_row(self._memory, at + n * _PORT.size, _PORT) for n in range(min(count, HOST_PORTS)))
        return HostPartition(os_id, hypercall, position, sint, in_use, ports)

    def write_vp(self, position: int, vp: HostVp) -> None:
        """Publish one VP's registers and queues."""
        at = self._base + _VPS + position * _VP_ROW
        timers = [word for one in vp.stimer for word in (one.config, one.count, one.expiration_time)]
        store_row(self._memory, at, _VP, vp.scontrol, vp.simp, vp.siefp, *vp.sint, *vp.waiting, *timers)

    def vp(self, position: int) -> HostVp:
        """One VP's registers and queues."""
        scontrol, simp, siefp, *rest = load_row(self._memory, self._base + _VPS + position * _VP_ROW, _VP)
        timers = tuple(HostTimer(*rest[at : at + 3]) for at in range(2 * SINTS, len(rest), 3))
        return HostVp(scontrol, simp, siefp, tuple(rest[:SINTS]), tuple(rest[SINTS : 2 * SINTS]), timers)

    # -- GPADLs --------------------------------------------------------------------------------------

    def write_gpadls(self, relid: int, gpadls: tuple[HostGpadl, ...]) -> None:
        """Publish all GPADLs of a channel, in place of those that it had; none: it has none any more."""
        before = self._gpadls.get(relid, ())
        if before == gpadls:
            return
        if before:
            handles = {one.gpadl for one in gpadls}
            for one in before:
                if one.gpadl not in handles:
                    self._drop(relid, one.gpadl)
        for one in gpadls:
            if one not in before:
                self._write(one)
        self._gpadls[relid] = gpadls

    def gpadls(self) -> Iterator[HostGpadl]:
        """Every GPADL that has a row, by channel and handle."""
        used = min(self._view.load_u32(self._base + _GPADL_HEAD), GPADL_ROWS)
        found = (self._row(number) for number in range(used))
        yield from sorted((one for one in found if one is not None), key=lambda one: (one.relid, one.gpadl))

    @property
    def unlisted(self) -> int:
        """How often a GPADL found no free row."""
        return self._view.load_u32(self._base + _GPADL_HEAD + 4)

    @property
    def cut(self) -> int:
        """How often there was no room for all the pages of a GPADL."""
        return self._view.load_u32(self._base + _GPADL_HEAD + 8)

    def _at(self, number: int) -> int:
        return self._base + _GPADLS + number * _GPADL_ROW

    def _drop(self, relid: int, gpadl: int) -> None:
        number = self._rows.pop((relid, gpadl), None)
        if number is not None:
            self._view.store_u32(self._at(number), 0)
            self._free.append(number)
            self._free_chunks += self._chunks.pop(number, ())
            del self._shown[number]

    def _write(self, one: HostGpadl) -> None:
        number = self._rows.get((one.relid, one.gpadl))
        if number is None:
            number = self._take_row()
            if number is None:
                return
            self._rows[one.relid, one.gpadl] = number
        at = self._at(number)
        # State 0 while the rest is written, and stored one higher: who reads another state behind reads again. Where
        # only the state changes, nobody may miss the row meanwhile.
        shown = self._shown.get(number)
        if shown is None or shown._replace(state=one.state) != one:
            self._view.store_u32(at, 0)
            if len(one.runs) == 1 and number not in self._chunks:
                count, more, inside = 1, 0, [*one.runs[0], *_NO_RUNS]
            else:
                count, more = self._write_chunks(number, one.runs)
                inside = [word for run in one.runs[:_RUNS_IN_ROW] for word in run]
                inside += [0] * (2 * _RUNS_IN_ROW - len(inside))
            store_row(self._memory, at, _GPADL, 0, one.relid, one.gpadl, one.pages, one.ring, count, more, *inside)
        self._shown[number] = one
        self._view.store_u32(at, one.state + 1)

    def _write_chunks(self, number: int, runs: PageRuns) -> tuple[int, int]:
        """Write down what has no room in a row, the last chunk first; how many runs are told, and the first chunk."""
        self._free_chunks += self._chunks.pop(number, ())
        rest = runs[_RUNS_IN_ROW:]
        if not rest:
            return len(runs), 0
        room = len(self._free_chunks) + CHUNKS - self._used_chunks
        if len(rest) > room * _RUNS_IN_CHUNK:
            rest = rest[: room * _RUNS_IN_CHUNK]
            self._cut += 1
            self._view.store_u32(self._base + _GPADL_HEAD + 8, self._cut)
        mine = self._chunks[number] = []
        more = 0
        for first in range((len(rest) - 1) // _RUNS_IN_CHUNK * _RUNS_IN_CHUNK, -1, -_RUNS_IN_CHUNK):
            words = [word for run in rest[first : first + _RUNS_IN_CHUNK] for word in run]
            chunk = self._take_chunk()
            mine.append(chunk)
            at, filling = self._chunk_at(chunk), [0] * (2 * _RUNS_IN_CHUNK - len(words))
            store_row(self._memory, at, _CHUNK, more, len(words) // 2, *words, *filling)
            more = chunk + 1
        return _RUNS_IN_ROW + len(rest), more

    def _chunk_at(self, chunk: int) -> int:
        return self._base + _CHUNKS + chunk * _CHUNK.size

    def _take_chunk(self) -> int:
        if self._free_chunks:
            return self._free_chunks.pop()
        self._used_chunks += 1
        return self._used_chunks - 1

    def _take_row(self) -> int | None:
        if self._free:
            return self._free.pop()
        if self._used == GPADL_ROWS:
            self._unlisted += 1
            self._view.store_u32(self._base + _GPADL_HEAD + 4, self._unlisted)
            return None
        self._used += 1
        self._view.store_u32(self._base + _GPADL_HEAD, self._used)
        return self._used - 1

    def _row(self, number: int) -> HostGpadl | None:
        at = self._at(number)
        for _ in range(_MOST_LOOKS):
            before = self._view.load_u32(at)
            if not before:
                return None
            _, relid, gpadl, pages, ring, count, more, *words = load_row(self._memory, at, _GPADL)
            runs = list(zip(words[::2], words[1::2], strict=True))[: min(count, _RUNS_IN_ROW)]
            while 0 < more <= CHUNKS and len(runs) < count:
                more, some, *words = load_row(self._memory, self._chunk_at(more - 1), _CHUNK)
                runs += list(zip(words[::2], words[1::2], strict=True))[: min(max(some, 1), _RUNS_IN_CHUNK)]
            if self._view.load_u32(at) == before:
                return HostGpadl(relid, gpadl, before - 1, pages, bool(ring), tuple(runs))
        return None

    # -- traffic -------------------------------------------------------------------------------------

    def write_traffic(self, relid: int, traffic: Traffic) -> None:
        """Publish what went through a channel."""
        at = self._base + _TRAFFIC + relid * _TRAFFIC_ROW.size
        store_row(self._memory, at, _TRAFFIC_ROW, traffic.packets, traffic.bytes_written, traffic.signals)

    def stamp_traffic(self, now_ns: int) -> None:
        """Say that the traffic of all channels is that of now."""
        self._view.store_u64(self._base + _TRAFFIC_AT, now_ns)

    @property
    def traffic_ns(self) -> int:
        """When traffic was published last (machine ns); 0: never."""
        return self._view.load_u64(self._base + _TRAFFIC_AT)

    def traffic(self, relid: int) -> Traffic:
        """What went through a channel when that was published last; it begins anew when the channel is opened."""
        at = self._base + _TRAFFIC + relid * _TRAFFIC_ROW.size
        return Traffic(*load_row(self._memory, at, _TRAFFIC_ROW))
