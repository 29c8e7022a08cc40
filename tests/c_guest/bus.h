/* SPDX-License-Identifier: MIT */
/*
 * The guest's end of VMBus: SynIC bring-up, a taker for each of two VPs, messages both ways.
 *
 * Messages go to VP 0, whose taker copies them out of the slot and queues them; whoever wants one waits for
 * it here. A channel's events go to VP 1, whose taker calls `on_event`.
 */
#ifndef BUS_H
#define BUS_H

#include <pthread.h>

#include "machine.h"
#include "vmbus.h"

#define QUEUED_MESSAGES 4096
#define MAIN_THREAD 100 /* claimer numbers: 1 + position for the takers, these for the others */
#define STORM_THREAD 200

struct message {
	uint32_t size;
	union {
		struct message_header header;
		uint8_t bytes[MESSAGE_BYTES];
	};
};

struct bus {
	struct machine *machine;
	bool auto_eoi;
	uint32_t connection_id; /* where messages are posted */
	pthread_t taker[2];
	_Atomic bool stop;
	void (*on_event)(void *context, uint32_t relid);
	void *context;
	/* What VP 0 took and nobody has fetched yet; under `lock`, `arrived` tells. */
	pthread_mutex_t lock;
	pthread_cond_t arrived;
	struct message *queue;
	unsigned first, count;
	_Atomic uint64_t messages, events, eoms, posts_retried;
};

/* Guest id, hypercall page, both VPs' SynIC, both takers. `auto_eoi`: -1 as the host's hint says, 0 or 1. */
void bus_start(struct bus *bus, struct machine *machine, int auto_eoi);
/* Send both takers home by an interrupt of our own. */
void bus_stop(struct bus *bus);

/* Post one channel message; tries again while the host has no buffer for it. */
void bus_post(struct bus *bus, const void *message, uint32_t size);
void bus_post_number(struct bus *bus, uint32_t msgtype, uint32_t number);
/* The next message, which must be of this type and at least this long. */
const void *bus_expect(struct bus *bus, struct message *message, uint32_t msgtype, uint32_t size);
/* The next message, whatever it is. */
void bus_fetch(struct bus *bus, struct message *message);

#endif
