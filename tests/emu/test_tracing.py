"""The recorder: one table of events, rings that overwrite their oldest records, drains that count what they missed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from mmap import mmap
from struct import Struct
from types import SimpleNamespace

import pytest

from emu import tracing
from emu.control import ACTORS
from emu.errors import MissingPrerequisite
from emu.ipc.segments import Segment, object_name
from emu.tracing import (
    BY_NUMBER,
    CAPACITY,
    E_BYTES,
    E_EOM,
    E_OFFER,
    E_POST,
    E_RING_PUBLISH,
    E_RING_RELEASE,
    EVENTS,
    NO_VP,
    RECORD,
    RECORD_BYTES,
    TRACE_BYTES,
    TRACE_HEAD_BYTES,
    WRITTEN_AT_ONCE,
    BytesRecorder,
    Context,
    Drain,
    Recorder,
)
from tests.processes import Forked

VOCABULARY = """
offer rescind release post slot_write slot_read slot_free eom flag_set flag_clear irq_raise isr_enter isr_exit
tasklet_sched tasklet_run mask unmask ring_publish ring_release pending_size signal req_alloc req_complete
gpadl_add gpadl_drop page_alloc page_free map unmap target_change lock unlock wait wake cpu_online cpu_offline
fault point
"""


@pytest.fixture
def segment(machine_name: str) -> Iterator[Segment]:
    """A trace segment, made as the launcher makes it."""
    segment = Segment.create(object_name(machine_name, "trace"), TRACE_BYTES, reserved=TRACE_HEAD_BYTES)
    yield segment
    segment.close()


def sequences(raw: bytes) -> list[int]:
    """Sequence numbers of drained records."""
    return [record[1] for record in RECORD.iter_unpack(raw)]


# -- the table ------------------------------------------------------------------------------------


def test_vocabulary_is_complete_and_keeps_its_numbers() -> None:
    """Every word of the minimum vocabulary is an event; they come first, numbered from 1 without gaps."""
    words = VOCABULARY.split()

    assert [EVENTS[word].number for word in words] == list(range(1, len(words) + 1))
    assert sorted(BY_NUMBER) == list(range(1, len(EVENTS) + 1))


def test_every_event_has_its_constant() -> None:
    """`E_NAME` is the number of `name`, for all of them."""
    constants = {name: value for name, value in vars(tracing).items() if name.startswith("E_")}

    assert constants == {f"E_{name.upper()}": spec.number for name, spec in EVENTS.items()}


def test_arguments_fit_a_record() -> None:
    """At most six words, each argument with a name of its own."""
    for spec in EVENTS.values():
        assert spec.words <= 6, spec
        assert len(set(spec.arguments)) == len(spec.arguments), spec


def test_record_is_one_cache_line() -> None:
    """64 bytes, so that two records never share one."""
    assert RECORD_BYTES == 64
    assert (TRACE_BYTES - TRACE_HEAD_BYTES) == ACTORS * CAPACITY * RECORD_BYTES


# -- recording and draining -----------------------------------------------------------------------


def test_record_holds_what_it_was_given(segment: Segment) -> None:
    """Time, sequence, event, processor, context and six arguments, all of them."""
    before = time.monotonic_ns()
    recorder = Recorder(segment, 3, vp=2, context=Context.ISR)
    recorder.record(E_OFFER, 1, 2, 3, 4, 5, (1 << 64) - 1)

    (record,) = RECORD.iter_unpack(Drain(segment).take(3))
    assert before <= record[0] <= time.monotonic_ns()
    assert record[1:] == (0, E_OFFER, 2, Context.ISR, 1, 2, 3, 4, 5, (1 << 64) - 1)


def test_context_is_stamped_as_it_is_now(segment: Segment) -> None:
    """An actor changes its context between two records."""
    recorder = Recorder(segment, 0)
    recorder.record(E_EOM)
    recorder.context = Context.TASKLET
    recorder.record(E_EOM)

    assert [record[3:5] for record in RECORD.iter_unpack(Drain(segment).take(0))] == [
        (NO_VP, Context.HOST),
        (NO_VP, Context.TASKLET),
    ]


def test_argument_below_zero_is_stored_modulo_2_64(segment: Segment) -> None:
    """An errno as the kernel writes it ends no process."""
    Recorder(segment, 0).record(E_OFFER, -19, 1 << 64, 3)

    (record,) = RECORD.iter_unpack(Drain(segment).take(0))
    assert record[5:8] == ((1 << 64) - 19, 0, 3)


class Words:
    """The indices of a ring, without the ring."""

    def __init__(self, write: int, read: int) -> None:
        self.write, self.read, self.pending = write, read, 0
        self.rooms: list[tuple[int, int]] = []
        self.stored: Callable[[], object] = lambda: None

    def load_write(self) -> int:
        """Load write_index."""
        return self.write

    def load_read(self) -> int:
        """Load read_index."""
        return self.read

    def load_pending(self) -> int:
        """Load pending_send_sz."""
        return self.pending

    def store_write(self, index: int) -> None:
        """Store write_index."""
        self.write = index
        self.stored()

    def store_read(self, index: int) -> None:
        """Store read_index."""
        self.read = index
        self.stored()

    def room(self, index: int, freed: int) -> None:
        """Somebody waits, and so much was freed."""
        self.rooms.append((index, freed))


def without_time(raw: bytes) -> list[tuple[int, ...]]:
    """Drained records, all but their times."""
    return [record[1:] for record in RECORD.iter_unpack(raw)]


def test_bound_record_is_what_record_writes(segment: Segment) -> None:
    """Whichever way an event is recorded, its record is the same, in whatever context it is made."""
    plain, bound = Recorder(segment, 0, vp=3), Recorder(segment, 1, vp=3)
    words = 1, 2, 3, 4, 5, (1 << 64) - 1
    same, pair = bound.bind(E_OFFER, *words), bound.bind_pair((E_EOM, 7, -1), (E_POST, *words))
    none, four = bound.bind_first(E_EOM), bound.bind_first(E_POST, *words[:4])
    written = [(E_OFFER, *words), (E_EOM, 7, -1), (E_POST, *words), (E_EOM, 9), (E_POST, *words[:5], -2)]
    for context in Context:
        plain.context = bound.context = context
        for event, *given in written:
            plain.record(event, *given)
        same()
        pair(bound.now_ns())
        none(9)
        four(5, -2)

    drain = Drain(segment)
    assert without_time(drain.take(1)) == without_time(drain.take(0))


@pytest.mark.parametrize("sole", [False, True])
@pytest.mark.parametrize("context", [Context.ISR, Context.TASK])
def test_bound_index_is_recorded_with_how_far_it_moved(segment: Segment, *, sole: bool, context: Context) -> None:
    """Once round a ring of 64 bytes: each publish and each release is one record, as `record` writes it."""
    plain, bound, words = Recorder(segment, 0, vp=1), Recorder(segment, 1, vp=1), Words(56, 40)
    publish = bound.bind_publish((7, 0), 64, words.store_write, words.load_write, sole=sole)
    release = bound.bind_release(
        (7, 1), 64, words.store_read, words.load_read, words.load_pending, words.room, sole=sole
    )
    plain.context = bound.context = context
    for write, read in ((0, 56), (24, 8), (40, 40)):
        publish(write)
        release(read)
    for written, released in (((0, 8), (56, 16)), ((24, 24), (8, 16)), ((40, 16), (40, 32))):
        plain.record(E_RING_PUBLISH, 7, 0, *written)
        plain.record(E_RING_RELEASE, 7, 1, *released)

    drain = Drain(segment)
    assert without_time(drain.take(1)) == without_time(drain.take(0))
    assert (words.write, words.read, words.rooms) == (40, 40, [])


def test_publish_is_recorded_before_its_index_and_a_release_behind_it(segment: Segment) -> None:
    """When write_index is stored its record is there; read_index is stored, and then its record."""
    recorder, words, drain = Recorder(segment, 0), Words(0, 0), Drain(segment)
    words.stored = lambda: seen.append(len(drain.take(0)) // RECORD_BYTES)
    seen: list[int] = []

    recorder.bind_publish((7, 0), 64, words.store_write, words.load_write, sole=True)(8)
    recorder.bind_release((7, 0), 64, words.store_read, words.load_read, words.load_pending, words.room, sole=True)(8)

    assert (seen, len(drain.take(0)) // RECORD_BYTES) == ([1, 0], 1)


def test_index_of_several_writers_is_loaded_each_time(segment: Segment) -> None:
    """What somebody else published in between is not ours; with `sole` nobody does."""
    recorder, words = Recorder(segment, 0), Words(0, 0)
    publish = recorder.bind_publish((7, 0), 64, words.store_write, words.load_write, sole=False)
    publish(8)
    words.write = 24
    publish(32)

    assert [record[8] for record in RECORD.iter_unpack(Drain(segment).take(0))] == [8, 8]


def test_release_looks_whether_somebody_waits(segment: Segment) -> None:
    """Only where a size is waited for is asked whether there is room now; the release is recorded by then."""
    recorder, words, drain = Recorder(segment, 0), Words(48, 0), Drain(segment)
    release = recorder.bind_release(
        (7, 0), 64, words.store_read, words.load_read, words.load_pending, words.room, sole=True
    )
    release(8)
    words.pending = 40
    release(24)

    assert words.rooms == [(24, 16)]
    assert [record[7:9] for record in RECORD.iter_unpack(drain.take(0))] == [(8, 8), (24, 16)]


def test_bound_pair_has_the_time_it_was_given(segment: Segment) -> None:
    """The first event; the second is a nanosecond behind it, so that whoever sorts by time keeps their order."""
    recorder = Recorder(segment, 0)
    recorder.bind_pair((E_EOM,), (E_OFFER,))(12345)

    assert [(record[0], record[1], record[2]) for record in RECORD.iter_unpack(Drain(segment).take(0))] == [
        (12345, 0, E_EOM),
        (12346, 1, E_OFFER),
    ]


@pytest.mark.parametrize("before", range(CAPACITY - 3, CAPACITY + 2))
def test_bound_pair_goes_round_the_end_of_the_ring(segment: Segment, before: int) -> None:
    """A pair that lies across the end is two records like any others."""
    recorder, drain = Recorder(segment, 0), Drain(segment)
    for _ in range(before):
        recorder.record(E_EOM)
    drain.take(0)
    pair = recorder.bind_pair((E_OFFER, 1), (E_POST, 2))
    for _ in range(3):
        pair(recorder.now_ns())

    raw = drain.take(0)
    assert sequences(raw)[-6:] == list(range(before, before + 6))
    assert [record[5] for record in RECORD.iter_unpack(raw)][-6:] == [1, 2] * 3


@pytest.mark.parametrize("count", [(1 << 32) - 2, (1 << 32) - 1, 1 << 32])
def test_sequence_starts_again_behind_the_last(segment: Segment, count: int) -> None:
    """The sequence is that of the head modulo 2^32, for all ways to record."""
    segment.view.store_u64(4096, count)
    recorder = Recorder(segment, 0)
    recorder.record(E_EOM)
    recorder.bind(E_EOM)()
    recorder.bind_pair((E_EOM,), (E_EOM,))(recorder.now_ns())
    recorder.bind_first(E_EOM)(1)
    words = Words(0, 0)
    recorder.bind_publish((7, 0), 64, words.store_write, words.load_write, sole=True)(8)
    recorder.bind_release((7, 0), 64, words.store_read, words.load_read, words.load_pending, words.room, sole=True)(8)

    wanted = [(count + number) % (1 << 32) for number in range(7)]
    assert sequences(Drain(segment).take(0))[-7:] == wanted


def test_only_who_recorded_is_looked_at(segment: Segment) -> None:
    """A drain knows which actors have something new."""
    first, second, drain = Recorder(segment, 2), Recorder(segment, 5), Drain(segment)
    first.record(E_EOM)
    second.record(E_EOM)
    drain.take(2)

    assert drain.recorded() == [5]


def test_records_are_drained_once_in_order(segment: Segment) -> None:
    """Each taking gives what came since the last."""
    recorder, drain = Recorder(segment, 0), Drain(segment)
    empty = drain.take(0)
    taken = []
    for count in (3, 0, 2):
        for _ in range(count):
            recorder.record(E_EOM)
        taken.append(sequences(drain.take(0)))

    assert empty == b""
    assert taken == [[0, 1, 2], [], [3, 4]]
    assert drain.dropped == 0


def test_actor_knows_how_far_the_drain_is_behind(segment: Segment) -> None:
    """Only the drain that tells counts: somebody else may copy the same records, and nobody needs to."""
    recorder, other = Recorder(segment, 3), Recorder(segment, 4)
    for _ in range(5):
        recorder.record(E_EOM)
    Drain(segment).take(3)
    before = recorder.behind()
    drain = Drain(segment, tells=True)
    drain.take(3)
    after = recorder.behind()
    recorder.record(E_EOM)

    assert (before, after, recorder.behind(), other.behind()) == (5, 0, 1, 0)


def test_actors_have_rings_of_their_own(segment: Segment) -> None:
    """The first and the last slot record side by side."""
    Recorder(segment, 0).record(E_EOM, 1)
    Recorder(segment, ACTORS - 1).record(E_OFFER, 2)
    drain = Drain(segment)

    assert [RECORD.unpack(drain.take(slot))[2] for slot in (0, ACTORS - 1)] == [E_EOM, E_OFFER]
    assert drain.take(1) == b""


def test_records_survive_the_end_of_the_ring(segment: Segment) -> None:
    """A drain across the wrap gives one run of records."""
    recorder, drain = Recorder(segment, 0), Drain(segment)
    for _ in range(CAPACITY - 5):
        recorder.record(E_EOM)
    drain.take(0)
    for _ in range(10):
        recorder.record(E_EOM)

    assert sequences(drain.take(0)) == list(range(CAPACITY - 5, CAPACITY + 5))
    assert drain.dropped == 0


@pytest.mark.parametrize("extra", [-1, 0, 1, 100, CAPACITY, 2 * CAPACITY + 3])
def test_overwritten_records_are_counted(segment: Segment, extra: int) -> None:
    """A drain that came too late gets the newest records, and knows how many it missed.

    Of a full ring the oldest ones are left out: their writer might be overwriting them.
    """
    recorder, drain = Recorder(segment, 0), Drain(segment)
    total = CAPACITY + extra
    for _ in range(total):
        recorder.record(E_EOM)

    kept = min(total, CAPACITY - WRITTEN_AT_ONCE)
    assert sequences(drain.take(0)) == list(range(total - kept, total))
    assert drain.dropped == total - kept


class LappedMemory:
    """Memory of which each copy takes so long that `meanwhile()` runs in the middle of it."""

    def __init__(self, memory: mmap, meanwhile: Callable[[], None]) -> None:
        self._memory = memory
        self._meanwhile = meanwhile

    def __getitem__(self, part: slice) -> bytes:
        before = self._memory[part]
        self._meanwhile()
        # The copy goes from front to back: its first half is old, the rest is what stands there now.
        half = len(before) // 2 // RECORD_BYTES * RECORD_BYTES
        return before[:half] + self._memory[part][half:]


def test_record_that_was_overwritten_while_copied_is_not_given(segment: Segment) -> None:
    """A writer that laps the drain takes its records with it: what is given is whole and in order."""
    recorder, drain = Recorder(segment, 0), Drain(segment)
    for _ in range(CAPACITY - 10):
        recorder.record(E_EOM)

    def write_on() -> None:
        for _ in range(40):
            recorder.record(E_OFFER)

    vars(drain)["_segment"] = SimpleNamespace(memory=LappedMemory(segment.memory, write_on))
    taken = sequences(drain.take(0))

    assert taken == list(range(30 + WRITTEN_AT_ONCE, CAPACITY - 10))
    assert drain.dropped == 30 + WRITTEN_AT_ONCE


def test_successor_in_a_slot_goes_on_counting(segment: Segment) -> None:
    """A second recorder of a slot overwrites nothing that was not drained."""
    drain = Drain(segment)
    Recorder(segment, 0).record(E_EOM)
    Recorder(segment, 0).record(E_EOM)

    assert sequences(drain.take(0)) == [0, 1]


def test_drain_sees_what_another_process_records(segment: Segment) -> None:
    """Every record of a busy writer is drained once, or counted as dropped."""
    total = 30_000

    def write() -> None:
        recorder = Recorder(segment, 5)
        for number in range(total):
            recorder.record(E_EOM, number)

    drain = Drain(segment)
    seen: list[int] = []
    with Forked(write) as writer:
        while not seen or seen[-1] != total - 1:
            seen += sequences(drain.take(5))
        writer.wait()

    assert seen == sorted(set(seen))
    assert len(seen) + drain.dropped == total


def test_recording_needs_room(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tmpfs without room for the ring is one line when the recorder is made, not SIGBUS at some record."""

    def full(_segment: Segment, _offset: int, _nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Segment, "reserve", full)

    with pytest.raises(MissingPrerequisite, match="no room for 1048576 bytes of recording"):
        Recorder(segment, 0)


def test_head_that_went_backwards_is_nothing_new(segment: Segment) -> None:
    """A scribbled head does not make the drain copy nonsense."""
    recorder, drain = Recorder(segment, 0), Drain(segment)
    for _ in range(5):
        recorder.record(E_EOM)
    drain.take(0)
    segment.view.store_u64(4096, 2)

    assert drain.take(0) == b""


@pytest.mark.parametrize("length", [0, 1, 40, 41, 240])
def test_bytes_follow_their_record(segment: Segment, length: int) -> None:
    """Forty a record, each with how many are left; another sort of recorder keeps none."""
    data = bytes(range(length))
    Recorder(segment, 3).keep(data)
    recorder = BytesRecorder(segment, 4)
    recorder.record(E_POST, 1)
    recorder.keep(data)
    drain = Drain(segment)
    _post, *kept = RECORD.iter_unpack(drain.take(4))

    assert drain.take(3) == b""
    assert [record[2] for record in kept] == [E_BYTES] * -(-length // 40)
    assert [record[5] for record in kept] == list(range(length, 0, -40))
    assert b"".join(Struct("<5Q").pack(*record[6:]) for record in kept)[:length] == data
