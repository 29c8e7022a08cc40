"""Which build runs: pure Python, or one whose hot modules are compiled (`setup.py` says which and how).

This module is one of those. They are made together, into one shared library, so where this one was loaded from says
it of all of them.
"""

from __future__ import annotations

from typing import Final

COMPILED: Final[bool] = __file__.endswith(".so")
PURE: Final = "pure Python"
BUILD: Final[str] = "compiled" if COMPILED else PURE
"""As reports call it."""
