"""Rules about rings: indices that can be, bytes that add up, readers and writers that do not sleep for ever."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from emu.recording import TraceRecord
from emu.tracing import Side
from emu.wire.ring_layout import ALIGNMENT
from tools.invariants import Feed, Machine, Rule, is_host

STUCK_NS: Final = 2_000_000_000
"""Who has not looked for so long, with something to do, does not look any more. A loaded computer is slow, too."""

Key = tuple[int, int]
"""relid and side of a ring."""


@dataclass(slots=True)
class _Ring:
    """A ring as its records tell: indices, bytes, and the last record of each kind."""

    size: int = 0
    write: int = -1
    read: int = -1
    published: int = 0
    released: int = 0
    publish: TraceRecord | None = None
    release: TraceRecord | None = None
    asked: TraceRecord | None = None
    """The reader's last mask or unmask."""
    wish: TraceRecord | None = None
    """What the writer waits for, if there was less room than that when it said so, and it has not written since."""

    @property
    def unread(self) -> int:
        """Bytes that were published and not released."""
        return (self.write - self.read) % self.size if self.size and self.write >= 0 and self.read >= 0 else 0


class _RingRule(Rule):
    """Follows rings from one opening to the next."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.rings: dict[Key, _Ring] = {}
        self._mapped: set[int] = set()
        self._taken_back: set[int] = set()
        """Relids that the guest was told are rescinded, and has not opened since."""

    def feeds(self) -> Mapping[str, Feed]:
        """Everything that is recorded of a ring, and the opening of its channel."""
        return {
            "map": self._map,
            "vmbus_open": self._vmbus_open,
            "ring_attach": self._ring_attach,
            "ring_publish": self._ring_publish,
            "ring_release": self._ring_release,
            "mask": self._asked,
            "unmask": self._asked,
            "pending_size": self._pending_size,
            "close": self._close,
            "rescind": self._rescind,
        }

    def guest_died(self) -> None:
        """Its rings are nobody's, whatever is in them."""
        self.rings.clear()
        self._mapped.clear()

    def ring(self, relid: int, side: int) -> _Ring:
        """A ring of a channel; of one that was taken back, one that nobody looks at."""
        return _Ring() if relid in self._taken_back else self.rings.setdefault((relid, side), _Ring())

    def _map(self, record: TraceRecord) -> None:
        self._mapped.add(record.values[0])
        self._opened(record.values[0])

    def _vmbus_open(self, record: TraceRecord) -> None:
        # Recorded when the guest is back from its post: a device may have taken the rings, and written, before that.
        if record.values[0] in self._mapped:
            self._mapped.discard(record.values[0])
        else:
            self._opened(record.values[0])

    def _opened(self, relid: int) -> None:
        """New pages with indices 0, behind which the old ones mean nothing."""
        self._taken_back.discard(relid)
        for side in Side:
            self.rings[relid, side] = _Ring(write=0, read=0)

    def _ring_attach(self, record: TraceRecord) -> None:
        relid, side, size, write, read = record.values
        ring = self.ring(relid, side)
        ring.size = size
        if ring.write < 0:
            ring.write, ring.read = write, read

    def _ring_publish(self, record: TraceRecord) -> None:
        relid, side, index, size = record.values
        ring = self.ring(relid, side)
        self.publishes(ring, record)
        ring.publish, ring.write, ring.wish = record, index, None
        ring.published += size

    def _ring_release(self, record: TraceRecord) -> None:
        relid, side, index, size = record.values
        ring = self.ring(relid, side)
        self.releases(ring, record)
        ring.release, ring.read = record, index
        ring.released += size

    def _asked(self, record: TraceRecord) -> None:
        self.ring(record.values[0], record.values[1]).asked = record

    def _pending_size(self, record: TraceRecord) -> None:
        # A socket keeps a threshold armed, whether or not it waits.
        ring = self.ring(record.values[0], record.values[1])
        ring.wish = record if ring.size and record.values[2] > _room(ring) else None

    def _close(self, record: TraceRecord) -> None:
        for side in Side:
            if (ring := self.rings.pop((record.values[0], side), None)) is not None:
                self.closed(record.values[0], side, ring, record)

    def _rescind(self, record: TraceRecord) -> None:
        # What is left in the rings of a channel that was taken back is nobody's, also where a processor that comes to
        # it now for the first time attaches to them between two packets.
        if not is_host(record):
            self._taken_back.add(record.values[0])
            for side in Side:
                self.rings.pop((record.values[0], side), None)

    def publishes(self, ring: _Ring, record: TraceRecord) -> None:
        """The ring is about to have this publish."""

    def releases(self, ring: _Ring, record: TraceRecord) -> None:
        """The ring is about to have this release."""

    def closed(self, relid: int, side: int, ring: _Ring, record: TraceRecord) -> None:
        """The guest closes the channel: nothing more will happen to its rings."""


