"""The `fix.*` switches: which historical mistake a machine makes again, so that its race can be shown.

All are on by default, and then nothing of this is seen. A scenario's `[switches]` turns one off; the code asks
`fix.NAME` at the one place where the kernel, or a host, once had it wrong. `variant` picks among several wrong ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

from emu.scenario_text import Nonsense, Table, nearest, shown
from emu.values import valueclass


@valueclass()
class Fix:
    """What is right (True) or wrong on purpose (False) in one machine; see `SWITCHES` for each."""

    offer_gate: bool = True
    eom_after_clear: bool = True
    host_pending_first: bool = True
    msg_reserve: bool = True
    post_atomic: bool = True
    timer_waits_for_slot: bool = True
    kick_after_enqueue: bool = True
    listen_before_open: bool = True
    port_before_notify: bool = True
    atomic_flag_clear: bool = True
    enable_on_all_paths: bool = True
    recheck_after_unmask: bool = True
    read_side_order: bool = True
    acquire_write_index: bool = True
    signal_on_transition_only: bool = True
    recheck_after_stop: bool = True
    no_open_timeout: bool = True
    teardown_on_error: bool = True
    check_gpadl_status: bool = True
    rescind_own_queue: bool = True
    addchan_offload: bool = True
    split_pri_sub: bool = True
    recheck_rescind_after_enlist: bool = True
    wake_on_rescind: bool = True
    unlink_before_free: bool = True
    wake_all_waiters: bool = True
    wake_before_probe_wait: bool = True
    close_waits_unlocked: bool = True
    rescind_once: bool = True
    quiesce_before_flag: bool = True
    revoke_seq: bool = True
    global_relid_map: bool = True
    scan_flags_before_offline: bool = True
    hotplug_lock_on_offer: bool = True
    move_under_mutex: bool = True
    close_quiesces: bool = True
    list_edit_exclusion: bool = True
    variant: str = ""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Fix:
        """The switches of a machine's configuration."""
        return cls(**config.get("switches", {}))

    def off(self) -> tuple[str, ...]:
        """Names of the switches that are off, in the table's order."""
        return tuple(name for name in SWITCHES if not getattr(self, name))

    def to_config(self) -> dict[str, Any]:
        """What differs from the right machine, as plain values."""
        changed: dict[str, Any] = dict.fromkeys(self.off(), False)
        return {**changed, "variant": self.variant} if self.variant else changed


ALL_FIXED: Final = Fix()


@valueclass()
class Switch:
    """What happens with it off, its exhibits in the catalogue, and the variants of wrong there are."""

    wrong: str
    exhibits: tuple[str, ...]
    variants: tuple[str, ...] = ()


