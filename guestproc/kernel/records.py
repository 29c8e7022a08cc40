"""Records in guest RAM: tables of fixed-size records, each named by (index, generation).

A record's generation is odd while it is allocated and is raised when it is taken and when it is freed, so
a name that outlived its record is noticed at the next access, in whatever process: an AssertionError says
which table, which index and both generations. Freed records are filled with `POISON`; the next allocation
checks that nobody wrote there meanwhile.

A record class *is* its layout: fields lie in the order of the class body, each aligned to its own size,
behind an 8-byte header (generation, free-list link), and each says which lock covers it:

    class Waiter(Record):
        state = Atomic32("atomic: waiter and waker exchange it")
        actor = Word(4, "written once, before the record is announced")

A class whose records are there as long as the machine (`class Cpu(Record, permanent=True)`) has no name that could
outlive its record: its atomic words, locks and other parts are built once and are plain attributes from then on.

Python objects are a cache of this process, one an (index, generation); all state is in RAM. A field costs
about 100 ns, the check of the generation included. `fields` writes or reads neighbours in one go.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from struct import Struct
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

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

    __slots__ = ("atomics", "buffer", "octets", "reserve", "size", "variants")

    def __init__(self, buffer: Any, atomics: AtomicView | None = None) -> None:
        # The collector of CPython 3.11 dies of an AtomicView on a memoryview that goes in the same cycle.
        assert not isinstance(buffer, memoryview), "hand over the mmap or bytearray itself"
        self.buffer: Final = buffer
        self.octets: Final = memoryview(buffer).cast("B")
        self.atomics: Final = AtomicView(buffer) if atomics is None else atomics
        self.size: Final = len(self.octets)
        self.variants: dict[Any, Any] = {}
        """What this process builds in place of a class: its recorded variant, where the machine records."""
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


class Field(ABC):
    """One field of a record class: its size, alignment and the lock that covers it (or "atomic: why")."""

    def __init__(self, size: int, align: int, lock: str) -> None:
        self.size = size
        self.align = align
        self.lock = lock
        self.name = ""
        self.offset = 0

    @abstractmethod
    def accessor(self) -> property:
        """The property that stands in the record class instead of this field."""


class Word(Field):
    """A plain unsigned integer of 1, 4 or 8 bytes; not atomic, so a lock or a publication covers it."""

    def __init__(self, size: int, lock: str) -> None:
        assert size in (1, 4, 8)
        super().__init__(size, size, lock)

    if TYPE_CHECKING:  # what stands there is the accessor

        def __get__(self, record: Record, owner: type[Record]) -> int: ...

        def __set__(self, record: Record, value: int) -> None: ...

    def accessor(self) -> property:
        """Read and write one element of the record's memory, generation first."""
        position = self.offset // self.size
        if self.size == 4:

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

            return property(get, put, doc=self.lock)
        if self.size == 8:

            def get_quad(record: Record) -> int:
                if record.words[0] != record.generation:
                    raise record.stale()
                value: int = record.quads[position]
                return value

            def put_quad(record: Record, value: int) -> None:
                if record.words[0] != record.generation:
                    raise record.stale()
                record.quads[position] = value

            return property(get_quad, put_quad, doc=self.lock)

        def get_octet(record: Record) -> int:
            if record.words[0] != record.generation:
                raise record.stale()
            value: int = record._octets[position]
            return value

        def put_octet(record: Record, value: int) -> None:
            if record.words[0] != record.generation:
                raise record.stale()
            record._octets[position] = value

        return property(get_octet, put_octet, doc=self.lock)


class Blob(Field):
    """A fixed number of bytes, read as `bytes`; a shorter value is padded with zeros, a longer refused."""

    def __init__(self, size: int, lock: str) -> None:
        super().__init__(size, 8, lock)

    if TYPE_CHECKING:  # what stands there is the accessor

        def __get__(self, record: Record, owner: type[Record]) -> bytes: ...

        def __set__(self, record: Record, value: bytes) -> None: ...

    def accessor(self) -> property:
        """Copy the bytes out, or in."""
        start, end, size, name = self.offset, self.offset + self.size, self.size, self.name

        def get(record: Record) -> bytes:
            if record.words[0] != record.generation:
                raise record.stale()
            return bytes(record._octets[start:end])

        def put(record: Record, value: bytes) -> None:
            if record.words[0] != record.generation:
                raise record.stale()
            assert len(value) <= size, f"{name} holds {size} bytes, got {len(value)}"
            record._octets[start:end] = value if len(value) == size else value.ljust(size, b"\0")

        return property(get, put, doc=self.lock)


