"""A recording: what all actors of a machine recorded, in one file that tells how to read itself.

The file is a head and then chunks, each (kind, slot, length, CRC-32 of these three, CRC-32 of the payload, payload), so
that it can be written while the machine runs and read although its writer was killed: whatever is whole is read, and
`damage` says the rest. A chunk whose sums are wrong is damage, too: what is read is what was written.

    head   8 bytes VMBUSREC, u32 format version, u32 0
    HEAD   msgpack: schema, machine, contexts, the event table, when the recording began
    ACTR   msgpack: one actor (its slot, name, kind, pid, cpu), before its first records
    RECS   records of one actor as they stood in its ring, oldest first (64 bytes each, see `emu.tracing`)
    NOTE   msgpack: what whoever made the recording says of it (a schedule, say: which, its steps, what came of it)
    TAIL   msgpack: how many records there are, how many were dropped, how many older ones a flight left out; without
           it the writer was cut off
"""

from __future__ import annotations

import contextlib
import heapq
import mmap
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import IO, Any, Final
from zlib import crc32

import msgpack

from emu.control import ActorRow, ActorState
from emu.errors import UserError
from emu.event_fields import WORDS, Decoder, EventSpec, decoder_of, parse_argument
from emu.machine import Machine
from emu.tracing import CAPACITY, EVENTS, NO_VP, RECORD, RECORD_BYTES, Context, Drain
from emu.values import valueclass

MAGIC: Final = b"VMBUSREC"
FORMAT_VERSION: Final = 2
SCHEMA: Final = {"name": "vmbus-emu.recording", "version": 1}

_FILE_HEAD: Final = Struct("<8sII")
_CHUNK: Final = Struct("<4sII")
_SUMS: Final = Struct("<II")
_SEQUENCES: Final = 1 << 32
_ANOTHER: Final = "choose a file that can be written"


class RecordingError(UserError):
    """The file is no recording, or none that this program reads; one line that names it."""


@valueclass()
class RecordedActor:
    """One process or thread that recorded: `kind` is an ActorKind's name, `cpu` as `emu.control.ActorRow` has it."""

    slot: int
    name: str
    kind: str
    pid: int
    cpu: int


@valueclass()
class TraceRecord:
    """One record: CLOCK_MONOTONIC ns, the actor's own sequence, VP index (None: none), where, and what."""

    t_ns: int
    seq: int
    actor: RecordedActor
    vp: int | None
    context: str
    event: EventSpec
    values: tuple[int, ...]
    """A number for each argument of the event; a text (a GUID, a string) is one number as well."""

    @property
    def arguments(self) -> dict[str, int]:
        """The event's arguments by name, as numbers."""
        return dict(zip(self.event.arguments, self.values, strict=False))

    @property
    def shown(self) -> dict[str, int | str]:
        """The event's arguments by name: texts as texts, everything else as numbers."""
        return {
            field.name: field.show(value) if field.text else value
            for field, value in zip(self.event.fields, self.values, strict=False)
        }


