"""What the host refused, found to lead to nothing, or let pass, counted by rule, and the newest few kinds in full.

Those that are alike are kept once, with their number: who does one thing wrong for ever displaces nobody. A guest can
make these as often as it likes, so what is kept does not grow: rules are ours, and few.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any, Final

from emu.errors import ProtocolViolation
from hostproc.protocol.effects import Refused

KEPT: Final = 32
_LONGEST_VALUE: Final = 32


class Refusals:
    """`refused` counts a guest's violations, `ignored` what was legal and led to nothing, or was let pass; by rule.

    `last` has the newest of both; of what is legal and comes again at once, the newest alone.
    """

    __slots__ = ("ignored", "last", "refused")

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self.last: OrderedDict[Refused, int] = OrderedDict()
        """How often there was each; the one that came last is the last."""

    def add(self, refusal: Refused, times: int = 1) -> None:
        """Count one, or so many that are alike."""
        (self.ignored if refusal.legal else self.refused)[refusal.rule] += times
        self.last[refusal] = self.last.get(refusal, 0) + times
        self.last.move_to_end(refusal)
        if len(self.last) > KEPT:
            self.last.popitem(last=False)

    def add_violation(self, violation: ProtocolViolation, where: str) -> None:
        """Count what a ring or another piece of logic found; `where` says in what."""
        self.add(Refused(violation.rule, f"{where}: {violation}", violation.field, violation.value))

    def records(self) -> list[dict[str, Any]]:
        """Return the newest refusals as plain values, each kind with its `count`; those that came last are the last."""
        return [
            {
                "rule": refusal.rule,
                "field": refusal.field,
                "value": _plain(refusal.value),
                "text": refusal.text,
                "legal": refusal.legal,
                "count": count,
            }
            for refusal, count in self.last.items()
        ]


def _plain(value: int | str | bytes | None) -> int | str | None:
    """Return a value that any format can hold; bytes as hex, the first few."""
    if isinstance(value, bytes):
        return value[:_LONGEST_VALUE].hex()
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        return hex(value)
    return value
