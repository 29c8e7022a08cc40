"""Assertions stay on: a broken invariant stops the process that finds it, whatever `PYTHONOPTIMIZE` says.

The assertions are the checks of the guest's records, and some of the races end in nothing else. Python compiles them
away before our first line, so a process that was started like that starts again.
"""

from __future__ import annotations

import os
import sys
from typing import Final

OPTIMIZE: Final = "PYTHONOPTIMIZE"


def keep_assertions() -> None:
    """Start this program again if the environment took its assertions away; `python -O` is somebody's own choice."""
    if sys.flags.optimize and os.environ.pop(OPTIMIZE, ""):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
