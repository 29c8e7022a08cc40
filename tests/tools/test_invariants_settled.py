"""Each invariant over the state of a settled machine, broken on purpose; and a machine that breaks none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from struct import pack_into

import pytest

from emu.doorbells import make_bell
from emu.layout import D_CONNECTION_SUMMARY, VP_REQUEST, vp_page_offset
from emu.wire.messages import MessageType, RescindChannelOffer
from emu.wire.ring_layout import FEATURE_BITS, INTERRUPT_MASK, PENDING_SEND_SZ
from emu.wire.synic import HVMSG_CHANNEL_MESSAGE, MESSAGE_FLAGS_OFFSET, MESSAGE_PAYLOAD_OFFSET, message_slot
from guestproc.current import Current
from guestproc.kernel.functions import WORK_FUNCTIONS
from guestproc.kernel.layout import CallbackMode, Channel
from guestproc.kernel.page_records import PageRun
from guestproc.kernel.rqstor import Requestor
from guestproc.kernel.tasklet import CPU_SHIFT, RUN, SCHED, tasklet_disable, tasklet_disable_nosync
from guestproc.kernel.work_records import WorkItem
from guestproc.kernel.workqueue import QueueNumber
from guestproc.protocol.numbers import Works
from guestproc.view import INBOUND, OUTBOUND, GuestView
from tests.guestproc.conftest import HOST_VERSIONS
from tests.guestproc.world import World, new_world
from tests.tools.settled_world import findings, publish, seen
from tools.invariant_table import RULES, STATE_RULES
from tools.invariants_settled import judge
from tools.live_view import LiveView

RELID = 9


@contextmanager
def opened(era: str = "current") -> Iterator[World]:
    """A guest with an open channel, of which nothing is wrong."""
    with new_world(era=era, versions=HOST_VERSIONS[era], races=True) as world:
        world.boot()
        world.host.device(RELID)
        world.settle()
        yield world


@pytest.fixture
def world() -> Iterator[World]:
    """One of the current era."""
    with opened() as world:
        yield world


@pytest.mark.parametrize("era", ["current", "seed"])
def test_world_at_rest_breaks_none(era: str) -> None:
    """Devices that came, carried packets and went leave nothing behind, in either era."""
    with opened(era) as world:
        world.host.device(10)
        world.settle()
        world.host.write(10, b"hello")
        world.host.rescind(RELID)
        world.settle()

        assert judge(seen(world)) == []


def texts(world: World, number: int) -> list[str]:
    """What breaks one invariant, in words."""
    return [one.text for one in findings(world, number)]


def overlay(world: World, channel: Channel, register: str) -> int:
    """GPA of the page of the processor that takes a channel's interrupts."""
    synic = world.partition.synics[world.cpus[channel.target_cpu.load()].position]
    gpa: int | None = getattr(synic, register).gpa
    assert gpa is not None
    return gpa


def set_ring_word(world: World, side: int, offset: int, value: int) -> None:
    """Write a word of the control page of the channel's ring."""
    gpa = GuestView(world.tables).ring_gpa(world.channel(RELID), side)
    assert gpa is not None
    pack_into("<I", world.machine.ram.memory, gpa + offset, value)


def test_rules_are_in_the_order_of_their_numbers() -> None:
    """One table, and each number once on either side."""
    for numbers in ([rule.NUMBER for rule in RULES], [rule.number for rule in STATE_RULES]):
        assert numbers == sorted(set(numbers))


# -- channels -------------------------------------------------------------------------------------------


def test_rescinded_relid_that_is_never_released(world: World) -> None:
    """INV-01 and INV-28: the host took it back, nobody handles that, and the guest keeps it."""
    world.host.channels[RELID].revoked = True

    assert texts(world, 1) == ["relid 9 was rescinded and is never released"]
    assert "relid 9 was rescinded and is never released" in texts(world, 28)


def test_relid_that_one_end_has(world: World) -> None:
    """INV-01: an offer that the guest lost, and a channel that the host forgot."""
    channel = world.host.channels[RELID]
    channel.offer = replace(channel.offer, child_relid=10)

    assert texts(world, 1) == [
        "the guest has relid 9, which the host has not",
        "the host has relid 10 (OPEN), which the guest has not",
    ]


