"""Ctrl-C in the middle of `races run`."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from tools.exit_status import ExitStatus
from tools.race_run import RaceMachine
from tools.races import races


def test_an_interrupted_run_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before the first run has ended gives one line with the count, and the status of an interruption."""

    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RaceMachine, "run", interrupted)
    result = CliRunner().invoke(races, ["run", "a1", "--times", "5"], standalone_mode=False)
    assert result.return_value == ExitStatus.INTERRUPTED
    assert "interrupted after 0 of 5 runs" in result.output
