"""`vmbus-emu ctl` as a user types it: the host's half and the guest's half, over a real machine."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from uuid import UUID

import pytest

from emu.control import Control
from emu.ipc.segments import object_name
from emu.ipc.semaphores import Wakeup
from emu.orders import OrderDesk, OrderState
from emu.scenario import derived_instance
from emu.vmexit import HostBell
from tests.system.commands import (
    assert_gone,
    call,
    ended,
    inner_pids,
    objects,
    report,
    start,
    wait_for,
    wait_until_open,
)
from tools import cli

NIC = "f8615163-df3e-46c5-913f-f2d2f965ed0e"
NAME = f"t-ctl-{os.getpid()}"

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of its own, and a machine with three echo devices that runs meanwhile."""
    home = tmp_path_factory.mktemp("ctl")
    done = call(home, "run", "--detach", "--name", NAME, "--device", "echo:3")
    assert done.returncode == 0, done.stderr
    yield home
    stopped = call(home, "stop", "--machine", NAME)
    assert stopped.returncode == 0, stopped.stderr
    # Not `assert_gone`: this process itself has mapped the machine, and lets go of it some time.
    assert objects(NAME) == []


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """What the command line does with signals ends with the test."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command line, run in this process: it takes milliseconds, not half a second."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(list(arguments))
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def ctl(*arguments: str, machine: str = NAME) -> subprocess.CompletedProcess[str]:
    """One sub-command, of the test's machine."""
    return here("ctl", arguments[0], "--machine", machine, *arguments[1:])


def devices() -> list[dict[str, Any]]:
    """What `ls` has."""
    listed: list[dict[str, Any]] = report(here("ls", "--json", "--machine", NAME).stdout)["devices"]
    return listed


