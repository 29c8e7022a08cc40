"""A hunt for lost wake-ups: real processors and a real host ring each other at random moments, in any state.

Each processor rings the host once or several times, then waits for the host's answer, which is an interrupt or several:
halted, busy with safe points, computing (only the signal gets in), or halted for a moment only. The host halts whenever
nobody has rung. All of it is the machine's own code (`Vcpu`, `Halt`, `InterruptRequester`, `DoorbellServer`, pidfds and
semaphores); only what the guest runs is this program.

What is lost shows: no look is repeated by a watchdog (all are an hour here), a bit that was set without a kick keeps
later requests from kicking, and who waits for its answer rings no more. So a processor stands still, and who watches
says which, in which state, with which seed. With one processor nobody else's doorbell can help; with more than there
are cores, they take the cores from each other at every point.

    python -m tests.guestproc.wakeup_hunt --doorbells 10000000 --blocks 1000000 [--seed N]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from itertools import product

from emu import interrupts
from emu.control import ActorKind
from emu.doorbells import DoorbellServer, make_bell
from emu.interrupts import Halt, InterruptRequester, PollPolicy
from emu.ipc.segments import unlink_objects
from emu.layout import D_HOST_RUN_STATE, VP_REQUEST, VP_RUN_STATE, MachineState, RunState, vp_page_offset
from emu.machine import KICK_SIGNAL, Machine, VpKick
from guestproc import vcpu as vcpu_module
from guestproc.vcpu import Vcpu
from tests.processes import Crowd
from tools.testing import wait_for

POLLS: tuple[str | int, ...] = ("off", 20, "adaptive")
VECTOR = 0xF3
NEVER_S = 3_600.0
STILL_S = 60.0
"""A processor that has not gone on for so long has lost something (or its machine is very busy indeed)."""
LINE = 64


class Waiting(IntEnum):
    """What a processor does until its answer comes."""

    HALTED = 0
    SAFE_POINTS = 1
    COMPUTING = 2
    NAPPING = 3
    """Halts that end by themselves, so that a time-out meets a kick: nothing is left behind by that either."""


class Words:
    """One processor's words in RAM, each on a line of its own; each has one writer."""

    def __init__(self, machine: Machine, cpu: int) -> None:
        at = 4096 + 4096 * cpu
        self.asked, self.answered, self.finished, self.rung, self.doorbells, self.waiting = (
            machine.ram.view.cell_u64(at + LINE * word) for word in range(6)
        )


@dataclass(slots=True)
class Hunted:
    """What came of it."""

    doorbells: int = 0
    counters: Counter[str] = field(default_factory=Counter)
    tokens: list[str] = field(default_factory=list)
    """Semaphores that had one left."""
    requests: list[int] = field(default_factory=list)
    """Positions whose request words were not empty at the end."""

    def add(self, other: Hunted) -> None:
        """Add up what another hunt brought."""
        self.doorbells += other.doorbells
        self.counters += other.counters
        self.tokens += other.tokens
        self.requests += other.requests


def hunt(machine: Machine, poll: str | int, doorbells: int, seed: int) -> Hunted:
    """Ring `doorbells` times in all on a new machine; AssertionError when a processor does not go on."""
    machine.set_state(MachineState.RUNNING)
    cpus = range(machine.vp_count)
    left = machine.ram.view.cell_u64(0)
    ready = machine.ram.view.cell_u64(LINE)
    left.store(machine.vp_count)
    words = [Words(machine, cpu) for cpu in cpus]
    before = signal.signal(KICK_SIGNAL, signal.SIG_IGN)
    try:
        with Crowd() as crowd:
            for cpu in cpus:
                share = doorbells // machine.vp_count
                crowd.start(partial(_processor, machine, cpu, words[cpu], share, f"{seed}/{cpu}"))
            wait_for(lambda: ready.load() == machine.vp_count, "the processors to be there")
            crowd.start(partial(_host, machine, poll, words, f"{seed}/host"))
            _watch(machine, words, left.load, f"seed {seed}, poll {poll}, {machine.vp_count} vCPUs")
    finally:
        signal.signal(KICK_SIGNAL, before)
    parts = ["host", *(f"vp.{position}" for position in cpus)]
    return Hunted(
        sum(one.doorbells.load() + one.rung.load() for one in words),
        Counter(machine.control.counter_totals()),
        [part for part in parts if machine.wakeup(part).try_take()],
        [
            at
            for at in cpus
            if any(machine.vps.view.load_u64(vp_page_offset(at) + VP_REQUEST + 8 * n) for n in range(4))
        ],
    )


