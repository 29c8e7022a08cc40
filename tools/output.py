"""What a command prints: data on stdout, talk on stderr, and nothing fancy for who is not a terminal.

Through a pipe a table is plain aligned text without colour, frame or cut, and there is no progress. NO_COLOR
(not empty) and TERM=dumb take colour away on a terminal. rich is imported only when a terminal is written to.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console


_FRAME: Final = 3
"""Characters that a drawn column needs besides its text: a line, and a blank on each side."""

_CUT: Final = 20
"""A drawn table may cut words that are longer than so many characters (an instance's UUID), and no others."""

told = False
"""Whether this process has printed its JSON object, or begun to."""


def print_json(name: str, version: int, body: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout; `schema` names it, its version rises when a field changes meaning."""
    global told
    document = {"schema": {"name": f"vmbus-emu.{name}", "version": version}, **body}
    text = json.dumps(document, indent=2, default=str) + "\n"
    told = True
    sys.stdout.write(text)
    sys.stdout.flush()


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "", whole: Sequence[str] = ()
) -> None:
    """Print rows under headings: a drawn table on a terminal, aligned columns elsewhere.

    Columns that are `whole` are not folded on a narrow terminal, as what somebody types again stands in them.
    Where the terminal is too narrow for the words of a table its frame is left out, or each row is a paragraph.
    """
    texts = [[str(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        print_plain(columns, texts)
        return
    from rich.table import Table
    from rich.text import Text

    screen = console(sys.stdout)
    room, framed = screen.width - (_FRAME * len(columns) + 1), True
    cells = [[column, *below] for column, *below in zip(columns, *texts, strict=True)]
    natural = [max(map(len, column)) for column in cells]
    least = [
        width if column[0] in whole else _least_width(column) for column, width in zip(cells, natural, strict=True)
    ]
    if sum(least) > room:
        room, framed = screen.width - (len(columns) - 1), False
    if sum(least) > room:
        _print_paragraphs(columns, texts, title, screen.width)
        return
    table = Table(title=title or None, title_justify="left", header_style="bold")
    if not framed:
        table.box, table.padding, table.pad_edge = None, (0, 1, 0, 0), False
    for column, width in zip(columns, _fitted(natural, least, room), strict=True):
        table.add_column(column, overflow="fold", width=width)
    for row in texts:
        table.add_row(*map(Text, row))
    screen.print(table)


def _least_width(cells: Sequence[str]) -> int:
    """Characters that a drawn column must have, so that no word but a very long one is cut."""
    return min(_CUT, max((len(word) for cell in cells for word in cell.split()), default=1))


def _fitted(natural: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Widths of columns that together take no more than `room`: the widest give way first, none below its least."""
    widths = list(natural)
    for _ in range(sum(natural) - room):
        widest = max(range(len(widths)), key=lambda n: (widths[n] > least[n], widths[n]))
        widths[widest] -= 1
    return widths


def _print_paragraphs(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str, width: int) -> None:
    """Print each row by itself: what stands first in it, then every other cell behind its heading."""
    if title:
        sys.stdout.write(title + "\n")
    for first, *others in rows:
        cells = ", ".join(f"{column} {cell or '-'}" for column, cell in zip(columns[1:], others, strict=True))
        paragraph = textwrap.wrap(f"{first}: {cells}" if cells else first, width, subsequent_indent="  ")
        sys.stdout.write("\n".join(paragraph) + "\n")
    if not rows:
        sys.stdout.write(textwrap.fill(", ".join(columns), width) + "\n")


def print_plain(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns, two spaces between them, for `grep` and `awk` and people."""
    widths = [max(len(row[n]) for row in (columns, *rows)) for n in range(len(columns))]
    for row in (columns, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")


def say(text: str) -> None:
    """Say something to a person, on stderr; where there is no room for it the work goes on all the same."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except BrokenPipeError:
        raise
    except OSError:
        silence(sys.stderr)


def silence(stream: IO[str]) -> None:
    """What is buffered for a reader who left, or a full disk, must not be tried again when the interpreter ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def narrates() -> bool:
    """Whether somebody watches: progress is shown on a terminal only."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def colored(stream: IO[str]) -> bool:
    """Whether colour may be written to a stream."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def console(stream: IO[str]) -> Console:
    """A rich console on a stream, without any escape sequence for colour or weight where none is wanted."""
    from rich.console import Console

    if colored(stream):
        return Console(file=stream, highlight=False)
    if os.environ.get("TERM") == "dumb":
        # rich takes it for 80 columns wide, whatever it is.
        width, height = shutil.get_terminal_size()
        return Console(file=stream, highlight=False, color_system=None, no_color=True, width=width, height=height)
    return Console(file=stream, highlight=False, color_system=None, no_color=True)
