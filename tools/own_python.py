"""How a command starts another Python of ours: with our modules, not with those that lie where the user is.

`python -m` looks into the current directory first: a `random.py`, or a `tools` of somebody else's there, would be
imported in place of what we mean.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from emu.assertions import OPTIMIZE
from tools.sources_first import PURE

_ROOT = str(Path(__file__).resolve().parent.parent)


def own_python(module: str, *arguments: str) -> list[str]:
    """The words that run a module of ours; they want `own_environment`."""
    sources = ("tools.sources_first",) if os.environ.get(PURE) else ()
    return [sys.executable, "-P", "-m", *sources, module, *arguments]


def own_environment() -> dict[str, str]:
    """The environment in which our modules are found, assert, and end where they end (`PYTHONINSPECT`)."""
    path = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH", ""))))
    dropped = (OPTIMIZE, "PYTHONINSPECT")
    return {**{name: value for name, value in os.environ.items() if name not in dropped}, "PYTHONPATH": path}
