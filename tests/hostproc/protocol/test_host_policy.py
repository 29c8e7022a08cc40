"""The host's policy as a scenario says it: which cells there are, and that a host behaves by them."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from emu.errors import UserError
from emu.host_policy import ANSWERS, CELLS, read_policy
from emu.scenario import Scenario
from hostproc.protocol.policy import DEFAULT_POLICY, Answer, policy_of


def test_scenarios_know_the_cells_of_the_host() -> None:
    """Every cell of the host's table can be said, with every answer, and no other can."""
    said = {(kind.upper(), state.upper()) for kind, states in CELLS.items() for state in states}

    assert said == {(kind.name, state.name) for kind, state in DEFAULT_POLICY}
    assert set(ANSWERS) == {answer.value for answer in Answer}


def test_cell_changes_itself_alone() -> None:
    """What is not said stays as it is by default."""
    for (kind, state), answer in product(DEFAULT_POLICY, Answer):
        policy = policy_of({f"{kind.name.lower()}.{state.name.lower()}": answer.value})
        assert policy == {**DEFAULT_POLICY, (kind, state): answer}


def test_scenario_carries_its_policy(tmp_path: Path) -> None:
    """Dotted keys and tables of a file are the same, and come through to the host's process."""
    path = tmp_path / "one.toml"
    path.write_text('[policy]\nmodifychannel.revoked = "refuse"\n[policy.openchannel]\nreoffered = "accept"\n')
    scenario = Scenario.load(path)

    assert scenario.policy == {"modifychannel.revoked": "refuse", "openchannel.reoffered": "accept"}
    assert Scenario.from_config(scenario.to_config()).policy == scenario.policy


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ({"modifychanel": {"revoked": "refuse"}}, "did you mean modifychannel?"),
        ({"modifychannel": "refuse"}, 'policy.modifychannel: "refuse" is a string, not a table of states'),
        ({"modifychannel": {"gone": "refuse"}}, 'policy.modifychannel.gone: "gone" is no state with a choice'),
        ({"modifychannel": {"revoked": "no"}}, 'policy.modifychannel.revoked: "no" is not known'),
        ({"modifychannel": {"revoked": 1}}, "policy.modifychannel.revoked: 1 is a whole number, not a string"),
        (3, "policy: 3 is a whole number, not a table; write it as [policy]"),
    ],
)
def test_wrong_cell_has_its_line(entries: object, what: str) -> None:
    """The cell, what is wrong with it, the cure."""
    with pytest.raises(UserError) as caught:
        read_policy(entries, "one.toml")

    assert what in str(caught.value) and len(str(caught.value).splitlines()) == 1
