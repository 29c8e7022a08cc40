/*
 * What a blocking hand-off costs: two processes on two cores wake each other by process-shared semaphores, in turn.
 *
 * Usage: sem_pair ROUND_TRIPS CPU CPU
 * Prints the percentiles 50, 90 and 99 and the longest round trip, in nanoseconds. Each side sleeps in sem_wait until
 * the other posts, so a round trip is two wake-ups of a halted core.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "two_cores.h"

enum { WARM_UP = 200, MOST_ROUND_TRIPS = 10 * 1000 * 1000 };

struct pair {
	sem_t there;
	char apart[128];
	sem_t back;
};

static void take(sem_t *sem)
{
	while (sem_wait(sem))
		;
}

static int by_size(const void *a, const void *b)
{
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

	return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
	long count = argc == 4 ? atol(argv[1]) : 0;
	struct pair *pair;
	int64_t *took;
	pid_t other;
	int status;

	if (count < 1 || count > MOST_ROUND_TRIPS) {
		fprintf(stderr, "usage: sem_pair ROUND_TRIPS CPU CPU\n");
		return 2;
	}
	pair = mmap(NULL, sizeof(*pair), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	took = malloc(count * sizeof(*took));
	if (pair == MAP_FAILED || !took)
		die("memory");
	if (sem_init(&pair->there, 1, 0) || sem_init(&pair->back, 1, 0))
		die("sem_init");
	other = fork();
	if (other < 0)
		die("fork");
	if (!other) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pin(atoi(argv[3]));
		for (long i = 0; i < count + WARM_UP; i++) {
			take(&pair->there);
			sem_post(&pair->back);
		}
		_exit(0);
	}
	pin(atoi(argv[2]));
	for (long i = -WARM_UP; i < count; i++) {
		int64_t began = now_ns();

		sem_post(&pair->there);
		take(&pair->back);
		if (i >= 0)
			took[i] = now_ns() - began;
	}
	if (waitpid(other, &status, 0) != other || status)
		return 1;
	qsort(took, count, sizeof(*took), by_size);
	printf("%lld %lld %lld %lld\n", (long long)took[count / 2], (long long)took[count * 9 / 10],
	       (long long)took[count * 99 / 100], (long long)took[count - 1]);
	return 0;
}
