"""What the author of a guest is told of a mistake that leads to no refusal: at the end of `run`, and after."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from emu.control import Ready
from emu.mirror import Mirror
from emu.scenario import DeviceSpec, MachineSpec, Scenario
from emu.wire.messages import AllOffersDelivered, InitiateContact, OfferChannel, RequestOffers, Unload, UnloadResponse
from emu.wire.synic import HV_X64_MSR_SINT0, VMBUS_MESSAGE_SINT, message_slot
from emu.wire.versions import VERSION_WIN10_V5_3
from tests.system.python_guest import CONTACT_CONNECTION, PythonGuest
from tools import cli, run_machine
from tools.exit_status import ExitStatus
from tools.launch import RunningMachine, launch
from tools.run_machine import Options
from tools.run_outcome import Outcome
from tools.state_node import whole
from tools.state_tree import StateTree

Play = Callable[[RunningMachine, PythonGuest], None]
DEADLINE_S = 30.0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`vmbus-emu run --no-guest` with a guest that plays what it is given; `--json`'s object, or the text."""
    waits = run_machine.wait_for_foreign_guest

    def told(play: Play, *options: str, as_json: bool, status: int = 0) -> Any:
        def meets(machine: RunningMachine, options: Options, outcome: Outcome) -> None:
            machine.wait_until(lambda: machine.machine.control.ready >= Ready.HOST_RUNS, DEADLINE_S, "the host")
            with PythonGuest(machine.name) as guest:
                play(machine, guest)
            waits(machine, options, outcome)

        monkeypatch.setattr(run_machine, "wait_for_foreign_guest", meets)
        command = ["run", "--no-guest", "--device", "echo:8", *options, *(["--json"] if as_json else [])]
        assert cli.main(command) == status
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
    assert [(one["rule"], one["value"], one["legal"], one["count"]) for one in told["refusals"]] == [
        ("message-on-contact-connection", 4, True, 1),
        ("message-on-contact-connection", 4, True, 1),
    ]
    assert [one["text"].split()[0] for one in told["refusals"]] == ["REQUESTOFFERS", "UNLOAD"]


OFFERS = 8
SHOWN = "of the host's for SINT 2 of VP 0 not taken: "


def asks_and_takes_nothing(machine: RunningMachine, guest: PythonGuest) -> None:
    """Boot, ask for the offers, and leave the first of them in the slot."""
    guest.bring_up()
    guest.contact()
    assert guest.post(RequestOffers().pack()) == 0
    mirror = Mirror(machine.machine.control)
    machine.wait_until(lambda: mirror.head().to_slots == OFFERS, DEADLINE_S, "the offers to wait")


def never_frees_its_slot(machine: RunningMachine, guest: PythonGuest) -> None:
    """Detach with the first offer in the slot, the others behind it."""
    asks_and_takes_nothing(machine, guest)
    guest.detach()


def forgets_eom(machine: RunningMachine, guest: PythonGuest) -> None:
    """Take the first offer, and write no EOM although there are others."""
    asks_and_takes_nothing(machine, guest)
    guest.memory.atomics.store_u32(guest.simp + message_slot(VMBUS_MESSAGE_SINT), 0)
    guest.detach()


def masks_its_sint(machine: RunningMachine, guest: PythonGuest) -> None:
    """Mask SINT 2 before the contact, whose answer comes without an interrupt then."""
    guest.bring_up()
    guest.write_msr(HV_X64_MSR_SINT0 + VMBUS_MESSAGE_SINT, 0x100F3)
    guest.post(contact().pack())
    mirror = Mirror(machine.machine.control)
    machine.wait_until(lambda: mirror.head().version != 0, DEADLINE_S, "the contact to be answered")
    guest.detach()


def contact() -> InitiateContact:
    """A first contact of 5.3."""
    return InitiateContact(vmbus_version_requested=VERSION_WIN10_V5_3, msg_sint=VMBUS_MESSAGE_SINT)


