/*
 * Time a ring of the same format as ours between two cores, in C and without the checks: the limit of this machine.
 *
 * Usage: ring_limit PACKETS PAYLOAD_BYTES RING_BYTES BATCH SENDER_CPU RECEIVER_CPU
 * Prints the nanoseconds from the first send to the last receive. Each side keeps its own index and the last one it
 * saw of the other's; the sender publishes once for each BATCH packets, the receiver releases after an eighth of the
 * ring. Descriptor, payload, padding and trailer are written and copied out as the format says.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "two_cores.h"

enum { MOST_PAYLOAD = 1 << 19, PAGE = 4096 };

struct control {
	_Atomic uint32_t write_index;
	_Atomic uint32_t read_index;
};

static unsigned char packet[MOST_PAYLOAD + 64];

static void send_all(struct control *control, unsigned char *data, uint32_t size, long packets, uint32_t payload,
		     long batch)
{
	uint32_t body = 16 + ((payload + 7) & ~7u), step = body + 8, write = 0, read = 0;
	long unpublished = 0;

	while (packets > 0) {
		uint32_t room = read > write ? read - write : size - write + read;
		uint64_t words[2];

		if (room <= step) {
			if (unpublished) {
				atomic_store_explicit(&control->write_index, write, memory_order_release);
				unpublished = 0;
			}
			read = atomic_load_explicit(&control->read_index, memory_order_acquire);
			continue;
		}
		words[0] = 6 | 2 << 16 | (uint64_t)(body / 8) << 32;
		words[1] = 0;
		memcpy(data + write, words, 16);
		memcpy(data + write + 16, packet, payload);
		memset(data + write + 16 + payload, 0, body - 16 - payload);
		words[0] = (uint64_t)write << 32;
		memcpy(data + write + body, words, 8);
		write += step;
		if (write >= size)
			write -= size;
		packets--;
		if (++unpublished >= batch || packets == 0) {
			atomic_store_explicit(&control->write_index, write, memory_order_release);
			unpublished = 0;
		}
	}
}

static void receive_all(struct control *control, unsigned char *data, uint32_t size, long packets)
{
	uint32_t write = 0, read = 0, released = 0;

	while (packets > 0) {
		uint64_t word;
		uint32_t body, offset;

		if (read == write) {
			if (released != read) {
				atomic_store_explicit(&control->read_index, read, memory_order_release);
				released = read;
			}
			write = atomic_load_explicit(&control->write_index, memory_order_acquire);
			continue;
		}
		memcpy(&word, data + read, 8);
		offset = 8 * (word >> 16 & 0xffff);
		body = 8 * (word >> 32 & 0xffff);
		if (offset < 16 || body < offset || body > MOST_PAYLOAD)
			_exit(1);
		memcpy(packet, data + read + offset, body - offset);
		/* The copy is the work that is measured. */
		__asm__ volatile("" : : "r"(packet) : "memory");
		read += body + 8;
		if (read >= size)
			read -= size;
		packets--;
		if ((read - released + size) % size >= size / 8) {
			atomic_store_explicit(&control->read_index, read, memory_order_release);
			released = read;
		}
	}
}

int main(int argc, char **argv)
{
	struct { atomic_int ready; _Alignas(64) int64_t end_ns; } *shared;
	uint32_t payload, size;
	unsigned char *ring;
	int64_t start_ns;
	pid_t child;
	long packets, batch;
	int status, fd;

	if (argc != 7) {
		fprintf(stderr, "usage: ring_limit PACKETS PAYLOAD_BYTES RING_BYTES BATCH SENDER_CPU RECEIVER_CPU\n");
		return 2;
	}
	packets = atol(argv[1]);
	payload = (uint32_t)atoi(argv[2]);
	size = (uint32_t)atoi(argv[3]) - PAGE;
	batch = atol(argv[4]);
	if (packets < 1 || payload > MOST_PAYLOAD || size < PAGE || size % PAGE || batch < 1 || payload + 32 > size) {
		fprintf(stderr, "ring_limit: a ring of pages that takes the payload, at least one packet\n");
		return 2;
	}
	/* The data twice in a row, so that a packet that wraps is one piece, as in ours. */
	fd = memfd_create("ring_limit", 0);
	if (fd < 0 || ftruncate(fd, PAGE + size))
		die("memfd_create");
	ring = mmap(NULL, PAGE + 2 * (size_t)size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (ring == MAP_FAILED || shared == MAP_FAILED ||
	    mmap(ring, PAGE + size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED ||
	    mmap(ring + PAGE + size, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, PAGE) == MAP_FAILED)
		die("mmap");
	memset(ring, 0, PAGE + size);
	memset(packet, 'x', sizeof(packet));
	child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pin(atoi(argv[6]));
		atomic_store(&shared->ready, 1);
		receive_all((struct control *)ring, ring + PAGE, size, packets);
		shared->end_ns = now_ns();
		_exit(0);
	}
	pin(atoi(argv[5]));
	while (!atomic_load(&shared->ready))
		if (waitpid(child, &status, WNOHANG))
			return 1;
	start_ns = now_ns();
	send_all((struct control *)ring, ring + PAGE, size, packets, payload, batch);
	if (waitpid(child, &status, 0) != child || status != 0)
		return 1;
	printf("%lld\n", (long long)(shared->end_ns - start_ns));
	return 0;
}
