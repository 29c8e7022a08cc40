"""Rules about channels: the life of a relid, offers and rescinds, requests and their replies, GPADL pages, targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from emu.faults import FaultKind
from emu.recording import TraceRecord
from emu.wire.messages import VP_INDEX_DISABLE_INTERRUPT, MessageType
from guestproc.kernel.layout import ChannelState
from hostproc.protocol import states as host
from hostproc.state_trace import REMOVED
from tools.event_names import name_of
from tools.invariants import Feed, Machine, Rule, is_host

_FREE_STATES: Final = frozenset(
    {
        host.ChannelState.CLIENT_RELEASED,
        host.ChannelState.CLOSING_CLIENT_RELEASE,
        host.ChannelState.OPENING_CLIENT_RELEASE,
        REMOVED,
    }
)
"""States of the host's in which the guest does not hold the relid."""


class RelidLife(Rule):
    """A relid is offered, perhaps taken back, and given up, before it is offered again."""

    NUMBER = 1
    TITLE = "A relid is offered again only after the guest gave it up, with the next generation"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._held: dict[int, TraceRecord] = {}
        self._generations: dict[int, int] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """Offers of the host, and its states."""
        return {"offer": self._offer, "host_state": self._host_state}

    def _offer(self, record: TraceRecord) -> None:
        if not is_host(record):
            return
        relid, generation = record.values[:2]
        if relid in self._held:
            self.violate(f"relid {relid} is offered while the guest holds it", self._held[relid], record)
        if generation != self._generations.get(relid, generation - 1) + 1:
            self.violate(f"generation {generation} of relid {relid} follows {self._generations[relid]}", record)
        self._held[relid], self._generations[relid] = record, generation

    def _host_state(self, record: TraceRecord) -> None:
        relid, _generation, old, new = record.values
        # The guest gave up what it held, and is offered at once the device that had come back meanwhile.
        came_back = old == host.ChannelState.REOFFERED and new not in host.REVOKED_STATES
        if new in _FREE_STATES or came_back:
            self._held.pop(relid, None)


class ReleasedOnce(Rule):
    """A channel's relid is given up once, and not while the channel is open."""

    NUMBER = 2
    TITLE = "A relid is released at most once for each offer, and not while its channel is open"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._released: dict[int, TraceRecord] = {}
        self._lives: dict[int, int] = {}
        """By relid: offers that were taken, and whose release was not told yet."""
        self._state: dict[int, TraceRecord] = {}
        self._taken: dict[int, TraceRecord] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """Releases and states of the guest; offers and releases as the host has them."""
        return {
            "release": self._release,
            "state": self._note_state,
            "offer": self._offer,
            "message_take": self._message_take,
        }

    def guest_died(self) -> None:
        """It gave back nothing; the host forgets what it held."""
        self._released.clear()
        self._lives.clear()
        self._state.clear()

    def _release(self, record: TraceRecord) -> None:
        relid = record.values[0]
        # The guest says so when it has posted it; by then the host may have offered the relid again, and it was taken.
        lives = self._lives.get(relid, 0)
        self._lives[relid] = max(0, lives - 1)
        if not lives and (before := self._released.get(relid)) is not None:
            self.violate(f"relid {relid} is released a second time", before, record)
        self._released[relid] = record
        state = self._state.get(relid) if lives <= 1 else None
        if state is not None and state.values[2] == ChannelState.OPENED_STATE:
            self.violate(f"relid {relid} is released while its channel is open", state, record)

    def _note_state(self, record: TraceRecord) -> None:
        self._state[record.values[0]] = record

    def _offer(self, record: TraceRecord) -> None:
        if is_host(record):
            self._taken.pop(record.values[0], None)
        else:
            self._state.pop(record.values[0], None)
            self._released.pop(record.values[0], None)
            self._lives[record.values[0]] = self._lives.get(record.values[0], 0) + 1

    def _message_take(self, record: TraceRecord) -> None:
        msgtype, _serial, _size, relid = record.values
        if msgtype != MessageType.RELID_RELEASED:
            return
        if (before := self._taken.get(relid)) is not None:
            self.violate(f"the host is told twice that relid {relid} is free", before, record)
        self._taken[relid] = record


