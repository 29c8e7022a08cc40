/* SPDX-License-Identifier: MIT */
/*
 * A guest in C, written from docs/abi.md: the proof that the page is enough.
 *
 *     guest MACHINE [--packets N] [--storm-threads N] [--auto-eoi 0|1] [--poll-us N]
 *     guest --ring-write FILE COUNT     write packets into a ring that lies in a file (a test reads it)
 *     guest --ring-read FILE COUNT      the other way round
 *
 * It brings up two VPs, contacts the host with version 5.3, receives every offer, opens one echo channel whose
 * interrupts go to the second VP, exchanges packets, and leaves everything as it was; meanwhile several of its
 * threads exit on the first VP. One JSON line at the end and status 0, or a line that says what is wrong and 1.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bus.h"
#include "ring.h"

#define PAGE UINT64_C(4096)
#define RING_GPA UINT64_C(0x200000)
#define RING_PAGES 16u /* each way, control page included */
#define GPADL_HANDLE 0xe1e10u
#define MAX_OFFERS 2047
#define MAX_PAYLOAD 700u
#define MAX_STORM_THREADS 6u
#define SIGNAL_BY_HYPERCALL 7u /* every so many signals */
#define BURST 200u /* packets between two silences; together more than a ring holds */

static const uint8_t ECHO_CLASS[16] = { /* 6563686f-766d-4275-9d2d-656d752d3031 */
	0x6f, 0x68, 0x63, 0x65, 0x6d, 0x76, 0x75, 0x42, 0x9d, 0x2d, 0x65, 0x6d, 0x75, 0x2d, 0x30, 0x31
};

/* -- what the packets are --------------------------------------------------------------------------------- */

static uint32_t payload_length(uint64_t trans_id)
{
	return (uint32_t)(1 + trans_id * 37 % MAX_PAYLOAD);
}

static void fill_payload(uint8_t *payload, uint64_t trans_id)
{
	for (uint32_t at = 0; at < payload_length(trans_id); at++)
		payload[at] = (uint8_t)(trans_id * 31 + at);
}

static void check_packet(const struct packet *packet, uint64_t trans_id, uint16_t type)
{
	uint8_t expected[MAX_PAYLOAD];
	uint32_t length = payload_length(trans_id);

	if (packet->descriptor.type != type || packet->descriptor.trans_id != trans_id ||
	    packet->length != ((length + 7) & ~7u))
		die("packet type %u trans_id %llu of %u bytes, %llu of %u was expected", packet->descriptor.type,
		    (unsigned long long)packet->descriptor.trans_id, packet->length, (unsigned long long)trans_id,
		    length);
	fill_payload(expected, trans_id);
	if (memcmp(packet->payload, expected, length))
		die("the payload of packet %llu came back changed", (unsigned long long)trans_id);
}

/* -- the storm: many threads exit on one VP ------------------------------------------------------------------ */

struct storm {
	struct machine *machine;
	uint32_t number;
	_Atomic bool *stop;
	_Atomic uint64_t *latest; /* the highest reference time that any thread has been told */
	uint64_t exits;
	pthread_t thread;
};

static void raise_to(_Atomic uint64_t *latest, uint64_t value)
{
	uint64_t before = atomic_load(latest);

	while (before < value && !atomic_compare_exchange_weak(latest, &before, value))
		;
}

/* Four different questions, so that an answer in the wrong slot shows. */
static void ask_everything(struct storm *storm)
{
	struct vp *vp = &storm->machine->vp[0];
	uint32_t claimer = STORM_THREAD + storm->number;
	/* An exit that begins after another has ended never gets a smaller time. */
	uint64_t least = atomic_load(storm->latest);
	uint64_t time = rdmsr(vp, claimer, MSR_TIME_REF_COUNT);

	if (time < least)
		die("reference time went back from %llu to %llu", (unsigned long long)least, (unsigned long long)time);
	raise_to(storm->latest, time);
	if (rdmsr(vp, claimer, MSR_VP_INDEX) != vp->page->vp_index)
		die("VP_INDEX changed");
	if (rdmsr(vp, claimer, MSR_SVERSION) != 1)
		die("SVERSION changed");
	struct answer answer = vm_exit(vp, claimer, VMBUS_EMU_EXIT_OPERATION_RDMSR, MSR_NOT_THERE, 0);
	if (answer.fault != VMBUS_EMU_FAULT_GENERAL_PROTECTION)
		die("fault %u for a register that does not exist", answer.fault);
	storm->exits += 4;
}

