"""docs/faults.md has the table of faults as the code has it, and its examples are understood."""

from __future__ import annotations

import re
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from emu.faults import FAULTS, KEYS, PLACES, Form, parse
from emu.host_policy import CELLS
from hostproc.protocol.policy import DEFAULT_POLICY

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"


def table() -> str:
    """The table of faults, from the code."""
    rows = ["| fault | value | where it strikes | what happens | who |", "|---|---|---|---|---|"]
    for spec in FAULTS:
        value = "" if spec.form is Form.NONE else spec.form.value
        keys = " ".join(f"**{key}**" if key in spec.needs else key for key in spec.keys)
        packets = " (packets)" if spec.packets else ""
        rows.append(f"| `{spec.name}` | {value} | {keys} | {spec.effect} | {spec.who.value}{packets} |")
    return "\n".join(rows)


def policy_table() -> str:
    """The host's policy, from the code."""
    default = {f"{kind.name}.{state.name}".lower(): answer.value for (kind, state), answer in DEFAULT_POLICY.items()}
    rows = ["| message | when | default |", "|---|---|---|"]
    for kind, states in CELLS.items():
        # Neighbours with one default share a row.
        cells = [(default[f"{kind}.{state}"], f"`{state}`") for state in states]
        for answer, some in groupby(cells, itemgetter(0)):
            rows.append(f"| `{kind}` | {' '.join(state for _, state in some)} | {answer} |")
    return "\n".join(rows)


def test_page_has_the_tables_of_the_code() -> None:
    """Faults with their values and keys, what each key means, the places, and the policy."""
    text = PAGE.read_text(encoding="utf-8")

    assert table() in text
    assert policy_table() in text
    assert all(f"| `{key}` | {meaning} |" in text for key, meaning in KEYS.items())
    assert all(f"`{place}`" in text for place in PLACES)


def test_examples_of_the_page_are_understood() -> None:
    """Each --fault of it is a fault."""
    commands = re.findall(r"^vmbus-emu .*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    texts = [text for command in commands for text in re.findall(r"--fault (\S+)", command)]

    assert len([parse(text, classes=()) for text in texts]) >= 5