class _SleeperRule(_RingRule):
    """Asks of each ring whether somebody sleeps beside it, and has for long when its channel is closed."""

    def closed(self, relid: int, side: int, ring: _Ring, record: TraceRecord) -> None:
        """Whoever slept had time enough to look by himself."""
        shown = self.asleep(ring)
        if shown and record.t_ns - max(one.t_ns for one in shown) > STUCK_NS:
            self.violate(f"relid {relid}, {Side(side).name}: {self.why(ring)}", *shown)

    def rest(self) -> None:
        """Of rings that are still open: nobody will wake him."""
        for (relid, side), ring in self.rings.items():
            if shown := self.asleep(ring):
                self.violate(f"relid {relid}, {Side(side).name}: {self.why(ring)}", *shown)

    @abstractmethod
    def asleep(self, ring: _Ring) -> tuple[TraceRecord, ...]:
        """The records that show it; none: nobody does."""

    @abstractmethod
    def why(self, ring: _Ring) -> str:
        """What there is to do for him, in words."""


class ReadersLook(_SleeperRule):
    """What is in a ring is read: its reader does not sleep for an interrupt that does not come."""

    NUMBER = 19
    TITLE = "No reader sleeps beside a ring with something in it"

    def asleep(self, ring: _Ring) -> tuple[TraceRecord, ...]:
        """Something is in it, and the reader's last word was that it found nothing and wants an interrupt."""
        asked, publish = ring.asked, ring.publish
        if not ring.unread or asked is None or publish is None or asked.event.name != "unmask":
            return ()
        idle = ring.release is None or ring.release.t_ns < asked.t_ns
        return (asked, publish) if idle else ()

    def why(self, ring: _Ring) -> str:
        """What he should read."""
        return f"{ring.unread} bytes wait, and the reader asked to be interrupted"


class WritersAreWoken(_SleeperRule):
    """Who waits for room is told when there is some."""

    NUMBER = 20
    TITLE = "No writer sleeps beside a ring that has the room it waits for"

    def asleep(self, ring: _Ring) -> tuple[TraceRecord, ...]:
        """There is room, and the writer still waits."""
        wish, release = ring.wish, ring.release
        if wish is None or release is None or not ring.size or wish.values[2] > _room(ring):
            return ()
        return wish, release

    def why(self, ring: _Ring) -> str:
        """What he could write."""
        wanted = 0 if ring.wish is None else ring.wish.values[2]
        return f"the writer waits for {wanted} bytes, {_room(ring)} are free"


def _room(ring: _Ring) -> int:
    return ring.size - ALIGNMENT - ring.unread


class IndicesAddUp(_RingRule):
    """Indices lie in the ring and on its grid, go on where they were, and what is published is what is released."""

    NUMBER = 24
    TITLE = "Ring indices are in range and on the 8-byte grid, and bytes are conserved"

    def publishes(self, ring: _Ring, record: TraceRecord) -> None:
        """From where the last publish ended."""
        self._index(ring, record, ring.write)

    def releases(self, ring: _Ring, record: TraceRecord) -> None:
        """From where the last release ended."""
        self._index(ring, record, ring.read)

    def _index(self, ring: _Ring, record: TraceRecord, before: int) -> None:
        _relid, _side, index, size = record.values
        if not ring.size:
            return
        if index >= ring.size or index % ALIGNMENT:
            self.violate(f"index {index:#x} in a ring of {ring.size:#x} bytes", record)
        elif before >= 0 and (before + size - index) % ring.size:
            self.violate(f"index {index:#x} follows {before:#x} by {size} bytes", record)

    def closed(self, relid: int, side: int, ring: _Ring, record: TraceRecord) -> None:
        """No more is released than was published, and the rest is what the indices say."""
        if ring.size and ring.published - ring.released != ring.unread:
            last = next(one for one in (ring.release, ring.publish, record) if one is not None)
            text = f"{ring.published} bytes published, {ring.released} released, {ring.unread} between the indices"
            self.violate(f"relid {relid}, {Side(side).name}: {text}", last)