@pytest.mark.parametrize(("change", "said"), [(1, "offer_in_progress is 1,"), (0xFFFFFFFF, "offer_in_progress is -1,")])
def test_offer_count_that_nothing_stands_behind(world: World, change: int, said: str) -> None:
    """INV-04: a count that an offer left behind, and one that fell twice."""
    world.tables.connection.offer_in_progress.fetch_add(change)

    assert [said in text for text in texts(world, 4)] == [True]


def test_suspend_counts_its_channels(world: World) -> None:
    """INV-04: a channel that closes on suspend is not there."""
    world.tables.connection.nr_chan_close_on_suspend.fetch_add(1)

    assert texts(world, 4) == ["nr_chan_close_on_suspend is 1, and 0 channels are to be closed then"]


def test_waiter_of_a_rescinded_channel(world: World) -> None:
    """INV-06: the flag is up, the opener sleeps, and nothing will come that would wake it."""
    world.host.hold(MessageType.OPENCHANNEL)
    world.host.device(10)
    world.settle()
    assert findings(world, 6) == []

    world.channel(10).rescind.store(1)

    found = findings(world, 6)
    assert [(one.relid, one.actors) for one in found] == [(10, ("PRI_CHAN",))]
    assert "OPENCHANNEL of relid 10" in found[0].text
    world.host.outbox.append((0, b""))
    assert findings(world, 6) == []  # it may be the answer
    world.host.outbox.clear()


def test_stale_name_and_write_into_a_free_record(world: World) -> None:
    """INV-13: the relid table names a generation that is gone; somebody wrote into a freed record."""
    tables = world.tables
    channel = world.channel(RELID)
    at = tables.layout.tables["relids"].gpa + 8 * 77
    pack_into("<Q", world.machine.ram.memory, at, channel.handle + (2 << 32))
    assert texts(world, 13) == ["the relid table has a channel for 77 that is gone"]
    pack_into("<Q", world.machine.ram.memory, at, 0)
    request = tables.requests.alloc()
    assert request is not None
    tables.requests.free(request)
    world.machine.ram.memory[request.gpa + 40] ^= 1

    assert [text.startswith("requests[") for text in texts(world, 13)] == [True]


def test_names_of_what_is_gone(world: World) -> None:
    """INV-13: a channel that names a device of an earlier generation, and a device that names such a channel."""
    channel = world.channel(RELID)
    device = world.tables.devices.find(channel.device_obj)
    assert device is not None
    right, of_device = channel.device_obj, device.channel
    channel.device_obj = right + (2 << 32)
    assert texts(world, 13) == ["relid 9 names a device that is gone"]
    channel.device_obj = right

    device.channel = of_device + (2 << 32)

    assert texts(world, 13) == [f"device {device.index} names the channel {device.channel:#x}, which is gone"]
    device.channel = of_device


def test_channel_off_its_list() -> None:
    """INV-25: era seed finds the channels of a CPU by its list alone."""
    with opened("seed") as world:
        channel = world.channel(RELID)
        listed = world.tables.chan_list(world.tables.cpus.at(channel.target_cpu.load()))
        listed.remove(channel)

        assert len(texts(world, 25)) == 1

        listed.append(channel)
        listed._links(channel)[listed._word] = channel.index + 1
        assert any("does not end" in text for text in texts(world, 25))
        listed._links(channel)[listed._word] = 0


def test_target_that_is_offline(world: World) -> None:
    """INV-26: nobody takes the interrupts of an open channel."""
    channel = world.channel(RELID)
    cpu = world.tables.cpus.at(channel.target_cpu.load())
    cpu.online.store(0)
    assert texts(world, 26) == [f"relid 9: its target CPU {cpu.index} is not online"]
    cpu.online.store(1)
    before = world.host.channels[RELID].opened
    assert before is not None
    other = next(world.machine.vp_index(one.position) for one in world.cpus if one.cpu != cpu.index)
    world.host.channels[RELID].opened = type(before)(
        before.child_relid,
        before.openid,
        before.ringbuffer_gpadlhandle,
        other,
        before.downstream_ringbuffer_pageoffset,
        before.userdata,
    )

    assert len(texts(world, 26)) == 1


# -- slots, flags, tasklets -----------------------------------------------------------------------------


def test_pending_bit_of_an_empty_slot(world: World) -> None:
    """INV-09: the host waits for an EOM that the guest does not know it owes."""
    at = overlay(world, world.channel(RELID), "simp") + message_slot(2) + MESSAGE_FLAGS_OFFSET
    world.machine.ram.memory[at] = 1

    assert len(texts(world, 9)) == 1


