"""Records in guest RAM: names that go stale are noticed, and so are writes into what is free."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.errors import OutOfMemory
from guestproc.kernel.actors import Actor
from guestproc.kernel.record_tables import TABLE_HEADER_SIZE
from guestproc.kernel.records import (
    POISON,
    RECORD_HEADER_SIZE,
    Atomic32,
    Atomic64,
    Blob,
    Ram,
    Record,
    Table,
    Word,
    Words64,
    field_of,
    position_of,
)
from tests.guestproc.kernel.fakes import FREE_GPA, Crowd, meddle

GPA = 0x1000


class Sample(Record):
    """One field of each kind."""

    small = Word(1, "lock")
    word = Word(4, "lock")
    wide = Word(8, "lock")
    flag = Atomic32()
    count = Atomic64()
    name = Blob(20, "lock")
    array = Words64(3, "lock")


def new_table(capacity: int = 4) -> Table[Sample]:
    """A table of a few samples."""
    return Table(Ram(bytearray(1 << 16)), "samples", Sample, GPA, capacity)


def take(table: Table[Sample]) -> Sample:
    """The next free record."""
    record = table.alloc()
    assert record is not None
    return record


def test_fields_lie_in_order_aligned_and_apart() -> None:
    """Each field is aligned to its own size, begins behind the one before it, and fits the record."""
    end = RECORD_HEADER_SIZE
    for field in Sample.FIELDS:
        assert field.offset % min(field.align, 8) == 0
        assert field.offset >= end
        end = field.offset + field.size

    assert [field.name for field in Sample.FIELDS] == [
        "small",
        "word",
        "wide",
        "flag",
        "count",
        "name",
        "array",
    ]
    assert end <= Sample.SIZE and Sample.SIZE % 64 == 0


def test_every_kind_of_field_lies_in_ram_where_the_layout_says() -> None:
    """What is written through a record is found at its field's offset, and nowhere else."""
    table = new_table()
    record = take(table)

    record.small, record.word, record.wide = 0x11, 0x22334455, 0x66778899AABBCCDD
    record.flag.store(0x12345678)
    record.count.store(0x1122334455667788)
    record.name = b"GUID"
    record.array[1] = 7

    def raw(name: str) -> bytes:
        field = field_of(Sample, name)
        return bytes(table.ram.octets[record.gpa + field.offset :][: field.size])

    assert raw("small") == b"\x11"
    assert raw("word") == bytes.fromhex("55443322")
    assert raw("wide") == bytes.fromhex("ddccbbaa99887766")
    assert raw("flag") == bytes.fromhex("78563412")
    assert raw("count") == bytes.fromhex("8877665544332211")
    assert raw("name") == b"GUID" + bytes(16) == record.name
    assert raw("array") == bytes(8) + b"\x07" + bytes(15)
    assert (record.small, record.word, record.wide) == (0x11, 0x22334455, 0x66778899AABBCCDD)


def test_a_word_is_found_by_its_position() -> None:
    """In the words of the record itself, for who looks at the generation once; what is no word has none."""
    record = take(new_table())
    record.word, record.wide = 0x11223344, 0x1122334455667788

    assert record.words[0] == record.generation
    assert record.words[position_of(Sample, "word")] == 0x11223344
    assert record.quads[position_of(Sample, "wide")] == 0x1122334455667788
    for name in ("name", "flag", "small"):
        with pytest.raises(AssertionError, match="is no word"):
            position_of(Sample, name)


def test_a_blob_refuses_what_does_not_fit() -> None:
    """A value longer than its field would run into the next one."""
    record = take(new_table())

    with pytest.raises(AssertionError, match="name holds 20 bytes, got 21"):
        record.name = bytes(21)


@pytest.mark.parametrize("name", ["small", "word", "wide", "flag", "count", "name", "array"])
def test_a_stale_name_is_noticed_at_each_access(name: str) -> None:
    """Reading a field of a record that was freed and taken again names table, index and both generations."""
    table = new_table()
    old = take(table)
    getattr(old, name)
    table.free(old)
    new = take(table)
    assert new.index == old.index

    with pytest.raises(AssertionError, match=r"samples\[0\]: stale, generation 1 was used but 3 is there"):
        getattr(old, name)


