"""The zygote: one warmed, single-threaded process from which a machine's inner processes are forked.

It imports what they need, collects and freezes the heap (otherwise each child's first collection would
un-share it: 6 x the memory), and forks on demand. Processors that are to come online it makes itself, when the boot CPU
has laid out RAM, and forks them in one go: a process that ran all that for itself would have a megabyte more of its own
(each call counts references on the pages of what it uses), and need twice the time. It is their parent: it reaps them
and reports name and status to the launcher over a SEQPACKET socket, one msgpack array a datagram. Until it has forked
the sweeper it outlives a launcher that is killed, and unlinks what that has made of a machine.

    launcher -> zygote   ["making", machine] ["attach", machine] ["fork", [[name, kind, number], ...]] ["configured"]
                         ["kill", name] ["bye"]
    zygote   -> launcher ["warm"] ["forked", name, pid] ["exited", name, pid, status]
    children -> launcher ["crashed", name, traceback] ["stage", name, stage] ["lacking", why]
"""

from __future__ import annotations

from tools import lean_fork  # noqa: F401  (before anybody else imports what it imports)

# isort: split
import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import msgpack

from emu.errors import MissingPrerequisite, UserError, VmbusError
from emu.ipc.heap import keep_freed_memory
from emu.ipc.segments import unlink_unheld
from emu.limits import not_started
from emu.machine import KICK_SIGNAL, Machine
from guestproc import vcpu_main, workqueue_main
from hostproc import hypervisor_main
from tools import sweeper
from tools.warm_up import fill_holes, warm_up

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
LACKING: Final = 3
"""Exit status of a child that the system does not give what it needs."""
RAM_TIMEOUT_S: Final = 2.0
"""A boot CPU lays out RAM within milliseconds of its fork, where the computer is not overloaded."""
_LOOK_S: Final = 0.02
"""Whoever dies meanwhile is reported so much later."""
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the parent goes, and leave at once if it is gone already."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def set_process_name(name: str) -> None:
    """The name that ps and top show (15 bytes)."""
    _libc.prctl(_PR_SET_NAME, f"vmbus:{name}".encode()[:15], 0, 0, 0)


