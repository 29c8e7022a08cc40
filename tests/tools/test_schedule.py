"""A schedule: every verb is read, every mistake is one line with the cure, the director says for whom it waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tools.director
from emu.control import ActorKind, ActorRow
from emu.errors import UserError
from emu.interrupts import AWAKE
from emu.ipc.atomics import AtomicView
from emu.ipc.clock import MachineClock
from emu.layout import VP_RUN_STATE, vp_page_offset
from emu.mirror import Mirror, MirrorChannel
from emu.orders import OrderDesk
from emu.scenario import derived_instance
from emu.switches import ALL_FIXED
from emu.syncpoint import TICKETS, Point, Tickets
from emu.wire.device_classes import BY_NAME
from hostproc.protocol.states import ChannelState as HostState
from tests.guestproc.world import World, new_world
from tests.tools.settled_world import publish
from tools.director import Director, Inconclusive, Seen
from tools.launch import RunningMachine
from tools.schedule import VERBS, Schedule, read_steps

EVERY_VERB = (
    "arm g.isr.enter actor=vcpu0 cpu=0 relid=1 skip=2 as ISR",
    "until arrived ISR",
    "expect ISR",
    "resume ISR",
    "arm g.open.waiting as NOBODY",
    "disarm NOBODY",
    "offer echo subchannels=1 as NIC",
    "until event work_done queue=WORK",
    "send NIC count=3 size=64",
    "send echo#1",
    "offer-subchannel NIC index=1 as SUB",
    "rescind NIC",
    "rescind-again NIC",
    "call bind device=echo#1 driver=hv_echo as BIND",
    "call drivers_autoprobe value=0",
    "until answered BIND",
    "run echo_check cpu=0 relid=echo#1 wanted=4 size=8 rate=100 as PING",
    "until done PING",
    "fault alloc.fail=message_work as NOMEM",
    "end NOMEM",
    "advance 5s",
    "check",
    "until settled",
)


def write(home: Path, text: str) -> Path:
    """A schedule file."""
    path = home / "x1-mine.toml"
    path.write_text(text)
    return path


def complaint(*lines: str) -> str:
    """What is said about these steps."""
    with pytest.raises(UserError) as refused:
        read_steps(lines, "mine.toml")
    return str(refused.value)


def test_every_verb_is_read() -> None:
    """Words, options and labels of each, in the words of the file."""
    steps = read_steps(EVERY_VERB, "mine.toml")

    assert {step.verb for step in steps} == set(VERBS)
    assert [step.text for step in steps] == list(EVERY_VERB)
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    first = steps[0]
    assert (first.words, first.label) == (("g.isr.enter",), "ISR")
    assert dict(first.options) == {"actor": "vcpu0", "cpu": "0", "relid": "1", "skip": "2"}


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["hold g.isr.enter"], "'hold' is no verb; "),
        (["until"], "'until' is no verb; did you mean "),
        (["arm g.isr.entre as X"], "'g.isr.entre' is no sync point; did you mean g.isr.enter"),
        (["arm g.isr.enter"], "it has too few words or too many; write it as `arm POINT "),
        (["arm g.isr.enter cpus=1 as X"], "cpus= is nothing of `arm`; write it as `arm POINT "),
        (["arm g.isr.enter cpu=one as X"], "cpu=one is no number; write it as cpu=1"),
        (["arm g.isr.enter do=look as X"], "who comes there is held, or seen (do=see), or turns a fault on"),
        (
            ["arm g.isr.enter do=see fault=guest.wakeup_spurious as X"],
            "who comes there is held, or seen (do=see), or turns a fault on (fault=…); choose one",
        ),
        (["arm g.isr.enter relid=NIC as X"], "NIC is no device of an earlier step; name a label of `offer`"),
        (["until settled now"], "it has too few words or too many; write it as `until settled`"),
        (["resume X"], "no earlier step is called X; name one with `arm … as LABEL` before it"),
        (["offer echo as X", "resume X"], "X is a step `offer`; name one of `arm`"),
        (["call drivers_probe device=echo#1 as X", "until arrived X"], "X is a step `call`; name one of `arm`"),
        (["offer echo as X", "offer echo as X"], "there is a X already; choose another label"),
        (["rescind NIC"], "NIC is no device of an earlier step; "),
        (["send echo#0"], "echo#0 is no device of an earlier step; "),
        (["send echo#1 size=-1"], "size=-1 is no number; "),
        (["run pong"], "'pong' is no program of the guest's; "),
        (["run unbind cpu=1"], "it names no device; write it as `run unbind relid=CLASS#1`"),
        (["advance soon"], "'soon' is no duration; write it as 5s, 20ms or 7us"),
        (["advance 1000000s"], "1000000s is too long; at most 86400s"),
        (["until event offers"], "'offers' is no event; did you mean offer"),
        (["until event offer relids=1"], "relids is no argument of offer; did you mean relid"),
        (["fault alloc.fall"], "alloc.fall"),
        (["call cpus as X", "until answered X", "until answered X"], "no earlier step is called X; "),
        (["call ping"], "'ping' is no call of the guest's user space; "),
        (["call move"], "`call move` needs device=; write it as `call move device=DEVICE cpu=N [index=N]`"),
        (["call cpu_online cpu=x online=0"], "cpu=x is no number; write it as `call cpu_online cpu=N online=0|1`"),
        (["call cpus cpu=1"], "cpu= is no argument of `call cpus`; write it as `call cpus`"),
        (["call unbind device=NIC"], "NIC is no device of an earlier step; "),
        (["arm g.isr.enter cpu=64 as X"], "cpu=64 is not between 0 and 63; "),
        (["arm g.isr.enter relid=99999 as X"], "99999 is no relid; they go from 1 to 2047"),
        (["send echo#1 count=5000"], "count=5000 is not between 1 and 1000; "),
        (["send echo#1 size=999999999"], "size=999999999 is not between 0 and 65536; "),
        (["offer 'echo as X"], "No closing quotation; close the quote"),
        (["resume 'two\nlines'"], "no earlier step is called two lines; "),
    ],
)
def test_a_mistake_is_one_line(lines: list[str], problem: str) -> None:
    """It names the file, the step by number and words, what is wrong with it, and the cure."""
    said = complaint(*lines)

    assert said.startswith(f"mine.toml: step {len(lines)}")
    assert problem in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("step = 'until settled'", "step: it is no list of strings; write it as step = "),
        ("title = 7", "title: 7 is a whole number, not a string; write it in quotes"),
        ("step = ['run ping cpu=4']", "no 4; they count from 0"),
        ("[expect]\ninvariant = 'INV-3'", "names no invariant; write it as "),
        ("[expect]\ninvariants = 'INV-03'", "invariants"),
        ("[switches]\noffer_gates = false", "offer_gates"),
        ("steps = []", "steps: unknown key; did you mean step? known: title, story, step, expect, machine, "),
        ("titel = 'Mine'", "titel: unknown key; did you mean title? "),
        ("", "step: it has no steps; write it as step = "),
        ("[machine]\nvcpus = 2", "step: it has no steps; write it as step = "),
        ("[expect]\ninvariant = ['INV-03', 'INV-99']", "there is no INV-99; known: INV-01, "),
        (
            "step = ['arm g.isr.enter cpu=2 as ISR']\n[machine]\nvcpus = 2",
            "step 1 `arm g.isr.enter cpu=2 as ISR`: the machine has 2 vCPUs, and no 2; they count from 0, or set ",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    """It names the file, the key, what is wrong with it, and the cure."""
    path = write(tmp_path, text)
    with pytest.raises(UserError) as refused:
        Schedule.load(path)

    assert str(refused.value).startswith(f"{path}: ")
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


@given(st.lists(st.text(max_size=40), max_size=4))
def test_nonsense_is_never_worse_than_one_line(lines: list[str]) -> None:
    """Whatever somebody writes is read or refused in one line."""
    try:
        read_steps(tuple(lines), "mine.toml")
    except UserError as refused:
        assert "\n" not in str(refused)


WORDS = st.sampled_from([*" ".join(VERBS).split(), "g.isr.enter", "as", "X", "echo", "echo#1", "relid=X", "cpu=0", "7"])


@given(st.lists(st.lists(WORDS, max_size=6).map(" ".join), max_size=6))
def test_words_in_no_order_are_read_or_refused(lines: list[str]) -> None:
    """So are the right words at the wrong places; and what is read has the labels that it uses."""
    try:
        steps = read_steps(tuple(lines), "mine.toml")
    except UserError as refused:
        assert "\n" not in str(refused)
    else:
        labels = {step.label for step in steps}
        assert all(step.words[0] in labels for step in steps if step.verb in ("resume", "until answered"))


def test_a_schedule_is_its_file(tmp_path: Path) -> None:
    """Title, story, invariants, switches, machine; with its fix on only the switches are others."""
    schedule = Schedule.load(
        write(
            tmp_path,
            "title = 'Mine'\nstory = 'It goes wrong.'\nstep = ['until settled']\n"
            "[expect]\ninvariant = ['INV-03', 'INV-28']\n[machine]\nvcpus = 2\n[switches]\noffer_gate = false\n",
        )
    )

    assert (schedule.name, schedule.title, schedule.story) == ("x1-mine", "Mine", "It goes wrong.")
    assert schedule.invariants == ("INV-03", "INV-28")
    assert schedule.scenario.fix.off() == ("offer_gate",)
    fixed = schedule.with_fix()
    assert fixed.scenario.fix == ALL_FIXED
    assert (fixed.steps, fixed.scenario.machine.vcpus) == (schedule.steps, 2)
    assert Schedule.of_document(schedule.document, schedule.path) == schedule


# -- the director's waiting ------------------------------------------------------------------------------


class Unposted:
    """A semaphore that nobody posts; a wait for it is over at once, so that the waiter looks again."""

    tokens = 0

    def block(self, _timeout_s: float) -> bool:
        """In vain."""
        return False

    def post(self) -> None:
        """Nobody sleeps on it."""


class Standing:
    """What a director needs of a running machine, in a world where nobody moves unless a test says so."""

    def __init__(self, world: World) -> None:
        self.machine = world.machine

    def pump(self, _timeout_s: float) -> None:
        """Nobody dies and nothing is recorded meanwhile."""

    def nudge(self, _cpu: int) -> None:
        """Nobody sleeps as a processor."""


@pytest.fixture
def world() -> Iterator[World]:
    """A guest with one open channel, at rest, on a machine that runs schedules."""
    with new_world(races=True) as world:
        world.boot()
        world.host.device(9)
        world.settle()
        publish(world)
        yield world


@pytest.fixture
def director(world: World, monkeypatch: pytest.MonkeyPatch) -> Director:
    """A director that is not patient."""
    monkeypatch.setattr(tools.director, "STEP_S", 0.02)
    monkeypatch.setattr(world.machine, "wakeup", lambda _part: Unposted())
    return Director(cast(RunningMachine, Standing(world)), Seen())


def do(director: Director, *lines: str) -> None:
    """These steps."""
    for step in read_steps(lines, "mine.toml"):
        director.do(step)


def arrive(world: World, point: Point, relid: int, row: ActorRow | None = None) -> None:
    """An actor, by default a processor, comes to a point and is held there."""
    row = row or next(row for row in world.machine.control.rows() if row.name == "vcpu1")
    tickets = Tickets(world.machine.control)
    # As the machine's; the world's time is a fake, which nobody can hold.
    tickets.clock = MachineClock(AtomicView(bytearray(4096)), 0)
    assert tickets.take(point, row.number, 1, relid) is not None


def test_nobody_comes(director: Director) -> None:
    """A point that nobody comes to is named, and the step says nothing about the machine."""
    with pytest.raises(
        Inconclusive, match=r"^step 2 `until arrived ISR`: waited 0\.02 s for somebody to come to g\.isr\.enter$"
    ):
        do(director, "arm g.isr.enter as ISR", "until arrived ISR")


def test_who_is_held_is_named(world: World, director: Director) -> None:
    """Whoever is held at a point while something else is waited for may be why it does not come."""
    arms = read_steps(("arm g.open.waiting as OPEN", "until arrived OPEN", "until event offer relid=9"), "mine.toml")
    director.do(arms[0])
    arrive(world, Point.OPEN_WAITING, 9)
    director.do(arms[1])

    with pytest.raises(Inconclusive, match=r"an event `offer relid=9`; vcpu1 is held at g\.open\.waiting$"):
        director.do(arms[2])


def test_who_runs_is_named(world: World, director: Director) -> None:
    """A machine that does not settle: who still runs."""
    position = world.cpus[1].position
    world.machine.vps.view.store_u32(vp_page_offset(position) + VP_RUN_STATE, AWAKE)

    with pytest.raises(Inconclusive, match=r"for the machine to settle; not settled: vcpu1 is AWAKE$"):
        do(director, "until settled")


def test_the_dead_are_named(world: World, director: Director) -> None:
    """One that is dead never settles."""
    row = next(row for row in world.machine.control.rows() if row.name == "vcpu1")
    world.machine.control.set_dead(row.slot, 9)

    with pytest.raises(Inconclusive, match=r"for the machine to settle; dead: vcpu1 \(wait status 9\)$"):
        do(director, "until settled")


def test_nobody_is_let_go_who_did_not_come(director: Director) -> None:
    """`resume` without a wait before it says what is missing; `disarm` takes back what nobody took."""
    with pytest.raises(Inconclusive, match=r"step 2: nobody is held at g\.isr\.enter; wait with `until arrived` first"):
        do(director, "arm g.isr.enter as ISR", "resume ISR")

    do(director, "arm g.open.waiting as OPEN", "disarm OPEN", "until settled")


def test_more_points_than_there_are_tickets(director: Director) -> None:
    """Whoever arms one too many is told which step that is, and what to do."""
    arms = [f"arm g.open.timeout as A{number}" for number in range(TICKETS + 1)]

    with pytest.raises(UserError, match=r"^step 33 `arm g\.open\.timeout as A32`: 32 are armed or held already; "):
        do(director, *arms)


def test_only_one_task_of_the_host_stands_still(world: World, director: Director) -> None:
    """A processor that is held does nothing; the host goes on beside its task, and may be what is waited for."""
    control = world.machine.control
    vcpu = next(row for row in control.rows() if row.name == "vcpu1")
    host, _counters = world.machine.enlist(ActorKind.HYPERVISOR, "hypervisor")
    for row, point in ((vcpu, Point.OPEN_WAITING), (host, Point.OPEN_TIMEOUT)):
        director.tickets.arm(point)
        arrive(world, point, 9, row)

    assert len(director.tickets.parked()) == 2
    assert director._standing_still() == {vcpu.slot}


def test_who_dies_is_heard_while_something_is_waited_for(director: Director, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher listens between two looks: without it nobody would be dead, whatever happened."""
    heard: list[float] = []
    monkeypatch.setattr(director.running, "pump", heard.append)

    director._wait("a word", lambda: bool(heard))

    assert heard == [0]


