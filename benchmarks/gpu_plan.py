"""What of a Llama-3-8B and a long context fits on one GPU, and how the blocks are dealt out. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.checkpoints import CheckpointShape
from benchmarks.filled_requests import FAR, NEAR
from services.core.blocks import PoolGeometry
from services.core.errors import ConfigError

BLOCK_TOKENS = 64
DTYPE: Literal["bfloat16"] = "bfloat16"
LENDERS = (*(f"{FAR[:-1]}{index}" for index in range(3)),)
MIB = 1 << 20
_ELEMENT_BYTES = 2
_CONTEXT_MIB = 900  # of CUDA, the kernels and the libraries' workspaces in one process
_STEP_ROW_BYTES = 16  # an activation's: some copies of hidden and of an MLP's inner part, for each row and element


@dataclass(frozen=True, slots=True)
class Fit:
    """Attributes: layers: as many of the model's as fit beside their KV cache."""

    layers: int
    pool_mib: int
    daemons: int


def geometry_of(shape: CheckpointShape) -> PoolGeometry:
    settings = shape.settings
    head_dim = int(settings["hidden_size"]) // int(settings["num_attention_heads"])
    return PoolGeometry(settings["num_hidden_layers"], settings["num_key_value_heads"], BLOCK_TOKENS, head_dim, DTYPE)


def with_layers(shape: CheckpointShape, layers: int) -> CheckpointShape:
    """The same model with fewer layers."""
    return dataclasses.replace(
        shape, name=f"{shape.name.partition('@')[0]}@{layers}", settings={**shape.settings, "num_hidden_layers": layers}
    )


def weight_bytes(shape: CheckpointShape) -> int:
    """Of a Llama whose output layer has weights of its own."""
    s = shape.settings
    hidden, inner, heads, kv_heads = (
        int(s[name]) for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    head_dim = hidden // heads
    layer = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim + 3 * hidden * inner
    return _ELEMENT_BYTES * (2 * int(s["vocab_size"]) * hidden + int(s["num_hidden_layers"]) * layer)


def loading_bytes(shape: CheckpointShape) -> int:
    """What a Llama takes while it is loaded, besides its weights: those of fused products stand there twice."""
    s = shape.settings
    hidden, inner, heads, kv_heads, layers = (
        int(s[name])
        for name in (
            *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
            "num_hidden_layers",
        )
    )
    return _ELEMENT_BYTES * layers * hidden * (hidden + 2 * kv_heads * hidden // heads + 2 * inner)


def fit(shape: CheckpointShape, gpu_mib: int, context: int, chunk_tokens: int, spread: bool) -> Fit:
    """The most layers whose weights, pools and processes one GPU holds.

    Args:
        chunk_tokens: of a prefill chunk; a pool beside an instance holds the blocks of two besides its context.
        spread: three quarters of the context in the pools of three further daemons.

    Raises:
        ConfigError: not even one.
    """
    daemons = 1 + (len(LENDERS) if spread else 0)
    activations = chunk_tokens * shape.settings["intermediate_size"] * _STEP_ROW_BYTES
    for layers in range(shape.settings["num_hidden_layers"], 0, -1):
        cut = with_layers(shape, layers)
        geometry = geometry_of(cut)
        blocks = pool_blocks(geometry, context, chunk_tokens, spread)
        pool_mib = -(-blocks * geometry.block_bytes // MIB)
        once = max(activations, loading_bytes(cut))
        taken = daemons * pool_mib + (daemons + 1) * _CONTEXT_MIB + (weight_bytes(cut) + once) // MIB
        if taken <= gpu_mib:
            return Fit(layers, pool_mib, daemons)
    raise ConfigError(f"a GPU of {gpu_mib} MiB holds no layer of {shape.name} with a context of {context} tokens")


def pool_blocks(geometry: PoolGeometry, context: int, chunk_tokens: int, spread: bool) -> int:
    """Of each pool: its part of the context, the workspace, and some answers."""
    workspace = 2 * (chunk_tokens // BLOCK_TOKENS + 1) + 4
    answers = 16 * geometry.blocks_for(2 * BLOCK_TOKENS)
    context_blocks = geometry.blocks_for(context)
    part = -(-context_blocks // (1 + len(LENDERS))) if spread else context_blocks
    return part + workspace + answers


def chunk_tokens_for(longest: int, most: int) -> int:
    """Of a prefill chunk, whole blocks: so few for a short prompt that a pool for a quarter of it has a workspace."""
    return max(BLOCK_TOKENS, min(most, longest // 16 // BLOCK_TOKENS * BLOCK_TOKENS))


def deal(keys: Sequence[bytes], first: int, spread: bool) -> dict[str, list[bytes]]:
    """Which daemon gets which of a context's blocks, the first of which have been dealt out before.

    One block in four is near, so that this holds for every beginning of the context as well.
    """
    daemons = (NEAR, *LENDERS) if spread else (NEAR,)
    dealt: dict[str, list[bytes]] = {daemon: [] for daemon in daemons}
    for index in range(first, len(keys)):
        dealt[daemons[index % len(daemons)]].append(keys[index])
    return dealt
