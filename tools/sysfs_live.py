"""A running machine's `/sys/bus/vmbus`: our guest's, a foreign guest's as far as the host knows it, or empty.

Which of them is asked at each look: a guest may boot after we began, and a machine may end while its tree is
still open; then the bus has no device, and reading an open file is ENODEV.

A foreign guest keeps its own sysfs, if it has one. Of it the tree has what the host offered: ids, classes,
and the VP that the guest asked for in the place of its CPU.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from emu.errors import DeadlinePassed, VmbusError
from emu.ipc.atomics import ACQUIRE
from emu.machine import Machine
from emu.mirror import Mirror
from emu.orders import OrderRefused
from emu.wire.device_classes import device_number
from emu.wire.guids import braced, modalias
from guestproc.kernel.layout import BOOT_MAGIC, BOOT_RECORD_GPA, KernelTables
from guestproc.protocol.uevents import PARENT_NAME
from guestproc.view import GuestView
from tools.ctl_guest import ask_guest
from tools.device_list import ListedChannel, ListedDevice, host_devices
from tools.sysfs_guest import BUS_LINK, GuestBus
from tools.sysfs_nodes import Attribute, Directory, FixedDirectory, Link, ListedDirectory, Node

PCI_VENDOR_ID_MICROSOFT: Final = 0x1414


class BusTree(Protocol):
    """The two directories that are shown: of the bus, and of the devices."""

    @property
    def bus(self) -> Directory:
        """`/sys/bus/vmbus`."""

    @property
    def parent(self) -> Directory:
        """`/sys/devices/PARENT_NAME`."""


class LiveTree:
    """The tree of a machine, whoever is its guest at the moment."""

    def __init__(self, machine: Machine) -> None:
        self._machine: Final = machine
        self._guest: GuestBus | None = None
        self._host: Final = HostBus(Mirror(machine.control))
        self._nobody: Final = HostBus(None)
        self.gone = False
        """Set by who watches the machine's launcher: it died and could not say so."""
        self.bus: Final[Directory] = _Delegate(lambda: self._current().bus)
        self.parent: Final[Directory] = _Delegate(lambda: self._current().parent)

    def _current(self) -> BusTree:
        if not self._runs():
            return self._nobody
        # The RAM of somebody else's guest is not ours to read: it may hold anything, or have no page to hold it.
        ram, foreign = self._machine.ram, self._machine.config["no_guest"]
        if foreign or ram.view.load_u64(BOOT_RECORD_GPA, ACQUIRE) != BOOT_MAGIC:
            return self._host
        if self._guest is None:
            self._guest = GuestBus(GuestView(KernelTables.attach(ram.apart)), self._runs, self._call)
        return self._guest

    def _call(self, name: str, arguments: Mapping[str, str]) -> None:
        """A write, as a letter to the guest's user space; what goes wrong is an errno."""
        try:
            ask_guest(self._machine, name, **arguments)
        except OrderRefused as refused:
            number = refused.errno or errno.EIO
            raise OSError(number, os.strerror(number)) from None
        except DeadlinePassed:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
        except VmbusError:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from None

    def _runs(self) -> bool:
        return not (self.gone or self._machine.stopping)


class _Delegate(Directory):
    """The directory that is the right one at each look."""

    def __init__(self, current: Callable[[], Directory]) -> None:
        self._current: Final = current

    def names(self) -> list[str]:
        """Its entries."""
        return self._current().names()

    def find(self, name: str) -> Node | None:
        """One of its entries."""
        return self._current().find(name)


class HostBus:
    """What the host's mirror knows of a guest's bus; without a mirror a bus without devices."""

    def __init__(self, mirror: Mirror | None) -> None:
        self._mirror: Final = mirror
        self._seen = -1
        self._devices: dict[str, ListedDevice] = {}
        self.bus: Final[Directory] = FixedDirectory(
            {
                "devices": ListedDirectory(lambda: list(self._listed()), self._link),
                "drivers": FixedDirectory({}),
                "hibernation": Attribute(lambda: "0\n"),
            }
        )
        self.parent: Final[Directory] = ListedDirectory(lambda: list(self._listed()), self._device)

    def _listed(self) -> Mapping[str, ListedDevice]:
        """By name; read again when the host has written since."""
        if self._mirror is None:
            return {}
        sequence = self._mirror.head().sequence
        if sequence != self._seen:
            devices = host_devices(list(self._mirror.channels()))
            self._devices = {str(device.device_id): device for device in devices}
            self._seen = sequence
        return self._devices

    def _link(self, name: str) -> Link | None:
        return Link(f"../../../devices/{PARENT_NAME}/{name}") if name in self._listed() else None

    def _device(self, name: str) -> Directory | None:
        device = self._listed().get(name)
        if device is None:
            return None
        shows: dict[str, Callable[[ListedDevice], str]] = {
            "id": lambda device: f"{device.relid}\n",
            "class_id": lambda device: f"{braced(device.class_id)}\n",
            "device_id": lambda device: f"{braced(device.device_id)}\n",
            "modalias": lambda device: f"{modalias(device.class_id)}\n",
            "vendor": lambda device: f"{PCI_VENDOR_ID_MICROSOFT:#x}\n",
            "device": lambda device: f"{device_number(device.class_id):#x}\n",
            "channel_vp_mapping": lambda device: "".join(
                f"{channel.relid}:{channel.cpu}\n" for channel in device.channels
            ),
        }
        channels = {str(channel.relid): self._channel(name, channel) for channel in device.channels}
        return FixedDirectory(
            {
                **{file: self._attribute(name, show) for file, show in shows.items()},
                "channels": FixedDirectory(channels),
                "subsystem": Link(BUS_LINK),
            }
        )

    def _channel(self, name: str, channel: ListedChannel) -> Directory:
        def cpu(device: ListedDevice) -> str:
            now = next((one for one in device.channels if one.relid == channel.relid), None)
            if now is None:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            return f"{now.cpu}\n"

        return FixedDirectory(
            {
                "cpu": self._attribute(name, cpu),
                "subchannel_id": self._attribute(name, lambda device: f"{channel.sub_channel_index}\n"),
            }
        )

    def _attribute(self, name: str, show: Callable[[ListedDevice], str]) -> Attribute:
        """Shows what the host says of this device at each read."""

        def read() -> str:
            device = self._listed().get(name)
            if device is None:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            return show(device)

        return Attribute(read)
