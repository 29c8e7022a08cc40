"""Tables of records in guest RAM: what a record is, how its fields are read and written, how records come and go.

What a field can be, and how a record class is written down, is in `guestproc.kernel.records`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Final, Generic, TypeVar

from emu.compile_hints import mypyc_attr
from emu.errors import OutOfMemory
from emu.ipc.atomics import ACQUIRE, RELAXED, RELEASE, AtomicU32, AtomicU64, AtomicView
from emu.memory import PAGE_SIZE

RECORD_HEADER_SIZE: Final = 8
"""generation u32, free-list link u32 (index + 1; 0: last)."""
TABLE_HEADER_SIZE: Final = 64
"""free-list head u64 (tag << 32 | index + 1), then u32s: records ever taken, records in use, refusals."""
RECORD_ALIGNMENT: Final = 64
"""Records start on cache lines of their own: two actors' records never share one."""
POISON: Final = 0x6B
INDEX_MASK: Final = 0xFFFFFFFF

P = TypeVar("P")
R = TypeVar("R", bound="Record")
Views = tuple[memoryview, memoryview, memoryview, dict[int, Any]]
"""A record as u8, u32 and u64 words, and its parts by offset."""


Reserve = Callable[[int, int], None]
"""Called with GPA and length before a first touch; raises OutOfMemory when the tmpfs behind RAM is full."""


def always_there(_gpa: int, _length: int) -> None:
    """RAM that is memory already has nothing to reserve."""


class Ram:
    """Guest RAM as this process sees it: bytes and atomic words at guest physical addresses."""

    __slots__ = ("atomics", "buffer", "octets", "reserve", "size", "variants", "watch_wait")

    def __init__(self, buffer: Any, atomics: AtomicView | None = None) -> None:
        # The collector of CPython 3.11 dies of an AtomicView on a memoryview that goes in the same cycle.
        assert not isinstance(buffer, memoryview), "hand over the mmap or bytearray itself"
        self.buffer: Final = buffer
        self.octets: Final = memoryview(buffer).cast("B")
        self.atomics: Final = AtomicView(buffer) if atomics is None else atomics
        self.size: Final = len(self.octets)
        self.variants: dict[Any, Any] = {}
        """What this process builds in place of a class: its recorded variant, where the machine records."""
        self.watch_wait: Callable[[Any, int, str], Any] | None = None
        """Makes what is told of the sleepers of a word (kind, GPA, name), where the machine records."""
        self.reserve: Reserve = always_there

    def variant(self, cls: type[P]) -> type[P]:
        """What is to be built for a class."""
        made: type[P] = self.variants.get(cls, cls)
        return made

    def u32(self, gpa: int) -> AtomicU32:
        """The atomic 32-bit word at `gpa`."""
        return self.atomics.cell_u32(gpa)

    def u64(self, gpa: int) -> AtomicU64:
        """The atomic 64-bit word at `gpa`."""
        return self.atomics.cell_u64(gpa)

    def words32(self, gpa: int, count: int) -> memoryview:
        """`count` plain u32 words at `gpa`."""
        return self.octets[gpa : gpa + 4 * count].cast("I")

    def words64(self, gpa: int, count: int) -> memoryview:
        """`count` plain u64 words at `gpa`."""
        return self.octets[gpa : gpa + 8 * count].cast("Q")


