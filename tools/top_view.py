"""How `top` lays a frame out: sections of lines that fit a terminal of any size, or plain tables for a pipe.

Channels take the room that processors and processes leave, and are scrolled; what does not fit is counted. A ring is
a bar as full as the ring is. Sorting and the filter are of channels and processes alike, where they make sense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from tools.top_sample import ChannelRow, Frame, ProcessRow, VpRow

if TYPE_CHECKING:
    from rich.text import Text

BAR: Final = 8
EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
LEAST_CHANNELS: Final = 3
HELP: Final = "q quit  p pause  s S sort  r reverse  / filter  ↑↓ PgUp PgDn scroll  + - speed"

SORT_KEYS: Final[dict[str, Callable[[ChannelRow], Any]]] = {
    "relid": lambda row: row.relid,
    "class": lambda row: (row.class_name, row.relid),
    "cpu": lambda row: (row.cpu, row.relid),
    "state": lambda row: (row.state, row.relid),
    "out": lambda row: -(row.out_fill or 0.0),
    "in": lambda row: -(row.in_fill or 0.0),
    "packets": lambda row: -row.packets,
    "bytes": lambda row: -row.bytes_in,
    "interrupts": lambda row: -row.interrupts,
    "oldest": lambda row: -row.oldest_s,
}
"""What channels may be sorted by; figures from the highest down."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """How somebody wants to see it: `typing` is the filter while it is being typed, None otherwise.

    Enter keeps what was typed, Escape what was there before.
    """

    sort: str = "relid"
    reverse: bool = False
    filter: str = ""
    paused: bool = False
    interval_s: float = 1.0
    first: int = 0
    typing: str | None = None

    @property
    def sought(self) -> str:
        """The filter as it is now: what is being typed narrows at once."""
        return self.filter if self.typing is None else self.typing


def wished(wishes: Wishes, key: str) -> Wishes | None:
    """The wishes after a key was pressed; None: to quit. A key that means nothing changes nothing."""
    if wishes.typing is not None:
        return _typed(wishes, wishes.typing, key)
    if key in ("q", "Q", "escape"):
        return None
    names = list(SORT_KEYS)
    place = names.index(wishes.sort)
    changes: dict[str, dict[str, Any]] = {
        "p": {"paused": not wishes.paused},
        " ": {"paused": not wishes.paused},
        "s": {"sort": names[(place + 1) % len(names)], "first": 0},
        "S": {"sort": names[place - 1], "first": 0},
        "r": {"reverse": not wishes.reverse},
        "/": {"typing": wishes.filter},
        "+": {"interval_s": min(10.0, wishes.interval_s * 2)},
        "-": {"interval_s": max(0.125, wishes.interval_s / 2)},
        "down": {"first": wishes.first + 1},
        "up": {"first": max(0, wishes.first - 1)},
        "page-down": {"first": wishes.first + 10},
        "page-up": {"first": max(0, wishes.first - 10)},
        "home": {"first": 0},
    }
    return replace(wishes, **changes.get(key, {}))


def _typed(wishes: Wishes, text: str, key: str) -> Wishes:
    if key == "enter":
        return replace(wishes, filter=text, typing=None, first=0)
    if key == "escape":
        return replace(wishes, typing=None)
    if key == "backspace":
        return replace(wishes, typing=text[:-1], first=0)
    return replace(wishes, typing=text + key, first=0) if len(key) == 1 and key.isprintable() else wishes


def chosen_channels(frame: Frame, wishes: Wishes) -> list[ChannelRow]:
    """The channels that pass the filter (relid, class, state or cpuN has it), sorted."""
    text = wishes.sought.lower()
    rows = [row for row in frame.channels if text in f"{row.relid} {row.class_name} {row.state} cpu{row.cpu}".lower()]
    return sorted(rows, key=SORT_KEYS[wishes.sort], reverse=wishes.reverse)


# -- cells ---------------------------------------------------------------------------------------------------


def bar(fill: float | None, width: int = BAR) -> str:
    """A bar as full as the ring is; not empty as long as there is anything in it."""
    if fill is None:
        return "-".ljust(width)
    eighths = min(8 * width, max(round(fill * 8 * width), 1 if fill > 0 else 0))
    whole, part = divmod(eighths, 8)
    return ("█" * whole + (EIGHTHS[part] if part else "")).ljust(width, "·")


def percent(fill: float | None) -> str:
    """How full a ring is, for who reads by machine."""
    return "-" if fill is None else f"{100 * fill:.0f}%"


def count(value: float) -> str:
    """A rate in at most six characters."""
    for limit, divisor, unit in ((1e4, 1, ""), (1e7, 1e3, "k"), (1e10, 1e6, "M")):
        if value < limit:
            return f"{value / divisor:.0f}{unit}"
    return f"{value / 1e9:.0f}G"


def age(seconds: float) -> str:
    """How long something has waited; a dash for nothing."""
    if seconds <= 0:
        return "-"
    if seconds < 1:
        return f"{seconds * 1e3:.0f}ms" if seconds >= 0.001 else f"{seconds * 1e6:.0f}us"
    return f"{seconds:.1f}s" if seconds < 100 else f"{seconds / 60:.0f}min"


Column = tuple[str, int, bool]
"""Heading, width, whether it stands at the right."""

CHANNEL_COLUMNS: Final[tuple[Column, ...]] = (
    ("relid", 5, True),
    ("class", 10, False),
    ("cpu", 3, True),
    ("state", 8, False),
    ("out", BAR, False),
    ("in", BAR, False),
    ("pkt/s", 6, True),
    ("B/s in", 6, True),
    ("irq/s", 6, True),
    ("mask", 4, False),
    ("open", 4, True),
    ("oldest", 6, True),
)
NARROW: Final = frozenset({"state", "B/s in"})
"""Channel columns that a terminal of less than 100 columns does without."""
VP_COLUMNS: Final[tuple[Column, ...]] = (
    ("vp", 3, True),
    ("cpu", 3, True),
    ("state", 14, False),
    ("f3/s", 6, True),
    ("fd/s", 6, True),
    ("fb/s", 6, True),
    ("halts", 6, True),
    ("paid", 6, True),
    ("vain", 6, True),
)
PROCESS_COLUMNS: Final[tuple[Column, ...]] = (
    ("process", 14, False),
    ("pid", 7, True),
    ("cpu %", 6, True),
    ("PSS MB", 7, True),
    ("switches/s", 10, True),
)


def channel_cells(row: ChannelRow, fill: Callable[[float | None], str] = bar) -> tuple[str, ...]:
    """A channel in the order of its columns; `fill` shows how full a ring is."""
    return (
        str(row.relid),
        row.class_name,
        str(row.cpu),
        row.state,
        fill(row.out_fill),
        fill(row.in_fill),
        count(row.packets),
        count(row.bytes_in),
        count(row.interrupts),
        row.mask,
        str(row.unanswered),
        age(row.oldest_s),
    )


def vp_cells(row: VpRow) -> tuple[str, ...]:
    """A processor in the order of its columns."""
    rates = (*(row.vectors[name] for name in ("f3", "fd", "fb")), row.halts, row.polls_paid, row.polls_vain)
    return (str(row.index), str(row.cpu), row.run_state, *map(count, rates))


def process_cells(row: ProcessRow) -> tuple[str, ...]:
    """A process in the order of its columns."""
    return (row.name, str(row.pid), f"{row.cpu_percent:.1f}", f"{row.pss / 1e6:.1f}", count(row.switches))


def aligned(columns: Sequence[Column], cells: Sequence[str], without: frozenset[str] = frozenset()) -> str:
    """Cells in their columns, one space between; one that is too long is cut."""
    shown = [
        text[:width].rjust(width) if right else text[:width].ljust(width)
        for (heading, width, right), text in zip(columns, cells, strict=True)
        if heading not in without
    ]
    return " ".join(shown)


# -- a screen --------------------------------------------------------------------------------------------------


def scrolled(wishes: Wishes, frame: Frame, height: int) -> Wishes:
    """The wishes with a first line from which the rest still fills the room."""
    last = len(chosen_channels(frame, wishes)) - _visible(frame, height)
    return replace(wishes, first=max(0, min(wishes.first, last)))


def screen(name: str, frame: Frame, wishes: Wishes, width: int, height: int) -> Text:
    """The whole screen: never more lines than `height`, never wider than `width`."""
    from rich.text import Text

    vps, processes = _sections(frame, height)
    lines = [
        (_title(name, frame, wishes), "bold"),
        *_channel_lines(frame, wishes, width, _visible(frame, height)),
        *vps,
        *processes,
    ]
    foot = f"filter: {wishes.typing}█" if wishes.typing is not None else HELP
    lines = lines[: height - 1]
    # The foot stays where it is while a filter narrows.
    lines += [("", "")] * (height - 1 - len(lines))
    lines.append((foot, "dim" if wishes.typing is None else "bold"))
    text = Text(no_wrap=True, overflow="crop")
    for number, (line, style) in enumerate(lines):
        text.append(line[:width] + ("\n" if number < len(lines) - 1 else ""), style=style)
    return text


Line = tuple[str, str]
"""Its text, and the style of it."""


def _title(name: str, frame: Frame, wishes: Wishes) -> str:
    head = frame.head
    version = f"VMBus {head.version >> 16}.{head.version & 0xFFFF}" if head.version else "no guest"
    state = "PAUSED" if wishes.paused else f"every {wishes.interval_s:g} s"
    return f"{name}  {version}  {head.open}/{head.offers} open  {count(frame.packets)} packets/s  {state}"


def _visible(frame: Frame, height: int) -> int:
    """How many channels have room: what title, headings, the other sections and the foot leave."""
    taken = sum(len(lines) for lines in _sections(frame, height))
    return max(LEAST_CHANNELS, height - 4 - taken)


def _channel_lines(frame: Frame, wishes: Wishes, width: int, visible: int) -> list[Line]:
    without = NARROW if width < 100 else frozenset()
    rows = chosen_channels(frame, wishes)
    order = f"by {wishes.sort}{' reversed' if wishes.reverse else ''}"
    which = f"  of {len(frame.channels)}, filter {wishes.sought}" if wishes.sought else ""
    first = wishes.first
    shown = rows[first : first + visible]
    more = len(rows) - len(shown)
    hidden = f"  ({first + 1} to {first + len(shown)} of {len(rows)})" if more else ""
    lines = [
        (f"channels  {order}{which}{hidden}", "cyan"),
        (aligned(CHANNEL_COLUMNS, [heading for heading, _, _ in CHANNEL_COLUMNS], without), "bold"),
    ]
    return lines + [(aligned(CHANNEL_COLUMNS, channel_cells(row), without), _style(row)) for row in shown]


def _style(row: ChannelRow) -> str:
    """A channel that is stuck stands out, one that is quiet stands back."""
    if row.oldest_s > 1 or (row.out_fill or 0) > 0.9 or (row.in_fill or 0) > 0.9:
        return "red"
    return "" if row.packets or row.interrupts else "dim"


def _sections(frame: Frame, height: int) -> tuple[list[Line], list[Line]]:
    """Processors and processes, cut so that channels keep their share of a low terminal; what those leave is theirs."""
    most = max(2, (height - 6 - LEAST_CHANNELS) // 3)
    left = height - 6 - len(frame.channels) - sum(min(most, len(rows)) for rows in (frame.vps, frame.processes))
    more = max(0, min(left, len(frame.processes) - most))
    most_vps, most_processes = most + max(0, left - more), most + more
    vps = [
        (aligned(VP_COLUMNS, vp_cells(row)), "" if row.halts or row.run_state != "HALTED" else "dim")
        for row in frame.vps
    ]
    processes = [
        (aligned(PROCESS_COLUMNS, process_cells(row)), "" if row.cpu_percent >= 0.05 else "dim")
        for row in sorted(frame.processes, key=lambda row: -row.cpu_percent)
    ]
    return _section(VP_COLUMNS, vps, most_vps), _section(PROCESS_COLUMNS, processes, most_processes)


def _section(columns: Sequence[Column], rows: list[Line], most: int) -> list[Line]:
    hidden = f"  ({most} of {len(rows)})" if len(rows) > most else ""
    heading = aligned(columns, [name for name, _, _ in columns])
    return [(f"{heading}{hidden}", "bold"), *rows[:most]]
