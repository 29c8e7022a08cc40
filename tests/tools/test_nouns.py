"""A noun agrees with its number."""

from __future__ import annotations

from typing import Any

import pytest

from tools import explore
from tools.nouns import counted, noun


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 violations"), (1, "1 violation"), (2, "2 violations"), (12_000, "12,000 violations")]
)
def test_number_and_noun_agree(count: int, text: str) -> None:
    """Only one is singular; thousands are told apart."""
    assert counted(count, "violation") == text


def test_noun_may_bring_its_verb() -> None:
    """Where both have a form of their own, both are given."""
    assert counted(1, "record was", "records were") == "1 record was"
    assert noun(2, "is", "are") == "are"


@pytest.mark.parametrize(("problems", "last"), [(["a"], "1 violation"), (["a", "b"], "2 violations")])
def test_explore_counts_what_it_found(capsys: pytest.CaptureFixture[str], problems: list[str], last: str) -> None:
    """In the last line, behind the figures, which agree as well."""
    core = {"states": 1, "steps": 1, "made": 1}
    report: dict[str, Any] = {
        "violation": {"schedule": [], "problems": problems},
        "depth": 1,
        "exhausted": False,
        "transitions": 1,
        "states": 1,
        "transitions_per_second": 1,
        "seconds": 1.0,
        "guest": core,
        "host": core,
        "stopped": "",
    }

    explore.show(report)

    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == last
    assert lines[-5:-3] == ["1 transition, 1 distinct state, depth 1 completed", "1 transition a second, 1.0 s"]
    assert lines[-2] == "host: 1 state, 1 different step, 1 made"
