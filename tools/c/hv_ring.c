/*
 * Time the ring of the kernel's tools/hv between two cores: one process sends packet by packet, another receives.
 *
 * Usage: hv_ring PACKETS PAYLOAD_BYTES RING_BYTES SENDER_CPU RECEIVER_CPU
 * Prints the nanoseconds from the first send to the last receive. Compiled together with vmbus_bufring.c of
 * tools/hv, which is fetched when the benchmark runs. Its sender computes a negative padding for payloads that are
 * not a multiple of 8 bytes, so those are refused here.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <emmintrin.h>
#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>
#include "two_cores.h"
#include "vmbus_bufring.h"

enum { MOST_PAYLOAD = 1 << 19 };

static unsigned char packet[MOST_PAYLOAD + 64];

static void receive_all(void *ring, unsigned int ring_bytes, long packets, atomic_int *ready)
{
	struct vmbus_br br;

	memset(packet, 0, sizeof(packet));
	vmbus_br_setup(&br, ring, ring_bytes);
	atomic_store(ready, 1);
	while (packets > 0) {
		uint32_t length = sizeof(packet);
		int result = rte_vmbus_chan_recv_raw(&br, packet, &length);

		if (result > 0)
			packets--;
		else if (result == -EAGAIN)
			_mm_pause();
		else
			_exit(1);
	}
}

static void send_all(void *ring, unsigned int ring_bytes, long packets, unsigned int payload)
{
	struct vmbus_br br;

	memset(packet, 'x', sizeof(packet));
	vmbus_br_setup(&br, ring, ring_bytes);
	while (packets > 0) {
		int result = rte_vmbus_chan_send(&br, VMBUS_CHANPKT_TYPE_INBAND, packet, payload,
						 VMBUS_CHANPKT_FLAG_NONE);

		if (result == 0)
			packets--;
		else if (result == -EAGAIN)
			_mm_pause();
		else
			_exit(1);
	}
}

int main(int argc, char **argv)
{
	struct { atomic_int ready; _Alignas(64) int64_t end_ns; } *shared;
	unsigned int payload, ring_bytes;
	int64_t start_ns;
	void *ring;
	pid_t child;
	long packets;
	int status;

	if (argc != 6) {
		fprintf(stderr, "usage: hv_ring PACKETS PAYLOAD_BYTES RING_BYTES SENDER_CPU RECEIVER_CPU\n");
		return 2;
	}
	packets = atol(argv[1]);
	payload = (unsigned int)atoi(argv[2]);
	ring_bytes = (unsigned int)atoi(argv[3]);
	if (packets < 1 || payload % 8 || payload > MOST_PAYLOAD || ring_bytes < 8192 || ring_bytes % 4096) {
		fprintf(stderr, "hv_ring: payload in multiples of 8, ring in pages, at least one packet\n");
		return 2;
	}
	ring = mmap(NULL, ring_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (ring == MAP_FAILED || shared == MAP_FAILED)
		die("mmap");
	memset(ring, 0, ring_bytes);
	child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pin(atoi(argv[5]));
		receive_all(ring, ring_bytes, packets, &shared->ready);
		shared->end_ns = now_ns();
		_exit(0);
	}
	pin(atoi(argv[4]));
	while (!atomic_load(&shared->ready))
		if (waitpid(child, &status, WNOHANG))
			return 1;
	start_ns = now_ns();
	send_all(ring, ring_bytes, packets, payload);
	if (waitpid(child, &status, 0) != child || status != 0)
		return 1;
	printf("%lld\n", (long long)(shared->end_ns - start_ns));
	return 0;
}
