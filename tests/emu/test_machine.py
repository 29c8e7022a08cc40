"""A machine's objects: made whole or not at all, attached by name, and safe from what a guest scribbles."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from emu.control import ActorKind, Control
from emu.errors import MissingPrerequisite, UserError
from emu.ipc.segments import Segment, is_held, object_name, objects_of, unlink_objects, unlink_semaphore
from emu.ipc.semaphores import Wakeup
from emu.layout import (
    ABI_MAJOR,
    M_ABI_MAJOR,
    M_CPUID,
    M_CPUID_COUNT,
    M_MAGIC,
    M_RAM_BYTES,
    M_STATE,
    M_VP_COUNT,
    MAGIC,
    RAM_HEAD_BYTES,
    VP_POSITION,
    MachineState,
    vp_page_offset,
)
from emu.machine import KICK_SIGNAL, Machine, VpKick, wakeup_names
from emu.tracing import Context
from tests.emu.conftest import MakeMachine

SOURCES = Path(__file__).resolve().parents[2]


def test_machine_page_describes_the_machine(machine_name: str) -> None:
    """A guest finds sizes, counts, CPUID leaves and each page's VP index where the ABI puts them."""
    machine = Machine.create(
        machine_name, {}, ram_bytes=1 << 20, vp_indices=[2, 1, 0], cpuid=[(0x40000000, 1, 2, 3, 4)]
    )
    view = machine.vps.view

    assert view.load_u64(M_MAGIC) == MAGIC
    assert view.load_u16(M_ABI_MAJOR) == ABI_MAJOR
    assert (view.load_u64(M_RAM_BYTES), view.load_u32(M_VP_COUNT), machine.vp_count) == (1 << 20, 3, 3)
    assert view.load_u32(M_CPUID_COUNT) == 1
    assert [view.load_u32(M_CPUID + 4 * word) for word in range(5)] == [0x40000000, 1, 2, 3, 4]
    assert [view.load_u32(vp_page_offset(position) + VP_POSITION) for position in range(3)] == [0, 1, 2]
    machine.close()


def test_position_and_vp_index_are_two_things(make_machine: MakeMachine) -> None:
    """Pages may be numbered in reverse; a VP index that no page has has no position."""
    machine = make_machine(vp_indices=[2, 1, 0])

    assert [machine.vp_index(position) for position in range(3)] == [2, 1, 0]
    assert [machine.position_of_vp(index) for index in range(4)] == [2, 1, 0, -1]


def test_every_name_exists_once(machine_name: str, make_machine: MakeMachine) -> None:
    """Five segments, and a semaphore for the host, each VP, each exit slot and each waiting thread."""
    make_machine()

    expected = {f"vmbus-emu.{machine_name}.{p}" for p in ("ram", "vps", "doorbells", "control", "trace")}
    expected |= {f"sem.vmbus-emu.{machine_name}.{part}" for part in wakeup_names(2)}
    assert set(objects_of(machine_name)) == expected


def test_attached_machine_is_the_same(machine_name: str, make_machine: MakeMachine) -> None:
    """Another process sees configuration, RAM and time of the machine that it names."""
    made = make_machine(config={"seed": 7})
    made.ram.memory[4096:4100] = b"echo"
    attached = Machine.attach(machine_name)

    assert attached.config == {"seed": 7}
    assert attached.ram.memory[4096:4100] == b"echo"
    assert 0 <= made.clock.now() <= attached.clock.now()
    attached.close()


def test_nobody_attaches_to_nothing(machine_name: str) -> None:
    """There is no machine of that name: one line."""
    with pytest.raises(UserError, match="no such machine is running"):
        Machine.attach(machine_name)


def test_name_in_use_is_refused(machine_name: str, make_machine: MakeMachine) -> None:
    """A second machine of a name is refused and takes nothing from the first."""
    make_machine()
    before = objects_of(machine_name)

    with pytest.raises(UserError, match="exists already"):
        make_machine()

    assert objects_of(machine_name) == before


def open_files() -> set[str]:
    """What this process has open or mapped of any machine."""
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return {link for link in links if "vmbus-emu" in link}


@pytest.mark.parametrize("missing", ["ram", "vps", "doorbells", "trace"])
def test_half_made_machine_is_not_attached(machine_name: str, make_machine: MakeMachine, missing: str) -> None:
    """While an object is missing nobody attaches, and the attempt keeps nothing open."""
    make_machine()
    before = open_files()
    Path(f"/dev/shm/vmbus-emu.{machine_name}.{missing}").unlink()

    with pytest.raises(UserError):
        Machine.attach(machine_name)

    assert {link for link in open_files() if "(deleted)" not in link} <= before


