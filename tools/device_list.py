"""The devices of a running machine, as a snapshot taken from outside, without stopping or locking anything.

Of our own guest it reads the guest kernel's records in RAM: what its sysfs shows. Of somebody else's guest
only the host's side is known, so there the processor is the VP that the guest asked for.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from emu import plugin
from emu.errors import DeadlinePassed
from emu.ipc.atomics import ACQUIRE
from emu.machine import Machine
from emu.mirror import Mirror, MirrorChannel
from emu.wire.device_classes import class_of, lsvmbus_text
from guestproc.kernel.layout import BOOT_MAGIC, BOOT_RECORD_GPA, Channel, ChannelState, Device, KernelTables
from hostproc.protocol.states import ChannelState as HostChannelState

SYSFS_DEVICES: Final = "/sys/bus/vmbus/devices"
ATTEMPTS: Final = 100


@dataclass(frozen=True, slots=True)
class ListedChannel:
    """One channel: `cpu` is the guest's CPU number, of a foreign guest the VP index."""

    relid: int
    cpu: int
    sub_channel_index: int
    state: str


@dataclass(frozen=True, slots=True)
class ListedDevice:
    """One device, named by its primary channel's relid; `driver` is empty while it is unbound or unknown."""

    relid: int
    class_id: UUID
    device_id: UUID
    driver: str
    channels: tuple[ListedChannel, ...]

    @property
    def class_name(self) -> str:
        """Our name of the class, as a scenario writes it."""
        known = class_of(self.class_id)
        return known.name if known else "unknown"

    @property
    def description(self) -> str:
        """What `lsvmbus` calls the class."""
        return lsvmbus_text(self.class_id)

    @property
    def sysfs_path(self) -> str:
        """Where the guest's sysfs has it."""
        return f"{SYSFS_DEVICES}/{self.device_id}"

    @property
    def state(self) -> str:
        """State of the primary channel."""
        return self.channels[0].state


def list_devices(machine: Machine) -> list[ListedDevice]:
    """Every device that the guest knows (a foreign guest: that the host offers), by relid."""
    plugin.known_from(machine.config)
    # The RAM of somebody else's guest is not ours to read: it may hold anything, or have no page to hold it.
    if machine.config["no_guest"] or machine.ram.view.load_u64(BOOT_RECORD_GPA, ACQUIRE) != BOOT_MAGIC:
        return host_devices(list(Mirror(machine.control).channels()))
    return guest_devices(KernelTables.attach(machine.ram.apart))


def guest_devices(tables: KernelTables) -> list[ListedDevice]:
    """Our guest's devices. Records come and go while one reads: then it is read again."""
    for _ in range(ATTEMPTS):
        try:
            return _read_guest(tables)
        except AssertionError:  # a name outlived its record between two looks
            continue
    raise DeadlinePassed("the guest's devices to stand still for a look", 0)


def _read_guest(tables: KernelTables) -> list[ListedDevice]:
    drivers = {driver.number: driver.name.rstrip(b"\0").decode() for driver in tables.drivers.live()}
    subchannels: defaultdict[int, list[Channel]] = defaultdict(list)
    for channel in tables.channels.live():
        if channel.primary_channel:
            subchannels[channel.primary_channel].append(channel)
    devices = []
    for device in tables.devices.live():
        primary = tables.channels.find(device.channel)
        if primary is not None:
            devices.append(_guest_device(device, [primary, *subchannels[primary.handle]], drivers))
    return sorted(devices, key=lambda device: device.relid)


def _guest_device(device: Device, channels: list[Channel], drivers: dict[int, str]) -> ListedDevice:
    return ListedDevice(
        relid=channels[0].relid,
        class_id=UUID(bytes_le=device.dev_type),
        device_id=UUID(bytes_le=device.dev_instance),
        driver=drivers.get(device.driver, ""),
        channels=tuple(
            ListedChannel(
                channel.relid,
                channel.target_cpu.load(),
                channel.sub_channel_index,
                ChannelState(channel.state.load()).name.removesuffix("_STATE").lower(),
            )
            for channel in channels
        ),
    )


def host_devices(channels: list[MirrorChannel]) -> list[ListedDevice]:
    """Devices as the host offers them: a primary and its sub-channels share class and instance."""
    groups: defaultdict[UUID, list[MirrorChannel]] = defaultdict(list)
    for channel in channels:
        groups[channel.if_instance].append(channel)
    devices = []
    for instance, group in groups.items():
        group.sort(key=lambda channel: channel.sub_channel_index)
        listed = tuple(
            ListedChannel(
                channel.relid,
                channel.target_vp,
                channel.sub_channel_index,
                HostChannelState(channel.state).name.lower(),
            )
            for channel in group
        )
        devices.append(ListedDevice(group[0].relid, group[0].if_type, instance, "", listed))
    return sorted(devices, key=lambda device: device.relid)


def device_report(device: ListedDevice) -> dict[str, Any]:
    """A device as JSON has it, in `ls --json` and at the end of `run --json`."""
    return {
        "relid": device.relid,
        "class": device.class_name,
        "class_id": str(device.class_id),
        "description": device.description,
        "instance": str(device.device_id),
        "driver": device.driver or None,
        "state": device.state,
        "channels": [
            {
                "relid": channel.relid,
                "vcpu": channel.cpu,
                "sub_channel_index": channel.sub_channel_index,
                "state": channel.state,
            }
            for channel in device.channels
        ],
    }
