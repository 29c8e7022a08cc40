/* SPDX-License-Identifier: MIT */
/*
 * One VMBus ring: a writing or a reading end over mapped memory (docs/abi.md, section 10.1).
 *
 * A ring signals nobody: it returns whether the other end must be signalled. Its data area is mapped twice
 * in a row, so that no copy ever wraps.
 */
#ifndef RING_H
#define RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define VM_PKT_DATA_INBAND 6
#define VM_PKT_COMP 11
#define COMPLETION_REQUESTED 1

#define RING_CONTROL_BYTES 4096
#define FEAT_PENDING_SEND_SZ 1u

struct ring_control {
	_Atomic uint32_t write_index;
	_Atomic uint32_t read_index;
	_Atomic uint32_t interrupt_mask;
	_Atomic uint32_t pending_send_sz;
	uint32_t reserved[12];
	_Atomic uint32_t feature_bits;
};
_Static_assert(offsetof(struct ring_control, feature_bits) == 64, "hv_ring_buffer");

struct packet_descriptor {
	uint16_t type;
	uint16_t offset8;
	uint16_t len8;
	uint16_t flags;
	uint64_t trans_id;
};
_Static_assert(sizeof(struct packet_descriptor) == 16, "vmpacket_descriptor");

struct ring {
	struct ring_control *control;
	uint8_t *data;
	uint32_t size; /* of the data, in bytes */
	uint32_t index; /* the own index: write_index of a writer, read_index of a reader */
};

struct packet {
	struct packet_descriptor descriptor;
	uint32_t length; /* of the payload, padding included */
	uint8_t payload[4096];
};

/* Map pages pfn[0] (control) to pfn[pages - 1] of `fd` as one ring. */
void ring_map(struct ring *ring, int fd, const uint64_t *pfn, unsigned pages);
/* Zero the control page and set the feature bit: the guest's part, before OPENCHANNEL. */
void ring_init(struct ring *ring);

/* Write one packet; false when there is no room. *signal: whether the reader must be signalled. */
bool ring_write(struct ring *ring, uint16_t type, uint16_t flags, uint64_t trans_id, const void *payload,
		uint32_t length, bool *signal);
/* Ask for a signal when a packet with this payload fits; true when it fits already. */
bool ring_want_room(struct ring *ring, uint32_t length);
void ring_cancel_room(struct ring *ring);
/* Whether the reader has read everything and asks to be signalled for more. */
bool ring_reader_sleeps(struct ring *ring);

/* Copy the next packet out; false when there is none. It stays the ring's until ring_release. */
bool ring_read(struct ring *ring, struct packet *packet);
/* Give everything read back to the writer; true when the writer waits for that and must be signalled. */
bool ring_release(struct ring *ring);
void ring_mask(struct ring *ring);
/* Unmask, and look again: true when there is something to read for which no signal comes. */
bool ring_unmask(struct ring *ring);

#endif
