"""What a guest may do to a machine of real processes: it is answered, refused or ignored, counted, and survived.

Whatever one guest did, a correct one finds the machine as new. Where a claim needs to see the host's answers this
process is the guest; the campaigns are a program of their own (`tests.system.hostile_guest`), many by `-m soak`.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import pack

import pytest

from emu.errors import GeneralProtection
from emu.ipc.segments import object_name
from emu.ipc.semaphores import Wakeup
from emu.layout import (
    D_HOST_RUN_STATE,
    EXIT_SLOT,
    EXIT_SLOTS,
    M_MAGIC,
    MAGIC,
    PAGE_SIZE,
    VP_EXIT_SLOT,
    X_STATE,
    ExitOperation,
    ExitState,
    vp_page_offset,
)
from emu.mirror import Mirror, MirrorHead
from emu.scenario import DeviceSpec, MachineSpec, Scenario
from emu.vmexit import InvalidOpcode
from emu.wire.hypercalls import HVCALL_POST_MESSAGE, HVCALL_SIGNAL_EVENT, HvStatus
from emu.wire.messages import (
    MESSAGES,
    STATUS_UNSUCCESSFUL,
    CloseChannel,
    Direction,
    GpadlBody,
    GpadlCreated,
    GpadlHeader,
    GpadlTeardown,
    GpadlTorndown,
    Message,
    OpenChannel,
    OpenChannelResult,
    RequestOffers,
    Unload,
    UnloadResponse,
    VersionResponse,
    gpadl_messages,
    parse,
    split_gpadl,
)
from emu.wire.ring_layout import PENDING_SEND_SZ, READ_INDEX, WRITE_INDEX
from emu.wire.synic import (
    HV_X64_MSR_EOM,
    HV_X64_MSR_GUEST_OS_ID,
    HV_X64_MSR_HYPERCALL,
    HV_X64_MSR_RESET,
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SIEFP,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SINT0,
    HV_X64_MSR_TIME_REF_COUNT,
    HV_X64_MSR_VP_INDEX,
    MSR_NAMES,
    VMBUS_MESSAGE_SINT,
)
from tests.hostproc.protocol.test_host_robustness import EXAMPLES
from tests.system.commands import ROOT, assert_gone, call, environment, objects, processes, report, start, wait_for
from tests.system.python_guest import (
    FIRST_HANDLE,
    HYPERCALL_PAGE,
    INPUT_PAGE,
    SIEFP_PAGE,
    SIMP_PAGE,
    PythonGuest,
)
from tools.launch import RunningMachine, launch

RAM_BYTES = 64 << 20
RAM_PAGES = RAM_BYTES // PAGE_SIZE
FAST_SIGNAL = HVCALL_SIGNAL_EVENT | 1 << 16
FREE_PFN = 0x2000
SEEDS = range(1, 7)
SOAK_SEEDS = range(1_000, 1_200)


@contextmanager
def running(devices: int = 8, *, record: bool = False) -> Iterator[RunningMachine]:
    """A machine without a guest; in the end its host has survived, and nothing of it is left."""
    scenario = Scenario(MachineSpec(ram_bytes=RAM_BYTES), (DeviceSpec(count=devices),))
    with launch(scenario, no_guest=True, record=record) as machine:
        yield machine
        # A process that died makes this raise.
        machine.pump(0.0)
    assert machine.deaths == []
    assert objects(machine.name) == [] and processes(machine.name) == []


@pytest.fixture
def machine() -> Iterator[RunningMachine]:
    """A machine with 8 echo devices that a correct guest finds as new when the test has done with it."""
    with running() as one:
        yield one
        wait_until_clean(one)
        live_correctly(one)


@pytest.fixture
def guest(machine: RunningMachine) -> Iterator[PythonGuest]:
    """This process as the machine's guest, attached, with hypercalls and messages; not connected. It ends by DETACH."""
    with PythonGuest(machine.name) as one:
        one.bring_up()
        yield one
        one.detach()


@pytest.fixture
def connected(guest: PythonGuest) -> PythonGuest:
    """The same, connected, its offers received."""
    assert guest.contact().version_supported == 1
    assert len(guest.offers()) == 8
    return guest


