"""Who reads a channel: the processor whose program has claimed it, wherever the host's interrupts come.

A kernel's drivers share their memory; ours keep what came for a program in the program's process. So when a channel
has been moved, the processor that is interrupted leaves the ring as it is, masked, and tells the reader, which
runs the channel's tasklet itself (as the kernel's receive packet steering has another processor do the work).

    the interrupted one    mark the channel LEFT, the reader's `left` word, and kick it; its tasklet ends masked
    the reader             at a reschedule interrupt: take the marks away, schedule the channel's tasklet here
    who stops reading      takes its number away; a mark that was there means that the ring is still to be read

`Channel.reader` is one word, changed by compare-and-swap, so no mark is set for a reader that has gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from guestproc.kernel.layout import Channel

if TYPE_CHECKING:
    from guestproc.current import Current

LEFT: Final = 1 << 31
NOBODY: Final = 0


def begin_reading(current: Current, channel: Channel) -> bool:
    """This processor reads it from now on; False: another one does."""
    return channel.reader.cas(NOBODY, current.cpu + 1) & ~LEFT in (NOBODY, current.cpu + 1)


def end_reading(current: Current, channel: Channel) -> None:
    """This processor reads it no more; what was left to it is read by whoever is interrupted, this once by us."""
    if channel.reader.exchange(NOBODY) & LEFT:
        _schedule(current, channel)


def leave_to_reader(current: Current, channel: Channel) -> bool:
    """In the callback: whether another processor reads this channel; it is told, and the callback leaves the ring."""
    word = channel.reader
    while True:
        seen = word.load()
        if seen & ~LEFT in (NOBODY, current.cpu + 1):
            return False
        if word.cas(seen, seen | LEFT) == seen:
            break
    reader = (seen & ~LEFT) - 1
    # Behind the mark: who finds this word set finds the channel.
    current.cpu_record(reader).left.store(1)
    current.actor.kick_cpu(reader)
    return True


def take_what_was_left(current: Current, handles: Iterable[int]) -> None:
    """In the reschedule interrupt: schedule the tasklets of those channels that were left to this processor."""
    left = current.cpu_record().left
    # Taken away before the channels are looked at: a mark that comes behind that look sets it anew.
    if not left.load() or not left.exchange(0):
        return
    mine = current.cpu + 1 | LEFT
    for handle in handles:
        channel = current.tables.channels.find(handle)
        if channel is not None and channel.reader.load() == mine and channel.reader.cas(mine, mine & ~LEFT) == mine:
            _schedule(current, channel)


def _schedule(current: Current, channel: Channel) -> None:
    assert current.tasklets is not None
    current.tasklets.schedule(channel.callback_event)
