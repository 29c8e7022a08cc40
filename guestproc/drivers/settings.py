"""What the scenario says of a device, for its driver: how large its rings are, how many sub-channels to ask for.

A driver of a real kernel has module parameters for that. A device that the scenario does not name (one that was
offered later) gets what its class gets by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from emu.scenario import DeviceSpec, Scenario
from emu.values import valueclass
from emu.wire.device_classes import class_of
from emu.wire.guids import guid_from_wire
from guestproc.kernel.layout import Device

if TYPE_CHECKING:
    from emu.machine import Machine
    from guestproc.current import Current

PAGE_SIZE: Final = 4096
MOST_DEFAULTS: Final = 64


@valueclass()
class DeviceSettings:
    """Bytes of each of a channel's rings, control page included; sub-channels to ask for."""

    ring_bytes: int
    subchannels: int


class Settings:
    """The scenario's devices by instance, read once in each process that probes."""

    def __init__(self) -> None:
        self._machine: Machine | None = None
        self._known: dict[bytes, DeviceSettings] = {}
        """By instance, in wire form: a GUID made of it costs more than all the rest of the answer."""
        self._defaults: dict[bytes, DeviceSettings] = {}
        """By class, in wire form."""

    def of(self, current: Current, device: Device) -> DeviceSettings:
        """What is meant for one device."""
        if self._machine is not current.machine:
            self._machine = current.machine
            self._known = _known(current)
            self._defaults = {}
        return self._known.get(device.dev_instance) or self._default(current, device.dev_type)

    def _default(self, current: Current, class_guid: bytes) -> DeviceSettings:
        settings = self._defaults.get(class_guid)
        if settings is None:
            settings = _default(current, class_guid)
            # Classes are the host's to make up.
            if len(self._defaults) < MOST_DEFAULTS:
                self._defaults[class_guid] = settings
        return settings


def _known(current: Current) -> dict[bytes, DeviceSettings]:
    """The devices of a scenario that has any which are not as their class is by default.

    To name each of 2,000 devices takes 15 ms, in the middle of the first one's probe.
    """
    config, vcpus = current.machine.config, current.machine.vp_count
    if all(_is_default(spec, vcpus) for spec in config["device"]):
        return {}
    scenario = Scenario.from_config({key: config[key] for key in ("machine", "device")})
    return {
        one.instance.bytes_le: DeviceSettings(one.ring_pages * PAGE_SIZE, one.subchannels) for one in scenario.devices()
    }


def _is_default(spec: Mapping[str, Any], vcpus: int) -> bool:
    """Whether a `[[device]]` of the configuration says of its rings and sub-channels what its class has anyway."""
    default = DeviceSpec(spec["class"])
    subchannels = default.subchannels_with(vcpus)
    said = spec.get("ring_pages", default.ring_pages), spec.get("subchannels", subchannels)
    return said == (default.ring_pages, subchannels)


def _default(current: Current, class_guid: bytes) -> DeviceSettings:
    known = class_of(guid_from_wire(class_guid))
    spec = DeviceSpec() if known is None else DeviceSpec(known.name)
    return DeviceSettings(spec.ring_pages * PAGE_SIZE, spec.subchannels_with(current.machine.vp_count))
