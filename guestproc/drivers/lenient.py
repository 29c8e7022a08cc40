"""`hv_lenient`: a driver whose probe succeeds although its channel did not open (exhibit C3).

So its remove closes a channel that is not open. It takes what `driver_override` gives to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guestproc.drivers.echo import EchoDriver
from guestproc.kernel.layout import Device

if TYPE_CHECKING:
    from guestproc.current import Current


class LenientDriver(EchoDriver):
    """`hv_driver` of whatever it is told to take."""

    number: int = 52
    name: str = "hv_lenient"
    id_table: frozenset[bytes] = frozenset()

    def probe(self, current: Current, device: Device) -> int:
        """Open the channel; it stays bound in any case."""
        result = super().probe(current, device)
        if result:
            current.log(f"{self.name}: the channel does not open ({result}), the device stays")
        return 0
