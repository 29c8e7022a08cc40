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

from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from emu.ipc.atomics import AtomicU32, AtomicU64
from guestproc.kernel.record_tables import (
    INDEX_MASK,
    POISON,
    RECORD_HEADER_SIZE,
    Field,
    Ram,
    Record,
    Reserve,
    Table,
    always_there,
    blob_property,
    part_property,
    word_property,
)

__all__ = [
    "INDEX_MASK",
    "POISON",
    "RECORD_HEADER_SIZE",
    "Atomic32",
    "Atomic64",
    "Blob",
    "Field",
    "Fields",
    "Part",
    "Ram",
    "Record",
    "Reserve",
    "Table",
    "Word",
    "Words64",
    "always_there",
    "field_of",
    "position_of",
]

P = TypeVar("P")


class Word(Field):
    """A plain unsigned integer of 1, 4 or 8 bytes; not atomic, so a lock or a publication covers it."""

    def __init__(self, size: int, lock: str) -> None:
        assert size in (1, 4, 8)
        super().__init__(size, size, lock)

    if TYPE_CHECKING:  # what stands there is the accessor

        def __get__(self, record: Record, owner: type[Record]) -> int: ...

        def __set__(self, record: Record, value: int) -> None: ...

    def attribute(self, permanent: bool) -> property:
        """Read and write one element of the record's memory, generation first."""
        return word_property(self.offset // self.size, self.size, self.lock)


class Blob(Field):
    """A fixed number of bytes, read as `bytes`; a shorter value is padded with zeros, a longer refused."""

    def __init__(self, size: int, lock: str) -> None:
        super().__init__(size, 8, lock)

    if TYPE_CHECKING:  # what stands there is the accessor

        def __get__(self, record: Record, owner: type[Record]) -> bytes: ...

        def __set__(self, record: Record, value: bytes) -> None: ...

    def attribute(self, permanent: bool) -> property:
        """Copy the bytes out, or in."""
        return blob_property(self.offset, self.size, self.name, self.lock)


class Part(Field, Generic[P]):
    """A field that is an object over the record's memory: an atomic word, a lock, a completion, an array.

    `build(ram, gpa, name)` makes it; the object keeps no state of its own, so each process may have one.
    """

    def __init__(self, build: Callable[[Ram, int, str], P], size: int, lock: str, align: int = 8) -> None:
        super().__init__(size, align, lock)
        self.build = build

    if TYPE_CHECKING:  # what stands there is the accessor

        def __get__(self, record: Record, owner: type[Record]) -> P: ...

    def attribute(self, permanent: bool) -> BuiltOnce[P] | property:
        """Build the part at its first use in this process; check the generation at every use.

        In a permanent class nothing has to be checked: there it is built once.
        """
        if permanent:
            return BuiltOnce(self)
        return part_property(self.offset, self.name, self.build, self.lock)


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
        value = vars(record)[part.name] = part.build(table.ram, record.gpa + part.offset, label)
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
