"""Imported first by the zygote: modules whose handlers would run in each child of a fork, without these handlers.

`random` would seed its common generator, from which nobody here draws (each draws from one of his own, which has a
seed). `threading` would put its tables in order, which they are: a zygote has one thread, and who is forked goes on as
that. Both together write to 160 pages, which each child then has to itself: 0.6 MB.
"""

from __future__ import annotations

import os
from typing import Any


def _register_nothing(**_handlers: Any) -> None:
    """In place of `os.register_at_fork`."""


_register_at_fork = os.register_at_fork
os.register_at_fork = _register_nothing
try:
    import random as random
    import threading as threading
finally:
    os.register_at_fork = _register_at_fork