class RecordingWriter:
    """Drains a machine's recorders into a file; `poll` every 20 ms or so, `close` at the end, by whichever thread.

    `flight` is why a flight recorder writes its rings out ("" for an ordinary recording); records before `since_ns`
    (CLOCK_MONOTONIC) are left out. `tee` is given each actor's new records as well.
    Raises UserError, in one line, when the file cannot be written. A file with `most_bytes` is nobody's wish: where it
    would be larger, or cannot be written, it is emptied, and `given_up` says why.
    """

    def __init__(
        self,
        path: Path,
        machine: Machine,
        *,
        flight: str = "",
        since_ns: int = 0,
        tee: Callable[[ActorRow, bytes], object] | None = None,
        most_bytes: int | None = None,
    ) -> None:
        self.path = path
        self.given_up = ""
        self._most_bytes = most_bytes
        self.records = 0
        self.share = 0.0
        """How full the fullest ring was at the last `poll`; 1 and more: records were overwritten."""
        self.fullest_pid = 0
        """The process whose ring that was."""
        self._lock = threading.RLock()
        self._since_ns = since_ns
        self._left_out = 0
        self._tee = tee
        self._control = machine.control
        self._drain = Drain(machine.trace, tells=True)
        self._known: set[int] = set()
        try:
            self._file: IO[bytes] = path.open("wb")
        except OSError as error:
            raise UserError(f"cannot record into {path}: {error.strerror}; {_ANOTHER}") from None
        self._write(_FILE_HEAD.pack(MAGIC, FORMAT_VERSION, 0))
        head = head_of(machine)
        if flight:
            head["flight"] = flight
        self._write_map(b"HEAD", head)
        self._flush()

    @property
    def dropped(self) -> int:
        """Records that were overwritten before they could be drained."""
        return self._drain.dropped

    def poll(self) -> int:
        """Drain every actor once; how many records came (none after `close`, or after a failed write)."""
        with self._lock:
            if self._file.closed:
                return 0
            before = self.records
            fullest = 0
            for slot in self._drain.recorded():
                row = self._control.row(slot)
                if row.state not in (ActorState.FREE, ActorState.STARTING) and (taken := self._take(row)) > fullest:
                    fullest, self.fullest_pid = taken, row.pid
            self.share = fullest / CAPACITY
            if self.records != before:
                self._flush()
            if self._most_bytes is not None and RECORD_BYTES * self.records > self._most_bytes:
                self._give_up(f"it took more than {self._most_bytes >> 20} MiB")
            return self.records - before

    def note(self, content: dict[str, Any]) -> None:
        """Keep something that is no record beside them; after `close` it is too late, and nothing happens."""
        with self._lock:
            if not self._file.closed:
                self._write_map(b"NOTE", content)

    def close(self) -> None:
        """Drain what is left, say that this is all, close the file. May be called twice."""
        with self._lock:
            if self._file.closed:
                return
            self.poll()
            tail = {
                "records": self.records,
                "dropped": self.dropped,
                "left_out": self._left_out,
                "ended_ns": time.monotonic_ns(),
            }
            self._write_map(b"TAIL", tail)
            self._flush()
            self._file.close()

    def _take(self, row: ActorRow) -> int:
        """Write what one actor recorded; how many records its ring held."""
        raw = self._drain.take(row.slot)
        taken = len(raw) // RECORD_BYTES
        if self._since_ns:
            first = _first_since(raw, self._since_ns)
            self._left_out += first // RECORD_BYTES
            raw = raw[first:]
        if not raw:
            return taken
        if row.slot not in self._known:
            self._known.add(row.slot)
            actor = {"name": row.name, "kind": row.kind.name, "pid": row.pid, "cpu": row.cpu}
            self._write_map(b"ACTR", actor, row.slot)
        # Not joined: of some hundred kilobytes that is a fifth of the time of a drain.
        self._write(_chunk_head(b"RECS", row.slot, raw))
        self._write(raw)
        self.records += len(raw) // RECORD_BYTES
        if self._tee is not None:
            self._tee(row, raw)
        return taken

    def _write_map(self, kind: bytes, content: dict[str, Any], slot: int = 0) -> None:
        self._write(chunk_of(kind, slot, msgpack.packb(content)))

    def _write(self, data: bytes) -> None:
        if self.given_up:
            return
        try:
            self._file.write(data)
        except OSError as error:
            self._fail(error)

    def _flush(self) -> None:
        """Whole chunks go to the file, so that a killed writer leaves what it drained."""
        if self.given_up:
            return
        try:
            self._file.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if self._most_bytes is not None:
            self._give_up(f"it could not be written: {error.strerror}")
            return
        # Closing tries to write what is still buffered, and fails the same way.
        with contextlib.suppress(OSError):
            self._file.close()
        raise UserError(f"cannot record into {self.path}: {error.strerror}; {_ANOTHER}") from None

    def _give_up(self, why: str) -> None:
        self.given_up = self.given_up or why
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            os.truncate(self.path, 0)


def chunk_of(kind: bytes, slot: int, payload: bytes) -> bytes:
    """A chunk as it stands in the file."""
    return _chunk_head(kind, slot, payload) + payload


def _chunk_head(kind: bytes, slot: int, payload: bytes) -> bytes:
    head = _CHUNK.pack(kind, slot, len(payload))
    return head + _SUMS.pack(crc32(head), crc32(payload))


def _first_since(raw: bytes, since_ns: int) -> int:
    """Where the first record that is not older begins; one actor's records are in the order of time."""
    at = 0
    while at < len(raw) and int.from_bytes(raw[at : at + 8], "little") < since_ns:
        at += RECORD_BYTES
    return at


def head_of(machine: Machine) -> dict[str, Any]:
    """The HEAD of a recording that begins now: enough to read its records without this program's tables."""
    return {
        "schema": SCHEMA,
        "machine": machine.name,
        "seed": machine.config.get("seed"),
        "vp_indices": [machine.vp_index(position) for position in range(machine.vp_count)],
        "began_ns": time.monotonic_ns(),
        "began_unix_ns": time.time_ns(),
        "contexts": {context.value: context.name for context in Context},
        "events": [[spec.number, spec.name, [field.written for field in spec.fields]] for spec in EVENTS.values()],
    }


