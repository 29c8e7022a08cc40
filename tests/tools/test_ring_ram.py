"""Which RAM is reserved at launch: that out of which the guest takes the rings of the scenario's devices."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from emu import plugin
from emu.memory import PAGE_SIZE
from emu.plugin import NO_PLUGINS
from emu.scenario import MAX_RING_PAGES, DeviceSpec, MachineSpec, Scenario
from emu.wire.device_classes import CLASSES, DeviceClass
from emu.wire.messages import ChannelFlags
from guestproc.drivers.driver import takes_sockets
from guestproc.drivers.table import BUILT_IN
from guestproc.kernel.layout import Era, KernelTables, boot_pages
from guestproc.kernel.pages import PageOwner
from tests.guestproc.kernel.fakes import Lone
from tools.launch import has_driver, ring_ram

SPECS = st.lists(
    st.tuples(st.integers(1, 6), st.sampled_from([2, 3, 5, 16, 17, 64, 129, 300]), st.integers(0, 2)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(SPECS, st.sampled_from([1, 2, 8, 64]), st.sampled_from(["contiguous", "scattered"]))
@example([(8, 16, 0)], 2, "contiguous")
@example([(8, 16, 0)], 8, "contiguous")
@example([(1, 2, 0), (1, 300, 0), (1, 2, 0), (1, 300, 0)], 2, "contiguous")
@example([(2, 2, 2), (3, 16, 0), (1, 300, 0)], 64, "scattered")
def test_rings_lie_in_what_is_reserved(specs: list[tuple[int, int, int]], vcpus: int, memory: str) -> None:
    """Whatever their sizes and their order, behind the pages that the kernel takes at boot."""
    devices = tuple(
        DeviceSpec(count=count, ring_pages=ring_pages, subchannels=subchannels)
        for count, ring_pages, subchannels in specs
    )
    machine = MachineSpec(vcpus=vcpus, ram_bytes=128 << 20, ring_memory=memory)
    scattered = memory == "scattered"
    assume(sum(spec.ring_bytes(vcpus, scattered=scattered) for spec in devices) <= machine.ring_room)
    gpa, length = ring_ram(Scenario(machine, devices))

    pages = KernelTables.format(mmap.mmap(-1, machine.ram_bytes), vcpus, Era.CURRENT).pages
    actor = Lone().actor
    for _ in range(boot_pages(vcpus)):
        pages.alloc_pages(actor, 0, PageOwner.KERNEL)
    for spec in devices:
        for _ in range(spec.channels(vcpus)):
            count = 2 * spec.ring_pages
            if scattered:
                pages.alloc_pages_exact(actor, -(-8 * count // PAGE_SIZE), PageOwner.RING)
                runs = pages.alloc_scattered(actor, count, PageOwner.RING, seed=1)
            else:
                runs = [pages.alloc_pages_exact(actor, count, PageOwner.RING)]
            assert all(gpa <= run.gpa and run.gpa + run.size <= gpa + length for run in runs)


def test_machine_without_devices_reserves_nothing() -> None:
    """There is no ring to reserve memory for."""
    assert ring_ram(Scenario(MachineSpec(), ()))[1] == 0


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.name)
def test_class_has_a_driver_if_the_table_of_drivers_has_one(kind: DeviceClass) -> None:
    """Of all classes that we know; a driver of sockets takes nothing else, and nobody else takes those."""
    socket = bool(kind.chn_flags & ChannelFlags.TLNPI_PROVIDER_OFFER)
    taken = any(kind.guid.bytes_le in one.id_table and takes_sockets(one) == socket for one in BUILT_IN)

    assert has_driver(kind.name, NO_PLUGINS) == taken


PLUGIN = """
from emu import plugin
from emu.wire.messages import ChannelFlags

LONELY = plugin.device_class("lonely", guid="9d1b1ee9-4a31-4a3e-8c43-6d1f0a0c5a01")
TAKEN = plugin.device_class("taken", guid="9d1b1ee9-4a31-4a3e-8c43-6d1f0a0c5a02")
SOCKET = plugin.device_class(
    "socket", guid="9d1b1ee9-4a31-4a3e-8c43-6d1f0a0c5a03", flags=ChannelFlags.TLNPI_PROVIDER_OFFER
)

@plugin.driver
class Takes:
    name = "takes"
    id_table = plugin.ids(TAKEN, SOCKET)

    def probe(self, current, device):
        return 0

    def remove(self, current, device):
        pass
"""


@pytest.mark.parametrize(("class_name", "rings"), [("lonely", 0), ("taken", 3), ("socket", 0), ("hv_sock", 0)])
def test_rings_that_no_driver_will_open_are_not_reserved(tmp_path: Path, class_name: str, rings: int) -> None:
    """A plugin's class without a driver, and sockets; what is beside them is reserved as if it were alone."""
    (tmp_path / "classes.py").write_text(PLUGIN)
    plugins = plugin.load([tmp_path / "classes.py"])
    alone = ring_ram(Scenario(MachineSpec(), (DeviceSpec(),), plugins=plugins))
    both = ring_ram(Scenario(MachineSpec(), (DeviceSpec(), DeviceSpec(class_name, count=3)), plugins=plugins))

    assert both == (alone[0], alone[1] + rings * 32 * PAGE_SIZE)


@pytest.mark.parametrize("vcpus", [1, 8])
def test_no_more_is_reserved_than_rings_of_one_size_take(vcpus: int) -> None:
    """Their blocks lie side by side; so it is with one of 32 MiB."""
    many, large = (DeviceSpec(count=1_000),), (DeviceSpec(ring_pages=MAX_RING_PAGES),)

    assert ring_ram(Scenario(MachineSpec(vcpus=vcpus), many))[1] == 1_000 * 32 * PAGE_SIZE
    assert ring_ram(Scenario(MachineSpec(vcpus=vcpus), large))[1] == 32 << 20
