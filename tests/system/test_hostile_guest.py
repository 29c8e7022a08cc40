"""What a guest may do to a machine of real processes: it is answered, refused or ignored, counted, and survived.

Whatever one guest did, a correct one finds the machine as new. Where a claim needs to see the host's answers this
process is the guest; the campaigns are a program of their own (`tests.system.hostile_guest`), many by `-m soak`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import pack

import pytest

from emu import cpuid
from emu.errors import GeneralProtection
from emu.ipc.atomics import AtomicView
from emu.ipc.segments import object_name
from emu.ipc.semaphores import Wakeup
from emu.layout import (
    D_HOST_RUN_STATE,
    EXIT_SLOT,
    EXIT_SLOTS,
    M_ATTACH_GENERATION,
    M_STATE,
    PAGE_SIZE,
    VECTOR_WORDS,
    VP_AUTO_EOI,
    VP_EXIT_SLOT,
    VP_IN_SERVICE,
    VP_INDEX,
    VP_REQUEST,
    X_STATE,
    ExitState,
    vp_page_offset,
)
from emu.machine import write_machine_page
from emu.mirror import Left, Mirror, MirrorHead
from emu.recording import Recording
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
    OfferChannel,
    OpenChannel,
    OpenChannelResult,
    RelidReleased,
    RequestOffers,
    Unload,
    UnloadResponse,
    gpadl_messages,
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
)
from tests.hostproc.protocol.test_host_robustness import EXAMPLES
from tests.processes import Forked
from tests.system.commands import ROOT, objects, processes
from tests.system.python_guest import (
    FIRST_HANDLE,
    INPUT_PAGE,
    EchoChannel,
    PythonGuest,
)
from tools.debts import debts_of
from tools.draining import recording
from tools.flows import flows_of
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


@pytest.fixture(scope="module")
def launched() -> Iterator[RunningMachine]:
    """A machine with 8 echo devices, for one test after the other."""
    with running() as one:
        yield one


@pytest.fixture
def machine(launched: RunningMachine) -> Iterator[RunningMachine]:
    """That machine, switched off and on; a correct guest finds it as new when the test has done with it."""
    launched.power_cycle()
    yield launched
    wait_until_clean(launched, os.getpid())
    live_correctly(launched)
    launched.pump(0.0)


@pytest.fixture
def guest(machine: RunningMachine) -> Iterator[PythonGuest]:
    """This process as the machine's guest, attached, with hypercalls and messages; not connected. It ends by DETACH."""
    with PythonGuest(machine.name) as one:
        one.bring_up()
        yield one
        one.detach()


@pytest.fixture
def offered(guest: PythonGuest) -> list[OfferChannel]:
    """What that guest is offered once it has connected."""
    assert guest.contact().version_supported == 1
    offers = guest.offers()
    assert len(offers) == 8
    return offers


@pytest.fixture
def connected(guest: PythonGuest, offered: list[OfferChannel]) -> PythonGuest:
    """The same guest, connected, its offers received."""
    assert offered
    return guest


@pytest.fixture
def channel(connected: PythonGuest, offered: list[OfferChannel]) -> EchoChannel:
    """The first of its channels, open."""
    return connected.open(offered[0])


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
    command: list[str | Path] = [c_guest, machine.name, "--packets", "50"]
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


def wait_until_clean(machine: RunningMachine, pid: int) -> None:
    """Wait until the host has nothing of the guest `pid` any more, and its pages are fit for the next one.

    The end of a guest that attached in the name of a pid which the host cannot see is seen by nobody: what it had is
    given up when the next one contacts the host.
    """

    def clean() -> bool:
        now = head(machine)
        left = now.version, now.offers, now.open, now.gpadls, now.to_slots, now.outgoing, now.incoming
        unseen = now.attached_pid not in (0, pid)
        return (not any(left) or unseen) and slot_states(machine) == {ExitState.FREE} and page_is_right(machine)

    machine.wait_until(clean, 10.0, "the machine to be as new", step_s=0.01)


