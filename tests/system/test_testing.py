"""The public test interface, on machines of real processes."""

from __future__ import annotations

import pytest

from emu.errors import UserError
from hostproc.protocol.states import ChannelState
from tools.testing import MachineDied, Scenario, assert_gone, inner_pids, objects, running


def test_a_machine_is_looked_at_and_troubled() -> None:
    """Devices, channels, counters and words; a device comes and goes, while records tell of it."""
    with running(devices=["echo:2"], name="t-testing", record=True) as machine:
        assert [one.class_name for one in machine.devices()] == ["echo", "echo"]
        assert {channel.state for channel in machine.channels()} == {ChannelState.OPEN}
        assert machine.driver_state(1)[:4] == [0, 0, 0, 0]
        assert {"hypervisor", "vcpu0", "vcpu1", "kworker/work"} <= inner_pids("t-testing").keys()
        machine.records()

        (nic,) = machine.offer("nic")
        assert (nic.relid, machine.device("nic").device_id) == (3, nic.instance)
        machine.rescind(nic.relid)

        names = [record.event.name for record in machine.records() if record.arguments.get("relid") == nic.relid]
        assert {"offer", "probe", "rescind"} <= set(names)
        machine.wait_for(lambda: len(machine.devices()) == 2, "the device to be gone")
        with pytest.raises(AssertionError, match="0 devices are called nic; there are: 1 echo, 2 echo"):
            machine.device("nic")
    assert objects("t-testing") == []


def test_a_process_that_is_held_holds_up_its_part_alone() -> None:
    """The workqueue stands still: an offer is taken by interrupt and tasklet, and waits there for its worker."""
    with running(devices=["echo"]) as machine:
        with machine.held("workqueue"):
            before = machine.counters()["messages_taken"]
            (added,) = machine.offer("echo", wait=False)
            machine.wait_for(lambda: machine.counters()["messages_taken"] > before, "the message to be taken")
            assert [one.relid for one in machine.devices()] == [1]
        machine.wait_for(lambda: [one.relid for one in machine.devices()] == [1, added.relid], "the device to appear")


def test_a_process_that_dies_ends_the_wait() -> None:
    """MachineDied says who; nothing is left although the block ended badly."""
    with pytest.raises(MachineDied, match=r"vcpu1 .* killed by SIGKILL"), running(name="t-dies") as machine:
        machine.kill("vcpu1")
        machine.wait_for(lambda: False, "what never comes")
    assert_gone("t-dies")


def test_what_cannot_be_is_refused_before_anything_is_made() -> None:
    """As on the command line."""
    with pytest.raises(UserError, match='"floppy" is not a device class'), running(devices=["floppy"]):
        pass
    with (
        pytest.raises(UserError, match="a Scenario brings its own plugins"),
        running(Scenario.default(), plugins=["x"]),
    ):
        pass
