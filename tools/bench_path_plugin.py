"""Both ends of a channel that is measured: a device that sends as fast as it may, a driver that only counts.

A plugin, loaded by file like anybody's. The driver's first packet asks for a run; the device answers with the time,
then for a while with batches, written by `send_all`, which signals as the rules say, then with the time again. The
driver's callback drains what there is; what it saw is in the device's state in guest RAM.
"""

from __future__ import annotations

import time
from struct import Struct
from typing import ClassVar, Final

from emu import plugin
from guestproc.current import Current
from guestproc.kernel.layout import Channel, Device
from guestproc.vmbus.channel import vmbus_close, vmbus_open
from guestproc.vmbus.packets import vmbus_drain, vmbus_sendpacket
from hostproc.devices.backend import Backend
from hostproc.devices.channel import HostChannel
from hostproc.loop import AGAIN, TaskBody

PATH_BENCH: Final = plugin.device_class(
    "path-bench", guid="5a9f4c1e-7d0b-4c53-9a37-0d1f6b2c8e41", description="Source of packets"
)
SIZE: Final = 64
BATCH: Final = 32
RUN_NS: Final = 300_000_000
WARM_NS: Final = 50_000_000
RING_BYTES: Final = 257 * 4096
PIECE: Final = 4
"""Batches between two looks of the host at everything else."""
LIMIT: Final = 512
"""Packets that one callback takes; the bus calls again while there are more."""
TIME: Final = Struct("<Q")
"""CLOCK_MONOTONIC in ns: the payload of the packets before and behind a run."""
BEGIN, END, TAKEN, CALLBACKS, WRONG = range(5)
"""Words of the driver's state: two times, the packets between them, how often the callback ran, bad packets."""


@plugin.backend
class PathSource(Backend):
    """Sends for a while to whoever asks."""

    name: ClassVar[str] = "path-bench"

    def open(self, channel: HostChannel) -> TaskBody:
        """Serve one channel for as long as it is open."""
        payloads = [bytes(range(SIZE))] * BATCH
        while True:
            if not channel.take():
                yield from channel.wait_for_packets()
                continue
            yield from _send_for(channel, payloads, WARM_NS)
            yield from channel.send_all([TIME.pack(time.monotonic_ns())])
            yield from _send_for(channel, payloads, RUN_NS)
            yield from channel.send_all([TIME.pack(0)])


def _send_for(channel: HostChannel, payloads: list[bytes], run_ns: int) -> TaskBody:
    """Batches, until the time is over."""
    end = time.monotonic_ns() + run_ns
    while time.monotonic_ns() < end:
        for _ in range(PIECE):
            yield from channel.send_all(payloads)
        yield AGAIN


@plugin.channel_callback
def path_onchannelcallback(current: Current, channel: Channel) -> None:
    """Count what came, and look at the last of it; a short packet begins and ends the run."""
    packets = vmbus_drain(current, channel, LIMIT)
    if not packets:
        return
    state = current.tables.devices.from_handle(channel.channel_callback_context).driver_state
    state[CALLBACKS] += 1
    taken = len(packets)
    if len(packets[-1][3]) != SIZE or len(packets[0][3]) != SIZE or not state[BEGIN]:
        for number, (_, _, _, payload) in enumerate(packets):
            if len(payload) == SIZE:
                continue
            (begin,) = TIME.unpack(payload)
            if begin:
                state[BEGIN], state[TAKEN], state[CALLBACKS] = begin, 0, 1
                taken = len(packets) - number - 1
            else:
                taken -= 1
                state[END] = time.monotonic_ns()
    elif packets[-1][3][-1] != SIZE - 1:
        state[WRONG] += 1
    state[TAKEN] += taken


@plugin.driver
class PathDriver:
    """Opens the channel and asks."""

    name = "hv_path_bench"
    id_table = plugin.ids(PATH_BENCH)

    def probe(self, current: Current, device: Device) -> int:
        """Open, and ask for a run."""
        for word in (BEGIN, END, TAKEN, CALLBACKS, WRONG):
            device.driver_state[word] = 0
        channel = current.channel(device.channel)
        callback = path_onchannelcallback.number
        result = vmbus_open(current, channel, RING_BYTES, RING_BYTES, b"", callback, device.handle)
        return result or vmbus_sendpacket(current, channel, b"go")

    def remove(self, current: Current, device: Device) -> None:
        """Close."""
        vmbus_close(current, current.channel(device.channel))
