"""A plugin's driver and its channel callbacks, as the guest runs them: what they raise, and what follows from it.

Where the guest may sleep (probe, remove) an author's mistake is a failure of that call: the traceback goes to
the guest's log, `plugin_errors` counts it, and a channel that was left open is closed, since nobody else would.
In interrupt context there is nobody to fail to. As in the kernel, where that is a panic, the machine stops: the
processor's process ends with `PluginFault`, which names plugin and callback.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from emu.errors import MachineStopping, VmbusError
from emu.plugin import Callback, RegisteredDriver
from guestproc.drivers.driver import HvDriver
from guestproc.kernel.layout import Channel, Device
from guestproc.protocol import opening
from guestproc.vmbus.channel import vmbus_close

if TYPE_CHECKING:
    from guestproc.current import Current


class PluginFault(VmbusError):
    """A plugin raised in interrupt context; the text says which, where, and what."""


class PluggedDriver:
    """`hv_driver` of a plugin: the author's object, and a hand to catch what falls out of it."""

    def __init__(self, registered: RegisteredDriver) -> None:
        self.number: int = registered.number
        self._driver: Final[HvDriver] = registered.driver
        self._path: Final = registered.path
        self.name: str = registered.driver.name
        self.id_table: frozenset[bytes] = registered.driver.id_table

    def probe(self, current: Current, device: Device) -> int:
        """The author's probe; -EIO for one that raises, or returns what is neither 0 nor a negative errno."""
        try:
            result: object = self._driver.probe(current, device)
        except MachineStopping:
            raise
        except Exception:
            self._fault(current, "probe", traceback.format_exc())
            result = -errno.EIO
        if not isinstance(result, int) or result > 0:
            self._fault(current, "probe", f"it returned {result!r}, which is neither 0 nor a negative errno")
            result = -errno.EIO
        if result:
            self._close(current, device, "probe failed")
        return result

    def remove(self, current: Current, device: Device) -> None:
        """The author's remove; the channel is closed afterwards, whoever forgot it."""
        try:
            self._driver.remove(current, device)
        except MachineStopping:
            raise
        except Exception:
            self._fault(current, "remove", traceback.format_exc())
        self._close(current, device, "remove returned")

    def _fault(self, current: Current, what: str, text: str) -> None:
        current.counters.plugin_errors += 1
        current.log(f"plugin {self._path}: driver {self.name}: {what}: {text.rstrip()}")

    def _close(self, current: Current, device: Device, when: str) -> None:
        channel = current.channel(device.channel)
        if opening.is_open(channel):
            current.log(f"{self.name}: {when} with the channel open; it is closed")
            vmbus_close(current, channel)


def plugged_callback(name: str, callback: Callback) -> Callable[[Current, Channel], None]:
    """The callback as the channel's tasklet, or the ISR, calls it; PluginFault is what it raises."""
    function = callback.function

    def run(current: Current, channel: Channel) -> None:
        try:
            function(current, channel)
        except MachineStopping:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise PluginFault(f"plugin callback {name} on relid {channel.relid}: {what}") from error

    return run
