/* The exported functions: check what would reach outside the tensors, choose the instruction set, share the work. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "abi.h"
#include "amx.h"
#include "kernel_set.h"
#include "threads.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

/* A decode segment is split over the threads in parts of at least this many blocks. */
#define MIN_PART_BLOCKS 8
#define PARTS_PER_THREAD 4

struct kernel_context {
    const kernel_set *kernels;
    thread_team *team;
    int32_t num_threads;
    void *memory; /* scratch of the call in progress; kept between calls */
    size_t size;
};

/* One call's work: every task is either a prefill task or a part of a decode segment. */
typedef struct {
    const attention_call *call;
    const kernel_set *kernels;
    prefill_task *prefill;
    decode_task *decode;
    int64_t num_prefill, num_decode;
    decode_queue queue;
    char *worker_memory, *part_memory; /* [num_threads][worker_bytes], [num_decode][part_bytes] */
    size_t worker_bytes, part_bytes;
} work;

/* Whether a set may be chosen: any if none is wanted. */
static int allowed(const char *name, const char *wanted) { return !wanted || !*wanted || !strcmp(name, wanted); }

static const kernel_set *choose_kernels(void) {
    const char *wanted = getenv("INFINITE_LLM_CPU_ISA"); /* for tests: another set than the processor's best */
    (void)wanted, (void)allowed;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    int bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if KNOWS_AMX
    if (bf16 && allowed("avx512-amx", wanted) && amx_allowed()) return &avx512_amx_kernels;
#endif
    if (bf16 && allowed("avx512-bf16", wanted)) return &avx512_bf16_kernels;
    if (avx512 && allowed("avx512", wanted)) return &avx512_kernels;
    if (avx2 && allowed("avx2", wanted)) return &avx2_kernels;
#elif defined(__aarch64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
    if (getauxval(AT_HWCAP2) & HWCAP2_BF16 && allowed("neon-bf16", wanted)) return &neon_bf16_kernels;
#endif
    return &baseline_kernels;
}

kernel_context *kernels_open(int32_t num_threads) {
    kernel_context *context = calloc(1, sizeof(kernel_context));
    if (!context) return NULL;
    context->kernels = choose_kernels();
    context->num_threads = num_threads;
    context->team = team_open(num_threads);
    if (!context->team) {
        free(context);
        return NULL;
    }
    return context;
}

const char *kernels_isa(const kernel_context *context) { return context->kernels->name; }

void kernels_close(kernel_context *context) {
    team_close(context->team);
    free(context->memory);
    free(context);
}

static int32_t check_call(const attention_call *call) {
    int32_t segments = call->segments;
    if (call->query_start[0] < 0 || call->query_start[segments] > call->rows) return STATUS_BAD_ROWS;
    if (call->block_start[0] < 0 || call->block_start[segments] > call->num_listed_blocks) return STATUS_BAD_BLOCKS;
    for (int32_t s = 0; s < segments; s++) {
        if (call->query_start[s] > call->query_start[s + 1]) return STATUS_BAD_ROWS;
        if (call->block_start[s] > call->block_start[s + 1]) return STATUS_BAD_BLOCKS;
    }
    for (int32_t b = call->block_start[0]; b < call->block_start[segments]; b++)
        if (call->block_ids[b] < 0 || call->block_ids[b] >= call->pool.num_blocks) return STATUS_BAD_BLOCK_ID;
    return STATUS_OK;
}

static int32_t segment_rows(const attention_call *call, int32_t segment) {
    return call->query_start[segment + 1] - call->query_start[segment];
}

/* Counts the tasks and their memory, and with write also lists them. */
static void plan_tasks(work *work, int32_t num_threads, int write) {
    const attention_call *call = work->call;
    const int32_t group = call->q_heads / call->pool.kv_heads;
    const int32_t rows_per_task = work->kernels->prefill_rows / group, tile = rows_per_task > 0 ? rows_per_task : 1;
    int64_t listed = call->block_start[call->segments] - call->block_start[0];
    int64_t part = num_threads == 1 ? INT32_MAX : listed / (num_threads * PARTS_PER_THREAD) + 1;
    if (part < MIN_PART_BLOCKS) part = MIN_PART_BLOCKS;
    work->num_prefill = work->num_decode = 0;
    work->worker_bytes = work->part_bytes = 0;
    for (int32_t s = 0; s < call->segments; s++) {
        int32_t rows = segment_rows(call, s);
        if (rows == 0) continue;
        if ((int64_t)rows * group > DECODE_ROWS) {
            size_t bytes = work->kernels->prefill_scratch(call);
            if (bytes > work->worker_bytes) work->worker_bytes = bytes;
            for (int32_t head = 0; head < call->pool.kv_heads; head++)
                for (int32_t first = 0; first < rows; first += tile, work->num_prefill++)
                    if (write)
                        work->prefill[work->num_prefill] =
                            (prefill_task){s, head, first, rows - first < tile ? rows - first : tile};
            continue;
        }
        size_t bytes = work->kernels->decode_state(call, s);
        int64_t entry = call->block_start[s], end = call->block_start[s + 1];
        /* A segment that is not split is finished by its task, in the worker's memory. */
        size_t *most = end - entry > part ? &work->part_bytes : &work->worker_bytes;
        if (bytes > *most) *most = bytes;
        do {
            int64_t stop = end - entry > part ? entry + part : end;
            if (write) work->decode[work->num_decode] = (decode_task){s, (int32_t)entry, (int32_t)stop};
            work->num_decode++;
            entry = stop;
        } while (entry < end);
    }
    work->worker_bytes = (work->worker_bytes + 63) / 64 * 64;
    work->part_bytes = (work->part_bytes + 63) / 64 * 64;
}

