/* SPDX-License-Identifier: MIT */
/*
 * A vmbus-emu machine as a guest sees it: its segments, its exits, its doorbell, its interrupts.
 *
 * Written from docs/abi.md; the section numbers in the comments are that page's. Whatever goes wrong ends the
 * process through die(): this guest is a proof, and a proof has no plan B.
 */
#ifndef MACHINE_H
#define MACHINE_H

#include <semaphore.h>
#include <stdbool.h>
#include <stdint.h>

#include "vmbus_emu.h"

#define DEADLINE_NS UINT64_C(30000000000) /* for whatever this guest waits for; a loaded machine is slow */

struct vp {
	struct machine *machine;
	struct vmbus_emu_vp_page *page;
	unsigned position;
	sem_t *wakeup;
	sem_t *exit_wakeup[VMBUS_EMU_EXIT_SLOTS];
	_Atomic uint64_t interrupts;
	_Atomic uint64_t halts;
};

struct machine {
	const char *name;
	uint64_t poll_ns; /* how long to look before blocking, in an exit and in a halt */
	int ram_fd;
	uint8_t *ram;
	uint64_t ram_bytes;
	struct vmbus_emu_machine_page *page;
	struct vmbus_emu_doorbells *doorbells;
	sem_t *host;
	unsigned vp_count;
	struct vp *vp; /* by position */
	_Atomic bool leaving; /* from UNLOAD on: that the machine stops is no surprise any more */
	_Atomic uint64_t exits;
	_Atomic uint64_t sleeping_exits; /* those that had to block */
	_Atomic uint64_t doorbell_rings;
};

struct answer {
	uint32_t fault;
	uint64_t result[2];
};

_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));
uint64_t now_ns(void);
void pause_ns(uint64_t nanoseconds);

/* Section 2: open and map everything, wait for RUNNING. ATTACH is the caller's. */
void machine_open(struct machine *machine, const char *name, uint64_t poll_ns);
bool machine_stopping(struct machine *machine);
/* Section 2: have pages behind this part of RAM, so that a touch cannot be SIGBUS. */
void machine_reserve(struct machine *machine, uint64_t gpa, uint64_t bytes);

/* Section 3: one exit of this VP, by any thread. `claimer` is any number but 0. */
struct answer vm_exit(struct vp *vp, uint32_t claimer, uint32_t operation, uint64_t a0, uint64_t a1);
/* The same for operations that must not fault. */
uint64_t rdmsr(struct vp *vp, uint32_t claimer, uint32_t msr);
void wrmsr(struct vp *vp, uint32_t claimer, uint32_t msr, uint64_t value);
uint16_t hypercall(struct vp *vp, uint32_t claimer, uint64_t control, uint64_t input);

/* Section 5. */
void ring_doorbell(struct machine *machine, uint32_t connection_id);

/* Section 6. Requests come from any thread; take, eoi and halt belong to the VP's taker. */
void request_interrupt(struct vp *vp, unsigned vector);
unsigned take_interrupt(struct vp *vp, bool *needs_eoi);
void end_of_interrupt(struct vp *vp);
void halt(struct vp *vp);

#endif