@mypyc_attr(allow_interpreted_subclasses=True)
class Field(ABC):
    """One field of a record class: its size, alignment and the lock that covers it (or "atomic: why")."""

    def __init__(self, size: int, align: int, lock: str) -> None:
        self.size = size
        self.align = align
        self.lock = lock
        self.name = ""
        self.offset = 0

    @abstractmethod
    def attribute(self, permanent: bool) -> Any:
        """The descriptor that stands in the record class, a permanent one or not, instead of this field."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Record:
    """One record of a table; `index` and `generation` name it, `handle` is both in one u64 (0: none)."""

    FIELDS: ClassVar[tuple[Field, ...]] = ()
    SIZE: ClassVar[int] = RECORD_ALIGNMENT
    PERMANENT: ClassVar[bool] = False

    _octets: memoryview
    words: memoryview
    """Its u32 words, the generation first."""
    quads: memoryview
    """The same bytes as u64 words."""
    _parts: dict[int, Any]

    __slots__ = ("_octets", "_parts", "quads", "words", "generation", "gpa", "handle", "index", "table")

    def __init_subclass__(cls, *, permanent: bool = False) -> None:
        """Give the fields their offsets, in the order of the class body, and fast accessors.

        `permanent`: records of this class are taken at boot and never freed.
        """
        cls.PERMANENT = permanent
        offset = RECORD_HEADER_SIZE
        fields = []
        for name, field in list(vars(cls).items()):
            if not isinstance(field, Field):
                continue
            assert not hasattr(Record, name), f"{cls.__name__}.{name}: every record has that already"
            field.name = name
            field.offset = -(-offset // field.align) * field.align
            offset = field.offset + field.size
            setattr(cls, name, field.attribute(permanent))
            fields.append(field)
        cls.FIELDS = tuple(fields)
        cls.SIZE = -(-offset // RECORD_ALIGNMENT) * RECORD_ALIGNMENT

    def __init__(self, table: Table[Any], index: int, generation: int) -> None:
        self.table: Final = table
        self.index: Final = index
        self.generation: Final = generation
        self.gpa: Final = table._first + index * table.record_size
        # Views and parts are the same for every generation of a record: they lie in the same place.
        self._octets, self.words, self.quads, self._parts = table._views.get(index) or table.views(index)
        self.handle: Final = generation << 32 | index + 1
        """How another record, or an argument word, names this one."""

    def alive(self) -> bool:
        """Whether this name still names the record (a hint, unless what keeps it alive is held)."""
        return bool(self.words[0] == self.generation)

    def stale(self) -> AssertionError:
        """The error for a use of a name that outlived its record, or of a record that is free."""
        return AssertionError(
            f"{self.table.name}[{self.index}]: stale, generation {self.generation} was used but "
            f"{self.words[0]} is there"
        )

    def __repr__(self) -> str:
        return f"{self.table.name}[{self.index}]@{self.generation}"


def word_property(position: int, size: int, doc: str) -> property:
    """What reads and writes one element, of 1, 4 or 8 bytes, of the record's memory, generation first."""
    if size == 4:

        def get(record: Record) -> int:
            words = record.words
            if words[0] != record.generation:
                raise record.stale()
            value: int = words[position]
            return value

        def put(record: Record, value: int) -> None:
            words = record.words
            if words[0] != record.generation:
                raise record.stale()
            words[position] = value

        return property(get, put, doc=doc)
    if size == 8:

        def get_quad(record: Record) -> int:
            if record.words[0] != record.generation:
                raise record.stale()
            value: int = record.quads[position]
            return value

        def put_quad(record: Record, value: int) -> None:
            if record.words[0] != record.generation:
                raise record.stale()
            record.quads[position] = value

        return property(get_quad, put_quad, doc=doc)

    def get_octet(record: Record) -> int:
        if record.words[0] != record.generation:
            raise record.stale()
        value: int = record._octets[position]
        return value

    def put_octet(record: Record, value: int) -> None:
        if record.words[0] != record.generation:
            raise record.stale()
        record._octets[position] = value

    return property(get_octet, put_octet, doc=doc)


def blob_property(start: int, size: int, name: str, doc: str) -> property:
    """What copies bytes out, or in, where they are padded with zeros."""
    end = start + size

    def get(record: Record) -> bytes:
        if record.words[0] != record.generation:
            raise record.stale()
        return bytes(record._octets[start:end])

    def put(record: Record, value: bytes) -> None:
        if record.words[0] != record.generation:
            raise record.stale()
        assert len(value) <= size, f"{name} holds {size} bytes, got {len(value)}"
        record._octets[start:end] = value if len(value) == size else value.ljust(size, b"\0")

    return property(get, put, doc=doc)


def part_property(offset: int, name: str, build: Callable[[Ram, int, str], Any], doc: str) -> property:
    """What builds an object over the record's memory at its first use, and checks the generation at every use."""

    def get(record: Record) -> Any:
        if record.words[0] != record.generation:
            raise record.stale()
        try:
            # Behind the first time nothing is built: this is the way of nearly every use.
            part = record._parts[offset]
        except KeyError:
            table = record.table
            label = f"{table.name}[{record.index}].{name}"
            part = record._parts[offset] = build(table.ram, record.gpa + offset, label)
        return part

    return property(get, doc=doc)


