"""A guest in C, written from docs/abi.md: it compiles, its ring is ours, and it lives on our machine."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL
from pathlib import Path
from typing import Any

import pytest

from emu.control import Ready
from emu.errors import RingFull
from emu.layout import EXIT_SLOT, EXIT_SLOTS, VP_EXIT_SLOT, X_STATE, ExitState, vp_page_offset
from emu.mirror import Mirror
from emu.ring import Packet, RingConsumer, RingMemory, RingProducer
from emu.scenario import DeviceSpec, MachineSpec, Scenario
from emu.wire.messages import RequestOffers
from tests.system.python_guest import PythonGuest
from tools import cli, run_machine
from tools.exit_status import ExitStatus
from tools.launch import RunningMachine, launch
from tools.run_machine import Options
from tools.run_outcome import Outcome

SOURCES = Path(__file__).resolve().parent.parent.parent
C_GUEST = SOURCES / "tests" / "c_guest"
INCLUDE = SOURCES / "include"
STRICT = ("-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror")
DEADLINE_S = 60.0

PACKETS = 1_000
KILLED = 3
MAX_PAYLOAD = 700
DATA_INBAND = 6
COMPLETION_REQUESTED = 1


@pytest.fixture(scope="session")
def guest(gcc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C guest, compiled with every warning an error."""
    program = tmp_path_factory.mktemp("c_guest") / "guest"
    sources = sorted(C_GUEST.glob("*.c"))
    subprocess.run(
        [gcc, *STRICT, "-O2", "-I", INCLUDE, "-o", program, *sources, "-pthread", "-lrt"],
        check=True,
        timeout=60,
    )
    return program