def page_is_right(machine: RunningMachine) -> bool:
    """Whether the machine page is one that a guest would attach by: as it was made, but for what changes in it."""
    made = bytearray(machine.machine.vps.size)
    with AtomicView(made) as view:
        write_machine_page(view, RAM_BYTES, machine.machine.config["vp_indices"], cpuid.leaves())
        view.store_u32(M_ATTACH_GENERATION, machine.machine.vps.view.load_u32(M_ATTACH_GENERATION))
        view.store_u32(M_STATE, machine.machine.control.state_word.load())
    return bytes(machine.machine.vps.memory[:PAGE_SIZE]) == made[:PAGE_SIZE]


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


def test_garbage_of_any_length(machine: RunningMachine, connected: PythonGuest, offered: list[OfferChannel]) -> None:
    """Random bytes are taken, and the connection stands."""
    rng = random.Random(7)
    for length in range(241):
        # A msgtype of nobody's: what UNLOAD and its like would do is asked elsewhere.
        connected.send(rng.randbytes(length)[:4].ljust(min(length, 4), b"\xff") + rng.randbytes(max(0, length - 4)))

    def counted() -> bool:
        return sum(machine.machine.control.refusals()[0].values()) >= 241

    machine.wait_until(counted, 5.0, "all to be counted", step_s=0.01)
    assert len(connected.open(offered[0]).echo(3)) == 3


def test_second_request_for_offers_is_refused(machine: RunningMachine, connected: PythonGuest) -> None:
    """A guest has its offers once a connection."""
    connected.send(RequestOffers())

    assert refused(machine, "offers-requested-twice") == 1


# -- page lists and channels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pfn", [RAM_PAGES, RAM_PAGES + 1, 1 << 40, (1 << 52) - 1, (1 << 64) - 1])
def test_page_outside_ram_is_answered_with_failure(
    machine: RunningMachine, connected: PythonGuest, offered: list[OfferChannel], pfn: int
) -> None:
    """CREATED tells that the pages were not mapped, and the handle may be used for pages that exist."""
    relid = offered[0].child_relid

    assert connected.lend(relid, FIRST_HANDLE + relid, [FREE_PFN, pfn, FREE_PFN + 1, FREE_PFN + 2]) != 0

    assert refused(machine, "gpadl-page-outside-ram") == 1
    assert len(connected.open(offered[0]).echo(3)) == 3


def test_page_list_on_a_channel_that_is_nobodys(machine: RunningMachine, connected: PythonGuest) -> None:
    """Answered with failure, and forgotten."""
    assert connected.lend(77, FIRST_HANDLE, [FREE_PFN, FREE_PFN + 1]) == STATUS_UNSUCCESSFUL

    assert refused(machine, "gpadl-unknown-relid") == 1


def test_body_without_a_header_is_refused(machine: RunningMachine, connected: PythonGuest) -> None:
    """Nobody waits for its pages, so nobody is answered."""
    connected.send(GpadlBody(1, FIRST_HANDLE, bytes(224)))

    assert refused(machine, "gpadl-body-without-header") == 1
    assert not connected.inbox


def test_unfinished_page_lists_go_with_their_guest(machine: RunningMachine, connected: PythonGuest) -> None:
    """Headers whose bodies never come are held up to a bound; UNLOAD forgets them."""
    header, *_bodies = gpadl_messages(1, FIRST_HANDLE, range(FREE_PFN, FREE_PFN + 100))
    assert isinstance(header, GpadlHeader)
    for number in range(200):
        connected.send(GpadlHeader(1, FIRST_HANDLE + number, header.range_buflen, 1, header.ranges))

    assert refused(machine, "gpadl-too-many-on-channel") > 0
    connected.inbox.clear()
    connected.send(Unload())
    while not isinstance(connected.message(), UnloadResponse):
        pass
    machine.wait_until(lambda: head(machine).gpadls == 0, 5.0, "the host to say so", step_s=0.01)


