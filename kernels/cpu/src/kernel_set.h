/* What is compiled once per instruction set, and how much scratch memory it needs. */
#ifndef INFINITE_LLM_KERNEL_SET_H
#define INFINITE_LLM_KERNEL_SET_H

#include <stdatomic.h>
#include <stddef.h>

#include "abi.h"

/* A segment with at most this many effective rows is decoded. */
#define DECODE_ROWS 32

/* Query rows first .. first + count of a segment, all query heads of one KV head. */
typedef struct {
    int32_t segment, head, first, count;
} prefill_task;

/* All rows of a segment over entries entry .. end of the block list. */
typedef struct {
    int32_t segment, entry, end;
} decode_task;

/* The decode tasks of a call, in the order in which they are begun; next - first is the one to be begun next. */
typedef struct {
    const decode_task *tasks;
    int64_t first, count;
    const atomic_int_fast64_t *next;
} decode_queue;

typedef struct {
    const char *name;
    int32_t prefill_rows; /* effective rows (query rows times heads of a KV group) of a prefill task, about */
    size_t (*prefill_scratch)(const attention_call *call);
    void (*prefill)(const attention_call *call, prefill_task task, void *scratch);
    /* Bytes of a decode task's state; two tasks over different entries of one segment merge their states. */
    size_t (*decode_state)(const attention_call *call, int32_t segment);
    /* In the end the first keys of the queue's next task are prefetched: most likely it is this thread's. */
    void (*decode)(const attention_call *call, decode_task task, const decode_queue *queue, void *state);
    void (*decode_merge)(const attention_call *call, int32_t segment, void *state, const void *other);
    void (*decode_write)(const attention_call *call, int32_t segment, const void *state);
    void (*merge)(const merge_call *call);
    void (*store)(const store_call *call);
    uint32_t (*read)(const char *from, int64_t bytes);
} kernel_set;

extern const kernel_set baseline_kernels;
extern const kernel_set avx2_kernels, avx512_kernels, avx512_bf16_kernels, avx512_amx_kernels; /* x86-64 */
extern const kernel_set neon_bf16_kernels; /* aarch64 */

#endif
