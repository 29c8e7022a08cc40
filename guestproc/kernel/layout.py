"""Where the guest kernel's state lies in guest RAM: the boot record, and the table of record tables.

    GPA 0        nothing: page 0 is the guest's NULL
    0x1000       boot record: magic, layout version, era, where each table lies; all zero for a foreign guest
    0x2000 ...   the tables of `TABLES`, each on pages of its own; behind them the allocator's pages

The record classes here and in the modules they come from are the one layout table: each field says which lock
covers it, that it is atomic, or that it is written before the record is published and constant from then on
("once"). Names are the kernel's. A u64 called `..._handle` or documented as one is (generation << 32 |
index + 1) of a record, 0 for none.

The processor that boots calls `KernelTables.format`; every other process attaches, and checks that what lies
in RAM is laid out as its own code thinks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from struct import Struct
from typing import Any, Final, TypeVar

from emu.errors import OutOfMemory
from emu.ipc.atomics import ACQUIRE, RELEASE, AtomicU64, fence
from emu.values import valueclass
from guestproc.kernel.frames import Frame
from guestproc.kernel.lists import GuidHash, RecordList, list_head, list_link
from guestproc.kernel.locks import Rank, mutex, spinlock
from guestproc.kernel.napi import napi
from guestproc.kernel.page_records import Zone
from guestproc.kernel.pages import PAGE_SIZE, PageAllocator
from guestproc.kernel.records import Atomic32, Atomic64, Blob, Ram, Record, Reserve, Table, Word, Words64, always_there
from guestproc.kernel.smp import CallRecord
from guestproc.kernel.tasklet import tasklet
from guestproc.kernel.wait import completion, wait_queue
from guestproc.kernel.waiters import Waiter
from guestproc.kernel.work_records import Queue, WorkItem
from guestproc.kernel.workqueue import QueueNumber, WorkQueues

R = TypeVar("R", bound=Record)

BOOT_RECORD_GPA: Final = 0x1000
TABLES_GPA: Final = 0x2000
BOOT_MAGIC: Final = int.from_bytes(b"VMBGUEST", "little")
LAYOUT_VERSION: Final = 1

MAX_CPUS: Final = 64
MAX_CHANNEL_RELIDS: Final = 2048
MAX_NUMA_NODES: Final = 64
FIRST_GPADL_HANDLE: Final = 0xE1E10
INVALID_RELID: Final = 0xFFFFFFFF
INSTANCE_BUCKETS: Final = 4096
DRIVER_STATE_WORDS: Final = 32
MAX_DYNAMIC_IDS: Final = 16
UEVENT_SLOTS: Final = 64
UEVENT_BYTES: Final = 128


class Era(IntEnum):
    """Which kernel the guest is."""

    CURRENT = 1
    SEED = 2


class ConnectionState(IntEnum):
    """`vmbus_connection.conn_state`."""

    DISCONNECTED = 0
    CONNECTING = 1
    CONNECTED = 2
    DISCONNECTING = 3


class ChannelState(IntEnum):
    """`vmbus_channel.state`; OPEN_STATE means known to the driver and closed."""

    OFFER_STATE = 0
    OPENING_STATE = 1
    OPEN_STATE = 2
    OPENED_STATE = 3


class CallbackMode(IntEnum):
    """`vmbus_channel.callback_mode`."""

    BATCHED = 0
    DIRECT = 1
    ISR = 2


class Hotplug(IntEnum):
    """What a processor is asked to do, and how far it is with it."""

    NOTHING = 0
    DOWN = 1
    UP = 2
    TAKEN = 3
    DONE = 4


class Connection(Record, permanent=True):
    """`vmbus_connection`, and the kernel's other globals; the one record of its table."""

    conn_state = Atomic32("atomic: a ConnectionState; unload exchanges it")
    vmbus_proto_version = Word(4, "once: written while CONNECTING")
    msg_conn_id = Word(4, "once: written while CONNECTING")
    connect_cpu = Word(4, "once: written while CONNECTING")
    next_gpadl_handle = Atomic32("atomic: the value before the increment is used")
    offer_in_progress = Atomic32("atomic: offers between the slot and the relid table")
    vmbus_handler = Atomic32("atomic: number in VMBUS_HANDLERS of what vector 0xF3 calls, 0: none")
    ignore_any_offer_msg = Atomic32("atomic: set while suspending")
    nr_chan_close_on_suspend = Atomic32("atomic")
    nr_chan_fixup_on_resume = Atomic32("atomic")
    next_numa_node = Word(4, "channel_mutex")
    nr_numa_nodes = Word(4, "once: written at boot")
    feature_flags = Word(4, "once: written while CONNECTING")
    int_page_gpa = Word(8, "once: written while CONNECTING")
    monitor_page_gpas = Words64(2, "once: written while CONNECTING; [0] parent to child, [1] child to parent")
    chn_list = list_head("channel_mutex: primaries, through listentry")
    chn_msg_list = list_head("channelmsg_lock: requests that await a reply, through msglistentry")
    channel_mutex = mutex(Rank.CHANNEL)
    cpus_mutex = mutex(Rank.CPUS)
    cpus_readers = Atomic32("atomic: counted up under cpus_mutex (`kernel.cpus`)")
    driver_mutex = mutex(Rank.DRIVER_LIST)
    rtnl_mutex = mutex(Rank.RTNL)
    channelmsg_lock = spinlock(Rank.CHANNELMSG)
    bind_channel_to_cpu_lock = spinlock(Rank.LEAF)
    unload_event = completion()
    ready_for_suspend_event = completion()
    ready_for_resume_event = completion()
    cpus_wait = wait_queue("atomic: woken when cpus_readers falls to 0")
    offer_wait = wait_queue("atomic: woken when offer_in_progress falls to 0")
    state_wait = wait_queue("atomic: woken after any change that a task may wait for (a channel's state, a device)")
    tasklet_idle = wait_queue("atomic: woken when a tasklet that somebody waits for is idle")
    grace_wait = wait_queue("atomic: woken by ISRs that end while somebody waits for a grace period")
    numa_cpus = Words64(MAX_NUMA_NODES, "once: mask of the CPUs of each node, written at boot")
    hv_numa_map = Words64(MAX_NUMA_NODES, "channel_mutex (seed: bind_channel_to_cpu_lock): CPUs allocated, by node")
    no_autoprobe = Atomic32("atomic: 1 while the bus's drivers_autoprobe is off: nobody is probed unasked")
    user_calls = Atomic32("atomic: calls of user space that run, and the bit that there may be no more")
    uevent_lock = spinlock(Rank.LEAF)
    uevent_seqnum = Word(8, "uevent_lock: of the newest uevent, from 1")
    slot_waits = Atomic64("atomic: mask of the CPUs in whose slots a message waits for a record of work")
    driver_changes = Atomic32("atomic: raised under driver_mutex behind each driver that comes or goes")