def test_open_that_names_no_page_list_is_refused(
    machine: RunningMachine, connected: PythonGuest, offered: list[OfferChannel]
) -> None:
    """OPENCHANNEL_RESULT tells the failure, and the channel can be opened afterwards."""
    relid = offered[0].child_relid
    result = connected.answered(OpenChannel(relid, 1, 0xBAD, connected.vp_index(), 4), OpenChannelResult)

    assert result.status != 0
    assert refused(machine, "open-unknown-gpadl") == 1
    assert len(connected.open(offered[0]).echo(3)) == 3


def test_teardown_under_an_open_ring_is_refused(
    machine: RunningMachine, connected: PythonGuest, channel: EchoChannel
) -> None:
    """The host keeps the pages that it reads and writes, and the packets go on."""
    connected.send(GpadlTeardown(channel.relid, channel.handle))

    assert refused(machine, "gpadl-teardown-of-open-ring") == 1
    assert len(channel.echo(3)) == 3


def test_close_twice_and_close_of_nothing(
    machine: RunningMachine, connected: PythonGuest, channel: EchoChannel
) -> None:
    """CLOSECHANNEL has no answer; what it names must be there all the same."""
    connected.send(CloseChannel(99))

    assert refused(machine, "close-unknown-relid") == 1
    connected.close_channel(channel)
    connected.send(CloseChannel(channel.relid))
    connected.send(GpadlTeardown(channel.relid, channel.handle))
    assert refused(machine, "gpadl-teardown-unknown") == 1
    assert not connected.inbox


def test_rings_on_one_page_many_times(
    machine: RunningMachine, connected: PythonGuest, offered: list[OfferChannel]
) -> None:
    """Both rings, indices and data, on the same page: whatever comes of it, the host goes on."""
    channel = connected.open(offered[0], pfns=[FREE_PFN] * 8)
    for number in range(50):
        connected.memory.write(FREE_PFN * PAGE_SIZE, pack("<IIII", 8 * number, 0, 0, 8) * 4)
        channel.ring_bell()

    assert len(connected.open(offered[1]).echo(3)) == 3


# -- rings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 7, 3 * PAGE_SIZE, 3 * PAGE_SIZE + 8, 0x7FFF_FFF8, 0xFFFF_FFFF])
@pytest.mark.parametrize("side", ["to_host", "to_guest"])
@pytest.mark.parametrize("word", [WRITE_INDEX, READ_INDEX], ids=["write_index", "read_index"])
def test_index_that_cannot_be(
    machine: RunningMachine,
    connected: PythonGuest,
    offered: list[OfferChannel],
    channel: EchoChannel,
    word: int,
    side: str,
    value: int,
) -> None:
    """Counted where it is the guest's word and decides anything; another channel never notices."""
    page = channel.gpas[0 if side == "to_host" else channel.split]
    before = len(channel.echo(1))
    connected.memory.atomics.store_u32(page + word, value)
    if side == "to_guest":
        # The host looks for room in the ring it answers into when there is something to answer. Only now: it
        # may still be on its last look after the echo, and would answer before the index is wrong.
        channel.outgoing.write(b"answer me")
    channel.ring_bell()

    assert before == 1
    if (side, word) in (("to_host", WRITE_INDEX), ("to_guest", READ_INDEX)):
        assert refused(machine, "ring-index") >= 1
    assert len(connected.open(offered[1]).echo(3)) == 3


def test_packet_that_cannot_be(
    machine: RunningMachine, connected: PythonGuest, offered: list[OfferChannel], channel: EchoChannel
) -> None:
    """A descriptor longer than what was published is refused once, by its rule."""
    connected.memory.write(channel.gpas[1], pack("<HHHHQ", 6, 2, 0xFFFF, 0, 1))
    connected.memory.atomics.store_u32(channel.gpas[0] + WRITE_INDEX, 64)
    channel.ring_bell()

    assert refused(machine, "packet-length") == 1
    assert len(connected.open(offered[1]).echo(3)) == 3


