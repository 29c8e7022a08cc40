"""The tasklets of a processor that records: the same queue, with a record where a tasklet has run."""

from __future__ import annotations

from typing import Any

from emu.tracing import E_TASKLET_DONE, Recorder
from guestproc.kernel.actors import Actor
from guestproc.kernel.tasklet import Tasklet, TaskletQueue
from guestproc.kernel.wait import WaitQueue


class RecordedTaskletQueue(TaskletQueue):
    """Says when a tasklet has returned; that it runs, its function says, which knows for which channel."""

    def __init__(self, actor: Actor, idle: WaitQueue, owner: Any, recorder: Recorder) -> None:
        super().__init__(actor, idle, owner)
        self._record = recorder.record

    def _call(self, tasklet: Tasklet) -> None:
        # Whoever waits for its end may free it at once.
        function = tasklet.function
        super()._call(tasklet)
        self._record(E_TASKLET_DONE, function, 0)
