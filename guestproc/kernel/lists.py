"""Doubly linked lists of records, the kernel's `list_head`, and a hash of records by a GUID.

A `ListHead` lies in the record that owns the list, a `ListLink` in every record that may be on it; both hold
two u32s, (first, last) and (next, previous), each an index + 1 of one table, 0 for none. The lock of the list
covers both; nothing here is atomic. A record knows whether it is on a list, so taking it off twice, or
putting it on twice, is an assertion.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Generic, TypeVar

from guestproc.kernel.records import Part, Ram, Record, Table, field_of

R = TypeVar("R", bound=Record)

OFF_LIST: Final = 0
LAST: Final = 0xFFFFFFFF
"""Stands in a link instead of an index: on a list, and nobody behind (or before) it. 0 means on no list."""


class ListHead:
    """First and last of a list (index + 1, 0: the list is empty)."""

    SIZE: Final = 8

    __slots__ = ("name", "words")

    def __init__(self, ram: Ram, gpa: int, name: str) -> None:
        self.words: Final = ram.words32(gpa, 2)
        self.name: Final = name


class ListLink:
    """Next and previous of a record on a list (index + 1, LAST at the ends, 0 when it is on none)."""

    SIZE: Final = 8

    __slots__ = ("words",)

    def __init__(self, ram: Ram, gpa: int, name: str) -> None:
        self.words: Final = ram.words32(gpa, 2)


class RecordList(Generic[R]):
    """The list at `head` of records of `table`, linked through their field called `link`."""

    def __init__(self, head: ListHead, table: Table[R], link: str) -> None:
        self.name: Final = head.name
        self._head: Final = head.words
        self._table: Final = table
        field = field_of(table.record_class, link)
        self._word: Final = field.offset // 4

    def __iter__(self) -> Iterator[R]:
        """First to last; the record that was just given may be taken off (`list_for_each_entry_safe`)."""
        position = self._head[0]
        while position and position != LAST:
            record = self._table.at(position - 1)
            position = record.words[self._word]
            yield record

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def empty(self) -> bool:
        """Whether nothing is on it."""
        return not self._head[0]

    def contains(self, record: R) -> bool:
        """Whether the record is on a list of this kind (its link says so, not which list)."""
        return bool(self._links(record)[self._word] != OFF_LIST)

    def first(self) -> R | None:
        """The first record, None if the list is empty."""
        position = self._head[0]
        return self._table.at(position - 1) if position else None

    def append(self, record: R) -> None:
        """`list_add_tail`."""
        words = self._links(record)
        word, position, last = self._word, record.index + 1, self._head[1]
        assert words[word] == OFF_LIST, f"{record} is on a list already, not also on {self.name}"
        words[word] = LAST
        words[word + 1] = last or LAST
        if last:
            self._table.at(last - 1).words[word] = position
        else:
            self._head[0] = position
        self._head[1] = position

    def remove(self, record: R) -> None:
        """`list_del`."""
        words = self._links(record)
        word = self._word
        following, previous = words[word], words[word + 1]
        assert following != OFF_LIST, f"{record} is not on {self.name}"
        if following == LAST:
            self._head[1] = 0 if previous == LAST else previous
        else:
            self._table.at(following - 1).words[word + 1] = previous
        if previous == LAST:
            self._head[0] = 0 if following == LAST else following
        else:
            self._table.at(previous - 1).words[word] = following
        words[word] = words[word + 1] = OFF_LIST

    def _links(self, record: R) -> memoryview:
        if not record.alive():
            raise record.stale()
        return record.words


class GuidHash(Generic[R]):
    """Records by a 16-byte GUID: `buckets` u32 chain heads at `gpa`, chained through the u32 field `link`.

    The kernel walks `chn_list` for the instance of an offer; so that a walk does not grow with the number of
    channels, we keep this beside it, under the same lock. Several records may have one GUID (a primary and
    its sub-channels): `find` gives all of them, newest first.
    """

    def __init__(self, ram: Ram, gpa: int, buckets: int, table: Table[R], guid: str, link: str) -> None:
        self._heads: Final = ram.words32(gpa, buckets)
        self._buckets: Final = buckets
        self._table: Final = table
        at = field_of(table.record_class, guid).offset
        self._guid: Final = slice(at, at + 16)
        self._link: Final = field_of(table.record_class, link).offset // 4

    def find(self, guid: bytes) -> Iterator[R]:
        """Every record with this GUID; the one just given may be removed."""
        position = self._heads[self._bucket(guid)]
        while position:
            record = self._table.at(position - 1)
            position = record.words[self._link]
            if record._octets[self._guid] == guid:
                yield record

    def add(self, record: R) -> None:
        """Make the record findable by the GUID that is in it now."""
        bucket = self._bucket(bytes(record._octets[self._guid]))
        record.words[self._link] = self._heads[bucket]
        self._heads[bucket] = record.index + 1

    def remove(self, record: R) -> None:
        """Make it unfindable; its GUID must be the one it was added with."""
        bucket = self._bucket(bytes(record._octets[self._guid]))
        words, at = self._heads, bucket
        while words[at] != record.index + 1:
            assert words[at], f"{record} is not in the hash of its GUID"
            words, at = self._table.at(words[at] - 1).words, self._link
        words[at] = record.words[self._link]
        record.words[self._link] = 0

    def _bucket(self, guid: bytes) -> int:
        # GUIDs of one machine differ in the first or in the last bytes: both halves count.
        low, high = int.from_bytes(guid[:8], "little"), int.from_bytes(guid[8:], "big")
        return (low ^ low >> 32 ^ high * 0x9E3779B1) % self._buckets


def list_head(lock: str) -> Part[ListHead]:
    """The head of a list as a field of its owner."""
    return Part(ListHead, ListHead.SIZE, lock)


def list_link(lock: str) -> Part[ListLink]:
    """A record's place in a list as a field."""
    return Part(ListLink, ListLink.SIZE, lock)
