"""The `ftrace` format: text, line by line what the kernel's `trace` file shows.

    vcpu0-4711    [000] d.h..   261.001734: isr_enter: vector=243

Columns: name and number of the thread, its processor, five flags (interrupts off, reschedule, interrupt or
softirq, pre-emption, migration), seconds with the kernel's rounding to µs, event, arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from emu.recording import Recording, TraceRecord
from tools.export.events import printed_text
from tools.export.threads import Thread, Threads

FLAGS: Final = {"ISR": "d.h..", "TASKLET": "..s.."}
"""By context; elsewhere no flag is set."""
_LEGEND: Final = (
    "                               _-----=> irqs-off/BH-disabled",
    "                              / _----=> need-resched",
    "                             | / _---=> hardirq/softirq",
    "                             || / _--=> preempt-depth",
    "                             ||| / _-=> migrate-disable",
    "                             |||| /     delay",
    "          TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION",
    "             | |         |   |||||     |         |",
)


def ftrace(recording: Recording) -> Iterator[bytes]:
    """Every record as one line, in the order of time, below the kernel's heading."""
    threads = Threads.of_recording(recording)
    count = recording.count
    yield f"# tracer: nop\n#\n# entries-in-buffer/entries-written: {count}/{count + recording.dropped}".encode()
    yield f"   #P:{threads.cpus}\n#\n".encode() + "".join(f"#{line}\n" for line in _LEGEND).encode()
    for record in recording.records():
        yield line(record, threads.of(record.actor)).encode()


def line(record: TraceRecord, thread: Thread) -> str:
    """One record as the kernel prints it."""
    # The kernel rounds to the nearest microsecond.
    seconds, micros = divmod((record.t_ns + 500) // 1_000, 1_000_000)
    flags = FLAGS.get(record.context, ".....")
    head = f"{thread.comm:>16}-{thread.tid:<7} [{thread.cpu:03}] {flags} {seconds:5}.{micros:06}"
    return f"{head}: {record.event.name}: {printed_text(record)}\n"
