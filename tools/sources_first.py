"""A compiled build can run its sources, which lie beside what is compiled (`setup.py`).

As a program it runs a module of ours that way: `python -m tools.sources_first MODULE ARGUMENT…`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, ModuleSpec, SourceFileLoader
from types import ModuleType

PURE = "VMBUS_EMU_PURE"
"""If it is set, commands run the sources: for a debugger, or to see what compiling them gives."""
OURS = frozenset(("emu", "guestproc", "hostproc", "tools"))


class SourcesFirst:
    """Finds the modules of our packages where their sources are, and no others."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The source of a module of ours; None for whatever else is imported."""
        if path is None or name.partition(".")[0] not in OURS:
            return None
        for folder in path:
            spec = FileFinder(folder, (SourceFileLoader, SOURCE_SUFFIXES)).find_spec(name)
            if spec is not None:
                return spec
        return None


def take_sources() -> None:
    """From here on, import nothing compiled of ours."""
    sys.meta_path.insert(0, SourcesFirst)


if __name__ == "__main__":
    from runpy import run_module

    take_sources()
    sys.argv[:] = sys.argv[1:]
    run_module(sys.argv[0], run_name="__main__", alter_sys=True)
