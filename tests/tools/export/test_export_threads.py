"""Who recorded, as other tools see it."""

from __future__ import annotations

from emu.recording import RecordedActor
from tools.export.threads import Threads

HYPERVISOR = RecordedActor(2, "hypervisor", "HYPERVISOR", 70, 0)
VCPUS = [RecordedActor(3 + cpu, f"vcpu{cpu}", "VCPU", 71 + cpu, cpu) for cpu in range(2)]
WORKERS = [
    RecordedActor(5 + n, name, "WORKER", 73, 4 + n) for n, name in enumerate(["kworker/rescind", "kworker/pri_chan"])
]


def test_threads_of_one_process_are_told_apart() -> None:
    """The first has the process's number, the next one that nobody has; both belong to the process."""
    threads = Threads([HYPERVISOR, *VCPUS, *WORKERS])
    first, second = (threads.of(worker) for worker in WORKERS)

    assert (first.tid, first.pid, second.pid) == (73, 73, 73)
    assert second.tid not in {70, 71, 72, 73}
    assert len({thread.tid for thread in threads}) == 5


def test_guest_cpus_keep_their_numbers_and_the_host_has_its_own() -> None:
    """Workers carry the boot CPU's number; the hypervisor is behind the last of the guest's."""
    threads = Threads([HYPERVISOR, *VCPUS, *WORKERS])

    assert [threads.of(actor).cpu for actor in (*VCPUS, *WORKERS, HYPERVISOR)] == [0, 1, 0, 0, 2]
    assert threads.cpus == 3


def test_name_is_cut_as_the_kernel_cuts_it() -> None:
    """15 bytes of it."""
    assert Threads(WORKERS).of(WORKERS[1]).comm == "kworker/pri_cha"


def test_actor_that_nobody_introduced_is_a_thread_all_the_same() -> None:
    """A damaged file may lack the chunk that names it."""
    threads = Threads(VCPUS)
    lost = threads.of(RecordedActor(9, "slot 9", "NONE", 0, 0))

    assert lost.tid not in {0, 71, 72}
    assert lost.cpu == 2


def test_a_processors_tasks_are_threads_of_it() -> None:
    """On that processor, and of its process, which is not the workers' for having several threads."""
    task = RecordedActor(30, "vcpu1/1", "TASK", VCPUS[1].pid, 1)
    threads = Threads([HYPERVISOR, *VCPUS, *WORKERS, task])
    thread = threads.of(task)

    assert (thread.pid, thread.cpu) == (VCPUS[1].pid, 1) and thread.tid not in {one.pid for one in VCPUS}
    assert threads.process_of(thread) == threads.process_of(threads.of(VCPUS[1])) == "vcpu1"
