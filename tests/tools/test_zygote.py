"""What the zygote does for its children before there are any: pages that nobody has written to."""

from __future__ import annotations

import os
import subprocess
import sys

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