class RescindsHaveEffect(Rule):
    """A rescind that was read out of its slot finds its channel, or the offer's failure."""

    NUMBER = 3
    TITLE = "A rescind that was taken has an effect, or its offer had failed"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._asked: dict[int, TraceRecord] = {}
        self._offers: dict[int, bool] = {}  # by relid: whether its channel may be found
        self._unfound: dict[int, tuple[TraceRecord, ...]] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """The handler's beginning, and what it found."""
        return {
            "vmbus_onoffer_rescind": self._handler,
            "rescind": self._rescind,
            "offer": self._offer,
            "release": self._gone,
            "vmbus_onoffer": self._offer_begins,
        }

    def guest_died(self) -> None:
        """Nothing of it is left."""
        self._asked.clear()
        self._offers.clear()
        self._unfound.clear()

    def _handler(self, record: TraceRecord) -> None:
        self._asked[record.values[0]] = record

    def _offer_begins(self, record: TraceRecord) -> None:
        self._judge(record.values[0])
        self._offers[record.values[0]] = False

    def _offer(self, record: TraceRecord) -> None:
        if not is_host(record) and record.values[1]:
            self._offers[record.values[0]] = True

    def _gone(self, record: TraceRecord) -> None:
        self._offers[record.values[0]] = False

    def _rescind(self, record: TraceRecord) -> None:
        if is_host(record):
            return
        relid, generation = record.values
        asked = self._asked.pop(relid, None)
        # A channel that was rescinded is not found a second time. Of two handlers that run side by side the one that
        # found it may be the second to say so: what the other says is judged when there is no more to come.
        found_before, self._offers[relid] = self._offers.get(relid, False), False
        if generation:
            self._unfound.pop(relid, None)
        elif found_before:
            self._unfound[relid] = (record,) if asked is None else (asked, record)

    def _judge(self, relid: int) -> None:
        """Nothing more comes of this life of a relid."""
        shown = self._unfound.pop(relid, None)
        if shown is not None:
            self.violate(f"the rescind of relid {relid} finds no channel, and its offer did not fail", *shown)

    def end(self) -> None:
        """Every handler came to its end."""
        for relid in list(self._unfound):
            self._judge(relid)
        for relid, record in self._asked.items():
            self.violate(f"the rescind of relid {relid} was begun and has had no effect", record)


class OffersBeforeRescinds(Rule):
    """A rescind waits for the offers that were read before it."""

    NUMBER = 4
    TITLE = "No rescind looks for its channel while an offer that was read before it is in progress"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._offers: dict[int, TraceRecord] = {}  # by serial: read and queued, its handler not done
        self._before: dict[int, dict[int, TraceRecord]] = {}  # by serial of a rescind: those when it was read
        self._running: dict[int, int] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """From the slot to the end of the handlers."""
        return {
            "slot_read": self._slot_read,
            "offer": self._offer,
            "work_run": self._work_run,
            "work_done": self._work_done,
            "rescind": self._rescind,
        }

    def guest_died(self) -> None:
        """Nothing of it is left."""
        self._offers.clear()
        self._before.clear()
        self._running.clear()

    def _slot_read(self, record: TraceRecord) -> None:
        _sint, _type, msgtype, serial = record.values
        if msgtype == MessageType.OFFERCHANNEL:
            self._offers[serial] = record
        elif msgtype == MessageType.RESCIND_CHANNELOFFER:
            self._before[serial] = dict(self._offers)

    def _work_run(self, record: TraceRecord) -> None:
        self._running[record.actor.slot] = record.values[2]

    def _work_done(self, record: TraceRecord) -> None:
        self._offers.pop(record.values[2], None)

    def _offer(self, record: TraceRecord) -> None:
        self._offers.pop(self._running.get(record.actor.slot, 0), None)

    def _rescind(self, record: TraceRecord) -> None:
        serial = self._running.get(record.actor.slot, 0)
        for offer, read in self._before.pop(serial, {}).items():
            if offer in self._offers:
                self.violate(f"the rescind goes on while offer {offer}, read before it, is in progress", read, record)