class Cpu(Record, permanent=True):
    """One processor, its record's index is its CPU number; allocated at boot, never freed."""

    isr_sequence = Atomic32("atomic: odd while this processor is in an ISR")
    online = Atomic32("atomic: 1 from hv_synic_init until hv_synic_cleanup")
    hotplug = Atomic32("atomic: a Hotplug; who asks owns cpus_mutex")
    hotplug_error = Word(4, "this processor's own, written before hotplug is DONE: errno, 0: it has gone, or come")
    actor = Atomic32("atomic: number of the actor that is this processor, 0 if none runs")
    vp_index = Word(4, "once: written at boot")
    interrupts = Word(8, "this processor's own: entries of vector 0xF3")
    irq_hv_callback_count = Word(8, "this processor's own")
    synic_message_page_gpa = Word(8, "once: hv_synic_alloc")
    synic_event_page_gpa = Word(8, "once: hv_synic_alloc")
    post_msg_page_gpa = Word(8, "once: hv_synic_alloc")
    post_msg_mutex = mutex(Rank.DRIVER_STATE)
    msg_dpc = tasklet()
    call = CallRecord.field()
    stimer0_message_sint = Word(4, "this processor's own: where its clock events come; 0: the host has no timers")
    clock_events = Word(8, "this processor's own")
    left = Atomic32("atomic: 1 while channels may be left to this processor (`drivers.steering`)")
    chan_list = list_head("seed: this processor's own, changed in its interrupts only; through percpu_list")
    event_dpc = tasklet()


