"""All drivers that every process of the guest knows; a new one is a line here, or a plugin's."""

from __future__ import annotations

from typing import Final

from emu.errors import UserError
from emu.plugin import Plugins
from guestproc.drivers.driver import DRIVER_OBJECTS, HvDriver, add_drivers
from guestproc.drivers.echo import EchoDriver
from guestproc.drivers.netlike import NetlikeDriver
from guestproc.drivers.plugged import PluggedDriver, plugged_callback
from guestproc.drivers.uio_hv_generic import UioHvGeneric
from guestproc.kernel.functions import CHANNEL_CALLBACKS

BUILT_IN: Final[tuple[HvDriver, ...]] = (EchoDriver(), NetlikeDriver(), UioHvGeneric())

add_drivers(BUILT_IN)


def check_plugins(plugins: Plugins) -> None:
    """UserError for a plugin's driver that has the name of one of ours."""
    ours = {driver.name for driver in BUILT_IN}
    for one in plugins.drivers:
        if one.driver.name in ours:
            raise UserError(f"plugin {one.path}: driver {one.driver.name} is one of ours; choose another name")


def add_plugins(plugins: Plugins) -> None:
    """Add what plugins register to this process, their drivers before ours."""
    if not (plugins.drivers or plugins.callbacks):
        return
    check_plugins(plugins)
    for name, callback in plugins.callbacks.items():
        CHANNEL_CALLBACKS.register(callback.number, name)(plugged_callback(name, callback))
    # Ours take every class that we know, so that a back end may stand behind any of them: they are asked last.
    built_in = dict(DRIVER_OBJECTS)
    DRIVER_OBJECTS.clear()
    add_drivers(PluggedDriver(one) for one in plugins.drivers)
    DRIVER_OBJECTS.update(built_in)
