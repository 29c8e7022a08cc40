"""An open channel whose device is told what to do wrong with packets: forget, complete twice, unasked, change them.

The back end knows nothing of it. A fault is looked for at each packet, so a bus makes such channels only on a
machine that may have some; elsewhere it makes plain ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Final
from uuid import UUID

from emu.fault_plan import Faults, Hit
from emu.faults import FaultKind
from emu.memory import PAGE_SHIFT, PAGE_SIZE, GuestMemory
from emu.ring import Packet, Run
from emu.ring_memory import Payload
from emu.wire.packets import VM_PKT_COMP, VM_PKT_DATA_INBAND, ring_bytes
from emu.wire.ring_layout import WRITE_INDEX
from hostproc.devices.channel import BATCH_BYTES, BATCH_PACKETS, HostChannel
from hostproc.loop import TaskBody

UNUSED_ID: Final = 0x7FFF_FFFF_FFFF_FFF7
"""A transaction id that no guest has given out."""
EARLY_DATA: Final = b"early data"
UNASKED: Final = b"unasked "


class FaultyChannel(HostChannel):
    """A channel with faults; `arm` says where they are looked up, before the back end gets it."""

    __slots__ = ("_faults", "_identity", "_memory", "_outgoing_pfns", "_written")

    def arm(
        self,
        faults: Faults,
        memory: GuestMemory,
        outgoing_pfns: Sequence[int],
        identity: Callable[[], tuple[str, UUID] | None],
    ) -> None:
        """Look faults up in `faults`; the host's ring is `outgoing_pfns`, its control page first."""
        self._faults = faults
        self._memory = memory
        self._outgoing_pfns = outgoing_pfns
        self._identity = identity
        self._written = 0  # bytes of the newest packet in our ring

    def hit(self, kind: FaultKind) -> Hit | None:
        """Whether a fault strikes on this channel now."""
        return self._faults.hit(kind, relid=self.relid, identity=self._identity)

    # -- from the guest -------------------------------------------------------------------------------

    def take(self, limit: int = BATCH_PACKETS, most_bytes: int = BATCH_BYTES) -> list[Packet]:
        """As the plain channel, without the packets that are forgotten."""
        packets = super().take(limit, most_bytes)
        return [packet for packet in packets if not self.hit(FaultKind.VSP_FORGET_INFLIGHT)]

    def take_lone(self) -> None:
        """None: whether a packet is forgotten is decided in the two others."""

    def take_runs(self, limit: int = BATCH_PACKETS, most_bytes: int = BATCH_BYTES) -> list[Run]:
        """As the plain channel, without the packets that are forgotten."""
        runs = super().take_runs(limit, most_bytes)
        if not self._faults.on(FaultKind.VSP_FORGET_INFLIGHT):
            return runs
        kept = []
        for packet_type, flags, ids, payloads in runs:
            stay = [not self.hit(FaultKind.VSP_FORGET_INFLIGHT) for _ in payloads]
            if any(stay):
                kept.append((packet_type, flags, list(compress(ids, stay)), list(compress(payloads, stay))))
        return kept

    # -- to the guest ---------------------------------------------------------------------------------

    def send(self, payload: Payload, trans_id: int = 0, flags: int = 0, packet_type: int = VM_PKT_DATA_INBAND) -> bool:
        """Write one packet, and what goes wrong with it as far as there is room."""
        if not super().send(payload, trans_id, flags, packet_type):
            return False
        self._newest_is(payload)
        for more, more_id in self._more(packet_type, [payload], [trans_id]):
            if super().send(more, more_id, 0, VM_PKT_COMP):
                self._newest_is(more)
        self.mutate()
        return True

    def send_all(
        self,
        payloads: Sequence[Payload],
        trans_ids: Iterable[int] | int = 0,
        flags: int = 0,
        packet_type: int = VM_PKT_DATA_INBAND,
    ) -> TaskBody:
        """Write packets, and what goes wrong with them."""
        if isinstance(trans_ids, int):
            ids = [trans_ids and trans_ids + n for n in range(len(payloads))]
        else:
            ids = list(trans_ids)
        yield from super().send_all(payloads, ids, flags, packet_type)
        for payload in payloads[-1:]:
            self._newest_is(payload)
        for more, more_id in self._more(packet_type, payloads, ids):
            yield from super().send_all([more], [more_id], 0, VM_PKT_COMP)
            self._newest_is(more)
        self.mutate()

    def send_early(self) -> None:
        """Write a packet before the guest was told that the channel is open, if that is to happen."""
        if self.hit(FaultKind.VSP_EARLY_DATA):
            HostChannel.send(self, EARLY_DATA)

    def send_unasked(self) -> None:
        """Complete what nobody sent, at once."""
        if hit := self.hit(FaultKind.VSP_COMPLETE_UNSENT):
            HostChannel.send(self, UNASKED, _unsent_id(hit), 0, VM_PKT_COMP)

    def _newest_is(self, payload: Payload) -> None:
        self._written = ring_bytes(len(payload))

    def _more(self, packet_type: int, payloads: Sequence[Payload], ids: Sequence[int]) -> list[tuple[Payload, int]]:
        """The completions that are forged beside these."""
        if packet_type != VM_PKT_COMP or self._faults.quiet:
            return []
        more: list[tuple[Payload, int]] = []
        for payload, trans_id in zip(payloads, ids, strict=True):
            if self.hit(FaultKind.VSP_COMPLETE_TWICE):
                more.append((payload, trans_id))
            if self.hit(FaultKind.VSP_COMPLETE_ZERO):
                more.append((payload, 0))
            if hit := self.hit(FaultKind.VSP_COMPLETE_UNSENT):
                more.append((payload, _unsent_id(hit)))
        return more

    # -- in the ring ----------------------------------------------------------------------------------

    def mutate(self) -> None:
        """Change the newest packet in our ring, or our write_index, if that is to happen."""
        if self._faults.quiet or self._unmapped is not None:
            return
        if self._written and (hit := self.hit(FaultKind.HOST_MUTATE_PKT)):
            self._mutate_packet(hit.fault.number >> 8, hit.fault.number & 0xFF)
        if hit := self.hit(FaultKind.HOST_MUTATE_INDEX):
            # The producer goes on from where it was: its next packet puts the index right.
            at = (self._outgoing_pfns[0] << PAGE_SHIFT) + WRITE_INDEX
            self._memory.atomics.store_u32(at, hit.fault.number)
            self.signal()

    def _mutate_packet(self, offset: int, byte: int) -> None:
        if offset >= self._written:
            return
        size = (len(self._outgoing_pfns) - 1) * PAGE_SIZE
        at = (self._outgoing.words.load_write() - self._written + offset) % size
        page, in_page = divmod(at, PAGE_SIZE)
        self._memory.write((self._outgoing_pfns[1 + page] << PAGE_SHIFT) + in_page, bytes([byte]))


def _unsent_id(hit: Hit) -> int:
    return hit.fault.number if hit.fault.has_value else UNUSED_ID
