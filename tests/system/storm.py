"""A storm: hot adds, hot removes, binds, unbinds, ids, drivers and faults at random, over a real machine.

Two threads order at the same time, one of the host, one of the guest's user space, each with a generator of its own
that the seed makes; the machine's schedule is its own. Programs send packets on the vCPUs meanwhile. At the end the
machine is let settle, and what must hold then is held against it: `Storm.settled` says what does not.
"""

from __future__ import annotations

import errno
import mmap
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from emu.mirror import Mirror
from emu.orders import OrderRefused
from emu.task_board import Program
from emu.wire.device_classes import BY_NAME
from guestproc.kernel.layout import KernelTables
from guestproc.kernel.workqueue import QueueNumber
from tools.ctl import ask_host
from tools.ctl_guest import ask_guest
from tools.launch import RunningMachine

CLASSES: Final = ("echo", "nic", "kvp", "scsi")
DRIVERS: Final = ("hv_echo", "uio_hv_generic")
FAULTS: Final = ("alloc_channel", "work_alloc", "device_create", "device_register", "add_kobj", "probe")
MOST_DEVICES: Final = 24
MOST_TASKS: Final = 40
"""The board of programs has 64 rows, and they are not given back."""
TASK_PACKETS: Final = 32
SETTLE_S: Final = 30.0
ALLOWED: Final = frozenset(
    {errno.ENODEV, errno.EBUSY, errno.EEXIST, errno.EIO, errno.ENOMEM, errno.EAGAIN, errno.EDQUOT}
)
"""What a call may be refused with, as somebody else was quicker or a fault was planned."""


