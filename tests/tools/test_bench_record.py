"""What `bench record` measures by itself: an event, and that nothing is recorded where no recorder is."""

from __future__ import annotations

from functools import partial

import pytest

from emu.tracing import E_IRQ_RAISE
from tools.bench_record import bare_recorder, call_ns, event_ns


def nothing() -> None:
    """What is bound where no event is wanted."""


def test_an_event_is_measured_by_recording_so_many() -> None:
    """Each turn of the loop is one event, bound or not, and costs something."""
    with bare_recorder() as recorder:
        before = recorder.behind()
        assert event_ns(recorder, 50) > 0
        assert recorder.behind() == before + 50
        assert call_ns(recorder.bind(E_IRQ_RAISE, 1, 0xF3), 30) > 0
        assert recorder.behind() == before + 80


@pytest.mark.parametrize("loop_ns", [0, 700])
def test_the_loop_itself_is_no_part_of_an_event(monkeypatch: pytest.MonkeyPatch, loop_ns: int) -> None:
    """1,000 ns for ten turns, of which the loop's own are taken away; what is left is a turn's, never nothing."""
    monkeypatch.setattr("tools.bench_record._loop_ns", lambda count: loop_ns)
    for measured in (partial(event_ns, None, 10), partial(call_ns, nothing, 10)):
        with monkeypatch.context() as patch:
            patch.setattr("time.perf_counter_ns", iter([5_000, 6_000]).__next__)
            found = measured()

        assert found == (1_000 - loop_ns) / 10