class Part(Field, Generic[P]):
    """A field that is an object over the record's memory: an atomic word, a lock, a completion, an array.

    `build(ram, gpa, name)` makes it; the object keeps no state of its own, so each process may have one.
    """

    def __init__(self, build: Callable[[Ram, int, str], P], size: int, lock: str, align: int = 8) -> None:
        super().__init__(size, align, lock)
        self.build = build

    if TYPE_CHECKING:  # what stands there is the accessor

        def __get__(self, record: Record, owner: type[Record]) -> P: ...

    def accessor(self) -> property:
        """Build the part at its first use in this process; check the generation at every use."""
        offset, build, name = self.offset, self.build, self.name

        def get(record: Record) -> P:
            if record.words[0] != record.generation:
                raise record.stale()
            try:
                # Behind the first time nothing is built: this is the way of nearly every use.
                part: P = record._parts[offset]
            except KeyError:
                table = record.table
                label = f"{table.name}[{record.index}].{name}"
                made = table.ram.variants.get(build, build)
                part = record._parts[offset] = made(table.ram, record.gpa + offset, label)
            return part

        return property(get, doc=self.lock)

    def once(self) -> BuiltOnce[P]:
        """What stands in a permanent class instead of this field."""
        return BuiltOnce(self)


class BuiltOnce(Generic[P]):
    """A part of a permanent record: built at its first use, an attribute of the record's object from then on."""

    __slots__ = ("_part",)

    def __init__(self, part: Part[P]) -> None:
        self._part = part

    def __get__(self, record: Record | None, owner: type[Record]) -> Any:
        """Only the first use comes here: what lies in the object's own dictionary goes before."""
        if record is None:
            return self
        part, table = self._part, record.table
        label = f"{table.name}[{record.index}].{part.name}"
        made = table.ram.variants.get(part.build, part.build)
        value = vars(record)[part.name] = made(table.ram, record.gpa + part.offset, label)
        return value


class Atomic32(Part[AtomicU32]):
    """A 32-bit word that is changed by atomic operations only."""

    def __init__(self, lock: str = "atomic") -> None:
        super().__init__(lambda ram, gpa, name: ram.atomics.cell_u32(gpa), 4, lock, 4)


class Atomic64(Part[AtomicU64]):
    """A 64-bit word that is changed by atomic operations only."""

    def __init__(self, lock: str = "atomic") -> None:
        super().__init__(lambda ram, gpa, name: ram.atomics.cell_u64(gpa), 8, lock, 8)


class Words64(Part[memoryview]):
    """An array of plain u64 words (a memoryview of format "Q")."""

    def __init__(self, count: int, lock: str) -> None:
        super().__init__(lambda ram, gpa, name: ram.words64(gpa, count), 8 * count, lock, 8)


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
            setattr(cls, name, field.once() if permanent and isinstance(field, Part) else field.accessor())
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


def field_of(record_class: type[Record], name: str) -> Field:
    """The field called `name`: offset, size, and the lock that covers it."""
    return next(field for field in record_class.FIELDS if field.name == name)


def position_of(record_class: type[Record], name: str) -> int:
    """Where a plain word called `name` is in `Record.words` (u32) or `Record.quads` (u64).

    For those who come by for every packet: they look at the generation, `words[0]`, once for all fields.
    """
    field = field_of(record_class, name)
    assert isinstance(field, Word) and field.size in (4, 8), f"{record_class.__name__}.{name} is no word"
    return field.offset // field.size


class Fields:
    """Plain fields of one class that lie side by side, written or read in one go: one look at the generation."""

    __slots__ = ("_offset", "_pack_into", "_unpack_from")

    def __init__(self, record_class: type[Record], *names: str) -> None:
        """`names` in the order in which they lie; nothing but padding lies between them."""
        at = self._offset = field_of(record_class, names[0]).offset
        layout = "<"
        for name in names:
            field = field_of(record_class, name)
            assert isinstance(field, Word | Blob), f"{record_class.__name__}.{name} is no plain field"
            assert 0 <= field.offset - at < field.align, f"{record_class.__name__}.{name} is no neighbour"
            layout += f"{field.offset - at}x" if field.offset > at else ""
            layout += f"{field.size}s" if isinstance(field, Blob) else {1: "B", 4: "I", 8: "Q"}[field.size]
            at = field.offset + field.size
        struct = Struct(layout)
        self._pack_into = struct.pack_into
        self._unpack_from = struct.unpack_from

    def write(self, record: Record, *values: Any) -> None:
        """A value for each field (a Blob's is padded with zeros, and cut)."""
        if record.words[0] != record.generation:
            raise record.stale()
        self._pack_into(record._octets, self._offset, *values)

    def read(self, record: Record) -> tuple[Any, ...]:
        """The value of each field."""
        if record.words[0] != record.generation:
            raise record.stale()
        return self._unpack_from(record._octets, self._offset)


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