def test_advance_wakes_who_sleeps_until_a_time_that_is_over(
    world: World, director: Director, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock first; and an event that is waited for next is one of behind that."""
    did: list[object] = []
    monkeypatch.setattr(world.machine, "clock", SimpleNamespace(advance=did.append))
    monkeypatch.setattr(world.machine, "wake_everybody", lambda: did.append("awake"))
    before = time.monotonic_ns()

    do(director, "advance 5ms")

    assert did == [5_000_000, "awake"]
    assert director._since_ns >= before


def test_event_is_looked_for_behind_what_the_host_was_told(director: Director, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that came before the order is not what the order brought about."""
    monkeypatch.setattr(OrderDesk, "ask", lambda *_arguments, **_options: {})
    before = time.monotonic_ns()

    director.host("rescind", relid=9)

    assert director._since_ns >= before


def offered(world: World, relid: int, state: HostState, *, sub_channel_index: int = 0) -> None:
    """What the host says of a channel of the device under test."""
    Mirror(world.machine.control).write_channel(
        MirrorChannel(relid, state, 1, sub_channel_index, 0, 0, 0, 0, 0, BY_NAME["echo"].guid, UUID(int=77))
    )


def test_label_is_the_relid_that_its_device_has_now(world: World, director: Director) -> None:
    """Of a device that waited for one: neither that of its life before, nor a sub-channel's; then it stays."""
    director._relids["D"] = 0
    director._instances["D"] = str(UUID(int=77))
    assert director.relid("D") == 0
    offered(world, 13, HostState.CLOSED)
    offered(world, 14, HostState.OPEN, sub_channel_index=1)
    offered(world, 15, HostState.REVOKED)

    assert director.relid("D") == 13
    offered(world, 16, HostState.CLOSED)
    assert director.relid("D") == 13


def test_number_of_a_class_is_counted_from_one(director: Director, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the scenario's file; once found its relid is known, also when the device has gone."""
    there = [SimpleNamespace(device_id=derived_instance("echo", number), relid=5 + number) for number in (0, 1)]
    monkeypatch.setattr(tools.director, "list_devices", lambda _machine: there)

    assert (director.relid("echo#1"), director.relid("echo#2")) == (5, 6)
    there.clear()
    assert (director.relid("echo#1"), director.relid("7")) == (5, 7)
    with pytest.raises(UserError, match="^echo#3 is no device of this schedule"):
        director.relid("echo#3")


def test_an_actor_that_nobody_knows(director: Director) -> None:
    """Whom a step names must be there: one line with who is."""
    with pytest.raises(UserError, match=r"no actor is called vcpu9; there are .*vcpu0"):
        do(director, "arm g.isr.enter actor=vcpu9 as ISR")