@pytest.mark.parametrize(("name", "value"), [("small", 1), ("word", 1), ("wide", 1), ("name", b"x")])
def test_a_stale_name_writes_nothing(name: str, value: int | bytes) -> None:
    """A write through a name that outlived its record is refused and changes nothing."""
    table = new_table()
    old = take(table)
    table.free(old)
    take(table)
    before = bytes(table.ram.octets)

    with pytest.raises(AssertionError, match="stale"):
        setattr(old, name, value)
    assert bytes(table.ram.octets) == before


def test_a_new_record_is_zero() -> None:
    """Whatever the record before it held, a record is all zeros when it is taken."""
    table = new_table()
    old = take(table)
    old.word, old.name = 5, b"something"
    table.free(old)

    new = take(table)

    assert (new.word, new.name, new.flag.load()) == (0, bytes(20), 0)


def test_a_freed_record_is_poisoned() -> None:
    """Behind the header every byte of a freed record is the poison."""
    table = new_table()
    record = take(table)

    table.free(record)

    body = table.ram.octets[record.gpa + RECORD_HEADER_SIZE : record.gpa + table.record_size]
    assert set(body) == {POISON}


def test_a_write_into_a_free_record_is_found() -> None:
    """The next allocation of the record, or a look at all of them, says which byte was written."""
    table = new_table()
    record = take(table)
    table.free(record)
    table.ram.octets[record.gpa + 40] = 1

    assert table.damage() == ["samples[0]: written while free, byte 40 is 0x01 instead of 0x6b"]
    with pytest.raises(AssertionError, match="byte 40 is 0x01 instead of 0x6b"):
        table.alloc()


def test_a_write_into_a_record_that_was_never_taken_is_found() -> None:
    """Records that nobody had yet are zero, and stay so."""
    table = new_table()
    table.ram.octets[table.record_gpa(0) + 16] = 9

    with pytest.raises(AssertionError, match="byte 16 is 0x09 instead of 0x00"):
        table.alloc()


def test_freeing_twice_is_noticed() -> None:
    """The second free of the same name finds another generation."""
    table = new_table()
    record = take(table)
    table.free(record)

    with pytest.raises(AssertionError, match="stale"):
        table.free(record)


def test_a_full_table_refuses_and_counts() -> None:
    """Capacity is a bound: the allocation beyond it gives None, and is counted."""
    table = new_table(2)
    first, second = take(table), take(table)

    assert table.alloc() is None
    assert (table.refusals, table.in_use) == (1, 2)
    table.free(first)
    table.free(second)
    assert table.in_use == 0


def test_a_handle_names_a_record_as_long_as_it_lives() -> None:
    """(generation, index + 1) in one word finds the record, and nothing once it is freed."""
    table = new_table()
    take(table)
    record = take(table)
    handle = record.handle

    assert handle == 1 << 32 | 2
    assert table.from_handle(handle) is record
    assert table.find(handle) is record
    table.free(record)
    assert table.find(handle) is None
    assert table.find(0) is None
    with pytest.raises(AssertionError, match="stale"):
        table.from_handle(handle)


def test_a_free_record_cannot_be_looked_up() -> None:
    """An index alone finds only what is allocated."""
    table = new_table()
    table.free(take(table))

    with pytest.raises(AssertionError, match=r"samples\[0\]: stale"):
        table.at(0)
    with pytest.raises(AssertionError, match=r"samples\[1\]: stale"):
        table.at(1)


def test_two_tables_on_the_same_memory_agree() -> None:
    """All state is in RAM: another process's objects see what the first did."""
    ram = Ram(bytearray(1 << 16))
    here, there = (Table(ram, "samples", Sample, GPA, 4) for _ in range(2))
    record = take(here)
    record.word = 77

    assert there.at(0).word == 77
    there.free(there.at(0))
    assert not record.alive()
    assert take(there).index == 0


