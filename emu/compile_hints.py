"""What a compiled build (`setup.py`) has to know about a class; in pure Python it says nothing.

A class that is compiled cannot be the base of one that is not, unless it says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr as mypyc_attr
else:

    def mypyc_attr(**_hints):
        """A class decorator that leaves the class alone."""
        return lambda cls: cls
