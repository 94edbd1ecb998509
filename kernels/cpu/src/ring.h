/* A byte ring in shared memory, as services/dataplane/shm_ring.py describes it: the same layout, order and distrust.
 * What the other side writes is copied once and checked before use. */
#ifndef INFINITE_LLM_RING_H
#define INFINITE_LLM_RING_H

#include <stdint.h>
#include <string.h>

#include "abi.h"

#define RING_HEAD 0
#define RING_TAIL 16
#define RING_ASLEEP 32
#define RING_WRAP UINT64_MAX
#define RING_LINE 64

enum ring_state { RING_EMPTY, RING_MESSAGE, RING_BROKEN };

/* A message that lies in the ring; end is the counter value that releases it. */
typedef struct {
    const char *data;
    uint64_t size, end;
} ring_message;

static inline uint64_t ring_record(uint64_t size) { return (size + 8 + RING_LINE - 1) & -(uint64_t)RING_LINE; }

static inline uint64_t ring_length(const ring_view *ring, uint64_t offset) {
    return __atomic_load_n((const uint64_t *)(ring->data + offset), __ATOMIC_RELAXED);
}

/* The message at ring->at, which stays there until ring_release. */
static inline enum ring_state ring_peek(ring_view *ring, uint64_t max_message, ring_message *message) {
    uint64_t at = ring->at;
    if (at == ring->head) {
        const uint64_t head = __atomic_load_n(&ring->counters[RING_HEAD], __ATOMIC_ACQUIRE);
        if (head == at) return RING_EMPTY;
        if (head < at || head > ring->tail + ring->capacity || head % RING_LINE) return RING_BROKEN;
        ring->head = head;
    }
    uint64_t offset = at % ring->capacity, size = ring_length(ring, offset);
    if (size == RING_WRAP && offset) {
        at += ring->capacity - offset;
        offset = 0;
        if (at >= ring->head) return RING_BROKEN;
        size = ring_length(ring, 0);
    }
    if (size > max_message) return RING_BROKEN;
    const uint64_t end = at + ring_record(size);
    if (end > ring->head || offset + (end - at) > ring->capacity) return RING_BROKEN;
    *message = (ring_message){ring->data + offset + 8, size, end};
    return RING_MESSAGE;
}

/* Gives the room of a message back, and that of all before it. */
static inline void ring_release(ring_view *ring, uint64_t end) {
    ring->at = ring->tail = end;
    __atomic_store_n(&ring->counters[RING_TAIL], ring->tail, __ATOMIC_RELEASE);
}

/* Room for a message that is to be written, or NULL: there is none, or the reader's counter is impossible. */
static inline char *ring_reserve(ring_view *ring, uint64_t size, uint64_t *end) {
    const uint64_t record = ring_record(size), offset = ring->head % ring->capacity, rest = ring->capacity - offset;
    *end = ring->head + (record <= rest ? record : rest + record);
    if (*end - ring->tail > ring->capacity) {
        const uint64_t tail = __atomic_load_n(&ring->counters[RING_TAIL], __ATOMIC_ACQUIRE);
        if (tail < ring->tail || tail > ring->head || *end - tail > ring->capacity) return NULL;
        ring->tail = tail;
    }
    return ring->data + (record <= rest ? offset : 0) + 8;
}

/* Publishes what ring_reserve gave room for. Answers whether the reader sleeps and needs a doorbell. */
static inline int ring_publish(ring_view *ring, char *message, uint64_t size, uint64_t end) {
    const uint64_t offset = ring->head % ring->capacity;
    if (message != ring->data + offset + 8)
        __atomic_store_n((uint64_t *)(ring->data + offset), RING_WRAP, __ATOMIC_RELAXED);
    __atomic_store_n((uint64_t *)(message - 8), size, __ATOMIC_RELAXED);
    ring->head = end;
    __atomic_store_n(&ring->counters[RING_HEAD], end, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    const uint64_t asleep = __atomic_load_n(&ring->counters[RING_ASLEEP], __ATOMIC_RELAXED);
    if (!(asleep & 1) || asleep == ring->at) return 0;
    ring->at = asleep;
    return 1;
}

#endif
