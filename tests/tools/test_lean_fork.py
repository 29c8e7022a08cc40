"""What a child of the zygote has to do before it does anything."""

from __future__ import annotations

import subprocess
import sys

IMPORT_AND_TELL = """
import os
registered, register = [], os.register_at_fork
os.register_at_fork = lambda **handlers: registered.append(handlers) or register(**handlers)
spy = os.register_at_fork
import tools.zygote, random, threading
assert os.register_at_fork is spy
print(registered)
"""


def test_nothing_runs_in_a_child_of_the_zygote() -> None:
    """Neither what it imports itself nor what that brings has a handler for forks; what comes later may have one."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_TELL], check=True, capture_output=True, text=True, timeout=60
    )

    assert done.stdout == "[]\n"


def test_child_of_a_lean_fork_has_threads_and_a_generator_of_its_own() -> None:
    """A thread that it starts is joined, and who draws from a generator with a seed draws the same in each child."""
    program = """
import os
from tools import lean_fork
import random, threading
pid = os.fork()
if pid == 0:
    drawn = []
    thread = threading.Thread(target=lambda: drawn.append(random.Random(7).random()))
    thread.start()
    thread.join(10)
    ok = drawn == [random.Random(7).random()] and threading.current_thread() is threading.main_thread()
    os._exit(0 if ok and threading.active_count() == 1 else 1)
print(os.waitpid(pid, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)

    assert done.stdout == "0\n"
