"""Semaphores: a token for a wake, a deadline on every block, and whatever a guest does to one is survived."""

from __future__ import annotations

import contextlib
import os
import signal

import posix_ipc
import pytest

from emu.errors import MissingPrerequisite, UserError
from emu.ipc.segments import SHM, object_name, unlink_semaphore
from emu.ipc.semaphores import Wakeup
from tests.processes import Forked


@pytest.fixture
def name(machine_name: str) -> str:
    """The name of one semaphore of a machine."""
    return object_name(machine_name, "vp.0")


def test_new_semaphore_has_no_token(name: str) -> None:
    """Nobody is woken by a semaphore that was only made."""
    assert Wakeup.create(name).block(0) is False


def test_one_post_is_one_token(name: str) -> None:
    """A post is taken once, also through another handle."""
    ours, theirs = Wakeup.create(name), Wakeup.attach(name)

    theirs.post()

    assert ours.try_take() is True
    assert ours.try_take() is False


def test_post_wakes_a_blocked_process(name: str) -> None:
    """Another process that blocks goes on with the token."""
    wakeup = Wakeup.create(name)

    def sleep() -> None:
        assert Wakeup.attach(name).block(30)

    with Forked(sleep):
        wakeup.post()

    assert wakeup.try_take() is False


def test_signal_ends_a_block(name: str) -> None:
    """A signal handler ran: the sleeper looks again instead of sleeping on."""
    wakeup = Wakeup.create(name)
    ran: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _frame: ran.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)

        woken = wakeup.block(30)
    finally:
        signal.signal(signal.SIGALRM, before)

    assert woken is False
    assert ran == [signal.SIGALRM]


def test_wait_does_not_end_by_the_wall_clock(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks `posix_ipc` to wait: its deadline is one of the wall clock, which somebody may set back."""
    wakeup = Wakeup.create(name)

    def acquire(timeout_s: float) -> None:
        assert timeout_s <= 0, "this is a wait until a time of the wall clock"
        wakeup.semaphore.acquire(timeout_s)

    monkeypatch.setattr(wakeup, "_acquire", acquire)

    assert wakeup.block(0.01) is False
    wakeup.post()
    assert wakeup.block(30) is True
    assert wakeup.try_take() is False


def test_wait_where_the_c_library_knows_the_wall_clock_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks all the same, by that clock."""
    monkeypatch.setattr("emu.ipc.semaphores._sem_clockwait", None)
    wakeup = Wakeup.create(name)

    assert wakeup.block(0.01) is False
    wakeup.post()
    assert wakeup.block(30) is True


def test_name_that_is_gone_before_the_first_wait(name: str) -> None:
    """A machine that ends takes its names away first: who is still there waits all the same."""
    wakeup = Wakeup.create(name)
    posix_ipc.unlink_semaphore(name)

    wakeup.post()

    assert wakeup.block(30) is True
    assert wakeup.block(0.01) is False


def test_full_semaphore_takes_another_post(name: str) -> None:
    """A guest that posted all tokens there can be does not make the host fail at its own post."""
    posix_ipc.Semaphore(name, posix_ipc.O_CREX, initial_value=posix_ipc.SEMAPHORE_VALUE_MAX)
    wakeup = Wakeup.attach(name)

    wakeup.post()

    assert wakeup.try_take() is True


def test_existing_name_is_refused_with_the_cure(name: str) -> None:
    """A name that is taken is one line that says how to get rid of it."""
    Wakeup.create(name)

    with pytest.raises(UserError, match="exists already; `vmbus-emu clean`"):
        Wakeup.create(name)


def test_new_semaphore_is_as_the_c_library_makes_one(name: str) -> None:
    """The same bytes, for the same user alone: whatever program opens it finds what `sem_open` would have made."""
    path = SHM / f"sem.{name[1:]}"
    posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600).close()
    theirs = path.read_bytes(), path.stat().st_mode
    posix_ipc.unlink_semaphore(name)

    Wakeup.create(name).close()

    assert (path.read_bytes(), path.stat().st_mode) == theirs


@pytest.mark.parametrize("at", ["write", "close"])
def test_who_is_killed_while_a_semaphore_is_made_leaves_no_other_name(name: str, at: str) -> None:
    """The file has the semaphore's own name from the beginning: whoever removes what the machine left finds it."""
    pid = os.fork()
    if pid == 0:
        setattr(os, at, lambda *_arguments: os.kill(os.getpid(), signal.SIGKILL))
        with contextlib.suppress(BaseException):
            Wakeup.create(name)
        os._exit(0)
    _pid, status = os.waitpid(pid, 0)

    assert os.WTERMSIG(status) == signal.SIGKILL
    assert [one.name for one in SHM.iterdir() if name[1:] in one.name] == [f"sem.{name[1:]}"]
    assert unlink_semaphore(name)


def test_missing_name_is_refused(name: str) -> None:
    """A semaphore of a machine that does not run is one line, too."""
    with pytest.raises(UserError, match="no such machine is running"):
        Wakeup.attach(name)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), posix_ipc.PermissionsError("no")])
def test_refusal_of_the_system_is_a_missing_prerequisite(
    name: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room, or no permission, is something this computer lacks."""

    def refuse(*_arguments: object, **_keywords: object) -> None:
        raise error

    monkeypatch.setattr(posix_ipc, "Semaphore", refuse)

    with pytest.raises(MissingPrerequisite, match="cannot create semaphore"):
        Wakeup.create(name)


def test_semaphore_of_another_user_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of somebody else is out of reach, in one line."""

    def refuse(*_arguments: object) -> None:
        raise posix_ipc.PermissionsError("no")

    monkeypatch.setattr(posix_ipc, "Semaphore", refuse)

    with pytest.raises(UserError, match="another user's"):
        Wakeup.attach(name)
