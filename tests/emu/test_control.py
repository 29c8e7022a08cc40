"""The control segment: configuration, process table, counters, refusals, and how far the machine has come."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from emu.control import (
    ACTORS,
    CONFIG_BYTES,
    CONTROL_BYTES,
    LOG_BYTES,
    MIRROR_CHANNEL_ROW,
    MIRROR_CHANNELS,
    MIRROR_HEAD,
    REFUSALS_BYTES,
    TASK_ROW,
    TASKS,
    ActorKind,
    ActorState,
    Control,
    Ready,
    actor_number,
    is_asleep,
    is_ending,
    is_over,
    slot_of,
    start_time_of,
)
from emu.counters import COUNTERS
from emu.ipc.segments import object_name, objects_of
from emu.layout import MAX_VPS
from guestproc.kernel import actors as kernel_actors
from tests.processes import Crowd, Forked


@pytest.fixture
def name(machine_name: str) -> str:
    """Name of the control segment."""
    return object_name(machine_name, "control")


@pytest.fixture
def control(name: str) -> Any:
    """A control segment with an empty configuration."""
    control = Control.create(name, {})
    yield control
    control.close()


# -- configuration -------------------------------------------------------------------------------


def test_configuration_is_read_back(name: str) -> None:
    """Whoever attaches reads what the launcher stored, types included."""
    config = {"vp_indices": [1, 0], "machine": {"poll": "adaptive", "ram": 1 << 40}, "blob": b"\0\xff"}
    made = Control.create(name, config)
    attached = Control.attach(name)

    assert attached.made is True
    assert attached.config() == config
    attached.close()
    made.close()


def test_configuration_too_large_leaves_nothing(machine_name: str, name: str) -> None:
    """What does not fit is our mistake, and no half-made segment stays behind."""
    with pytest.raises(AssertionError, match="configuration of"):
        Control.create(name, {"blob": bytes(CONFIG_BYTES)})

    assert objects_of(machine_name) == []


def test_configuration_that_cannot_be_stored_leaves_nothing(machine_name: str, name: str) -> None:
    """Neither does a value that msgpack cannot write."""
    with pytest.raises(TypeError):
        Control.create(name, {"what": object()})

    assert objects_of(machine_name) == []


def test_wiped_is_everything_but_what_is_kept(control: Control) -> None:
    """Actors, counts, stages, orders and refusals go; the configuration, what to record and the zygote's row stay.

    Machine time begins anew.
    """
    control.store_config({"vcpus": 4})
    control.set_recording(with_bytes=True)
    control.enlist(ActorKind.LAUNCHER, "launcher")
    control.enlist(ActorKind.ZYGOTE, "zygote")
    control.enlist(ActorKind.HYPERVISOR, "hypervisor")
    control.reach(Ready.CHANNELS_OPEN)
    control.memory[CONTROL_BYTES - 64 :] = b"x" * 64
    before = time.monotonic_ns()

    control.wipe()

    assert control.clock.now() <= time.monotonic_ns() - before
    assert control.config() == {"vcpus": 4} and control.recording_bytes and control.made
    assert [row.name for row in control.rows()] == ["launcher", "zygote"]
    assert control.ready == 0 and not any(control.memory[CONTROL_BYTES - 64 :])


def test_configuration_can_be_read_at_every_moment_of_a_wipe(control: Control) -> None:
    """The zygote may be reading it while the launcher wipes: no single write touches it."""
    control.store_config({"vcpus": 4})
    memory, written = control.memory, 0

    class Watched:
        def __getitem__(self, key: Any) -> Any:
            return memory[key]

        def __setitem__(self, key: Any, value: Any) -> None:
            nonlocal written
            memory[key] = value
            written += 1
            assert control.config() == {"vcpus": 4}

    control.memory = Watched()  # type: ignore[assignment]
    control.wipe()

    assert written > 2


def test_every_slot_has_a_serial_of_its_own(control: Control) -> None:
    """A word for each SINT of each VP, one behind the other."""
    words = [control.serial_offset(position, sint) for position in range(MAX_VPS) for sint in range(16)]

    assert words == list(range(words[0], words[0] + 8 * len(words), 8))


def test_areas_do_not_overlap(control: Control) -> None:
    """Process table, serials, tasks, mirror and refusals each end before the next begins."""
    areas = [
        (control.serial_offset(0, 0), control.serial_offset(MAX_VPS - 1, 15) + 8),
        (control.task_offset(0), control.task_offset(TASKS - 1) + TASK_ROW),
        (control.mirror_offset, control.mirror_offset + MIRROR_HEAD),
        (
            control.mirror_channel_offset(0),
            control.mirror_channel_offset(MIRROR_CHANNELS - 1) + MIRROR_CHANNEL_ROW,
        ),
    ]

    for (_start, end), (following, _end) in pairwise(areas):
        assert end <= following
    assert areas[-1][1] + REFUSALS_BYTES + CONFIG_BYTES <= CONTROL_BYTES


# -- process table -------------------------------------------------------------------------------


def test_enlisted_actor_is_found(control: Control) -> None:
    """A row says who, what, which CPU, and carries a start time that tells a reused pid apart."""
    row = control.enlist(ActorKind.VCPU, "vcpu3", cpu=3)

    assert list(control.rows()) == [row]
    assert (row.state, row.kind, row.name, row.cpu, row.pid) == (
        ActorState.ALIVE,
        ActorKind.VCPU,
        "vcpu3",
        3,
        os.getpid(),
    )
    assert row.start_time == start_time_of(os.getpid()) > 0


def test_claimed_row_is_of_nobody_until_its_process_arrives(control: Control) -> None:
    """It has the number that it will have, no pid that a signal could go to, and is no free row for the next one."""
    claimed = control.claim(ActorKind.VCPU, "vcpu3", cpu=3)
    other = control.enlist(ActorKind.VCPU, "vcpu4", cpu=4)

    assert (claimed.state, claimed.pid, claimed.start_time) == (ActorState.STARTING, 0, 0)
    assert other.slot != claimed.slot

    arrived = control.arrive(claimed, os.getpid())

    assert (arrived.state, arrived.pid) == (ActorState.ALIVE, os.getpid())
    assert arrived.start_time == start_time_of(os.getpid())
    assert (arrived.number, arrived.kind, arrived.cpu, arrived.name) == (claimed.number, ActorKind.VCPU, 3, "vcpu3")


def test_row_can_be_written_for_another_process(control: Control) -> None:
    """The launcher writes the zygote's row."""
    row = control.enlist(ActorKind.ZYGOTE, "zygote", pid=1)

    assert (row.pid, row.start_time) == (1, start_time_of(1))


