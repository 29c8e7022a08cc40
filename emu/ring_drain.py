"""Packets of a ring one by one, as they are asked for (`RingConsumer.drain`).

Never compiled (`setup.py`): what was not handed out has to stay in the ring when somebody leaves a `for` early, and of
compiled code nobody learns that.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, TypeVar

from emu.ring_memory import checked_index, impossible_index
from emu.ring_packets import ALIKE, LONGEST_RUN, ROUND_COUNTS, SHORTEST_READ, Plans, beyond

if TYPE_CHECKING:
    from emu.ring_consumer import RingConsumer

T = TypeVar("T")


def drain(ring: RingConsumer, plans: Plans, limit: int | None) -> Generator[tuple[int, int, int, Any], None, None]:
    """Take packets, `limit` at most; rules and errors are those of `RingConsumer.drain`."""
    packets = _drain(ring, plans)
    return packets if limit is None else _first(packets, limit)


def _first(packets: Generator[T, None, None], limit: int) -> Generator[T, None, None]:
    """Hand on at most `limit` packets, then close."""
    try:
        yield from islice(packets, limit)
    finally:
        packets.close()


def _drain(ring: RingConsumer, plans: Plans) -> Generator[tuple[int, int, int, Any], None, None]:
    """The body of all drains: packets that are alike are copied together, others one by one as they are asked for.

    Offsets run on into the second view of the data, so that nothing wraps between two releases. `start`
    is what was released, `at` what was handed out, `last` what is published, `rest` what was copied and not
    handed out.
    """
    ring._begin()
    memory, load_write = ring.memory, ring.words.load_write
    buffer, headers, table = memory.buffer, memory.headers, plans.table
    data_size, chunk = memory.data_size, memory.data_size >> 3
    start = at = ring._read
    packets = count = size = alike = 0
    last_word = -1
    rest: Iterator[Any] | None = None
    try:
        while True:
            # Acquire: the packets' bytes are loaded after the index that covers them.
            write = checked_index(load_write(), data_size, "write_index")
            last = start + (write - ring._read) % data_size
            if last <= at:
                if last < at:
                    raise impossible_index(write, data_size, "write_index")  # what was handed out is published
                break
            stop = min(last, start + chunk)
            while at < stop:
                word = headers[at >> 3]
                if word != last_word:
                    try:
                        plan = table[word]
                    except KeyError:
                        plan = plans.add(word)
                    last_word, alike = word, 0
                    (packet_type, flags, _overhead), size, unpack, unpack_run, longest_run, _word = plan
                elif alike < ALIKE:
                    alike += 1
                elif longest_run:
                    count = ROUND_COUNTS[min((stop - at) // size, longest_run, ring._at_most)]
                    if count >= SHORTEST_READ:
                        run = unpack_run(at, count)
                        if run is not None:
                            if count == ring._at_most:
                                ring._at_most = min(2 * count, LONGEST_RUN)
                            rest = iter(run[1])
                            yield from zip(repeat(packet_type), repeat(flags), run[0], rest)
                            rest = None
                            at += count * size
                            packets += count
                            continue
                        alike, ring._at_most = 0, SHORTEST_READ
                end = at + size
                if end > last:
                    raise beyond(size, last - at)
                trans_id, payload = unpack(buffer, at)
                at = end
                packets += 1
                yield packet_type, flags, trans_id, payload
            if at >= start + chunk:
                ring._release(at - start, packets)
                start = at = ring._read
                packets = 0
    finally:
        ring._reading = False
        if rest is not None:
            count -= rest.__length_hint__()  # type: ignore[attr-defined]
            at += count * size
            packets += count
        if at != start and not memory.closed:
            ring._release(at - start, packets)
    if ring._bad_wish:
        raise ring._never_enough()