def test_message_that_nobody_reads(world: World) -> None:
    """INV-10 and INV-28: it lies in its slot, and neither tasklet nor interrupt will see it."""
    at = overlay(world, world.channel(RELID), "simp") + message_slot(2)
    ram = world.machine.ram.memory
    payload = RescindChannelOffer(RELID).pack()
    ram[at + MESSAGE_PAYLOAD_OFFSET : at + MESSAGE_PAYLOAD_OFFSET + len(payload)] = payload
    pack_into("<I", ram, at, HVMSG_CHANNEL_MESSAGE)
    found = findings(world, 10)
    assert [one.text.split(" lies ")[0] for one in found] == ["RESCIND_CHANNELOFFER of relid 9"]
    assert any("RESCIND_CHANNELOFFER of relid 9 is in slot 2" in text for text in texts(world, 28))

    cpu = world.tables.cpus.at(world.channel(RELID).target_cpu.load())
    cpu.msg_dpc.word.fetch_or(SCHED)

    assert findings(world, 10) == []


def test_flag_that_nobody_takes(world: World) -> None:
    """INV-16 and INV-28: the flag is up, and its interrupt came before it."""
    channel = world.channel(RELID)
    at = overlay(world, channel, "siefp") + 2 * 256
    world.machine.ram.memory[at + 1] |= 1 << (RELID - 8)

    assert [one.relid for one in findings(world, 16)] == [RELID]
    assert any("event flag 9" in text for text in texts(world, 28))
    assert findings(world, 16, parked=(world.cpus[channel.target_cpu.load()].row.slot,)) == []


def test_vector_that_no_processor_takes(world: World) -> None:
    """INV-28: it is requested, and nothing is in service that it would have to wait behind."""
    position = world.cpus[1].position
    request = vp_page_offset(position) + VP_REQUEST + 24
    world.machine.vps.view.store_u64(request, 1 << (0xF3 - 192))

    assert texts(world, 28) == [f"vector 0xf3 of VP {world.machine.vp_index(position)} is requested"]
    world.machine.vps.view.store_u64(request, 0)


def test_masked_ring_without_its_consumer(world: World) -> None:
    """INV-17: it asked for no interrupts, and nothing of it is due."""
    set_ring_word(world, INBOUND, INTERRUPT_MASK, 1)

    assert [one.relid for one in findings(world, 17)] == [RELID]


def test_tasklet_left_disabled_or_scheduled(world: World) -> None:
    """INV-18: a disable that nobody takes back, and a tasklet that its processor has forgotten."""
    channel = world.channel(RELID)
    tasklet_disable_nosync(channel.callback_event)
    assert texts(world, 18) == ["the tasklet of relid 9 is left disabled 1 time"]

    channel.callback_event.word.store(SCHED | 1 << CPU_SHIFT)

    assert texts(world, 18) == ["the tasklet of relid 9 is scheduled on CPU 1, enabled, and does not run"]
    channel.callback_event.word.store(0)


def test_tasklets_of_a_processor(world: World) -> None:
    """INV-18: those of its messages and of its events (below 2.4, where a flag is everybody's) are told apart."""
    cpu = world.tables.cpus.at(1)
    for tasklet, name in ((cpu.msg_dpc, "messages"), (cpu.event_dpc, "events")):
        tasklet_disable_nosync(tasklet)
        assert texts(world, 18) == [f"the tasklet of CPU 1's {name} is left disabled 1 time"]
        tasklet.word.store(0)


# -- rings, pages, pools --------------------------------------------------------------------------------


def test_bytes_that_nobody_is_told_of(world: World) -> None:
    """INV-19 and INV-28: the host wrote, and did not signal a reader that asked for it."""
    world.host.write(RELID, b"hello", signal=False)

    found = findings(world, 19)
    assert [(one.relid, one.text.endswith("unmasked and unread")) for one in found] == [(RELID, True)]
    assert any("that the guest has not read" in text for text in texts(world, 28))


def test_bytes_of_a_channel_that_a_program_reads(world: World) -> None:
    """INV-19: a program that has the rings mapped looks at them when it likes; any other direct reader must be told."""
    channel = world.channel(RELID)
    world.host.write(RELID, b"hello", signal=False)
    channel.callback_mode = CallbackMode.DIRECT
    assert [one.relid for one in findings(world, 19)] == [RELID]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuestView, "driver_name", lambda _view, _number: "uio_hv_generic")

        assert findings(world, 19) == []


