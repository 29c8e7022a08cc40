/* SPDX-License-Identifier: MIT */
/* See machine.h. */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define LOOKS_BEFORE_YIELD 20
#define BLOCK_NS UINT64_C(500000000) /* the longest single block: whoever owed a token may be dead */
#define SECOND_NS UINT64_C(1000000000)

_Noreturn void die(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("guest: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
	/* Not exit(): other threads are in the middle of things. */
	_exit(1);
}

uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

void pause_ns(uint64_t nanoseconds)
{
	struct timespec time = { (time_t)(nanoseconds / SECOND_NS), (long)(nanoseconds % SECOND_NS) };

	nanosleep(&time, NULL);
}

/*
 * Blocks end by a clock that nobody sets: with one that can be set back, a block whose token is lost could last an hour.
 * sem_clockwait came with glibc 2.30; where there is none, the wall clock has to do.
 */
#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 30)
#define BLOCK_CLOCK CLOCK_MONOTONIC
#define wait_until(semaphore, until) sem_clockwait(semaphore, BLOCK_CLOCK, until)
#else
#define BLOCK_CLOCK CLOCK_REALTIME
#define wait_until(semaphore, until) sem_timedwait(semaphore, until)
#endif

/* Take one token, or give up after BLOCK_NS or a signal; true when there was one. */
static bool block(sem_t *semaphore)
{
	struct timespec until;

	clock_gettime(BLOCK_CLOCK, &until);
	uint64_t nanoseconds = (uint64_t)until.tv_nsec + BLOCK_NS;
	until.tv_sec += (time_t)(nanoseconds / SECOND_NS);
	until.tv_nsec = (long)(nanoseconds % SECOND_NS);
	if (wait_until(semaphore, &until) == 0)
		return true;
	if (errno != ETIMEDOUT && errno != EINTR)
		die("waiting for a token: %s", strerror(errno));
	return false;
}

/* -- section 2: attaching ------------------------------------------------------------------------------ */

static void *map_segment(const char *format, const char *name, uint64_t *bytes, int *keep)
{
	char path[256];
	struct stat status;
	int fd;

	snprintf(path, sizeof path, format, name);
	fd = shm_open(path, O_RDWR, 0);
	if (fd < 0)
		die("shm_open %s: %s", path, strerror(errno));
	if (fstat(fd, &status) != 0 || status.st_size == 0)
		die("%s is still being made", path);
	*bytes = (uint64_t)status.st_size;
	void *memory = mmap(NULL, (size_t)*bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		die("mmap %s: %s", path, strerror(errno));
	if (keep)
		*keep = fd;
	else
		close(fd);
	return memory;
}

static sem_t *open_semaphore(const char *format, const char *name, unsigned position, unsigned slot)
{
	char path[256];

	/* The formats are the header's; each takes a prefix of these arguments. */
	snprintf(path, sizeof path, format, name, position, slot);
	sem_t *semaphore = sem_open(path, 0);
	if (semaphore == SEM_FAILED)
		die("sem_open %s: %s", path, strerror(errno));
	return semaphore;
}

static void wait_until_running(struct machine *machine)
{
	uint64_t end = now_ns() + DEADLINE_NS;

	/* Acquire: who sees the magic sees the rest of the page. */
	while (atomic_load_explicit(&machine->page->magic, memory_order_acquire) != VMBUS_EMU_MAGIC ||
	       atomic_load(&machine->page->state) == VMBUS_EMU_MACHINE_STATE_STARTING) {
		if (now_ns() > end)
			die("machine %s does not run", machine->name);
		pause_ns(1000000);
	}
	if (machine->page->abi_major != VMBUS_EMU_ABI_MAJOR)
		die("ABI major %u, %u is ours", machine->page->abi_major, VMBUS_EMU_ABI_MAJOR);
	if (machine_stopping(machine))
		die("machine %s is stopping", machine->name);
}

static void open_vp(struct machine *machine, unsigned position)
{
	struct vp *vp = &machine->vp[position];

	vp->machine = machine;
	vp->position = position;
	vp->page = (void *)((uint8_t *)machine->page + VMBUS_EMU_VP_PAGE_OFFSET(position));
	if (vp->page->position != position)
		die("VP page %u says that it is at %u", position, vp->page->position);
	vp->wakeup = open_semaphore(VMBUS_EMU_SEMAPHORE_VP, machine->name, position, 0);
	for (unsigned slot = 0; slot < VMBUS_EMU_EXIT_SLOTS; slot++)
		vp->exit_wakeup[slot] = open_semaphore(VMBUS_EMU_SEMAPHORE_EXIT, machine->name, position, slot);
}

void machine_open(struct machine *machine, const char *name, uint64_t poll_ns)
{
	uint64_t vps_bytes, doorbells_bytes, ram_bytes;

	memset(machine, 0, sizeof *machine);
	machine->name = name;
	machine->poll_ns = poll_ns;
	machine->page = map_segment(VMBUS_EMU_SEGMENT_VPS, name, &vps_bytes, NULL);
	wait_until_running(machine);
	machine->doorbells = map_segment(VMBUS_EMU_SEGMENT_DOORBELLS, name, &doorbells_bytes, NULL);
	machine->ram = map_segment(VMBUS_EMU_SEGMENT_RAM, name, &ram_bytes, &machine->ram_fd);
	machine->ram_bytes = machine->page->ram_bytes;
	machine->vp_count = machine->page->vp_count;
	if (vps_bytes != VMBUS_EMU_VPS_BYTES(machine->vp_count) || ram_bytes != machine->ram_bytes ||
	    doorbells_bytes != sizeof *machine->doorbells)
		die("segments of %llu, %llu and %llu bytes do not fit the machine page",
		    (unsigned long long)vps_bytes, (unsigned long long)ram_bytes, (unsigned long long)doorbells_bytes);
	machine->host = open_semaphore(VMBUS_EMU_SEMAPHORE_HOST, name, 0, 0);
	machine->vp = calloc(machine->vp_count, sizeof *machine->vp);
	if (!machine->vp)
		die("out of memory");
	for (unsigned position = 0; position < machine->vp_count; position++)
		open_vp(machine, position);
}

bool machine_stopping(struct machine *machine)
{
	return atomic_load(&machine->page->state) == VMBUS_EMU_MACHINE_STATE_STOPPING;
}

void machine_reserve(struct machine *machine, uint64_t gpa, uint64_t bytes)
{
	if (gpa + bytes > machine->ram_bytes)
		die("no RAM at 0x%llx", (unsigned long long)gpa);
	int error = posix_fallocate(machine->ram_fd, (off_t)gpa, (off_t)bytes);
	if (error)
		die("posix_fallocate: %s", strerror(error));
}

/* -- section 3: VM exits ------------------------------------------------------------------------------- */

/* Section 3.4. The caller's last atomic or is the full barrier before this load. */
static void wake_host(struct machine *machine)
{
	uint32_t halted = VMBUS_EMU_RUN_STATE_HALTED;

	if (atomic_load(&machine->doorbells->host_run_state) == halted &&
	    atomic_compare_exchange_strong(&machine->doorbells->host_run_state, &halted, VMBUS_EMU_RUN_STATE_AWAKE))
		sem_post(machine->host);
}

static unsigned claim_slot(struct vp *vp)
{
	uint64_t end = 0;

	for (;;) {
		for (unsigned slot = 0; slot < VMBUS_EMU_EXIT_SLOTS; slot++) {
			uint32_t expected = VMBUS_EMU_EXIT_STATE_FREE;
			if (atomic_compare_exchange_strong(&vp->page->exit_slot[slot].state, &expected,
							   VMBUS_EMU_EXIT_STATE_CLAIMED))
				return slot;
		}
		sched_yield();
		if (!end)
			end = now_ns() + DEADLINE_NS;
		else if (now_ns() > end)
			die("no exit slot of VP %u becomes free", vp->position);
	}
}

/* Step 6. Poll, then sleep; who leaves RUNG first decides whether a token is owed. */
static void wait_for_answer(struct vp *vp, unsigned slot)
{
	_Atomic uint32_t *state = &vp->page->exit_slot[slot].state;
	uint64_t begin = now_ns();

	while (now_ns() < begin + vp->machine->poll_ns) {
		for (int look = 0; look < LOOKS_BEFORE_YIELD; look++)
			if (atomic_load_explicit(state, memory_order_acquire) == VMBUS_EMU_EXIT_STATE_DONE)
				return;
		sched_yield();
	}
	uint32_t rung = VMBUS_EMU_EXIT_STATE_RUNG;
	if (!atomic_compare_exchange_strong(state, &rung, VMBUS_EMU_EXIT_STATE_SLEEPING))
		return;
	atomic_fetch_add(&vp->machine->sleeping_exits, 1);
	while (!(block(vp->exit_wakeup[slot]) &&
		 atomic_load_explicit(state, memory_order_acquire) == VMBUS_EMU_EXIT_STATE_DONE)) {
		if (machine_stopping(vp->machine)) {
			if (atomic_load(&vp->machine->leaving))
				return;
			die("the machine stopped during an exit");
		}
		if (now_ns() > begin + DEADLINE_NS)
			die("no answer to an exit in slot %u of VP %u", slot, vp->position);
	}
}

struct answer vm_exit(struct vp *vp, uint32_t claimer, uint32_t operation, uint64_t a0, uint64_t a1)
{
	unsigned number = claim_slot(vp);
	struct vmbus_emu_exit_slot *slot = &vp->page->exit_slot[number];
	struct vmbus_emu_doorbells *doorbells = vp->machine->doorbells;
	struct answer answer;

	slot->claimer = claimer;
	slot->operation = operation;
	slot->arguments[0] = a0;
	slot->arguments[1] = a1;
	slot->arguments[2] = 0;
	slot->serial = 0;
	/* Release: the host that sees RUNG sees the request. */
	atomic_store_explicit(&slot->state, VMBUS_EMU_EXIT_STATE_RUNG, memory_order_release);
	/* After RUNG: the host takes the bell first and looks at the slot second. */
	atomic_fetch_or(&doorbells->exit_bell[vp->position / 8],
			UINT64_C(1) << (vp->position % 8 * VMBUS_EMU_EXIT_SLOTS + number));
	wake_host(vp->machine);
	wait_for_answer(vp, number);
	answer.fault = slot->fault;
	answer.result[0] = slot->result[0];
	answer.result[1] = slot->result[1];
	/* Release: the answer has been read before the next claimer fills the slot. */
	atomic_store_explicit(&slot->state, VMBUS_EMU_EXIT_STATE_FREE, memory_order_release);
	atomic_fetch_add_explicit(&vp->machine->exits, 1, memory_order_relaxed);
	return answer;
}

uint64_t rdmsr(struct vp *vp, uint32_t claimer, uint32_t msr)
{
	struct answer answer = vm_exit(vp, claimer, VMBUS_EMU_EXIT_OPERATION_RDMSR, msr, 0);

	if (answer.fault)
		die("RDMSR 0x%x: fault %u", msr, answer.fault);
	return answer.result[0];
}

void wrmsr(struct vp *vp, uint32_t claimer, uint32_t msr, uint64_t value)
{
	struct answer answer = vm_exit(vp, claimer, VMBUS_EMU_EXIT_OPERATION_WRMSR, msr, value);

	if (answer.fault)
		die("WRMSR 0x%x 0x%llx: fault %u", msr, (unsigned long long)value, answer.fault);
}

uint16_t hypercall(struct vp *vp, uint32_t claimer, uint64_t control, uint64_t input)
{
	struct answer answer = vm_exit(vp, claimer, VMBUS_EMU_EXIT_OPERATION_HYPERCALL, control, input);

	if (answer.fault)
		die("hypercall 0x%llx: fault %u", (unsigned long long)control, answer.fault);
	return (uint16_t)answer.result[0];
}

/* -- section 5: the signal doorbell ---------------------------------------------------------------------- */

void ring_doorbell(struct machine *machine, uint32_t connection_id)
{
	struct vmbus_emu_doorbells *doorbells = machine->doorbells;
	unsigned word = connection_id / 64;

	if (connection_id >= VMBUS_EMU_CONNECTIONS)
		die("connection 0x%x has no doorbell", connection_id);
	/* The bit, then its summary bit: the host takes them in the other order. */
	atomic_fetch_or(&doorbells->connection[word], UINT64_C(1) << (connection_id % 64));
	atomic_fetch_or(&doorbells->connection_summary[word / 64], UINT64_C(1) << (word % 64));
	atomic_fetch_add_explicit(&machine->doorbell_rings, 1, memory_order_relaxed);
	wake_host(machine);
}

/* -- section 6: interrupts --------------------------------------------------------------------------------- */

void request_interrupt(struct vp *vp, unsigned vector)
{
	uint64_t bit = UINT64_C(1) << (vector % 64);
	uint32_t halted = VMBUS_EMU_RUN_STATE_HALTED;

	/* The or is a full barrier before the run state is read; whoever set the bit before us owes the kick. */
	if (atomic_fetch_or(&vp->page->request[vector / 64], bit) & bit)
		return;
	if (atomic_load(&vp->page->run_state) == halted &&
	    atomic_compare_exchange_strong(&vp->page->run_state, &halted, VMBUS_EMU_RUN_STATE_AWAKE))
		sem_post(vp->wakeup);
}

/* The highest vector whose bit is set, or 0. */
static unsigned highest(_Atomic uint64_t *words)
{
	for (int word = 3; word >= 0; word--) {
		uint64_t bits = atomic_load(&words[word]);
		if (bits)
			return (unsigned)(64 * word + 63 - __builtin_clzll(bits));
	}
	return 0;
}

static unsigned deliverable(struct vp *vp)
{
	unsigned vector = highest(vp->page->request);

	return vector >> 4 > highest(vp->page->in_service) >> 4 ? vector : 0;
}

unsigned take_interrupt(struct vp *vp, bool *needs_eoi)
{
	unsigned vector = deliverable(vp);
	uint64_t bit = UINT64_C(1) << (vector % 64);

	if (!vector)
		return 0;
	/* Cleared before the handler looks at any page: what comes later sets the bit anew. */
	atomic_fetch_and(&vp->page->request[vector / 64], ~bit);
	*needs_eoi = !(atomic_load(&vp->page->auto_eoi[vector / 64]) & bit);
	if (*needs_eoi)
		atomic_fetch_or(&vp->page->in_service[vector / 64], bit);
	atomic_fetch_add_explicit(&vp->interrupts, 1, memory_order_relaxed);
	return vector;
}

void end_of_interrupt(struct vp *vp)
{
	unsigned vector = highest(vp->page->in_service);

	if (vector)
		atomic_fetch_and(&vp->page->in_service[vector / 64], ~(UINT64_C(1) << (vector % 64)));
}

void halt(struct vp *vp)
{
	uint32_t halted = VMBUS_EMU_RUN_STATE_HALTED;
	uint64_t end = now_ns() + vp->machine->poll_ns;

	while (now_ns() < end) {
		for (int look = 0; look < LOOKS_BEFORE_YIELD; look++)
			if (deliverable(vp))
				return;
		sched_yield();
	}
	/* Announce, then look; the store and the loads behind it are sequentially consistent. */
	atomic_store(&vp->page->run_state, VMBUS_EMU_RUN_STATE_HALTED);
	if (deliverable(vp) &&
	    atomic_compare_exchange_strong(&vp->page->run_state, &halted, VMBUS_EMU_RUN_STATE_AWAKE))
		return; /* taken back: no token comes */
	atomic_fetch_add_explicit(&vp->halts, 1, memory_order_relaxed);
	if (block(vp->wakeup)) {
		/* A dead guest's token may have come instead of ours: then nobody has taken HALTED away. */
		halted = VMBUS_EMU_RUN_STATE_HALTED;
		atomic_compare_exchange_strong(&vp->page->run_state, &halted, VMBUS_EMU_RUN_STATE_AWAKE);
		return;
	}
	halted = VMBUS_EMU_RUN_STATE_HALTED;
	if (!atomic_compare_exchange_strong(&vp->page->run_state, &halted, VMBUS_EMU_RUN_STATE_AWAKE))
		block(vp->wakeup); /* taken away from us at the last moment: its token comes */
}