def test_wish_that_can_never_be_met(machine: RunningMachine, connected: PythonGuest, channel: EchoChannel) -> None:
    """A guest that waits for more room than there is gets its packets, and no signal that never ends."""
    connected.memory.atomics.store_u32(channel.gpas[0] + PENDING_SEND_SZ, 0xFFFF_FFF8)
    answers = channel.echo(3)

    assert len(answers) == 3
    assert refused(machine, "pending-send-size") >= 1


# -- registers, hypercalls, exits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("control", "argument", "status"),
    [
        (0x0000, 0, HvStatus.INVALID_HYPERCALL_CODE),
        (0xFFFF, 0, HvStatus.INVALID_HYPERCALL_CODE),
        (HVCALL_POST_MESSAGE | 1 << 32, INPUT_PAGE, HvStatus.INVALID_HYPERCALL_INPUT),
        (HVCALL_POST_MESSAGE, INPUT_PAGE + 4, HvStatus.INVALID_ALIGNMENT),
        (HVCALL_POST_MESSAGE, INPUT_PAGE + PAGE_SIZE - 8, HvStatus.INVALID_ALIGNMENT),
        (FAST_SIGNAL, 0x3FFF, HvStatus.INVALID_CONNECTION_ID),
        (FAST_SIGNAL, 0x2001 | 1 << 48, HvStatus.INVALID_PARAMETER),
    ],
)
def test_hypercalls_have_their_documented_status(
    guest: PythonGuest, control: int, argument: int, status: HvStatus
) -> None:
    """What is wrong with a hypercall comes back as its status, never as silence."""
    guest.memory.write(INPUT_PAGE, bytes(PAGE_SIZE))

    assert HvStatus(guest.hypercall(control, argument)) == status


def test_unknown_connection_and_oversized_payload(guest: PythonGuest) -> None:
    """INVALID_CONNECTION_ID for a port that is not there; INVALID_PARAMETER for what no message can hold."""
    assert guest.post(b"hello", connection_id=0x1234) == HvStatus.INVALID_CONNECTION_ID
    guest.memory.write(INPUT_PAGE, pack("<IIII", 4, 0, 1, 241) + bytes(240))
    assert guest.hypercall(HVCALL_POST_MESSAGE, INPUT_PAGE) == HvStatus.INVALID_PARAMETER


def test_hypercall_before_its_page_is_undefined(machine: RunningMachine) -> None:
    """Without the hypercall page there is no instruction to make one: #UD, as a fault."""
    with PythonGuest(machine.name) as guest:
        guest.attach()
        with pytest.raises(InvalidOpcode):
            guest.hypercall(HVCALL_POST_MESSAGE, INPUT_PAGE)
        guest.detach()


def test_register_that_is_not_there_faults(guest: PythonGuest) -> None:
    """RDMSR and WRMSR of any other number, and WRMSR of what is read-only, are #GP."""
    for msr in (0, 0x10, 0x3FFF_FFFF, 0x4000_FFFF, 0xFFFF_FFFF):
        assert msr not in MSR_NAMES
        with pytest.raises(GeneralProtection):
            guest.read_msr(msr)
        with pytest.raises(GeneralProtection):
            guest.write_msr(msr, 0)
    for msr in (HV_X64_MSR_VP_INDEX, HV_X64_MSR_TIME_REF_COUNT):
        with pytest.raises(GeneralProtection):
            guest.write_msr(msr, 1)


