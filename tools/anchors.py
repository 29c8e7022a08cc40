"""One line of a benchmark: what was measured, against what, and whether that is good enough.

A goal or floor is of the *ratio* where there is something to compare with, because a ratio of two figures
from one run means the same on every machine; otherwise of the value itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Against:
    """Whom we compare with: the median of its runs in the same benchmark, None if it could not be measured."""

    name: str
    value: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """A figure that the project is held to. `spread` is (most - least) / median of `runs`.

    `ratio` is `value` by that of `against`. What is not to be had is None, and `reason` says why.
    """

    name: str
    value: float | None
    unit: str
    better: Better
    runs: tuple[float, ...]
    spread: float | None
    against: Against | None
    ratio: float | None
    goal: float | None
    floor: float | None
    met: bool | None
    reason: str | None

    @classmethod
    def of(
        cls,
        name: str,
        runs: Sequence[float],
        unit: str,
        *,
        better: Better,
        against: Against | None = None,
        goal: float | None = None,
        floor: float | None = None,
        reason: str | None = None,
    ) -> Anchor:
        """Work the rest out of the runs; `reason` is for a figure, or a comparison, that is not to be had."""
        value = median(runs) if runs else None
        spread = (max(runs) - min(runs)) / value if value else None
        ratio = None
        if value is not None and against is not None and against.value:
            ratio = value / against.value
        judged = value if against is None else ratio
        met = None
        if judged is not None and goal is not None:
            met = judged >= goal if better == "higher" else judged <= goal
        assert judged is not None or reason is not None, f"{name}: nothing to judge, and no reason"
        return cls(
            name=name,
            value=value,
            unit=unit,
            better=better,
            runs=tuple(runs),
            spread=spread,
            against=against,
            ratio=ratio,
            goal=goal,
            floor=floor,
            met=met,
            reason=reason,
        )

    @property
    def below_floor(self) -> bool:
        """Whether it has a floor, can be judged, and is worse than that."""
        judged = self.value if self.against is None else self.ratio
        if judged is None or self.floor is None:
            return False
        return judged < self.floor if self.better == "higher" else judged > self.floor

    def as_json(self) -> dict[str, Any]:
        """The entry of `results` in `bench --json`."""
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "better": self.better,
            "runs": list(self.runs),
            "spread": self.spread,
            "against": {"name": self.against.name, "value": self.against.value} if self.against else None,
            "ratio": self.ratio,
            "goal": self.goal,
            "floor": self.floor,
            "met": self.met,
            "reason": self.reason,
        }
