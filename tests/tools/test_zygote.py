"""What the zygote does for its children before there are any: processors, and pages that nobody has written to."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from emu.control import ActorKind, ActorState, start_time_of
from emu.errors import MissingPrerequisite
from emu.scenario import Scenario
from guestproc import vcpu_main
from tools import zygote
from tools.launch import MachineDied, RunningMachine, launch

VCPUS = 4


@pytest.fixture(scope="module")
def running() -> Iterator[RunningMachine]:
    """A machine whose channels are open."""
    with launch(Scenario.default().with_overrides(vcpus=VCPUS)) as machine:
        machine.wait_ready()
        yield machine
        machine.shut_down_guest()


@pytest.fixture
def nobody() -> Iterator[zygote.Zygote]:
    """A zygote whose launcher says nothing."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield zygote.Zygote(theirs, os.getpid())


def test_processor_that_was_made_for_it_is_a_process_of_its_own(running: RunningMachine) -> None:
    """Each row of the process table has the pid of the process that was forked for it, and when that began."""
    rows = {row.name: row for row in running.machine.control.rows() if row.kind == ActorKind.VCPU}

    assert len(rows) == VCPUS
    for name, row in rows.items():
        assert row.state == ActorState.ALIVE
        assert row.pid == running.inner[name].pid
        assert row.start_time == start_time_of(row.pid) > 0


def test_processor_that_comes_online_has_half_the_memory_of_one_that_boots(running: RunningMachine) -> None:
    """It ran next to nothing to become what it is: else it would have three quarters."""
    own = {name: psutil.Process(inner.pid).memory_full_info().uss for name, inner in running.inner.items()}

    assert all(own[f"vcpu{cpu}"] < 0.6 * own["vcpu0"] for cpu in range(1, VCPUS))


def test_processor_that_died_gets_a_new_process(running: RunningMachine) -> None:
    """While the guest runs its RAM is laid out: the new one is made and forked by the same way."""
    before = running.inner["vcpu2"].pid
    running.expected_deaths.add(before)
    running.kill("vcpu2")
    running.wait_until(lambda: running.inner["vcpu2"].exited, 10.0, "vcpu2 to be gone")
    del running.inner["vcpu2"]

    running.start("vcpu2", "vcpu", 2)
    running.wait_until(lambda: running.machine.find_actor(ActorKind.VCPU, 2) is not None, 10.0, "a vcpu2")

    row = running.machine.find_actor(ActorKind.VCPU, 2)
    assert row is not None
    assert row.pid == running.inner["vcpu2"].pid != before


@pytest.mark.parametrize(
    ("boots", "laid_out", "by_hand", "races", "expected"),
    [
        pytest.param(True, True, False, False, True, id="laid-out"),
        pytest.param(True, False, False, False, False, id="late"),
        pytest.param(False, False, False, False, False, id="nobody-boots"),
        pytest.param(True, True, True, False, False, id="by-hand"),
        pytest.param(True, True, False, True, False, id="a-director-holds-them"),
    ],
)
def test_processors_are_made_where_ram_is_laid_out_soon(
    nobody: zygote.Zygote,
    monkeypatch: pytest.MonkeyPatch,
    boots: bool,
    laid_out: bool,
    by_hand: bool,
    races: bool,
    expected: bool,
) -> None:
    """Otherwise they are forked at once, and wait for themselves."""
    monkeypatch.setattr(zygote, "RAM_TIMEOUT_S", 0.0)
    machine: Any = SimpleNamespace(
        races=races,
        config={"by_hand": by_hand},
        stopping=False,
        wakeup=lambda _part: SimpleNamespace(block=lambda _timeout_s: False),
        control=SimpleNamespace(guest_formatted=laid_out),
    )

    assert nobody._wait_for_ram(machine, boots=boots) is expected


def test_no_ram_is_waited_for_where_somebody_died(nobody: zygote.Zygote) -> None:
    """The boot CPU, or the host without which it does not come so far: that is to be told, not waited for."""
    nobody._fork("vcpu0", lambda: 4)
    (descriptor,) = nobody._children
    ended = select.poll()
    ended.register(descriptor, select.POLLIN)
    assert ended.poll(10_000)
    machine: Any = SimpleNamespace(
        races=False,
        config={"by_hand": False},
        stopping=False,
        wakeup=lambda _part: SimpleNamespace(block=lambda _timeout_s: pytest.fail("it waited")),
        control=SimpleNamespace(guest_formatted=False),
    )

    assert not nobody._wait_for_ram(machine, boots=True)
    nobody._reap(descriptor)