def test_a_field_name_that_every_record_has_is_refused() -> None:
    """A field called `generation` would hide the record's own."""
    with pytest.raises(AssertionError, match="every record has that already"):

        class Bad(Record):
            """Hides a name."""

            gpa = Word(4, "lock")  # type: ignore[misc]


@given(st.lists(st.integers(0, 9), max_size=60))
def test_allocation_matches_a_model(choices: list[int]) -> None:
    """Whatever is taken and given back, live records are distinct, counted, and found by their handles."""
    table = new_table(6)
    live: dict[int, Sample] = {}
    for number, choice in enumerate(choices):
        if choice < 5:
            record = table.alloc()
            assert (record is None) == (len(live) == 6)
            if record is not None:
                assert record.handle not in live
                record.word = number
                live[record.handle] = record
        elif live:
            handle = sorted(live)[choice % len(live)]
            table.free(live.pop(handle))
            assert table.find(handle) is None

    assert table.in_use == len(live)
    assert {record.handle for record in table.live()} == set(live)
    assert len({record.index for record in live.values()}) == len(live)
    assert not table.damage()


def test_a_record_that_went_and_came_back_in_between_is_noticed() -> None:
    """The head of the free list looks the same as before, but the link behind it is not: the tag tells."""
    ram = Ram(bytearray(1 << 16))
    here, there = (Table(ram, "samples", Sample, GPA, 4) for _ in range(2))
    first, second = take(here), take(here)
    here.free(second)
    here.free(first)
    theirs: list[Sample] = []

    def take_two_and_give_one_back() -> None:
        again = take(there)
        theirs.append(take(there))
        there.free(again)

    meddle(here, "_head", take_two_and_give_one_back)
    mine = [take(here), take(here)]

    assert len({record.index for record in mine + theirs}) == 3


def hammer_table(rounds: int) -> None:
    """Two processes take and free records of one small table, and write their number into what they have."""
    crowd = Crowd(2)

    def part(actor: Actor) -> None:
        table = Table(crowd.ram, "samples", Sample, FREE_GPA, 5)
        chance = random.Random(actor.number)
        mine: list[Sample] = []
        for _ in range(rounds):
            if len(mine) < 3 and chance.random() < 0.6:
                record = table.alloc()
                if record is not None:
                    record.word = actor.number
                    mine.append(record)
            elif mine:
                record = mine.pop(chance.randrange(len(mine)))
                assert record.word == actor.number, "somebody else has this record too"
                table.free(record)
        for record in mine:
            table.free(record)

    crowd.run(part, part)
    table = Table(crowd.ram, "samples", Sample, FREE_GPA, 5)
    assert table.in_use == 0
    assert not table.damage()
    assert len([table.alloc() for _ in range(5)]) == 5
    assert table.alloc() is None


def test_two_processes_never_have_one_record() -> None:
    """The free list survives two processes at once: no record is had twice, none is lost."""
    hammer_table(10_000)


@pytest.mark.soak
def test_two_processes_never_have_one_record_for_long() -> None:
    """The same, long enough for the rare orders."""
    hammer_table(200_000)


def test_a_table_takes_the_room_it_says() -> None:
    """Header and records, and nothing behind them."""
    table = new_table(3)

    assert Table.footprint(Sample, 3) == TABLE_HEADER_SIZE + 3 * Sample.SIZE
    assert table.record_gpa(3) == GPA + Table.footprint(Sample, 3)


def test_record_without_memory_behind_it_is_one_less() -> None:
    """Where the tmpfs is full a fresh record is refused and counted; one that was there before is taken again.

    So is one that lies on the same page as another that was taken.
    """
    table = new_table(64)
    asked: list[tuple[int, int]] = []
    table.ram.reserve = lambda gpa, length: asked.append((gpa, length))
    whole = (2 * GPA - table.record_gpa(0)) // Sample.SIZE
    old = [take(table) for _ in range(whole)][0]
    assert asked == [(table.record_gpa(0), whole * Sample.SIZE)]

    def full(_gpa: int, _length: int) -> None:
        raise OutOfMemory("no pages")

    table.ram.reserve = full
    assert (table.alloc(), table.refusals, table.in_use) == (None, 1, whole)
    table.free(old)
    assert take(table).index == old.index
