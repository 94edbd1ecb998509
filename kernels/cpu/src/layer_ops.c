/* The exported layer operations: choose the instruction set, share the rows among the threads. */
#include "layer_ops.h"

#include <stdlib.h>
#include <string.h>

#include "amx.h"
#include "threads.h"

/* A task takes at least this many elements: waking a thread costs as much as computing several thousand. */
#define TASK_ELEMENTS 32768
/* A product is split in at most this many tasks a thread: threads that begin late take fewer. */
#define TASKS_PER_THREAD 4

typedef struct {
    void *memory;
    size_t size;
} scratch;

struct layer_context {
    const layer_op_set *ops;
    thread_team *team;
    int32_t num_threads;
    scratch scratch[SCRATCH_USES]; /* kept between calls */
};

typedef struct {
    const layer_op_set *ops;
    const norm_call *norm; /* one of the four */
    const heads_call *heads;
    const gate_call *gate;
    const product_call *product;
    int64_t count, part; /* rows, of a product panels: all, and those of a task */
} shared_work;

static const layer_op_set *choose_ops(void) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    const char *wanted = getenv("INFINITE_LLM_CPU_ISA"); /* for tests: a lower set than the processor's best */
    int baseline = wanted && !strcmp(wanted, "baseline"), avx2 = wanted && !strcmp(wanted, "avx2");
    int avx512 = wanted && !strcmp(wanted, "avx512"), pairs = wanted && !strcmp(wanted, "avx512-bf16");
    __builtin_cpu_init();
#if KNOWS_AMX
    if (!baseline && !avx2 && !avx512 && !pairs && amx_allowed()) return &amx_layer_ops;
#endif
    if (!baseline && !avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return !avx512 && __builtin_cpu_supports("avx512bf16") ? &avx512_bf16_layer_ops : &avx512_layer_ops;
    if (!baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return &avx2_layer_ops;
#endif
    return &baseline_layer_ops;
}

layer_context *layer_ops_open(int32_t num_threads) {
    layer_context *context = calloc(1, sizeof(layer_context));
    if (!context) return NULL;
    context->ops = choose_ops();
    context->num_threads = num_threads;
    context->team = team_open(num_threads);
    if (!context->team) {
        free(context);
        return NULL;
    }
    return context;
}

void layer_ops_close(layer_context *context) {
    team_close(context->team);
    for (int use = 0; use < SCRATCH_USES; use++) free(context->scratch[use].memory);
    free(context);
}

int32_t layer_ops_columns(const layer_context *context, int32_t dtype) {
    return context->ops->products[dtype].columns;
}

static void run_part(const shared_work *work, int64_t first, int64_t end) {
    if (work->norm) work->ops->norm(work->norm, first, end);
    else if (work->heads) work->ops->heads(work->heads, first, end);
    else if (work->gate) work->ops->gate(work->gate, first, end);
    else work->ops->products[work->product->dtype].run(work->product, first, end);
}

static void run_task(void *argument, int64_t task, int32_t worker) {
    const shared_work *work = argument;
    int64_t first = task * work->part, end = first + work->part;
    (void)worker;
    run_part(work, first, end < work->count ? end : work->count);
}

/* Parts are of at least `smallest`, and there are at most `tasks` of them. */
static void share(const layer_context *context, shared_work *work, int64_t smallest, int64_t tasks) {
    int64_t even = (work->count + tasks - 1) / tasks;
    work->ops = context->ops;
    work->part = even > smallest ? even : smallest;
    if (work->part >= work->count) run_part(work, 0, work->count);
    else team_run(context->team, run_task, work, (work->count + work->part - 1) / work->part);
}

static void share_rows(const layer_context *context, shared_work *work, int64_t row_elements) {
    share(context, work, (TASK_ELEMENTS + row_elements - 1) / row_elements, context->num_threads);
}

void layer_ops_norm(const layer_context *context, const norm_call *call) {
    shared_work work = {.norm = call, .count = call->rows};
    share_rows(context, &work, call->dim);
}

void layer_ops_heads(const layer_context *context, const heads_call *call) {
    shared_work work = {.heads = call, .count = call->rows};
    share_rows(context, &work, (int64_t)call->heads * call->head_dim);
}

void layer_ops_gate(const layer_context *context, const gate_call *call) {
    shared_work work = {.gate = call, .count = call->rows};
    share_rows(context, &work, call->dim);
}

void *layer_ops_scratch(layer_context *context, enum scratch_use use, size_t size) {
    scratch *scratch = &context->scratch[use];
    if (size > scratch->size || !scratch->memory) { /* also for no bytes */
        free(scratch->memory);
        scratch->size = (size / 4096 + 1) * 4096;
        scratch->memory = aligned_alloc(64, scratch->size);
        if (!scratch->memory) scratch->size = 0;
    }
    return scratch->memory;
}

int32_t layer_ops_product(layer_context *context, const product_call *call) {
    const products *products = &context->ops->products[call->dtype];
    const int64_t columns = products->columns;
    product_call product = *call;
    if (products->arrange) {
        void *rows = layer_ops_scratch(context, FOR_PRODUCT, products->rows_bytes(call));
        if (!rows) return STATUS_NO_MEMORY;
        products->arrange(call, rows);
        product.x = rows;
    }
    shared_work work = {.product = &product, .count = (call->columns + columns - 1) / columns};
    int64_t tasks = context->num_threads > 1 ? context->num_threads * TASKS_PER_THREAD : 1;
    share(context, &work, (TASK_ELEMENTS + columns * call->in - 1) / (columns * call->in), tasks);
    return STATUS_OK;
}

int32_t layer_ops_unpack(const layer_context *context, const unpack_call *call) {
    const int64_t columns = context->ops->products[call->dtype].columns;
    const int64_t words = call->dtype == FLOAT32 ? call->in : call->in / 2;
    uint32_t *out = call->out;
    for (int64_t row = 0; row < call->rows; row++, out += words) {
        const int64_t index = call->indices[row];
        if (index < 0 || index >= call->columns) return STATUS_BAD_INDEX;
        /* Each word lies in a cache line of its own; as none waits for another, many are read at the same time. */
        const uint32_t *from = (const uint32_t *)call->weight + index / columns * columns * words + index % columns;
        for (int64_t word = 0; word < words; word++) out[word] = from[word * columns];
    }
    return STATUS_OK;
}

void choose_tokens(const choice_call *call) { choose_ops()->choose(call, 0, call->rows); }
