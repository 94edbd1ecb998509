/* The plain C interface of the CPU kernels; kernels/cpu/library.py mirrors it with ctypes.
 *
 * Layouts (elements, last dimension contiguous):
 *   pool       [num_blocks, layers, kv_heads, 2, block_tokens, head_dim]   K is index 0, V index 1
 *   q          [rows, q_heads, head_dim], rows q_stride apart
 *   out, lse   [rows, q_heads, head_dim], [rows, q_heads]
 */
#ifndef INFINITE_LLM_ABI_H
#define INFINITE_LLM_ABI_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

enum status {
    STATUS_OK = 0,
    STATUS_NO_MEMORY = 1,
    STATUS_BAD_ROWS = 2,   /* query_start does not ascend inside the rows */
    STATUS_BAD_BLOCKS = 3, /* block_start does not ascend inside the block list */
    STATUS_BAD_BLOCK_ID = 4,
    STATUS_BAD_INDEX = 5, /* a slot or a row index outside its tensor */
};

/* A pool of blocks, and one layer of it. Strides are in elements; a block's layer is contiguous. */
typedef struct {
    void *data;
    int64_t num_blocks, block_stride, layer_offset;
    int32_t kv_heads, block_tokens, head_dim, dtype;
} pool_view;

/* One call of micro-attention: kernels/interface.py says what the fields mean. */
typedef struct {
    pool_view pool;
    const void *q; /* in the pool's dtype */
    int64_t q_stride;
    void *out;
    float *lse;
    const int32_t *query_start, *query_pos, *block_start, *block_ids, *block_pos;
    int64_t rows, num_listed_blocks;
    int32_t segments, q_heads, window, out_dtype;
    float scale, softcap;
} attention_call;

/* Merges part [n, heads, head_dim] into (out, lse); rows may be NULL. */
typedef struct {
    float *out, *lse;
    const void *part_out;
    const float *part_lse;
    const int64_t *rows;
    int64_t out_rows, count;
    int32_t heads, head_dim, part_dtype;
} merge_call;

/* Writes k, v [rows, kv_heads, head_dim], rows k_stride and v_stride apart, into the pool. */
typedef struct {
    pool_view pool;
    const void *k, *v;
    int64_t k_stride, v_stride;
    const int64_t *slots;
    int64_t rows;
    int32_t dtype; /* of k and v */
} store_call;

/* Reads runs of run_bytes, at data + ids[i] * stride_bytes: the yardstick of benchmarks. */
typedef struct {
    const char *data;
    const int32_t *ids;
    int64_t count, stride_bytes, run_bytes;
} read_call;

typedef struct kernel_context kernel_context;

/* One end of a byte ring in shared memory (services/dataplane/shm_ring.py, ring.h). The reader's: what is published as
 * far as seen, what is released, what is read. The writer's: what is published, what is released as far as seen, and
 * the sleep that a doorbell has been rung for. */
typedef struct {
    uint64_t *counters;
    char *data;
    uint64_t capacity, head, tail, at;
} ring_view;

/* One end of a stream of frames (services/dataplane/tcp_frames.py, stream.h). What has been received lies in `in`, from
 * `at` up to `filled`; `out` has room for one frame, of which `unsent` bytes from `unsent_at` on have not gone out. The
 * counts are of charges since the connection began. */
typedef struct {
    char *in, *out;
    uint64_t capacity, at, filled;
    uint64_t freed, reported; /* here; as last told to the peer */
    uint64_t sent, freed_by_peer, most_outstanding;
    uint64_t unsent_at, unsent;
} stream_view;

/* An emulated link, as services/dataplane/link.py describes it; times are seconds of the monotonic clock. */
typedef struct {
    double bytes_per_s, latency_s;
    double free_at; /* when the last message that has been taken had left the sender */
} emulated_link;

/* One end of a connection (channel.h): a stream, or two rings and a socket for doorbells; over an emulated link if there
 * is one. */
typedef struct {
    ring_view in, out;
    stream_view stream;
    emulated_link *link;
    double left_at; /* the sender: the message that has been peeked at */
    uint64_t max_message; /* with its stamp, over an emulated link */
    int32_t fd, is_stream;
} channel;