static void *run_storm(void *argument)
{
	struct storm *storm = argument;

	do
		ask_everything(storm);
	while (!atomic_load(storm->stop));
	return NULL;
}

/* -- the connection ----------------------------------------------------------------------------------------- */

static uint32_t contact(struct bus *bus)
{
	struct initiate_contact request = {
		.header.msgtype = INITIATE_CONTACT,
		.vmbus_version_requested = VERSION_5_3,
		.target_vcpu = bus->machine->vp[0].page->vp_index,
		.msg_sint = VMBUS_SINT,
	};
	struct message message;

	bus_post(bus, &request, sizeof request);
	const struct version_response *response =
		bus_expect(bus, &message, VERSION_RESPONSE, sizeof *response);
	if (!response->version_supported || response->connection_state)
		die("version 5.3: supported %u, connection state %u", response->version_supported,
		    response->connection_state);
	bus->connection_id = response->msg_conn_id;
	return request.vmbus_version_requested;
}

static unsigned receive_offers(struct bus *bus, struct offer_channel *offers)
{
	struct message_header request = { REQUESTOFFERS, 0 };
	struct message message;
	unsigned count = 0;

	bus_post(bus, &request, sizeof request);
	for (;;) {
		bus_fetch(bus, &message);
		if (message.header.msgtype == ALLOFFERS_DELIVERED)
			return count;
		if (message.header.msgtype != OFFERCHANNEL || message.size < sizeof *offers || count == MAX_OFFERS)
			die("message %u of %u bytes among the offers", message.header.msgtype, message.size);
		memcpy(&offers[count], message.bytes, sizeof *offers);
		const struct offer_channel *offer = &offers[count];
		if (offer->child_relid < 1 || offer->child_relid > MAX_OFFERS || !(offer->is_dedicated_interrupt & 1))
			die("offer of relid 0x%x, dedicated 0x%x", offer->child_relid, offer->is_dedicated_interrupt);
		for (unsigned earlier = 0; earlier < count; earlier++)
			if (offers[earlier].child_relid == offer->child_relid)
				die("relid %u is offered twice", offer->child_relid);
		count++;
	}
}

static const struct offer_channel *find_echo(const struct offer_channel *offers, unsigned count)
{
	for (unsigned number = 0; number < count; number++)
		if (!memcmp(offers[number].if_type, ECHO_CLASS, sizeof ECHO_CLASS))
			return &offers[number];
	die("none of %u offers is an echo device", count);
}

/* -- the channel -------------------------------------------------------------------------------------------- */

struct channel {
	struct bus *bus;
	uint32_t relid, connection_id;
	uint64_t packets;
	uint64_t pfn[2 * RING_PAGES];
	struct ring out, in;
	/* VP 1's taker counts and tells, the main thread waits; under `lock`. */
	pthread_mutex_t lock;
	pthread_cond_t progress;
	uint64_t completions, wakeups;
	uint8_t *seen;
	uint64_t signals, hypercall_signals, waits_for_room; /* the main thread's */
};

/* Any pages in any order: here the last one first, so that nothing is contiguous. */
static void choose_pages(struct channel *channel)
{
	for (unsigned page = 0; page < 2 * RING_PAGES; page++)
		channel->pfn[page] = RING_GPA / PAGE + 2 * RING_PAGES - 1 - page;
}