class Recording:
    """A recording opened for reading; a context manager.

    `damage` is "" for a whole file, else a sentence that says from where on it cannot be read. A file without a head,
    which says what the numbers in it mean, is none.
    """

    def __init__(self, path: Path) -> None:
        """Read head and chunk table; RecordingError when this is no recording."""
        self.path = path
        self.damage = ""
        self.actors: dict[int, RecordedActor] = {}
        self._chunks: dict[int, list[tuple[int, int]]] = {}
        self._tail: dict[str, Any] = {}
        self.head: dict[str, Any] = {}
        self.notes: list[dict[str, Any]] = []
        self._data = _mapped(path)
        self._read_file_head()
        self._read_chunks()
        if not self.head:
            self.close()
            raise RecordingError(
                f"{path} was cut short or spoilt before the end of its head, so nothing in it can be read; "
                "`vmbus-emu run --record FILE` makes another"
            )
        self.machine: str = str(self.head.get("machine", ""))
        self.seed: int | None = self.head.get("seed")
        """What is random in it follows from this; None where a recording does not say."""
        self.events = _events(self.head)
        self._decoders: dict[int, Decoder] = {number: decoder_of(spec) for number, spec in self.events.items()}
        self._contexts = _contexts(self.head)
        self.flight: str = str(self.head.get("flight", ""))
        self._check_tail()

    # -- what is in it ------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Records that can be read."""
        return sum(end - start for chunks in self._chunks.values() for start, end in chunks) // RECORD_BYTES

    @property
    def dropped(self) -> int:
        """Records that were overwritten before they were drained, by the gaps in the actors' sequences.

        A flight recorder's file begins late on purpose: what came before it is not counted.
        """
        missing = 0
        for chunks in self._chunks.values():
            expected = next(self._sequences(chunks), 0) if self.flight else 0
            for sequence in self._sequences(chunks):
                missing += (sequence - expected) % _SEQUENCES
                expected = sequence + 1
        return missing

    @property
    def begins_late(self) -> bool:
        """Whether some actor's first records are not in it: a flight's rings had gone round, or it is of the end."""
        return bool(self._tail.get("left_out")) or any(
            next(self._sequences(chunks), 0) for chunks in self._chunks.values()
        )

    def counts(self) -> Counter[str]:
        """How often each event is recorded: what every export of this recording has to agree with."""
        numbers: Counter[int] = Counter()
        for chunks in self._chunks.values():
            for start, end in chunks:
                numbers.update(record[2] for record in RECORD.iter_unpack(self._data[start:end]))
        return Counter({self._event(number).name: count for number, count in numbers.items()})

    def records(self) -> Iterator[TraceRecord]:
        """All records by time; those of one actor stay in the order in which it made them."""
        return heapq.merge(*map(self._of_actor, self._chunks), key=lambda record: record.t_ns)

    def _of_actor(self, slot: int) -> Iterator[TraceRecord]:
        actor = self.actors.get(slot) or RecordedActor(slot, f"slot {slot}", "NONE", 0, 0)
        for start, end in self._chunks[slot]:
            for t_ns, seq, number, vp, context, *words in RECORD.iter_unpack(self._data[start:end]):
                event = self._event(number)
                yield TraceRecord(
                    t_ns,
                    seq,
                    actor,
                    None if vp == NO_VP else vp,
                    self._contexts.get(context, str(context)),
                    event,
                    self._decoders[number](words),
                )

    def _event(self, number: int) -> EventSpec:
        spec = self.events.get(number)
        if spec is None:
            spec = self.events[number] = EventSpec(number, f"event_{number}", tuple(map(parse_argument, "abcdef")))
            self._decoders[number] = decoder_of(spec)
        return spec

    def _sequences(self, chunks: list[tuple[int, int]]) -> Iterator[int]:
        for start, end in chunks:
            for record in RECORD.iter_unpack(self._data[start:end]):
                yield record[1]

    # -- reading the file ---------------------------------------------------------------------------

    def _read_file_head(self) -> None:
        data = self._data
        if len(data) < _FILE_HEAD.size or data[: len(MAGIC)] != MAGIC:
            self.close()
            raise RecordingError(f"{self.path} is no recording; `vmbus-emu run --record FILE` makes one")
        _magic, version, _zero = _FILE_HEAD.unpack_from(data)
        if version != FORMAT_VERSION:
            self.close()
            raise RecordingError(
                f"{self.path} has format {version}; this program reads {FORMAT_VERSION}: record it again"
            )

    def _read_chunks(self) -> None:
        at = _FILE_HEAD.size
        while at < len(self._data) and not self.damage:
            at = self._read_chunk(at)

    def _read_chunk(self, at: int) -> int:
        """Note one chunk; where the next one begins."""
        start = at + _CHUNK.size + _SUMS.size
        left = len(self._data) - start
        if left < 0:
            return self._damaged(at, "the file ends in the head of a chunk")
        kind, slot, length = _CHUNK.unpack_from(self._data, at)
        head_sum, payload_sum = _SUMS.unpack_from(self._data, at + _CHUNK.size)
        if head_sum != crc32(self._data[at : at + _CHUNK.size]):
            return self._damaged(at, "this is no chunk")
        if length > left:
            self._damaged(at, f"the file ends in the middle of a {_shown(kind)} chunk")
            length = left
        elif payload_sum != crc32(self._data[start : start + length]):
            return self._damaged(at, f"the {_shown(kind)} chunk is not what was written")
        elif kind == b"RECS" and length % RECORD_BYTES:
            self._damaged(at, f"{length} bytes are no whole number of records")
        if kind == b"RECS":
            whole = length // RECORD_BYTES * RECORD_BYTES
            self._chunks.setdefault(slot, []).append((start, start + whole))
        elif kind in (b"HEAD", b"ACTR", b"NOTE", b"TAIL") and not self.damage:
            self._read_map(at, kind, slot, bytes(self._data[start : start + length]))
        return int(start + length)

    def _read_map(self, at: int, kind: bytes, slot: int, payload: bytes) -> None:
        try:
            content = msgpack.unpackb(payload, strict_map_key=False)
            if kind == b"ACTR":
                actor = (str(content["name"]), str(content["kind"]), int(content["pid"]), int(content["cpu"]))
                self.actors[slot] = RecordedActor(slot, *actor)
            elif kind == b"HEAD":
                _events(content)
                _contexts(content)
                self.head = content
            elif kind == b"NOTE":
                self.notes.append(dict(content))
            else:
                self._tail = {"records": int(content["records"]), "left_out": int(content.get("left_out", 0))}
        except (ValueError, TypeError, KeyError, AttributeError):
            self._damaged(at, f"a {_shown(kind)} chunk that cannot be read")

    def _check_tail(self) -> None:
        if self.damage:
            return
        if not self._tail:
            self._damaged(len(self._data), "the file ends without its TAIL: its writer was cut off")
        elif self._tail["records"] != self.count:
            said = self._tail["records"]
            self._damaged(len(self._data), f"{said} records were written, {self.count} are there")

    def _damaged(self, at: int, what: str) -> int:
        """The first damage is kept; nothing behind it is read."""
        if not self.damage:
            self.damage = f"{self.path}: at byte {at} {what}; {self.count} records before it are whole"
        return len(self._data)

    # -- closing ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Unmap the file."""
        if isinstance(self._data, mmap.mmap):
            self._data.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _shown(kind: bytes) -> str:
    return kind.decode("ascii", "backslashreplace")