class Channel(Record):
    """`vmbus_channel`."""

    # What the ISR reads.
    relid = Word(4, "channel_mutex; written before relids publishes the channel")
    rescind = Atomic32("atomic; set under channelmsg_lock")
    sched_lock = spinlock(Rank.SCHED)
    callback_mode = Word(4, "sched_lock")
    onchannel_callback = Word(4, "sched_lock: number in CHANNEL_CALLBACKS, 0 NULL")
    state = Atomic32("atomic: a ChannelState; changed under channel_mutex, or by the one who opens")
    channel_callback_context = Word(8, "sched_lock")
    callback_event = tasklet("atomic: its word; runs vmbus_on_event")
    interrupts = Word(8, "sched_lock")
    # What a sender reads.
    sig_event = Word(8, "once: connection id")
    sig_events = Atomic64("atomic: hypercalls made to signal the host")
    is_dedicated_interrupt = Word(4, "once")
    low_latency = Word(4, "the driver's")
    monitor_allocated = Word(4, "once")
    monitor_grp = Word(4, "once")
    monitor_bit = Word(4, "once")
    # Where its interrupts go.
    target_cpu = Atomic32("atomic; changed under channel_mutex")
    target_vp = Word(4, "channel_mutex")
    numa_node = Word(4, "channel_mutex")
    affinity_policy = Word(4, "the driver's, before the channel is placed")
    alloced_cpus_in_node = Word(8, "bind_channel_to_cpu_lock")
    reader = Atomic32("atomic: CPU + 1 of the program that reads it, and the bit LEFT (`drivers.steering`)")
    # Life.
    rescind_ref = Atomic32("atomic; changed under channel_mutex")
    probe_done = Atomic32("atomic; state_wait is woken behind it")
    offer_and_rescind = Atomic32("atomic: how many of the two have come to where they meet")
    kobj_added = Word(4, "who handles the offer: 1 once user space was told of its directory")
    device_id = Word(4, "once: device type number")
    sub_channel_index = Word(4, "once")
    sc_creation_callback = Word(4, "channel_mutex: number in CHANNEL_CALLBACKS, 0 NULL")
    rescind_callback = Word(4, "channel_mutex: number in CHANNEL_CALLBACKS, 0 NULL")
    hash_next = Word(4, "channel_mutex: chain of the hash of instances")
    primary_channel = Word(8, "channel_mutex: handle of the primary, 0 for a primary")
    device_obj = Word(8, "channel_mutex: handle of the device")
    listentry = list_link("channel_mutex: on chn_list")
    sc_list = list_head("channel_mutex: a primary's sub-channels, through sc_link")
    sc_link = list_link("channel_mutex: on the primary's sc_list")
    percpu_list = list_link("seed: target CPU's own, on its chan_list")
    rescind_event = completion()
    # The ring buffers: set by vmbus_alloc_ring and vmbus_open, taken back by vmbus_free_ring.
    ring_gpa = Word(8, "who opens or closes: contiguous rings, send first; 0: none")
    ring_pfns_gpa = Word(8, "who opens or closes: page list (u64 each) of scattered rings, 0: contiguous")
    ring_buffer_mutex = mutex(Rank.RING)
    outbound_ring_lock = spinlock(Rank.DRIVER_RING)
    ring_generation = Word(4, "who opens or closes: generation of the pages")
    ring_send_pages = Word(4, "who opens or closes")
    ring_recv_pages = Word(4, "who opens or closes")
    ringbuffer_gpadlhandle = Word(4, "who opens or closes")
    ringbuffer_send_offset = Word(4, "who opens or closes: pages")
    max_pkt_size = Word(4, "who opens or closes")
    rqstor_size = Word(4, "the driver's, before it opens")
    rqstor_gpa = Word(8, "who opens or closes: 0 without a requestor")
    openid = Word(4, "who opens or closes")
    # sysfs counters of the outbound ring, written by its one sender.
    intr_in_full = Word(8, "the sender's")
    intr_out_empty = Word(8, "the sender's")
    out_full_first = Word(8, "the sender's")
    out_full_total = Word(8, "the sender's")
    offer_serial = Word(8, "once: serial of the offer")
    if_type = Blob(16, "once")
    if_instance = Blob(16, "once: hashed")
    offermsg = Blob(196, "channel_mutex: the vmbus_channel_offer_channel as it came")