@pytest.mark.parametrize("msr", [HV_X64_MSR_SIMP, HV_X64_MSR_SIEFP, HV_X64_MSR_HYPERCALL])
@pytest.mark.parametrize("gpa", [RAM_BYTES, 1 << 40, (1 << 64) - PAGE_SIZE])
def test_overlay_outside_ram_does_no_harm(machine: RunningMachine, guest: PythonGuest, msr: int, gpa: int) -> None:
    """Wherever a page register points, the host writes guest memory only; put right, all works."""
    try:
        guest.write_msr(msr, gpa & -PAGE_SIZE | 1)
    except GeneralProtection:
        assert refused(machine, "general-protection") >= 1
    guest.enable_hypercalls()
    guest.enable_synic()

    assert guest.contact().version_supported == 1


def test_synic_switched_off_under_its_messages(connected: PythonGuest, offered: list[OfferChannel]) -> None:
    """SCONTROL off and on while an answer is on its way: it is kept, not lost, not doubled."""
    connected.write_msr(HV_X64_MSR_SCONTROL, 0)
    relid = offered[0].child_relid
    for message in gpadl_messages(relid, FIRST_HANDLE, range(FREE_PFN, FREE_PFN + 4)):
        assert connected.post(message.pack()) == HvStatus.SUCCESS
    connected.write_msr(HV_X64_MSR_SCONTROL, 1)

    assert connected.expect(GpadlCreated).creation_status == 0
    assert not connected.inbox


def test_end_of_message_with_nothing_to_end(guest: PythonGuest) -> None:
    """EOM may be written at any time; it reads 0."""
    for _ in range(100):
        guest.write_msr(HV_X64_MSR_EOM, 0)

    assert guest.read_msr(HV_X64_MSR_EOM) == 0
    assert guest.contact().version_supported == 1


def test_sint_with_a_vector_that_cannot_be(guest: PythonGuest) -> None:
    """Vectors below 16 are the processor's own: #GP, and the register keeps what it had."""
    had = guest.read_msr(HV_X64_MSR_SINT0 + 5)
    with pytest.raises(GeneralProtection):
        guest.write_msr(HV_X64_MSR_SINT0 + 5, 3)

    assert guest.read_msr(HV_X64_MSR_SINT0 + 5) == had


def test_reset_register_takes_everything_back(guest: PythonGuest) -> None:
    """HV_X64_MSR_RESET resets every VP; a contact from there finds the host as new."""
    assert guest.contact().version_supported == 1
    guest.write_msr(HV_X64_MSR_RESET, 1)

    assert [guest.read_msr(msr) for msr in (HV_X64_MSR_SCONTROL, HV_X64_MSR_SIMP, HV_X64_MSR_GUEST_OS_ID)] == [0, 0, 0]
    assert len(guest.connect()) == 8


def test_reset_leaves_no_interrupt(guest: PythonGuest) -> None:
    """Requested, in service, or of those that end by themselves: of every VP none is left."""
    words = [
        slice(vp_page_offset(position) + at, vp_page_offset(position) + at + 8 * VECTOR_WORDS)
        for position in range(guest.vp_count)
        for at in (VP_REQUEST, VP_IN_SERVICE, VP_AUTO_EOI)
    ]
    for one in words:
        guest.vps.memory[one] = b"\xff" * 8 * VECTOR_WORDS
    guest.write_msr(HV_X64_MSR_RESET, 1)

    assert not any(any(guest.vps.memory[one]) for one in words)


def test_operation_that_is_none(machine: RunningMachine, guest: PythonGuest) -> None:
    """An exit with an operation that is not one is answered all the same, and counted."""
    with pytest.raises((GeneralProtection, InvalidOpcode)):
        guest.exits.exit(0xDEAD, 1, 2, 3)

    assert refused(machine, "unknown-exit-operation") == 1
    assert guest.read_msr(HV_X64_MSR_GUEST_OS_ID) != 0


# -- stores into what is shared ---------------------------------------------------------------------------------


