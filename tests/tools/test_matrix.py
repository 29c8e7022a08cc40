"""`matrix`: a machine that died is told apart from one that did otherwise than the protocol says."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner

from emu.wire.versions import VERSION_WIN10_V5_3, VERSION_WS2008
from tools import matrix as module
from tools.exit_status import ExitStatus
from tools.launch import Death, MachineDied, RunningMachine
from tools.matrix import Boot, boot, matrix, scenario_of


class Dying:
    """A machine that was switched on, of which a process dies before its channels are open."""

    def __init__(self, version: int, death: Death) -> None:
        self.scenario = scenario_of("current", version)
        self._death = death

    def wait_ready(self, *_arguments: Any, **_named: Any) -> None:
        """It never comes so far."""
        raise MachineDied([self._death])


KILLED = Death("vcpu1", 7, int(signal.SIGKILL))
REFUSED = Death("vcpu0", 7, 4 << 8, "Traceback\nOSError: vmbus_connect: EDOM")


@pytest.mark.parametrize(
    ("version", "death", "ok", "died"),
    [
        (VERSION_WIN10_V5_3, KILLED, False, True),
        (VERSION_WS2008, KILLED, False, True),
        (VERSION_WS2008, REFUSED, True, False),
        (VERSION_WIN10_V5_3, REFUSED, False, False),
    ],
)
def test_death_is_no_answer_of_the_protocol(
    monkeypatch: pytest.MonkeyPatch, version: int, death: Death, ok: bool, died: bool
) -> None:
    """A guest that was refused is right or wrong by its version; one that was killed is neither."""
    monkeypatch.setattr(module, "write_crash_record", lambda *_arguments: Path("/state/record.json"))

    result = boot(cast(RunningMachine, Dying(version, death)))

    assert (result.ok, result.died) == (ok, died)
    assert ("/state/record.json" in (result.refused or "")) == died


@pytest.mark.parametrize(
    ("boots", "status", "said"),
    [
        ([Boot("seed", "4.0", ok=True)], ExitStatus.FINE, "1 ok"),
        (
            [Boot("seed", "4.0", ok=True), Boot("seed", "4.0")],
            ExitStatus.FINDING,
            "2 machines, 1 of them not as the protocol says",
        ),
        (
            [Boot("seed", "4.0"), Boot("seed", "4.0", died=True)],
            ExitStatus.FAILED,
            "2 machines, 1 of them not as the protocol says, 1 of them died",
        ),
    ],
)
def test_exit_status_is_the_worst_that_was_met(
    monkeypatch: pytest.MonkeyPatch, boots: list[Boot], status: ExitStatus, said: str
) -> None:
    """4 for a death, 1 for a finding, 0; the last line counts both."""
    monkeypatch.setattr(module, "boot_all", lambda: (one for one in boots))

    done = CliRunner().invoke(matrix, standalone_mode=False)

    assert done.return_value == status
    assert ("DIED" in done.output) == any(one.died for one in boots)
    assert done.output.splitlines()[-1] == said