def test_process_that_waits_is_asleep_and_one_that_runs_is_not() -> None:
    """By the kernel's word; nobody is not asleep."""
    reader, writer = os.pipe()

    def wait() -> None:
        os.read(reader, 1)

    with Forked(wait) as waiting:
        end = time.monotonic() + 10
        while not is_asleep(waiting.pid):
            assert time.monotonic() < end
            os.sched_yield()
        os.write(writer, b"x")
    os.close(reader)
    os.close(writer)

    assert not is_asleep(os.getpid()) and not is_asleep(waiting.pid)


def test_end_of_a_process_begins_with_the_signal_that_kills_it() -> None:
    """At once, and from then on, however long it takes to go: nobody who looks takes it for one that lives on."""
    child = Forked(lambda: time.sleep(60))
    assert not is_ending(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    seen = [is_ending(child.pid)]
    while not is_over(child.pid):
        seen.append(is_ending(child.pid))
    child.wait()

    assert all(seen) and is_ending(child.pid)


def test_process_is_not_over_while_a_thread_of_it_runs() -> None:
    """Also where its first thread is a zombie already, as happens for a moment to whoever is killed."""
    reader, writer = os.pipe()

    def tell_and_stay() -> None:
        os.write(writer, b"x")
        time.sleep(60)

    def leave_a_thread() -> None:
        threading.Thread(target=tell_and_stay).start()
        ctypes.CDLL(None).pthread_exit(None)

    child = Forked(leave_a_thread)
    assert os.read(reader, 1) == b"x"
    end = time.monotonic() + 10
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        os.sched_yield()
    alive = is_over(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    while not is_over(child.pid):
        assert time.monotonic() < end
        os.sched_yield()
    child.wait()
    os.close(reader)
    os.close(writer)

    assert not alive


def test_start_time_of_nobody_is_zero() -> None:
    """A pid that is not there has no start time."""
    child = Forked(lambda: None)
    child.wait()

    assert start_time_of(child.pid) == 0


def test_actor_number_is_that_of_the_guest_kernel(control: Control) -> None:
    """Locks and waiters name an actor as its row does: both halves of the code agree on the number."""
    control.enlist(ActorKind.LAUNCHER, "launcher")
    row = control.enlist(ActorKind.WORKER, "system")

    assert row.number == kernel_actors.actor_number(row.slot, row.generation)
    assert actor_number(159, 0xFFFFF) == kernel_actors.actor_number(159, 0xFFFFF)
    assert slot_of(row.number) == kernel_actors.actor_slot(row.number) == row.slot
    assert row.number != kernel_actors.NOBODY


def test_long_names_are_cut(control: Control) -> None:
    """40 bytes of a name are kept, even if that cuts a character in two."""
    row = control.enlist(ActorKind.WORKER, "x" * 39 + "é" * 5)

    assert row.name == "x" * 39 + "\ufffd"


def test_full_table_is_our_mistake(control: Control) -> None:
    """160 rows are more than any machine needs; the 161st is an assertion that names whom it hit."""
    for number in range(ACTORS):
        control.enlist(ActorKind.WORKER, f"w{number}")

    with pytest.raises(AssertionError, match="no row for one more"):
        control.enlist(ActorKind.WORKER, "one more")


def test_processes_enlisting_at_once_get_rows_of_their_own(control: Control) -> None:
    """Four processes claim ten rows each at the same time: forty rows, each whole."""

    def enlist(who: int) -> None:
        for number in range(10):
            row = control.enlist(ActorKind.WORKER, f"{who}.{number}", cpu=who)
            assert row.pid == os.getpid()
            assert control.row(row.slot) == row

    with Crowd() as crowd:
        for who in range(4):
            crowd.start(partial(enlist, who))

    rows = list(control.rows())
    assert sorted(row.name for row in rows) == sorted(f"{w}.{n}" for w in range(4) for n in range(10))
    assert {row.state for row in rows} == {ActorState.ALIVE}


def test_dead_is_what_the_launcher_says(control: Control) -> None:
    """An actor is dead when the launcher wrote so, with the status it ended with."""
    row = control.enlist(ActorKind.VCPU, "vcpu0")
    before = control.is_dead(row.number)

    control.set_dead(row.slot, 9)

    assert (before, control.is_dead(row.number)) == (False, True)
    assert (control.row(row.slot).state, control.row(row.slot).status) == (ActorState.DEAD, 9)


def test_negative_status_is_kept_in_32_bits(control: Control) -> None:
    """A status below zero (a signal, as some report it) does not break the row."""
    row = control.enlist(ActorKind.VCPU, "vcpu0")

    control.set_dead(row.slot, -9)

    assert control.row(row.slot).status == 0xFFFFFFF7


@pytest.mark.parametrize("number", [0, 1 << 12, 5 << 12 | 2, 1 << 12 | ACTORS, 0xFFFFFFFF])
def test_number_that_nobody_has_is_dead(control: Control, number: int) -> None:
    """Numbers come from guest RAM: another generation, an empty row, a slot beyond the table are dead."""
    if number != 1 << 12:
        control.enlist(ActorKind.VCPU, "vcpu0")

    assert control.is_dead(number) is True


def test_actors_are_called_by_their_names_in_reports(control: Control) -> None:
    """A number in a lock becomes a name; a number that cannot be anybody's says so."""
    row = control.enlist(ActorKind.WORKER, "system")

    assert control.name_of(row.number) == "system"
    assert control.name_of(0) == "nobody (0x0)"
    assert control.name_of(1 << 12 | ACTORS) == "nobody (0x10a0)"


# -- counters ------------------------------------------------------------------------------------


def test_counters_are_seen_when_flushed(control: Control) -> None:
    """An actor counts in plain integers; others see them after a flush, each under its name."""
    row = control.enlist(ActorKind.VCPU, "vcpu0")
    counters = control.counters(row.slot)
    for value, counter in enumerate(COUNTERS, 1):
        setattr(counters, counter, value)

    before = control.counter_values(row.slot)
    counters.flush()

    assert set(before.values()) == {0}
    assert control.counter_values(row.slot) == {counter: value for value, counter in enumerate(COUNTERS, 1)}


def test_totals_include_the_dead(control: Control) -> None:
    """What an actor did counts after its end, too."""
    for packets in (3, 4):
        row = control.enlist(ActorKind.VCPU, "vcpu")
        counters = control.counters(row.slot)
        counters.packets = packets
        counters.flush()
        control.set_dead(row.slot, 0)

    totals = control.counter_totals()

    assert totals["packets"] == 7
    assert totals["interrupts"] == 0


def test_totals_count_once_what_both_ends_count(control: Control) -> None:
    """The guest's thread counts its exit, and the hypervisor, that takes it: that is one exit."""
    for kind in (ActorKind.HYPERVISOR, ActorKind.VCPU, ActorKind.WORKER):
        counters = control.counters(control.enlist(kind, "one").slot)
        counters.exits, counters.doorbells, counters.blocks = 9, 4, 1
        counters.flush()

    totals = control.counter_totals()

    assert (totals["exits"], totals["doorbells"], totals["blocks"]) == (9, 4, 3)


# -- progress ------------------------------------------------------------------------------------


def test_stages_only_rise(control: Control) -> None:
    """A stage that is behind is not gone back to."""
    control.reach(Ready.OFFERS_DELIVERED)
    control.reach(Ready.HOST_RUNS)

    assert control.ready is Ready.OFFERS_DELIVERED
    assert control.booted_ns == 0


def test_time_of_the_boot_is_there_with_its_stage(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sees CHANNELS_OPEN reads when that was: the time is stored first, and once."""
    seen: list[tuple[Ready, int]] = []
    clock_now = control.clock.now

    def now() -> int:
        seen.append((control.ready, control.booted_ns))
        return clock_now()

    monkeypatch.setattr("emu.ipc.clock.MachineClock.now", lambda _clock: now())

    control.reach(Ready.CHANNELS_OPEN)
    first = control.booted_ns
    control.reach(Ready.CHANNELS_OPEN)

    assert seen == [(Ready.MADE, 0)]
    assert control.ready is Ready.CHANNELS_OPEN
    assert first == control.booted_ns > 0


def test_recording_is_asked_for_once_and_for_all(control: Control) -> None:
    """Processes that attach after the request record."""
    before = control.recording
    control.set_recording()

    assert (before, control.recording) == (False, True)


def test_shutdown_is_asked_for_and_reported(control: Control) -> None:
    """The launcher asks, the guest says that it is done and what it could not give back."""
    asked = control.shutdown_requested
    control.request_shutdown()
    done = control.shutdown_done
    control.shutdown_complete(3)

    assert (asked, control.shutdown_requested) == (False, True)
    assert (done, control.shutdown_done, control.leaked) == (False, True, 3)


# -- refusals ------------------------------------------------------------------------------------


def test_nothing_refused_reads_as_nothing(control: Control) -> None:
    """A host that refused nothing has published nothing."""
    assert control.refusals() == ({}, [])


def test_refusals_are_read_back(control: Control) -> None:
    """Counts by rule, and the newest records with what broke the rule, whatever type that had."""
    last: list[dict[str, Any]] = [
        {"rule": "gpa-outside-ram", "field": "gpa", "value": 1 << 70},
        {"value": b"\xff", "rule": "x"},
    ]

    control.store_refusals({"gpa-outside-ram": 2, "x": 1}, last)

    counts, records = control.refusals()
    assert counts == {"gpa-outside-ram": 2, "x": 1}
    assert records == [
        {"rule": "gpa-outside-ram", "field": "gpa", "value": str(1 << 70)},
        {"value": b"\xff", "rule": "x"},
    ]


def test_records_that_do_not_fit_leave_the_counts(control: Control) -> None:
    """Too much to tell: the counts are told."""
    control.store_refusals({"x": 1}, [{"value": bytes(REFUSALS_BYTES)}])

    assert control.refusals() == ({"x": 1}, [])


def test_counts_that_do_not_fit_leave_what_was_there(control: Control) -> None:
    """Nothing is written beyond its place."""
    control.store_refusals({"x": 1}, [])
    control.store_refusals({"y" * REFUSALS_BYTES: 1}, [])

    assert control.refusals() == ({"x": 1}, [])


def test_reader_gets_whole_refusals_while_the_host_writes(control: Control) -> None:
    """Each reading is one that the host published, never half of one and half of the next."""
    done = control.view.cell_u32(2048)

    def write() -> None:
        number = 0
        while not done.load():
            number += 1
            control.store_refusals({"rule": number}, [{"n": number, "pad": "x" * (number % 50)}])

    with Forked(write):
        for _ in range(2_000):
            counts, last = control.refusals()
            assert [record["n"] for record in last] == list(counts.values())
        done.store(1)


def test_reader_survives_a_host_that_died_while_it_wrote(control: Control) -> None:
    """Half-written refusals read as none, after some patience."""
    control.store_refusals({"x": 1}, [])
    at = control.mirror_channel_offset(0) + MIRROR_CHANNELS * MIRROR_CHANNEL_ROW
    control.view.fetch_add_u32(at + 4, 1)

    assert control.refusals() == ({}, [])


@pytest.mark.parametrize("count", [0, 1, 20, 5_000])
def test_newest_lines_of_the_log_are_read_back(control: Control, count: int) -> None:
    """As many as there is room for, the oldest of them first."""
    lines = [f"kworker/work: line {number} \N{MICRO SIGN}" * (1 + number % 3) for number in range(count)]
    assert control.log() == []

    control.store_log(lines)

    told = control.log()
    assert told == lines[len(lines) - len(told) :]
    assert len(told) == count or len("".join(told).encode()) > LOG_BYTES // 2


def test_of_a_very_long_line_begin_and_end_are_kept(control: Control) -> None:
    """A traceback of two functions that call each other without end is 100 KB, and what was said before stays."""
    before, widest = "vcpu0: Vmbus version:5.3", "\N{GRINNING FACE}"
    control.store_log([before, "back end echo" + widest * LOG_BYTES + "RecursionError", "behind"])

    first, long, last = control.log()
    assert (first, last) == (before, "behind")
    assert long.startswith("back end echo") and " … " in long and long.endswith("RecursionError")