def test_processor_that_cannot_be_made_is_left_to_its_process(
    nobody: zygote.Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The zygote lives on, and the process says by itself what it lacks."""

    def lacks(*_: Any) -> vcpu_main.Processor:
        raise MissingPrerequisite("no room for its recording")

    monkeypatch.setattr(vcpu_main, "make", lacks)
    machine: Any = None

    assert nobody._make(machine, [1, 2]) == {}


def test_traceback_that_comes_before_its_process_is_kept() -> None:
    """Of several that are forked in one go the zygote tells afterwards; one may have crashed by then."""
    machine: Any = None
    running = RunningMachine("m", Scenario.default(), machine, machine, 0.0)

    running._hear("crashed", "vcpu1", "Traceback: why")
    running._hear("forked", "vcpu1", 7)
    running._hear("forked", "vcpu2", 8)

    assert (running.inner["vcpu1"].traceback, running.inner["vcpu2"].traceback) == ("Traceback: why", "")


FILL_AND_TELL = """
from tools.warm_up import fill_holes
holes = [bytes(100) for _ in range(1000)]
del holes[::3]  # a pool has 102 of these
fillers = fill_holes()
made = [bytes(size - 33) for size in range(48, 513, 16)]
pools = [{id(one) // (16 << 10) for one in blocks} for blocks in (holes, fillers, made)]
print(pools[0] <= pools[1], len(pools[2]) == len(made), len(pools[1] & pools[2]) < 3)
"""


def test_what_is_made_behind_the_fillers_has_pools_of_its_own() -> None:
    """They fill every pool that had a hole, and what a child makes then lies in one that nobody had.

    Of each size, but for one or two of which a block was given back since.
    """
    environment = os.environ | {"PYTHONMALLOC": "pymalloc"}
    done = subprocess.run(
        [sys.executable, "-c", FILL_AND_TELL], check=True, capture_output=True, text=True, timeout=60, env=environment
    )

    assert done.stdout == "True True True\n"


def test_another_allocator_has_no_pools_to_begin() -> None:
    """The search for the first block of one ends all the same."""
    program = "from tools.warm_up import fill_holes; print(len(fill_holes()) > 1000)"
    environment = os.environ | {"PYTHONMALLOC": "malloc"}
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60, env=environment
    )

    assert done.stdout == "True\n"


@pytest.mark.parametrize("forked", [True, False])
def test_who_ends_while_others_are_made_is_told_of_by_the_next_wait(
    monkeypatch: pytest.MonkeyPatch, *, forked: bool
) -> None:
    """A guest that its host refuses may be gone before the zygote has forked the last processor; it still does so."""
    with launch(Scenario.default().with_overrides(vcpus=1)) as machine:
        machine.wait_ready()
        ended = subprocess.Popen(["true"])
        ended.wait()
        words: list[tuple[Any, ...]] = [("forked", "early", ended.pid), ("exited", "early", ended.pid, 4 << 8), (), ()]
        words += [("forked", "late", ended.pid), ("exited", "late", ended.pid, 0)] if forked else []

        def listen(machine: RunningMachine, _timeout_s: float) -> bool:
            if words and (word := words.pop(0)):
                machine._hear(*word)
            return bool(words)

        monkeypatch.setattr(RunningMachine, "tell_zygote", lambda *_message: None)
        monkeypatch.setattr(RunningMachine, "_listen", listen)
        asked = {"early": ("vcpu", 0), "late": ("vcpu", 1)}
        if forked:
            machine.start_all(asked)
            assert list(machine.inner)[-2:] == ["early", "late"]
        else:  # nobody has said anything more in all the time that there was
            with pytest.raises(MachineDied):
                machine.start_all(asked, 0.2)
        with pytest.raises(MachineDied, match="early"):
            machine.pump(0)
        monkeypatch.undo()
        machine.deaths.clear()