SWITCHES: Final[dict[str, Switch]] = {
    "offer_gate": Switch("a rescind does not wait for the offers that are on their way", ("A1",)),
    "eom_after_clear": Switch("the guest reads the pending bit before it empties the slot", ("B1",)),
    "host_pending_first": Switch("the host does not look at the slot again after it set the pending bit", ("B2",)),
    "msg_reserve": Switch(
        "a message for which there is no record of work stays in its slot", ("B3",), ("wedge", "spin")
    ),
    "post_atomic": Switch("a processor's hypercall page is filled and called, and others may come between", ("B4",)),
    "timer_waits_for_slot": Switch("a one-shot timer that finds its slot full is armed again for now", ("B5",)),
    "kick_after_enqueue": Switch(
        "a processor's loop looks for messages and then sleeps, without another look", ("B6",)
    ),
    "listen_before_open": Switch("a driver opens its channel before its poll may run, and masks all the same", ("C1",)),
    "port_before_notify": Switch("the guest is told that a device is open before its doorbell is listened to", ("C1",)),
    "atomic_flag_clear": Switch("the ISR loads a word of event flags and stores zero", ("C2",)),
    "enable_on_all_paths": Switch(
        "a close that finds its channel not open leaves the tasklet disabled", ("C3",), ("per_channel", "per_vcpu")
    ),
    "recheck_after_unmask": Switch("the reader unmasks and leaves without looking again", ("D1",)),
    "read_side_order": Switch(
        "the reader looks at the writer's wish before it stores its index, or asks the wrong word about it",
        ("D2",),
        ("stale_pending", "mask_abuse", "stale_write_index"),
    ),
    "acquire_write_index": Switch("the reader's load of write_index orders nothing: bytes may be older", ("D5",)),
    "signal_on_transition_only": Switch("a writer signals the host at each write, also when the ring is full", ("D3",)),
    "recheck_after_stop": Switch(
        "a queue is stopped without a look at who is left to wake it",
        ("D4",),
        ("tx_queue", "rx_completion", "hvsock_epoll"),
    ),
    "no_open_timeout": Switch("an open gives up after five seconds", ("E2",)),
    "teardown_on_error": Switch("an open that fails frees its pages without taking them back from the host", ("E2",)),
    "check_gpadl_status": Switch("a GPADL that the host refused is used", ("E3",)),
    "rescind_own_queue": Switch(
        "one ordered queue takes offers, the probes in them, and rescinds behind them", ("A2",)
    ),
    "addchan_offload": Switch("devices are probed, and sub-channels opened, inside the work of their offers", ("A3",)),
    "split_pri_sub": Switch("one queue adds primaries and sub-channels", ("A3",)),
    "recheck_rescind_after_enlist": Switch(
        "a requester does not look at the rescind flag once it is on the list of those who wait", ("A4",)
    ),
    "wake_on_rescind": Switch("a rescind wakes nobody who waits for the host, as before 2017", ("A4",)),
    "unlink_before_free": Switch(
        "an open that finds its channel taken back frees its request, which is still on the list", ("A4",)
    ),
    "wake_all_waiters": Switch(
        "a rescind wakes the first who waits on its channel, and nobody else, as Linux 6.12 still does", ("A4",)
    ),
    "wake_before_probe_wait": Switch("a rescind waits for the probe before it wakes who waits for the host", ("A5",)),
    "close_waits_unlocked": Switch(
        "who closes a device waits for the rescinds of its sub-channels with channel_mutex held", ("A5",)
    ),
    "rescind_once": Switch("two rescinds of one channel are both handled", ("A6",)),
    "quiesce_before_flag": Switch("a rescind raises its flag while the channel's callback may still run", ("A7",)),
    "revoke_seq": Switch("the host takes back whatever has the relid now, when an old device's stream ends", ("A8",)),
    "global_relid_map": Switch("each processor finds only the channels of its own list", ("F1",)),
    "scan_flags_before_offline": Switch("a processor goes offline with an event flag set in its page", ("F4",)),
    "list_edit_exclusion": Switch("a list of channels is changed in the middle of a walk along it", ("F2",)),
    "hotplug_lock_on_offer": Switch("a processor may go while it is chosen for a channel", ("F3",)),
    "move_under_mutex": Switch(
        "MODIFYCHANNEL is sent without channel_mutex, or its answer is waited for with it",
        ("F5",),
        ("send_after_close", "ack_holds_mutex"),
    ),
    "close_quiesces": Switch(
        "a ring is freed while somebody still reads it",
        ("E1",),
        ("tasklet", "isr_after_move", "stats_reader"),
    ),
}
"""By name, as a scenario writes it; every one is a field of `Fix`."""

assert set(SWITCHES) == {one.name for one in fields(Fix)} - {"variant"}


def read_switches(table: Table) -> Fix:
    """The `[switches]` table of a scenario: `NAME = false`, and `variant`; UserError for what is none."""
    values: dict[str, Any] = {name: table.take(name, _on_or_off, True) for name in SWITCHES}
    off = [name for name, on in values.items() if not on]
    variants = [variant for name in off for variant in SWITCHES[name].variants]
    values["variant"] = table.take("variant", _variant(variants), "")
    table.end()
    return Fix(**values)


def _on_or_off(value: object) -> bool:
    if not isinstance(value, bool):
        raise Nonsense(f"{shown(value)} is neither true nor false", "set it to false to make that mistake")
    return value


def _variant(variants: list[str]) -> Any:
    def read(value: object) -> str:
        if value not in variants:
            raise Nonsense(f"{shown(value)} is no variant of a switch that is off", nearest(str(value), variants))
        return str(value)

    return read
