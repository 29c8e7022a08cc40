"""Our guest's `/sys/bus/vmbus`, made from its kernel's records at each look.

    bus/      drivers_autoprobe   drivers_probe   uevent   hibernation
              devices/GUID → PARENT/GUID   drivers/NAME/{bind,unbind,new_id,remove_id,uevent,GUID → PARENT/GUID}
    PARENT/   GUID/         attributes, `driver` and `subsystem` links, channels/RELID/ with attributes

An open file outlives its device, as in the kernel: a read of it is then ENODEV. So does a directory that
somebody holds: it is empty then. A write is a call of the guest's user space, which runs it in the guest's kernel.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Final
from uuid import UUID

from guestproc.kernel.layout import Channel, Device, Era
from guestproc.protocol.devices import name_of
from guestproc.protocol.uevents import PARENT_NAME
from guestproc.view import GuestView, settled
from tools.sysfs_attributes import CHANNEL_ATTRIBUTES, DEVICE_ATTRIBUTES, Shown, Spec
from tools.sysfs_nodes import Attribute, Directory, FixedDirectory, Link, ListedDirectory, Node, write_only

BUS_LINK: Final = "../../../bus/vmbus"
"""From a device's directory to the bus."""


CallUser = Callable[[str, Mapping[str, str]], None]
"""Runs a call of the guest's user space; OSError with its errno."""

DRIVER_FILES: Final = {
    "bind": ("bind", "device"),
    "unbind": ("unbind", "device"),
    "new_id": ("new_id", "guid"),
    "remove_id": ("remove_id", "guid"),
    "uevent": ("driver_uevent", "action"),
}
"""What is written to a driver's files: which call, and what the text is to it."""


def nobody_calls(name: str, arguments: Mapping[str, str]) -> None:
    """The user space of a guest that does not run."""
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))


class GuestBus:
    """The two directories of our guest."""

    def __init__(self, view: GuestView, runs: Callable[[], bool] = lambda: True, call: CallUser = nobody_calls) -> None:
        self._view: Final = view
        self._runs: Final = runs
        self._call: Final = call

        def autoprobe_store(text: str) -> None:
            call("drivers_autoprobe", {"value": text.rstrip("\n")})

        def uevent_store(text: str) -> None:
            call("bus_uevent", {"action": text.rstrip("\n")})

        hibernation = {"hibernation": Attribute(lambda: "0\n")} if view.tables.era is not Era.SEED else {}
        self.bus: Final[Directory] = FixedDirectory(
            {
                "devices": ListedDirectory(self._device_names, self._device_link),
                "drivers": ListedDirectory(self._driver_names, self._driver),
                "drivers_autoprobe": Attribute(self._autoprobe, 0o644, autoprobe_store),
                "drivers_probe": write_only(self._probe),
                "uevent": write_only(uevent_store),
                **hibernation,
            }
        )
        self.parent: Final[Directory] = ListedDirectory(self._device_names, self._device)

    def _autoprobe(self) -> str:
        return "0\n" if self._view.tables.connection.no_autoprobe.load() else "1\n"

    def _probe(self, text: str) -> None:
        """A write to `drivers_probe`: a device is named by its instance there, and by nothing else."""
        written = text.rstrip("\n")
        if guid_of_name(written) is None:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        self._call("drivers_probe", {"device": written})

    def _device_names(self) -> list[str]:
        return settled(lambda: [instance_of(device) for device in self._view.devices()])

    def _find(self, name: str) -> Device | None:
        instance = guid_of_name(name)
        return None if instance is None else self._view.device(instance.bytes_le)

    def _device_link(self, name: str) -> Link | None:
        return Link(f"../../../devices/{PARENT_NAME}/{name}") if self._find(name) is not None else None

    def _device(self, name: str) -> Directory | None:
        device = self._find(name)
        return None if device is None else DeviceDirectory(self._view, device, self._runs, self._call)

    def _driver_names(self) -> list[str]:
        return settled(lambda: [name_of(driver) for driver in self._view.drivers()])

    def _driver(self, name: str) -> Directory | None:
        if name not in self._driver_names():
            return None

        def bound() -> list[str]:
            return settled(
                lambda: [instance_of(one) for one in self._view.devices() if self._view.driver_of(one) == name]
            )

        def find(entry: str) -> Node | None:
            if entry in DRIVER_FILES:
                return write_only(lambda text: self._store(name, entry, text))
            device = self._find(entry)
            if device is None or self._view.driver_of(device) != name:
                return None
            return Link(f"../../../../devices/{PARENT_NAME}/{entry}")

        return ListedDirectory(lambda: [*DRIVER_FILES, *bound()], find)

    def _store(self, driver: str, file: str, text: str) -> None:
        """A write to one of a driver's files; a device is named by its instance there, and by nothing else."""
        call, argument = DRIVER_FILES[file]
        written = text.rstrip("\n")
        if argument == "device" and guid_of_name(written) is None:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        self._call(call, {"driver": driver, argument: written})


