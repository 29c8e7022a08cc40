"""A guest kernel's records, made by hand: what the tests of the sysfs tree let it show."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID

from emu.control import ActorKind
from emu.ipc.segments import unlink_objects
from emu.layout import MachineState
from emu.machine import Machine
from emu.wire.device_classes import BY_NAME
from emu.wire.ring_layout import INTERRUPT_MASK, READ_INDEX, WRITE_INDEX
from guestproc.kernel.layout import Channel, ChannelState, Device, Era, KernelTables

RAM_BYTES = 64 << 20
RINGS_GPA = RAM_BYTES - (1 << 20)
"""Pages at the end of RAM, which nobody else has."""


@dataclass
class Guest:
    """The tables of a guest that never runs."""

    tables: KernelTables

    def driver(self, number: int, name: str) -> None:
        """Register a driver."""
        record = self.tables.drivers.alloc()
        assert record is not None
        record.number = number
        record.name = name.encode()

    def channel(self, relid: int, *, cpu: int = 0, instance: int = 0) -> Channel:
        """An open channel."""
        channel = self.tables.channels.alloc()
        assert channel is not None
        channel.relid = relid
        channel.if_instance = UUID(int=instance).bytes_le
        channel.target_cpu.store(cpu)
        channel.state.store(ChannelState.OPENED_STATE)
        return channel

    def sub_channel(self, primary: Channel, relid: int, index: int, *, cpu: int = 0) -> Channel:
        """A sub-channel, behind those that the primary has."""
        channel = self.channel(relid, cpu=cpu)
        channel.primary_channel = primary.handle
        channel.sub_channel_index = index
        self.tables.sc_list(primary).append(channel)
        return channel

    def device(
        self, relid: int, instance: int, class_name: str = "echo", *, driver: int = 0, cpu: int = 0
    ) -> tuple[Device, Channel]:
        """A device and its primary channel."""
        channel = self.channel(relid, cpu=cpu, instance=instance)
        device = self.tables.devices.alloc()
        assert device is not None
        device.channel = channel.handle
        device.driver = driver
        device.vendor_id = 0x1414
        device.device_id = BY_NAME[class_name].number
        device.dev_type = BY_NAME[class_name].guid.bytes_le
        device.dev_instance = UUID(int=instance).bytes_le
        channel.device_obj = device.handle
        return device, channel

    def remove(self, device: Device) -> None:
        """Take a device and its channel away, the channel first, as the guest does."""
        self.tables.channels.free(self.tables.channels.from_handle(device.channel))
        self.tables.devices.free(device)

    def rings(self, channel: Channel, *, scattered: bool = False, pages: int = 4) -> tuple[int, int]:
        """Give a channel rings of so many pages each; where the two control pages lie."""
        channel.ring_send_pages = channel.ring_recv_pages = pages
        channel.ring_gpa = RINGS_GPA
        if not scattered:
            return RINGS_GPA, RINGS_GPA + pages * 4096
        places = [RINGS_GPA + 8192 * (number + 1) for number in range(2 * pages)]
        for number, place in enumerate(places):
            self.store(RINGS_GPA + 8 * number, place >> 12, 8)
        channel.ring_pfns_gpa = RINGS_GPA
        channel.ring_gpa = places[0]
        return places[0], places[pages]

    def ring_words(self, gpa: int, *, write: int, read: int, mask: int) -> None:
        """Write a ring's indices and mask."""
        for offset, value in ((WRITE_INDEX, write), (READ_INDEX, read), (INTERRUPT_MASK, mask)):
            self.store(gpa + offset, value)

    def store(self, gpa: int, value: int, size: int = 4) -> None:
        """Write one word of RAM."""
        self.tables.ram.octets[gpa : gpa + size] = value.to_bytes(size, "little")


def new_guest(era: Era = Era.CURRENT, ncpus: int = 4) -> Guest:
    """A guest in RAM of its own."""
    return Guest(KernelTables.format(mmap.mmap(-1, RAM_BYTES), ncpus, era))


@contextmanager
def idle_machine(name: str, *, launched: bool = True) -> Iterator[Machine]:
    """A machine with nothing running in it; if it is `launched`, this process stands as its launcher."""
    machine = Machine.create(
        f"test-{os.getpid()}-{name}", {"no_guest": False}, ram_bytes=RAM_BYTES, vp_indices=[0, 1], cpuid=[]
    )
    try:
        if launched:
            machine.control.enlist(ActorKind.LAUNCHER, "launcher")
        machine.set_state(MachineState.RUNNING)
        yield machine
    finally:
        unlink_objects(machine.name)
        machine.close()


def guest_of(machine: Machine, era: Era = Era.CURRENT) -> Guest:
    """A guest of ours in that machine's RAM."""
    return Guest(KernelTables.format(mmap.mmap(machine.ram.fd, machine.ram.size), machine.vp_count, era))