@pytest.mark.parametrize(
    ("play", "count", "why"),
    [
        (never_frees_its_slot, OFFERS + 1, "the slot was not emptied (its message_type is 0x1, OFFERCHANNEL)"),
        (forgets_eom, OFFERS, "the slot was emptied, and EOM (MSR 0x40000084) not written"),
        (masks_its_sint, 1, "the SINT is masked (its register is 0x100f3)"),
    ],
)
def test_what_a_guest_never_took_is_told_with_its_cause(
    run: Callable[..., Any], play: Play, count: int, why: str
) -> None:
    """The end of the run says how many messages were left over, and which step of the hand-over was missing."""
    shown = run(play, as_json=False)

    assert f"\nnoted: messages-undelivered {count}\n" in shown
    assert f"{count} message{'s' * (count > 1)} {SHOWN}{why}" in shown


def forgets_the_doorbell(_machine: RunningMachine, guest: PythonGuest) -> None:
    """Write a packet, ring nobody, and close."""
    channel = guest.open(guest.connect()[0])
    mask = channel.outgoing.words.load_mask
    guest.wait(lambda: mask() == 0, "the host to sleep")
    channel.outgoing.write(b"12345678", 1)
    guest.close_channel(channel)
    guest.detach()


def leaves_its_mask_set(_machine: RunningMachine, guest: PythonGuest) -> None:
    """Mask the ring while it reads, forget to unmask, and wait for a signal that does not come."""
    channel = guest.open(guest.connect()[0])
    channel.incoming.begin_read()
    channel.outgoing.write(b"12345678", 1)
    channel.ring_bell()
    guest.wait(lambda: channel.incoming.bytes_to_read > 0, "the answer")
    guest.detach()


@pytest.mark.parametrize(
    ("play", "noted", "why"),
    [
        (
            forgets_the_doorbell,
            "packets-unannounced 1",
            "channel 1: 32 bytes of the guest's packets not read: interrupt_mask is 0, and no doorbell rang",
        ),
        (
            leaves_its_mask_set,
            "packets-masked 1",
            "channel 1: 32 bytes of the host's packets not read: the guest left interrupt_mask at 0x1, so it was not",
        ),
    ],
)
def test_packets_that_a_mistake_left_in_a_ring_are_told(
    run: Callable[..., Any], play: Play, noted: str, why: str
) -> None:
    """Neither breaks a rule, and both look like a host that does not answer."""
    shown = run(play, as_json=False)

    assert f"\nnoted: {noted}\n" in shown
    assert why in shown


def test_of_a_guest_that_makes_no_mistake_nothing_is_noted(run: Callable[..., Any]) -> None:
    """It has taken and announced everything, and so there is no line more."""
    shown = run(lambda _machine, guest: guest.live(), as_json=False)

    assert "the guest unloaded\n" in shown
    assert "noted" not in shown and "refused" not in shown


def test_what_a_guest_that_is_still_there_has_not_taken_is_told_when_the_run_ends(run: Callable[..., Any]) -> None:
    """A guest that waits for ever is ended by --duration, and the messages behind its slot are counted then."""
    told = run(asks_and_takes_nothing, "--duration", "0", as_json=True, status=ExitStatus.TIME_LIMIT)

    assert (told["refused"], told["ignored"]) == ({}, {"messages-undelivered": OFFERS + 1})


def test_what_a_guest_never_took_is_to_be_seen_when_it_has_left() -> None:
    """A machine that goes on has it under `ignored` and `refusals`, until the next one leaves something."""
    with launch(Scenario(MachineSpec(), (DeviceSpec(count=OFFERS),)), no_guest=True) as machine:
        machine.wait_until(lambda: machine.machine.control.ready >= Ready.HOST_RUNS, DEADLINE_S, "the host")
        with PythonGuest(machine.name) as guest:
            forgets_eom(machine, guest)
        refusals: Any = whole(StateTree(machine.machine).root()["refusals"])
        with PythonGuest(machine.name) as guest:
            guest.live(packets=1)
        ignored = machine.machine.control.ignored()

    (reason,) = (one["text"] for one in refusals.values())
    assert reason.startswith(f"{OFFERS} messages {SHOWN}the slot was emptied")
    assert ignored == {"messages-undelivered": OFFERS}
