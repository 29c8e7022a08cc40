"""`check` on recordings of machines that are wrong: for each invariant a guest or a host that breaks it.

Most are made wrong by a switch, and shown by an exhibit; the others by a fault, or by a plugin that puts a wrong
function in the place of a right one when it is loaded into each process of the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.conftest import RunCli
from tests.races.test_exhibits import Machines
from tools.check import check_recording
from tools.invariant_table import RULES
from tools.races import exhibits
from tools.schedule import Schedule

EXHIBITS: Mapping[int, str] = {
    3: "offer-rescind-overtake",
    5: "revoke-hits-successor",
    6: "rescind-wakes-nobody",
    9: "pending-flag-order",
    10: "queue-check-then-run",
    11: "two-workers-one-page",
    12: "open-timeout-reuses-pages",
    15: "refused-gpadl-teardown-hang",
    16: "flag-word-writeback",
    17: "signal-before-listener",
    18: "tasklet-left-disabled",
    19: "unmask-without-recheck",
    20: "stale-pending-size",
    21: "spurious-signal-throttle",
    26: "offline-between-pick-and-publish",
    28: "two-nics-one-queue",
    29: "timer-slot-livelock",
    30: "hypercall-page-stomp",
}
"""By invariant: what is shown with its switch off."""


@dataclass(frozen=True)
class Mutation:
    """What is done to a machine, and the plugin that makes it wrong ("": a fault does)."""

    steps: tuple[str, ...]
    plugin: str = ""


COMES_AND_GOES = ("offer kvp as NIC", "until settled", "rescind NIC", "until settled")

MUTATIONS: Mapping[int, Mutation] = {
    # The host offers a relid that the guest holds.
    1: Mutation(("fault host.dup_relid", "offer kvp as NIC", "until settled")),
    # The guest gives a relid back, and then once more.
    2: Mutation(
        COMES_AND_GOES,
        """
from guestproc.vmbus import removal

once = removal.vmbus_release_relid


def twice(*arguments):
    once(*arguments)
    return once(*arguments)


removal.vmbus_release_relid = twice
""",
    ),
    # An offer is slow, and the rescind behind it waits for nobody.
    4: Mutation(
        ("offer kvp as NIC", "rescind NIC", "until settled"),
        """
from threading import Event

from emu.wire.message_relid import relid_of
from guestproc.vmbus.channel_mgmt import MESSAGE_HANDLERS

handled = Event()
onoffer, onrescind = MESSAGE_HANDLERS["vmbus_onoffer"], MESSAGE_HANDLERS["vmbus_onoffer_rescind"]


def slow(current, payload):
    if relid_of(payload) > 1:
        handled.wait(30)
    onoffer(current, payload)


def at_once(current, payload):
    counted = current.connection.offer_in_progress.load()
    current.connection.offer_in_progress.store(0)
    onrescind(current, payload)
    current.connection.offer_in_progress.store(counted)
    handled.set()


MESSAGE_HANDLERS.update(vmbus_onoffer=slow, vmbus_onoffer_rescind=at_once)
""",
    ),
    # The host takes a slot for empty that is not.
    7: Mutation(
        ("arm g.msg.taken as TASKLET", "offer kvp as FIRST", "until arrived TASKLET", "offer hb as SECOND",
         "offer shutdown as THIRD", "resume TASKLET", "until settled"),
        """
from emu.synic import Synic
from hostproc.message_queues import MessageQueues

deliver = MessageQueues._deliver


def blind(self, *arguments):
    deliver(self, *arguments)
    if self.delivered > 6:
        Synic.slot_type = lambda self, sint: 0


MessageQueues._deliver = blind
""",
    ),
    # The guest writes EOM whatever the pending bit says.
    8: Mutation(
        COMES_AND_GOES,
        """
from guestproc.vmbus import message_dpc

signal_eom = message_dpc.vmbus_signal_eom