class Zygote:
    """Serves the launcher's socket and its children's pidfds until told to go."""

    def __init__(self, link: socket.socket, launcher_pid: int) -> None:
        self._link = link
        self._launcher_pid = launcher_pid
        self._children: dict[int, tuple[str, int]] = {}
        # Not `poll`: of several children that have ended it tells in the order in which they did.
        self._poll = select.epoll()
        self._poll.register(link, select.EPOLLIN)
        self._machine: Machine | None = None
        self._making = ""
        """A machine that is being made, and has no sweeper yet."""

    def run(self) -> int:
        """Serve until ["bye"], or until the launcher hangs up: then there is nobody whom a traceback would tell."""
        with contextlib.suppress(ConnectionError):  # it was killed while we were warming up: what it ordered is read
            self._send("warm")
        with contextlib.suppress(ConnectionError):
            self._serve()
        return 0

    def _serve(self) -> None:
        """As `run`; ConnectionError where the launcher was killed, and is told of something."""
        while True:
            for descriptor, _event in self._poll.poll():
                if descriptor == self._link.fileno():
                    if not self._obey():
                        return
                else:
                    self._reap(descriptor)

    def _send(self, *message: Any) -> None:
        self._link.send(msgpack.packb(message))

    def _obey(self) -> bool:
        """Carry out one order; False when it is time to go."""
        data = self._receive()
        if not data:
            if self._making:
                self._sweep(self._making)
            return False
        verb, *arguments = msgpack.unpackb(data)
        if verb == "making":
            self._making = arguments[0]
        elif verb == "attach":
            name: str = arguments[0]
            # Before anything is mapped: the sweeper shall hold a name and two pidfds, nothing else.
            self._fork("sweeper", lambda: sweeper.main(name, self._launcher_pid), detached=True)
            self._making = ""
            die_with_parent(self._launcher_pid)
            try:
                self._machine = Machine.attach(name)
            except UserError:
                # Its launcher was interrupted and has taken the machine away again: nobody needs a zygote.
                return False
        elif verb == "fork":
            self._fork_inner([(name, kind, number) for name, kind, number in arguments[0]])
        elif verb == "configured":
            assert self._machine is not None, "configured before attach"
            self._machine.read_config()
        elif verb == "kill":
            self._kill(arguments[0])
        elif verb == "bye":
            for pid in {pid for _name, pid in self._children.values()}:
                os.kill(pid, signal.SIGKILL)
            for descriptor in list(self._children):
                self._reap(descriptor, report=False)
            return False
        return True

    def _sweep(self, name: str) -> None:
        """Our launcher was killed, and there is no sweeper yet: unlink what it has made of a machine."""
        # What it held is held until it is gone, which its socket, by which we know, may be before.
        with contextlib.suppress(OSError):
            launcher = select.poll()
            launcher.register(pidfd := os.pidfd_open(self._launcher_pid), select.POLLIN)
            launcher.poll(sweeper.GRACE_S * 1e3)
            os.close(pidfd)
        unlink_unheld(name)

    def _receive(self) -> bytes:
        """The next order; empty when there is none any more."""
        try:
            return self._link.recv(65_536)
        except ConnectionResetError:  # told once, before what is still to be read
            return self._link.recv(65_536)

    def _kill(self, name: str) -> None:
        for child, pid in self._children.values():
            if child == name:
                os.kill(pid, signal.SIGKILL)

    def _fork_inner(self, orders: list[tuple[str, str, int]]) -> None:
        """Fork processes of the machine (name, kind, number); processors that come online last."""
        machine = self._machine
        assert machine is not None, "fork before attach"
        further = {number: name for name, kind, number in orders if kind == "vcpu" and number != vcpu_main.BOOT_CPU}
        first = [order for order in orders if order[0] not in further.values()]
        for name, kind, number in first:
            self._fork(name, partial(self._run, machine, kind, number))
        if not further:
            return
        boots = any(kind == "vcpu" for _name, kind, _number in first)
        made = self._make(machine, list(further)) if self._wait_for_ram(machine, boots=boots) else {}
        self._fork_together(
            [(name, partial(vcpu_main.run, machine, cpu, self._report, made.get(cpu))) for cpu, name in further.items()]
        )

    def _run(self, machine: Machine, kind: str, number: int) -> int:
        """What an inner process does."""
        if kind == "vcpu":
            return vcpu_main.run(machine, number, self._report)
        if kind == "workqueue":
            return workqueue_main.run(machine, self._report)
        return hypervisor_main.run(machine, self._report)

    def _wait_for_ram(self, machine: Machine, *, boots: bool) -> bool:
        """Whether RAM is laid out, or is so before long; if not, processors wait for that themselves.

        So they do where somebody starts processes by hand, who may take his time, and where a director holds them.
        """
        if machine.races or machine.config["by_hand"]:
            return False
        gate, end = machine.wakeup("actor.0"), time.monotonic() + RAM_TIMEOUT_S
        while not machine.control.guest_formatted:
            if not boots or machine.stopping or self._somebody_ended() or time.monotonic() > end:
                return False
            gate.block(_LOOK_S)
        return True

    def _somebody_ended(self) -> bool:
        """Whether a child is to be reaped, which is done later."""
        return any(descriptor in self._children for descriptor, _event in self._poll.poll(0))

    def _make(self, machine: Machine, cpus: list[int]) -> dict[int, vcpu_main.Processor]:
        """Processors whose processes are still to come, by number; none where one cannot be made."""
        try:
            return {cpu: vcpu_main.make(machine, cpu, self._report) for cpu in cpus}
        except (VmbusError, OSError):
            return {}  # each process meets the same, and says it as its own

    def _fork_together(self, bodies: list[tuple[str, Callable[[], int]]]) -> None:
        """Fork several, and do in between as little as can be: what is written then, the child before has to itself."""
        fillers = fill_holes()
        forked = []
        for name, body in bodies:
            forked.append((name, self._fork_child(name, body)))
        del fillers
        for name, pid in forked:
            self._adopt(name, pid)

    def _report(self, *message: Any) -> None:
        """What a child tells the launcher by itself; of one that was killed nobody hears, and its child ends soon."""
        with contextlib.suppress(ConnectionError):
            self._send(*message)

    def _fork(self, name: str, body: Callable[[], int], *, detached: bool = False) -> None:
        self._adopt(name, self._fork_child(name, body, detached=detached))

    def _fork_child(self, name: str, body: Callable[[], int], *, detached: bool = False) -> int:
        """The pid of a new child, or 0 where the system gives us none, which the launcher is told."""
        zygote_pid = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:  # too many processes, or no memory for one more
            self._send("lacking", str(not_started(name, error.strerror)))
            return 0
        if pid == 0:
            self._child(name, body, zygote_pid, detached=detached)
        return pid

    def _adopt(self, name: str, pid: int) -> None:
        """Look after a child from now on, and tell the launcher of it."""
        if not pid:
            return
        descriptor = os.pidfd_open(pid)
        self._children[descriptor] = (name, pid)
        self._poll.register(descriptor, select.EPOLLIN)
        self._send("forked", name, pid)

    def _child(self, name: str, body: Callable[[], int], zygote_pid: int, *, detached: bool) -> None:
        """Never returns: a child must not run the zygote's loop, nor Python's shutdown."""
        status = 4
        # What it was born with is not garbage, and a collection would write to all of it.
        gc.freeze()
        try:
            self._poll.close()
            for descriptor in self._children:
                os.close(descriptor)
            os.setpgid(0, 0)
            set_process_name(name)
            if not detached:
                die_with_parent(zygote_pid)
            status = body()
        except MissingPrerequisite as lack:
            self._report("lacking", str(lack))
            status = LACKING
        except BaseException:
            text = traceback.format_exc()
            try:
                self._report("crashed", name, text)
            except OSError:
                sys.stderr.write(text)
        finally:
            # A late kick signal must not find a half-finished interpreter.
            signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
            os._exit(status)

    def _reap(self, descriptor: int, *, report: bool = True) -> None:
        name, pid = self._children.pop(descriptor)
        self._poll.unregister(descriptor)
        os.close(descriptor)
        _pid, status = os.waitpid(pid, 0)
        if report:
            self._send("exited", name, pid, status)


def main() -> int:
    """`python -m tools.zygote FD LAUNCHER_PID`: warm up, then serve."""
    launcher_pid = int(sys.argv[2])
    os.setpgid(0, 0)
    set_process_name("zygote")
    # Its stdout leads nowhere, as the command's may be read by a program: what a plugin prints goes to stderr.
    sys.stdout = sys.stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # What whoever started us ignores is inherited, and children of such a process leave no status behind.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Ignored until a vCPU installs its handler: its default action would kill whoever it reaches early.
    signal.signal(KICK_SIGNAL, signal.SIG_IGN)
    sys.setswitchinterval(0.0005)
    keep_freed_memory()
    warm_up()
    gc.collect()
    fillers = fill_holes()
    # What is looked up in a class takes the place of what was looked up before, and counts both names down and up: a
    # child's would write to a page of each name that the imports had used.
    if sys.version_info < (3, 12):  # from then on names are not counted
        sys._clear_type_cache()
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as link:
        status = Zygote(link, launcher_pid).run()
    del fillers
    return status


if __name__ == "__main__":
    sys.exit(main())