static void create_gpadl(struct channel *channel)
{
	const unsigned pages = 2 * RING_PAGES;
	struct gpadl_header header = {
		.header.msgtype = GPADL_HEADER,
		.child_relid = channel->relid,
		.gpadl = GPADL_HANDLE,
		.range_buflen = (uint16_t)(8 + 8 * pages),
		.rangecount = 1,
		.byte_count = (uint32_t)(pages * PAGE),
	};
	const unsigned first = pages < 26 ? pages : 26;
	struct message message;

	memcpy(header.pfn, channel->pfn, 8 * first);
	bus_post(channel->bus, &header, (uint32_t)(offsetof(struct gpadl_header, pfn) + 8 * first));
	for (unsigned done = first; done < pages; done += 28) {
		struct gpadl_body body = { .header.msgtype = GPADL_BODY, .gpadl = GPADL_HANDLE };
		unsigned more = pages - done < 28 ? pages - done : 28;

		memcpy(body.pfn, &channel->pfn[done], 8 * more);
		bus_post(channel->bus, &body, (uint32_t)(offsetof(struct gpadl_body, pfn) + 8 * more));
	}
	const struct result_message *created = bus_expect(channel->bus, &message, GPADL_CREATED, sizeof *created);
	if (created->child_relid != channel->relid || created->handle != GPADL_HANDLE || created->status)
		die("GPADL_CREATED of 0x%x for %u: status 0x%x", created->handle, created->child_relid, created->status);
}

static void open_echo(struct channel *channel)
{
	struct machine *machine = channel->bus->machine;
	struct open_channel request = {
		.header.msgtype = OPENCHANNEL,
		.child_relid = channel->relid,
		.openid = channel->relid + 1000,
		.ringbuffer_gpadlhandle = GPADL_HANDLE,
		.target_vp = machine->vp[1].page->vp_index,
		.downstream_ringbuffer_pageoffset = RING_PAGES,
	};
	struct message message;

	machine_reserve(machine, RING_GPA, 2 * RING_PAGES * PAGE);
	choose_pages(channel);
	create_gpadl(channel);
	ring_map(&channel->out, machine->ram_fd, channel->pfn, RING_PAGES);
	ring_map(&channel->in, machine->ram_fd, channel->pfn + RING_PAGES, RING_PAGES);
	ring_init(&channel->out);
	ring_init(&channel->in);
	bus_post(channel->bus, &request, sizeof request);
	const struct result_message *result =
		bus_expect(channel->bus, &message, OPENCHANNEL_RESULT, sizeof *result);
	if (result->child_relid != channel->relid || result->handle != request.openid || result->status)
		die("OPENCHANNEL_RESULT for %u, openid %u: status 0x%x", result->child_relid, result->handle,
		    result->status);
}

static void close_echo(struct channel *channel)
{
	struct gpadl_teardown teardown = { { GPADL_TEARDOWN, 0 }, channel->relid, GPADL_HANDLE };
	struct message message;

	bus_post_number(channel->bus, CLOSECHANNEL, channel->relid);
	bus_post(channel->bus, &teardown, sizeof teardown);
	const struct number_message *torndown = bus_expect(channel->bus, &message, GPADL_TORNDOWN, sizeof *torndown);
	if (torndown->number != GPADL_HANDLE)
		die("GPADL_TORNDOWN of 0x%x", torndown->number);
}

/* Mostly the doorbell, at first and now and then the hypercall: to the host they are the same. */
static void signal_host(struct channel *channel)
{
	if (channel->signals++ % SIGNAL_BY_HYPERCALL != 0) {
		ring_doorbell(channel->bus->machine, channel->connection_id);
		return;
	}
	channel->hypercall_signals++;
	uint16_t status = hypercall(&channel->bus->machine->vp[0], MAIN_THREAD, HVCALL_SIGNAL_EVENT_FAST,
				    channel->connection_id);
	if (status != HV_SUCCESS)
		die("HvCallSignalEvent: status 0x%x", status);
}