def told(*arguments: str) -> dict[str, Any]:
    """What one says as JSON."""
    done = ctl(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    value = report(done.stdout)
    assert value["schema"]["name"] == f"vmbus-emu.ctl-{arguments[0]}"
    assert value["machine"] == NAME
    return value


def said(*arguments: str) -> str:
    """What one says to people."""
    done = ctl(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def orders() -> list[OrderState]:
    """How far each letter to the machine is."""
    control = Control.attach(object_name(NAME, "control"))
    try:
        return OrderDesk(control).states()
    finally:
        control.close()


@contextlib.contextmanager
def stopped_host() -> Iterator[None]:
    """The host reads nothing meanwhile."""
    pid = inner_pids(NAME)["hypervisor"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def driver(name: str) -> dict[str, Any]:
    """One driver as the guest has it."""
    return next(one for one in told("drivers")["drivers"] if one["name"] == name)


def listed(relid: int) -> dict[str, Any]:
    """A device as `ls` has it."""
    return next(one for one in devices() if one["relid"] == relid)


# -- the host's half ------------------------------------------------------------------------------------


def test_device_is_added_and_taken_back() -> None:
    """offer says relid and instance, rescind takes either; with --wait the one has opened, the other has released."""
    first, second = told("offer", "nic:2", "--wait")["offered"]
    assert (first["class"], first["relid"], second["relid"]) == ("nic", 4, 5)
    assert listed(4)["channels"][0]["state"] == "opened"
    gone = told("rescind", "4", "--wait")
    text = said("rescind", "--instance", second["instance"], "--wait")

    assert (gone["relid"], gone["instance"]) == (4, first["instance"])
    assert text == f"5 {second['instance']}\n"
    assert len(devices()) == 3


def test_instance_that_nobody_chose_is_the_first_free_one() -> None:
    """Of those derived from the class, in their order; one that was released comes again."""
    both = told("offer", "nic:2", "--wait")["offered"]
    said("rescind", str(both[0]["relid"]), "--wait")
    (again,) = told("offer", "nic", "--wait")["offered"]
    for one in (again, both[1]):
        said("rescind", str(one["relid"]), "--wait")

    expected = [str(derived_instance("nic", index)) for index in (0, 1, 0)]
    assert [one["instance"] for one in (*both, again)] == expected


def test_instance_of_ones_choice() -> None:
    """It is taken as given, once; after its release the same relid may be had again."""
    instance = str(UUID(int=77))
    text = said("offer", "kvp", "--instance", instance, "--wait")
    again = ctl("offer", "kvp", "--instance", instance)
    said("rescind", "--instance", instance, "--wait")

    assert text == f"4 {instance}\n"
    assert (again.returncode, again.stderr) == (
        2,
        f"vmbus-emu: device {instance} is offered already; choose another --instance\n",
    )


# -- the guest's half -----------------------------------------------------------------------------------


def test_device_changes_hands() -> None:
    """Unbound it is closed, and stays; another driver takes it by an override, and the first one has it back."""
    device = told("unbind", "3")["device"]
    assert listed(3)["driver"] is None and listed(3)["channels"][0]["state"] == "open"
    assert said("override", "3", "uio_hv_generic") == f"{device} - (override: uio_hv_generic)\n"
    refused = ctl("bind", "hv_echo", "3")
    assert refused.returncode == 2 and "-ENODEV: hv_echo does not match" in refused.stderr
    assert said("bind", "uio_hv_generic", device) == f"{device} uio_hv_generic (override: uio_hv_generic)\n"
    assert listed(3)["driver"] == "uio_hv_generic"
    said("override", "3", "none")
    said("unbind", device)

    assert told("bind", "hv_echo", "3")["driver"] == "hv_echo"
    assert listed(3)["channels"][0]["state"] == "opened"


def test_ids_and_late_registration() -> None:
    """With the first driver gone, an id that is added gives its devices to the second; registered again it has none."""
    assert told("unregister", "hv_echo")["devices"] == 0
    added = told("new-id", "uio_hv_generic", "echo")
    again = ctl("new-id", "uio_hv_generic", "echo")
    registered = told("register", "hv_echo")
    removed = told("remove-id", "uio_hv_generic", "echo")

    assert (added["devices"], len(added["dynamic_ids"])) == (3, 1)
    assert (again.returncode, again.stdout) == (2, "") and again.stderr.startswith("vmbus-emu: -EEXIST: ")
    assert (registered["registered"], registered["devices"]) == (True, 0)
    assert (removed["devices"], removed["dynamic_ids"]) == (3, [])
    for relid in ("1", "2", "3"):
        said("unbind", relid)
        said("bind", "hv_echo", relid)
    assert driver("hv_echo")["devices"] == 3
    assert said("drivers").splitlines()[1].split() == ["hv_echo", "1", "yes", "3", "23", "-"]


@pytest.mark.parametrize("where", ["alloc_channel", "work_alloc", "device_create", "device_register", "add_kobj"])
def test_offer_that_fails_is_released_and_may_come_again(where: str) -> None:
    """The guest gives the relid back by itself; the host offers it no more, and may offer the device again."""
    assert said("fail", where) == f"{where}: 1 more\n"
    (one,) = told("offer", "echo")["offered"]
    wait_for(lambda: told("fail", "probe", "--times", "0")["faults"] == [], "the fault to strike")
    wait_for(lambda: len(devices()) == 3, "the relid to go")
    said("rescind", "--instance", one["instance"], "--wait")
    (again,) = told("offer", "echo", "--instance", one["instance"], "--wait")["offered"]

    assert again["relid"] == one["relid"] == 4
    said("rescind", "4", "--wait")


@pytest.mark.parametrize(
    ("step", "why"),
    [
        ("probe", "its probe failed with -EIO; `vmbus-emu inspect log` says more"),
        ("alloc_channel", "the guest has given the relid back; "),
        ("device_register", "the guest has given the relid back; "),
    ],
)
def test_wait_for_a_device_that_fails_to_open_ends_and_says_why(step: str, why: str) -> None:
    """Exit status 1, where 124 is its deadline; the other device is waited for, and open."""
    said("fail", step)
    done = ctl("offer", "echo:2", "--wait", "--json")
    answer = report(done.stdout)
    lost, kept = answer["offered"]
    (unopened,) = answer["not_open"]

    assert done.returncode == 1
    assert (unopened["relid"], unopened["instance"]) == (lost["relid"], lost["instance"])
    assert unopened["why"].startswith(why)
    assert done.stderr == f"vmbus-emu: relid {lost['relid']} will not be open: {unopened['why']}\n"
    wait_for(lambda: opened(kept["relid"]), "the guest to hear that the host has opened it")
    for one in (lost, kept):
        said("rescind", "--instance", one["instance"], "--wait")


def test_wait_for_a_device_that_no_driver_takes_ends() -> None:
    """Of sockets there is none."""
    done = ctl("offer", "hv_sock", "--wait")
    relid = done.stdout.split()[0]

    assert done.returncode == 1
    assert done.stderr.startswith(f"vmbus-emu: relid {relid} will not be open: no driver has taken it; ")
    said("rescind", relid, "--wait")


@pytest.mark.parametrize("then", ["let go", "taken back"])
def test_wait_goes_on_while_a_probe_hangs(home: Path, then: str) -> None:
    """It may come to something still: it is let go and opens, or its device is taken back, which ends the wait."""
    said("fail", "probe_hang")
    with ended(start(home, "ctl", "offer", "echo", "--wait", "--machine", NAME)) as offer:
        wait_for(lambda: told("fail", "probe", "--times", "0")["faults"] == [], "the probe to hang")
        assert offer.poll() is None
        if then == "taken back":
            said("rescind", "4")
            out, err = offer.communicate(timeout=30)
            assert (offer.returncode, err) == (1, "vmbus-emu: relid 4 will not be open: the device was taken back\n")
        said("fail", "probe_hang", "--times", "0")
        if then == "let go":
            out, err = offer.communicate(timeout=30)
            assert (offer.returncode, err) == (0, "")
            said("rescind", "4", "--wait")
    assert out.startswith("4 ")
    wait_for(lambda: len(devices()) == 3, "the device to go")


def interrupt(*_arguments: object) -> NoReturn:
    """What Ctrl-C is to whoever waits."""
    raise KeyboardInterrupt


@pytest.mark.parametrize(("end", "status"), [("limit", 124), ("Ctrl-C", 130)])
def test_wait_that_comes_to_no_end_tells_what_was_done(monkeypatch: pytest.MonkeyPatch, end: str, status: int) -> None:
    """One object: what was offered, or taken back, and what was waited for in vain, or that it was interrupted."""
    if end == "limit":
        monkeypatch.setattr("tools.ctl.WAIT_S", 0.05)
    else:
        monkeypatch.setattr("tools.ctl._watch", interrupt)
    said("fail", "probe_hang", "--relid", "4")
    offer = ctl("offer", "echo", "--wait", "--json")
    wait_for(lambda: told("fail", "probe", "--times", "0")["faults"] == [], "the probe to hang")
    rescind = ctl("rescind", "4", "--wait", "--json")
    said("fail", "probe_hang", "--times", "0")
    wait_for(lambda: len(devices()) == 3, "the device to go")

    (one,) = report(offer.stdout)["offered"]
    assert (one["relid"], report(rescind.stdout)["relid"]) == (4, 4)
    for done, what in ((offer, "be open"), (rescind, "be released")):
        late = f"relid 4 to {what}: no answer within 0.05 s" if end == "limit" else None
        answer = report(done.stdout)
        assert (done.returncode, answer["timed_out"], answer["interrupted"]) == (status, late, end == "Ctrl-C")
        assert done.stderr == (f"vmbus-emu: {late}\n" if late else "")


@pytest.mark.parametrize(("signum", "words"), [(signal.SIGINT, ("offer", "echo")), (signal.SIGTERM, ("rescind", "1"))])
def test_order_that_is_interrupted_before_its_answer(
    home: Path, signum: signal.Signals, words: tuple[str, str]
) -> None:
    """While the host stands still: one line, the signal's status, and the host never carries it out."""
    with stopped_host(), ended(start(home, "ctl", *words, "--machine", NAME)) as asking:
        wait_for(lambda: OrderState.POSTED in orders(), "the letter")
        asking.send_signal(signum)
        out, err = asking.communicate(timeout=20)

    assert (asking.returncode, out) == (128 + signum, "")
    assert err == f"vmbus-emu: interrupted before `{words[0]}` was read: it is not done\n"
    assert set(orders()) == {OrderState.FREE} and len(devices()) == 3


def interrupt_when(state: OrderState) -> Callable[[HostBell], None]:
    """A wake-up behind which Ctrl-C comes when the letter is in that state."""

    def wake(bell: HostBell) -> None:
        woken(bell)
        wait_for(lambda: state in orders(), f"a letter that is {state.name}")
        raise KeyboardInterrupt

    woken = HostBell.wake
    return wake


@pytest.mark.parametrize("as_json", [False, True])
def test_order_that_is_interrupted_when_it_was_read(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    """It may be done all the same, as it was here: that is said, as the command does not know."""
    monkeypatch.setattr(HostBell, "wake", interrupt_when(OrderState.DONE))
    done = ctl("offer", "echo", *(["--json"] if as_json else []))
    monkeypatch.undo()

    assert done.returncode == 130
    assert done.stderr.startswith("vmbus-emu: interrupted before `offer` was answered: it may be done all the same; ")
    assert done.stderr.count("\n") == 1
    if as_json:
        answer = report(done.stdout)
        assert (answer["offered"], answer["unanswered"], answer["interrupted"]) == ([], True, True)
    else:
        assert done.stdout == ""
    assert set(orders()) == {OrderState.FREE}
    wait_for(lambda: len(devices()) == 4, "the device that nobody was told of")
    device = devices()[-1]
    said("rescind", str(device["relid"]), "--wait")


def test_call_of_the_guest_that_is_interrupted_when_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an administrator does to drivers is told as well: the driver lets go although nobody hears its answer."""

    def wake(wakeup: Wakeup) -> None:
        woken(wakeup)
        wait_for(lambda: OrderState.DONE in orders(), "an answer")
        raise KeyboardInterrupt

    woken = Wakeup.post
    monkeypatch.setattr(Wakeup, "post", wake)
    done = ctl("unbind", "2")
    monkeypatch.undo()

    assert (done.returncode, done.stdout) == (130, "")
    assert "interrupted before `unbind` was answered: it may be done all the same; " in done.stderr
    assert listed(2)["driver"] is None
    said("bind", "hv_echo", "2")


def test_instance_names_one_device_and_no_other() -> None:
    """Also where there are devices that have no relid, as the guest could not take them."""
    said("fail", "alloc_channel", "--times", "2")
    lost = told("offer", "echo:2")["offered"]
    wait_for(lambda: told("fail", "probe", "--times", "0")["faults"] == [], "both faults to strike")
    wait_for(lambda: len(devices()) == 3, "both relids to go")
    (kept,) = told("offer", "echo", "--wait")["offered"]

    assert told("rescind", "--instance", kept["instance"], "--wait")["relid"] == kept["relid"]
    for one in lost:
        gone = told("rescind", "--instance", one["instance"])
        assert (gone["instance"], gone["relid"]) == (one["instance"], 0)


def test_uevents_are_told() -> None:
    """As udevadm prints them, and as JSON; the newest is what was done last."""
    device = told("unbind", "2")["device"]
    said("bind", "hv_echo", "2")
    lost, got = told("uevents")["uevents"][-2:]
    path = f"/devices/vmbus-emu/{device}"

    assert (lost["head"], got["head"]) == (f"unbind@{path}", f"bind@{path}")
    assert got["variables"]["DRIVER"] == "hv_echo" and got["seqnum"] == lost["seqnum"] + 1
    assert said("uevents").splitlines()[-8:-5] == [f"KERNEL[{got['machine_ns'] / 1e9:.6f}] bind@{path}"] + [
        "ACTION=bind",
        f"DEVPATH={path}",
    ]


def test_uevents_are_followed(home: Path) -> None:
    """--follow prints what comes, at once."""
    with ended(start(home, "ctl", "uevents", "--follow", "--machine", NAME)) as follower:
        assert follower.stdout is not None
        said("unbind", "1")
        said("bind", "hv_echo", "1")
        lines: list[str] = []
        while not (lines and lines[-1].startswith("KERNEL") and " bind@" in lines[-1] and len(lines) > 1):
            lines.append(follower.stdout.readline())
            assert lines[-1], "it ended"


def test_probe_that_hangs_is_let_go(home: Path) -> None:
    """bind does not come back meanwhile, other calls do; --times 0 lets it go on."""
    said("unbind", "3")
    said("fail", "probe_hang", "--relid", "3")
    with ended(start(home, "ctl", "bind", "hv_echo", "3", "--machine", NAME)) as bind:
        wait_for(lambda: told("fail", "probe", "--times", "0")["faults"] == [], "the probe to hang")
        assert bind.poll() is None
        assert driver("hv_echo")["devices"] == 2
        said("fail", "probe_hang", "--times", "0")
        out, _ = bind.communicate(timeout=30)
    assert bind.returncode == 0 and out.endswith(" hv_echo\n")


def test_device_that_comes_back_before_its_release() -> None:
    """Taken back while its probe hangs, and offered again: the same relid, one life later, once the guest lets go."""
    said("fail", "probe_hang", "--relid", "4")
    (first,) = told("offer", "echo")["offered"]
    wait_for(lambda: told("fail", "probe", "--times", "0")["faults"] == [], "the probe to hang")
    gone = told("rescind", "4")
    again = told("offer", "echo", "--instance", first["instance"])["offered"][0]
    said("fail", "probe_hang", "--times", "0")
    wait_for(lambda: opened(4), "the relid to be opened")

    assert (first["relid"], gone["relid"], again["relid"]) == (4, 4, 4)
    life = told("rescind", "4", "--wait")
    assert life["generation"] == first["generation"] + 1


def opened(relid: int) -> bool:
    """Whether a device is there and open."""
    return any(one["relid"] == relid and one["channels"][0]["state"] == "opened" for one in devices())


def test_machine_stops_with_a_probe_that_hangs(tmp_path: Path) -> None:
    """Shutting down lets it go: the guest unloads, nothing leaks, nothing is left, at once."""
    name = f"t-hang-{os.getpid()}"
    with ended(start(tmp_path, "run", "--name", name, "--device", "echo:2", "--json")) as run:
        wait_until_open(name, run)
        for words in (("unbind", "2"), ("fail", "probe_hang")):
            assert ctl(*words, machine=name).returncode == 0
        with ended(start(tmp_path, "ctl", "bind", "hv_echo", "2", "--machine", name)) as bind:
            wait_for(
                lambda: '"faults": []' in ctl("fail", "probe", "--times", "0", "--json", machine=name).stdout,
                "the probe to hang",
            )
            stopped = call(tmp_path, "stop", "--machine", name, timeout_s=20)
            bind.communicate(timeout=30)
        out, err = run.communicate(timeout=30)
    assert stopped.returncode == 0, stopped.stderr
    assert report(out)["leaked"] == 0 and report(out)["deaths"] == [], err
    assert_gone(name)


# -- wrong input ----------------------------------------------------------------------------------------


def test_processor_is_emptied_and_goes() -> None:
    """`cpus` says whose interrupts hold it; moved away, it may go, and comes back when it is told to."""
    before = told("cpus")["cpus"][1]
    held = ctl("offline", "1")
    first = before["relids"][0]
    lines = [said("move", str(relid), "0") for relid in before["relids"]]
    assert said("offline", "1").splitlines()[1].split() == ["1", "1", "no", "0", "-"]
    assert told("online", "1") | {"schema": 0} == {"schema": 0, "machine": NAME, **before, "channels": 0, "relids": []}
    moved = told("move", str(first), "1")

    assert held.returncode == 2 and f"interrupts of relid {first} go to CPU 1; `vmbus-emu ctl move" in held.stderr
    assert lines[0] == f"{first} 1 -> 0\n"
    assert (moved["relid"], moved["from"], moved["cpu"]) == (first, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("offer", "floppy"), "floppy"),
        (("offer", "echo", "--backend", "x"), "x is not a back end; there are echo"),
        (("offer", "echo:2", "--instance", str(UUID(int=1))), "--instance names one device"),
        (("offer", "echo", "--instance", "zz"), "--instance: "),
        (("rescind",), "give either a relid or --instance"),
        (("rescind", "77"), "no device with relid 77 is offered; `vmbus-emu ls`"),
        (("rescind", "2048"), "2048 is no relid"),
        (("rescind", "abc"), "abc is no relid, a channel's number from 1 to 2047; `vmbus-emu ls` shows them"),
        (("rescind", "--instance", str(UUID(int=5))), "no device with instance"),
        (("bind", "hv_echo", "1"), "-EBUSY: "),
        (("bind", "hv_echo", "77"), "-ENODEV: no device 77 on the guest's bus; `vmbus-emu ls`"),
        (("bind", "hv_nobody", "1"), "-ENODEV: no driver hv_nobody is registered; `vmbus-emu ctl drivers`"),
        (("unbind", "zz"), "-EINVAL: 'zz' is no GUID; write it as"),
        (
            ("unbind", "5b95e15225-77-53deb754-077d30-a7882a"),
            "-EINVAL: '5b95e15225-77-53deb754-077d30-a7882a' is no GUID",
        ),
        (("new-id", "uio_hv_generic", "12"), "12 is no class and no GUID; there are the classes avma1,"),
        (("bind", "1", "hv_echo"), "1 is a device and hv_echo is none; the order is `vmbus-emu ctl bind hv_echo 1`"),
        (("override", "hv_echo", "1"), "the order is `vmbus-emu ctl override 1 hv_echo`"),
        (("remove-id", "uio_hv_generic", NIC), "-ENODEV: "),
        (("override", "1", "x" * 40), "-EINVAL: "),
        (("register", "hv_echo"), "-EBUSY: hv_echo is registered already"),
        (("unregister", "hv_nobody"), "-ENOENT: no driver hv_nobody; there are hv_echo"),
        (("fail", "nowhere"), "alloc_channel"),
        (("fail", "probe", "--times", "-1"), "--times"),
        (("fail", "probe", "--relid", "2048"), "--relid: 2048 is no relid"),
        (("uevents", "--follow", "--json"), "choose one of them"),
        (("move", "99", "1"), "-ENODEV: no channel 99 on the guest's bus; `vmbus-emu ls` lists them"),
        (("move", "3/1", "1"), "-ENODEV: no sub-channel 1 of 3"),
        (("move", "3/x", "1"), "'x' is no sub-channel's index; write DEVICE/N, as in 3/2"),
        (("move", "3", "7"), "-EINVAL: there is no CPU 7 that is online; `vmbus-emu ctl cpus` lists them"),
        (("offline", "0"), "-EBUSY: CPU 0 takes the host's messages; choose another"),
        (("offline", "9"), "-EINVAL: there is no CPU 9; `vmbus-emu ctl cpus` lists them"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    """Named, with the cure, on one line, exit code 2, and nothing on stdout."""
    done = ctl(*arguments)

    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_machine_without_a_guest_of_ours(tmp_path: Path) -> None:
    """Its drivers are its own affair: one line says so, while the host's half works."""
    name = f"t-foreign-{os.getpid()}"
    with ended(start(tmp_path, "run", "--no-guest", "--name", name)):
        wait_for(lambda: ctl("offer", "echo", machine=name).returncode == 0, "the host to run")
        done = ctl("drivers", machine=name)
        unopened = ctl("offer", "echo", "--wait", machine=name)
        call(tmp_path, "stop", "--machine", name)

    assert done.returncode == 2 and "has no guest of ours" in done.stderr
    assert unopened.returncode == 2 and "--wait: no guest is connected" in unopened.stderr
    assert_gone(name)


def test_machine_that_does_not_run() -> None:
    """Named, as with every command."""
    done = ctl("drivers", machine="t-nobody")

    assert done.returncode == 2 and "t-nobody" in done.stderr


def test_wait_that_the_end_of_the_machine_ends_says_so(tmp_path: Path) -> None:
    """A guest that leaves takes its drivers away first: that no driver has the device is not what happened to it."""
    name = f"{NAME}-stopped"
    assert call(tmp_path, "run", "--detach", "--name", name, "--device", "echo:1").returncode == 0
    try:
        ctl("fail", "probe_hang", machine=name)
        with ended(start(tmp_path, "ctl", "offer", "echo", "--wait", "--machine", name)) as waiting:
            faults = ("fail", "probe", "--times", "0", "--json")
            wait_for(lambda: report(ctl(*faults, machine=name).stdout)["faults"] == [], "the probe to hang")
            assert call(tmp_path, "stop", "--machine", name).returncode == 0
            _out, err = waiting.communicate(timeout=20)
    finally:
        call(tmp_path, "stop", "--machine", name)

    assert (waiting.returncode, err) == (1, "vmbus-emu: relid 2 will not be open: the machine was stopped\n")


def test_more_devices_than_one_answer_has_room_for(tmp_path: Path) -> None:
    """Each is told; what comes when every relid is in use is there without one, and that is said."""
    name = f"{NAME}-many"
    assert call(tmp_path, "run", "--detach", "--name", name, "--device", "echo:1").returncode == 0
    try:
        many = ctl("offer", "echo:200", "--wait", "--json", machine=name)
        rest = ctl("offer", "echo:1900", machine=name)
        late = ctl("offer", "echo", "--wait", machine=name)
    finally:
        stopped = call(tmp_path, "stop", "--machine", name)

    assert many.returncode == 0 and len({one["relid"] for one in report(many.stdout)["offered"]}) == 200
    relids = [int(line.split()[0]) for line in rest.stdout.splitlines()]
    assert (rest.returncode, len(relids), max(relids), relids.count(0)) == (0, 1900, 2047, 54)
    assert "54 of 1900 without a relid, for the next REQUESTOFFERS: all relids are in use" in rest.stderr
    # Whatever ends the wait, who it is about was told before.
    assert late.stdout.startswith("0 ") and len(late.stdout.split()) == 2
    assert late.returncode == 2 and "--wait: all relids are in use" in late.stderr
    assert stopped.returncode == 0, stopped.stderr


def test_log_that_an_answer_speaks_of_can_be_read(tmp_path: Path) -> None:
    """Who is told that the log says why finds it in the running machine."""
    name = f"{NAME}-log"
    assert call(tmp_path, "run", "--detach", "--name", name, "--device", "echo:1").returncode == 0
    try:
        ctl("unbind", "1", machine=name)
        ctl("fail", "probe", machine=name)
        refused = ctl("bind", "hv_echo", "1", machine=name)

        def log() -> list[str]:
            shown = call(tmp_path, "inspect", "log", "--machine", name, "--json")
            return list(report(shown.stdout)["value"].values())

        # The launcher hears of it a moment later.
        wait_for(lambda: any("probe failed for device" in line and line.endswith("(-5)") for line in log()), "the log")
        first = log()[0]
    finally:
        call(tmp_path, "stop", "--machine", name)

    assert refused.returncode == 2 and "`vmbus-emu inspect log` says why" in refused.stderr
    assert first == "vcpu0: Vmbus version:5.3"