class Request(Record):
    """An entry of chn_msg_list: a request that awaits the host's reply (`vmbus_channel_msginfo`)."""

    msgtype = Word(4, "once: type of the request")
    child_relid = Word(4, "once")
    openid = Word(4, "once")
    gpadl = Word(4, "once")
    waiting_channel = Word(8, "once: handle of the channel, 0 for none")
    entered_ns = Word(8, "once: machine time when it was entered")
    serial = Word(8, "the requester's")
    msglistentry = list_link("channelmsg_lock")
    waitevent = completion()
    response_size = Word(4, "channelmsg_lock: bytes of response, 0: none came")
    response = Blob(240, "channelmsg_lock: the reply's payload, written before waitevent is completed")


class Device(Record):
    """`hv_device`, with what the driver core keeps of a device."""

    channel = Word(8, "once: handle of the primary channel")
    device_id = Word(4, "once: device type number")
    vendor_id = Word(4, "once: 0x1414")
    driver = Word(4, "device_lock: number in DRIVERS of the driver that is bound, 0: unbound")
    state = Atomic32("atomic: bits of the driver core, changed under device_lock")
    probe_error = Word(4, "device_lock: errno of the last probe that failed")
    device_lock = mutex(Rank.DEVICE)
    dev_instance = Blob(16, "once")
    dev_type = Blob(16, "once: class GUID")
    driver_override = Blob(32, "device_lock: name of the only driver that may bind, empty: any")
    driver_state = Words64(DRIVER_STATE_WORDS, "the bound driver's own layout")


RX_OWED_MAX: Final = 64
"""Frames of which a netlike channel may owe the completion."""


class NetChannel(Record):
    """`netvsc_channel`: what the netlike driver keeps of each channel that it has open."""

    channel = Word(8, "once: handle of the channel")
    device = Word(8, "once: handle of the device")
    attached = Word(4, "channel_mutex: 1 while its device's remove is to take it away")
    napi = napi()
    # What the poll counts; it runs on one processor at a time.
    rx_packets = Word(8, "the poll's")
    rx_bytes = Word(8, "the poll's")
    rx_gaps = Word(8, "the poll's: frames whose sequence was not the next")
    rx_checksum_errors = Word(8, "the poll's")
    rx_next = Word(4, "the poll's: sequence of the frame that is expected")
    polls = Word(8, "the poll's")
    full_polls = Word(8, "the poll's: those that used their whole budget")
    repolls = Word(8, "the poll's: begun because bytes had come before the unmask")
    replies = Word(4, "the poll's: completions of the claimant's requests")
    reply = Blob(40, "the poll's, written before replies is raised: the last of them")
    # What the program that has claimed the channel counts.
    tx_next = Word(4, "the claimant's: sequence of the next frame")
    queue_sends = Atomic32("atomic: frames that were sent with a completion to come")
    rx_owed = Word(4, "the poll's: frames whose completion is still to be sent")
    rx_ids = Blob(8 * RX_OWED_MAX, "the poll's: their transaction ids, oldest first")
    tx_stopped = Atomic32("atomic: 1 while its transmit queue is stopped (`__QUEUE_STATE_DRV_XOFF`)")


class Driver(Record):
    """A driver that is or was registered: `hv_driver`. Whoever matches it needs no reference, for it stays."""

    number = Word(4, "once: number in DRIVERS")
    flags = Word(4, "once: hvsock")
    unregistered = Atomic32("atomic: 1 while it is registered no more; changed under driver_mutex")
    dynids_lock = spinlock(Rank.LEAF)
    dynamic_count = Word(4, "dynids_lock")
    name = Blob(32, "once")
    dynamic_ids = Blob(16 * MAX_DYNAMIC_IDS, "dynids_lock: class GUIDs of new_id")


@valueclass()
class TableSpec:
    """A table of `capacity` records of one class."""

    name: str
    record_class: type[Record]
    capacity: int


