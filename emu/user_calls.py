"""What may be asked of the guest's user space by name, and with which arguments (`guestproc.user` carries it out).

A schedule writes calls as words, long before there is a guest: what is asked wrongly is said when the file is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from emu.scenario_text import Nonsense, nearest
from emu.values import valueclass


@valueclass()
class CallShape:
    """The arguments of a call: those that it needs, and those that it may be given."""

    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()

    def usage(self, name: str) -> str:
        """How a schedule writes it."""
        words = [f"{one}={_VALUES.get(one, one.upper())}" for one in self.needs]
        return " ".join([f"call {name}", *words, *(f"[{one}={_VALUES.get(one, one.upper())}]" for one in self.may)])


_VALUES: Final = {
    "cpu": "N",
    "index": "N",
    "bytes": "N",
    "times": "N",
    "after_ns": "N",
    "online": "0|1",
    "value": "0|1",
    "relid": "DEVICE",
}
NUMBERS: Final = ("cpu", "index", "bytes", "times", "after_ns", "online")
"""Arguments that are whole numbers; `relid` is one, too, once the device that it names has a relid."""
DEVICES: Final = ("device", "relid")
"""Arguments that name a device: as steps do, or by its instance GUID."""
GUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
USER_CALLS: Final[Mapping[str, CallShape]] = {
    "bind": CallShape(("device", "driver")),
    "unbind": CallShape(("device",), ("driver",)),
    "override": CallShape(("device", "driver")),
    "new_id": CallShape(("driver", "guid")),
    "remove_id": CallShape(("driver", "guid")),
    "register": CallShape(("driver",)),
    "unregister": CallShape(("driver",)),
    "drivers": CallShape(),
    "drivers_autoprobe": CallShape(("value",)),
    "drivers_probe": CallShape(("device",)),
    "bus_uevent": CallShape(("action",)),
    "driver_uevent": CallShape(("driver", "action")),
    "uevent": CallShape(("device", "action")),
    "move": CallShape(("device", "cpu"), ("index",)),
    "cpu_online": CallShape(("cpu", "online")),
    "cpus": CallShape(),
    "ring_debuginfo": CallShape(("device",), ("index",)),
    "stream_write": CallShape(("device", "bytes"), ("index",)),
    "connect": CallShape(("endpoint", "service")),
    "fail": CallShape(("where", "times", "relid")),
    "timer": CallShape(("cpu", "after_ns")),
}
"""By name."""


def check_call(name: str, arguments: Mapping[str, str]) -> None:
    """Whether these words can be meant; Nonsense with the cure otherwise. Who is named need not be there yet."""
    if name not in USER_CALLS:
        raise Nonsense(f"{name!r} is no call of the guest's user space", nearest(name, USER_CALLS))
    shape = USER_CALLS[name]
    cure = f"write it as `{shape.usage(name)}`"
    for one in arguments:
        if one not in (*shape.needs, *shape.may):
            raise Nonsense(f"{one}= is no argument of `call {name}`", cure)
    for one in shape.needs:
        if one not in arguments:
            raise Nonsense(f"`call {name}` needs {one}=", cure)
    for one, value in arguments.items():
        if one in NUMBERS and not (value.isascii() and value.isdecimal() and len(value) <= 18):
            raise Nonsense(f"{one}={value} is no number", cure)
