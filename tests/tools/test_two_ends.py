"""Two ends of a measurement: both on their cores, both gone when one fails."""

from __future__ import annotations

import os
import signal

from tools.two_ends import run_both, two_cpus

CPUS = two_cpus() or (0, 0)


def test_ctrl_c_is_left_to_who_started_the_ends() -> None:
    """A terminal sends SIGINT to every process: the ends neither die of it nor print a traceback."""

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    run_both("two ends that are interrupted", interrupted, interrupted, CPUS, deadline_s=20)

    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