def test_host_run_state_of_nonsense_does_not_stop_the_host(guest: PythonGuest) -> None:
    """Whatever stands in the host's run state, an exit that wakes nobody is answered within its halt's end."""
    for value in (0, 1, 2, 3, 0xFFFF_FFFF):
        guest.doorbells.view.store_u32(D_HOST_RUN_STATE, value)
        assert guest.read_msr(HV_X64_MSR_VP_INDEX) == guest.vp_index()


def test_unknown_doorbells_are_counted(machine: RunningMachine, guest: PythonGuest) -> None:
    """A bell of no connection is cleared and counted."""
    for connection_id in (0, 1, 0x1234, 16_383):
        guest.bell(connection_id)()

    assert refused(machine, "unknown-doorbell", 4) == 4


def test_doorbell_of_a_channel_that_is_offered_is_no_mistake(
    machine: RunningMachine, connected: PythonGuest, offered: list[OfferChannel]
) -> None:
    """The bell of a channel that nobody opened is ignored while the guest holds its relid, and refused after."""
    ring = connected.bell(offered[0].connection_id)

    ring()
    machine.wait_until(
        lambda: machine.machine.control.ignored().get("doorbell-of-closed-channel") == 1,
        5.0,
        "the bell to be ignored",
        step_s=0.01,
    )
    assert "unknown-doorbell" not in machine.machine.control.refusals()[0]
    connected.send(RelidReleased(offered[0].child_relid))
    machine.wait_until(lambda: head(machine).offers == len(offered) - 1, 5.0, "the relid to be back", step_s=0.01)
    ring()

    assert refused(machine, "unknown-doorbell") == 1


def test_machine_page_is_set_right(machine: RunningMachine, guest: PythonGuest) -> None:
    """Overwritten, even by STOPPING, it is as before a moment later, and the machine goes on."""
    guest.vps.memory[:PAGE_SIZE] = os.urandom(PAGE_SIZE)

    machine.wait_until(lambda: page_is_right(machine), 5.0, "the machine page to be set right", step_s=0.01)
    assert refused(machine, "vps-page-written") >= 1
    assert not guest.stopping()


def test_pages_are_right_for_who_attaches(machine: RunningMachine) -> None:
    """Identities of VP pages that somebody spoilt behind his DETACH are right when the next guest's ATTACH returns."""
    with PythonGuest(machine.name) as guest:
        pages = [vp_page_offset(position) for position in range(guest.vp_count)]
        made = [guest.vps.view.load_u32(page + VP_INDEX) for page in pages]
        for _ in range(20):
            guest.attach()
            assert [guest.vps.view.load_u32(page + VP_INDEX) for page in pages] == made
            guest.detach()
            for page in pages:
                guest.vps.view.store_u32(page + VP_INDEX, 0xBAD)
        guest.attach()
        guest.detach()


def test_who_contacts_behind_his_detach_is_seen_to_die(machine: RunningMachine) -> None:
    """His connection ends with the process that had attached and detached; one that did no more leaves none."""
    named, other = Forked(stand_still), Forked(stand_still)
    try:
        with PythonGuest(machine.name) as guest:
            guest.attach(named.pid)
            guest.detach()
            guest.enable_hypercalls()
            guest.enable_synic()
            assert guest.contact().version_supported == 1 and guest.offers()
            machine.wait_until(lambda: head(machine).offers > 0, 5.0, "the host to publish it", step_s=0.01)
            assert head(machine).attached_pid == 0
            named.kill()
            machine.wait_until(lambda: head(machine).version == 0, 5.0, "the host to see his end", step_s=0.01)
            assert (head(machine).left, head(machine).offers) == (Left.DIED, 0)
            before = head(machine).disconnects
            guest.attach(other.pid)
            guest.detach()
            other.kill()
            guest.attach()
            guest.detach()
        assert head(machine).disconnects == before
    finally:
        named.kill()
        other.kill()