class RescindsOfTheLiving(Rule):
    """The host takes back what it offers, once, and no successor of it."""

    NUMBER = 5
    TITLE = "Each rescind names the generation of the live offer of its relid"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._live: dict[int, TraceRecord] = {}
        self._twice: set[int] = set()  # relids of which a fault sends one more: that host was told to be wrong

    def feeds(self) -> Mapping[str, Feed]:
        """Offers, rescinds and states of the host, and faults that repeat what it says."""
        return {
            "offer": self._offer,
            "rescind": self._rescind,
            "host_state": self._host_state,
            "fault_hit": self._fault_hit,
        }

    def _fault_hit(self, record: TraceRecord) -> None:
        if record.values[0] in (FaultKind.HOST_DUP_RESCIND, FaultKind.REPLY_DUP):
            self._twice.add(record.values[1])

    def _offer(self, record: TraceRecord) -> None:
        if is_host(record):
            self._live[record.values[0]] = record

    def _rescind(self, record: TraceRecord) -> None:
        if not is_host(record):
            return
        relid, generation = record.values
        offer = self._live.pop(relid, None)
        if offer is None and relid in self._twice:
            self._twice.discard(relid)
        elif offer is None:
            self.violate(f"relid {relid} is rescinded, and is not offered", record)
        elif offer.values[1] != generation:
            self.violate(f"generation {generation} of relid {relid} is rescinded", offer, record)

    def _host_state(self, record: TraceRecord) -> None:
        if record.values[3] in _FREE_STATES:
            self._live.pop(record.values[0], None)


class NobodyWaitsForTheRescinded(Rule):
    """Who waited for an answer on a channel that was taken back was woken."""

    NUMBER = 6
    TITLE = "No request waits on a channel that was rescinded"
    AT_END = True

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._waiting: dict[int, TraceRecord] = {}
        self._rescinded: dict[int, TraceRecord] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """Requests, and rescinds of the channels that they are about."""
        return {
            "req_alloc": self._req_alloc,
            "req_free": self._req_free,
            "rescind": self._rescind,
            "offer": self._offer,
        }

    def guest_died(self) -> None:
        """Nothing of it is left."""
        self._waiting.clear()
        self._rescinded.clear()

    def _req_alloc(self, record: TraceRecord) -> None:
        self._waiting[record.values[2]] = record

    def _req_free(self, record: TraceRecord) -> None:
        self._waiting.pop(record.values[2], None)

    def _rescind(self, record: TraceRecord) -> None:
        if not is_host(record):
            self._rescinded[record.values[0]] = record

    def _offer(self, record: TraceRecord) -> None:
        self._rescinded.pop(record.values[0], None)

    def end(self) -> None:
        """None is left."""
        for record in self._waiting.values():
            relid = record.values[3]
            if relid in self._rescinded:
                self.violate(f"a request on relid {relid} still waits", record, self._rescinded[relid])


class PagesOfTheHost(Rule):
    """Pages that the host was given are not given to somebody else before it let go of them."""

    NUMBER = 12
    TITLE = "A page in a live GPADL is not given back to the allocator"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._live: dict[int, TraceRecord] = {}
        self._allocated: dict[int, int] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """GPADLs as the guest has them, and pages that become free."""
        return {
            "gpadl_add": self._gpadl_add,
            "gpadl_drop": self._gpadl_drop,
            "page_alloc": self._page_alloc,
            "page_free": self._page_free,
            "slot_read": self._slot_read,
        }

    def guest_died(self) -> None:
        """Its successor lays memory out anew, and the host forgot its GPADLs."""
        self._live.clear()
        self._allocated.clear()

    def _gpadl_add(self, record: TraceRecord) -> None:
        if not is_host(record) and record.values[3]:
            self._live[record.values[1]] = record

    def _gpadl_drop(self, record: TraceRecord) -> None:
        if not is_host(record):
            self._live.pop(record.values[1], None)

    def _slot_read(self, record: TraceRecord) -> None:
        # After this answer the host holds nothing any more.
        if record.values[2] == MessageType.UNLOAD_RESPONSE:
            self._live.clear()

    def _page_alloc(self, record: TraceRecord) -> None:
        self._allocated[record.values[0]] = self._allocated.get(record.values[0], 0) + 1

    def _page_free(self, record: TraceRecord) -> None:
        first, count = record.values
        self._allocated[first] = self._allocated.get(first, 1) - 1
        if self._allocated[first] > 0:
            return  # recorded late: somebody has these pages again already
        for gpadl, added in self._live.items():
            _relid, _gpadl, pages, pfn = added.values
            if first < pfn + pages and pfn < first + count:
                self.violate(f"pages of GPADL {gpadl:#x} are freed while the host has them", added, record)


