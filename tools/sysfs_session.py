"""A command in a namespace of its own, and the two processes that see to it that nothing outlives it.

    vmbus-emu (outside) ── passes signals on, waits
        └─ server (in the namespace) ── mounts the tree, answers, waits
              └─ the command, and whatever it starts

The namespace ends with its last process, and its mounts with it. The server is told of the outer process's
death by the end of a pipe; each of the two adopts the orphans below it and kills them when the command has
ended. So whichever of the three is killed, the other two end what is left.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Final, NoReturn

import psutil

from emu.errors import MissingPrerequisite, UserError, VmbusError
from tools.exit_status import ExitStatus
from tools.sysfs_mounts import Mounts
from tools.sysfs_namespace import adopt_orphans, die_with_parent

PASSED_ON: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_SI_KERNEL: Final = 0x80
"""`si_code` of a signal from the terminal: the command, in the same process group, has got it, too."""
_FAILURES: Final[Mapping[str, type[VmbusError]]] = {one.__name__: one for one in (UserError, MissingPrerequisite)}


@dataclass(frozen=True, slots=True)
class Session:
    """What is to run inside, and what the server does for it.

    `prepare` is called in the server: it enters the namespaces and mounts the tree. When the descriptor
    `watched` becomes readable, `on_watched` is called there.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    prepare: Callable[[], Mounts]
    watched: int
    on_watched: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Outside:
    """How signals stood before, for the command to find them so: the mask, and those ignored."""

    mask: set[int]
    ignored: set[int]


def run_inside(session: Session) -> int:
    """Run the command with the tree; its exit status, 128 + n after signal n.

    For a process of one thread that has no children: those that are left at the end are killed. Raises
    UserError when the command cannot be run, and what `prepare` raises.
    """
    sys.stdout.flush()
    ignored = {int(number) for number in PASSED_ON if signal.getsignal(number) is signal.SIG_IGN}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*PASSED_ON, signal.SIGCHLD})
    adopt_orphans()
    orders, order = os.pipe()
    reports, report = os.pipe()
    server = os.fork()
    if server == 0:
        os.close(order)
        os.close(reports)
        _serve(session, Outside({int(number) for number in mask}, ignored), orders, report)
    os.close(orders)
    os.close(report)
    try:
        _raise_report(reports)
        return _wait(server, order)
    finally:
        os.close(order)
        _end_children()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _raise_report(reports: int) -> None:
    """Wait until the command runs; raise what kept it from that."""
    with open(reports, encoding="utf-8") as stream:
        kind, _, text = stream.read().partition(":")
    if kind:
        raise _FAILURES.get(kind, VmbusError)(text)


def _wait(server: int, order: int) -> int:
    """Pass signals on until the server ends; its status is the command's."""
    while True:
        heard = signal.sigwaitinfo({*PASSED_ON, signal.SIGCHLD})
        if heard.si_signo == signal.SIGCHLD:
            for pid, status in _ended():
                if pid == server:
                    if os.WIFSIGNALED(status):
                        name = signal.Signals(os.WTERMSIG(status)).name
                        raise VmbusError(f"the process that served the tree was killed by {name}")
                    return os.WEXITSTATUS(status)
        elif heard.si_code != _SI_KERNEL:
            with contextlib.suppress(BrokenPipeError):
                os.write(order, bytes([heard.si_signo]))


# -- in the server --------------------------------------------------------------------------------------


def _serve(session: Session, outside: Outside, orders: int, report: int) -> NoReturn:
    """Prepare, start the command, answer until it ends, end what it left."""
    status = int(ExitStatus.FAILED)
    mounts: Mounts | None = None
    try:
        adopt_orphans()
        wakeups, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _nothing)
        # Signals for the command come through the pipe and stay blocked here, so that it gets each once.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        mounts = session.prepare()
        child = _start(session, outside, report)
        os.close(report)
        status = _answer(session, mounts, child, orders, wakeups)
    except VmbusError as error:
        os.write(report, f"{type(error).__name__}:{error}".encode())
    except BaseException:
        traceback.print_exc()
    finally:
        if mounts is not None:
            mounts.close()  # before the children: SIGKILL does not end a wait for a reply of ours
        _end_children()
        os._exit(status)


def _answer(session: Session, mounts: Mounts, child: int, orders: int, wakeups: int) -> int:
    """Serve the tree until the command ends, or nobody outside waits for it any more; the exit status."""
    fixed = {orders, wakeups, session.watched}
    while True:
        due_s = mounts.tick()
        poll = select.poll()
        for descriptor in (*fixed, *mounts.descriptors()):
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(None if due_s is None else max(0.0, due_s * 1000)):
            if descriptor == wakeups:
                os.read(wakeups, 512)
                for pid, status in _ended():
                    if pid == child:
                        return _shell_status(status)
            elif descriptor == orders:
                order = os.read(orders, 1)
                if not order:
                    return ExitStatus.FAILED
                os.kill(child, order[0])
            elif descriptor == session.watched:
                session.on_watched()
                fixed.discard(session.watched)
            else:
                mounts.serve(descriptor)


def _start(session: Session, outside: Outside, report: int) -> int:
    """Fork the command: its pid. What keeps it from running goes to `report`, which closes when it runs."""
    server = os.getpid()
    child = os.fork()
    if child:
        return child
    command = list(session.command)
    try:
        die_with_parent(signal.SIGKILL, server)
        signal.set_wakeup_fd(-1)
        # Python ignores some signals, and what a process ignores its program goes on ignoring.
        for number in (*PASSED_ON, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_IGN if number in outside.ignored else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, outside.mask)
        os.execvpe(command[0], command, {**os.environ, **session.environment})
    except OSError as error:
        text = f"cannot run {command[0]}: {error.strerror}"
        os.write(report, f"{UserError.__name__}:{text}".encode())
    finally:
        os._exit(ExitStatus.USAGE)


def _shell_status(status: int) -> int:
    """A wait status as a shell says it."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _ended() -> list[tuple[int, int]]:
    """Children that have ended, with their wait status."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while (one := os.waitpid(-1, os.WNOHANG))[0]:
            ended.append(one)
    return ended


def _end_children() -> None:
    """Kill every child, and those that it adopts thereby, until there is none."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            os.waitpid(-1, 0)


def _nothing(_signum: int, _frame: FrameType | None) -> None:
    """A handler, so that the signal reaches the wakeup descriptor."""
