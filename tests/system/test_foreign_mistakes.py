"""What the author of a guest is told of a mistake that leads to no refusal: at the end of `run`, and after."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from emu.control import Ready
from emu.wire.messages import AllOffersDelivered, OfferChannel, RequestOffers, Unload, UnloadResponse
from tests.system.python_guest import CONTACT_CONNECTION, PythonGuest
from tools import cli, run_machine
from tools.launch import RunningMachine
from tools.run_machine import Options
from tools.run_outcome import Outcome

Play = Callable[[RunningMachine, PythonGuest], None]
DEADLINE_S = 30.0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`vmbus-emu run --no-guest` with a guest that plays what it is given; `--json`'s object, or the text."""
    waits = run_machine.wait_for_foreign_guest

    def told(play: Play, *, as_json: bool) -> Any:
        def meets(machine: RunningMachine, options: Options, outcome: Outcome) -> None:
            machine.wait_until(lambda: machine.machine.control.ready >= Ready.HOST_RUNS, DEADLINE_S, "the host")
            with PythonGuest(machine.name) as guest:
                play(machine, guest)
            waits(machine, options, outcome)

        monkeypatch.setattr(run_machine, "wait_for_foreign_guest", meets)
        assert cli.main(["run", "--no-guest", "--device", "echo:8", *(["--json"] if as_json else [])]) == 0
        shown = capsys.readouterr().out
        return json.loads(shown) if as_json else shown

    return told


def stays_on_the_contacts_connection(_machine: RunningMachine, guest: PythonGuest) -> None:
    """Boot and leave, and never look at VERSION_RESPONSE's msg_conn_id."""
    guest.bring_up()
    guest.contact()
    guest.connection_id = CONTACT_CONNECTION
    guest.send(RequestOffers())
    while isinstance(message := guest.message(), OfferChannel):
        pass
    assert isinstance(message, AllOffersDelivered)
    guest.answered(Unload(), UnloadResponse)


def test_a_guest_that_stays_on_connection_4_is_told_so(run: Callable[..., Any]) -> None:
    """It works, as on real hosts, and the end of the run says which messages came on the wrong connection."""
    shown = run(stays_on_the_contacts_connection, as_json=False)

    assert "\nnoted: message-on-contact-connection 2\n" in shown
    assert "UNLOAD on connection 4, which is for INITIATE_CONTACT: the rest goes to connection 1\n" in shown
    assert "refused:" not in shown


def test_json_has_the_count_and_the_reason(run: Callable[..., Any]) -> None:
    """`ignored` counts it, `refusals` says why, and nothing was refused."""
    told = run(stays_on_the_contacts_connection, as_json=True)

    assert (told["refused"], told["ignored"]) == ({}, {"message-on-contact-connection": 2})
    assert [(one["rule"], one["value"], one["legal"]) for one in told["refusals"]] == [
        ("message-on-contact-connection", 4, True)
    ]