def _about(relid: int) -> str:
    return f" of relid {relid}, got no answer, and the channel was not rescinded" if relid else ", got no answer"


class RepliesMatch(Rule):
    """A reply completes one request, and a request gets its reply, unless its channel was taken back."""

    NUMBER = 15
    TITLE = "Each reply completes exactly one outstanding request, each request gets exactly one"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._out: dict[int, TraceRecord] = {}
        self._completed: dict[int, TraceRecord] = {}
        self._posted: set[int] = set()
        self._rescinded: set[int] = set()
        self._by_actor: dict[int, int] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """The requests' records, posts, and rescinds."""
        return {
            "req_alloc": self._req_alloc,
            "req_complete": self._req_complete,
            "req_free": self._req_free,
            "post": self._post,
            "rescind": self._rescind,
            "offer": self._offer,
        }

    def guest_died(self) -> None:
        """Nothing of it is left."""
        self._out.clear()
        self._completed.clear()
        self._posted.clear()
        self._rescinded.clear()
        self._by_actor.clear()

    def _req_alloc(self, record: TraceRecord) -> None:
        request = record.values[2]
        if (before := self._out.get(request)) is not None:
            self.violate(f"request {request} is used twice", before, record)
        self._out[request] = record
        self._completed.pop(request, None)
        self._by_actor[record.actor.slot] = request

    def _req_complete(self, record: TraceRecord) -> None:
        request = record.values[2]
        asked = self._out.get(request)
        if asked is None:
            self.violate(f"request {request} is completed and is not outstanding", record)
        elif asked.values[:2] != record.values[:2]:
            self.violate(f"request {request} is completed as another one", asked, record)
        elif (before := self._completed.get(request)) is not None:
            self.violate(f"request {request} is completed twice", before, record)
        self._completed[request] = record

    def _post(self, record: TraceRecord) -> None:
        request = self._by_actor.get(record.actor.slot, -1)
        asked = self._out.get(request)
        if asked is not None and not record.values[3] and record.values[1] == asked.values[0]:
            self._posted.add(request)

    def _req_free(self, record: TraceRecord) -> None:
        request, relid = record.values[2:4]
        asked = self._out.pop(request, None)
        posted = request in self._posted
        self._posted.discard(request)
        if asked is None:
            self.violate(f"request {request} is given up and was not outstanding", record)
        elif posted and request not in self._completed and relid not in self._rescinded:
            name = name_of(asked.event.fields[0], asked.values[0]) or f"msgtype {asked.values[0]}"
            self.violate(f"request {request}, {name}{_about(relid)}", asked, record)

    def _rescind(self, record: TraceRecord) -> None:
        if not is_host(record):
            self._rescinded.add(record.values[0])

    def _offer(self, record: TraceRecord) -> None:
        if not is_host(record):
            self._rescinded.discard(record.values[0])

    def end(self) -> None:
        """Nobody waits; on a channel that was rescinded, that is another rule's."""
        for request, record in self._out.items():
            if record.values[3] in self._rescinded:
                continue
            self.violate(f"request {request} is outstanding at the end", record)


class TargetsAreOnline(Rule):
    """A channel is opened for a processor that takes its interrupts."""

    NUMBER = 26
    TITLE = "The target of an open channel is an online processor, or none"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._online: dict[int, TraceRecord] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """Processors that come and go, and targets that are chosen."""
        return {
            "cpu_online": self._cpu_online,
            "cpu_offline": self._cpu_offline,
            "vmbus_open": self._vmbus_open,
            "vmbus_send_modifychannel": self._vmbus_send_modifychannel,
        }

    def guest_died(self) -> None:
        """Nothing of it is left."""
        self._online.clear()

    def _cpu_online(self, record: TraceRecord) -> None:
        self._online[record.values[1]] = record

    def _cpu_offline(self, record: TraceRecord) -> None:
        self._online.pop(record.values[1], None)

    def _vmbus_open(self, record: TraceRecord) -> None:
        self._target(record, record.values[3])

    def _vmbus_send_modifychannel(self, record: TraceRecord) -> None:
        self._target(record, record.values[1])

    def _target(self, record: TraceRecord, target_vp: int) -> None:
        if target_vp not in (VP_INDEX_DISABLE_INTERRUPT, *self._online):
            self.violate(f"relid {record.values[0]} has VP {target_vp} as its target, which is not online", record)
