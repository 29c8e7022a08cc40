"""Messages of the explorer, with names that do not matter taken out of them.

A guest numbers its GPADLs in the order in which it needs them, and takes pages wherever they are free. Neither
means anything to the protocol, and both differ between orders of events that lead to the same state. So on the
explorer's wire the n-th GPADL of a relid has the number (relid << 8 | n), and its pages are those from page
`FIRST_PFN` on. This is a renaming and no more: each core only ever sees its own names.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from struct import pack
from typing import Final

from emu.wire.messages import (
    GpadlBody,
    GpadlCreated,
    GpadlHeader,
    GpadlTeardown,
    GpadlTorndown,
    Message,
    MessageType,
    OpenChannel,
    parse,
)

FIRST_PFN: Final = 0x100
_RANGE_BYTES: Final = 8


class GpadlNames:
    """The guest's numbers of GPADLs beside those on the wire."""

    def __init__(self) -> None:
        self._wire: dict[int, int] = {}
        self._guest: dict[int, int] = {}
        self._counts: Counter[int] = Counter()

    def copy(self) -> GpadlNames:
        """The same names, to go on from."""
        other = GpadlNames()
        other._wire, other._guest, other._counts = self._wire.copy(), self._guest.copy(), self._counts.copy()
        return other

    def wire(self, gpadl: int) -> int:
        """The wire's number of a GPADL of the guest's; its own for one that was never on the wire."""
        return self._wire.get(gpadl, gpadl)

    def counts(self) -> tuple[tuple[int, int], ...]:
        """How many GPADLs each relid has had: what the next name depends on."""
        return tuple(sorted(self._counts.items()))

    def known(self, gpadl: int) -> bool:
        """Whether the guest ever said this number."""
        return gpadl in self._wire

    def to_wire(self, payload: bytes) -> bytes:
        """A message of the guest's as the host gets it."""
        message = parse(payload)
        match message:
            case GpadlHeader():
                self._counts[message.child_relid] += 1
                name = message.child_relid << 8 | self._counts[message.child_relid]
                self._wire[message.gpadl] = name
                self._guest[name] = message.gpadl
                ranges = message.ranges[:_RANGE_BYTES] + _pages(len(message.ranges) - _RANGE_BYTES)
                return replace(message, gpadl=name, ranges=ranges).pack()
            case GpadlBody():
                return replace(message, gpadl=self.wire(message.gpadl), data=_pages(len(message.data))).pack()
            case GpadlTeardown():
                return replace(message, gpadl=self.wire(message.gpadl)).pack()
            case OpenChannel():
                handle = self.wire(message.ringbuffer_gpadlhandle)
                return replace(message, ringbuffer_gpadlhandle=handle).pack()
        return payload

    def renamed(self, reply: bytes) -> bytes:
        """A reply that the guest keeps, as it was on the wire; zeros behind it, or alone, stay."""
        kind = int.from_bytes(reply[:4], "little")
        if kind not in (MessageType.GPADL_CREATED, MessageType.GPADL_TORNDOWN):
            return bytes(reply)
        message = parse(bytes(reply))
        assert isinstance(message, GpadlCreated | GpadlTorndown)
        return replace(message, gpadl=self.wire(message.gpadl)).pack()

    def to_guest(self, payload: bytes) -> bytes:
        """A message of the host's as the guest gets it."""
        message = parse(payload)
        match message:
            case GpadlCreated() | GpadlTorndown():
                return replace(message, gpadl=self._guest.get(message.gpadl, message.gpadl)).pack()
        return payload


def _pages(count: int) -> bytes:
    """As many bytes of PFNs."""
    return b"".join(pack("<Q", FIRST_PFN + n) for n in range(-(-count // 8)))[:count]


def text_of(payload: bytes) -> str:
    """A message for people: its name, and what it is about."""
    message: Message = parse(payload)
    words = [message.TYPE.name]
    for name in ("child_relid", "gpadl", "status", "creation_status", "sub_channel_index"):
        value = getattr(message, name, None)
        if value is not None and (value or name in ("child_relid", "gpadl", "status")):
            words.append(f"{name}={value:#x}" if name in ("gpadl", "creation_status") else f"{name}={value}")
    return " ".join(words)


def relid_of(payload: bytes) -> int:
    """The relid that a message is about, 0 for none: on this wire a GPADL's number says it, too."""
    message: Message = parse(payload)
    relid: int = getattr(message, "child_relid", 0) or getattr(message, "gpadl", 0) >> 8
    return relid
