"""How our drivers get sub-channels: ask the device, wait for the answer, open each as its offer comes.

The driver sets its callback before it asks (`vmbus_set_sc_create_callback`), since offers may come before the answer.
The callback runs on hv_sub_chan, beside a probe that waits and beside a remove that closes; so who opens a sub-channel
of a device that is being removed meanwhile closes it again itself. A host that does not answer, or that does not offer
what it granted, costs the probe a deadline and no more: the device works with the channels that it has.

Driver state words: 4 what the device answered; 5 sub-channels that opened, 6 that did not; 7 callbacks that are
running (all atomic).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from emu.errors import ProtocolViolation
from emu.ring import Packet
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP
from emu.wire.subchannel_request import SubchannelStatus, pack_request, parse_completion
from guestproc.drivers.claims import CLAIMS, REMOVING, state_word
from guestproc.kernel.layout import Channel, Device
from guestproc.kernel.wait import SECOND_NS
from guestproc.protocol import devices
from guestproc.vmbus.channel import vmbus_close_internal, vmbus_free_ring
from guestproc.vmbus.packets import vmbus_sendpacket

if TYPE_CHECKING:
    from guestproc.current import Current

ANSWER: Final = 4
OPENED: Final = 5
FAILED: Final = 6
RUNNING: Final = 7

PENDING: Final = 1 << 63
ANSWERED: Final = 1 << 62
REQUEST_ID: Final = int.from_bytes(b"SUBCHANS", "little")
"""The transaction id of a request."""
TIMEOUT_NS: Final = 10 * SECOND_NS
"""For the answer, then again for the offers and their opening."""
WIND_UP_TIMEOUT_NS: Final = 60 * SECOND_NS
"""For callbacks that run when their device is removed; each waits for the host at most once."""


def ask_for_subchannels(current: Current, device: Device, channel: Channel, count: int, name: str) -> None:
    """In the probe, the primary open: ask for `count`, and see those that are granted open."""
    answer = state_word(current, device, ANSWER)
    answer.store(PENDING)
    result = vmbus_sendpacket(current, channel, pack_request(count), REQUEST_ID, flags=COMPLETION_REQUESTED)
    if result:
        answer.store(0)
        current.log(f"{name}: sub-channels cannot be asked for ({result})")
        return
    if not _wait(current, channel, lambda: bool(answer.load() & ANSWERED)):
        # Whatever comes now is no answer any more, but the channel's own.
        answer.store(0)
        current.log(f"{name}: no answer to a request for {count} sub-channels")
        return
    status, granted = answer.load() >> 32 & 0xFFFF, answer.load() & 0xFFFFFFFF
    if status != SubchannelStatus.SUCCESS:
        current.log(f"{name}: {count} sub-channels refused with status {status}")
        return
    opened, failed = state_word(current, device, OPENED), state_word(current, device, FAILED)
    if not _wait(current, channel, lambda: opened.load() + failed.load() >= granted) or failed.load():
        current.log(f"{name}: {opened.load()} of {granted} sub-channels opened")


def _wait(current: Current, channel: Channel, done: Callable[[], bool]) -> bool:
    """Wait for something that the host does, unless it takes the channel back; whether it was done."""
    current.connection.state_wait.wait_until_timeout(
        current.actor, lambda: done() or channel.rescind.load() != 0, TIMEOUT_NS
    )
    return done()


def take_answer(current: Current, device: Device, packets: list[Packet]) -> None:
    """In the primary's callback: the first packet that completes the request is for the probe, and is taken out."""
    answer = state_word(current, device, ANSWER)
    if not answer.load() & PENDING:
        return
    for position, (packet_type, _flags, trans_id, payload) in enumerate(packets):
        if packet_type == VM_PKT_COMP and trans_id == REQUEST_ID:
            del packets[position]
            answer.cas(PENDING, ANSWERED | _judged(current, payload))
            current.connection.state_wait.wake_all(current.actor)
            return


def _judged(current: Current, payload: bytes) -> int:
    """Status and count of a completion, as the word holds them; nonsense is a refusal."""
    try:
        status, count = parse_completion(payload)
    except ProtocolViolation as violation:
        current.refuse(violation)
        return SubchannelStatus.INVALID << 32
    return min(status, 0xFFFF) << 32 | count


# -- in the sc_creation_callback --------------------------------------------------------------------------


class Opening(Protocol):
    """One try of a driver to open one of its channels."""

    def open(self, device: Device) -> int:
        """Open the channel; 0 or a negative errno."""

    def keep(self) -> None:
        """Under channel_mutex: the channel stays; from now on the driver's `remove` is to take it away."""

    def undo(self) -> None:
        """It did not open, or was closed again at once: give back what `open` took besides."""


def add_subchannel(current: Current, channel: Channel, opening: Opening) -> None:
    """Open a new sub-channel for its device."""
    device = _hold_device(current, channel)
    if device is None:
        return
    try:
        stays = opening.open(device) == 0 and _keep(current, channel, device, opening)
        if not stays:
            opening.undo()
        state_word(current, device, OPENED if stays else FAILED).fetch_add(1)
    finally:
        state_word(current, device, RUNNING).fetch_sub(1)
        with current.connection.channel_mutex.hold(current.actor):
            devices.put_device(current.tables, device)
        current.connection.state_wait.wake_all(current.actor)


def _hold_device(current: Current, channel: Channel) -> Device | None:
    """The sub-channel's device with a reference to it; None when it is gone, or on its way out."""
    with current.connection.channel_mutex.hold(current.actor):
        primary = current.tables.channels.find(channel.primary_channel)
        device = None if primary is None else current.tables.devices.find(primary.device_obj)
        if device is None or state_word(current, device, CLAIMS).load() & REMOVING:
            return None
        device.state.fetch_add(devices.REFERENCE)
        state_word(current, device, RUNNING).fetch_add(1)
        return device


def _keep(current: Current, channel: Channel, device: Device, opening: Opening) -> bool:
    """Leave an open sub-channel to its driver, or close it: whoever removes the device may have passed it by.

    The remover sets REMOVING and then looks for open channels under the same mutex: one of the two closes it.
    """
    with current.connection.channel_mutex.hold(current.actor):
        if not state_word(current, device, CLAIMS).load() & REMOVING:
            opening.keep()
            return True
        if vmbus_close_internal(current, channel) == 0:
            vmbus_free_ring(current, channel)
        return False


def wait_for_callbacks(current: Current, device: Device, channel: Channel, name: str) -> None:
    """In `remove`, the primary closed: until no callback of this life of the device runs any more.

    Not when the host took the primary back: its sub-channels' rescinds may be queued behind this one, and such a
    device is not probed again.
    """
    running = state_word(current, device, RUNNING)
    if channel.rescind.load() or current.connection.state_wait.wait_until_timeout(
        current.actor, lambda: not running.load() or channel.rescind.load() != 0, WIND_UP_TIMEOUT_NS
    ):
        return
    current.log(f"{name}: {running.load()} sub-channels are still being opened")