class DeviceDirectory(Directory):
    """One device: its attributes, its links, its channels."""

    def __init__(self, view: GuestView, device: Device, runs: Callable[[], bool], call: CallUser) -> None:
        self._view: Final = view
        self._device: Final = device
        self._runs: Final = runs
        self._call: Final = call

    def names(self) -> list[str]:
        """Attributes that are not hidden, `channels`, `subsystem`, and `driver` while one is bound."""
        names = self._attribute_names(DEVICE_ATTRIBUTES, self._primary())
        if names:
            names += ["channels", "subsystem", *(["driver"] if self._view.driver_of(self._device) else [])]
        return names

    def find(self, name: str) -> Node | None:
        """One of them."""
        primary = self._primary()
        if primary is None:
            return None
        if name == "channels":
            return ListedDirectory(lambda: list(self._channels()), self._channel)
        if name == "subsystem":
            return Link(BUS_LINK)
        if name == "driver":
            driver = self._view.driver_of(self._device)
            return Link(f"{BUS_LINK}/drivers/{driver}") if driver else None
        return self._attribute(DEVICE_ATTRIBUTES, primary, name)

    def _primary(self) -> Channel | None:
        return settled(lambda: self._view.primary(self._device) if self._device.alive() else None)

    def _channels(self) -> dict[str, Channel]:
        def look() -> dict[str, Channel]:
            primary = self._primary()
            channels = [] if primary is None else self._view.channels(primary)
            return {str(channel.relid): channel for channel in channels}

        return settled(look)

    def _channel(self, name: str) -> Directory | None:
        channel = self._channels().get(name)
        if channel is None:
            return None
        return ListedDirectory(
            lambda: self._attribute_names(CHANNEL_ATTRIBUTES, channel),
            lambda entry: self._attribute(CHANNEL_ATTRIBUTES, channel, entry),
        )

    def _attribute_names(self, specs: Sequence[Spec], channel: Channel | None) -> list[str]:
        """Names of the attributes that a channel has; none of a channel that is gone."""

        def look() -> list[str]:
            if channel is None or not channel.alive():
                return []
            return [spec.name for spec in specs if spec.visible(channel, self._view.tables.era)]

        return settled(look)

    def _attribute(self, specs: Sequence[Spec], channel: Channel, name: str) -> Attribute | None:
        """One attribute by name, None if there is none or it is hidden."""
        if name not in self._attribute_names(specs, channel):
            return None
        spec = next(spec for spec in specs if spec.name == name)
        shown, show = Shown(self._view, self._device, channel), spec.show

        def look() -> str:
            if not (self._runs() and shown.device.alive() and channel.alive()):
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            return show(shown)

        call, argument = spec.call
        store = None

        if call:
            # A channel's file is its relid's, a device's its instance's.
            named = str(channel.relid) if specs is CHANNEL_ATTRIBUTES else instance_of(shown.device)

            def store(text: str) -> None:
                self._call(call, {"device": named, argument: text.rstrip("\n")})

        return Attribute(lambda: settled(look), spec.mode_in(self._view.tables.era), store)


def instance_of(device: Device) -> str:
    """A device's name: its instance GUID."""
    return str(UUID(bytes_le=device.dev_instance))


def guid_of_name(name: str) -> UUID | None:
    """The GUID of a device's name; None for what the kernel would not print."""
    try:
        guid = UUID(name)
    except ValueError:
        return None
    return guid if str(guid) == name else None