@dataclass
class Storm:
    """One storm over one machine; `orders` counts what was ordered, `refusals` what was refused, by errno."""

    running: RunningMachine
    seed: int
    orders: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    tasks: list[int] = field(default_factory=list)
    instances: list[str] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        """The devices that the machine has already are in it, too."""
        mirror, expected = Mirror(self.running.machine.control), len(self.running.scenario.devices())
        # The guest has opened them all; the host may tell of that a little later.
        self.running.wait_until(lambda: len(list(mirror.channels())) >= expected, SETTLE_S, "the mirror")
        self.instances.extend(str(channel.if_instance) for channel in mirror.channels())

    def blow(self, operations: int) -> None:
        """Order so many operations, half of each end, and look after the machine meanwhile."""
        ends = [
            threading.Thread(target=self._end, args=(operations // 2, self.seed, host, 0)) for host in (True, False)
        ]
        for end in ends:
            end.start()
        rng = random.Random(self.seed + 2)
        while any(end.is_alive() for end in ends):
            self.running.pump(0.02)
            if len(self.tasks) < MOST_TASKS and rng.random() < 0.3:
                cpu = rng.randrange(self.running.machine.vp_count)
                self.tasks.append(self.running.order(Program.ECHO_CHECK, cpu, wanted=TASK_PACKETS))
        if self.failures:
            raise self.failures[0]

    def _end(self, operations: int, seed: int, host: bool, done: int) -> None:
        """One thread's operations."""
        rng = random.Random(2 * seed + host)
        table = self._host if host else self._guest
        try:
            while done < operations and not self.failures:
                operation = rng.choice(table)
                self.orders[operation.__name__.strip("_")] += 1
                operation(self, rng)
                done += 1
        except BaseException as failure:
            self.failures.append(failure)

    def _try(self, ask: Callable[..., dict[str, Any]], what: str, **arguments: Any) -> dict[str, Any]:
        """Ask; a refusal that a storm brings with it is counted, any other is a failure."""
        try:
            return ask(self.running.machine, what, **arguments)
        except OrderRefused as refused:
            assert refused.errno in ALLOWED or not refused.errno, refused
            self.refusals[errno.errorcode.get(refused.errno, "host")] += 1
        return {}

    # -- the host's -------------------------------------------------------------------------------------

    def _offer(self, rng: random.Random, instance: str | None = None) -> None:
        if instance is None and len(self.instances) >= MOST_DEVICES:
            self._rescind(rng)
        name = rng.choice(CLASSES)
        asked = {"class": name, "backend": "echo", "count": 1, "instance": instance}
        for one in self._try(ask_host, "offer", **asked).get("offered", []):
            self.instances.append(one["instance"])

    def _rescind(self, rng: random.Random) -> str | None:
        if not self.instances:
            return None
        instance = self.instances.pop(rng.randrange(len(self.instances)))
        self._try(ask_host, "rescind", relid=0, instance=instance)
        return instance

    def _replace(self, rng: random.Random) -> None:
        """Taken back and offered again at once: the same id, once the guest has released it (Reoffered)."""
        instance = self._rescind(rng)
        if instance is not None:
            self._offer(rng, instance)

    # -- the guest's ------------------------------------------------------------------------------------

    def _device(self, rng: random.Random) -> str:
        instances = list(self.instances)
        return rng.choice(instances) if instances and rng.random() < 0.8 else str(rng.randrange(1, 40))

    def _bind(self, rng: random.Random) -> None:
        self._try(ask_guest, "bind", driver=rng.choice(DRIVERS), device=self._device(rng))

    def _unbind(self, rng: random.Random) -> None:
        self._try(ask_guest, "unbind", device=self._device(rng))

    def _override(self, rng: random.Random) -> None:
        self._try(ask_guest, "override", device=self._device(rng), driver=rng.choice((*DRIVERS, "", "")))

    def _new_id(self, rng: random.Random) -> None:
        guid = str(BY_NAME[rng.choice(CLASSES)].guid)
        self._try(ask_guest, "new_id", driver="uio_hv_generic", guid=guid)

    def _remove_id(self, rng: random.Random) -> None:
        guid = str(BY_NAME[rng.choice(CLASSES)].guid)
        self._try(ask_guest, "remove_id", driver="uio_hv_generic", guid=guid)

    def _driver(self, rng: random.Random) -> None:
        self._try(ask_guest, rng.choice(("register", "register", "unregister")), driver=rng.choice(DRIVERS))

    def _fail(self, rng: random.Random) -> None:
        self._try(ask_guest, "fail", where=rng.choice(FAULTS), times=rng.randrange(3), relid=0)

    _host = (_offer, _offer, _rescind, _replace)
    _guest = (_bind, _bind, _unbind, _unbind, _override, _new_id, _remove_id, _driver, _fail)

    # -- afterwards -------------------------------------------------------------------------------------

    def rescind_all(self) -> None:
        """Take every device back."""
        while self.instances:
            self._rescind(random.Random(0))

    def settle(self) -> None:
        """Wait until both ends have done what was ordered of them; an assertion that says what is not done."""
        machine = self.running.machine
        mapping = mmap.mmap(machine.ram.fd, machine.ram.size)
        tables, mirror = KernelTables.attach(mapping), Mirror(machine.control)
        self.running.wait_tasks(self.tasks, SETTLE_S)
        end = time.monotonic() + SETTLE_S
        while left := unsettled(tables, ask_host(machine, "lives")):
            assert time.monotonic() < end, f"seed {self.seed}: {left}"
            self.running.pump(0.01)
        lives = ask_host(machine, "lives")
        assert lives["offered"] == lives["released"] + lives["held"], f"seed {self.seed}: {lives}"
        known = set(tables.relids.published())
        self.running.wait_until(lambda: {one.relid for one in mirror.channels()} == known, SETTLE_S, "the mirror")
        assert tables.devices.in_use == len(known), f"seed {self.seed}: {tables.devices.in_use} devices"


def unsettled(tables: KernelTables, lives: dict[str, int]) -> str:
    """What is not done yet; empty when all is."""
    if lives["rescinded"]:
        return f"{lives['rescinded']} relids are not released"
    busy = [number.name for number in QueueNumber if tables.work_queues.length(number)]
    if busy or tables.connection.offer_in_progress.load() or tables.connection.user_calls.load():
        return f"the guest is at work: {busy}"
    known = len(tables.relids.published())
    return "" if known == lives["held"] else f"the guest knows {known} relids, {lives['held']} are offered"
