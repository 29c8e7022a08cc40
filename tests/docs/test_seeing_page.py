"""docs/seeing.md has the invariants of `check` as the code has them."""

from __future__ import annotations

from pathlib import Path

from tools.invariant_table import RULES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "seeing.md"


def test_page_lists_the_invariants() -> None:
    """Each with its number and what it says, in their order."""
    rows = ["| number | what holds |", "|---|---|", *(f"| INV-{rule.NUMBER:02} | {rule.TITLE} |" for rule in RULES)]

    assert "\n".join(rows) in PAGE.read_text(encoding="utf-8")