def _watch(machine: Machine, words: list[Words], left: Callable[[], int], what: str) -> None:
    """Look at every processor's progress until all are done."""
    seen: list[int] = [-1] * len(words)
    since = [time.monotonic()] * len(words)
    while left():
        time.sleep(0.05)
        now = time.monotonic()
        for cpu, one in enumerate(words):
            if (asked := one.asked.load()) != seen[cpu]:
                seen[cpu], since[cpu] = asked, now
            elif now - since[cpu] > STILL_S and left():
                state = RunState(machine.vps.view.load_u32(vp_page_offset(cpu) + VP_RUN_STATE)).name
                waits = Waiting(one.waiting.load()).name
                raise AssertionError(f"vcpu{cpu} stands still at {asked}, {waits}, its VP {state}: {what}")


def _never_look_again() -> None:
    """No watchdog in this process: a wake-up that is lost has to show."""
    for module, names in ((interrupts, ("WATCHDOG_S",)), (vcpu_module, ("LOOK_AGAIN_S", "LONG_WATCHDOG_S"))):
        for name in names:
            assert name in vars(module)
            vars(module)[name] = NEVER_S


# -- a processor ------------------------------------------------------------------------------------------


def _processor(machine: Machine, cpu: int, words: Words, share: int, seed: str) -> None:
    _never_look_again()
    chance = random.Random(seed)
    vcpu = Vcpu(machine, cpu, lambda *_: None)
    vcpu.begin()
    answered = 0
    taken = words.answered.load

    def interrupt() -> None:
        nonlocal answered
        vcpu.entering_irq()
        answered = taken()
        vcpu.lapic.eoi()
        vcpu.exiting_irq()

    vcpu.vectors[VECTOR] = interrupt
    bell = make_bell(machine.doorbells.view, cpu, machine.wakeup("host").post)
    machine.ram.view.fetch_add_u64(LINE, 1)
    asked = rung = 0

    def compute() -> None:
        looks = 0
        while answered != asked:
            looks += 1
            if not looks % 2_000:  # several processors compute on each core
                os.sched_yield()

    while rung + words.rung.load() < share:
        asked += 1
        words.asked.store(asked)
        for _ in range(chance.choice((1, 1, 2, 6))):
            bell()
            rung += 1
            _some_time(chance)
        waiting = chance.choice(tuple(Waiting))
        words.waiting.store(waiting)
        while answered != asked:
            if waiting == Waiting.HALTED:
                vcpu.idle(int(NEVER_S * 1e9))
            elif waiting == Waiting.COMPUTING:
                vcpu.compute(compute)
            elif waiting == Waiting.NAPPING:
                vcpu.idle(chance.choice((20_000, 100_000, 1_000_000)))
            else:
                _work(vcpu)
        words.doorbells.store(rung)
    # The last answer may have come with the request before the last one: that one is taken, too.
    while words.finished.load() != asked:
        os.sched_yield()
    vcpu.safe_point()
    _leave(machine, vcpu, bell)


def _work(vcpu: Vcpu) -> None:
    """Fifty calls into the kernel, then somebody else's turn."""
    for _ in range(50):
        vcpu.safe_point()
    os.sched_yield()