/* VP 1, in its interrupt: take what there is, look again after unmasking. */
static void on_event(void *context, uint32_t relid)
{
	struct channel *channel = context;
	struct packet packet;
	uint64_t taken = 0;

	if (relid != channel->relid)
		die("event flag %u, %u is ours", relid, channel->relid);
	do {
		ring_mask(&channel->in);
		while (ring_read(&channel->in, &packet)) {
			uint64_t trans_id = packet.descriptor.trans_id;

			if (trans_id < 1 || trans_id > channel->packets || channel->seen[trans_id])
				die("a completion of %llu", (unsigned long long)trans_id);
			check_packet(&packet, trans_id, VM_PKT_COMP);
			channel->seen[trans_id] = 1;
			taken++;
		}
		if (ring_release(&channel->in))
			ring_doorbell(channel->bus->machine, channel->connection_id);
	} while (ring_unmask(&channel->in));
	pthread_mutex_lock(&channel->lock);
	channel->completions += taken;
	channel->wakeups++;
	pthread_cond_signal(&channel->progress);
	pthread_mutex_unlock(&channel->lock);
}

/* Wait for the next event on VP 1 after number `wakeups`, or until `completions` have come. */
static void wait_for_progress(struct channel *channel, uint64_t wakeups, uint64_t completions)
{
	uint64_t end = now_ns() + DEADLINE_NS;
	struct timespec until = { (time_t)(end / 1000000000), (long)(end % 1000000000) };

	pthread_mutex_lock(&channel->lock);
	while (channel->wakeups == wakeups && channel->completions < completions)
		if (pthread_cond_timedwait(&channel->progress, &channel->lock, &until))
			die("%llu completions of %llu, and nothing more within the deadline",
			    (unsigned long long)channel->completions, (unsigned long long)channel->packets);
	pthread_mutex_unlock(&channel->lock);
}

static uint64_t wakeups_so_far(struct channel *channel)
{
	pthread_mutex_lock(&channel->lock);
	uint64_t wakeups = channel->wakeups;
	pthread_mutex_unlock(&channel->lock);
	return wakeups;
}

static uint64_t completions_so_far(struct channel *channel)
{
	pthread_mutex_lock(&channel->lock);
	uint64_t completions = channel->completions;
	pthread_mutex_unlock(&channel->lock);
	return completions;
}

static void send_packet(struct channel *channel, uint64_t trans_id)
{
	uint8_t payload[MAX_PAYLOAD];
	uint32_t length = payload_length(trans_id);
	bool signal;

	fill_payload(payload, trans_id);
	for (;;) {
		/* Counted before the wish is published: the signal for it comes after this number. */
		uint64_t wakeups = wakeups_so_far(channel);

		if (ring_write(&channel->out, VM_PKT_DATA_INBAND, COMPLETION_REQUESTED, trans_id, payload, length,
			       &signal)) {
			ring_cancel_room(&channel->out);
			break;
		}
		if (!ring_want_room(&channel->out, length)) {
			channel->waits_for_room++;
			wait_for_progress(channel, wakeups, UINT64_MAX);
		}
	}
	if (signal)
		signal_host(channel);
}

/* Wait until everything sent has come back and the host sleeps: the next packet must be signalled. */
static void wait_until_quiet(struct channel *channel, uint64_t sent)
{
	uint64_t end = now_ns() + DEADLINE_NS;

	while (completions_so_far(channel) < sent)
		wait_for_progress(channel, wakeups_so_far(channel), sent);
	while (!ring_reader_sleeps(&channel->out)) {
		if (now_ns() > end)
			die("the host never unmasks its ring");
		pause_ns(20000);
	}
}

static void exchange_packets(struct channel *channel)
{
	for (uint64_t trans_id = 1; trans_id <= channel->packets; trans_id++) {
		send_packet(channel, trans_id);
		if (trans_id % BURST == 0 || trans_id == channel->packets)
			wait_until_quiet(channel, trans_id);
	}
	for (uint64_t trans_id = 1; trans_id <= channel->packets; trans_id++)
		if (!channel->seen[trans_id])
			die("packet %llu was never completed", (unsigned long long)trans_id);
}

/* -- the whole life ------------------------------------------------------------------------------------------- */

struct options {
	const char *machine;
	uint64_t packets;
	unsigned storm_threads;
	int auto_eoi;
	uint64_t poll_ns;
};