def test_machine_without_its_magic_is_still_being_made(machine_name: str, make_machine: MakeMachine) -> None:
    """The magic is written last: without it the rest of the page means nothing yet."""
    make_machine().vps.view.store_u64(M_MAGIC, 0)

    with pytest.raises(UserError, match="still being made"):
        Machine.attach(machine_name)


def test_machine_whose_control_is_half_made_is_not_attached(machine_name: str) -> None:
    """Neither does a control segment without its magic mean anything."""
    segment = Segment.create(object_name(machine_name, "control"), 1 << 20)

    with pytest.raises(UserError, match="still being made"):
        Machine.attach(machine_name)

    segment.close()


def test_another_abi_is_not_attached(machine_name: str, make_machine: MakeMachine) -> None:
    """A machine of another major version is another ABI."""
    make_machine().vps.view.store_u16(M_ABI_MAJOR, ABI_MAJOR + 1)

    with pytest.raises(UserError, match=f"has ABI {ABI_MAJOR + 1}"):
        Machine.attach(machine_name)


# -- a making that fails --------------------------------------------------------------------------

STEPS = 4 + len(wakeup_names(2))


@pytest.mark.parametrize("good_steps", [*range(5), 6, 12, STEPS - 1])
@pytest.mark.parametrize("error", [MissingPrerequisite("full"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_failed_making_leaves_nothing(
    machine_name: str, good_steps: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever object cannot be made, those before it are gone again, and nothing is kept open."""
    left = [good_steps]
    before = open_files()

    def failing(make: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **keywords: Any) -> Any:
            if left[0] == 0:
                raise error
            left[0] -= 1
            return make(*arguments, **keywords)

        return step

    monkeypatch.setattr(Segment, "create", failing(Segment.create))
    monkeypatch.setattr(Wakeup, "create", failing(Wakeup.create))

    with pytest.raises(type(error)):
        Machine.create(machine_name, {}, ram_bytes=1 << 20, vp_indices=[0, 1], cpuid=[])

    assert objects_of(machine_name) == []
    # What an earlier test left to the collector may go meanwhile.
    assert open_files() <= before


def test_machine_is_held_from_its_first_object_on(machine_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sweeps behind a dead one of that name leaves it alone also while it is made."""
    make, held = Segment.create, []

    def create(name: str, *sizes: int, **options: int) -> Segment:
        held.append(is_held(object_name(machine_name, "control")))
        return make(name, *sizes, **options)

    monkeypatch.setattr(Segment, "create", create)
    machine = Machine.create(machine_name, {}, ram_bytes=1 << 20, vp_indices=[0], cpuid=[])
    machine.close()

    assert held == [False, True, True, True, True]
    assert not is_held(object_name(machine_name, "control"))


CREATE = """
import os, sys
from emu.errors import MissingPrerequisite
from emu.machine import Machine
try:
    Machine.create("tiny", {}, ram_bytes=1 << 30, vp_indices=[0, 1, 2, 3], cpuid=[])
except MissingPrerequisite as error:
    print(error)
else:
    print("made")
if os.path.isdir("/dev/shm"):
    print(os.listdir("/dev/shm"))
"""


def create_with(prepare: str, program: str = CREATE) -> list[str]:
    """Make a machine in a mount namespace prepared by a shell command; what it printed."""
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", f'{prepare} && exec "$0" -c "$1"', sys.executable, program],
        cwd=SOURCES,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("room", ["8k", "64k", "600k", "640k", "720k"])
def test_full_shared_memory_is_one_line_and_leaves_nothing(room: str) -> None:
    """Where /dev/shm fills up in the middle of the making, no SIGBUS: a line, and nothing left in it."""
    said = create_with(f"mount -t tmpfs -o size={room} tiny /dev/shm")

    assert len(said) == 2
    assert "full" in said[0]
    assert said[1] == "[]"


def test_small_shared_memory_holds_a_sparse_machine() -> None:
    """RAM takes memory only where it is touched: 1 GiB of it goes into 8 MiB of shared memory."""
    said = create_with("mount -t tmpfs -o size=8m small /dev/shm")

    assert said[0] == "made"


def test_missing_shared_memory_is_one_line() -> None:
    """Without /dev/shm the line says so (and does not claim that the name exists)."""
    said = create_with("mount -t tmpfs none /dev && mknod /dev/null c 1 3 2>/dev/null; true")

    assert said == ["no /dev/shm for shared memory /vmbus-emu.tiny.control; mount a tmpfs there"]


def test_read_only_shared_memory_is_one_line() -> None:
    """A /dev/shm that cannot be written is named as such."""
    said = create_with("mount -t tmpfs -o ro closed /dev/shm")

    assert len(said) == 2
    assert said[0].startswith("cannot create shared memory /vmbus-emu.tiny.control:")


# -- state and waking -----------------------------------------------------------------------------


def test_state_is_seen_by_all_and_copied_for_guests(machine_name: str, make_machine: MakeMachine) -> None:
    """The launcher's word reaches every process, and the machine page that guests read."""
    machine = make_machine()
    attached = Machine.attach(machine_name)
    states = [attached.state]
    for state in (MachineState.RUNNING, MachineState.STOPPING):
        machine.set_state(state)
        states.append(attached.state)

    assert states == list(MachineState)
    assert attached.stopping is True
    assert attached.vps.view.load_u32(M_STATE) == MachineState.STOPPING
    attached.close()


@pytest.mark.parametrize("scribble", [MachineState.STOPPING, 77])
def test_guest_that_scribbles_on_the_machine_page_stops_nobody(
    machine_name: str, make_machine: MakeMachine, scribble: int
) -> None:
    """State and VP count are not believed from memory that a guest can write."""
    machine = make_machine()
    machine.set_state(MachineState.RUNNING)
    machine.vps.view.store_u32(M_STATE, scribble)
    machine.vps.view.store_u32(M_VP_COUNT, 0xFFFFFFFF)
    attached = Machine.attach(machine_name)

    assert (machine.state, machine.stopping) == (MachineState.RUNNING, False)
    assert attached.vp_count == 2
    attached.close()


def test_waking_everybody_posts_one_token_each(machine_name: str, make_machine: MakeMachine) -> None:
    """After STOPPING every sleeper gets one token, whichever semaphore it sleeps on."""
    machine = make_machine()
    machine.wake_everybody()

    for part in wakeup_names(2):
        assert machine.wakeup(part).try_take() is True, part
        assert machine.wakeup(part).try_take() is False, part


def test_waking_goes_on_where_a_name_is_gone(machine_name: str, make_machine: MakeMachine) -> None:
    """A semaphore that somebody removed does not keep the others asleep."""
    machine = make_machine()
    unlink_semaphore(object_name(machine_name, "host"))

    machine.wake_everybody()

    assert machine.wakeup("actor.0").try_take() is True


# -- actors and kicks -----------------------------------------------------------------------------


def test_actor_is_found_by_kind_and_cpu(make_machine: MakeMachine) -> None:
    """The living vCPU of a CPU number; the dead are not found."""
    machine = make_machine()
    machine.enlist(ActorKind.HYPERVISOR, "hypervisor")
    dead, _counters = machine.enlist(ActorKind.VCPU, "vcpu1", cpu=1)
    machine.control.set_dead(dead.slot, 9)
    row, _counters = machine.enlist(ActorKind.VCPU, "vcpu1", cpu=1)

    assert machine.find_actor(ActorKind.VCPU, 1) == row
    assert machine.find_actor(ActorKind.VCPU, 0) is None
    found = machine.find_actor(ActorKind.HYPERVISOR)
    assert found is not None
    assert found.name == "hypervisor"


def test_recorder_is_made_where_the_machine_records(make_machine: MakeMachine) -> None:
    """A machine that does not record costs its actors nothing."""
    machine = make_machine()
    row, _counters = machine.enlist(ActorKind.VCPU, "vcpu0")
    without = machine.recorder(row)
    machine.control.set_recording()
    recorder = machine.recorder(row, vp=3, context=Context.TASK)

    assert without is None
    assert recorder is not None
    assert (recorder.vp, recorder.context, recorder.keeps_bytes) == (3, Context.TASK, False)


def test_bytes_are_kept_where_that_was_asked_for_too(make_machine: MakeMachine) -> None:
    """They cost several records a message, so a recording alone does not bring them."""
    machine = make_machine()
    row, _counters = machine.enlist(ActorKind.VCPU, "vcpu0")
    machine.control.set_recording(with_bytes=True)
    recorder = machine.recorder(row)

    assert recorder is not None and recorder.keeps_bytes
    assert machine.control.recording


def test_kick_posts_to_the_semaphore_of_the_page(make_machine: MakeMachine) -> None:
    """A halted VP is woken by its position's semaphore, whatever its CPU number."""
    machine = make_machine()
    VpKick(machine, 1, cpu=0).post()

    assert machine.wakeup("vp.1").try_take() is True
    assert machine.wakeup("vp.0").try_take() is False


def test_kick_signal_reaches_the_processor(make_machine: MakeMachine) -> None:
    """A computing vCPU is interrupted by the real-time signal, time and again."""
    machine = make_machine()
    machine.enlist(ActorKind.VCPU, "vcpu0", cpu=0)
    kicks: list[int] = []

    def on_kick(number: int, _frame: FrameType | None) -> None:
        kicks.append(number)

    before = signal.signal(KICK_SIGNAL, on_kick)
    try:
        kick = VpKick(machine, 0, cpu=0)
        sent = [kick.interrupt(), kick.interrupt()]
    finally:
        signal.signal(KICK_SIGNAL, before)

    assert sent == [True, True]
    assert kicks == [KICK_SIGNAL, KICK_SIGNAL]


def test_foreign_vp_gets_no_signal(make_machine: MakeMachine) -> None:
    """A VP without a process of ours cannot be signalled, and the caller is told."""
    assert VpKick(make_machine(), 0, cpu=0).interrupt() is False


def test_kick_signal_never_goes_to_who_inherited_a_pid(
    make_machine: MakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row whose start time is not the process's own is that of somebody long gone."""
    machine = make_machine()
    monkeypatch.setattr("emu.control.start_time_of", lambda _pid: 12345)
    machine.enlist(ActorKind.VCPU, "vcpu0", cpu=0)
    monkeypatch.undo()
    sent: list[int] = []
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_arguments: sent.append(1))

    assert VpKick(machine, 0, cpu=0).interrupt() is False
    assert sent == []


def test_vcpu_that_died_gets_no_signal(make_machine: MakeMachine) -> None:
    """A processor that ended after its last kick is no error for whoever requests an interrupt."""
    machine = make_machine()
    child = os.fork()
    if child == 0:
        signal.pause()
    machine.control.enlist(ActorKind.VCPU, "vcpu0", cpu=0, pid=child)
    kick = VpKick(machine, 0, cpu=0)
    while_alive = kick.interrupt()
    os.waitpid(child, 0)

    assert (while_alive, kick.interrupt(), VpKick(machine, 0, cpu=0).interrupt()) == (True, False, False)


def test_control_names_the_machine_as_taken(machine_name: str) -> None:
    """Two launchers of one name meet at the first object: the second gets nothing made."""
    control = Control.create(object_name(machine_name, "control"), {})

    with pytest.raises(UserError, match="exists already"):
        Machine.create(machine_name, {}, ram_bytes=1 << 20, vp_indices=[0], cpuid=[])

    assert objects_of(machine_name) == [f"vmbus-emu.{machine_name}.control"]
    control.close()


def test_ram_that_is_reserved_has_memory_or_the_machine_is_not_made() -> None:
    """What the configuration reserves is asked for at once: where it does not fit, a line says how much."""
    wanted = CREATE.replace("{}", '{"ram_reserved": (1 << 20, 4 << 20)}')

    assert create_with("mount -t tmpfs -o size=8m small /dev/shm", wanted)[0] == "made"
    line, left = create_with("mount -t tmpfs -o size=4m small /dev/shm", wanted)

    assert line == (
        "/dev/shm is full, it has no room for 4 MiB (/vmbus-emu.tiny.ram); free some of it, or ask for fewer or smaller"
        " rings"
    )
    assert left == "[]"


def test_a_look_at_the_head_of_ram_needs_no_memory(machine_name: str) -> None:
    """Whether RAM is laid out is asked on a full /dev/shm, too: before anybody has laid it out, and after a wipe."""
    machine = Machine.create(machine_name, {}, ram_bytes=1 << 20, vp_indices=[0], cpuid=[])
    try:
        for _ in range(2):
            before = os.fstat(machine.ram.fd).st_blocks
            assert not any(machine.ram.memory[:RAM_HEAD_BYTES])

            assert os.fstat(machine.ram.fd).st_blocks == before == RAM_HEAD_BYTES // 512
            machine.wipe()
    finally:
        machine.close()
        unlink_objects(machine_name)


def test_ram_that_is_reserved_has_memory_again_after_a_wipe(machine_name: str) -> None:
    """Power off gives all of RAM back, then the reserved part is made anew."""
    config = {"ram_reserved": (1 << 20, 4 << 20)}
    machine = Machine.create(machine_name, config, ram_bytes=1 << 25, vp_indices=[0], cpuid=[])
    try:
        taken = os.fstat(machine.ram.fd).st_blocks
        machine.ram.memory[1 << 24] = 1
        machine.wipe()

        assert machine.ram_reserved == (1 << 20, 4 << 20)
        assert taken * 512 == os.fstat(machine.ram.fd).st_blocks * 512 == (4 << 20) + RAM_HEAD_BYTES
    finally:
        machine.close()
        unlink_objects(machine_name)
