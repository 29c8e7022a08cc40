"""Two drivers that are told of sub-channels: one that leaves them closed, one that opens them as they come."""

from __future__ import annotations

from guestproc.current import Current
from guestproc.kernel.functions import CHANNEL_CALLBACKS
from guestproc.kernel.layout import Channel
from guestproc.vmbus.channel import vmbus_open
from tests.guestproc.world import World

SUB_CREATED = 900
OPEN_SUB = 901
CALLED: list[int] = []
"""What they noted, in order: relids, or what `vmbus_open` said."""


@CHANNEL_CALLBACKS.register(SUB_CREATED)
def on_sub_created(current: Current, channel: Channel) -> None:
    """A driver that notes its sub-channels and leaves them closed."""
    CALLED.append(channel.relid)


@CHANNEL_CALLBACKS.register(OPEN_SUB)
def open_sub(current: Current, channel: Channel) -> None:
    """A driver that opens its sub-channels as they come."""
    CALLED.append(vmbus_open(current, channel, 8192, 8192, b"", 16))


def add_subs(world: World, count: int = 2) -> list[Channel]:
    """Sub-channels 10, 11, ... of the device with instance 9."""
    for index in range(1, count + 1):
        world.host.device(9 + index, instance=9, index=index)
    world.settle()
    return [world.channel(9 + index) for index in range(1, count + 1)]
