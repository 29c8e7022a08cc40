"""`top`: rates between two looks, a screen that fits any terminal, keys that change what is wished."""

from __future__ import annotations

import os
import pty
import termios
from collections.abc import Iterator
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.host_tables import HostTables, Traffic
from emu.machine import Machine
from emu.mirror import Mirror, MirrorChannel, MirrorHead
from emu.wire.device_classes import BY_NAME
from guestproc.kernel.rqstor import Requestor
from guestproc.view import RingFigures
from hostproc.protocol.states import ChannelState
from tests.tools.sysfs_records import guest_of, idle_machine
from tools.keyboard import keyboard, keys_of
from tools.top_sample import ChannelLook, Frame, Look, ProcessLook, Sampler, VpLook, rows_between
from tools.top_view import SORT_KEYS, Wishes, age, bar, chosen_channels, count, screen, scrolled, wished

HEAD = MirrorHead(2, 0x50003, 3, 3, 3, 0, 0, 0, 0, 0, 0x50003, 3, 3, 0)


def ring(used: int, *, mask: int = 0) -> RingFigures:
    """A ring of 4,096 bytes."""
    return RingFigures(mask, 0, used, 4096)


def channel(relid: int, *, packets: int = 0, interrupts: int = 0, used: int = 0, oldest_ns: int = 0) -> ChannelLook:
    """A look at an echo channel."""
    traffic = Traffic(packets, 2 * packets, 0)
    rings = ring(used), ring(0, mask=1)
    return ChannelLook(relid, "echo", relid % 2, "opened", traffic, interrupts, 0, *rings, 0, oldest_ns)


def look(at_s: float, *channels: ChannelLook, vps: int = 2, processes: int = 4, busy: int = 0) -> Look:
    """A look at a machine."""
    counters = {"interrupts": busy * 3, "reschedules": busy, "blocks": busy, "polls_paid": 0, "spurious": 0}
    return Look(
        at_s,
        HEAD,
        channels,
        tuple(VpLook(index, index, "HALTED", busy, counters) for index in range(vps)),
        tuple(ProcessLook(f"process{index}", index, index / 10, 1 << 20, busy) for index in range(processes)),
        {"packets": busy},
    )


def frame(channels: int, vps: int = 2, processes: int = 6) -> Frame:
    """A frame of so many of each, the later channels busier and fuller."""
    ones = [channel(n, packets=100 * n, interrupts=n, used=8 * n) for n in range(1, channels + 1)]
    return rows_between(
        look(0.0, *(channel(n) for n in range(1, channels + 1)), vps=vps, processes=processes),
        look(2.0, *ones, vps=vps, processes=processes, busy=10),
    )


def test_rates_are_what_was_added_by_the_second() -> None:
    """Between two looks, two seconds apart; interrupts by vector."""
    seen = frame(2)

    assert [(row.packets, row.interrupts) for row in seen.channels] == [(50.0, 0.5), (100.0, 1.0)]
    assert seen.channels[0].mask == "g"
    assert seen.vps[0].vectors == {"f3": 5.0, "fd": 5.0, "fb": 5.0}
    assert (seen.packets, seen.processes[1].switches) == (5.0, 5.0)


def test_channel_that_began_anew_has_no_negative_rate() -> None:
    """Counts that fell are those of a channel that was opened again; one that came has none yet."""
    rows = rows_between(
        look(0.0, channel(1, packets=1000)), look(1.0, channel(1, packets=40), channel(2, packets=70))
    ).channels

    assert [row.packets for row in rows] == [40.0, 0.0]


@given(width=st.integers(20, 200), height=st.integers(8, 60), channels=st.integers(0, 80), vps=st.integers(1, 64))
def test_screen_fits_its_terminal(width: int, height: int, channels: int, vps: int) -> None:
    """Never more lines or columns than there are, whatever the machine has; the keys are in the last line."""
    text = screen("vm1", frame(channels, vps), Wishes(), width, height).plain.split("\n")

    assert len(text) <= height
    assert max(map(len, text)) <= width
    assert text[-1].startswith("q quit")


def test_low_terminal_says_what_it_hides() -> None:
    """80 by 24: the first channels, the last after scrolling to the end, and how many there are."""
    seen = frame(40)
    top = screen("vm1", seen, Wishes(), 80, 24).plain
    end = scrolled(Wishes(first=1000), seen, 24)

    assert "of 40)" in top and "\n    1 echo" in top
    assert "\n   40 echo" in screen("vm1", seen, end, 80, 24).plain
    assert scrolled(end, frame(3), 24).first == 0


