"""How many bytes each ring holds, record by record.

What was published less what was released, each as a sum of steps: a reader may record its release before the
writer records the publish that it read, and a difference of indices would then look like a full ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from emu.memory import PAGE_SIZE
from emu.recording import TraceRecord

TO_HOST: Final = 0
TO_GUEST: Final = 1
SIDES: Final = ("to host", "to guest")
"""Names of the two rings of a channel, by the `side` of a record."""


@dataclass(slots=True)
class Ring:
    """One ring: bytes of its data area (0: unknown), both indices, bytes published less bytes released.

    `gone`: the host has let go of its pages. What was left in them is nobody's, and who still writes has not heard.
    """

    size: int = 0
    write_index: int = 0
    read_index: int = 0
    behind: int = 0
    gone: bool = False

    @property
    def fill(self) -> int:
        """Bytes that wait to be read."""
        return 0 if self.gone else max(0, self.behind)

    def _step(self, old: int, new: int) -> int:
        """How far an index went; over the end only where the end is known."""
        return (new - old) % self.size if self.size else max(0, new - old)

    def publish(self, index: int) -> None:
        """The writer's index moves."""
        self.behind += self._step(self.write_index, index)
        self.write_index = index

    def release(self, index: int) -> None:
        """The reader's index moves."""
        self.behind -= self._step(self.read_index, index)
        self.read_index = index


class Rings:
    """The rings of all channels; a new opening of a channel begins with two empty ones."""

    def __init__(self) -> None:
        self.rings: dict[tuple[int, int], Ring] = {}

    def feed(self, record: TraceRecord) -> list[tuple[int, int]]:
        """Take one record; which rings (relid, side) it changed."""
        event, arguments = record.event.name, record.arguments
        if event == "map":
            return self._mapped(arguments["relid"], arguments["pages"])
        if event == "unmap":
            return self._unmapped(arguments["relid"])
        if event not in ("ring_attach", "ring_publish", "ring_release"):
            return []
        key = arguments["relid"], arguments["side"]
        if event == "ring_attach":
            self._attached(key, arguments)
            return [key]
        ring = self.rings.setdefault(key, Ring())
        if event == "ring_publish":
            ring.publish(arguments["write_index"])
        else:
            ring.release(arguments["read_index"])
        return [key]

    def _mapped(self, relid: int, pages: int) -> list[tuple[int, int]]:
        """A channel was opened. Until somebody attaches, half of its pages are taken to be each ring's."""
        for side in (TO_HOST, TO_GUEST):
            # A ring's first page is its control page.
            self.rings[relid, side] = Ring(max(0, pages // 2 - 1) * PAGE_SIZE)
        return [(relid, TO_HOST), (relid, TO_GUEST)]

    def _unmapped(self, relid: int) -> list[tuple[int, int]]:
        """The channel is closed, was taken back, or its guest is gone."""
        keys = [key for key in ((relid, TO_HOST), (relid, TO_GUEST)) if key in self.rings]
        for key in keys:
            self.rings[key].gone = True
        return keys

    def _attached(self, key: tuple[int, int], arguments: dict[str, int]) -> None:
        """A process says how large a ring is; where its indices are, only the first one that we see needs to."""
        ring = self.rings.get(key)
        if ring is None:
            ring = self.rings[key] = Ring()
            ring.write_index, ring.read_index = arguments["write_index"], arguments["read_index"]
            ring.behind = (ring.write_index - ring.read_index) % max(1, arguments["data_size"])
        ring.size = arguments["data_size"]
