"""Guests of both eras on hosts of every version, over real processes; and 6.0, which no guest of ours asks for."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from uuid import UUID

import pytest

from emu.mirror import Mirror
from emu.scenario import DeviceSpec, MachineSpec, Scenario
from emu.wire.messages import Pause, PauseResponse, Resume
from emu.wire.synic import HYPERVISOR_CALLBACK_VECTOR, VMBUS_MESSAGE_SINT, event_flag
from emu.wire.versions import VERSION_COPPER, VERSION_WIN7, FeatureFlags, version_from_text
from guestproc.vcpu import CALL_FUNCTION_VECTOR
from tests.system.commands import assert_gone, call, report, wait_for
from tests.system.python_guest import SIEFP_PAGE, PythonGuest
from tools.ctl import ask_host
from tools.launch import MachineDied, launch

HOSTS = ("0.13", "1.1", "2.4", "3.0", "4.0", "4.1", "5.0", "5.1", "5.2", "5.3", "6.0")
AGREED = {
    "current": (None, None, "2.4", "3.0", "4.0", "4.1", "5.0", "5.1", "5.2", "5.3", "5.3"),
    "seed": ("0.13", "1.1", "2.4", "3.0", "4.0", *["4.0"] * 6),
}
"""What a guest of each era and each of the hosts agree on (reference 2.3); None: the guest is refused."""


# Twenty-two machines in turn: on a loaded computer that takes long, and how long is not what is claimed.
@pytest.mark.timeout(240)
def test_matrix_of_eras_and_versions(tmp_path: Path) -> None:
    """22 machines: what was negotiated, all channels open and used, or a clean refusal; nothing is left of any."""
    done = call(tmp_path, "matrix", "--json", timeout_s=220)

    assert done.returncode == 0, done.stdout + done.stderr
    results = report(done.stdout)["results"]
    assert [(one["era"], one["version"], one["negotiated"]) for one in results] == [
        (era, host, agreed) for era, row in AGREED.items() for host, agreed in zip(HOSTS, row, strict=True)
    ]
    for one in results:
        used = one["negotiated"] is not None
        assert (one["offers"], one["channels_open"], one["leaked"], one["ok"]) == (4 * used, 4 * used, 0, True)
        assert (one["packets"] > 0, one["refused"] is None) == (used, used)


def test_refused_guest_is_one_death() -> None:
    """The article's kernel would have been taken, today's is not: its boot CPU says so and ends."""
    machine = MachineSpec(name="t-refused", ram_bytes=64 << 20, host_version=VERSION_WIN7)
    with launch(Scenario(machine, (DeviceSpec(),))) as running, pytest.raises(MachineDied) as died:
        running.wait_ready()

    (death,) = died.value.deaths
    assert death.report().endswith("vmbus_connect: EDOM; the guest's log says why")
    assert_gone("t-refused")


@pytest.mark.parametrize("command", ["run", "stress", "latency"])
def test_guest_that_would_be_refused_is_not_booted(tmp_path: Path, command: str) -> None:
    """The versions of a scenario that cannot meet are one line, with both ways out."""
    scenario = tmp_path / "old.toml"
    scenario.write_text('[machine]\nhost_version = "1.1"\n')

    done = call(tmp_path, command, str(scenario))

    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.endswith('that a host of 1.1 has; raise it to 2.4, or set era = "seed"')


@pytest.mark.parametrize("version", ["0.13", "4.0"])
def test_lists_are_edited_by_interrupts_of_their_processors(tmp_path: Path, version: str) -> None:
    """Each of 6 channels was put on its CPU's list by a call to that CPU; the hypervisor ends the interrupts."""
    scenario = tmp_path / "seed.toml"
    scenario.write_text(
        f'[machine]\nera = "seed"\nhost_version = "{version}"\nvcpus = 3\nvp_order = "reverse"\n'
        'deprecate_auto_eoi = false\n[[device]]\nclass = "echo"\ncount = 6\n'
    )
    recording = str(tmp_path / "boot.rec")

    done = call(tmp_path, "run", str(scenario), "--name", "t-ipi", "--duration", "0", "--record", recording, "--json")
    lines = call(tmp_path, "trace", recording, "--to", "json").stdout.splitlines()

    told = report(done.stdout)
    assert (done.returncode, told["version"], told["channels_open"], told["leaked"]) == (0, version, 6, 0)
    assert (told["task_errors"], told["packets"] > 0) == (0, True)
    entered = [one for one in map(json.loads, lines) if one["event"] == "isr_enter"]
    calls = Counter(one["actor"] for one in entered if one["args"]["vector"] == CALL_FUNCTION_VECTOR)
    # VP 0 is CPU 1. At the end CPU 0 takes its own channels off itself, and has the others' SynICs cleaned up.
    placed = Counter(f"vcpu{channel['vcpu']}" for device in told["devices"] for channel in device["channels"])
    assert placed == ({"vcpu1": 6} if version == "0.13" else {"vcpu0": 2, "vcpu1": 2, "vcpu2": 2})
    for cpu in range(3):
        own = placed[f"vcpu{cpu}"]
        assert calls[f"vcpu{cpu}"] == (own if cpu == 0 else own + own + 1)
    assert any(one["args"]["vector"] == HYPERVISOR_CALLBACK_VECTOR for one in entered)
    assert_gone("t-ipi")


