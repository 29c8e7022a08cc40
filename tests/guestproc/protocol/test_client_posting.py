"""What a post does with each hypercall status, and how long it waits."""

from __future__ import annotations

import errno

import pytest

from emu.wire.hypercalls import HvStatus
from emu.wire.messages import MessageType
from guestproc.protocol.posting import RETRIES, Retry, outcome, pause_us

PASSING = {
    HvStatus.INVALID_CONNECTION_ID: Retry.AGAIN,
    HvStatus.INSUFFICIENT_MEMORY: Retry.NO_BUFFERS,
    HvStatus.INSUFFICIENT_BUFFERS: Retry.NO_BUFFERS,
}


@pytest.mark.parametrize("status", HvStatus)
@pytest.mark.parametrize("msgtype", [MessageType.INITIATE_CONTACT, MessageType.OPENCHANNEL, MessageType.UNLOAD])
def test_each_status(status: HvStatus, msgtype: MessageType) -> None:
    """Success ends it, three statuses may pass, all others are -EINVAL; a contact does not wait for connections."""
    expected: int | Retry = PASSING.get(status, -errno.EINVAL)
    if status is HvStatus.SUCCESS:
        expected = 0
    elif status is HvStatus.INVALID_CONNECTION_ID and msgtype is MessageType.INITIATE_CONTACT:
        expected = -errno.ENXIO

    assert outcome(status, msgtype) == expected


@pytest.mark.parametrize("status", [0x01, 0x7FFF, 0xFFFF, -errno.EMSGSIZE])
def test_status_that_nobody_knows_is_refused(status: int) -> None:
    """The hypervisor may say anything."""
    assert outcome(status, MessageType.OPENCHANNEL) == -errno.EINVAL


def test_last_try_says_why() -> None:
    """-EAGAIN for a connection that is not there, -ENOBUFS for buffers."""
    assert (Retry.AGAIN.error, Retry.NO_BUFFERS.error) == (-errno.EAGAIN, -errno.ENOBUFS)


def test_pauses_double_until_the_22nd_failure() -> None:
    """1, 2, 4 ... us, 2.1 s from the 22nd on, 168 s in all (reference 1.6)."""
    pauses = [pause_us(failures) for failures in range(1, RETRIES + 1)]

    assert pauses[:4] == [1, 2, 4, 8]
    assert pauses[20:24] == [1 << 20, 1 << 21, 1 << 21, 1 << 21]
    assert 167 < sum(pauses) / 1e6 < 169
