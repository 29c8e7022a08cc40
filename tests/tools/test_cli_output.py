"""What commands print: plain for pipes, drawn for terminals, colour only where it is wanted."""

from __future__ import annotations

import io
import json
import sys
from uuid import UUID

import pytest

from tools.output import colored, console, narrates, print_json, print_table


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Claim to be one."""
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stdout and stderr a colour terminal of 80 columns."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    return stream


def test_json_is_one_object_with_its_schema(capsys: pytest.CaptureFixture[str]) -> None:
    """Name and version of the schema come first; values that JSON lacks are text."""
    print_json("ps", 2, {"id": UUID(int=1)})

    assert json.loads(capsys.readouterr().out) == {
        "schema": {"name": "vmbus-emu.ps", "version": 2},
        "id": "00000000-0000-0000-0000-000000000001",
    }


def test_table_through_a_pipe_is_aligned_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Columns line up, nothing is cut and no line ends in blanks."""
    print_table(("a", "long"), [(1, "x" * 200), ("four", "")], title="never shown")

    assert capsys.readouterr().out == f"a     long\n1     {'x' * 200}\nfour\n"


def test_table_without_rows_is_its_headings(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing found still says what was looked for."""
    print_table(("a", "b"), [])

    assert capsys.readouterr().out == "a  b\n"


def test_table_on_a_terminal_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person sees a frame; brackets in a cell are text, not markup."""
    screen = terminal(monkeypatch)

    print_table(("what", "found"), [("x", "[Heartbeat]")])

    assert "[Heartbeat]" in screen.getvalue()
    assert "\N{BOX DRAWINGS LIGHT VERTICAL}" in screen.getvalue()


def test_what_is_typed_again_is_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a narrow terminal a column that is whole stays so, and the others give way."""
    screen = terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "44")

    print_table(("name", "title"), [("rescind-behind-its-own-offer", "A rescind waits in line " * 3)], whole=("name",))

    assert " rescind-behind-its-own-offer " in screen.getvalue()


def test_only_long_words_are_cut_where_a_table_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A UUID may be folded on a narrow terminal; numbers and names beside it may not."""
    screen = terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "44")

    print_table(("relid", "instance", "state"), [(2047, UUID(int=1), "opened")])

    assert "│ 2047  │ 00000000" in screen.getvalue()
    assert "│ opened │" in screen.getvalue()
    assert "0001 " in screen.getvalue()


def test_table_loses_its_frame_before_its_words_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the words fit only without lines between them, the columns still stand below their headings."""
    screen = terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("NO_COLOR", "1")

    print_table(("stage", "count", "p50 us", "p99 us"), [("callback_to_task", 168, "5.0", "7.1")])

    assert [line.rstrip() for line in screen.getvalue().splitlines()] == [
        "                       p50 p99",
        "stage            count us  us",
        "callback_to_task 168   5.0 7.1",
    ]


def test_row_is_a_paragraph_where_its_words_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of few columns no number is cut to pieces: each cell stands behind its heading."""
    screen = terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "29")

    print_table(("stage", "count", "p50 us", "p99 us"), [("callback_to_task", 168, "5.0", "")], title="Stages")

    assert screen.getvalue() == "Stages\ncallback_to_task: count 168,\n  p50 us 5.0, p99 us -\n"


def test_headings_alone_are_a_line_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing found still says what was looked for, on a terminal of few columns, too."""
    screen = terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "18")

    print_table(("relid", "instance", "state"), [])

    assert screen.getvalue() == "relid, instance,\nstate\n"


@pytest.mark.parametrize(
    ("variable", "value", "plain"),
    [("NO_COLOR", "1", True), ("NO_COLOR", "", False), ("TERM", "dumb", True)],
)
def test_colour_is_left_out_where_it_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, plain: bool
) -> None:
    """NO_COLOR (not empty) and a dumb terminal get no escape sequence at all."""
    screen = terminal(monkeypatch)
    monkeypatch.setenv(variable, value)

    console(screen).print("word", style="bold red")

    assert colored(screen) is not plain
    assert ("\x1b" in screen.getvalue()) is not plain


@pytest.mark.parametrize("term", ["dumb", "xterm-256color"])
def test_terminal_is_as_wide_as_it_is(monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    """A dumb one, too, so that a table fits it."""
    screen = terminal(monkeypatch)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "60")

    assert console(screen).width == 60


def test_nobody_watches_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """Progress is for terminals."""
    assert not narrates()


def test_somebody_watches_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """And there it is shown."""
    terminal(monkeypatch)

    assert narrates()
