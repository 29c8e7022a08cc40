"""A generator that a plugin makes and drops raises where it was dropped; all other code is as it was written."""

from __future__ import annotations

import traceback
from typing import Any

import pytest

from emu.discarded import compiled, namespace

MADE = "def made():\n    yield 1\n"


def run(text: str) -> dict[str, Any]:
    """The names of a module of this text."""
    names = namespace()
    exec(compiled(text.encode(), "plugin.py"), names)
    return names


@pytest.mark.parametrize(
    "dropped",
    [
        "made()",
        "class C:\n    def made(self): yield\n    def serve(self):\n        self.made()\nC().serve()",
        "def serve():\n    if True:\n        made()\n    yield\nnext(serve())",
        "(one for one in ()).__iter__()",
    ],
)
def test_a_generator_that_is_dropped_raises(dropped: str) -> None:
    """In a module, a method, a generator: wherever the call is a statement."""
    with pytest.raises(TypeError, match=r"was called and has not run: it is a generator; write `yield from`"):
        run(MADE + dropped)


def test_it_raises_in_the_line_that_dropped_it() -> None:
    """The traceback has the author's file and line, in the text of the file as it is."""
    with pytest.raises(TypeError, match=r"^made was called") as told:
        run(MADE + "\n\nmade(\n)")

    frames = [(one.filename, one.lineno) for one in traceback.extract_tb(told.value.__traceback__)]
    assert ("plugin.py", 5) in frames


@pytest.mark.parametrize(
    "kept",
    [
        "one = made()",
        "[made()]",
        "held = []\nheld.append(made())\nheld.pop()",
        "def serve():\n    yield from made()\nlist(serve())",
        "def serve():\n    yield made()\nlist(serve())",
        "one = made()\nnext(one)\none.__iter__()",
        "print(end='')",
        "async def later(): ...\nlater().close()",
    ],
)
def test_what_is_kept_run_or_no_generator_is_let_be(kept: str) -> None:
    """A value that is used is its user's business, and so is a generator that has begun."""
    run(MADE + kept)


def test_docstrings_and_what_is_no_program_stay_what_they_are() -> None:
    """The first statement is the docstring; a syntax error is one, with its line."""
    assert run('"""Says so."""\ndef f():\n    "And so."\n')["f"].__doc__ == "And so."
    assert run('"""Says so."""')["__doc__"] == "Says so."
    with pytest.raises(SyntaxError) as told:
        run("one = 1\nbreak\n")
    assert told.value.lineno == 2