def test_slot_that_is_claimed_behind_a_detach_is_freed(machine: RunningMachine, guest: PythonGuest) -> None:
    """Nobody is attached whose end would free it, though the process that was is there still: in a while it is lost."""
    guest.detach()
    slot = vp_page_offset(0) + VP_EXIT_SLOT + EXIT_SLOT.size * 3 + X_STATE
    guest.vps.view.store_u32(slot, ExitState.CLAIMED)

    assert refused(machine, "exit-slot-lost") == 1
    assert guest.vps.view.load_u32(slot) == ExitState.FREE


def stand_still() -> None:
    """Until it is killed."""
    signal.pause()


def test_tokens_for_nobody(guest: PythonGuest) -> None:
    """Thousands of tokens on the host's semaphore make it look in vain, and no more."""
    wakeup = Wakeup.attach(object_name(guest.name, "host"))
    for _ in range(5_000):
        wakeup.post()
    wakeup.close()

    assert guest.contact().version_supported == 1


def test_message_slot_that_is_never_emptied(machine: RunningMachine, connected: PythonGuest) -> None:
    """A guest that takes no message is told that there are no buffers; one that begins again gets them in order."""
    statuses = set()
    for number in range(100):
        message = gpadl_messages(1, FIRST_HANDLE + number, [FREE_PFN + number])[0]
        statuses.add(connected.post(message.pack()))

    assert statuses == {HvStatus.SUCCESS, HvStatus.INSUFFICIENT_BUFFERS}
    created = [connected.expect(GpadlCreated).gpadl for _ in range(16)]
    assert created == [FIRST_HANDLE + number for number in range(16)]
    assert head(machine).attached_pid == os.getpid()


def test_recording_goes_on_under_a_hostile_guest(tmp_path: Path) -> None:
    """What a guest does shows in the trace, and spoils none of it."""
    with running(record=True) as machine, PythonGuest(machine.name) as guest:
        guest.bring_up()
        for length in (0, 3, 8):
            guest.post(bytes(length))
        assert refused(machine, "message-too-short", 2) == 2
        guest.detach()


def test_message_that_is_no_channel_message_was_taken_and_refused(tmp_path: Path) -> None:
    """Its type is not VMBus's: a recording says that the host took it, and nobody is owed its handling."""
    path = tmp_path / "a.rec"
    with running(record=True) as machine, recording(machine, path), PythonGuest(machine.name) as guest:
        guest.bring_up()
        guest.post(bytes(8), message_type=7)
        assert refused(machine, "message-type", 1) == 1
        guest.detach()
        machine.stop()

    with Recording(path) as one:
        records = list(one.records())
    told = [record.event.name for record in records if record.event.name in ("post", "message_take", "message_done")]
    assert told == ["post", "message_take", "message_done"]
    assert debts_of(records, flows_of(records, (0, 1))) == []


# -- campaigns --------------------------------------------------------------------------------------------------


def run_campaign(machine: RunningMachine, seed: int, *arguments: str) -> int:
    """Let one hostile guest live and end on the machine; its pid. Repeat with `--seed` and the same arguments."""
    command = [sys.executable, "-m", "tests.system.hostile_guest", machine.name, "--seed", str(seed), *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as guest:
        try:
            told, complaints = guest.communicate(timeout=60)
        finally:
            guest.kill()
    print(told, complaints)
    assert "Traceback" not in complaints, (seed, complaints)
    machine.pump(0.0)
    return guest.pid


@pytest.mark.parametrize("seed", SEEDS)
def test_machine_survives_a_hostile_guest(machine: RunningMachine, seed: int) -> None:
    """A correct guest lives its whole life on the machine behind a hostile one."""
    wait_until_clean(machine, run_campaign(machine, seed))
    live_correctly(machine)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_one_machine_survives_many_hostile_guests(c_guest: Path | None) -> None:
    """Guest after guest on the same machine, a correct one behind each."""
    with running() as machine:
        for seed in SOAK_SEEDS:
            print(f"seed {seed}")
            wait_until_clean(machine, run_campaign(machine, seed))
            live_correctly(machine, c_guest)
