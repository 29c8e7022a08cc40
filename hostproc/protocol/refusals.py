"""What the host refused or found to lead to nothing, counted by rule, and the newest few in full.

A guest can make these as often as it likes, so what is kept does not grow: rules are ours, and few.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any, Final

from emu.errors import ProtocolViolation
from hostproc.protocol.effects import Refused

KEPT: Final = 32
_LONGEST_VALUE: Final = 32


class Refusals:
    """`refused` counts a guest's violations, `ignored` what was legal and led to nothing; by rule."""

    __slots__ = ("ignored", "last", "refused")

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self.last: deque[Refused] = deque(maxlen=KEPT)

    def add(self, refusal: Refused, times: int = 1) -> None:
        """Count one, or so many that are alike."""
        (self.ignored if refusal.legal else self.refused)[refusal.rule] += times
        self.last.append(refusal)

    def add_violation(self, violation: ProtocolViolation, where: str) -> None:
        """Count what a ring or another piece of logic found; `where` says in what."""
        self.add(Refused(violation.rule, f"{where}: {violation}", violation.field, violation.value))

    def records(self) -> list[dict[str, Any]]:
        """Return the newest refusals as plain values, oldest first."""
        return [
            {
                "rule": refusal.rule,
                "field": refusal.field,
                "value": _plain(refusal.value),
                "text": refusal.text,
                "legal": refusal.legal,
            }
            for refusal in self.last
        ]


def _plain(value: int | str | bytes | None) -> int | str | None:
    """Return a value that any format can hold; bytes as hex, the first few."""
    if isinstance(value, bytes):
        return value[:_LONGEST_VALUE].hex()
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        return hex(value)
    return value
