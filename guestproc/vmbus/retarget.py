"""`target_cpu_store`: a channel's interrupts move to another processor (reference 3.15; drivers/hv/vmbus_drv.c).

    check     under channel_mutex, which closers hold: it is open; so the host gets no MODIFYCHANNEL of a closed channel
    post      under the same mutex; it handles our messages in their order, so a CLOSE comes behind
    wait      from 5.3 on, for its answer, with the mutex given back: a rescind needs it, and ends the wait (F5)
    update    under the mutex again, if it is still the same channel, opened the same time

cpu_hotplug_lock is read-held all the while: the new processor stays. Interrupts that the host sent to the old one
before it handled the message are taken there, which is harmless where any processor finds any channel. Era `seed`
has lists of channels for each processor and speaks no version that could move a channel; a kernel that has
both loses what comes to the wrong one meanwhile (races.md F1: `fix.global_relid_map` off).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from emu.syncpoint import Point
from emu.tracing import E_VMBUS_SEND_MODIFYCHANNEL
from emu.wire.messages import MessageType, ModifyChannel
from emu.wire.versions import VERSION_WIN10_V4_1, VERSION_WIN10_V5_3
from guestproc.kernel.cpus import cpus_read_lock
from guestproc.kernel.layout import Channel, Request
from guestproc.protocol import opening, pending, placement
from guestproc.protocol.numbers import Ipis
from guestproc.vmbus.chan_list import run_on_target_cpu
from guestproc.vmbus.connection import vmbus_post_msg
from guestproc.vmbus.requests import enter_request, leave_request, wait_for_reply

if TYPE_CHECKING:
    from guestproc.current import Current

ACK_HOLDS_MUTEX: Final = "ack_holds_mutex"
"""Which of the two ways of `fix.move_under_mutex` is wrong."""
_MOVE_CHECKED: Final = int(Point.MOVE_CHECKED)
_MOVE_WAIT_ACK: Final = int(Point.MOVE_WAIT_ACK)


def target_cpu_store(current: Current, handle: int, text: str) -> int:
    """A write to `channels/N/cpu`: 0, also when the channel is there already, or a negative errno.

    -EIO: a version below 4.1, no number, a channel that is not open (any more), a host that refused; -EINVAL: no
    processor that is online; -EBUSY: it is being moved; -ENODEV: it is rescinded, or gone; -ETIMEDOUT: no answer came.
    """
    connection, tables, actor = current.connection, current.tables, current.actor
    if connection.vmbus_proto_version < VERSION_WIN10_V4_1:
        return -errno.EIO
    cpu = scan_unsigned(text)
    if cpu is None:
        return -errno.EIO
    if cpu >= tables.layout.ncpus:
        return -errno.EINVAL
    with cpus_read_lock(connection, actor):
        if not placement.online_cpus(tables) >> cpu & 1:
            return -errno.EINVAL
        with connection.channel_mutex.hold(actor):
            return _move(current, handle, cpu)


def scan_unsigned(text: str) -> int | None:
    """`sscanf(buf, "%u", …)`: the number that a text begins with."""
    text = text.lstrip()
    digits = text[: len(text) - len(text.lstrip("0123456789"))]
    return int(digits) if digits.isascii() and 0 < len(digits) < 10 else None


def _move(current: Current, handle: int, cpu: int) -> int:
    """Under channel_mutex, which is given back meanwhile: tell the host, then write it down."""
    channel = current.tables.channels.find(handle)
    if channel is None or channel.rescind.load():
        return -errno.ENODEV
    # A host ignores what it gets of a channel that is not open, and would never answer.
    if not opening.is_open(channel):
        return -errno.EIO
    if channel.target_cpu.load() == cpu:
        return 0
    _checked(current, channel)
    rings = channel.ring_generation
    result = vmbus_send_modifychannel(current, channel, current.cpu_record(cpu).vp_index)
    if result:
        return result if result in (-errno.ENODEV, -errno.EBUSY, -errno.ETIMEDOUT) else -errno.EIO
    if not channel.alive() or channel.rescind.load():
        return -errno.ENODEV
    # Closed meanwhile, and opened again perhaps: then for the processor that it had.
    if not opening.is_open(channel) or channel.ring_generation != rings:
        return -errno.EIO
    _change_target(current, channel, cpu)
    return 0


def _checked(current: Current, channel: Channel) -> None:
    """It was found open, and the host is told next."""
    mutex, fix = current.connection.channel_mutex, current.fix
    # Wrong on purpose (races.md F5, send_after_close): looked at without the mutex, so that it may be closed by now.
    alone = not fix.move_under_mutex and fix.variant != ACK_HOLDS_MUTEX
    if alone:
        mutex.release(current.actor)
    if current.armed[_MOVE_CHECKED]:
        current.reach(_MOVE_CHECKED, channel.relid)
    if alone:
        mutex.acquire(current.actor)


def _change_target(current: Current, channel: Channel, cpu: int) -> None:
    """Write down who takes its interrupts; where there are lists, two processors change theirs."""
    if current.percpu_lists:
        run_on_target_cpu(current, channel, Ipis.PERCPU_CHANNEL_DEQ)
    placement.retarget(current.tables, channel, cpu)
    if current.percpu_lists:
        run_on_target_cpu(current, channel, Ipis.PERCPU_CHANNEL_ENQ)


def vmbus_send_modifychannel(current: Current, channel: Channel, target_vp: int) -> int:
    """Under channel_mutex: ask the host to interrupt another VP for this channel, and from 5.3 on wait for its answer.

    0; -EAGAIN: it refused; -EBUSY: it was asked before and has not answered; -ENODEV: it took the channel back;
    -ENOMEM; -ETIMEDOUT; what a post says.
    """
    if current.connection.vmbus_proto_version >= VERSION_WIN10_V5_3:
        return send_modifychannel_with_ack(current, channel, target_vp)
    return _post(current, channel, target_vp)


def send_modifychannel_with_ack(current: Current, channel: Channel, target_vp: int) -> int:
    """As `vmbus_send_modifychannel`, from 5.3 on; `channel` may be gone when it returns."""
    if _is_moving(current, channel.relid):
        # The kernel posts a second one, which a host takes for a mistake and does not answer.
        return -errno.EBUSY
    request = enter_request(current, MessageType.MODIFYCHANNEL, child_relid=channel.relid, channel=channel.handle)
    if request is None:
        return -errno.ENOMEM
    try:
        if channel.rescind.load():
            return -errno.ENODEV
        result = _post(current, channel, target_vp)
        return result or _wait_for_ack(current, request) or pending.modify_result(request)
    finally:
        leave_request(current, request)


def _is_moving(current: Current, relid: int) -> bool:
    with current.connection.channelmsg_lock.hold(current.actor):
        return pending.is_moving(current.tables, relid)


def _post(current: Current, channel: Channel, target_vp: int) -> int:
    """MODIFYCHANNEL; 0, or what a post says."""
    result = vmbus_post_msg(current, ModifyChannel(channel.relid, target_vp))
    current.record(E_VMBUS_SEND_MODIFYCHANNEL, channel.relid, target_vp, result)
    return result


def _wait_for_ack(current: Current, request: Request) -> int:
    """Without channel_mutex: a rescind needs it, and is what ends this wait if the host does not answer any more."""
    if not current.fix.move_under_mutex and current.fix.variant == ACK_HOLDS_MUTEX:
        # Wrong on purpose (races.md F5): with the mutex, for which the rescind then waits.
        return _reply(current, request)
    mutex = current.connection.channel_mutex
    mutex.release(current.actor)
    try:
        return _reply(current, request)
    finally:
        mutex.acquire(current.actor)


def _reply(current: Current, request: Request) -> int:
    """As `wait_for_reply`."""
    if current.armed[_MOVE_WAIT_ACK]:
        current.reach(_MOVE_WAIT_ACK, request.child_relid)
    return wait_for_reply(current, request)
