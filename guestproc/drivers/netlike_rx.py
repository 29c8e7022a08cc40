"""What the netlike driver owes its device: a completion for each frame that asked for one, sent by the poll.

The ring to the host may be full then. What cannot be sent is kept, and the poll that could not send it comes again: it
may be the last that anybody would schedule (`send_recv_completions`, `enq_receive_complete`).
"""

from __future__ import annotations

import errno
from struct import pack, unpack
from typing import TYPE_CHECKING

from emu.errors import ProtocolViolation
from emu.wire.netlike_protocol import FRAME, NetlikeStatus, pack_reply
from emu.wire.packets import VM_PKT_COMP
from guestproc.kernel.layout import RX_OWED_MAX, Channel, NetChannel
from guestproc.vmbus.packets import vmbus_sendpacket

if TYPE_CHECKING:
    from guestproc.current import Current


def owed_ids(nvchan: NetChannel) -> list[int]:
    """Transaction ids of the frames whose completion is still to be sent, oldest first."""
    count = nvchan.rx_owed
    return list(unpack(f"<{count}Q", nvchan.rx_ids[: 8 * count]))


def _keep(nvchan: NetChannel, ids: list[int]) -> None:
    nvchan.rx_ids = pack(f"<{len(ids)}Q", *ids).ljust(8 * RX_OWED_MAX, b"\0")
    nvchan.rx_owed = len(ids)


def enq_receive_complete(current: Current, channel: Channel, nvchan: NetChannel, trans_ids: list[int]) -> None:
    """Note that these frames are to be completed; what there is no room for is refused."""
    ids = owed_ids(nvchan) + trans_ids
    if len(ids) > RX_OWED_MAX:
        text = f"netlike: {len(ids)} frames wait for their completion"
        violation = ProtocolViolation(text, rule="netlike-completions", field="trans_id", value=len(ids))
        current.refuse(violation, f"relid {channel.relid}")
    _keep(nvchan, ids[:RX_OWED_MAX])


def send_recv_completions(current: Current, channel: Channel, nvchan: NetChannel) -> bool:
    """Send what is owed; whether the poll is to come again, because the ring was full."""
    ids = owed_ids(nvchan)
    while ids:
        reply = pack_reply(FRAME, NetlikeStatus.SUCCESS)
        if vmbus_sendpacket(current, channel, reply, ids[0], packet_type=VM_PKT_COMP) == -errno.EAGAIN:
            break
        del ids[0]  # sent, or nobody is there any more whom it could be sent to
    _keep(nvchan, ids)
    if not current.fix.recheck_after_stop and current.fix.variant == "rx_completion":
        return False  # wrong on purpose (races.md D4): the poll ends, and nobody schedules the next one
    return bool(ids)