def test_lines_that_channels_do_not_need_are_used() -> None:
    """80 by 24 with few channels: nothing is hidden as long as there is an empty line."""
    for channels, vps, processes in ((8, 2, 6), (3, 2, 10), (3, 8, 6)):
        text = screen("vm1", frame(channels, vps, processes), Wishes(), 80, 24).plain
        wanted = 6 + channels + vps + processes

        assert len(text.split("\n")) == 24
        assert (" of " in text) is (wanted > 24)


@pytest.mark.parametrize("name", SORT_KEYS)
def test_channels_are_sorted_by_what_is_wished(name: str) -> None:
    """Figures from the highest down, names and numbers up; reversed the other way."""
    seen = frame(5)
    rows = chosen_channels(seen, Wishes(sort=name))
    figures = {"out", "packets", "bytes", "interrupts"}
    expected = [5, 4, 3, 2, 1] if name in figures else [2, 4, 1, 3, 5] if name == "cpu" else [1, 2, 3, 4, 5]

    assert [row.relid for row in rows] == expected
    assert {row.relid for row in chosen_channels(seen, Wishes(sort=name, reverse=True))} == {1, 2, 3, 4, 5}


def test_filter_is_typed_and_taken_or_given_up() -> None:
    """Slash, letters, backspace, Enter; Escape leaves what was; keys are letters meanwhile."""
    wishes: Wishes | None = Wishes()
    for key in ["/", "c", "p", "q", "backspace", "u", "1"]:
        assert wishes is not None
        wishes = wished(wishes, key)
    assert wishes is not None and wishes.typing == "cpu1"
    taken = wished(wishes, "enter")
    assert taken == Wishes(filter="cpu1")
    assert wished(wishes, "escape") == Wishes()

    assert [row.relid for row in chosen_channels(frame(5), taken)] == [1, 3, 5]


def test_filter_narrows_while_it_is_typed() -> None:
    """Each letter counts at once, on the screen as well, from its first line on; Escape shows what was there before."""
    wishes: Wishes | None = Wishes(filter="echo", first=2)
    shown = []
    for key in ["/", "backspace", "backspace", "backspace", "backspace", "2", "x", "escape"]:
        assert wishes is not None
        wishes = wished(wishes, key)
        assert wishes is not None
        shown.append([row.relid for row in chosen_channels(frame(5), wishes)])
        if key == "2":
            assert (wishes.first, wishes.filter) == (0, "echo")
            text = str(screen("m", frame(5), wishes, 80, 30))
            assert "of 5, filter 2" in text and text.splitlines()[29] == "filter: 2█"

    everything = [1, 2, 3, 4, 5]
    assert shown == [everything] * 5 + [[2], [], everything]
    assert wishes is not None and wishes.sought == "echo"


def test_keys_change_what_is_shown() -> None:
    """Pause, sort both ways round, reverse, speed within bounds, scrolling; q ends it, others do nothing."""
    wishes = Wishes()

    assert wished(wishes, "p") == replace(wishes, paused=True)
    assert wished(wishes, "s") == replace(wishes, sort="class")
    assert wished(wishes, "S") == replace(wishes, sort="oldest")
    assert wished(wishes, "r") == replace(wishes, reverse=True)
    assert wished(replace(wishes, interval_s=10.0), "+") == replace(wishes, interval_s=10.0)
    assert wished(wishes, "up") == wishes
    assert wished(wishes, "down") == replace(wishes, first=1)
    assert wished(wishes, "x") == wishes
    assert wished(wishes, "q") is None


@pytest.mark.parametrize(
    ("raw", "keys"),
    [
        ("sq", ["s", "q"]),
        ("\x1b[A\x1b[B\x1b[5~\x1b[6~", ["up", "down", "page-up", "page-down"]),
        ("\x1b", ["escape"]),
        ("\x1b[24~q", ["q"]),
        ("\x1b[1;5Cq", ["q"]),
        ("ä\r\x7f", ["ä", "enter", "backspace"]),
    ],
)
def test_sequences_are_keys(raw: str, keys: list[str]) -> None:
    """What terminals send; function keys that mean nothing are not taken for letters."""
    assert list(keys_of(raw)) == keys


@given(st.text("\x1b[O;~0159Aq/\r\x7fä\0", max_size=40))
def test_any_bytes_of_a_terminal_are_survived(raw: str) -> None:
    """Whatever is pasted ends in keys, each not empty."""
    assert all(keys_of(raw))


def test_terminal_is_as_before_whatever_happens() -> None:
    """Inside, single keys without echo; behind an error, all settings as they were."""
    leader, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    inside = before
    with pytest.raises(ZeroDivisionError), keyboard(terminal) as keys:
        inside = termios.tcgetattr(terminal)
        os.write(leader, b"x")
        assert keys.wait(5) == ["x"]
        raise ZeroDivisionError
    after = termios.tcgetattr(terminal)
    os.close(leader)
    os.close(terminal)

    assert after == before
    assert not inside[3] & (termios.ICANON | termios.ECHO) and inside[3] & termios.ISIG


