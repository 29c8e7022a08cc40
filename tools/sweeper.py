"""The sweeper outlives the launcher by a moment: of one that was killed it writes a record, and unlinks what is left.

It is forked first, holds the machine's name and pidfds of launcher and zygote, ignores the terminal's
signals, and does nothing until the launcher is gone. Its own death stops the machine.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path

from emu.ipc.segments import SHM, is_held, object_name, unlink_objects, unlink_unheld

GRACE_S = 2.0
"""How long the inner processes have to die after their launcher, before they are killed by number."""
RECORD_S = 10.0
"""How long a crash record may take."""


def run(machine: str, launcher_pidfd: int, zygote_pidfd: int) -> int:
    """Wait for the launcher's end, then for the zygote's, then unlink everything of `machine`."""
    made = _inode(machine)
    # Of a launcher that is gone already that may be the machine of who was quicker with the name.
    is_ours = not _wait(launcher_pidfd, 0) or not is_held(object_name(machine, "control"))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    _wait(launcher_pidfd, None)
    # The zygote and its children die with their parents (PR_SET_PDEATHSIG): names go when nobody uses them.
    if not _wait(zygote_pidfd, GRACE_S):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(zygote_pidfd, signal.SIGKILL)
        _wait(zygote_pidfd, GRACE_S)
    # Somebody may have cleaned up already, and somebody else taken the name for a machine of his own.
    if is_ours and made and _inode(machine) == made:
        _write_crash_record(machine)
    # Also while that was written.
    if is_ours and _inode(machine) in (made, 0):
        unlink_objects(machine)
    return 0


def _write_crash_record(machine: str) -> None:
    """The launcher, which would have, was killed. By a child, in a time of its own: the names go whatever it does."""
    pid = os.fork()
    if pid == 0:
        try:
            from tools.crash import write_orphan_record

            write_orphan_record(machine)
        finally:
            os._exit(0)
    child = os.pidfd_open(pid)
    if not _wait(child, RECORD_S):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(child)


def _inode(machine: str) -> int:
    """Tells one machine from the next one of that name; 0 when there is none."""
    with contextlib.suppress(FileNotFoundError):
        return (SHM / object_name(machine, "control")[1:]).stat().st_ino
    return 0


def _wait(pidfd: int, timeout_s: float | None) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else int(timeout_s * 1000)))


def main(machine: str, launcher_pid: int) -> int:
    """Entry after the fork from the zygote: open both pidfds, let go of everything else, and run."""
    try:
        launcher = os.pidfd_open(launcher_pid)
    except ProcessLookupError:
        unlink_unheld(machine)
        return 0
    zygote = _zygote(launcher_pid)
    if zygote < 0:
        zygote = launcher
    # Above all the zygote's socket: the launcher knows by its end that the zygote is gone.
    _close_all_but(launcher, zygote)
    return run(machine, launcher, zygote)


def _zygote(launcher_pid: int) -> int:
    """A pidfd of our parent if that is the launcher's child, else -1.

    When the zygote died just after the fork our parent is somebody who must be neither awaited nor killed.
    """
    parent = os.getppid()
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(parent)
        if int(Path(f"/proc/{parent}/stat").read_bytes().rsplit(b")", 1)[1].split()[1]) == launcher_pid:
            return pidfd
        os.close(pidfd)
    return -1


def _close_all_but(*kept: int) -> None:
    """Close every descriptor behind stderr but these."""
    first = 3
    for descriptor in sorted(kept):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))
