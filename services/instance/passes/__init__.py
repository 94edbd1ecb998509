"""Passes over a loaded model: what transformers computes in many small operations is computed in few large ones.

A pass knows no architecture. It recognises what it can replace by the dataflow of one traced forward (``trace``),
compares each replacement with the original before it takes its place (``check``), and leaves alone what it does not
know. ``apply`` runs them in this order, in which they build on each other; each can be left out.

    fuse_linears     projections of one tensor become one matrix product
    pack_linears     weights lie in the order in which the products read them; on the CPU
    fuse_norms       an RMS norm is one operation
    fuse_mlps        a gated MLP is two products and one operation, where gate and up are one product
    fuse_attention   head norms and rotary embedding are one operation, where q, k and v are one product
    fuse_layers      a layer is one call before its attention and one behind it, or as near to that as its parts allow
    fuse_model       the way through the model, without transformers' Python around the layers
    fuse_stack       all layers but the last as one operation, which pauses for an attention that asks other daemons
"""

from typing import Literal, get_args

PassName = Literal[
    "fuse_linears",
    "pack_linears",
    "fuse_norms",
    "fuse_mlps",
    "fuse_attention",
    "fuse_layers",
    "fuse_model",
    "fuse_stack",
]
PASSES: tuple[PassName, ...] = get_args(PassName)
