"""Real processes for tests: forked from the test, watched, never left behind."""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

Body = Callable[[], None]

TIMEOUT_S = 60.0


class Forked:
    """A forked process that runs `body`; a context manager that expects it to end well."""

    def __init__(self, body: Body) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run(body)
        self._pidfd = os.pidfd_open(self.pid)
        self._status: int | None = None

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Its wait status; an assertion when it does not end in time."""
        if self._status is None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            ended = poll.poll(timeout_s * 1000)
            if not ended:
                os.kill(self.pid, signal.SIGKILL)
            _pid, self._status = os.waitpid(self.pid, 0)
            os.close(self._pidfd)
            assert ended, f"process {self.pid} did not end within {timeout_s} s"
        return self._status

    def kill(self) -> None:
        """Kill it, whatever it does."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def __enter__(self) -> Forked:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.kill()
            return
        status = self.wait()
        assert status == 0 or os.WIFSIGNALED(status), f"a forked process failed with status {status:#x}"


def _run(body: Body) -> NoReturn:
    status = 1
    try:
        body()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


class Crowd:
    """Several forked processes; ends with all of them, killed if the test failed."""

    def __init__(self) -> None:
        self._members: list[Forked] = []

    def start(self, body: Body) -> Forked:
        """Fork one more."""
        self._members.append(Forked(body))
        return self._members[-1]

    def __enter__(self) -> Crowd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for member in self._members:
                member.kill()
            return
        failed = [member.pid for member in self._members if member.wait() != 0]
        assert not failed, f"processes {failed} failed; their tracebacks are above"