static void run_guest(const struct options *options)
{
	static struct offer_channel offers[MAX_OFFERS];
	struct machine machine;
	struct bus bus = { 0 };
	struct channel channel = { .bus = &bus, .packets = options->packets };
	struct storm storms[MAX_STORM_THREADS];
	_Atomic bool storm_over = false;
	_Atomic uint64_t latest = 0;
	uint64_t storm_exits = 0;
	struct message message;

	machine_open(&machine, options->machine, options->poll_ns);
	if (machine.vp_count < 2)
		die("two VPs are needed, %u are there", machine.vp_count);
	struct answer attach = vm_exit(&machine.vp[0], MAIN_THREAD, VMBUS_EMU_EXIT_OPERATION_ATTACH,
				       (uint64_t)getpid(), VMBUS_EMU_ABI_VERSION);
	if (attach.fault || attach.result[0] != atomic_load(&machine.page->attach_generation))
		die("ATTACH: fault %u, generation %llu", attach.fault, (unsigned long long)attach.result[0]);
	pthread_mutex_init(&channel.lock, NULL);
	pthread_condattr_t attributes;
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&channel.progress, &attributes);
	channel.seen = calloc(options->packets + 1, 1);
	bus.on_event = on_event;
	bus.context = &channel;
	bus_start(&bus, &machine, options->auto_eoi);
	for (unsigned number = 0; number < options->storm_threads; number++) {
		storms[number] = (struct storm){ &machine, number, &storm_over, &latest, 0, 0 };
		if (pthread_create(&storms[number].thread, NULL, run_storm, &storms[number]))
			die("no thread");
	}

	uint32_t version = contact(&bus);
	unsigned offer_count = receive_offers(&bus, offers);
	const struct offer_channel *echo = find_echo(offers, offer_count);
	channel.relid = echo->child_relid;
	channel.connection_id = echo->connection_id;
	open_echo(&channel);
	exchange_packets(&channel);
	close_echo(&channel);
	for (unsigned number = 0; number < offer_count; number++)
		bus_post_number(&bus, RELID_RELEASED, offers[number].child_relid);

	atomic_store(&storm_over, true);
	for (unsigned number = 0; number < options->storm_threads; number++) {
		pthread_join(storms[number].thread, NULL);
		storm_exits += storms[number].exits;
	}
	struct message_header unload = { UNLOAD, 0 };
	atomic_store(&machine.leaving, true);
	bus_post(&bus, &unload, sizeof unload);
	bus_expect(&bus, &message, UNLOAD_RESPONSE, sizeof unload);
	bus_stop(&bus);
	/* The machine may be ending already: it has nothing else to wait for. */
	if (!machine_stopping(&machine))
		vm_exit(&machine.vp[0], MAIN_THREAD, VMBUS_EMU_EXIT_OPERATION_DETACH, 0, 0);

	printf("{\"version\": \"%u.%u\", \"offers\": %u, \"packets\": %llu, \"completions\": %llu, \"exits\": %llu, "
	       "\"storm_exits\": %llu, \"sleeping_exits\": %llu, \"generation\": %llu, \"auto_eoi\": %s, "
	       "\"target_vp\": %u, \"interrupts\": [%llu, %llu], \"halts\": [%llu, %llu], \"messages\": %llu, "
	       "\"events\": %llu, \"eoms\": %llu, \"doorbells\": %llu, \"hypercall_signals\": %llu, "
	       "\"waits_for_room\": %llu, \"posts_retried\": %llu}\n",
	       version >> 16, version & 0xffff, offer_count, (unsigned long long)channel.packets,
	       (unsigned long long)channel.completions, (unsigned long long)machine.exits,
	       (unsigned long long)storm_exits, (unsigned long long)machine.sleeping_exits,
	       (unsigned long long)attach.result[0], bus.auto_eoi ? "true" : "false", machine.vp[1].page->vp_index,
	       (unsigned long long)machine.vp[0].interrupts, (unsigned long long)machine.vp[1].interrupts,
	       (unsigned long long)machine.vp[0].halts, (unsigned long long)machine.vp[1].halts,
	       (unsigned long long)bus.messages, (unsigned long long)bus.events, (unsigned long long)bus.eoms,
	       (unsigned long long)machine.doorbell_rings, (unsigned long long)channel.hypercall_signals,
	       (unsigned long long)channel.waits_for_room, (unsigned long long)bus.posts_retried);
}