def test_bar_is_as_full_as_the_ring() -> None:
    """Empty, a trace, half, full; nothing to show without a ring."""
    assert [bar(fill, 4) for fill in (0.0, 0.001, 0.5, 1.0, None)] == ["····", "▏···", "██··", "████", "-   "]


@given(st.floats(0, 1e12))
def test_figures_fit_their_columns(value: float) -> None:
    """A rate and an age take six characters at most."""
    assert len(count(value)) <= 6
    assert len(age(min(value, 1e6))) <= 8


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine that nothing runs in."""
    with idle_machine("top") as machine:
        yield machine


def test_oldest_unanswered_request_is_timed(machine: Machine) -> None:
    """A control message since it was entered; a packet's id from when it was first seen, until it comes back."""
    guest = guest_of(machine)
    _device, first = guest.device(1, 1)
    _device, second = guest.device(2, 2)
    request = guest.tables.requests.alloc()
    assert request is not None
    request.child_relid, request.entered_ns = 1, 1
    gpa = machine.ram.size - 65536
    second.rqstor_gpa, second.rqstor_size = gpa, 64
    ids = Requestor(guest.tables.ram, gpa, 64)
    ids.init()
    # As `vmbus_next_request_id` marks slot 5, which takes an actor.
    guest.store(gpa + 16 + 8 * 64, 1 << 5, 8)
    sampler = Sampler(machine)

    before, after = sampler.look(), sampler.look()
    rows = {row.relid: row for row in rows_between(before, after).channels}

    assert (rows[1].unanswered, rows[2].unanswered) == (1, 1)
    assert rows[1].oldest_s > 0 and rows[2].oldest_s > 0
    guest.store(gpa + 16 + 8 * 64, 0, 8)
    assert sampler.look().channels[1].unanswered == 0
    assert machine.control.watched


def test_packet_that_the_host_does_not_read_waits(machine: Machine) -> None:
    """From the second look on: one that was read between two looks was under way. Then it is timed as a request is."""
    guest = guest_of(machine)
    _device, channel = guest.device(1, 1)
    channel.ring_gpa, channel.ring_send_pages, channel.ring_recv_pages = machine.ram.size - 65536, 4, 4
    write_index, read_index = channel.ring_gpa, channel.ring_gpa + 4
    guest.store(write_index, 128, 4)
    sampler = Sampler(machine)

    assert sampler.look().channels[0].unanswered == 0
    before, after = sampler.look(), sampler.look()
    (row,) = rows_between(before, after).channels
    assert (row.unanswered, row.oldest_s > 0) == (1, True)
    guest.store(read_index, 64, 4)
    assert sampler.look().channels[0].unanswered == 0
    guest.store(read_index, 128, 4)
    assert sampler.look().channels[0].unanswered == sampler.look().channels[0].unanswered == 0


def test_foreign_guest_is_seen_as_the_host_sees_it(machine: Machine) -> None:
    """Without a look at its RAM: classes, states, VPs and what the host counted."""
    machine.config["no_guest"] = True
    Mirror(machine.control).write_channel(
        MirrorChannel(4, ChannelState.OPEN, 1, 0, 1, 1, 1, 0x2004, 0, BY_NAME["nic"].guid, UUID(int=4))
    )
    sampler = Sampler(machine)
    tables = HostTables(machine.control)
    tables.stamp_traffic(machine.clock.now())
    before = sampler.look()
    tables.write_traffic(4, Traffic(500, 0, 20))
    tables.stamp_traffic(machine.clock.now())

    (row,) = rows_between(before, sampler.look()).channels

    assert (row.class_name, row.state, row.cpu, row.out_fill) == ("nic", "open", 1, None)
    assert row.packets > 0 and row.interrupts > 0


def test_rates_are_of_what_was_published_while_somebody_looked(machine: Machine) -> None:
    """Counts of a whole life are no rate; two publications have their own time between them, not ours."""
    machine.config["no_guest"] = True
    Mirror(machine.control).write_channel(
        MirrorChannel(4, ChannelState.OPEN, 1, 0, 1, 1, 1, 0x2004, 0, BY_NAME["nic"].guid, UUID(int=4))
    )
    tables = HostTables(machine.control)
    sampler = Sampler(machine)
    stale = sampler.look()
    began_ns = machine.clock.now()
    looks = []
    for packets, after_ns in ((1_000, 0), (1_500, 2_000_000_000)):
        tables.write_traffic(4, Traffic(packets, 0, 0))
        tables.stamp_traffic(began_ns + after_ns)
        looks.append(sampler.look())

    assert [row.packets for row in rows_between(stale, looks[0]).channels] == [0]
    assert [row.packets for row in rows_between(*looks).channels] == [250]
