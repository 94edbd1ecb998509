/* Waiting for shared memory without sleep: what another process writes there is seen within a microsecond, where to be
 * woken takes tens of them. */
#include <poll.h>
#include <sched.h>
#include <time.h>

#include "abi.h"

/* Looks between two glances at the clock: about a microsecond. */
#define LOOKS 32
/* Between two glances at the descriptor and offers of the core to whoever wants it. */
#define OFFER_NS 10000
/* Between two glances at the clock if nobody else has had the core meanwhile. */
#define ALONE_NS 50000

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Leaves a core's units to its other thread for a moment. */
static void pause_core(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

int32_t watch_counters(const watch_call *call) {
    int64_t now = now_ns(), offered = now;
    const int64_t until = now + call->spin_ns;
    for (;;) {
        for (int look = 0; look < LOOKS; look++) {
            for (int32_t i = 0; i < call->count; i++)
                if (__atomic_load_n(call->counters[i], __ATOMIC_ACQUIRE) != call->seen[i]) return WATCH_CHANGED;
            pause_core();
        }
        if (now - offered >= OFFER_NS) {
            struct pollfd ready = {.fd = call->fd, .events = POLLIN};
            if (poll(&ready, 1, 0) > 0) return WATCH_READY;
            sched_yield();
            offered = now;
        }
        const int64_t then = now;
        now = now_ns();
        if (now - then > ALONE_NS) return WATCH_CONTENDED;
        if (now >= until) return WATCH_TIMEOUT;
    }
}
