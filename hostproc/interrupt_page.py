"""The interrupt page of a guest below 2.4: a bit for each channel, in a page that both ends have.

    bytes    0 to 2047   the host sets a channel's bit, then signals flag 0 of VP 0; the guest clears
    bytes 2048 to 4095   the guest sets a channel's bit, then rings the one doorbell (0.13); the host clears

Bits go in before the signal and are taken after it, by atomic operations, so that none is lost. The page is
the guest's: what lies in it is a hint at most, and a bit that means nothing is cleared like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emu.memory import PAGE_SIZE, GuestMemory
from emu.wire.synic import HV_EVENT_FLAGS_COUNT

if TYPE_CHECKING:
    from hostproc.bus import BoundEvent

SEND_HALF: Final = 2048
"""Where the guest's half begins."""
_WORDS: Final = HV_EVENT_FLAGS_COUNT // 64


class InterruptPage:
    """The page at `gpa`, which is a whole page of RAM; OutOfMemory when there is no page to be had behind it."""

    def __init__(self, memory: GuestMemory, gpa: int) -> None:
        memory.reserve(gpa, PAGE_SIZE)
        words = memory.atomics
        self._receive: Final = tuple(words.cell_u64(gpa + 8 * word).fetch_or for word in range(_WORDS))
        sent = [words.cell_u64(gpa + SEND_HALF + 8 * word) for word in range(_WORDS)]
        self._load_sent: Final = tuple(cell.load for cell in sent)
        self._take_sent: Final = tuple(cell.exchange for cell in sent)

    def set(self, relid: int) -> None:
        """Tell the guest that this channel has something; a full barrier, so the signal comes behind it."""
        self._receive[relid >> 6](1 << (relid & 63))

    def take(self) -> list[int]:
        """The relids whose bits the guest has set; their bits are cleared."""
        relids = []
        for word, load in enumerate(self._load_sent):
            bits = self._take_sent[word](0) if load() else 0
            while bits:
                low = bits & -bits
                bits ^= low
                relids.append(word * 64 + low.bit_length() - 1)
        return relids


class SharedEvent:
    """The one event of all channels below 2.4, as one of them signals it: its bit first, then the flag."""

    __slots__ = ("_close", "_page", "_relid", "_signal", "retarget")

    def __init__(self, event: BoundEvent, page: InterruptPage | None, relid: int) -> None:
        self._page = page
        self._relid = relid
        self._signal = event.signal
        self._close = event.close
        self.retarget = event.retarget

    def signal(self) -> object:
        """Set the bit, then the flag."""
        if self._page is not None:
            self._page.set(self._relid)
        return self._signal()

    def close(self) -> None:
        """Signal nobody any more."""
        self._close()