class Table(Generic[R]):
    """`capacity` records of one class at `gpa`: a header, then the records, then nothing else.

    Free records form a stack whose head carries a tag (raised by each pop and push), so that a record that
    was taken and given back between a look and the compare-and-swap is noticed; records that were never
    taken are not on it: they are the ones behind the count of records ever taken, and still zero. A fresh
    table is all zeros: nothing needs to be set up.
    """

    def __init__(self, ram: Ram, name: str, record_class: type[R], gpa: int, capacity: int) -> None:
        self.ram: Final = ram
        self.name: Final = name
        self.record_class: Final = record_class
        self.gpa: Final = gpa
        self.capacity: Final = capacity
        self.record_size: Final = record_class.SIZE
        self._first: Final = gpa + TABLE_HEADER_SIZE
        self._load_u32: Final = ram.atomics.load_u32
        self._store_u32: Final = ram.atomics.store_u32
        self._head: Final = ram.u64(gpa)
        self._taken: Final = ram.u32(gpa + 8)
        self._in_use: Final = ram.u32(gpa + 12)
        self._refusals: Final = ram.u32(gpa + 16)
        self._cache: Final[dict[int, R]] = {}
        self._views: Final[dict[int, Views]] = {}
        self._there = 0
        """So many records, from the first, this process knows to have memory."""
        body = self.record_size - RECORD_HEADER_SIZE
        self._zeros: Final = bytes(body)
        self._poison: Final = bytes([POISON]) * body

    @staticmethod
    def footprint(record_class: type[Record], capacity: int) -> int:
        """Bytes that such a table takes."""
        return TABLE_HEADER_SIZE + record_class.SIZE * capacity

    def record_gpa(self, index: int) -> int:
        """Where record `index` lies."""
        return self._first + index * self.record_size

    def views(self, index: int) -> Views:
        """Record `index` as bytes, u32s and u64s, and its parts so far; made once a process."""
        views = self._views.get(index)
        if views is None:
            gpa = self.record_gpa(index)
            octets = self.ram.octets[gpa : gpa + self.record_size]
            views = self._views[index] = (octets, octets.cast("I"), octets.cast("Q"), {})
        return views

    @property
    def in_use(self) -> int:
        """Records allocated now."""
        return self._in_use.load()

    @property
    def refusals(self) -> int:
        """Allocations that found no free record."""
        return self._refusals.load()

    def at(self, index: int) -> R:
        """The record that is allocated at `index` now."""
        generation = self._load_u32(self._first + index * self.record_size, ACQUIRE)
        record = self._cache.get(index)
        if record is not None and record.generation == generation:
            return record
        return self.get(index, generation)

    def get(self, index: int, generation: int) -> R:
        """The record (index, generation); an AssertionError if it is not, or no longer, that one."""
        record = self._cache.get(index)
        if record is None or record.generation != generation:
            record = self.record_class(self, index, generation)
            if not (generation & 1 and record.alive()):
                raise record.stale()
            self._cache[index] = record
        elif not record.alive():
            raise record.stale()
        return record

    def from_handle(self, handle: int) -> R:
        """The record that `handle` names; 0 names none and is an error here."""
        index = (handle & INDEX_MASK) - 1
        record = self._cache.get(index)
        if record is not None and record.handle == handle and record.words[0] == record.generation:
            return record
        assert handle, f"{self.name}: handle 0 names no record"
        return self.get(index, handle >> 32)

    def find(self, handle: int) -> R | None:
        """The record that `handle` names, None if it names none (0) or its record is gone."""
        if not handle:
            return None
        index, generation = (handle & INDEX_MASK) - 1, handle >> 32
        if self.views(index)[1][0] != generation:
            return None
        record = self._cache.get(index)
        if record is None or record.generation != generation:
            record = self._cache[index] = self.record_class(self, index, generation)
        return record

    def alloc(self) -> R | None:
        """Take a record, zeroed; None when all are in use (counted)."""
        if self._head.load() & INDEX_MASK and (index := self._pop()) >= 0:
            untouched = self._poison
        else:
            index = self._take_fresh()
            if index < 0:
                self._refusals.fetch_add(1)
                return None
            untouched = self._zeros
        self._in_use.fetch_add(1, RELAXED)
        size = self.record_size
        gpa = self._first + index * size
        # Slices of the buffer itself: one copy each way, no view object.
        buffer, body, end = self.ram.buffer, gpa + RECORD_HEADER_SIZE, gpa + size
        if buffer[body:end] != untouched:
            raise AssertionError(self._damage(index, untouched))
        if untouched is not self._zeros:
            buffer[body:end] = self._zeros
        generation = (self._load_u32(gpa) + 1) & INDEX_MASK
        assert generation & 1, f"{self.name}[{index}] was on the free list while allocated"
        self._store_u32(gpa, generation, RELEASE)
        record = self._cache[index] = self.record_class(self, index, generation)
        return record

    def free(self, record: R) -> None:
        """Give a record back: raise its generation, poison it, put it on the free list.

        The caller has unpublished it and waited until nobody can be at it any more.
        """
        assert not record.PERMANENT, f"{record} is there as long as the machine"
        gpa = record.gpa
        found = self.ram.atomics.cas_u32(gpa, record.generation, (record.generation + 1) & INDEX_MASK)
        if found != record.generation:
            raise record.stale()
        self._cache.pop(record.index, None)
        self.ram.buffer[gpa + RECORD_HEADER_SIZE : gpa + self.record_size] = self._poison
        self._in_use.fetch_sub(1, RELAXED)
        link = gpa + 4
        while True:
            head = self._head.load()
            self._store_u32(link, head & INDEX_MASK)
            tag = ((head >> 32) + 1) & INDEX_MASK
            if self._head.cas(head, tag << 32 | record.index + 1) == head:
                return

    def live(self) -> Iterator[R]:
        """Every allocated record; records that come or go meanwhile may be seen or not."""
        load, cache, first, size = self._load_u32, self._cache, self._first, self.record_size
        for index in range(min(self._taken.load(), self.capacity)):
            generation = load(first + index * size, ACQUIRE)
            if not generation & 1:
                continue
            record = cache.get(index)
            if record is None or record.generation != generation:
                record = self.find(generation << 32 | index + 1)
            if record is not None:
                yield record

    def damage(self) -> list[str]:
        """What was written into free records; call it when nothing runs."""
        found = []
        for index in range(min(self._taken.load(), self.capacity)):
            gpa = self.record_gpa(index)
            body = self.ram.octets[gpa + RECORD_HEADER_SIZE : gpa + self.record_size]
            if not self.ram.atomics.load_u32(gpa) & 1 and bytes(body) != self._poison:
                found.append(self._damage(index, self._poison))
        return found

    def _pop(self) -> int:
        """Index from the free stack, -1 if it is empty."""
        while True:
            head = self._head.load()
            position = head & INDEX_MASK
            if not position:
                return -1
            # Another actor may take and re-use this record before the swap; the link read here is then
            # nonsense, but the tag has moved on and the swap fails.
            link = self._load_u32(self._first + (position - 1) * self.record_size + 4)
            tag = ((head >> 32) + 1) & INDEX_MASK
            if self._head.cas(head, tag << 32 | link) == head:
                return position - 1

    def _take_fresh(self) -> int:
        """Index of a record that was never taken, -1 if there is none left, or no memory behind it."""
        while True:
            taken = self._taken.load()
            if taken >= self._there and not self._make_memory(taken):
                return -1
            if self._taken.cas(taken, taken + 1) == taken:
                return taken

    def _make_memory(self, index: int) -> bool:
        """Make sure that record `index`, and all that lie on its last page, have memory; False: none is left."""
        if index >= self.capacity:
            return False
        end = -(-(self.record_gpa(index) + self.record_size) // PAGE_SIZE) * PAGE_SIZE
        there = min((end - self._first) // self.record_size, self.capacity)
        try:
            self.ram.reserve(self.record_gpa(index), self.record_gpa(there) - self.record_gpa(index))
        except OutOfMemory:
            return False
        self._there = there
        return True

    def _damage(self, index: int, expected: bytes) -> str:
        gpa = self.record_gpa(index)
        body = bytes(self.ram.octets[gpa + RECORD_HEADER_SIZE : gpa + self.record_size])
        first = next(i for i in range(len(body)) if body[i] != expected[i])
        return (
            f"{self.name}[{index}]: written while free, byte {first + RECORD_HEADER_SIZE} is "
            f"{body[first]:#04x} instead of {expected[first]:#04x}"
        )
