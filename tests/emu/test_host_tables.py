"""The host's tables: registers, GPADLs and ports are read back as they were written, and rows are used again."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu.control import HOST_TABLES_BYTES, MIRROR_CHANNELS, Control
from emu.host_tables import CHUNKS, GPADL_ROWS, SINTS, HostGpadl, HostPartition, HostTables, HostTimer, HostVp, Traffic
from emu.ipc.segments import object_name, unlink_objects
from emu.layout import MAX_VPS

NAME = f"t-host-tables-{os.getpid()}"


@pytest.fixture
def control(machine_name: str) -> Iterator[Control]:
    """A control segment of its own."""
    control = Control.create(object_name(machine_name, "control"), {})
    yield control
    control.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Control]:
    """One for the examples of a property, each of which removes what it wrote."""
    control = Control.create(object_name(NAME, "control"), {})
    yield control
    control.close()
    unlink_objects(NAME)


def vp(number: int) -> HostVp:
    """Registers in which every one is another."""
    timers = tuple(HostTimer(100 + n, 200 + n, number + 300 + n) for n in range(4))
    return HostVp(number, number + 1, number + 2, tuple(range(10, 10 + SINTS)), tuple(range(SINTS)), timers)


def test_registers_of_every_vp_are_read_back(control: Control) -> None:
    """Each VP has its own row, the last one too."""
    tables = HostTables(control)
    for position in range(MAX_VPS):
        tables.write_vp(position, vp(1 << 60 | position))

    assert [HostTables(control).vp(position) for position in range(MAX_VPS)] == [
        vp(1 << 60 | position) for position in range(MAX_VPS)
    ]


def test_unwritten_tables_are_empty(control: Control) -> None:
    """Before the host has written anything there is nothing."""
    tables = HostTables(control)

    assert tables.partition() == HostPartition(0, 0, 0, 0, 0, {})
    assert list(tables.gpadls()) == []
    assert tables.vp(3).sint == (0,) * SINTS


def test_ports_are_read_back(control: Control) -> None:
    """Registers, the port to the guest, and the host's own ports with what waits there."""
    partition = HostPartition(1 << 63, 0x5001, 3, 2, 16, {1: 0, 4: 12})
    HostTables(control).write_partition(partition)

    assert HostTables(control).partition() == partition


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(1, 4), st.dictionaries(st.integers(1, 5), st.integers(0, 4), max_size=4)), max_size=12
    )
)
def test_gpadls_are_those_last_written(shared: Control, steps: list[tuple[int, dict[int, int]]]) -> None:
    """Whatever came and went, each channel has the GPADLs that were written for it last, in one row each."""
    tables = HostTables(shared)
    model: dict[int, list[HostGpadl]] = {}
    for relid, gpadls in steps:
        model[relid] = [HostGpadl(relid, handle, state, 7, handle == 1) for handle, state in gpadls.items()]
        tables.write_gpadls(relid, tuple(model[relid]))
    expected = sorted((one for ones in model.values() for one in ones), key=lambda one: (one.relid, one.gpadl))

    assert list(HostTables(shared).gpadls()) == expected
    for relid in model:
        tables.write_gpadls(relid, ())
    assert list(tables.gpadls()) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 40)), max_size=12))
def test_pages_of_a_gpadl_are_read_back(shared: Control, steps: list[tuple[int, int]]) -> None:
    """However scattered, and whoever had its chunks before: each GPADL has its own pages, in their order."""
    tables = HostTables(shared)
    model: dict[int, HostGpadl] = {}
    for number, (relid, count) in enumerate(steps):
        runs = tuple((1 + number * 100 + 2 * n, 1 + n % 2) for n in range(count))
        model[relid] = HostGpadl(relid, 7, 1, count, False, runs)
        tables.write_gpadls(relid, (model[relid],))

    assert list(HostTables(shared).gpadls()) == [model[relid] for relid in sorted(model)]
    for relid in model:
        tables.write_gpadls(relid, ())


def test_pages_without_room_are_counted(control: Control) -> None:
    """More chunks than there are: the GPADL is there with as many pages as could be told, and its neighbours whole."""
    tables = HostTables(control)
    few, many = ((1, 1),), tuple((2 * n, 1) for n in range(8 * CHUNKS))
    tables.write_gpadls(1, (HostGpadl(1, 1, 2, 1, False, few),))
    tables.write_gpadls(2, (HostGpadl(2, 1, 2, len(many), False, many),))
    tables.write_gpadls(3, (HostGpadl(3, 1, 2, 1, False, few),))

    one, two, three = tables.gpadls()
    assert (one.runs, three.runs, tables.cut) == (few, few, 1)
    assert two.runs == many[: 4 + 7 * CHUNKS]


def test_gpadl_without_a_row_is_counted(control: Control) -> None:
    """A host that has more of them than the table has rows goes on; one that goes leaves its row to another."""
    tables = HostTables(control)
    for relid in range(1, 3):
        tables.write_gpadls(relid, tuple(HostGpadl(relid, n, 2, 1, False) for n in range(GPADL_ROWS // 2)))
    tables.write_gpadls(3, (HostGpadl(3, 1, 2, 1, True),))
    refused = tables.unlisted
    tables.write_gpadls(1, ())
    tables.write_gpadls(4, (HostGpadl(4, 1, 2, 1, True),))
    end = control.host_tables_offset + HOST_TABLES_BYTES

    assert (refused, tables.unlisted) == (1, 1)
    assert [one.relid for one in tables.gpadls()] == [2] * (GPADL_ROWS // 2) + [4]
    assert end <= len(control.memory)


def test_traffic_is_read_back_by_channel(control: Control) -> None:
    """The last relid's row is the last of the table, and its neighbour is another's."""
    HostTables(control).write_traffic(MIRROR_CHANNELS - 1, Traffic(1 << 40, 2, 3))

    assert HostTables(control).traffic(MIRROR_CHANNELS - 1) == Traffic(1 << 40, 2, 3)
    assert HostTables(control).traffic(MIRROR_CHANNELS - 2) == Traffic(0, 0, 0)


def test_watching_ends_by_itself(control: Control) -> None:
    """Who looks says for how long; nobody has to take it back."""
    before = control.watched
    control.watch_for(60_000_000_000)

    assert (before, control.watched) == (False, True)
    control.watch_for(0)
    assert not control.watched
