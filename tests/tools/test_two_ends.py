"""Two ends of a measurement: both on their cores, both gone when one fails."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable

import psutil
import pytest

from tools.bench_doorbell import bare_signals
from tools.testing import wait_for
from tools.two_ends import run_both, two_cpus

CPUS = two_cpus() or (0, 0)


def spin() -> None:
    """What most ends do until the other one has done something."""
    while True:
        os.sched_yield()


def two_that_spin() -> None:
    """For a minute, if nobody ends them before."""
    run_both("two ends that spin", spin, spin, CPUS, deadline_s=60)


def signals_without_end() -> None:
    """A process that computes and is interrupted again and again."""
    bare_signals(10**9, CPUS)


@pytest.mark.parametrize("measure", [two_that_spin, signals_without_end])
def test_nobody_spins_for_a_killed_measurement(measure: Callable[[], None]) -> None:
    """`kill -9` of who started them ends the processes that it measures with."""
    measuring = multiprocessing.get_context("fork").Process(target=measure)
    measuring.start()
    assert measuring.pid is not None
    of_it = psutil.Process(measuring.pid)
    try:
        wait_for(lambda: any(one.cpu_times().user > 0 for one in of_it.children()), "an end that computes")
        ends = of_it.children()
    finally:
        measuring.kill()
        measuring.join()

    try:
        wait_for(lambda: not any(_runs(end) for end in ends), "the ends to be gone", 5.0)
    finally:
        for end in ends:
            with contextlib.suppress(psutil.Error):
                end.kill()


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_ctrl_c_is_left_to_who_started_the_ends() -> None:
    """A terminal sends SIGINT to every process: the ends neither die of it nor print a traceback."""

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    run_both("two ends that are interrupted", interrupted, interrupted, CPUS, deadline_s=20)

    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
