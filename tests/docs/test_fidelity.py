"""docs/fidelity.md points at what is there: files, names and tests, and has a row for each name of the article.

A row: the name as the kernel writes it, what it is, where it is here (`path::name`), what shows it
(`path::test`, or the title of what brings it in italics), and a status: faithful, simplified or absent.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.docs.definitions import definitions

SOURCES: Final = Path(__file__).resolve().parents[2]
PAGE: Final = SOURCES / "docs" / "fidelity.md"
REFERENCE: Final = SOURCES.parent / "shared" / "reference" / "vmbus.md"
COLUMNS: Final = ("name", "what it is", "here", "shown by", "status")
STATUSES: Final = ("faithful", "simplified", "absent")

COMING: Final = (
    "Discovery complete, in both eras",
    "Fast, and shown to be",
    "See it: one recording, every view",
    "Races on demand",
)
"""What is announced and not there yet; a row may name one of these instead of a test."""

ARTICLE: Final = """
hyperv_vector_handler  hv_setup_vmbus_irq  hv_remove_vmbus_irq  vmbus_handler
set_irq_regs  entering_irq  exiting_irq  inc_irq_stat(irq_hv_callback_count)
ms_hyperv.hints  HV_DEPRECATING_AEOI_RECOMMENDED  ack_APIC_irq
vmbus_isr
hv_context.cpu_context  struct hv_per_cpu_context
synic_event_page  union hv_synic_event_flags  VMBUS_MESSAGE_SINT  sync_test_and_clear_bit
vmbus_proto_version  VERSION_WS2008  VERSION_WIN7
vmbus_chan_sched  chan_list  percpu_channel_enq  percpu_channel_deq  channel->callback_event
synic_message_page  struct hv_message  HVMSG_NONE  HVMSG_TIMER_EXPIRED
hv_process_timer_expiration  msg_dpc  add_interrupt_randomness  hv_synic_alloc
vmbus_on_msg_dpc  struct onmessage_work_context  vmbus_onmessage_work
vmbus_onmessage  channel_message_table  CHANNELMSG_COUNT  VMHT_BLOCKING
schedule_work_on(connect_cpu)  queue_work_on  work_queue  offer_in_progress
vmbus_signal_eom
vmbus_onoffer  vmbus_process_offer  vmbus_add_channel_work
hv_get_dev_type  init_vp_index  get_cpu  put_cpu  smp_call_function_single(..., true)
CHANNEL_OPEN_STATE  vmbus_add_channel_kobj  sc_creation_callback
vmbus_device_create  vmbus_device_register  probe_done
channel_mutex  primary_channel->lock  listentry  sc_list
vmbus_release_relid  free_channel
vmbus_onopen_result  vmbus_ongpadl_created  vmbus_ongpadl_torndown  vmbus_onversion_response
vmbus_unload_response  vmbus_onoffers_delivered  vmbus_onoffer_rescind
netvsc
HYPERVISOR_CALLBACK_VECTOR  tasklet_schedule  this_cpu_ptr  kmalloc(GFP_ATOMIC)  queue_work  WARN_ONCE
print_hex_dump_bytes  target_cpu  connect_cpu  err_deq_chan  trace_vmbus_on_msg_dpc  trace_vmbus_on_message
CHANNELMSG_INVALID … CHANNELMSG_TL_CONNECT_REQUEST  struct vmbus_channel_message_table_entry  struct pt_regs
INIT_WORK  mutex_lock, mutex_unlock  spin_lock_irqsave, spin_unlock_irqrestore  pr_err
"""
"""Every name of the article that the emulator began with, two spaces between two: first the seventy-four that it speaks
of, then those of the kernel that its listings use besides."""


@dataclass(frozen=True)
class Row:
    """One row of a table; `line` is its number in the page."""

    line: int
    name: str
    here: str
    shown: str
    status: str

    def __str__(self) -> str:
        return f"{PAGE.name}:{self.line} {self.name}"


def rows() -> list[Row]:
    """The rows of every table that has the five columns."""
    found = []
    inside = False
    for number, line in enumerate(PAGE.read_text(encoding="utf-8").splitlines(), 1):
        cells = tuple(cell.strip() for cell in line.strip().strip("|").split("|"))
        if not line.startswith("|"):
            inside = False
        elif cells == COLUMNS:
            inside = True
        elif inside and not set(line) <= set("|- "):
            assert len(cells) == len(COLUMNS), f"{PAGE.name}:{number} has {len(cells)} cells"
            name, _what, here, shown, status = cells
            found.append(Row(number, name.replace("`", ""), here, shown, status))
    return found


def references(cell: str) -> list[tuple[str, str]]:
    """Every `path::name` of a cell."""
    return re.findall(r"`([^`:]+)::([^`]+)`", cell)


def article_names() -> list[str]:
    """The names of `ARTICLE`, in its order."""
    return re.split(r"\s{2,}|\n", ARTICLE.strip())


def test_every_name_of_the_article_has_one_row() -> None:
    """None is missing, and none is there twice."""
    count = Counter(row.name for row in rows())

    assert [name for name in article_names() if count[name] != 1] == []
    assert [name for name, times in count.items() if times > 1] == []


def test_the_list_of_names_is_complete() -> None:
    """The reference, where it is at hand, has no name that is not in the list here."""
    names = set(article_names())
    section = REFERENCE.read_text(encoding="utf-8").split("\n## ")[1] if REFERENCE.exists() else ""

    listed = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert [name for cell in listed for name in re.findall(r"`([^`]+)`", cell) if name not in names] == []


@pytest.mark.parametrize("row", rows(), ids=lambda row: str(row.name))
def test_row_points_at_what_is_there(row: Row) -> None:
    """The files exist and define the names; what a row calls a test is one."""
    for path, name in references(row.here) + references(row.shown):
        assert (SOURCES / path).is_file(), f"{row}: there is no {path}"
        assert name in definitions(SOURCES / path), f"{row}: {path} does not define {name}"
    for path, name in references(row.shown):
        assert path.startswith("tests/"), f"{row}: {path} is not below tests"
        assert name.startswith("test_"), f"{row}: {name} is no test"


@pytest.mark.parametrize("row", rows(), ids=lambda row: str(row.name))
def test_row_says_how_true_it_is(row: Row) -> None:
    """A status, with how and why where it is not simply faithful, and what shows it or will."""
    status, _, reason = row.status.partition(":")
    tests, coming = references(row.shown), re.findall(r"\*([^*]+)\*", row.shown)

    assert status in STATUSES, f"{row}: status {status}"
    assert bool(reason.strip()) == (status != "faithful"), f"{row}: say how and why it is {status}"
    assert set(coming) <= set(COMING), f"{row}: {coming} is not announced"
    assert bool(references(row.here)) == (status != "absent"), f"{row}: where is it?"
    assert tests or (coming and status != "faithful"), f"{row}: what shows it?"
