"""The table of tables: where everything lies, and that every process agrees on it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.errors import OutOfMemory
from emu.layout import RAM_HEAD_BYTES
from guestproc.kernel.actors import Actor
from guestproc.kernel.layout import (
    BOOT_MAGIC,
    BOOT_RECORD_GPA,
    FIRST_GPADL_HANDLE,
    MAX_CHANNEL_RELIDS,
    TABLES,
    Channel,
    Era,
    KernelTables,
    TableSpec,
    compute,
)
from guestproc.kernel.pages import PAGE_SIZE, PageOwner, owned_by
from guestproc.kernel.records import RECORD_HEADER_SIZE
from guestproc.kernel.workqueue import QueueNumber
from tests.guestproc.kernel.fakes import LoneHooks

RAM_BYTES = 16 << 20


@pytest.fixture
def tables() -> KernelTables:
    """A formatted machine of 4 CPUs whose VPs are numbered in reverse."""
    return KernelTables.format(bytearray(RAM_BYTES), 4, Era.CURRENT, [3, 2, 1, 0])


def new_channel(tables: KernelTables, relid: int) -> Channel:
    """A channel that has a relid and is nowhere yet."""
    channel = tables.channels.alloc()
    assert channel is not None
    channel.relid = relid
    return channel


@pytest.mark.parametrize("spec", TABLES, ids=lambda spec: spec.name)
def test_every_field_lies_apart_and_says_what_covers_it(spec: TableSpec) -> None:
    """No two fields of a record overlap, atomic words are aligned, and none is without a rule."""
    record_class = spec.record_class
    end = RECORD_HEADER_SIZE
    for field in record_class.FIELDS:
        assert field.offset >= end and field.offset % field.align == 0
        assert field.lock
        end = field.offset + field.size
    assert end <= record_class.SIZE


@given(st.integers(4_000, 300_000), st.integers(1, 64))
def test_tables_never_overlap(pages: int, ncpus: int) -> None:
    """Whatever the machine's size: boot record, tables, free pages, in this order and apart."""
    layout = compute(pages * PAGE_SIZE, ncpus)

    end = BOOT_RECORD_GPA + PAGE_SIZE
    for placement in layout.tables.values():
        assert placement.gpa >= end and placement.gpa % PAGE_SIZE == 0
        end = placement.gpa + placement.nbytes
    assert end <= layout.first_free_page * PAGE_SIZE < layout.ram_bytes


def test_boot_record_lies_where_ram_has_memory_from_the_launch() -> None:
    """Who looks whether RAM is laid out needs no memory for it."""
    assert BOOT_RECORD_GPA + PAGE_SIZE <= RAM_HEAD_BYTES


def test_ram_that_holds_no_tables_is_refused() -> None:
    """With the numbers."""
    with pytest.raises(OutOfMemory, match=r"tables need \d+ bytes of RAM, the machine has 1048576"):
        compute(1 << 20, 1)


def test_another_process_sees_what_was_formatted() -> None:
    """CPUs with their VP indices, the queues, the first GPADL handle, the free pages, the era."""
    ram = bytearray(RAM_BYTES)
    here = KernelTables.format(ram, 3, Era.SEED, [2, 0, 1])

    there = KernelTables.attach(ram)

    assert there.layout == here.layout and there.era is Era.SEED
    assert [cpu.vp_index for cpu in there.cpus.live()] == [2, 0, 1]
    assert [queue.index for queue in there.queues.live()] == list(QueueNumber)
    assert there.connection.next_gpadl_handle.load() == FIRST_GPADL_HANDLE
    assert there.pages.free_pages == here.layout.end_page - here.layout.first_free_page
    assert there.leaks() == {} and there.damage() == []


def test_a_foreign_guests_ram_is_not_ours() -> None:
    """Its boot record is zero."""
    with pytest.raises(AssertionError, match="no guest kernel of ours"):
        KernelTables.attach(bytearray(RAM_BYTES))


def test_ram_laid_out_by_other_code_is_noticed() -> None:
    """A placement or a version that differs would make every field another one."""
    ram = bytearray(RAM_BYTES)
    KernelTables.format(ram, 2, Era.CURRENT)
    assert int.from_bytes(ram[BOOT_RECORD_GPA : BOOT_RECORD_GPA + 8], "little") == BOOT_MAGIC

    other = bytearray(ram)
    other[BOOT_RECORD_GPA + 8] += 1
    with pytest.raises(AssertionError, match="layout version 2, this code 1"):
        KernelTables.attach(other)
    other = bytearray(ram)
    other[BOOT_RECORD_GPA + 0x80] ^= 1
    with pytest.raises(AssertionError, match="laid out by other code"):
        KernelTables.attach(other)


