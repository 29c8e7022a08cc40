"""The attributes of a VMBus device and of a channel, as the kernel's sysfs has them: two tables of one line
each.

A `show` is given the guest's records and returns the text of one read, or raises OSError: EINVAL for a ring
that is not there. Names, formats and modes are those of drivers/hv/vmbus_drv.c, quirks included: what the
kernel prints with %d is signed. Monitor attributes are hidden unless the host allocated a monitor for the
channel.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias
from uuid import UUID

from emu.wire.guids import braced, guid_from_wire, modalias
from guestproc.kernel.layout import Channel, Device, Era
from guestproc.protocol.devices import override_name
from guestproc.view import (
    CLIENT,
    INBOUND,
    OUTBOUND,
    SERVER,
    GuestView,
    MonitorFigures,
    RingFigures,
)


@dataclass(frozen=True, slots=True)
class Shown:
    """Whose attribute is read: a device with its primary channel, or one of its channels."""

    view: GuestView
    device: Device
    channel: Channel


Show: TypeAlias = Callable[[Shown], str]


@dataclass(frozen=True, slots=True)
class Spec:
    """One attribute: which file, what it says, its mode, and where it is hidden."""

    name: str
    show: Show
    mode: int = 0o444
    monitor: bool = False
    """Only with a monitor allocated."""
    since: Era = Era.SEED
    seed_mode: int = 0
    """Its mode in era `seed` where that is another."""
    call: tuple[str, str] = ("", "")
    """What a write to it is: a call of the guest's user space, and the name of what is written."""

    def visible(self, channel: Channel, era: Era) -> bool:
        """Whether the file is there for this channel."""
        if self.monitor and not channel.monitor_allocated:
            return False
        return era is not Era.SEED or self.since is Era.SEED

    def mode_in(self, era: Era) -> int:
        """The file's mode in that kernel."""
        return self.seed_mode if era is Era.SEED and self.seed_mode else self.mode


def signed(value: int) -> str:
    """A u32 as %d prints it."""
    return str(value - (1 << 32) if value >> 31 else value)


def figures(shown: Shown, side: int) -> RingFigures:
    """The words of a ring, EINVAL where none is allocated."""
    ring = shown.view.ring(shown.channel, side)
    if ring is None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return ring


def ring(side: int, pick: Callable[[RingFigures], int], say: Callable[[int], str] = signed) -> Show:
    """Shows one word of a ring."""
    return lambda shown: say(pick(figures(shown, side))) + "\n"


def monitor(page: int, pick: Callable[[MonitorFigures], int]) -> Show:
    """Shows one word of a monitor page, EINVAL before there is one."""

    def show(shown: Shown) -> str:
        words = shown.view.monitor(shown.channel, page)
        if words is None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return signed(pick(words)) + "\n"

    return show


def word(pick: Callable[[Shown], int]) -> Show:
    """Shows a number of the records."""
    return lambda shown: f"{pick(shown)}\n"


def guid(pick: Callable[[Device], bytes], say: Callable[[UUID], str]) -> Show:
    """Shows a GUID of the device's record."""
    return lambda shown: say(guid_from_wire(pick(shown.device))) + "\n"


def channel_vp_mapping(shown: Shown) -> str:
    """`relid:CPU` of each channel, the primary first."""
    channels = shown.view.channels(shown.channel)
    return "".join(f"{channel.relid}:{channel.target_cpu.load()}\n" for channel in channels)


def driver_override(shown: Shown) -> str:
    """Name of the driver that alone may bind; what %s makes of none."""
    return (override_name(shown.device) or "(null)") + "\n"


def uevent(shown: Shown) -> str:
    """What `udevadm` reads: the driver while there is one, then the module alias."""
    driver = shown.view.driver_of(shown.device)
    alias = modalias(guid_from_wire(shown.device.dev_type))
    return (f"DRIVER={driver}\n" if driver else "") + f"MODALIAS={alias}\n"


