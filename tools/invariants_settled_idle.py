"""INV-28, the rule that asks of everything: with everybody asleep, nothing may be left to do."""

from __future__ import annotations

from collections.abc import Iterator

from emu.layout import RunState
from emu.wire.synic import VMBUS_MESSAGE_SINT
from guestproc.kernel.workqueue import QueueNumber
from guestproc.view import INBOUND, OUTBOUND
from tools.invariants import Finding
from tools.invariants_settled import Scene
from tools.invariants_settled_channels import relids_left, request_text
from tools.invariants_settled_interrupts import open_channels
from tools.invariants_settled_rings import guest_reads, host_reads, left_lying
from tools.live_view import LiveView
from tools.nouns import counted
from tools.waits import waits

NUMBER = 28


def nothing_is_left(scene: Scene) -> Iterator[Finding]:
    """INV-28: queues empty, slots NONE, flags 0, rings drained or their consumer off, requests answered, no leaks."""
    view = scene.view
    for text in view.under_way():
        yield Finding(NUMBER, text)
    yield from _flags_and_bells(view)
    if view.tables is None:
        return
    yield from _queues(view)
    yield from _requests(scene)
    yield from _rings(scene)
    yield from relids_left(scene, NUMBER)


def _flags_and_bells(view: LiveView) -> Iterator[Finding]:
    for position in range(view.machine.vp_count):
        vp, name = view.machine.vp_index(position), f"vcpu{view.cpu_of(position)}"
        for flag in view.flags(position, VMBUS_MESSAGE_SINT):
            yield Finding(NUMBER, f"event flag {flag} of VP {vp} is set", relid=flag, actors=(name,))
        if view.run_state(position) != RunState.OFFLINE and (vector := view.deliverable(position)):
            yield Finding(NUMBER, f"vector {vector:#x} of VP {vp} is requested", actors=(name,))
    for connection_id in view.rung():
        text = f"the doorbell of connection {connection_id:#x} is rung, and the host does not see it"
        yield Finding(NUMBER, text, actors=("hypervisor",))


def _queues(view: LiveView) -> Iterator[Finding]:
    assert view.tables is not None
    for work in view.work():
        where = work.queue.name
        if work.worker:
            name = view.name_of(work.worker)
            text = f"{work.text} is not done: {name} sleeps in it"
            yield Finding(NUMBER, text, relid=work.relid, actors=(name,))
        else:
            yield Finding(NUMBER, f"{work.text} waits on queue {where}", relid=work.relid)
    for queue in QueueNumber:
        record = view.tables.queues.at(queue)
        if record.queued != record.finished and not any(one.queue == queue for one in view.work()):
            text = f"of {counted(record.queued, 'piece')} of work on queue {queue.name}, {record.finished} were done"
            yield Finding(NUMBER, text)
    if count := view.tables.connection.offer_in_progress.load():
        yield Finding(NUMBER, f"offer_in_progress is {count}")


def _requests(scene: Scene) -> Iterator[Finding]:
    view = scene.view
    assert view.tables is not None
    asleep = waits(view.tables)
    for request in view.tables.requests.live():
        names = tuple(view.name_of(one.actor) for one in asleep.values() if one.waited.record == request)
        text = f"{request_text(request)} is not answered"
        yield Finding(NUMBER, text, relid=request.child_relid, actors=names)


def _rings(scene: Scene) -> Iterator[Finding]:
    view = scene.view
    guest = view.guest
    assert guest is not None
    for channel in open_channels(scene):
        for side, reads, who in ((INBOUND, guest_reads, "guest"), (OUTBOUND, host_reads, "host")):
            ring = guest.ring(channel, side)
            if ring is not None and left_lying(ring) and reads(view, channel):
                text = f"relid {channel.relid}: {ring.bytes_to_read} bytes that the {who} has not read"
                yield Finding(NUMBER, text, relid=channel.relid)