def test_ram_is_formatted_once(tables: KernelTables) -> None:
    """A second kernel on the same RAM would wipe the first."""
    with pytest.raises(AssertionError, match="laid out already"):
        KernelTables.format(tables.ram.buffer, 4, Era.CURRENT)


def test_a_published_relid_leads_to_its_channel(tables: KernelTables) -> None:
    """Until it is unpublished; a relid is had by one channel at a time."""
    channel, other = new_channel(tables, 7), new_channel(tables, 7)
    tables.relids.publish(channel)

    assert tables.relids.lookup(7) is channel
    assert tables.relids.published() == {7: channel.handle}
    with pytest.raises(AssertionError, match="relid 7 is taken"):
        tables.relids.publish(other)
    with pytest.raises(AssertionError, match="was not"):
        tables.relids.unpublish(other)

    tables.relids.publish(new_channel(tables, MAX_CHANNEL_RELIDS - 1))
    tables.relids.unpublish(channel)
    assert tables.relids.lookup(7) is None


@pytest.mark.parametrize("relid", [-1, 0, 9, MAX_CHANNEL_RELIDS, 0xFFFFFFFF])
def test_a_relid_without_a_channel_leads_nowhere(tables: KernelTables, relid: int) -> None:
    """Also one that the host made up."""
    assert tables.relids.lookup(relid) is None


def test_a_channel_that_was_freed_is_not_found(tables: KernelTables) -> None:
    """A look-up that read the word just before it was cleared finds another generation."""
    channel = new_channel(tables, 5)
    tables.relids.publish(channel)
    tables.channels.free(channel)

    assert tables.relids.lookup(5) is None


def test_sub_channels_hang_on_their_primary(tables: KernelTables) -> None:
    """sc_list, chn_list and the hash of instances are the same for every process."""
    primary, sub = new_channel(tables, 1), new_channel(tables, 2)
    for channel in (primary, sub):
        channel.if_instance = b"instance".ljust(16)
        tables.instances.add(channel)
    tables.chn_list.append(primary)
    tables.sc_list(primary).append(sub)
    sub.primary_channel = primary.handle
    tables.chan_list(tables.cpus.at(2)).append(sub)

    other = KernelTables.attach(tables.ram.buffer)
    found = other.channels.from_handle(other.channels.at(sub.index).primary_channel)

    assert [channel.relid for channel in other.chn_list] == [1]
    assert [channel.relid for channel in other.sc_list(found)] == [2]
    assert [channel.relid for channel in other.chan_list(other.cpus.at(2))] == [2]
    assert {channel.relid for channel in other.instances.find(b"instance".ljust(16))} == {1, 2}


def test_what_was_not_given_back_is_a_leak(tables: KernelTables) -> None:
    """Records by table, pages by owner."""
    new_channel(tables, 1)
    assert tables.work_queues.allocate(1) is not None
    actor = Actor(0x1001, LoneHooks(), tables.waiters)
    tables.pages.alloc_pages_exact(actor, 3, owned_by(PageOwner.RING, 9))

    assert tables.leaks() == {"channels": 1, "work": 1, "RING[9]": 3}


def test_a_worker_that_sleeps_is_no_leak(tables: KernelTables) -> None:
    """Its waiter record is in use as long as its queue is empty; any other waiter that is left is one."""
    hooks = LoneHooks()
    actor = Actor(0x1001, hooks, tables.waiters)
    found: list[dict[str, int]] = []

    def look_around() -> None:
        found.append(tables.leaks())
        stranger = tables.waiters.alloc()
        assert stranger is not None
        stranger.actor = 0x1002
        found.append(tables.leaks())
        hooks.stop = True

    hooks.meanwhile.append(look_around)
    assert tables.work_queues.take(actor, QueueNumber.WORK) is None

    assert found == [{}, {"waiters": 1}]


def test_locks_are_named_after_what_they_cover(tables: KernelTables) -> None:
    """A report must say which channel's lock it is."""
    channel = new_channel(tables, 1)

    assert channel.sched_lock.name == "channels[0].sched_lock"
    assert re.fullmatch(r"connection\[0\]\.channel_mutex", tables.connection.channel_mutex.name)