def test_bytes_that_the_host_does_not_see(world: World) -> None:
    """INV-19 and INV-28: a doorbell whose summary was lost; until then it is a signal under way."""
    from guestproc.vmbus.packets import vmbus_sendpacket

    world.host.channels[RELID].echo = False
    world.call(lambda current: vmbus_sendpacket(current, current.channel(world.channel(RELID).handle), b"x"))
    assert [one.actors for one in findings(world, 19)] == [("hypervisor",)]

    make_bell(world.machine.doorbells.view, world.channel(RELID).sig_event, lambda: None)()
    world.machine.doorbells.view.store_u64(D_CONNECTION_SUMMARY, 0)

    assert findings(world, 19) == []
    assert any(text.startswith("the doorbell of connection") for text in texts(world, 28))


@pytest.mark.parametrize(("side", "who"), [(OUTBOUND, "the guest"), (INBOUND, "the host")])
def test_room_that_nobody_is_told_of(world: World, side: int, who: str) -> None:
    """INV-20: a writer that waits for less than is free, and no signal under way."""
    set_ring_word(world, side, FEATURE_BITS, 1)
    set_ring_word(world, side, PENDING_SEND_SZ, 1 << 30)
    assert findings(world, 20) == []

    set_ring_word(world, side, PENDING_SEND_SZ, 64)

    assert texts(world, 20) == [f"relid 9: {who} waits for 64 bytes of its ring, which are free"]


def test_ring_pages_that_went_to_the_free_list(world: World) -> None:
    """INV-12: freed while the host has them; and a GPADL whose pages the guest forgot."""
    channel = world.channel(RELID)
    count = channel.ring_send_pages + channel.ring_recv_pages
    run = PageRun(channel.ring_gpa >> 12, count, channel.ring_generation)
    world.call(lambda current: current.tables.pages.free(current.actor, run))
    assert [text.endswith("is free") for text in texts(world, 12)] == [True]

    channel.ring_gpa = 0

    assert ["has taken back" in text for text in texts(world, 12)] == [True]


def test_rings_of_which_the_host_tells_no_gpadl(world: World) -> None:
    """INV-12: the guest has the channel open; then its rings are the channel's, whatever the host says."""
    channel = world.channel(RELID)
    world.host.gpadls.clear()
    assert texts(world, 12) == []
    run = PageRun(channel.ring_gpa >> 12, channel.ring_send_pages + channel.ring_recv_pages, channel.ring_generation)
    world.call(lambda current: current.tables.pages.free(current.actor, run))

    assert texts(world, 12) == [f"page {run.pfn:#x} of relid 9's rings, which the host has, is free"]
    channel.ring_gpa = 0


def test_overlay_that_went_to_the_free_list(world: World) -> None:
    """INV-12: a message page that is the allocator's again, and the host writes there."""
    cpu = world.tables.cpus.at(1)
    run = world.tables.pages.run_at(cpu.synic_message_page_gpa >> 12)
    world.call(lambda current: current.tables.pages.free(current.actor, run))

    vp = world.machine.vp_index(world.cpus[1].position)
    assert [f"SIMP of VP {vp}, is free" in text for text in texts(world, 12)] == [True]


def test_pools_whose_parts_are_not_the_whole(world: World) -> None:
    """INV-22: a request id that is neither free nor out, a page and a record that were lost."""
    tables, channel = world.tables, world.channel(RELID)
    ram = world.machine.ram.memory
    gpa = (tables.layout.end_page - 1) << 12
    Requestor(tables.ram, gpa, 4).init()
    channel.rqstor_gpa, channel.rqstor_size = gpa, 4
    assert texts(world, 22) == []
    pack_into("<Q", ram, gpa + 16, (1 << 64) - 1)  # the first slot ends the list
    assert texts(world, 22) == ["relid 9: of 4 request ids 0 are out and 1 are free"]
    pack_into("<Q", ram, gpa + 16, 0)  # and now it leads to itself
    assert texts(world, 22) == ["relid 9: of 4 request ids 0 are out and 0 are free"]
    channel.rqstor_gpa = 0
    tables.zones.at(0).free_pages += 1
    assert len(texts(world, 22)) == 1
    tables.zones.at(0).free_pages -= 1

    tables.work._in_use.fetch_add(1)

    assert texts(world, 22) == ["1 record of work is counted as taken, 0 are"]
    tables.work._in_use.fetch_sub(1)


