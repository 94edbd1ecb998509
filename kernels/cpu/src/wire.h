/* The data plane's messages that compiled code reads and writes, as services/dataplane/wire.py describes them. */
#ifndef INFINITE_LLM_WIRE_H
#define INFINITE_LLM_WIRE_H

#include <stdint.h>

#include "abi.h"

#define WIRE_VERSION 3
#define WIRE_QUERY 2
#define WIRE_PARTIAL 3

typedef struct __attribute__((packed)) {
    uint8_t version, kind;
    uint16_t layer;
    uint32_t rows;
    uint64_t sequence, step;
    uint32_t block, generation;
    uint16_t q_heads, head_dim;
    uint8_t dtype, out_dtype;
    uint8_t unused[2];
    float scale, softcap;
    uint32_t window;
    uint8_t rest[12];
} wire_header;
_Static_assert(sizeof(wire_header) == 64, "services/dataplane/wire.py");

/* Of rows of vectors: their bytes in a message. */
static inline uint64_t vectors_bytes(int64_t rows, int32_t heads, int32_t head_dim, int32_t dtype) {
    return (uint64_t)rows * (uint64_t)heads * (uint64_t)head_dim * (dtype == FLOAT32 ? 4 : 2);
}

#endif
