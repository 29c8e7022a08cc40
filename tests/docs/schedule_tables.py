"""The tables of docs/schedules.md, as the code has them."""

from __future__ import annotations

from emu.switches import SWITCHES
from emu.syncpoint import Point
from emu.task_board import Program
from emu.user_calls import USER_CALLS
from tools.invariant_table import titles
from tools.schedule import NUMBERS, VERBS


def code(text: str) -> str:
    """As Markdown code in a cell of a table."""
    return f"`{text}`".replace("|", "\\|")


def verbs() -> list[str]:
    """How each verb is written: the first cell of its row."""
    return [f"| {code(verb.usage)} |" for verb in VERBS.values()]


def numbers() -> list[str]:
    """From where to where each option goes."""
    return [f"| `{name}` | {least} to {most} |" for name, (least, most) in NUMBERS.items()]


def points() -> list[str]:
    """Where every point stands, and what is held there, guest first."""
    ordered = sorted(Point, key=lambda point: point.text)
    return [f"| `{point.text}` | {point.scope.value} | {point.where} |" for point in ordered]


def switches() -> list[str]:
    """What each mistake is, its variants, and the exhibits that show it."""
    rows = []
    for name, switch in SWITCHES.items():
        variants = ", ".join(f"`{one}`" for one in switch.variants)
        rows.append(f"| `{name}` | {variants} | {switch.wrong} | {', '.join(switch.exhibits)} |")
    return rows


def calls() -> list[str]:
    """How each call of user space is written."""
    return [f"- {code(shape.usage(name))}".replace("\\|", "|") for name, shape in USER_CALLS.items()]


def programs() -> str:
    """The programs of `run`."""
    return ", ".join(f"`{one.name.lower()}`" for one in Program)


def invariants() -> list[str]:
    """What each says."""
    return [f"| {name} | {title} |" for name, title in sorted(titles().items())]
