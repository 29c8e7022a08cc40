"""Who recorded, as other tools see it: a thread with a number and a name, and a processor that it is on.

Guest processors keep their numbers; a processor with several tasks has each as a thread. Workers carry the boot CPU's;
what is not of the guest (the hypervisor) gets a processor of its own behind the last. A recording knows the pid of a
process only: the first of its actors has that number, the others get numbers that no process of the recording has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from emu.recording import RecordedActor, Recording

COMM_BYTES: Final = 15
"""How much of a name a kernel's task keeps."""
BOOT_CPU: Final = 0


@dataclass(frozen=True, slots=True)
class Thread:
    """One actor: its number, its process's number, its name, the processor that its records are shown on."""

    tid: int
    pid: int
    name: str
    cpu: int
    process: str = ""
    """Of what runs on a thread of another name: that one's (a processor's tasks)."""

    @property
    def comm(self) -> str:
        """The name as a kernel keeps it."""
        return self.name[:COMM_BYTES]


class Threads:
    """The threads of a recording; `of` finds the one of a record's actor."""

    def __init__(self, actors: Iterable[RecordedActor]) -> None:
        known = sorted(actors, key=lambda actor: actor.slot)
        self.guest_cpus = 1 + max((actor.cpu for actor in known if actor.kind == "VCPU"), default=BOOT_CPU)
        self.cpus = self.guest_cpus + 1
        """One more than the guest's: the last is the host's."""
        self._next = 1 + max((actor.pid for actor in known), default=0)
        self._taken: set[int] = set()
        self._threads = {actor: self._thread(actor) for actor in known}

    @classmethod
    def of_recording(cls, recording: Recording) -> Threads:
        """The threads of everybody that the recording names."""
        return cls(recording.actors.values())

    def of(self, actor: RecordedActor) -> Thread:
        """The thread of an actor; one that the file does not introduce is made up."""
        thread = self._threads.get(actor)
        if thread is None:
            thread = self._threads[actor] = self._thread(actor)
        return thread

    def process_of(self, thread: Thread) -> str:
        """The name of a thread's process: its own, but where several share it, it is the workqueue's."""
        if thread.process:
            return thread.process
        alone = sum(one.pid == thread.pid and not one.process for one in self) == 1
        return thread.name if alone else "workqueue"

    def __iter__(self) -> Iterator[Thread]:
        return iter(self._threads.values())

    def _thread(self, actor: RecordedActor) -> Thread:
        tid = actor.pid
        if not tid or tid in self._taken:
            tid, self._next = self._next, self._next + 1
        self._taken.add(tid)
        on = {"VCPU": actor.cpu, "TASK": actor.cpu, "WORKER": BOOT_CPU, "WORKQUEUE": BOOT_CPU}
        process = f"vcpu{actor.cpu}" if actor.kind == "TASK" else ""
        return Thread(tid, actor.pid or tid, actor.name, on.get(actor.kind, self.guest_cpus), process)