/* The queries of one plan that compiled code may answer, and what it has done (answering.c). */
typedef struct {
    channel channel;
    kernel_context *kernels;
    attention_call attention; /* what a query brings is filled in for each */
    uint64_t step;
    int64_t layers, layer_stride;
    const uint64_t *ended; /* counts sessions that have ended; another value than before: no more answers */
    uint64_t ended_before;
    int64_t answered, computed_ns, received_bytes, sent_bytes;
    int64_t answered_at_ns; /* the last one, of the monotonic clock */
} answering;

/* What several layers have asked of a daemon. */
typedef struct {
    int64_t asks, answers, lates;         /* lates: answers that were waited for */
    int64_t sent_bytes, received_bytes;
    int64_t answers_ns, merges_ns;        /* from sending each query until its answer was taken; merging them */
    int64_t waits_ns;                     /* waiting for answers */
    uint64_t answered;                    /* sequence of the last answer */
} asking_sums;

/* One daemon's part of a step, and what one layer asks of it (asking.c). */
typedef struct {
    channel channel;
    const kernel_context *kernels;
    const int64_t *rows; /* of the batch, [count]; NULL: all of them */
    int64_t count, batch_rows;
    uint64_t step;
    int32_t q_heads, head_dim, dtype, out_dtype;
    int32_t layer, unused; /* the fields from here on, and those of the heads, are a layer's */
    uint64_t sequence;
    const void *q; /* [batch_rows, q_heads, head_dim] in dtype */
    uint64_t q_stride_bytes;
    float *out, *lse; /* what answers are merged into, [batch_rows, q_heads, head_dim] and [batch_rows, q_heads] */
    int64_t spin_ns;
    float scale, softcap;
    int32_t window, late;           /* late: the answer had not come when it was looked for */
    int64_t taken_at_ns, merged_ns; /* of the monotonic clock; how long the merge took */
    int64_t query_bytes, answer_bytes;
    /* Where layers ask one after the other (layer_ops_stack); sequence is that of the last query then. */
    int64_t distance; /* from any row back to the nearest key there, at least */
    int64_t sent_at_ns;
    asking_sums sums;
    int32_t ending, unused_too; /* of the last wait: enum watched */
} asking;

/* Connections to look at: of rings the counters that others write to, and what each was when it was read last; of
 * streams what is to be answered; and a descriptor. */
typedef struct {
    const uint64_t *const *counters; /* NULL: of a stream */
    uint64_t *seen;
    answering *const *answering; /* of that connection, or NULL */
    int64_t spin_ns;
    int32_t count, fd;
} watch_call;

/* A context has scratch memory of its own and serves one caller at a time; its threads are the process's. NULL: no memory
 * or no threads. */
EXPORT kernel_context *kernels_open(int32_t num_threads);
EXPORT void kernels_close(kernel_context *context);
/* "avx512-amx", "avx512-bf16", "avx512", "avx2", "neon-bf16" or "baseline": the processor's best; or what
 * INFINITE_LLM_CPU_ISA names, and baseline if the processor does not have that. */
EXPORT const char *kernels_isa(const kernel_context *context);

EXPORT int32_t kernels_micro_attention(kernel_context *context, const attention_call *call);
EXPORT int32_t kernels_merge_partials(const kernel_context *context, const merge_call *call);
EXPORT int32_t kernels_store_kv(const kernel_context *context, const store_call *call);
/* Answers a sum of what was read, shared over the threads. */
EXPORT uint32_t kernels_read(kernel_context *context, const read_call *call);

enum watched {
    WATCH_TIMEOUT = 0,
    WATCH_CHANGED = 1,   /* something has come that is left to the caller */
    WATCH_READY = 2,     /* the descriptor is readable */
    WATCH_CONTENDED = 3, /* somebody else runs on this core, and may be whom we wait for */
    WATCH_TAKEN = 4,     /* the answer, by take_answer */
};

/* Looks at the connections for up to spin_ns after the last query that it has answered; it offers the core to others now
 * and then. */
EXPORT int32_t watch_connections(const watch_call *call);

/* Sends a layer's query; 0: it does not fit the connection or the batch, and nothing has been sent. */
EXPORT int32_t ask(asking *asking);
/* Merges its answer, for which it stays awake for spin_ns. WATCH_CHANGED: something else has come. */
EXPORT int32_t take_answer(asking *asking);

#endif
