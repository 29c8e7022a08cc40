"""INV-27: who waits for whom, and whether anybody in that chain can still go on.

An actor waits for an object; the object has *producers*, any of whom may end the wait: the holder of a mutex, the host
or a rescind's worker for a request, the workers of a queue for a flush. An actor is stuck if none of its producers can
go on: each of them is stuck as well (then there is a cycle somewhere), or there is none (the host has dropped it, the
holder is dead, nobody is left to do it). Everybody else is hopeful: whoever is held, runs, or waits for what cannot
be known from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from emu.tracing import WaitedFor
from emu.wire.messages import MessageType
from guestproc.drivers.claims import CLAIMS, REMOVING
from guestproc.kernel.layout import Channel, Connection, Cpu, Device, Request
from guestproc.kernel.napi import WAITED as NAPI_WAITED
from guestproc.kernel.tasklet import CPU_MASK, CPU_SHIFT, WAITED
from guestproc.kernel.work_records import Queue
from guestproc.kernel.workqueue import QueueNumber
from guestproc.protocol.numbers import Works
from hostproc.protocol.states import ChannelState
from tools.invariants import Finding
from tools.invariants_settled import Scene
from tools.invariants_settled_channels import request_text
from tools.live_view import Work
from tools.waits import Wait, waits

NUMBER: Final = 27


@dataclass(frozen=True, slots=True)
class Producers:
    """Who may end a wait: `what` is awaited, by which `actors`; `open`: by somebody who cannot be seen, as well.

    `nobody` says why there is none besides the actors.
    """

    what: str
    actors: tuple[int, ...] = ()
    open: bool = False
    nobody: str = "nobody is left to do that"


def no_wait_is_in_vain(scene: Scene) -> Iterator[Finding]:
    """INV-27: each wait has a producer that can go on."""
    tables = scene.view.tables
    if tables is None:
        return
    graph = WaitGraph(scene)
    stuck = graph.stuck()
    told: set[int] = set()
    for actor in sorted(stuck):
        if actor in told:
            continue
        path = graph.path(actor, stuck)
        told |= set(path)
        names = tuple(scene.view.name_of(one) for one in path)
        yield Finding(NUMBER, graph.text(path), relid=graph.relid(path[-1]), actors=names)


class WaitGraph:
    """The waits of a settled machine and their producers."""

    def __init__(self, scene: Scene) -> None:
        assert scene.view.tables is not None
        self._view: Final = scene.view
        self._tables: Final = scene.view.tables
        self._parked: Final = scene.parked
        self._work: Final = list(scene.view.work())
        self._under_way: Final = scene.view.under_way()
        self.waits: Final[Mapping[int, Wait]] = {
            actor: wait for actor, wait in waits(self._tables).items() if not (wait.idle and not self._queued(wait))
        }
        self.producers: Final = {actor: self._of(wait) for actor, wait in self.waits.items()}

    # -- walking -------------------------------------------------------------------------------------

    def stuck(self) -> set[int]:
        """Actors none of whose producers can go on: what is left when the hopeful are taken away, one by one."""
        left = {actor for actor in self.waits if actor not in self._parked and not self.producers[actor].open}
        while hopeful := {actor for actor in left if self._may_end(actor, left)}:
            left -= hopeful
        return left

    def _may_end(self, actor: int, left: set[int]) -> bool:
        return any(self._goes_on(one, left) for one in self.producers[actor].actors)

    def _goes_on(self, actor: int, left: set[int]) -> bool:
        """Whether a producer will do something more: one that is idle in a settled machine will not."""
        return actor in self._parked or (actor in self.waits and actor not in left)

    def path(self, actor: int, stuck: set[int]) -> list[int]:
        """From an actor along its stuck producers, to the last one, or to one that comes again: it is at both ends."""
        path = [actor]
        while True:
            following = next((one for one in self.producers[path[-1]].actors if one in stuck), None)
            if following is None:
                return path
            if following in path:
                return [*path[path.index(following) :], following]
            path.append(following)

    def text(self, path: list[int]) -> str:
        """The chain of names."""
        name = self._view.name_of
        links = [f"{name(one)} waits for {self.producers[one].what}" for one in dict.fromkeys(path)]
        if path[0] == path[-1] and len(path) > 1:
            return "; ".join(links) + ": a cycle"
        end = self.producers[path[-1]]
        idle = ", ".join(f"{name(one)} is idle" for one in end.actors)
        return "; ".join(links) + f": {idle or end.nobody}"

    def relid(self, actor: int) -> int:
        """The channel that a wait is about, 0 if none can be named."""
        record = self.waits[actor].waited.record
        if isinstance(record, Request):
            return record.child_relid
        return record.relid if isinstance(record, Channel) else 0

    # -- producers -----------------------------------------------------------------------------------

    def _of(self, wait: Wait) -> Producers:
        """Who may end a wait."""
        waited = wait.waited
        if waited.kind == WaitedFor.MUTEX:
            return self._of_mutex(wait)
        record = waited.record
        if isinstance(record, Request):
            return self._of_request(record)
        if isinstance(record, Queue):
            return self._of_queue(wait, record)
        if isinstance(record, Cpu):
            return Producers(f"CPU {record.index} to do a call", self._cpus([record.index]))
        if isinstance(record, Connection):
            return self._of_connection(wait)
        if isinstance(record, Channel) and waited.field == "rescind_event":
            return Producers(f"the rescind of relid {record.relid}", self._rescinders(record.relid))
        return Producers(waited.name, open=True)

    def _of_mutex(self, wait: Wait) -> Producers:
        owner, name = wait.waited.owner, wait.waited.name
        if not owner:
            return Producers(name, nobody="it is free, and nobody wakes who waits")
        if self._view.control.is_dead(owner):
            return Producers(name, nobody=f"{self._view.name_of(owner)} died holding it")
        return Producers(name, (owner,))

    def _of_request(self, request: Request) -> Producers:
        """The host, while it has the request or its answer is under way; or whoever handles the channel's rescind."""
        text = f"the answer to {request_text(request)}"
        relid = request.child_relid
        host = self._view.mirror.channel(relid) if relid else None
        rescinders = self._rescinders(relid) if relid else ()
        if host is not None and host.state in (ChannelState.OPENING, ChannelState.CLOSING_REOPEN):
            silent = "the host waits for its device"
        else:
            silent = "the host has nothing left to answer"
        if rescinders:
            text += f" (the host has dropped it), or the rescind of relid {relid}"
        return Producers(text, rescinders, open=bool(self._under_way), nobody=silent)

    def _of_queue(self, wait: Wait, queue: Queue) -> Producers:
        number = QueueNumber(queue.index)
        if wait.waited.field == "workers":
            return Producers(f"work on queue {number.name}", nobody="there is some, and nobody wakes it")
        busy = {work.worker for work in self._work if work.queue == number and work.worker}
        waiting = any(work.queue == number and not work.worker for work in self._work)
        actors = tuple(sorted(busy)) or (tuple(self._view.workers_of(number)) if waiting else ())
        return Producers(f"queue {number.name} to be flushed", actors, nobody="all its work is done")

    def _of_connection(self, wait: Wait) -> Producers:
        field = wait.waited.field
        special: dict[str, Callable[[], Producers]] = {
            "offer_wait": self._of_offers,
            "tasklet_idle": self._of_tasklets,
            "grace_wait": self._of_grace,
        }
        if field in special:
            return special[field]()
        if field == "unload_event":
            text = "the answer to UNLOAD"
            return Producers(text, open=bool(self._under_way), nobody="the host has nothing left to answer")
        return self._of_subject(wait)

    def _of_offers(self) -> Producers:
        count = self._tables.connection.offer_in_progress.load()
        text = f"offer_in_progress to fall to 0 (it is {count})"
        offers = [work for work in self._work if work.msgtype == MessageType.OFFERCHANNEL]
        return Producers(text, self._workers(offers), nobody="no offer is under way")

    def _of_tasklets(self) -> Producers:
        """Whoever waits is one of those for whom a tasklet or a poll has WAITED set."""
        words = [cpu.msg_dpc.word.load() for cpu in self._tables.cpus.live()]
        words += [channel.callback_event.word.load() for channel in self._tables.channels.live()]
        polls = list(self._tables.net_channels.live())
        words += [one.napi.tasklet.word.load() for one in polls]
        waited = [word for word in words if word & WAITED]
        waited += [one.napi.tasklet.word.load() for one in polls if one.napi.word.load() & NAPI_WAITED]
        cpus = [word >> CPU_SHIFT & CPU_MASK for word in waited]
        return Producers("a tasklet to be idle", self._cpus(cpus), nobody="none is waited for")

    def _of_grace(self) -> Producers:
        inside = [cpu.index for cpu in self._tables.cpus.live() if cpu.isr_sequence.load() & 1]
        return Producers("a grace period", self._cpus(inside), nobody="no CPU is in an ISR")

    def _of_subject(self, wait: Wait) -> Producers:
        """A wait queue that many conditions share: what it is about says the waiter, or nobody knows."""
        subject = wait.subject or self._rescinded_by(wait.actor)
        device = next((one for one in self._tables.devices.live() if one.gpa == subject), None)
        if device is not None and not device.driver_state[CLAIMS] & REMOVING:
            subs = [work for work in self._work if self._adds_sub_channel(work, device)]
            return Producers(f"the sub-channels of device {device.index}", self._workers(subs), open=not subs)
        table = self._tables.channels
        index = (subject - table.record_gpa(0)) // table.record_size
        if not subject or not 0 <= index < table.capacity:
            return Producers(wait.waited.name, open=True)
        generation = self._tables.ram.atomics.load_u32(table.record_gpa(index))
        channel = table.find(generation << 32 | index + 1) if generation & 1 else None
        if channel is None:
            return Producers(f"channel record {index}", nobody="it is gone, and nobody wakes who waits")
        text = f"relid {channel.relid} to be handled"
        adding = [work for work in self._work if _adds(work, channel)]
        return Producers(text, (*self._workers(adding), *self._rescinders(channel.relid)))

    def _adds_sub_channel(self, work: Work, device: Device) -> bool:
        """Whether this work opens a sub-channel of a device."""
        if work.item.function != Works.VMBUS_ADD_CHANNEL_WORK:
            return False
        channel = self._tables.channels.find(work.item.arguments[0])
        return channel is not None and channel.primary_channel == device.channel

    # -- who that is ---------------------------------------------------------------------------------

    def _queued(self, wait: Wait) -> bool:
        """Whether the queue that an idle worker waits on has work."""
        record = wait.waited.record
        return any(not work.worker and work.queue == record.index for work in self._work)

    def _rescinded_by(self, actor: int) -> int:
        """GPA of the channel whose rescind an actor handles, 0 for none: that is what it waits for."""
        for work in self._work:
            if work.worker == actor and work.msgtype == MessageType.RESCIND_CHANNELOFFER:
                channel = self._tables.relids.lookup(work.relid)
                return 0 if channel is None else channel.gpa
        return 0

    def _rescinders(self, relid: int) -> tuple[int, ...]:
        """Who handles a rescind of this channel, or would come to it."""
        rescinds = [work for work in self._work if work.msgtype == MessageType.RESCIND_CHANNELOFFER]
        return self._workers(work for work in rescinds if work.relid == relid)

    def _workers(self, works: Iterable[Work]) -> tuple[int, ...]:
        """Who runs these, or who runs what is before them on their queues."""
        found: list[int] = []
        for work in works:
            found += [work.worker] if work.worker else self._view.workers_of(work.queue)
        return tuple(dict.fromkeys(found))

    def _cpus(self, cpus: Iterable[int]) -> tuple[int, ...]:
        return tuple(actor for cpu in cpus if (actor := self._view.actor_of_cpu(cpu)))


def _adds(work: Work, channel: Channel) -> bool:
    """Whether this work handles a channel's offer, or the half of it that may wait for the host."""
    if work.item.function == Works.VMBUS_ADD_CHANNEL_WORK:
        return work.item.arguments[0] == channel.handle
    return work.msgtype == MessageType.OFFERCHANNEL and work.relid == channel.relid
