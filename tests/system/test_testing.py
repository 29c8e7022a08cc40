"""The public test interface, on machines of real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from emu.errors import UserError
from emu.ipc.segments import SHM
from hostproc.protocol.states import ChannelState
from tools.testing import MachineDied, Scenario, assert_gone, inner_pids, objects, processes, running


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


MAPS_A_FILE = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 4096):
    print("mapped", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("here", [True, False])
def test_a_machine_of_another_shared_memory_is_another_machine(tmp_path: Path, here: bool) -> None:
    """Whoever has something of that name mapped counts if it lies where ours do, and not a container's."""
    path = (SHM if here else tmp_path) / "vmbus-emu.t-other.ram"
    path.write_bytes(bytes(4096))
    try:
        with subprocess.Popen(
            [sys.executable, "-c", MAPS_A_FILE, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == b"mapped\n"
            found = [one.pid for one in processes("t-other")]
            process.communicate()
    finally:
        path.unlink()

    assert found == ([process.pid] if here else [])


def test_what_cannot_be_is_refused_before_anything_is_made() -> None:
    """As on the command line."""
    with pytest.raises(UserError, match='"floppy" is not a device class'), running(devices=["floppy"]):
        pass
    with (
        pytest.raises(UserError, match="a Scenario brings its own plugins"),
        running(Scenario.default(), plugins=["x"]),
    ):
        pass
