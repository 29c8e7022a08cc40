"""The host's mirror in `control`: what the hypervisor's heap says, for reports and "until settled".

The host writes a row after each transition of a channel and the head at the end of each round with changes;
nothing in the machine reads it back. A sequence word is odd while the head is being written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from enum import IntEnum
from struct import Struct
from typing import Any, Final
from uuid import UUID

from emu.control import MIRROR_CHANNELS, Control
from emu.ipc.rows import load_row, store_row
from emu.values import valueclass
from emu.wire.guids import guid_to_wire

_ROW: Final = Struct("<IIIIIIII16s16s")
_HEAD: Final = Struct("<IIIIIIIIIIIII")
"""Behind the sequence word."""
_U32: Final = 0xFFFF_FFFF
_MOST_LOOKS: Final = 20_000
"""How often a reader looks again for a host that is just writing, before it takes it for dead."""


class Left(IntEnum):
    """How the guest left whose connection ended last."""

    NOBODY = 0
    """None has left yet."""
    UNLOADED = 1
    DETACHED = 2
    """DETACH, without UNLOAD."""
    DIED = 3
    """Its process ended, without either."""


@valueclass()
class MirrorHead:
    """The partition in numbers: `version` is 0 while nobody is connected; queue lengths are messages.

    `seen_…` are of the newest connection, also when it is over: its version, and the most offers and open channels that
    it had at a time. A guest may come and go between two looks. `disconnects` counts guests that left (UNLOAD, DETACH,
    death) while they were connected, `left` is how the newest of them did (`Left`); one whose connection an
    INITIATE_CONTACT replaced is still there.
    """

    sequence: int
    version: int
    offers: int
    open: int
    gpadls: int
    to_slots: int
    outgoing: int
    incoming: int
    attached_pid: int
    disconnects: int
    seen_version: int
    seen_offers: int
    seen_open: int
    left: int


@valueclass()
class MirrorChannel:
    """One channel as the host sees it; `state` is a `ChannelState` value of hostproc.protocol."""

    relid: int
    state: int
    generation: int
    sub_channel_index: int
    ring_gpadl: int
    gpadl_count: int
    target_vp: int
    connection_id: int
    flags: int
    if_type: UUID
    if_instance: UUID


class Mirror:
    """Writing (host only) and reading of the mirror."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._sequence = 0

    def write_head(
        self,
        *,
        version: int,
        offers: int,
        open_channels: int,
        gpadls: int,
        to_slots: int,
        outgoing: int,
        incoming: int,
        attached_pid: int,
        disconnects: int,
        seen: tuple[int, int, int] = (0, 0, 0),
        left: Left = Left.NOBODY,
    ) -> None:
        """Publish the partition's numbers; `seen` are version, offers and open channels of `MirrorHead.seen_…`."""
        at = self._control.mirror_offset
        view = self._control.view
        view.store_u64(at, self._sequence + 1)
        # Not the sequence again: until the last word is written it stays odd.
        store_row(
            self._control.memory,
            at + 8,
            _HEAD,
            version,
            offers,
            open_channels,
            gpadls,
            to_slots,
            outgoing,
            incoming,
            attached_pid,
            disconnects,
            *seen,
            left,
        )
        self._sequence += 2
        view.store_u64(at, self._sequence)

    def head(self) -> MirrorHead:
        """The newest whole head (that of a host which died while it wrote may be mixed)."""
        at = self._control.mirror_offset
        view = self._control.view
        for _ in range(_MOST_LOOKS):
            before = view.load_u64(at)
            values = load_row(self._control.memory, at + 8, _HEAD)
            if not before & 1 and view.load_u64(at) == before:
                break
            os.sched_yield()
        return MirrorHead(before, *values)

    def write_channel(self, channel: MirrorChannel) -> None:
        """Publish one channel's row."""
        store_row(
            self._control.memory,
            self._control.mirror_channel_offset(channel.relid),
            _ROW,
            # Stored one higher, so that a row never written reads as nothing.
            channel.state + 1,
            channel.generation,
            channel.sub_channel_index,
            channel.ring_gpadl,
            channel.gpadl_count,
            channel.target_vp,
            channel.connection_id,
            channel.flags,
            guid_to_wire(channel.if_type),
            guid_to_wire(channel.if_instance),
        )

    def clear_channel(self, relid: int, generation: int) -> None:
        """The host has no channel of this id any more; its life was the `generation`-th, which may have had no row."""
        at = self._control.mirror_channel_offset(relid)
        # One word: who reads the old state reads the old generation.
        self._control.view.store_u64(at, generation << 32)

    def is_over(self, relid: int, generation: int) -> bool:
        """Whether this life of a relid has ended: the guest has given it back, or holds it anew."""
        word = self._control.view.load_u64(self._control.mirror_channel_offset(relid))
        state, newest = word & _U32, word >> 32
        return newest > generation or (newest == generation and not state)

    def channels(self) -> Iterator[MirrorChannel]:
        """Every channel that the host has offered and not forgotten, by relid."""
        for relid in range(1, MIRROR_CHANNELS):
            channel = self.channel(relid)
            if channel is not None:
                yield channel

    def channel(self, relid: int) -> MirrorChannel | None:
        """The channel of this id, None while the host knows none."""
        at = self._control.mirror_channel_offset(relid)
        state, *words, if_type, if_instance = load_row(self._control.memory, at, _ROW)
        if not state:
            return None
        values: list[Any] = [state - 1, *words, UUID(bytes_le=if_type), UUID(bytes_le=if_instance)]
        return MirrorChannel(relid, *values)