TABLES: Final = (
    TableSpec("connection", Connection, 1),
    TableSpec("cpus", Cpu, MAX_CPUS),
    TableSpec("queues", Queue, 8),
    TableSpec("zones", Zone, 1),
    TableSpec("channels", Channel, 2304),
    TableSpec("requests", Request, 512),
    TableSpec("waiters", Waiter, 1024),
    # Every relid offered and rescinded, and 256 more.
    TableSpec("work", WorkItem, 4352),
    TableSpec("devices", Device, 2304),
    TableSpec("drivers", Driver, 64),
    TableSpec("net_channels", NetChannel, 2304),
    TableSpec("frames", Frame, 64),
)
ARRAYS: Final[Mapping[str, int]] = {
    "relids": 8 * MAX_CHANNEL_RELIDS,
    "instances": 4 * INSTANCE_BUCKETS,
    "uevents": UEVENT_SLOTS * UEVENT_BYTES,
}
"""Plain arrays, in bytes: the relid table, the heads of the hash of instances, the ring of uevents. `pages`
depends on RAM."""


SMALL_TABLE_BYTES: Final = 1 << 15


@valueclass()
class Placement:
    """Where one table lies: its GPA, its bytes, a record's bytes (0: an array) and how many records."""

    gpa: int
    nbytes: int
    record_size: int
    capacity: int


@valueclass()
class Layout:
    """Where everything lies in RAM of this size."""

    ram_bytes: int
    ncpus: int
    tables: Mapping[str, Placement]
    first_free_page: int

    @property
    def end_page(self) -> int:
        """One behind the last page of RAM."""
        return self.ram_bytes // PAGE_SIZE

    def looked_at(self) -> Iterator[tuple[int, int]]:
        """GPA and bytes of what anybody may read although nothing was written there yet.

        A first read needs memory, too. Of a pool of records that is the header alone; the page allocator sees to its
        columns itself.
        """
        for placement in self.tables.values():
            small = placement.nbytes <= SMALL_TABLE_BYTES
            yield placement.gpa, placement.nbytes if small else PAGE_SIZE


