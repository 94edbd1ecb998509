/* Waiting without sleep for what another process writes: looks in between glances at the clock. */
#ifndef INFINITE_LLM_AWAKE_H
#define INFINITE_LLM_AWAKE_H

#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <time.h>

#include "abi.h"

/* Looks between two glances at the clock: about a microsecond. */
#define LOOKS 32
/* Between two offers of the core to whoever wants it, and glances at a descriptor. */
#define OFFER_NS 10000
/* Between two glances at the clock if nobody else has had the core meanwhile. */
#define ALONE_NS 50000

/* now: at the last glance; offered: the core, last; until: the wait is over. */
typedef struct {
    int64_t now, offered, until;
} awake;

static inline int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static inline awake stay_awake(int64_t for_ns) {
    const int64_t now = now_ns();
    return (awake){now, now, now + for_ns};
}

/* Leaves a core's units to its other thread for a moment. */
static inline void pause_core(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

/* Between looks: whether the wait has ended, and why; fd may be -1. */
static inline int glance(awake *a, int32_t fd, int32_t *ending) {
    if (a->now - a->offered >= OFFER_NS) {
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        if (fd >= 0 && poll(&ready, 1, 0) > 0) {
            *ending = WATCH_READY;
            return 1;
        }
        sched_yield();
        a->offered = a->now;
    }
    const int64_t then = a->now;
    a->now = now_ns();
    *ending = a->now - then > ALONE_NS ? WATCH_CONTENDED : WATCH_TIMEOUT;
    return *ending == WATCH_CONTENDED || a->now >= a->until;
}

#endif
