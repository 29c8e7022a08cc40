/* SPDX-License-Identifier: MIT */
/* See ring.h. */
#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>

#include "machine.h"

#define PAGE ((size_t)VMBUS_EMU_PAGE_SIZE)
#define TRAILER 8u

static void map_page(uint8_t *at, int fd, uint64_t pfn)
{
	if (mmap(at, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, (off_t)(pfn * PAGE)) != at)
		die("mmap of page 0x%llx: %s", (unsigned long long)pfn, strerror(errno));
}

void ring_map(struct ring *ring, int fd, const uint64_t *pfn, unsigned pages)
{
	/* The control page, and the data pages two times; the anonymous mapping only reserves addresses. */
	uint8_t *memory = mmap(NULL, PAGE * (2 * pages - 1), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	for (unsigned page = 0; page < 2 * pages - 1; page++)
		map_page(memory + PAGE * page, fd, pfn[page < pages ? page : page - pages + 1]);
	ring->control = (void *)memory;
	ring->data = memory + RING_CONTROL_BYTES;
	ring->size = (uint32_t)(PAGE * (pages - 1));
	ring->index = 0;
}

void ring_init(struct ring *ring)
{
	memset((void *)ring->control, 0, RING_CONTROL_BYTES);
	atomic_store(&ring->control->feature_bits, FEAT_PENDING_SEND_SZ);
	ring->index = 0;
}

/* An index of the other side's, which may be anything. */
static uint32_t checked(struct ring *ring, uint32_t index, const char *name)
{
	if (index >= ring->size || index % 8)
		die("%s 0x%x in a ring of 0x%x bytes", name, index, ring->size);
	return index;
}

static uint32_t packet_bytes(uint32_t length)
{
	return (((uint32_t)sizeof(struct packet_descriptor) + length + 7) & ~7u) + TRAILER;
}

static uint32_t free_bytes(struct ring *ring)
{
	/* Acquire: the reader's copies are done before their bytes are overwritten. */
	uint32_t read = checked(ring, atomic_load(&ring->control->read_index), "read_index");

	return (read + ring->size - ring->index - 8) % ring->size;
}

bool ring_write(struct ring *ring, uint16_t type, uint16_t flags, uint64_t trans_id, const void *payload,
		uint32_t length, bool *signal)
{
	uint32_t bytes = packet_bytes(length);
	uint32_t old = ring->index;
	uint64_t trailer = (uint64_t)old << 32;
	struct packet_descriptor descriptor = {
		.type = type,
		.offset8 = sizeof descriptor / 8,
		.len8 = (uint16_t)((bytes - TRAILER) / 8),
		.flags = flags,
		.trans_id = trans_id,
	};

	if (bytes > ring->size - 8)
		die("a packet of %u bytes never fits", bytes);
	if (bytes > free_bytes(ring))
		return false;
	memcpy(ring->data + old, &descriptor, sizeof descriptor);
	memcpy(ring->data + old + sizeof descriptor, payload, length);
	memset(ring->data + old + sizeof descriptor + length, 0, bytes - TRAILER - sizeof descriptor - length);
	memcpy(ring->data + old + bytes - TRAILER, &trailer, sizeof trailer);
	ring->index = (old + bytes) % ring->size;
	/* Release for the packet; full barrier before the loads below; the mask before the index. */
	atomic_store(&ring->control->write_index, ring->index);
	atomic_thread_fence(memory_order_seq_cst);
	*signal = !atomic_load(&ring->control->interrupt_mask) && atomic_load(&ring->control->read_index) == old;
	return true;
}

bool ring_want_room(struct ring *ring, uint32_t length)
{
	uint32_t bytes = packet_bytes(length);

	/* Full barrier, then look again: the reader may have released everything just before. */
	atomic_store(&ring->control->pending_send_sz, bytes);
	atomic_thread_fence(memory_order_seq_cst);
	if (bytes > free_bytes(ring))
		return false;
	ring_cancel_room(ring);
	return true;
}

void ring_cancel_room(struct ring *ring)
{
	atomic_store(&ring->control->pending_send_sz, 0);
}

bool ring_reader_sleeps(struct ring *ring)
{
	return !atomic_load(&ring->control->interrupt_mask) &&
	       atomic_load(&ring->control->read_index) == ring->index;
}

static uint32_t available(struct ring *ring)
{
	/* Acquire: the packets' bytes are read after the index that covers them. */
	uint32_t write = checked(ring, atomic_load(&ring->control->write_index), "write_index");

	return (write + ring->size - ring->index) % ring->size;
}

bool ring_read(struct ring *ring, struct packet *packet)
{
	uint32_t have = available(ring);

	if (!have)
		return false;
	if (have < sizeof packet->descriptor + TRAILER)
		die("%u bytes are no packet", have);
	/* One copy, then the copy is checked. */
	memcpy(&packet->descriptor, ring->data + ring->index, sizeof packet->descriptor);
	uint32_t begin = packet->descriptor.offset8 * 8u, end = packet->descriptor.len8 * 8u;
	if (begin < sizeof packet->descriptor || end < begin || end + TRAILER > have ||
	    end - begin > sizeof packet->payload)
		die("packet from %u to %u, %u bytes are there", begin, end, have);
	packet->length = end - begin;
	memcpy(packet->payload, ring->data + ring->index + begin, packet->length);
	ring->index = (ring->index + end + TRAILER) % ring->size;
	return true;
}

bool ring_release(struct ring *ring)
{
	uint32_t old = atomic_load(&ring->control->read_index);
	uint32_t freed = (ring->index + ring->size - old) % ring->size;

	if (!freed)
		return false;
	/* Release for the copies; full barrier before the writer's wish is looked at. */
	atomic_store(&ring->control->read_index, ring->index);
	atomic_thread_fence(memory_order_seq_cst);
	if (!(atomic_load(&ring->control->feature_bits) & FEAT_PENDING_SEND_SZ))
		return false;
	uint32_t wish = atomic_load(&ring->control->pending_send_sz);
	if (!wish)
		return false;
	uint32_t room = (ring->index + ring->size - atomic_load(&ring->control->write_index) - 8) % ring->size;
	/* Only the release that made it enough signals. */
	return room >= wish && (int64_t)room - freed < wish;
}

void ring_mask(struct ring *ring)
{
	atomic_store(&ring->control->interrupt_mask, 1);
}

bool ring_unmask(struct ring *ring)
{
	/* Full barrier between the unmask and the look: the writer loads the mask after its index. */
	atomic_store(&ring->control->interrupt_mask, 0);
	atomic_thread_fence(memory_order_seq_cst);
	return available(ring) != 0;
}
