"""Guests for tests: kernel tables in memory of their own, and whole worlds."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest

from emu.wire.versions import VERSION_WIN10, VERSION_WIN10_V5_3
from guestproc.kernel.layout import Era, KernelTables
from tests.guestproc.world import World, new_world

RAM_BYTES = 16 << 20
HOST_VERSIONS = {"current": {VERSION_WIN10_V5_3}, "seed": {VERSION_WIN10}}
"""What the scripted host speaks: the newest version of the guest, so that it is had at once."""


@pytest.fixture
def tables() -> KernelTables:
    """The tables of a guest with four CPUs on two nodes, all online, that nobody runs; VP n + 10 is CPU n."""
    tables = KernelTables.format(mmap.mmap(-1, RAM_BYTES), 4, Era.CURRENT, [10, 11, 12, 13])
    tables.connection.nr_numa_nodes = 2
    tables.connection.numa_cpus[0] = 0b0011
    tables.connection.numa_cpus[1] = 0b1100
    for cpu in tables.cpus.live():
        cpu.online.store(1)
    return tables


@pytest.fixture
def era() -> str:
    """The guest's era; a module that holds in both has a fixture of this name with both."""
    return "current"


@pytest.fixture
def world(era: str) -> Iterator[World]:
    """A machine with two CPUs and a scripted host, not booted."""
    with new_world(era=era, versions=HOST_VERSIONS[era]) as made:
        yield made


@pytest.fixture
def booted(world: World) -> World:
    """The same, connected."""
    world.boot()
    return world
