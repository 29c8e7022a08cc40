"""Numbers of the bus driver's functions, by which guest RAM names code (see `guestproc.kernel.functions`)."""

from __future__ import annotations

from enum import IntEnum


class Tasklets(IntEnum):
    """Numbers in TASKLET_FUNCTIONS."""

    VMBUS_ON_MSG_DPC = 1
    VMBUS_ON_EVENT = 2
    NET_RX_ACTION = 3
    VMBUS_EVENT_DPC = 4


class Works(IntEnum):
    """Numbers in WORK_FUNCTIONS."""

    VMBUS_ONMESSAGE_WORK = 1
    VMBUS_ADD_CHANNEL_WORK = 2
    NETVSC_SUBCHAN_WORK = 8


class Ipis(IntEnum):
    """Numbers in IPI_FUNCTIONS."""

    HV_SYNIC_CLEANUP = 1
    PERCPU_CHANNEL_ENQ = 2
    PERCPU_CHANNEL_DEQ = 3
    HV_CE_SET_NEXT_EVENT = 4


class Handlers(IntEnum):
    """Numbers in VMBUS_HANDLERS."""

    VMBUS_ISR = 1
    VMBUS_ISR_POINTED = 2


class Callbacks(IntEnum):
    """Numbers in CHANNEL_CALLBACKS; drivers begin at 16."""

    ECHO_ONCHANNELCALLBACK = 16
    ECHO_SC_OPEN = 17
    NETVSC_CHANNEL_CB = 18
    NETVSC_SC_OPEN = 19
    NETVSC_CHANNEL_CB_MASKS_FIRST = 20
    HV_UIO_CHANNEL_CB = 24
    HV_UIO_RESCIND = 25
    POLLING_CHANNEL_CB = 60
    HVS_CHANNEL_CB = 61
