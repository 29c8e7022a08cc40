"""What a driver is told of its device: from the scenario where that says something, else what its class has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

from emu.scenario import DeviceSpec, Scenario
from emu.wire.device_classes import BY_NAME
from emu.wire.guids import guid_to_wire
from guestproc.current import Current
from guestproc.drivers.settings import PAGE_SIZE, DeviceSettings, Settings
from guestproc.kernel.layout import Device

SPECS = {
    "default": [DeviceSpec("echo", count=3), DeviceSpec("netlike", count=2)],
    "all-said": [DeviceSpec("echo", count=3, ring_pages=4, subchannels=2)],
    "one-said": [DeviceSpec("echo", count=2), DeviceSpec("echo", ring_pages=8), DeviceSpec("netlike", subchannels=1)],
    "said-as-it-is-anyway": [DeviceSpec("netlike", subchannels=2), DeviceSpec("echo", ring_pages=16)],
    "an-instance": [DeviceSpec("echo", instance=UUID(int=7)), DeviceSpec("echo", instance=UUID(int=8), ring_pages=2)],
}


def asked(settings: Settings, current: Current, class_name: str, instance: UUID) -> DeviceSettings:
    """What a device of that class and instance is told."""
    device = SimpleNamespace(dev_instance=instance.bytes_le, dev_type=guid_to_wire(BY_NAME[class_name].guid))
    return settings.of(current, cast(Device, device))


@pytest.mark.parametrize("specs", SPECS.values(), ids=list(SPECS))
def test_settings_of_every_device_are_the_scenarios(specs: list[DeviceSpec]) -> None:
    """Each device of a scenario is told what the scenario means for it, and one that came later its class's own."""
    vcpus = 2
    scenario = Scenario.default().with_overrides(vcpus=vcpus, devices=specs)
    machine: Any = SimpleNamespace(config=scenario.to_config(), vp_count=vcpus)
    current, settings = cast(Current, SimpleNamespace(machine=machine)), Settings()

    for device in scenario.devices():
        wanted = DeviceSettings(device.ring_pages * PAGE_SIZE, device.subchannels)
        assert asked(settings, current, device.class_name, device.instance) == wanted, device
    for name in ("echo", "netlike"):
        default = DeviceSpec(name)
        wanted = DeviceSettings(default.ring_pages * PAGE_SIZE, default.subchannels_with(vcpus))
        assert asked(settings, current, name, UUID(int=99)) == wanted
