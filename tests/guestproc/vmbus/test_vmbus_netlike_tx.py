"""The netlike driver's transmit queue: stopped when its ring is low, woken by completions, never left with nobody."""

from __future__ import annotations

import errno

import pytest

from emu.switches import Fix
from emu.wire.netlike_protocol import pack_frame
from emu.wire.packets import COMPLETION_REQUESTED
from guestproc.current import Current
from guestproc.drivers import netlike_tx
from guestproc.drivers.netlike import netvsc_poll
from guestproc.drivers.netlike_rx import owed_ids
from guestproc.drivers.netlike_tx import netif_tx_queue_stopped, netvsc_send_tx_complete, netvsc_start_xmit
from guestproc.kernel.layout import Channel, NetChannel
from guestproc.kernel.napi import napi_schedule_prep
from guestproc.vmbus.packets import vmbus_sendpacket
from tests.guestproc.vmbus.test_vmbus_mistakes import mistaken
from tests.guestproc.vmbus.test_vmbus_netlike import RELID, channel, era, record
from tests.guestproc.world import World
from tests.tools.settled_world import findings

__all__ = ["channel", "era"]

FRAME = bytes(1_000)


def send_until_stopped(world: World) -> int:
    """How many frames fit before the queue is stopped, or, of one that is woken at once, the ring is full."""
    world.host.channels[RELID].echo = False
    nvchan = record(world)

    def send(current: Current) -> int:
        channel, count = current.channel(nvchan.channel), 0
        while (result := netvsc_start_xmit(current, channel, nvchan, FRAME)) == 0:
            count += 1
        assert result in (-errno.EBUSY, -errno.EAGAIN)
        return count

    return world.call(send)


def complete(world: World, nvchan: NetChannel) -> None:
    """The poll takes one completion."""
    world.call(lambda current: netvsc_send_tx_complete(current, current.channel(nvchan.channel), nvchan))


def test_last_completion_wakes_a_stopped_queue(booted: World, channel: Channel) -> None:
    """It stops below a tenth of the ring, with frames under way; who takes the last of them wakes it."""
    sent, nvchan = send_until_stopped(booted), record(booted)
    assert netif_tx_queue_stopped(nvchan)
    assert nvchan.queue_sends.load() == sent > 100

    for _ in range(sent - 1):
        complete(booted, nvchan)
    assert netif_tx_queue_stopped(nvchan)
    assert findings(booted, 22) == []
    complete(booted, nvchan)

    assert not netif_tx_queue_stopped(nvchan)


@pytest.mark.parametrize("right", [True, False])
def test_completions_that_come_before_the_stop(
    booted: World, channel: Channel, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D4 and INV-22: all of them between the decision and the stop. Who looks again wakes the queue itself."""
    mistaken(booted, recheck_after_stop=right)
    stop = netlike_tx.netif_tx_stop_queue

    def too_late(nvchan: NetChannel) -> None:
        nvchan.queue_sends.store(0)
        stop(nvchan)

    monkeypatch.setattr(netlike_tx, "netif_tx_stop_queue", too_late)
    send_until_stopped(booted)

    assert netif_tx_queue_stopped(record(booted)) is not right
    assert len(findings(booted, 22)) == (not right)
    assert Fix().recheck_after_stop


@pytest.mark.parametrize("right", [True, False])
def test_poll_that_cannot_complete_what_came(booted: World, channel: Channel, right: bool) -> None:
    """D4 and INV-22: the ring to the host is full. A poll that owes completions comes again, or nobody does."""
    mistaken(booted, recheck_after_stop=right, variant="" if right else "rx_completion")
    nvchan, host = record(booted), booted.host.channels[RELID]
    host.echo = False
    booted.call(lambda current: fill(current, current.channel(nvchan.channel)))
    assert host.producer is not None
    host.producer.write(pack_frame(0, bytes(60)), 77, COMPLETION_REQUESTED)

    def poll(current: Current) -> tuple[int, list[int], bool]:
        assert napi_schedule_prep(nvchan.napi)
        work = netvsc_poll(current, nvchan, 64)
        seen = work, owed_ids(nvchan), nvchan.napi.scheduled
        # The host reads, and signals nobody: nobody waits for the room.
        words = current.rings.of(current.channel(nvchan.channel)).outbound.words
        words.store_read(words.load_write())
        return seen

    assert booted.call(poll) == (1, [77], right)
    booted.settle()
    assert owed_ids(nvchan) == ([] if right else [77])
    assert len(findings(booted, 22)) == (not right)


def fill(current: Current, channel: Channel) -> None:
    """Until not even a completion fits."""
    for size in (1_000, 8):
        while vmbus_sendpacket(current, channel, bytes(size)) == 0:
            pass
