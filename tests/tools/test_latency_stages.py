"""Records cut into stages: single packets by their steps, messages by their serials, nothing guessed."""

from __future__ import annotations

from collections.abc import Iterable

from emu.tracing import (
    E_FLAG_SET,
    E_IRQ_RAISE,
    E_ISR_ENTER,
    E_MESSAGE_POST,
    E_RING_PUBLISH,
    E_RING_RELEASE,
    E_SLOT_READ,
    E_SLOT_WRITE,
    E_TASK_TAKE,
    E_TASKLET_RUN,
    E_WORK_QUEUE,
    E_WORK_RUN,
)
from tools.latency_stages import CONTROL_STAGES, DATA_STAGES, Stages, Step, stages_of

VECTOR = 0xF3
RELID = 7


def steps(*rows: tuple[int, int, tuple[int, ...]], position: int = 1) -> Iterable[Step]:
    """Steps of (ns, event, arguments), those of the guest on VP page 1."""
    return [Step(t_ns, event, values, position) for t_ns, event, values in rows]


def round_trip(start: int, relid: int = RELID) -> list[tuple[int, int, tuple[int, ...]]]:
    """All steps of one packet, the n-th n ns behind the one before."""
    events = [
        (E_RING_PUBLISH, (relid, 0, 0)),
        (E_RING_RELEASE, (relid, 0, 0)),
        (E_RING_PUBLISH, (relid, 1, 0)),
        (E_FLAG_SET, (1, 2, relid, 0)),
        (E_IRQ_RAISE, (1, VECTOR)),
        (E_ISR_ENTER, (VECTOR,)),
        (E_TASKLET_RUN, (2, relid)),
        (E_RING_RELEASE, (relid, 1, 0)),
        (E_TASK_TAKE, (relid, 1)),
    ]
    return [(start + n * (n + 1) // 2, event, values) for n, (event, values) in enumerate(events)]


def data(stages: Stages) -> list[list[int]]:
    """Samples of the data stages in their order."""
    return [stages.data[name] for name in DATA_STAGES]


def test_packet_that_is_alone_is_followed_to_its_end() -> None:
    """Each stage is the time from one record to the next."""
    assert data(stages_of(steps(*round_trip(1000)))) == [[n] for n in range(1, 9)]


def test_packets_one_after_the_other_are_followed_each() -> None:
    """The second begins where the first has ended."""
    stages = stages_of(steps(*round_trip(1000), *round_trip(5000)))

    assert data(stages) == [[n, n] for n in range(1, 9)]


def test_packets_of_two_channels_are_told_apart() -> None:
    """An interrupt belongs to every channel whose flag is up on that VP."""
    rows = sorted([*round_trip(1000), *round_trip(1000, relid=9)])

    assert data(stages_of(steps(*rows))) == [[n, n] for n in range(1, 9)]


def test_two_packets_at_once_on_a_channel_are_not_followed() -> None:
    """Whose answer is whose cannot be seen in the records, so there is no sample rather than a guess."""
    first, *rest = round_trip(1000)

    assert not any(data(stages_of(steps(first, (1000, E_RING_PUBLISH, (RELID, 0, 8)), *rest))))


def test_missing_step_ends_the_path_and_no_later_one() -> None:
    """A record that was overwritten costs that packet's later stages, not those of the next packet."""
    whole = round_trip(1000)
    stages = stages_of(steps(*whole[:4], *whole[5:], *round_trip(5000)))

    assert data(stages)[:3] == [[n, n] for n in range(1, 4)]
    assert data(stages)[3:] == [[n] for n in range(4, 9)]


def test_interrupt_of_another_processor_or_vector_is_not_ours() -> None:
    """Only vector 0xF3 on the flag's own VP is the next step."""
    rows = round_trip(1000)
    foreign = [(1007, E_IRQ_RAISE, (0, VECTOR)), (1008, E_IRQ_RAISE, (1, 0xFD))]

    assert data(stages_of(steps(*sorted([*rows, *foreign])))) == [[n] for n in range(1, 9)]


def test_message_is_followed_by_its_serial() -> None:
    """From the post to the handler, whatever other messages do in between."""
    rows = [
        (10, E_MESSAGE_POST, (1, 2, 1, 40)),
        (11, E_SLOT_WRITE, (1, 2, 1, 1, 40, 0)),
        (12, E_MESSAGE_POST, (1, 2, 1, 41)),
        (13, E_ISR_ENTER, (VECTOR,)),
        (16, E_SLOT_READ, (2, 1, 1, 40)),
        (20, E_WORK_QUEUE, (0, 1, 40)),
        (25, E_WORK_RUN, (0, 1, 40)),
        (31, E_SLOT_WRITE, (1, 2, 1, 1, 41, 0)),
    ]
    stages = stages_of(steps(*rows))

    assert [stages.control[name] for name in CONTROL_STAGES] == [[1, 19], [2], [3], [4], [5]]


def test_message_without_a_serial_is_nobodys() -> None:
    """Serial 0 means that none was noted."""
    assert not any(
        stages_of(steps((1, E_MESSAGE_POST, (1, 2, 1, 0)), (2, E_SLOT_WRITE, (1, 2, 1, 1, 0, 0)))).control[
            "post_to_slot"
        ]
    )