@pytest.fixture(scope="session")
def c_guest(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The guest in C, where there is a compiler."""
    gcc = shutil.which("gcc")
    if gcc is None:
        return None
    program = tmp_path_factory.mktemp("c_guest") / "guest"
    sources = sorted((ROOT / "tests" / "c_guest").glob("*.c"))
    subprocess.run(
        [gcc, "-std=c11", "-O2", "-I", ROOT / "include", "-o", program, *sources, "-pthread", "-lrt"],
        check=True,
        timeout=60,
    )
    return program


def live_correctly(machine: RunningMachine, c_guest: Path | None = None) -> None:
    """Let a correct guest live its whole life on the machine: the C guest if there is one, else ours."""
    if c_guest is None:
        with PythonGuest(machine.name) as guest:
            assert guest.live() == len(machine.scenario.devices())
        return
    command = [c_guest, machine.name, "--packets", "50"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def head(machine: RunningMachine) -> MirrorHead:
    """The host in numbers."""
    return Mirror(machine.machine.control).head()


def slot_states(machine: RunningMachine) -> set[int]:
    """States of all exit slots."""
    vps = machine.machine.vps.view
    pages = [vp_page_offset(position) + VP_EXIT_SLOT for position in range(machine.machine.vp_count)]
    return {vps.load_u32(page + EXIT_SLOT.size * slot + X_STATE) for page in pages for slot in range(EXIT_SLOTS)}


def wait_until_clean(machine: RunningMachine) -> None:
    """Wait until the host has nothing of a guest any more, and its pages are fit for the next one."""

    def clean() -> bool:
        now = head(machine)
        left = now.version, now.offers, now.open, now.gpadls, now.to_slots, now.outgoing, now.incoming
        return not any(left) and slot_states(machine) == {ExitState.FREE} and page_is_right(machine)

    machine.wait_until(clean, 10.0, "the machine to be as new", step_s=0.01)


def page_is_right(machine: RunningMachine) -> bool:
    """Whether the machine page is one that a guest would attach by."""
    return machine.machine.vps.view.load_u64(M_MAGIC) == MAGIC


def refused(machine: RunningMachine, rule: str, least: int = 1) -> int:
    """How often the host counted `rule`, once that is at least so often."""
    control = machine.machine.control

    def count() -> int:
        return control.refusals()[0].get(rule, 0)

    machine.wait_until(lambda: count() >= least, 5.0, f"{least} of {rule} in {control.refusals()}", step_s=0.01)
    return count()


# -- messages ---------------------------------------------------------------------------------------------------


def test_every_message_cut_at_every_length(machine: RunningMachine, connected: PythonGuest) -> None:
    """A message that is shorter than its kind, of whatever kind, is counted and answered by nothing."""
    posts = 0
    for message in EXAMPLES:
        payload = message.pack()
        for length in range(MESSAGES[message.TYPE].least_size):
            connected.send(payload[:length])
            posts += 1

    assert refused(machine, "message-too-short", posts) == posts
    assert not connected.inbox


def test_the_hosts_own_messages_are_refused(machine: RunningMachine, connected: PythonGuest) -> None:
    """What is the host's to send is refused when it comes from a guest, each kind of it."""
    theirs = [message for message in EXAMPLES if MESSAGES[message.TYPE].direction is Direction.HOST_TO_GUEST]
    for message in theirs:
        connected.send(message)

    assert refused(machine, "wrong-direction", len(theirs)) == len(theirs) > 10


@pytest.mark.parametrize("msgtype", [0, 30, 250, 0xFFFF_FFFF])
def test_messages_that_do_not_exist(machine: RunningMachine, connected: PythonGuest, msgtype: int) -> None:
    """A message type of nobody's is counted."""
    connected.send(pack("<II", msgtype, 0) + bytes(100))

    assert refused(machine, "unknown-msgtype") == 1


def test_messages_before_any_contact(machine: RunningMachine, guest: PythonGuest) -> None:
    """Whatever needs a connection is refused without one."""
    needing = [m for m in EXAMPLES if MESSAGES[m.TYPE].direction is Direction.GUEST_TO_HOST]
    needing = [m for m in needing if not MESSAGES[m.TYPE].while_disconnected and MESSAGES[m.TYPE].type != 13]
    for message in needing:
        guest.send(message)

    assert refused(machine, "not-connected", len(needing)) == len(needing)


def test_garbage_of_any_length(machine: RunningMachine, connected: PythonGuest) -> None:
    """Random bytes are taken, and the connection stands."""
    rng = random.Random(7)
    for length in range(241):
        connected.send(rng.randbytes(length))

    assert sum(machine.machine.control.refusals()[0].values()) > 0
    assert connected.open(first_offer(connected)).echo(3)


def first_offer(guest: PythonGuest) -> OfferChannel:
    """An offer of the echo device that has relid 1, as a guest that saw it knows it."""
    return OfferChannel(if_type=ECHO_CLASS, if_instance=ECHO_CLASS, child_relid=1, connection_id=0x2001)