def monitor_id(shown: Shown) -> int:
    """The offer's monitorid: 32 to a group."""
    return shown.channel.monitor_grp * 32 + shown.channel.monitor_bit


RING_WORDS: Final[tuple[tuple[str, Callable[[RingFigures], int]], ...]] = (
    ("intr_mask", lambda words: words.interrupt_mask),
    ("read_index", lambda words: words.read_index),
    ("write_index", lambda words: words.write_index),
    ("read_bytes_avail", lambda words: words.bytes_to_read),
    ("write_bytes_avail", lambda words: words.bytes_to_write),
)
MONITOR_WORDS: Final[tuple[tuple[str, Callable[[MonitorFigures], int]], ...]] = (
    ("pending", lambda words: words.pending),
    ("latency", lambda words: words.latency),
    ("conn_id", lambda words: words.connection_id),
)

DEVICE_ATTRIBUTES: Final = (
    Spec("id", word(lambda shown: shown.channel.relid)),
    Spec("state", word(lambda shown: shown.channel.state.load())),
    Spec("class_id", guid(lambda device: device.dev_type, braced)),
    Spec("device_id", guid(lambda device: device.dev_instance, braced)),
    Spec("modalias", guid(lambda device: device.dev_type, modalias)),
    Spec("uevent", uevent, mode=0o644, call=("uevent", "action")),
    Spec("vendor", lambda shown: f"{shown.device.vendor_id:#x}\n"),
    Spec("device", lambda shown: f"{shown.device.device_id:#x}\n"),
    Spec("numa_node", word(lambda shown: shown.view.node_of(shown.channel.target_cpu.load()))),
    Spec("channel_vp_mapping", channel_vp_mapping),
    Spec("driver_override", driver_override, mode=0o644, call=("override", "driver")),
    Spec("monitor_id", word(monitor_id), monitor=True),
    *(
        Spec(f"{prefix}_monitor_{name}", monitor(page, pick), monitor=True)
        for prefix, page in (("server", SERVER), ("client", CLIENT))
        for name, pick in MONITOR_WORDS
    ),
    *(
        Spec(f"{prefix}_{name}", ring(side, pick))
        for prefix, side in (("out", OUTBOUND), ("in", INBOUND))
        for name, pick in RING_WORDS
    ),
)

CHANNEL_ATTRIBUTES: Final = (
    Spec("out_mask", ring(OUTBOUND, lambda words: words.interrupt_mask, str)),
    Spec("in_mask", ring(INBOUND, lambda words: words.interrupt_mask, str)),
    Spec("read_avail", ring(INBOUND, lambda words: words.bytes_to_read, str)),
    Spec("write_avail", ring(OUTBOUND, lambda words: words.bytes_to_write, str)),
    Spec("cpu", word(lambda shown: shown.channel.target_cpu.load()), mode=0o644, seed_mode=0o444, call=("move", "cpu")),
    Spec("pending", monitor(CLIENT, lambda words: words.pending), monitor=True),
    Spec("latency", monitor(CLIENT, lambda words: words.latency), monitor=True),
    Spec("interrupts", word(lambda shown: shown.channel.interrupts)),
    Spec("events", word(lambda shown: shown.channel.sig_events.load())),
    Spec("intr_in_full", word(lambda shown: shown.channel.intr_in_full), since=Era.CURRENT),
    Spec("intr_out_empty", word(lambda shown: shown.channel.intr_out_empty), since=Era.CURRENT),
    Spec("out_full_first", word(lambda shown: shown.channel.out_full_first), since=Era.CURRENT),
    Spec("out_full_total", word(lambda shown: shown.channel.out_full_total), since=Era.CURRENT),
    Spec("monitor_id", word(monitor_id), monitor=True, since=Era.CURRENT),
    Spec("subchannel_id", word(lambda shown: shown.channel.sub_channel_index), since=Era.CURRENT),
)
