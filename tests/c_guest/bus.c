/* SPDX-License-Identifier: MIT */
/* See bus.h. */
#define _GNU_SOURCE
#include "bus.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Where this guest keeps its pages; it owns all of RAM. */
#define HYPERCALL_GPA UINT64_C(0x100000)
#define SYNIC_GPA UINT64_C(0x110000) /* two pages a VP: messages, event flags */
#define POST_GPA UINT64_C(0x120000)
#define GUEST_OS_ID UINT64_C(0x8100060c00000000)
#define STOP_VECTOR 0x40
#define PAGE UINT64_C(4096)

static uint64_t message_page(unsigned position)
{
	return SYNIC_GPA + 2 * PAGE * position;
}

static uint64_t event_page(unsigned position)
{
	return message_page(position) + PAGE;
}

/* -- the interrupt side ---------------------------------------------------------------------------------- */

/* Section 4.3: clear the flags first, then look at what they stand for. */
static void take_events(struct bus *bus, struct vp *vp)
{
	uint8_t *page = bus->machine->ram + event_page(vp->position);
	_Atomic uint64_t *words = (void *)(page + VMBUS_SINT * SLOT_BYTES);

	for (unsigned word = 0; word < SLOT_BYTES / 8; word++) {
		if (!atomic_load_explicit(&words[word], memory_order_relaxed))
			continue;
		uint64_t flags = atomic_exchange(&words[word], 0);
		while (flags) {
			unsigned bit = (unsigned)__builtin_ctzll(flags);
			flags &= flags - 1;
			atomic_fetch_add(&bus->events, 1);
			bus->on_event(bus->context, 64 * word + bit);
		}
	}
}

static void queue_message(struct bus *bus, const struct message *message)
{
	pthread_mutex_lock(&bus->lock);
	if (bus->count == QUEUED_MESSAGES)
		die("%d messages wait that nobody fetches", QUEUED_MESSAGES);
	bus->queue[(bus->first + bus->count++) % QUEUED_MESSAGES] = *message;
	pthread_cond_signal(&bus->arrived);
	pthread_mutex_unlock(&bus->lock);
}

/* Section 4.3: copy, clear by compare-and-swap, then look at the pending bit. */
static void take_message(struct bus *bus, struct vp *vp)
{
	struct hv_message *slot = (void *)(bus->machine->ram + message_page(vp->position) + VMBUS_SINT * SLOT_BYTES);
	uint32_t type = atomic_load_explicit(&slot->message_type, memory_order_acquire);
	struct message message;

	if (!type)
		return;
	if (type != CHANNEL_MESSAGE || slot->payload_size > MESSAGE_BYTES)
		die("a message of type 0x%x and %u bytes", type, slot->payload_size);
	message.size = slot->payload_size;
	memcpy(message.bytes, slot->payload, message.size);
	/* The swap is the full barrier between the clear and the look at the flags. */
	if (!atomic_compare_exchange_strong(&slot->message_type, &type, 0))
		die("somebody else emptied our message slot");
	if (atomic_load(&slot->message_flags) & MSG_PENDING) {
		atomic_fetch_add(&bus->eoms, 1);
		wrmsr(vp, 1 + vp->position, MSR_EOM, 0);
	}
	atomic_fetch_add(&bus->messages, 1);
	queue_message(bus, &message);
}

struct taker {
	struct bus *bus;
	struct vp *vp;
};

static void *run_taker(void *argument)
{
	struct taker taker = *(struct taker *)argument;

	free(argument);
	atomic_store(&taker.vp->page->run_state, VMBUS_EMU_RUN_STATE_AWAKE);
	while (!atomic_load(&taker.bus->stop)) {
		bool needs_eoi;
		unsigned vector = take_interrupt(taker.vp, &needs_eoi);

		if (!vector) {
			if (machine_stopping(taker.bus->machine) && !atomic_load(&taker.bus->machine->leaving))
				die("the machine stopped under VP %u", taker.vp->position);
			halt(taker.vp);
			continue;
		}
		if (vector == VMBUS_VECTOR) {
			if (needs_eoi == taker.bus->auto_eoi)
				die("auto-EOI words and SINT disagree on VP %u", taker.vp->position);
			take_events(taker.bus, taker.vp);
			take_message(taker.bus, taker.vp);
		} else if (vector != STOP_VECTOR) {
			die("vector 0x%x on VP %u", vector, taker.vp->position);
		}
		if (needs_eoi)
			end_of_interrupt(taker.vp);
	}
	return NULL;
}

/* -- bring-up -------------------------------------------------------------------------------------------- */

static void check_cpuid(struct bus *bus, int auto_eoi)
{
	struct vmbus_emu_machine_page *page = bus->machine->page;
	struct vp *vp = &bus->machine->vp[0];

	if (page->cpuid_count * 5 > VMBUS_EMU_CPUID_WORDS)
		die("%u CPUID entries", page->cpuid_count);
	for (unsigned entry = 0; entry < page->cpuid_count; entry++) {
		const uint32_t *row = &page->cpuid[5 * entry];
		struct answer answer = vm_exit(vp, MAIN_THREAD, VMBUS_EMU_EXIT_OPERATION_CPUID, row[0], 0);

		if (answer.fault || answer.result[0] != (row[1] | (uint64_t)row[2] << 32) ||
		    answer.result[1] != (row[3] | (uint64_t)row[4] << 32))
			die("CPUID 0x%x differs from the machine page", row[0]);
		if (row[0] == CPUID_FIRST && memcmp(&row[2], "Microsoft Hv", 12))
			die("no Hyper-V here");
		if (row[0] == CPUID_HINTS)
			bus->auto_eoi = auto_eoi < 0 ? !(row[1] & HINT_DEPRECATE_AUTO_EOI) : auto_eoi;
	}
}