def compute(ram_bytes: int, ncpus: int) -> Layout:
    """Place every table; raises OutOfMemory when RAM has no room for them and one free page."""
    assert 1 <= ncpus <= MAX_CPUS, f"{ncpus} CPUs, 1 to {MAX_CPUS} are possible"
    assert ram_bytes % PAGE_SIZE == 0, f"RAM of {ram_bytes} bytes is not whole pages"
    tables: dict[str, Placement] = {}
    gpa = TABLES_GPA
    for spec in TABLES:
        nbytes = Table.footprint(spec.record_class, spec.capacity)
        tables[spec.name] = Placement(gpa, nbytes, spec.record_class.SIZE, spec.capacity)
        gpa = _next_page(gpa + nbytes)
    pages = PageAllocator.footprint(ram_bytes // PAGE_SIZE)
    for name, nbytes in (*ARRAYS.items(), ("pages", pages)):
        tables[name] = Placement(gpa, nbytes, 0, 0)
        gpa = _next_page(gpa + nbytes)
    if gpa + PAGE_SIZE > ram_bytes:
        raise OutOfMemory(f"the guest's tables need {gpa} bytes of RAM, the machine has {ram_bytes}")
    return Layout(ram_bytes, ncpus, tables, gpa // PAGE_SIZE)


def boot_pages(ncpus: int) -> int:
    """Pages that the kernel takes one by one before its first ring: hypercall, connection, SynIC of each CPU."""
    return 4 + 3 * ncpus


def _next_page(gpa: int) -> int:
    return -(-gpa // PAGE_SIZE) * PAGE_SIZE


class RelidTable:
    """relid → channel handle, an atomic u64 each: a release store publishes, ISRs read without a lock."""

    def __init__(self, ram: Ram, gpa: int, channels: Table[Channel]) -> None:
        self._ram: Final = ram
        self._gpa: Final = gpa
        self._load: Final = ram.atomics.load_u64
        self._channels: Final = channels

    def load(self, relid: int) -> int:
        """Handle of the channel that has this relid, 0 for none; a relid out of range has none."""
        return self._load(self._gpa + 8 * relid, ACQUIRE) if 0 <= relid < MAX_CHANNEL_RELIDS else 0

    def cell(self, relid: int) -> AtomicU64:
        """The word of one relid (0 to 2047), for who looks there often."""
        assert 0 <= relid < MAX_CHANNEL_RELIDS, relid
        return self._ram.u64(self._gpa + 8 * relid)

    def lookup(self, relid: int) -> Channel | None:
        """`relid2channel`: the channel, None if there is none (or it went between two looks)."""
        if not 0 <= relid < MAX_CHANNEL_RELIDS:
            return None
        handle = self._load(self._gpa + 8 * relid, ACQUIRE)
        return self._channels.find(handle) if handle else None

    def publish(self, channel: Channel) -> None:
        """`vmbus_channel_map_relid`, under channel_mutex.

        The full barrier behind the store: a CPU that comes online later, or an interrupt that is requested
        later, sees the channel; and whoever stores and then reads the CPU mask is not passed by it.
        """
        relid = channel.relid
        assert relid < MAX_CHANNEL_RELIDS, f"{channel} has relid {relid}"
        assert not self.load(relid), f"relid {relid} is taken, not also {channel}'s"
        self._ram.atomics.store_u64(self._gpa + 8 * relid, channel.handle, RELEASE)
        fence()

    def unpublish(self, channel: Channel) -> None:
        """`vmbus_channel_unmap_relid`, under channel_mutex; a grace period comes before `free`."""
        found = self._ram.atomics.cas_u64(self._gpa + 8 * channel.relid, channel.handle, 0)
        assert found == channel.handle, f"relid {channel.relid} was not {channel}'s"

    def published(self) -> dict[int, int]:
        """relid → handle, of all that are there (for reports)."""
        handles = ((relid, self.load(relid)) for relid in range(MAX_CHANNEL_RELIDS))
        return {relid: handle for relid, handle in handles if handle}


class KernelTables:
    """All of it, as one process sees it: the tables by name, and what stands on them."""

    def __init__(self, ram: Ram, layout: Layout, era: Era) -> None:
        self.ram: Final = ram
        self.layout: Final = layout
        self.era: Final = era
        self.connections: Final = self._table("connection", Connection)
        self.cpus: Final = self._table("cpus", Cpu)
        self.queues: Final = self._table("queues", Queue)
        self.zones: Final = self._table("zones", Zone)
        self.channels: Final = self._table("channels", Channel)
        self.requests: Final = self._table("requests", Request)
        self.waiters: Final = self._table("waiters", Waiter)
        self.work: Final = self._table("work", WorkItem)
        self.devices: Final = self._table("devices", Device)
        self.drivers: Final = self._table("drivers", Driver)
        self.net_channels: Final = self._table("net_channels", NetChannel)
        self.frames: Final = self._table("frames", Frame)
        self.relids: Final = RelidTable(ram, layout.tables["relids"].gpa, self.channels)
        self.instances: Final = GuidHash(
            ram, layout.tables["instances"].gpa, INSTANCE_BUCKETS, self.channels, "if_instance", "hash_next"
        )
        self.work_queues: Final = WorkQueues(self.queues, self.work)
        self.uevents_gpa: Final = layout.tables["uevents"].gpa
        if not self.connections.in_use:
            self._take_fixed_records()
        self.connection: Final = self.connections.at(0)
        self._all_cpus: tuple[Cpu, ...] = ()
        self.known_drivers: tuple[int, tuple[Driver, ...]] = (-1, ())
        """The registered drivers, and the `driver_changes` as of which they are."""
        self.pages: Final = PageAllocator(ram, self.zones.at(0), layout.tables["pages"].gpa)
        self.chn_list: Final = RecordList(self.connection.chn_list, self.channels, "listentry")
        self.chn_msg_list: Final = RecordList(self.connection.chn_msg_list, self.requests, "msglistentry")

    @classmethod
    def format(
        cls,
        buffer: Any,
        ncpus: int,
        era: Era,
        vp_indices: Sequence[int] | None = None,
        reserve: Reserve = always_there,
    ) -> KernelTables:
        """At boot, once: lay out RAM that is all zeros. `vp_indices`: VP index of each CPU number."""
        ram = Ram(buffer)
        ram.reserve = reserve
        layout = compute(ram.size, ncpus)
        assert not ram.atomics.load_u64(BOOT_RECORD_GPA), "guest RAM is laid out already"
        tables = cls(ram, layout, era)
        tables.connection.next_gpadl_handle.store(FIRST_GPADL_HANDLE)
        for number in range(ncpus):
            tables.cpus.at(number).vp_index = number if vp_indices is None else vp_indices[number]
        tables.pages.format(layout.first_free_page, layout.end_page)
        record = _boot_record(layout, era)
        ram.octets[BOOT_RECORD_GPA + 8 : BOOT_RECORD_GPA + len(record)] = record[8:]
        # The magic goes last: who sees it sees everything before.
        ram.atomics.store_u64(BOOT_RECORD_GPA, BOOT_MAGIC, RELEASE)
        return tables

    @classmethod
    def attach(cls, buffer: Any, reserve: Reserve = always_there) -> KernelTables:
        """In every other process, after `format`; an AssertionError when RAM is laid out otherwise."""
        ram = Ram(buffer)
        ram.reserve = reserve
        magic = ram.atomics.load_u64(BOOT_RECORD_GPA, ACQUIRE)
        assert magic == BOOT_MAGIC, f"no guest kernel of ours is in this RAM (magic {magic:#x})"
        found = bytes(ram.octets[BOOT_RECORD_GPA : BOOT_RECORD_GPA + PAGE_SIZE])
        _, version, era, _, ncpus, _, _ = BOOT_RECORD.unpack_from(found)
        assert version == LAYOUT_VERSION, f"guest RAM has layout version {version}, this code {LAYOUT_VERSION}"
        layout = compute(ram.size, ncpus)
        record = _boot_record(layout, Era(era))
        assert found[: len(record)] == record, "guest RAM is laid out by other code than this"
        return cls(ram, layout, Era(era))

    def all_cpus(self) -> tuple[Cpu, ...]:
        """The records of all processors: only who places channels asks, so they are made at the first time."""
        if not self._all_cpus:
            self._all_cpus = tuple(self.cpus.live())
        return self._all_cpus

    def sc_list(self, primary: Channel) -> RecordList[Channel]:
        """A primary's sub-channels; channel_mutex."""
        return RecordList(primary.sc_list, self.channels, "sc_link")

    def chan_list(self, cpu: Cpu) -> RecordList[Channel]:
        """Seed: channels whose interrupts come here; only this processor may change it, in an ISR."""
        return RecordList(cpu.chan_list, self.channels, "percpu_list")

    def leaks(self) -> dict[str, int]:
        """Records and pages in use that an unloaded guest has given back: what is left of each is a leak.

        Workers that sleep because there is nothing to do are none.
        """
        tables = (self.channels, self.requests, self.work, self.devices, self.net_channels, self.frames)
        found = {table.name: table.in_use for table in tables if table.in_use}
        # 0: a worker takes the record just now.
        workers = self.work_queues.worker_actors() | {0}
        others = sum(waiter.sleeper() not in workers and waiter.alive() for waiter in self.waiters.live())
        if others:
            found["waiters"] = others
        found.update(self.pages.in_use_by_owner())
        return found

    def damage(self) -> list[str]:
        """What was written into freed records; call it when nothing runs."""
        tables = (
            self.channels,
            self.requests,
            self.waiters,
            self.work,
            self.devices,
            self.net_channels,
            self.frames,
        )
        return [line for table in tables for line in table.damage()]

    def _table(self, name: str, record_class: type[R]) -> Table[R]:
        placement = self.layout.tables[name]
        return Table(self.ram, name, record_class, placement.gpa, placement.capacity)

    def _take_fixed_records(self) -> None:
        """At boot: the records that are there as long as the machine; their indices are their meanings."""
        fixed = (
            (self.connections, 1),
            (self.zones, 1),
            (self.cpus, self.layout.ncpus),
            (self.queues, len(QueueNumber)),
        )
        for table, count in fixed:
            indices = [record.index for record in (table.alloc() for _ in range(count)) if record is not None]
            assert indices == list(range(count)), f"{table.name}: records {indices} instead of {count}"


BOOT_RECORD: Final = Struct("<QIIQIIQ")
"""magic, layout version, era, RAM bytes, CPUs, tables, first free page; then a PLACEMENT for each table."""
PLACEMENT: Final = Struct("<QQII")


def _boot_record(layout: Layout, era: Era) -> bytes:
    """The boot record's bytes for this layout."""
    head = BOOT_RECORD.pack(
        BOOT_MAGIC,
        LAYOUT_VERSION,
        era,
        layout.ram_bytes,
        layout.ncpus,
        len(layout.tables),
        layout.first_free_page,
    )
    places = (PLACEMENT.pack(p.gpa, p.nbytes, p.record_size, p.capacity) for p in layout.tables.values())
    return head + b"".join(places)