/* -- one ring in a file, for a test of ring.c alone ------------------------------------------------------------- */

static void map_file(struct ring *ring, const char *path)
{
	uint64_t pfn[RING_PAGES];
	int fd = open(path, O_RDWR);

	if (fd < 0)
		die("cannot open %s", path);
	off_t bytes = lseek(fd, 0, SEEK_END);
	if (bytes < (off_t)(2 * PAGE) || bytes > (off_t)(RING_PAGES * PAGE) || bytes % (off_t)PAGE)
		die("%s: %lld bytes are no ring", path, (long long)bytes);
	for (unsigned page = 0; page < (unsigned)(bytes / (off_t)PAGE); page++)
		pfn[page] = page;
	ring_map(ring, fd, pfn, (unsigned)(bytes / (off_t)PAGE));
}

/* Write, or read and check, packets 1 to COUNT; poll when the ring is full or empty. One line: signals owed. */
static void run_ring(bool write, const char *path, uint64_t count)
{
	uint64_t end = now_ns() + DEADLINE_NS, signals = 0;
	uint8_t payload[MAX_PAYLOAD];
	static struct packet packet;
	struct ring ring;
	bool signal;

	map_file(&ring, path);
	for (uint64_t trans_id = 1; trans_id <= count;) {
		bool done, owed = false;

		if (now_ns() > end)
			die("packet %llu: the other end does nothing", (unsigned long long)trans_id);
		fill_payload(payload, trans_id);
		if (write) {
			done = ring_write(&ring, VM_PKT_DATA_INBAND, COMPLETION_REQUESTED, trans_id, payload,
					  payload_length(trans_id), &signal);
			if (done) {
				owed = signal;
				ring_cancel_room(&ring);
			} else {
				ring_want_room(&ring, payload_length(trans_id));
			}
		} else {
			done = ring_read(&ring, &packet);
			if (done)
				check_packet(&packet, trans_id, VM_PKT_DATA_INBAND);
			owed = ring_release(&ring);
		}
		signals += owed;
		trans_id += done;
		if (!done)
			pause_ns(1000);
	}
	printf("%llu\n", (unsigned long long)signals);
}

static uint64_t number_argument(const char *text)
{
	char *end;
	unsigned long long value = strtoull(text, &end, 0);

	if (!*text || *end)
		die("%s is no number", text);
	return value;
}

int main(int count, char **arguments)
{
	struct options options = { .packets = 1000, .storm_threads = 3, .auto_eoi = -1, .poll_ns = 60000 };

	if (count == 4 && (!strcmp(arguments[1], "--ring-write") || !strcmp(arguments[1], "--ring-read"))) {
		run_ring(!strcmp(arguments[1], "--ring-write"), arguments[2], number_argument(arguments[3]));
		return 0;
	}
	if (count < 2 || count % 2)
		die("usage: guest MACHINE [--packets N] [--storm-threads N] [--auto-eoi 0|1] [--poll-us N]");
	options.machine = arguments[1];
	for (int number = 2; number < count; number += 2) {
		uint64_t value = number_argument(arguments[number + 1]);

		if (!strcmp(arguments[number], "--packets"))
			options.packets = value;
		else if (!strcmp(arguments[number], "--storm-threads") && value <= MAX_STORM_THREADS)
			options.storm_threads = (unsigned)value;
		else if (!strcmp(arguments[number], "--auto-eoi") && value <= 1)
			options.auto_eoi = (int)value;
		else if (!strcmp(arguments[number], "--poll-us"))
			options.poll_ns = 1000 * value;
		else
			die("%s %s is no option", arguments[number], arguments[number + 1]);
	}
	run_guest(&options);
	return 0;
}