@contextmanager
def running(*command: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is gone at the end, whatever happens."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finished(process: subprocess.Popen[str]) -> str:
    """What it printed, once it has ended well."""
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err
    return out


# -- the header ---------------------------------------------------------------------------------------------


def test_header_compiles_alone_and_twice(gcc: Path, tmp_path: Path) -> None:
    """The header needs nothing before it, may be included twice, and its assertions hold for a C compiler."""
    source = tmp_path / "only.c"
    source.write_text('#include "vmbus_emu.h"\n#include "vmbus_emu.h"\n', encoding="utf-8")

    done = subprocess.run(
        [gcc, *STRICT, "-I", INCLUDE, "-c", source, "-o", tmp_path / "only.o"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(CDLL(None), "sem_clockwait"), reason="no sem_clockwait (glibc 2.30) here")
def test_blocks_end_by_a_clock_that_nobody_sets(guest: Path) -> None:
    """The wall clock may be set back by an hour: a block that only its deadline ends must not last so long."""
    imported = guest.read_bytes()

    assert b"sem_clockwait" in imported
    assert b"sem_timedwait" not in imported


# -- the ring -----------------------------------------------------------------------------------------------


def payload(trans_id: int) -> bytes:
    """What packet `trans_id` carries, in both languages."""
    return bytes((trans_id * 31 + at) & 0xFF for at in range(1 + trans_id * 37 % MAX_PAYLOAD))


@pytest.fixture
def ring_file(tmp_path: Path) -> Iterator[tuple[Path, RingMemory]]:
    """A ring of one control page and three data pages, in a file and mapped here."""
    path = tmp_path / "ring"
    path.write_bytes(bytes(4 * mmap.PAGESIZE))
    descriptor = os.open(path, os.O_RDWR)
    memory = RingMemory.map(descriptor, [(0, 4 * mmap.PAGESIZE)])
    memory.init()
    yield path, memory
    memory.close()
    os.close(descriptor)


def test_we_read_what_c_writes(guest: Path, ring_file: tuple[Path, RingMemory]) -> None:
    """Packets of all lengths that C writes, many times around a small ring, are read here in order."""
    path, memory = ring_file
    consumer = RingConsumer(memory)
    packets: list[Packet] = []
    owed = 0

    with running(guest, "--ring-write", path, str(PACKETS)) as writer:
        end = time.monotonic() + DEADLINE_S
        while len(packets) < PACKETS and writer.poll() is None or consumer.bytes_to_read:
            packets += list(consumer.drain())
            owed += consumer.take_signal()
            assert time.monotonic() < end, f"{len(packets)} packets came"
            os.sched_yield()
        signals = int(finished(writer))

    assert [packet[:3] for packet in packets] == [
        (DATA_INBAND, COMPLETION_REQUESTED, trans_id) for trans_id in range(1, PACKETS + 1)
    ]
    for _type, _flags, trans_id, data in packets:
        expected = payload(trans_id)
        assert data == expected + bytes(-len(expected) % 8)
    assert 1 <= signals <= PACKETS
    assert owed > 0, "the ring is small and the writer faster, so it must have waited for room"


def test_c_reads_what_we_write(guest: Path, ring_file: tuple[Path, RingMemory]) -> None:
    """Packets written here are read by C, which checks every byte, and tells us when it made room."""
    path, memory = ring_file
    producer = RingProducer(memory)
    waits = 0

    with running(guest, "--ring-read", path, str(PACKETS)) as reader:
        end = time.monotonic() + DEADLINE_S
        for trans_id in range(1, PACKETS + 1):
            while True:
                try:
                    producer.write(payload(trans_id), trans_id, COMPLETION_REQUESTED)
                    break
                except RingFull as full:
                    waits += not producer.want_room(full.needed)
                    assert time.monotonic() < end and reader.poll() is None, f"stuck at {trans_id}"
                    os.sched_yield()
            producer.cancel_room()
        signals = int(finished(reader))

    assert 0 <= signals <= waits


# -- the machine --------------------------------------------------------------------------------------------


def run_guest(guest: Path, machine: str, *options: str) -> dict[str, Any]:
    """Run the C guest on a machine and return what it reports."""
    done = subprocess.run([guest, machine, *options], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def scenario(vp_order: str = "identity", devices: int = 8) -> Scenario:
    """Two processors and a few echo devices, with little RAM."""
    return Scenario(MachineSpec(ram_bytes=64 << 20, vp_order=vp_order), (DeviceSpec(count=devices),))


@pytest.mark.parametrize(
    ("vp_order", "options"),
    [
        ("identity", ()),
        ("reverse", ("--auto-eoi", "1")),
        # Blocks at once, in every exit and every halt: the sleeping half of both protocols.
        ("reverse", ("--poll-us", "0", "--storm-threads", "6")),
    ],
)
def test_foreign_guest_lives_its_whole_life(guest: Path, vp_order: str, options: tuple[str, ...]) -> None:
    """A guest that knows docs/abi.md alone boots, gets its packets back, and leaves nothing behind."""
    with launch(scenario(vp_order), no_guest=True) as machine:
        mirror = Mirror(machine.machine.control)
        report = run_guest(guest, machine.name, *options)
        machine.wait_until(lambda: mirror.head().attached_pid == 0, DEADLINE_S, "the host to say so")
        head = mirror.head()

    assert report["version"] == "5.3"
    assert report["offers"] == 8
    assert report["packets"] == report["completions"] == PACKETS
    assert report["target_vp"] == (1 if vp_order == "identity" else 0)
    assert report["storm_exits"] >= 12, "the storm asked nothing"
    assert report["hypercall_signals"] >= 1
    assert report["doorbells"] >= 1
    assert report["auto_eoi"] is ("--auto-eoi" in options)
    if "--poll-us" in options:
        assert report["sleeping_exits"] > report["exits"] // 2
    assert (head.version, head.open, head.gpadls) == (0, 0, 0)


@pytest.mark.parametrize("as_json", [True, False])
def test_run_tells_of_a_guest_that_came_and_went_between_two_looks(
    guest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    """Its version, offers and channels are the host's to remember: it lives for less than `run` takes to look again."""
    waits = run_machine.wait_for_foreign_guest

    def looks_late(running: RunningMachine, options: Options, outcome: Outcome) -> None:
        running.wait_until(lambda: running.machine.control.ready >= Ready.HOST_RUNS, DEADLINE_S, "the host")
        run_guest(guest, running.name, "--packets", "10")
        waits(running, options, outcome)

    monkeypatch.setattr(run_machine, "wait_for_foreign_guest", looks_late)

    assert cli.main(["run", "--no-guest", *(["--json"] if as_json else [])]) == 0

    shown = capsys.readouterr().out
    if not as_json:
        assert "VMBus 5.3, 1 of 8 channels open at a time\nthe guest unloaded\n" in shown
        return
    told = json.loads(shown)
    assert (told["version"], told["offers"], told["channels_open"], told["leaked"]) == ("5.3", 8, 1, 0)
    assert told["guest_left"] == "unloaded"


@pytest.mark.parametrize("as_json", [True, False])
def test_run_tells_of_a_guest_that_died(
    guest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    """It ends the run as an unload does, but as a finding."""
    waits = run_machine.wait_for_foreign_guest

    def looks_late(machine: RunningMachine, options: Options, outcome: Outcome) -> None:
        mirror = Mirror(machine.machine.control)
        machine.wait_until(lambda: machine.machine.control.ready >= Ready.HOST_RUNS, DEADLINE_S, "the host")
        with running(guest, machine.name, "--packets", "10000000") as doomed:
            machine.wait_until(lambda: mirror.head().open == 1, DEADLINE_S, "it to open a channel")
            doomed.kill()
        waits(machine, options, outcome)

    monkeypatch.setattr(run_machine, "wait_for_foreign_guest", looks_late)

    assert cli.main(["run", "--no-guest", *(["--json"] if as_json else [])]) == ExitStatus.FINDING

    shown = capsys.readouterr()
    if not as_json:
        assert "the guest died without UNLOAD\n" in shown.out and "finding kept in" in shown.err
        return
    told = json.loads(shown.out)
    assert (told["guest_left"], told["channels_open"], told["leaked"]) == ("died", 1, 0)


@pytest.mark.parametrize("as_json", [True, False])
def test_run_tells_why_no_guest_connected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    """A guest that leaves because its contact was refused is waited for in vain: what was refused is told."""
    waits = run_machine.wait_for_foreign_guest

    def looks_late(machine: RunningMachine, options: Options, outcome: Outcome) -> None:
        machine.wait_until(lambda: machine.machine.control.ready >= Ready.HOST_RUNS, DEADLINE_S, "the host")
        with PythonGuest(machine.name) as guest:
            guest.bring_up()
            guest.send(RequestOffers())
            machine.wait_until(lambda: bool(machine.machine.control.refusals()[0]), DEADLINE_S, "the refusal")
            guest.detach()
        waits(machine, options, outcome)

    monkeypatch.setattr(run_machine, "wait_for_foreign_guest", looks_late)
    command = ["run", "--no-guest", "--guest-timeout", "0.1", *(["--json"] if as_json else [])]

    assert cli.main(command) == ExitStatus.TIME_LIMIT

    shown = capsys.readouterr()
    assert "a guest to connect (one attached, and left before it did): no answer within 0.1 s" in shown.err
    if as_json:
        assert json.loads(shown.out)["refused"] == {"not-connected": 1}
    else:
        assert "refused: not-connected 1\n" in shown.out


def test_many_offers_reach_a_foreign_guest(guest: Path) -> None:
    """Offers that outnumber the port's buffers wait for the guest's slot, and none is lost."""
    with launch(scenario(devices=100), no_guest=True) as machine:
        report = run_guest(guest, machine.name, "--packets", "10")

    assert report["offers"] == 100


def test_machine_survives_a_guest_that_is_killed(guest: Path) -> None:
    """Killed amid packets and exits, guest after guest, each is disconnected and leaves no slot taken."""
    with launch(scenario(), no_guest=True) as machine:
        mirror = Mirror(machine.machine.control)
        for _ in range(KILLED):
            with running(guest, machine.name, "--packets", "10000000", "--storm-threads", "6") as doomed:
                machine.wait_until(lambda: mirror.head().open == 1, DEADLINE_S, "it to open a channel")
                doomed.kill()
                doomed.wait()
            machine.wait_until(lambda: mirror.head().attached_pid == 0, DEADLINE_S, "the host to see its end")
        head = mirror.head()
        free = [machine.machine.vps.view.load_u32(at) for at in exit_states(machine.machine.vp_count)]
        report = run_guest(guest, machine.name)

    assert (head.version, head.open, head.gpadls) == (0, 0, 0)
    assert set(free) == {ExitState.FREE}
    assert report["generation"] == KILLED + 1
    assert report["completions"] == PACKETS


def exit_states(vp_count: int) -> list[int]:
    """Where the state words of all exit slots lie in `vps`."""
    first = [vp_page_offset(position) + VP_EXIT_SLOT + X_STATE for position in range(vp_count)]
    return [page + EXIT_SLOT.size * slot for page in first for slot in range(EXIT_SLOTS)]


def test_successor_need_not_wait_for_a_dead_guest(guest: Path) -> None:
    """A guest may attach before the host has noticed that the one before it is dead."""
    with launch(scenario(), no_guest=True) as machine:
        mirror = Mirror(machine.machine.control)
        with running(guest, machine.name, "--packets", "10000000", "--storm-threads", "6") as doomed:
            machine.wait_until(lambda: mirror.head().open == 1, DEADLINE_S, "it to open a channel")
            doomed.kill()
            report = run_guest(guest, machine.name)

    assert report["generation"] == 2
    assert report["completions"] == PACKETS


def test_two_guests_after_each_other(guest: Path) -> None:
    """After DETACH the machine is as new for the next guest."""
    with launch(scenario(), no_guest=True) as machine:
        reports = [run_guest(guest, machine.name) for _ in range(2)]

    assert [report["generation"] for report in reports] == [1, 2]
