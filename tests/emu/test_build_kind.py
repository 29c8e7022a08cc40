"""Which build runs: told by where the module that tells it was loaded from."""

from __future__ import annotations

from pathlib import Path

import pytest

from emu import build_kind
from tests.conftest import SOURCES


@pytest.mark.parametrize(
    ("file", "compiled", "build"),
    [
        ("/somewhere/emu/build_kind.py", False, "pure Python"),
        ("/somewhere/emu/build_kind.cpython-311-x86_64-linux-gnu.so", True, "compiled"),
    ],
)
def test_build_is_that_of_the_file_it_was_loaded_from(file: str, compiled: bool, build: str) -> None:
    """A shared object is compiled; anything else is interpreted."""
    there: dict[str, object] = {"__file__": file, "__name__": "emu.build_kind"}
    exec((SOURCES / "emu" / "build_kind.py").read_text(encoding="utf-8"), there)

    assert (there["COMPILED"], there["BUILD"]) == (compiled, build)


def test_build_that_runs_here_is_told() -> None:
    """What is imported here says of itself what it is."""
    assert (Path(build_kind.__file__).suffix == ".so") == build_kind.COMPILED
    assert ("compiled" if build_kind.COMPILED else build_kind.PURE) == build_kind.BUILD
