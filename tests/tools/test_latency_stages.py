"""Records cut into stages: single packets by their steps, messages by their serials, nothing guessed."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from emu.tracing import (
    E_FLAG_SET,
    E_IRQ_RAISE,
    E_ISR_ENTER,
    E_MESSAGE_POST,
    E_REQUEST_START,
    E_RING_PUBLISH,
    E_RING_RELEASE,
    E_SLOT_READ,
    E_SLOT_WRITE,
    E_TASK_TAKE,
    E_TASKLET_RUN,
    E_WORK_QUEUE,
    E_WORK_RUN,
)
from tools.latency_stages import CONTROL_STAGES, DATA_STAGES, TO_GUEST, TO_HOST, Stages, Step, stages_of

VECTOR = 0xF3
RELID = 7
BYTES = 88
"""Of a packet in its ring, there and back."""


def steps(*rows: tuple[int, int, tuple[int, ...]], position: int = 1) -> Iterable[Step]:
    """Steps of (ns, event, arguments), those of the guest on VP page 1."""
    return [Step(t_ns, event, values, position) for t_ns, event, values in rows]


def round_trip(start: int, relid: int = RELID) -> list[tuple[int, int, tuple[int, ...]]]:
    """All steps of one packet, the n-th n ns behind the one before."""
    events = [
        (E_RING_PUBLISH, (relid, 0, 0, BYTES)),
        (E_RING_RELEASE, (relid, 0, 0, BYTES)),
        (E_RING_PUBLISH, (relid, 1, 0, BYTES)),
        (E_FLAG_SET, (1, 2, relid, 0)),
        (E_IRQ_RAISE, (1, VECTOR)),
        (E_ISR_ENTER, (VECTOR,)),
        (E_TASKLET_RUN, (2, relid)),
        (E_RING_RELEASE, (relid, 1, 0, BYTES)),
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
    """Whose answer is whose cannot be seen in the records, so there is no sample rather than a guess.

    Nor is there one of what is sent behind them: how many have come back cannot be seen, either.
    """
    first, *rest = round_trip(1000)
    second = (1000, E_RING_PUBLISH, (RELID, TO_HOST, 8, BYTES))

    assert not any(data(stages_of(steps(first, second, *rest, *round_trip(5000)))))


def test_channel_is_followed_from_when_the_records_tell_of_each_packet() -> None:
    """What its ends took and answered before, of packets that could not be told apart, counts for none of these."""
    early = [(at, E_RING_PUBLISH, (RELID, TO_HOST, 0, BYTES)) for at in (10, 11)]
    early += [
        (12, E_RING_RELEASE, (RELID, TO_HOST, 0, 2 * BYTES)),
        (13, E_RING_PUBLISH, (RELID, TO_GUEST, 0, 2 * BYTES)),
    ]
    rows = [
        (99, E_REQUEST_START, (RELID, 2)),
        (100, E_RING_PUBLISH, (RELID, TO_HOST, 0, BYTES)),
        (200, E_RING_PUBLISH, (RELID, TO_HOST, 0, BYTES)),
        (300, E_RING_RELEASE, (RELID, TO_HOST, 0, BYTES)),
        (400, E_RING_RELEASE, (RELID, TO_HOST, 0, BYTES)),
        (500, E_RING_PUBLISH, (RELID, TO_GUEST, 0, BYTES)),
        (600, E_RING_PUBLISH, (RELID, TO_GUEST, 0, BYTES)),
    ]

    assert data(stages_of(steps(*early, *rows)))[:2] == [[200, 200], [200, 200]]


def test_each_of_several_packets_is_followed_where_the_records_tell_of_each() -> None:
    """Three that a host holds up: each is that much shorter as it was sent later, and all wait for what came for one.

    The first one's answer asks for the interrupt; the last answer, which comes behind the ISR, has none of its own.
    """
    rows = [
        (1000, E_RING_PUBLISH, (RELID, TO_HOST, 0, BYTES)),
        (1001, E_REQUEST_START, (RELID, 1)),
        (1100, E_RING_PUBLISH, (RELID, TO_HOST, 0, BYTES)),
        (1200, E_RING_PUBLISH, (RELID, TO_HOST, 0, BYTES)),
        (2000, E_RING_RELEASE, (RELID, TO_HOST, 0, 3 * BYTES)),
        (2010, E_RING_PUBLISH, (RELID, TO_GUEST, 0, 2 * BYTES)),
        (2013, E_FLAG_SET, (1, 2, RELID, 0)),
        (2017, E_IRQ_RAISE, (1, VECTOR)),
        (2022, E_ISR_ENTER, (VECTOR,)),
        (2025, E_RING_PUBLISH, (RELID, TO_GUEST, 0, BYTES)),
        (2028, E_TASKLET_RUN, (2, RELID)),
        (2035, E_RING_RELEASE, (RELID, TO_GUEST, 0, 3 * BYTES)),
        (2043, E_TASK_TAKE, (RELID, 3)),
    ]
    stages = stages_of(steps(*rows), dues=[990, 1090, 1190])

    assert data(stages)[:2] == [[1000, 900, 800], [10, 10, 25]]
    assert data(stages)[2:] == [[3, 3], [4, 4], [5, 5], [6, 6], [7, 7], [8, 8]]
    assert stages.due == [10, 10, 10]


def test_stages_add_up_to_the_round_trip() -> None:
    """From when each was due to when its sender has it, nothing between two stages."""
    dues = [990, 4970]
    stages = stages_of(steps(*round_trip(1000), *round_trip(5000)), dues)

    ends = [start + sum(range(9)) for start in (1000, 5000)]
    assert [sum(one) for one in zip(stages.due, *data(stages), strict=True)] == [
        end - due for end, due in zip(ends, dues, strict=True)
    ]


def test_round_trip_that_is_not_followed_has_its_due_all_the_same() -> None:
    """Behind a packet of the driver's own, which no task takes, the first is not followed, and no later one is late."""
    own = round_trip(0)[:-1]
    first = [(9, E_REQUEST_START, (RELID, 1)), *round_trip(1000)[1:]]
    publish = round_trip(1000)[0]
    stages = stages_of(steps(*own, publish, *first, *round_trip(5000)), dues=[990, 4970])

    assert stages.due == [30]
    assert data(stages)[7] == [8]


