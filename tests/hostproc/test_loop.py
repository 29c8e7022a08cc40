"""The host's loop: every source gets its turn, a wake is never lost, and it halts only with nothing to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hostproc.loop import AGAIN, LONGEST_HALT_NS, LOOK_AGAIN_S, OWED_TOKEN_S, WAIT, Loop, TaskBody


class Rounds:
    """A loop that stops after so many rounds; time passes only in halts."""

    def __init__(self, rounds: int = 10, serve: Callable[[], bool] = lambda: False) -> None:
        self.time = 0
        self.halts: list[int] = []
        self.on_halt: Callable[[], None] = lambda: None
        self.loop = Loop(
            serve=serve, halt=self._halt, stopping=lambda: self.loop.rounds >= rounds, now=lambda: self.time
        )

    def _halt(self, nanoseconds: int) -> None:
        self.halts.append(nanoseconds)
        self.time += nanoseconds
        self.on_halt()


def counting(seen: list[str], name: str, yields: list[object]) -> TaskBody:
    """A task that notes each of its turns."""
    for step in yields:
        seen.append(name)
        yield step  # type: ignore[misc]
    seen.append(f"{name} ends")


def test_idle_loop_halts_for_the_longest_time() -> None:
    """With nothing to do every round ends in a halt, of less than the 100 ms that a guest may cost it."""
    rounds = Rounds(3)
    rounds.loop.run()

    assert rounds.halts == [LONGEST_HALT_NS] * 3
    assert LOOK_AGAIN_S + OWED_TOKEN_S <= 0.1


def test_busy_source_keeps_the_loop_awake() -> None:
    """A round that served something is followed by another one without a halt."""
    work = [True, True, False]
    rounds = Rounds(3, serve=lambda: work.pop(0))
    rounds.loop.run()

    assert len(rounds.halts) == 1


def test_waiting_task_runs_when_woken() -> None:
    """A task that yields WAIT is resumed by a wake, and by nothing else."""
    rounds, seen = Rounds(6), list[str]()
    task = rounds.loop.task("t", counting(seen, "t", [WAIT, WAIT]))
    rounds.on_halt = lambda: task.wake() if len(rounds.halts) == 2 else None
    rounds.loop.run()

    assert seen == ["t", "t"]
    assert task.finished is False


def test_task_that_yields_again_runs_every_round() -> None:
    """AGAIN asks for the next round; tasks take turns."""
    rounds, seen = Rounds(3), list[str]()
    rounds.loop.task("a", counting(seen, "a", [AGAIN, AGAIN, AGAIN]))
    rounds.loop.task("b", counting(seen, "b", [AGAIN, AGAIN, AGAIN]))
    rounds.loop.run()

    assert seen == ["a", "b"] * 3
    assert rounds.halts == []
    assert rounds.loop.has_work() is True


def test_task_woken_twice_runs_once() -> None:
    """A wake of a task that is to run anyway changes nothing."""
    rounds, seen = Rounds(2), list[str]()
    task = rounds.loop.task("t", counting(seen, "t", [WAIT, WAIT]))
    task.wake()
    task.wake()
    rounds.loop.run()

    assert seen == ["t"]


def test_task_that_wakes_itself_while_it_runs_runs_again() -> None:
    """A wake from inside the task's own turn is not lost: it comes behind the turn."""
    rounds, seen = Rounds(3), list[str]()

    def body() -> TaskBody:
        seen.append("first")
        task.wake()
        yield WAIT
        seen.append("second")
        yield WAIT

    task = rounds.loop.task("t", body())
    rounds.loop.run()

    assert seen == ["first", "second"]


def test_task_woken_by_a_later_one_runs_next_round() -> None:
    """A round runs what was ready at its start: nobody keeps it from ending."""
    rounds, seen = Rounds(2), list[str]()
    first = rounds.loop.task("first", counting(seen, "first", [WAIT] * 5))

    def waking() -> TaskBody:
        while True:
            seen.append("waking")
            first.wake()
            yield AGAIN

    rounds.loop.task("waking", waking())
    rounds.loop.run()

    assert seen == ["first", "waking", "first", "waking"]


def test_task_woken_by_serve_runs_in_the_same_round() -> None:
    """Exits and doorbells come first; what they woke runs before the halt."""
    seen: list[str] = []

    def serve() -> bool:
        task.wake()
        return False

    rounds = Rounds(2, serve=serve)
    task = rounds.loop.task("t", counting(seen, "t", [WAIT] * 5))
    rounds.loop.run()

    assert seen == ["t", "t"]
    assert rounds.halts == []


def test_finished_task_is_not_resumed() -> None:
    """A generator that ended, or was closed while it waited in line, stays ended."""
    rounds, seen = Rounds(3), list[str]()
    ends = rounds.loop.task("ends", counting(seen, "ends", []))
    closed = rounds.loop.task("closed", counting(seen, "closed", [WAIT]))
    closed.close()
    rounds.loop.run()
    ends.wake()
    closed.wake()

    assert seen == ["ends ends"]
    assert (ends.finished, closed.finished, rounds.loop.has_work()) == (True, True, False)


def test_exception_of_a_task_ends_the_loop() -> None:
    """Our own mistake is not swallowed."""
    rounds = Rounds()

    def broken() -> TaskBody:
        yield AGAIN
        raise ZeroDivisionError("ours")

    rounds.loop.task("broken", broken())

    with pytest.raises(ZeroDivisionError):
        rounds.loop.run()


def test_timer_runs_when_its_time_has_come() -> None:
    """The halt is as long as the next timer allows, and the action runs once."""
    rounds, seen = Rounds(4), list[int]()
    rounds.loop.call_at(30_000_000, lambda: seen.append(rounds.time))
    rounds.loop.run()

    assert seen == [30_000_000]
    assert rounds.halts[:2] == [30_000_000, LONGEST_HALT_NS]


def test_timers_run_in_order_of_time() -> None:
    """Equal times run in the order in which they were asked for."""
    rounds, seen = Rounds(5), list[str]()
    for name, deadline in (("late", 20), ("early", 10), ("late too", 20), ("past", -5)):
        rounds.loop.call_at(deadline, lambda name=name: seen.append(name))  # type: ignore[misc]
    rounds.loop.run()

    assert seen == ["past", "early", "late", "late too"]


def test_timer_that_asks_for_the_past_starves_nobody() -> None:
    """An action that is due again at once comes once a round; sources are served in between."""
    served: list[int] = []
    fired: list[int] = []

    def serve() -> bool:
        served.append(1)
        return False

    rounds = Rounds(5, serve=serve)

    def again() -> None:
        fired.append(1)
        rounds.loop.call_at(-1, again)

    rounds.loop.call_at(-1, again)
    rounds.loop.run()

    assert (len(served), len(fired)) == (5, 5)


def test_timer_in_the_past_is_no_negative_halt() -> None:
    """A timer that became due during the round makes the halt as short as possible."""
    rounds = Rounds(2)
    rounds.loop.call_at(5, lambda: None)
    times = iter([0, 7, 7, 7, 7, 7])
    vars(rounds.loop)["_now"] = lambda: next(times)
    rounds.loop.run()

    assert rounds.halts[0] == 0


def test_stopping_ends_the_loop_before_a_round() -> None:
    """A machine that stops runs no further round."""
    rounds, seen = Rounds(0), list[str]()
    rounds.loop.task("t", counting(seen, "t", [WAIT]))
    rounds.loop.run()

    assert (seen, rounds.halts) == ([], [])
