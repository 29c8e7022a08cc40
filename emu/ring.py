"""The VMBus ring buffer: one writer, one reader, a page of indices and a data area.

The ring is handed its memory and signals nobody: `write` and `take_signal` say whether the other end must be
interrupted, and the caller sees to it. Nothing that the peer can write is trusted: indices are copied out and
then checked, the lengths of a packet are fetched once, and what is wrong is a `ProtocolViolation`.

Two rules decide every signal (`hv_signal_on_write`, `hv_pkt_iter_close`):

- *data arrived*: only if the reader asks for interrupts, and had read all there was before this publish;
- *room again*: only if the writer said how much it waits for, and this release is the one that made it
  enough.

Each word has one writer. The producer stores write_index after the packet's bytes, and only then looks at
interrupt_mask, then read_index. The consumer stores read_index after its copies, and only then looks at
pending_send_sz, then write_index. Each store needs a full barrier behind it, or both sides could miss each
other; all stores here are sequentially consistent, and so have one.

Work on a ring goes on in one place at a time: producers in several processes share a lock, and a drain is
closed before the next begins. Instrumented rings are the same classes over other `RingWords`.

Packets go in by `write`, one by one, by `write_many`, or through a `reserve`d view; they come out by `drain`, one
by one, by `read_many` or `read_runs`, or as views that are `hold`ed until they are released.
"""

from __future__ import annotations

from emu.ring_consumer import HeldPackets, Packet, RingConsumer, Run
from emu.ring_memory import RingMemory, RingWords
from emu.ring_packets import PacketTooLong
from emu.ring_producer import Reservation, RingProducer

__all__ = [
    "HeldPackets",
    "Packet",
    "PacketTooLong",
    "Reservation",
    "RingConsumer",
    "RingMemory",
    "RingProducer",
    "RingWords",
    "Run",
]