static int is_whole_segment(const attention_call *call, decode_task task) {
    return task.entry == call->block_start[task.segment] && task.end == call->block_start[task.segment + 1];
}

static void run_task(void *argument, int64_t task, int32_t worker) {
    const work *work = argument;
    void *memory = work->worker_memory + (size_t)worker * work->worker_bytes;
    if (task < work->num_prefill) {
        work->kernels->prefill(work->call, work->prefill[task], memory);
        return;
    }
    int64_t part = task - work->num_prefill;
    decode_task decode = work->decode[part];
    int whole = is_whole_segment(work->call, decode);
    if (!whole) memory = work->part_memory + (size_t)part * work->part_bytes;
    work->kernels->decode(work->call, decode, &work->queue, memory);
    if (whole) work->kernels->decode_write(work->call, decode.segment, memory);
}

/* Merges the parts of the split segments, in the order of the block list: results do not depend on timing. */
static void finish_parts(const work *work) {
    for (int64_t first = 0, part; first < work->num_decode; first = part) {
        int32_t segment = work->decode[first].segment;
        char *state = work->part_memory + (size_t)first * work->part_bytes;
        for (part = first + 1; part < work->num_decode && work->decode[part].segment == segment; part++)
            work->kernels->decode_merge(work->call, segment, state, state + (size_t)(part - first) * work->part_bytes);
        if (!is_whole_segment(work->call, work->decode[first])) work->kernels->decode_write(work->call, segment, state);
    }
}

/* Rows that belong to no segment see nothing. */
static void clear_rows(const attention_call *call, int64_t first, int64_t end) {
    size_t row = (size_t)call->q_heads * (size_t)call->pool.head_dim * (call->out_dtype == FLOAT32 ? 4 : 2);
    if (first < end) memset((char *)call->out + (size_t)first * row, 0, (size_t)(end - first) * row);
    for (int64_t i = first * call->q_heads; i < end * call->q_heads; i++) call->lse[i] = -INFINITY;
}

int32_t kernels_micro_attention(kernel_context *context, const attention_call *call) {
    int32_t status = check_call(call);
    if (status != STATUS_OK) return status;
    clear_rows(call, 0, call->query_start[0]);
    clear_rows(call, call->query_start[call->segments], call->rows);

    work work = {.call = call, .kernels = context->kernels};
    plan_tasks(&work, context->num_threads, 0);
    size_t workers = work.worker_bytes * (size_t)context->num_threads;
    size_t parts = work.part_bytes * (size_t)work.num_decode;
    size_t size = workers + parts + sizeof(prefill_task) * (size_t)work.num_prefill +
                  sizeof(decode_task) * (size_t)work.num_decode;
    if (size > context->size) {
        free(context->memory);
        context->size = (size + 4095) / 4096 * 4096;
        context->memory = aligned_alloc(64, context->size);
        if (!context->memory) {
            context->size = 0;
            return STATUS_NO_MEMORY;
        }
    }
    work.worker_memory = context->memory;
    work.part_memory = work.worker_memory + workers;
    work.prefill = (prefill_task *)(work.part_memory + parts);
    work.decode = (decode_task *)(work.prefill + work.num_prefill);
    plan_tasks(&work, context->num_threads, 1);
    work.queue = (decode_queue){work.decode, work.num_prefill, work.num_decode, team_next(context->team)};
    team_run(context->team, run_task, &work, work.num_prefill + work.num_decode);
    finish_parts(&work);
    return STATUS_OK;
}

int32_t kernels_merge_partials(const kernel_context *context, const merge_call *call) {
    for (int64_t i = 0; call->rows && i < call->count; i++)
        if (call->rows[i] < 0 || call->rows[i] >= call->out_rows) return STATUS_BAD_INDEX;
    context->kernels->merge(call);
    return STATUS_OK;
}

int32_t kernels_store_kv(const kernel_context *context, const store_call *call) {
    int64_t slots = call->pool.num_blocks * call->pool.block_tokens;
    for (int64_t i = 0; i < call->rows; i++)
        if (call->slots[i] < 0 || call->slots[i] >= slots) return STATUS_BAD_INDEX;
    context->kernels->store(call);
    return STATUS_OK;
}

typedef struct {
    const read_call *call;
    const kernel_set *kernels;
    int64_t runs; /* of a task */
    atomic_uint sum;
} read_work;

static void read_task(void *argument, int64_t task, int32_t worker) {
    (void)worker;
    read_work *work = argument;
    const read_call *call = work->call;
    uint32_t sum = 0;
    for (int64_t i = task * work->runs; i < call->count && i < (task + 1) * work->runs; i++)
        sum += work->kernels->read(call->data + call->ids[i] * call->stride_bytes, call->run_bytes);
    atomic_fetch_add(&work->sum, sum);
}

uint32_t kernels_read(kernel_context *context, const read_call *call) {
    read_work work = {.call = call, .kernels = context->kernels};
    work.runs = context->num_threads == 1 ? call->count : call->count / (context->num_threads * PARTS_PER_THREAD) + 1;
    team_run(context->team, read_task, &work, work.runs ? (call->count + work.runs - 1) / work.runs : 0);
    return work.sum;
}