static void start_synic(struct bus *bus, unsigned position)
{
	struct vp *vp = &bus->machine->vp[position];
	uint32_t sint = VMBUS_VECTOR | (bus->auto_eoi ? SINT_AUTO_EOI : 0);

	if (rdmsr(vp, MAIN_THREAD, MSR_VP_INDEX) != vp->page->vp_index)
		die("VP_INDEX of VP page %u", position);
	if (rdmsr(vp, MAIN_THREAD, MSR_SINT0 + VMBUS_SINT) != SINT_MASKED)
		die("SINT 2 is not as after a reset");
	machine_reserve(bus->machine, message_page(position), 2 * PAGE);
	wrmsr(vp, MAIN_THREAD, MSR_SIMP, message_page(position) | REGISTER_ENABLE);
	wrmsr(vp, MAIN_THREAD, MSR_SIEFP, event_page(position) | REGISTER_ENABLE);
	wrmsr(vp, MAIN_THREAD, MSR_SINT0 + VMBUS_SINT, sint);
	wrmsr(vp, MAIN_THREAD, MSR_SCONTROL, REGISTER_ENABLE);
	if (rdmsr(vp, MAIN_THREAD, MSR_SINT0 + VMBUS_SINT) != sint)
		die("SINT 2 does not keep what it was told");
}

static void start_taker(struct bus *bus, unsigned position)
{
	struct taker *taker = malloc(sizeof *taker);

	if (!taker)
		die("out of memory");
	*taker = (struct taker){ bus, &bus->machine->vp[position] };
	if (pthread_create(&bus->taker[position], NULL, run_taker, taker))
		die("no thread");
}

void bus_start(struct bus *bus, struct machine *machine, int auto_eoi)
{
	struct vp *vp = &machine->vp[0];
	pthread_condattr_t attributes;

	bus->machine = machine;
	bus->connection_id = CONTACT_CONNECTION;
	bus->queue = calloc(QUEUED_MESSAGES, sizeof *bus->queue);
	if (!bus->queue)
		die("out of memory");
	pthread_mutex_init(&bus->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&bus->arrived, &attributes);
	check_cpuid(bus, auto_eoi);
	machine_reserve(machine, HYPERCALL_GPA, PAGE);
	machine_reserve(machine, POST_GPA, PAGE);
	if (vm_exit(vp, MAIN_THREAD, VMBUS_EMU_EXIT_OPERATION_HYPERCALL, HVCALL_SIGNAL_EVENT_FAST, 1).fault !=
	    VMBUS_EMU_FAULT_INVALID_OPCODE)
		die("a hypercall without a hypercall page is no #UD");
	wrmsr(vp, MAIN_THREAD, MSR_GUEST_OS_ID, GUEST_OS_ID);
	wrmsr(vp, MAIN_THREAD, MSR_HYPERCALL, HYPERCALL_GPA | REGISTER_ENABLE);
	for (unsigned position = 0; position < 2; position++) {
		start_synic(bus, position);
		start_taker(bus, position);
	}
}

void bus_stop(struct bus *bus)
{
	atomic_store(&bus->stop, true);
	for (unsigned position = 0; position < 2; position++) {
		struct vp *vp = &bus->machine->vp[position];

		request_interrupt(vp, STOP_VECTOR);
		pthread_join(bus->taker[position], NULL);
	}
}

/* -- messages -------------------------------------------------------------------------------------------- */

void bus_post(struct bus *bus, const void *message, uint32_t size)
{
	struct post_message_input *input = (void *)(bus->machine->ram + POST_GPA);
	uint64_t end = now_ns() + DEADLINE_NS;
	uint16_t status;

	memset(input, 0, sizeof *input);
	input->connection_id = bus->connection_id;
	input->message_type = CHANNEL_MESSAGE;
	input->payload_size = size;
	memcpy(input->payload, message, size);
	while ((status = hypercall(&bus->machine->vp[0], MAIN_THREAD, HVCALL_POST_MESSAGE, POST_GPA)) ==
	       HV_INSUFFICIENT_BUFFERS) {
		if (now_ns() > end)
			die("the host takes no messages any more");
		atomic_fetch_add(&bus->posts_retried, 1);
		pause_ns(1000000);
	}
	if (status != HV_SUCCESS)
		die("HvCallPostMessage: status 0x%x", status);
}

void bus_post_number(struct bus *bus, uint32_t msgtype, uint32_t number)
{
	struct number_message message = { { msgtype, 0 }, number };

	bus_post(bus, &message, sizeof message);
}

void bus_fetch(struct bus *bus, struct message *message)
{
	uint64_t end = now_ns() + DEADLINE_NS;
	struct timespec until = { (time_t)(end / 1000000000), (long)(end % 1000000000) };

	pthread_mutex_lock(&bus->lock);
	while (!bus->count)
		if (pthread_cond_timedwait(&bus->arrived, &bus->lock, &until))
			die("no message within the deadline");
	*message = bus->queue[bus->first];
	bus->first = (bus->first + 1) % QUEUED_MESSAGES;
	bus->count--;
	pthread_mutex_unlock(&bus->lock);
	if (message->size < sizeof message->header)
		die("a channel message of %u bytes", message->size);
}

const void *bus_expect(struct bus *bus, struct message *message, uint32_t msgtype, uint32_t size)
{
	bus_fetch(bus, message);
	if (message->header.msgtype != msgtype || message->size < size)
		die("message %u of %u bytes, %u of %u was expected", message->header.msgtype, message->size, msgtype,
		    size);
	return message->bytes;
}
