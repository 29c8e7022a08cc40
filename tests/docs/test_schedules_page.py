"""docs/schedules.md has verbs, points, switches, calls and invariants as the code has them; its schedules are run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.conftest import SOURCES, RunCli
from tests.docs import schedule_tables
from tools.schedule import Schedule

PAGE = (SOURCES / "docs" / "schedules.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def part(title: str) -> list[str]:
    """The lines of one chapter."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0].splitlines()


@pytest.mark.parametrize(
    ("title", "rows"),
    [
        ("Points", schedule_tables.points()),
        ("Switches", schedule_tables.switches()),
        ("Invariants", schedule_tables.invariants()),
    ],
)
def test_a_table_is_the_codes(title: str, rows: list[str]) -> None:
    """Row by row, with none missing and none too many."""
    assert [line for line in part(title) if line.startswith("| ")][1:] == rows


def test_every_verb_is_explained() -> None:
    """Each is written as the code reads it, in its order, and has a sentence."""
    lines = [line for line in part("Steps") if line.startswith("| `")]
    usages = schedule_tables.verbs()

    assert [line for line, usage in zip(lines, usages, strict=False) if not line.startswith(usage)] == []
    assert all(line.removeprefix(usage).strip(" |").endswith(".") for line, usage in zip(lines, usages, strict=False))


def test_calls_programs_and_numbers_are_the_codes() -> None:
    """What `call` and `run` know, and how far numbers go."""
    lines = part("Steps")

    assert [line for line in lines if line.startswith("- ")] == schedule_tables.calls()
    assert set(schedule_tables.numbers()) <= set(lines)
    assert schedule_tables.programs() in "\n".join(lines)


def test_its_schedules_are_what_it_says(run_cli: RunCli, tmp_path: Path) -> None:
    """The first breaks what it expects, the second nothing; both as told."""
    assert len(EXAMPLES) == 2
    for number, text in enumerate(EXAMPLES):
        path = tmp_path / f"mine{number}.toml"
        path.write_text(text)
        wanted = Schedule.of_document(tomllib.loads(text), path).invariants
        done = run_cli("races", "run", str(path), "--fix", "off")
        assert done.returncode == (1 if wanted else 0), done.stdout
        assert ", as expected" in done.stdout
