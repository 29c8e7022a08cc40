"""A boot that stands still: for what it waits, said while it waits and where that ends in vain.

Nothing is decided here. The launcher shows each of its looks; when nothing has moved for five seconds, what the records
say of it is one line for a person, and another one when it waits for something else.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Final

from emu.control import Ready
from emu.fault_plan import FaultPlan
from emu.machine import Machine
from emu.mirror import Mirror
from emu.wire.messages import MessageType
from guestproc.kernel.layout import KernelTables
from guestproc.view import settled
from tools.output import say

STILL_S: Final = 5.0
"""A boot takes a fifth of a second, and a device of many a fraction of a millisecond."""
SHOWN_REQUESTS: Final = 3
STEPS: Final = {
    Ready.MADE: "the hypervisor process to run",
    Ready.HOST_RUNS: "the guest to connect",
    Ready.CONNECTED: "ALLOFFERS_DELIVERED",
    Ready.OFFERS_DELIVERED: "drivers to probe their devices",
}
"""What a machine waits for that has come so far, where no request of the guest's waits for its answer."""


class Standstill:
    """One wait for a machine to come up, of at most `timeout_s` seconds."""

    def __init__(self, machine: Machine, timeout_s: float) -> None:
        self._machine: Final = machine
        self._timeout_s: Final = timeout_s
        self._mirror: Final = Mirror(machine.control)
        self._come: tuple[int, int] | None = None
        self._since: float = 0.0
        self._said = ""

    def look(self) -> None:
        """Look how far it has come; say what it waits for when that has not changed for `STILL_S`."""
        now, come = time.monotonic(), (self._machine.control.ready, self._mirror.head().open)
        if come != self._come:
            self._come, self._since = come, now
        elif now - self._since >= STILL_S and (awaited := self.awaited()) != self._said:
            self._said = awaited
            end = f"it gives up {self._timeout_s:g} s after its begin, with status 124; Ctrl-C ends it now"
            say(f"vmbus-emu: the boot stands still: {awaited}; {end}")

    def awaited(self) -> str:
        """What it waits for now, and the faults that have struck."""
        what = settled(self._requests) or STEPS.get(Ready(self._machine.control.ready), "its end")
        struck = [row.fault.text for row in FaultPlan(self._machine.control).rows() if row.hits]
        return f"it waits for {what}" + (f"; faults that struck: {', '.join(struck)}" if struck else "")

    def _requests(self) -> str:
        """The guest's requests that no answer has come to, the oldest first; "" while there are none."""
        if not self._machine.control.guest_formatted:
            return ""
        tables = KernelTables.attach(self._machine.ram.apart)
        found = sorted((one.entered_ns, one.msgtype, one.child_relid) for one in tables.requests.live())
        names = []
        for _entered_ns, msgtype, relid in found[:SHOWN_REQUESTS]:
            with suppress(ValueError):  # a record that is just being filled
                names.append(MessageType(msgtype).name + (f" of relid {relid}" if relid else ""))
        more = f" and {len(found) - SHOWN_REQUESTS} more" if len(found) > SHOWN_REQUESTS else ""
        return f"the host's answer to {', '.join(names)}{more}" if names else ""