def test_answer_whose_taking_is_not_on_record_has_no_stage_behind_it() -> None:
    """The host's release comes late, or never: how long it served cannot be said, nor is it said of the next packet."""
    first, release, *rest = round_trip(1000)
    start = (1000, E_REQUEST_START, (RELID, 1))
    late = (rest[0][0] + 1, *release[1:])
    stages = stages_of(steps(start, first, rest[0], late, *rest[1:], *round_trip(5000)))

    assert data(stages) == [[n] for n in range(1, 9)]


@pytest.mark.parametrize("missing", range(1, 8))
def test_missing_step_ends_the_path_and_no_later_one(missing: int) -> None:
    """A record that was overwritten costs that packet's later stages, not those of the next packet."""
    whole = round_trip(1000)
    stages = stages_of(steps(*whole[:missing], *whole[missing + 1 :], *round_trip(5000)))

    assert data(stages)[: missing - 1] == [[n, n] for n in range(1, missing)]
    assert data(stages)[missing - 1 :] == [[n] for n in range(missing, 9)]


@pytest.mark.parametrize("missing", [None, 3, 4, 5, 6])
def test_missing_step_is_not_taken_from_the_packet_behind(missing: int | None) -> None:
    """Of two under way: what comes for the second one is not taken for the step that the first one lacks."""
    first, second = round_trip(1000)[:-1], round_trip(1050)[:-1]
    start, took = (999, E_REQUEST_START, (RELID, 2)), (1100, E_TASK_TAKE, (RELID, 2))
    if missing is not None:
        del first[missing]
    stages = stages_of(steps(start, *first, *second, took), dues=[990, 1030])

    whole = 8 if missing is None else missing
    assert data(stages)[: whole - 1] == [[n, n] for n in range(1, whole)]
    assert data(stages)[whole - 1 : 7] == [[n] for n in range(whole, 8)]
    ends = [second[-1][0]] if missing is not None else [first[-1][0], second[-1][0]]
    assert data(stages)[7] == [1100 - end for end in ends]
    assert stages.due == [10, 20]


def test_packet_of_which_the_host_left_no_record_is_not_found_in_those_of_the_next() -> None:
    """Its answer was read, so it is past all that: what the host takes then is another one."""
    first, second = round_trip(1000), round_trip(1050)
    start = (999, E_REQUEST_START, (RELID, 2))

    assert data(stages_of(steps(start, first[0], *first[3:8], *second[:2])))[0] == []


def test_packets_that_lack_different_steps_stay_in_their_order() -> None:
    """The first has come further than the second when both are taken: each is told as late as it was sent."""
    rows = [
        (999, E_REQUEST_START, (RELID, 2)),
        *round_trip(1000)[:6],
        *round_trip(1050)[:4],
        (1090, E_RING_RELEASE, (RELID, TO_GUEST, 0, 2 * BYTES)),
        (1100, E_TASK_TAKE, (RELID, 2)),
    ]

    assert stages_of(steps(*rows), dues=[990, 1030]).due == [10, 20]


def test_flag_of_a_packet_behind_leaves_the_one_before_it_alone() -> None:
    """Both wait for the same interrupt, of the same processor."""
    first, second = round_trip(1000), round_trip(1050)
    start = (999, E_REQUEST_START, (RELID, 2))
    stages = stages_of(steps(start, *first[:4], *second[:6]))

    assert data(stages)[3:5] == [[second[4][0] - first[3][0], 4], [5, 5]]


@pytest.mark.parametrize("waiting", [4, 5])
def test_channel_that_is_moved_leaves_its_interrupt_behind(waiting: int) -> None:
    """One that waits for its interrupt, or its ISR, when a flag is set on another VP: which was for it is unknown."""
    first, second = round_trip(1000), round_trip(1050)
    flag = (second[3][0], E_FLAG_SET, (0, 2, RELID, 0))
    irq = (second[4][0], E_IRQ_RAISE, (0, VECTOR))
    rows = [(999, E_REQUEST_START, (RELID, 2)), *first[:waiting], *second[:3], flag, irq]
    isr = Step(second[5][0], E_ISR_ENTER, (VECTOR,), 0)
    stages = stages_of([*steps(*rows), isr])

    assert data(stages)[3:5] == ([[4], [5]] if waiting == 4 else [[4, 4], [5]])


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
