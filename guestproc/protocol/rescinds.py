"""The host takes a channel back: who handles it, and what is left to do (reference 3.11).

    claim      channel_mutex, under which it was found: once (a second RESCIND finds it claimed: races.md A6)
    mark       channelmsg_lock: set the flag and find who waits on the channel, in one (A4)
    meets      atomic: offer and rescind come to where the rescind goes on; the later one of them does that
    decide     channel_mutex, after its offer was handled: who removes it

A channel that was claimed is removed by its handler (or whoever goes on in its place), or by the closer that the
handler leaves it to, and by nobody else: so neither meets a record that the other one freed.
"""

from __future__ import annotations

from enum import Enum, auto

from emu.switches import Fix
from guestproc.kernel.layout import Channel, ChannelState, KernelTables, Request
from guestproc.protocol import pending


class Removal(Enum):
    """What a rescind's handler does at its end."""

    CALL_DRIVER = auto()
    """The driver has a rescind callback of its own (hv_sock, uio), and unregisters the device when it likes."""
    UNREGISTER_DEVICE = auto()
    REMOVE_CHANNEL = auto()
    LEAVE_TO_CLOSER = auto()
    """A sub-channel that is open: whoever closes it waits for rescind_event and removes it."""


def find(tables: KernelTables, relid: int) -> Channel | None:
    """The channel that a RESCIND means; None when there is none."""
    return tables.relids.lookup(relid)


def claim(channel: Channel) -> bool:
    """Whether this is the one handler of the channel's rescind; for a second RESCIND it is not."""
    return not channel.rescind_ref.exchange(1)


def mark(tables: KernelTables, channel: Channel) -> list[Request]:
    """Set the rescind flag; the requests that wait on the channel are to be completed."""
    channel.rescind.store(1)
    return pending.waiting_on(tables, channel)


def meets(channel: Channel) -> bool:
    """Called once by the end of the offer's handling and once by the rescind's handler: whether this is the later one.

    The kernel's handler sleeps until probe_done instead, and holds up the rescinds behind it on its queue. Let A and
    then B be offered, and B and then A taken back while A is being opened: the handler waits for B's probe, which is
    queued behind A's, which waits for a host that says nothing more of A; and what would wake that is the rescind of
    A, which is queued behind the handler. The kernel stands still there for ever.
    """
    return channel.offer_and_rescind.fetch_add(1) == 1


def waits_for_probe(fix: Fix) -> bool:
    """Whether the handler sleeps in its work until probe_done, as the kernel's does: so do machines that make a mistake
    which stops them for ever only then (races.md A4, A5)."""
    return not (fix.recheck_rescind_after_enlist and fix.wake_before_probe_wait)


def decide(channel: Channel) -> Removal:
    """Who removes a rescinded channel whose offer has been handled."""
    if channel.device_obj:
        return Removal.CALL_DRIVER if channel.rescind_callback else Removal.UNREGISTER_DEVICE
    if channel.primary_channel and channel.state.load() != ChannelState.OPEN_STATE:
        return Removal.LEAVE_TO_CLOSER
    # A sub-channel that is closed, or a channel whose offer failed after it was claimed.
    return Removal.REMOVE_CHANNEL


class Closing(Enum):
    """What the closer of a primary does with one of its sub-channels."""

    CLOSE = auto()
    CLOSE_AND_REMOVE = auto()
    AWAIT_RESCIND = auto()
    """Its rescind is being handled and has not come to `decide` yet."""
    LEAVE = auto()
    """It is closed, or was never opened, and whoever ends its rescind removes it."""


def closing(channel: Channel) -> Closing:
    """What to do with a sub-channel of a primary that is closed (`vmbus_disconnect_ring`)."""
    if not channel.rescind.load():
        return Closing.CLOSE
    if channel.rescind_event.done:
        return Closing.CLOSE_AND_REMOVE
    # One whose offer waits to be handled will not open any more. Only an opening is waited for, which ends by itself
    # now; what is queued may be so behind another device's that waits for a rescind behind this closer.
    closed = channel.state.load() in (ChannelState.OPEN_STATE, ChannelState.OFFER_STATE)
    return Closing.LEAVE if closed else Closing.AWAIT_RESCIND