@pytest.mark.parametrize("version", ["0.13", "4.0"])
def test_storm_of_hot_adds_and_removes(version: str, storm_seed: int = 1) -> None:
    """150 orders as fast as they are taken, on 4 vCPUs: every channel that is left is open, and nothing leaks."""
    rng = random.Random(storm_seed)
    print(f"seed {storm_seed}")
    machine = MachineSpec(vcpus=4, ram_bytes=256 << 20, era="seed", host_version=version_from_text(version))
    with launch(Scenario(machine, (DeviceSpec(count=8, ring_pages=4),))) as running:
        running.wait_ready()
        there = set(range(1, 9))
        for _ in range(150):
            if there and rng.random() < 0.5:
                there.remove(relid := rng.choice(sorted(there)))
                ask_host(running.machine, "rescind", relid=relid, instance="")
            else:
                arguments = {"class": "echo", "backend": "echo", "count": rng.randrange(1, 4), "instance": None}
                offered = ask_host(running.machine, "offer", **arguments)["offered"]
                there |= {one["relid"] for one in offered}
        mirror = Mirror(running.machine.control)
        running.wait_until(
            lambda: mirror.head().open == mirror.head().offers == len(there), 30, "the machine to settle"
        )
        assert running.shut_down_guest()
        running.wait_until(lambda: mirror.head().offers == mirror.head().gpadls == 0, 10, "everything to be given back")
        assert running.machine.control.leaked == 0
        assert running.machine.control.refusals()[0].keys() <= {"contact-version"}
    assert running.deaths == []
    assert_gone(running.name)


def test_guest_of_6_0_chooses_its_signals_and_pauses() -> None:
    """Features are intersected; a channel is signalled by the ids that the guest names; PAUSE holds messages back."""
    wanted = FeatureFlags.GUEST_SPECIFIED_SIGNAL_PARAMETERS | FeatureFlags.CLIENT_ID | FeatureFlags.PAUSE_RESUME
    machine = MachineSpec(ram_bytes=64 << 20, host_version=VERSION_COPPER, features=wanted)
    scenario = Scenario(machine, (DeviceSpec(count=2),))
    with launch(scenario, no_guest=True) as running:
        with PythonGuest(running.name) as guest:
            guest.bring_up()
            response = guest.contact(VERSION_COPPER, features=0xFF & ~0x40, client_id=UUID(int=7))
            assert (response.version_supported, response.supported_features) == (1, int(wanted))
            offers = guest.offers()

            channel = guest.open(offers[0], connection_id=0x3ABC, event_flag=77)
            assert len(channel.echo(4)) == 4
            own, bit = event_flag(VMBUS_MESSAGE_SINT, 77)
            # The answers can be read before the host has signalled them.
            wait_for(lambda: guest.memory.read(SIEFP_PAGE + own, 1)[0] & bit != 0, "the flag that the guest named")
            theirs, other = event_flag(VMBUS_MESSAGE_SINT, channel.relid)
            assert not guest.memory.read(SIEFP_PAGE + theirs, 1)[0] & other
            ordinary = guest.open(offers[1])
            assert len(ordinary.echo(4)) == 4

            guest.answered(Pause(), PauseResponse)
            assert len(channel.echo(4)) == 4  # packets go on
            guest.send(Resume())
            guest.close_channel(channel)
            guest.close_channel(ordinary)
            guest.leave(offers)
        running.pump(0.0)
        assert running.machine.control.refusals()[0] == {}
    assert running.deaths == []
    assert_gone(running.name)
