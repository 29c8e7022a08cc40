"""Who uses a device besides its driver: programs claim its channels, and `remove` waits until they have let go.

A claim is counted in a word of the device's driver state (`CLAIMS`: how many, and the bit REMOVING), so that whoever
claims, in whatever process, and the remover that waits see one truth. Every driver of ours keeps that word at the
same place, zeroes its state when it is probed, and calls `begin_removal` first in its `remove`.

Who claims several channels and waits on one must be ready to let go of each: a rescind is worked off when the one
before it is done, so a removal that waits for one claim may hold up the rescind that would end the wait on another.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Final

from emu.ipc.atomics import AtomicU64
from guestproc.kernel.layout import DRIVER_STATE_WORDS, Channel, Device
from guestproc.kernel.records import field_of
from guestproc.kernel.wait import SECOND_NS
from guestproc.protocol import opening

if TYPE_CHECKING:
    from guestproc.current import Current

CLAIMS: Final = 3
REMOVING: Final = 1 << 63
CLAIMS_TIMEOUT_NS: Final = 30 * SECOND_NS

STATE_OFFSET: Final = field_of(Device, "driver_state").offset


def state_word(current: Current, device: Device, index: int) -> AtomicU64:
    """A word of the device's driver state, as an atomic."""
    return current.tables.ram.u64(device.gpa + STATE_OFFSET + 8 * index)


def reset_state(device: Device) -> None:
    """All words 0: what a probe begins with."""
    device.driver_state[:] = memoryview(bytes(8 * DRIVER_STATE_WORDS)).cast("Q")


def claim_channels(
    current: Current, driver: int, cpu: int, relid: int = 0, but_not: Container[int] = ()
) -> list[Channel]:
    """Claim a driver's open channels whose interrupts a CPU takes (the calling one), or the one that `relid` names.

    A claimed channel and its device stay until `release_claim`; `being_removed` says when that is wanted. `but_not`
    are handles of channels that the caller has already.
    """
    claimed = []
    with current.connection.channel_mutex.hold(current.actor):
        for primary in current.tables.chn_list:
            for channel in (primary, *current.tables.sc_list(primary)):
                if (
                    opening.is_open(channel)
                    # Who let go of a channel because it is rescinded shall not get it again on its way out.
                    and not channel.rescind.load()
                    and channel.target_cpu.load() == cpu
                    and relid in (0, channel.relid)
                    and channel.handle not in but_not
                    and _claim(current, driver, primary)
                ):
                    claimed.append(channel)
    return claimed


def open_relids(current: Current, cpu: int) -> list[int]:
    """Relids of the open channels whose interrupts a CPU takes."""
    with current.connection.channel_mutex.hold(current.actor):
        channels = (one for primary in current.tables.chn_list for one in (primary, *current.tables.sc_list(primary)))
        return [one.relid for one in channels if opening.is_open(one) and one.target_cpu.load() == cpu]


def _claim(current: Current, driver: int, primary: Channel) -> bool:
    """Under channel_mutex, so that the device is there: one claim more, unless it is being removed."""
    device = current.tables.devices.find(primary.device_obj)
    if device is None or device.driver != driver:
        return False
    claims = state_word(current, device, CLAIMS)
    while not (seen := claims.load()) & REMOVING:
        if claims.cas(seen, seen + 1) == seen:
            return True
    return False


def being_removed(current: Current, channel: Channel) -> bool:
    """Whether who has claimed this channel is asked to let go of it."""
    return bool(claims_word(current, channel).load() & REMOVING) or channel.rescind.load() != 0


def claims_word(current: Current, channel: Channel) -> AtomicU64:
    """The word that a claimed channel's claims are counted in, with the bit REMOVING."""
    return state_word(current, _device_of(current, channel), CLAIMS)


def release_claim(current: Current, channel: Channel) -> None:
    """Give a claim back."""
    state_word(current, _device_of(current, channel), CLAIMS).fetch_sub(1)
    current.connection.state_wait.wake_all(current.actor)


def begin_removal(current: Current, device: Device, name: str) -> None:
    """Nobody claims the device any more; wait until nobody has a claim."""
    claims = state_word(current, device, CLAIMS)
    claims.fetch_or(REMOVING)
    current.connection.state_wait.wake_all(current.actor)  # who claims and sleeps shall see it
    if not current.connection.state_wait.wait_until_timeout(
        current.actor, lambda: claims.load() == REMOVING, CLAIMS_TIMEOUT_NS, device.gpa
    ):
        # It is closed all the same: who sends then is told so, and gets nothing any more.
        current.log(f"{name}: {claims.load() & ~REMOVING} claimants do not leave")


def _device_of(current: Current, channel: Channel) -> Device:
    """The device of a claimed channel."""
    primary = current.channel(channel.primary_channel) if channel.primary_channel else channel
    device: Device = current.tables.devices.from_handle(primary.device_obj)
    return device
