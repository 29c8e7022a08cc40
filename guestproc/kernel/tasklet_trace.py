"""The tasklets of a processor that records: the same queue, with a record where a tasklet has run."""

from __future__ import annotations

from typing import Any

from emu.tracing import E_TASKLET_DONE, Bound, Recorder
from guestproc.kernel.actors import Actor
from guestproc.kernel.tasklet import Tasklet, TaskletQueue
from guestproc.kernel.wait import WaitQueue


class RecordedTaskletQueue(TaskletQueue):
    """Says when a tasklet has returned; that it runs, its function says, which knows for which channel."""

    def __init__(self, actor: Actor, idle: WaitQueue, owner: Any, recorder: Recorder) -> None:
        super().__init__(actor, idle, owner)
        self._bind = recorder.bind
        self._done: dict[int, Bound] = {}

    def _call(self, tasklet: Tasklet) -> None:
        # Whoever waits for its end may free it at once.
        function = tasklet.function
        TaskletQueue._call(self, tasklet)
        done = self._done.get(function)
        if done is None:
            done = self._done[function] = self._bind(E_TASKLET_DONE, function, 0)
        done()