def test_frames_that_came_wrong(world: World) -> None:
    """INV-23: what a NIC's poll counted of frames out of sequence, or damaged."""
    nvchan = world.tables.net_channels.alloc()
    assert nvchan is not None
    nvchan.channel, nvchan.rx_packets = world.channel(RELID).handle, 5
    assert texts(world, 23) == []

    nvchan.rx_gaps, nvchan.rx_checksum_errors = 1, 2

    assert texts(world, 23) == ["of 5 frames that came on relid 9 1 out of sequence and 2 damaged"]


def test_queue_that_nobody_wakes_may_be_in_the_midst_of_it(world: World) -> None:
    """INV-22: a transmit queue is stopped and nothing is out; who is held may be about to wake it."""
    nvchan = world.tables.net_channels.alloc()
    assert nvchan is not None
    nvchan.channel, nvchan.attached = world.channel(RELID).handle, 1
    nvchan.tx_stopped.store(1)

    told = "the transmit queue of relid 9 is stopped, and no completion will come that wakes it"
    assert texts(world, 22) == [told]
    assert findings(world, 22, parked=(world.cpus[0].row.slot,)) == []


# -- the rule of everything -----------------------------------------------------------------------------


def test_work_that_nobody_was_woken_for(world: World) -> None:
    """INV-28: it is on its queue, and the queue's worker sleeps."""
    queues, queue = world.tables.work_queues, world.tables.queues.at(QueueNumber.SUB_CHAN)
    item = queues.allocate(Works.VMBUS_ADD_CHANNEL_WORK, (world.channel(RELID).handle,))
    assert item is not None
    item.queue, item.sequence = QueueNumber.SUB_CHAN, queue.queued + 1
    queue.queued += 1
    queue.head = queue.tail = item.index + 1

    assert texts(world, 28) == ["vmbus_add_channel_work waits on queue SUB_CHAN"]


def test_work_that_is_counted_and_is_nowhere(world: World) -> None:
    """INV-28: one piece more was queued than was done, and there is none."""
    world.tables.queues.at(QueueNumber.RESCIND).queued += 1

    assert ["on queue RESCIND" in text for text in texts(world, 28)] == [True]


def test_request_that_is_never_answered(world: World) -> None:
    """INV-28: the opener sleeps for good, in its work, and is named."""
    world.host.hold(MessageType.OPENCHANNEL)
    world.host.device(10)
    world.settle()

    found = {one.text: one.actors for one in findings(world, 28)}

    assert found["OPENCHANNEL of relid 10 is not answered"] == ("PRI_CHAN",)
    assert found["vmbus_add_channel_work is not done: PRI_CHAN sleeps in it"] == ("PRI_CHAN",)


def test_messages_that_nobody_takes(world: World) -> None:
    """INV-28: posts that the host does not read, and messages that wait for a slot."""
    world.host.inbox.append((1, b""))
    world.host.outbox.append((0, b""))

    assert texts(world, 28)[:2] == [
        "1 message of the guest's waits to be read by the host",
        "1 message of the host's waits for a buffer",
    ]
    world.host.inbox.clear()
    world.host.outbox.clear()