def _leave(machine: Machine, vcpu: Vcpu, bell: Callable[[], None]) -> None:
    machine.ram.view.fetch_sub_u64(0, 1)
    # The host looks at who is left when it is rung.
    bell()
    vcpu.retire()


def _some_time(chance: random.Random) -> None:
    for _ in range(chance.choice((0, 0, 5, 50, 500))):
        pass


# -- the host ---------------------------------------------------------------------------------------------


def _host(machine: Machine, poll: str | int, words: list[Words], seed: str) -> None:
    _never_look_again()
    chance = random.Random(seed)
    _row, counters = machine.enlist(ActorKind.HYPERVISOR, "hypervisor")
    server = DoorbellServer(machine.doorbells.view)
    loads = server.loads
    left = machine.ram.view.cell_u64(0).load
    halt = Halt(
        machine.doorbells.view,
        D_HOST_RUN_STATE,
        machine.wakeup("host"),
        lambda: any(load() for load in loads) or not left(),
        PollPolicy(poll),
        counters,
        glance=loads[0],  # all bells are there; who is left is seen by a look, as in the hypervisor
        glance_too=loads[1],
    ).halt
    requesters = [
        InterruptRequester(machine.vps.view, cpu, VpKick(machine, cpu, cpu), counters)
        for cpu in range(machine.vp_count)
    ]
    # Both ways of a host to request one: an event port has its vector bound, a message has not.
    requests = [(partial(one.request, VECTOR), one.bound(VECTOR)) for one in requesters]
    answered = [0] * machine.vp_count
    rung = [0] * machine.vp_count
    while left():
        for cpu in server.take():
            asked = words[cpu].asked.load()
            if asked == answered[cpu]:
                continue  # rings of one question that were taken apart, or the last one
            answered[cpu] = asked
            _some_time(chance)
            for turn in range(count := chance.choice((1, 1, 2, 6))):
                # The last request of all is the one that must get through.
                if turn == count - 1:
                    words[cpu].answered.store(asked)
                rung[cpu] += 1
                words[cpu].rung.store(rung[cpu])
                chance.choice(requests[cpu])()
                _some_time(chance)
            words[cpu].finished.store(asked)
        halt(int(NEVER_S * 1e9))
    counters.flush()


# -- by hand ----------------------------------------------------------------------------------------------


def new_machine(name: str, poll: str | int, vcpus: int) -> Machine:
    """A machine that has nothing but its words and semaphores."""
    config = {"machine": {"poll": poll, "exit_deadline_s": 5}, "cpu_positions": list(range(vcpus))}
    return Machine.create(name, config, ram_bytes=1 << 20, vp_indices=list(range(vcpus)), cpuid=[])


def main(arguments: Sequence[str] | None = None) -> int:
    """Hunt through every way to poll, with one processor and with several times as many as there are cores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--doorbells", type=int, default=10_000_000)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    asked = parser.parse_args(arguments)
    print(f"seed {asked.seed}", flush=True)
    total = Hunted()
    turn = 0
    while total.doorbells < asked.doorbells or total.counters["blocks"] < asked.blocks:
        for poll, vcpus in product(POLLS, (1, 4, 8)):
            name = f"hunt{os.getpid()}"
            machine = new_machine(name, poll, vcpus)
            try:
                # Blocks are what is hunted in; they come where nobody polls.
                wanted = min(asked.doorbells, 200_000) if poll == "off" else min(asked.doorbells, 100_000)
                total.add(hunt(machine, poll, wanted, asked.seed + turn))
            finally:
                unlink_objects(name)
                machine.close()
            assert not total.tokens and not total.requests, f"left: {total.tokens} {total.requests}, seed {asked.seed}"
            turn += 1
        told = {name: total.counters[name] for name in ("blocks", "kicks_semaphore", "kicks_signal", "preemptions")}
        print(f"{total.doorbells} doorbells, {told}, none lost, no token left", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