def always(current, hv_cpu, old_type, serial=0):
    signal_eom(current, hv_cpu, old_type, serial)
    current.record(message_dpc.E_EOM, current.hooks.position, message_dpc.VMBUS_MESSAGE_SINT)
    message_dpc.write_eom(current)


message_dpc.vmbus_signal_eom = always
""",
    ),
    # The guest's read_index is no multiple of 8.
    24: Mutation(
        ("send echo#1", "until settled"),
        """
from dataclasses import replace

from guestproc.vmbus import ring_buffer

recorded = ring_buffer.recorded


def off_the_grid(*ring, **how):
    words = recorded(*ring, **how)
    return replace(words, store_read=lambda index: words.store_read(index + 4))


ring_buffer.recorded = off_the_grid
""",
    ),
    # A rescind flushes the queue of probes with the mutex in its hand that the work there is about to ask for.
    27: Mutation(
        ("offer kvp as NIC", "rescind NIC", "until settled"),
        """
from threading import Event

from guestproc.kernel.workqueue import QueueNumber
from guestproc.protocol.numbers import Works
from guestproc.vmbus import channel_mgmt

held = Event()
add, claim = channel_mgmt._add_primary, channel_mgmt._claim


def late(current, channel):
    if channel.relid > 1:
        held.wait(30)
        with current.connection.channel_mutex.hold(current.actor):
            pass
    return add(current, channel)


def flushing(current, relid):
    with current.connection.channel_mutex.hold(current.actor):
        held.set()
        current.tables.work_queues.flush(current.actor, QueueNumber.PRI_CHAN)
    return claim(current, relid)


channel_mgmt._add_primary, channel_mgmt._claim = late, flushing
""",
    ),
}  # fmt: skip
"""By invariant, where no exhibit's recording tells of it."""

MACHINE: Mapping[str, Any] = {"machine": {"vcpus": 1}, "device": [{"class": "echo", "count": 1, "ring_pages": 4}]}


def broken(recording: Path) -> set[int]:
    """The invariants that `check` finds broken in a recording, by its records alone."""
    verdicts, _recording = check_recording(recording)
    return {one.rule.NUMBER for one in verdicts if one.count}


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """Machines for the exhibits."""
    machines = Machines()
    yield machines
    machines.close()


def test_every_invariant_has_a_mutation() -> None:
    """None that `check` evaluates is one that no wrong guest or host was ever seen to break."""
    assert sorted([*EXHIBITS, *MUTATIONS]) == [rule.NUMBER for rule in RULES]


@pytest.mark.parametrize("number", EXHIBITS)
def test_check_catches_the_exhibit(machines: Machines, number: int, tmp_path: Path) -> None:
    """With its fix off, the records of the run break the invariant; with it on, none."""
    machine = machines.of(Schedule.load(exhibits()[EXHIBITS[number]]))
    machine.run(tmp_path / "off.rec", fix=False)
    machine.run(tmp_path / "on.rec", fix=True)

    assert number in broken(tmp_path / "off.rec")
    assert broken(tmp_path / "on.rec") == set()


@pytest.mark.parametrize("number", MUTATIONS)
def test_check_catches_the_mutation(run_cli: RunCli, number: int, tmp_path: Path) -> None:
    """The records of a machine that is wrong break the invariant; without what makes it wrong they break none."""
    mutation = MUTATIONS[number]
    (tmp_path / "mutation.py").write_text(mutation.plugin)
    right = {**MACHINE, "step": [step for step in mutation.steps if not step.startswith("fault ")]}
    wrong = {**MACHINE, "step": [*mutation.steps], "plugins": ["mutation.py"] if mutation.plugin else []}
    for name, document in (("right", right), ("wrong", wrong)):
        schedule = tmp_path / f"{name}.toml"
        schedule.write_text(tomli_w.dumps(document))
        # By a program of its own: a plugin is loaded by who launches the machine, too, and stays.
        run_cli("races", "run", schedule, "--record", tmp_path / f"{name}.rec", timeout_s=60)

    assert number in broken(tmp_path / "wrong.rec")
    assert broken(tmp_path / "right.rec") == set()