def _mapped(path: Path) -> mmap.mmap | bytes:
    """The file's bytes, mapped; RecordingError when it cannot be opened."""
    try:
        # Before it is opened: a pipe that nobody writes would be waited for.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise RecordingError(
                f"{path} is not a regular file; give one that `vmbus-emu run --record FILE` has written"
            )
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        cure = "give a file that `vmbus-emu run --record FILE` has written"
        raise RecordingError(f"cannot read {path}: {error.strerror}; {cure}") from None


def _events(head: dict[str, Any]) -> dict[int, EventSpec]:
    """The event table of a HEAD, by number; an event that this program knows the same way has its print format."""
    specs = (_event(int(number), str(name), *map(str, written)) for number, name, written in head.get("events", ()))
    return {spec.number: spec for spec in specs}


@lru_cache(maxsize=1024)  # nearly all recordings that a process reads have the same table
def _event(number: int, name: str, *written: str) -> EventSpec:
    fields = tuple(map(parse_argument, written))
    spec = EventSpec(number, name, fields)
    if spec.words > WORDS:
        raise ValueError(f"{name} has {spec.words} words")
    known = EVENTS.get(name)
    return known if known and (known.number, known.fields) == (number, fields) else spec


def _contexts(head: dict[str, Any]) -> dict[int, str]:
    """The contexts of a HEAD, by number."""
    return {int(number): str(name) for number, name in head.get("contexts", {}).items()}
