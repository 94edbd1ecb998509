/* The layer operations for any processor: vectors of 4 floats (SSE2 on x86-64, NEON on aarch64). */
#define WIDTH 4
#define LAYER_OPS baseline_layer_ops
#include "layer_op_set.h"
