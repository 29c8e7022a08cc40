"""`run` tells what there was, also of a machine that is up before the host has published its numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from emu.mirror import Mirror, MirrorHead
from tools import cli, run_machine
from tools.exit_status import ExitStatus


class LateMirror(Mirror):
    """What a launcher reads that looks in the first milliseconds: nothing, and then no offers."""

    looks = 0

    def head(self) -> MirrorHead:
        """Nothing at the first three looks; never how many offers there are."""
        LateMirror.looks += 1
        return replace(super().head(), offers=0, **({"version": 0} if LateMirror.looks <= 3 else {}))


def test_version_and_offers_of_a_machine_that_is_up_early(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The version is waited for; what the scenario has was offered, whatever the mirror says yet."""
    monkeypatch.setattr(LateMirror, "looks", 0)
    monkeypatch.setattr(run_machine, "Mirror", LateMirror)

    assert cli.main(["run", "--device", "echo:2", "--duration", "0", "--json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert (told["version"], told["offers"], told["channels_open"]) == ("5.3", 2, 2)


def test_boot_that_does_not_end_shows_the_guests_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A host that never says that these were all offers: exit 124, how far the guest has come, and an object."""
    monkeypatch.setattr(run_machine, "BOOT_TIMEOUT_S", 0.6)
    silent = ("--fault", "reply.drop@kind=alloffers_delivered")

    assert cli.main(["run", "--device", "echo:1", "--duration", "0", "--json", *silent]) == ExitStatus.TIME_LIMIT

    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert "vcpu0: Vmbus version:5.3" in shown.err.splitlines()
    assert "to reach CHANNELS_OPEN: no answer within 0.6 s" in shown.err and told["timed_out"] in shown.err
    assert (told["version"], told["channels_open"], told["faults"][0]["hits"]) == ("5.3", 1, 1)