def test_machine_whose_guest_is_not_ours_is_judged_by_the_hosts_side(world: World) -> None:
    """INV-28: the kernel's records are another's, or not laid out yet; what waits at the host is told all the same."""
    publish(world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(world.machine.config, "no_guest", True)
        assert judge(LiveView(world.machine)) == []
        world.host.inbox.append((1, b""))
        publish(world)

        found = judge(LiveView(world.machine))

    assert [one.text for one in found] == ["1 message of the guest's waits to be read by the host"]
    world.host.inbox.clear()


# -- who waits for whom ---------------------------------------------------------------------------------


def test_answer_that_the_host_has_dropped(world: World) -> None:
    """INV-27: the opener waits for a host that has nothing left to say; who waits for its work is behind it."""
    world.host.hold(MessageType.OPENCHANNEL)
    world.host.device(10)
    world.settle()
    last = "PRI_CHAN waits for the answer to OPENCHANNEL of relid 10: the host has nothing left to answer"
    assert [(one.text, one.relid, one.actors) for one in findings(world, 27)] == [(last, 10, ("PRI_CHAN",))]
    flush = world.start(lambda current: current.tables.work_queues.flush(current.actor, QueueNumber.PRI_CHAN))
    world.settle()
    assert not flush.ended()

    assert f"vcpu0 waits for queue PRI_CHAN to be flushed; {last}" in texts(world, 27)


def test_answer_under_way_is_no_wait_in_vain(world: World) -> None:
    """INV-27: as long as a message lies somewhere, it may be the one."""
    world.host.hold(MessageType.OPENCHANNEL)
    world.host.device(10)
    world.settle()
    world.host.outbox.append((0, b""))

    assert findings(world, 27) == []
    world.host.outbox.clear()


def test_opener_and_rescind_that_wait_for_each_other(world: World) -> None:
    """INV-27: the rescind waits for the probe, the probe for the rescind (races.md A5): a cycle, told by name."""
    world.host.hold(MessageType.OPENCHANNEL)
    world.host.device(10)
    world.settle()
    payload = RescindChannelOffer(10).pack()
    message = bytes(4) + bytes([len(payload)]) + bytes(11) + payload
    known = WORK_FUNCTIONS.lookup

    def rescind_that_waits(current: Current, _item: WorkItem) -> None:
        done = current.channel(world.channel(10).handle).probe_done
        current.connection.state_wait.wait_until_timeout(current.actor, lambda: bool(done.load()), 1 << 40)

    def lookup(number: int) -> Callable[..., None]:
        return rescind_that_waits if number == Works.VMBUS_ONMESSAGE_WORK else known(number)

    def queue_it(current: Current) -> None:
        item = current.tables.work_queues.allocate(Works.VMBUS_ONMESSAGE_WORK, (), message)
        assert item is not None
        current.tables.work_queues.queue_work(current.actor, QueueNumber.RESCIND, item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WORK_FUNCTIONS, "lookup", lookup)
        world.call(queue_it)
        found = findings(world, 27)

    assert [one.text.endswith("a cycle") for one in found] == [True]
    assert set(found[0].actors) == {"PRI_CHAN", "RESCIND"}
    assert "OPENCHANNEL of relid 10 (the host has dropped it), or the rescind of relid 10" in found[0].text


def test_mutexes_taken_crosswise(world: World) -> None:
    """INV-27: each holds what the other waits for, and that is told once."""
    mutexes = (world.tables.connection.channel_mutex, world.tables.devices.at(0).device_lock)
    for vcpu, mutex in zip(world.cpus, mutexes, strict=True):
        mutex._word.store(vcpu.row.number << 32)
    for cpu in (0, 1):
        world.start(lambda current: mutexes[1 - current.cpu]._wait(current.actor), cpu=cpu)
    world.settle()

    assert texts(world, 27) == [
        "vcpu0 waits for devices[0].device_lock; vcpu1 waits for connection[0].channel_mutex: a cycle"
    ]


def test_mutex_of_one_who_died(world: World) -> None:
    """INV-27: who forgot it, or died with it, will not give it back."""
    mutex = world.tables.connection.driver_mutex
    worker = world.workers["SUB_CHAN"].actor.number
    mutex._word.store(worker << 32)
    world.start(lambda current: mutex._wait(current.actor))
    world.settle()
    assert texts(world, 27) == ["vcpu0 waits for connection[0].driver_mutex: SUB_CHAN is idle"]

    world.machine.control.set_dead(worker & 0xFFF, 9)

    assert texts(world, 27) == ["vcpu0 waits for connection[0].driver_mutex: SUB_CHAN died holding it"]


def test_tasklet_that_is_waited_for(world: World) -> None:
    """INV-27: only the processor of the tasklet that somebody waits for stands behind him, not that of any other."""
    tasklet = world.channel(RELID).callback_event
    tasklet.word.store(RUN | 1 << CPU_SHIFT)
    idle = world.tables.connection.tasklet_idle
    world.start(lambda current: tasklet_disable(current.actor, tasklet, idle))
    world.settle()

    assert texts(world, 27) == ["vcpu0 waits for a tasklet to be idle: vcpu1 is idle"]
    tasklet.word.store(0)


def test_count_of_offers_that_never_falls(world: World) -> None:
    """INV-27: a rescind waits for offers of which there are none; held there it may still go on."""
    world.tables.connection.offer_in_progress.fetch_add(1)
    world.host.rescind(RELID)
    world.settle()

    assert texts(world, 27) == ["RESCIND waits for offer_in_progress to fall to 0 (it is 1): no offer is under way"]
    assert findings(world, 27, parked=(world.workers["RESCIND"].actor.number & 0xFFF,)) == []
