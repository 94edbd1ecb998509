"""The probe at load: does this checkpoint compute the same with DistAttention as with transformers' eager attention?

transformers knows hundreds of architectures, and some never call the attention function, or put something into a mask
that DistAttention does not see. So every checkpoint is tried once before it serves: two sequences, longer than any
sliding window up to a bound, packed and computed in chunks, must call the attention function once per layer and chunk
and give eager's logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import AttentionKernels, AttentionPlan
from services.core.errors import UnsupportedModelError
from services.instance.dist_attention import ATTENTION_NAME, DistAttention, StepTensors
from services.instance.model import TORCH_DTYPES, Model

_LENGTHS = (150, 70)
_CHUNK = 64
_LONGEST = 1200  # a window longer than this is not exceeded by the probe


@torch.inference_mode()
def probe(model: Model, kernels: AttentionKernels, block_tokens: int, dtype: str) -> None:
    """Compares the two and leaves the model set to DistAttention.

    Raises:
        UnsupportedModelError: they differ; the message says where.
    """
    name = type(model.module).__name__
    lengths = _lengths(model)
    generator = torch.Generator().manual_seed(7)
    sequences = [torch.randint(0, model.shape.vocab_size, (length,), generator=generator) for length in lengths]
    expected = [_eager(model, tokens) for tokens in sequences]
    blocks = [-(-length // block_tokens) for length in lengths]
    pool = torch.zeros(sum(blocks), *model.shape.geometry(block_tokens, dtype).block_shape, dtype=TORCH_DTYPES[dtype])
    attention = DistAttention(kernels, pool, None)
    attention.attach_to(model.module)
    for start in range(0, max(lengths), _CHUNK):
        rows: list[int] = []  # rows of the packed batch by sequence
        tokens: list[Tensor] = []
        alive = [s for s, length in enumerate(lengths) if start < length]
        for s in alive:
            part = sequences[s][start : start + _CHUNK]
            tokens.append(part)
            rows.append(len(part))
        first_block = [sum(blocks[:s]) for s in alive]
        plan, slots, positions = _plan(start, rows, first_block, block_tokens)
        attention.calls = 0
        attention.begin_step(StepTensors(slots, plan))
        logits = model.forward(torch.cat(tokens), positions, torch.arange(sum(rows)))
        if attention.calls != model.shape.layers:
            raise UnsupportedModelError(
                f"{name} called the attention function {attention.calls} times for {model.shape.layers} layers; "
                "its attention does not go through transformers' AttentionInterface"
            )
        at = 0
        for s, count in zip(alive, rows, strict=True):
            _compare(name, logits[at : at + count], expected[s][start : start + count], s, start, dtype)
            at += count


def _lengths(model: Model) -> tuple[int, int]:
    config = model.module.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    window = int(getattr(config, "sliding_window", None) or 0)
    longest = max(_LENGTHS[0], min(window + 40, _LONGEST))
    return min(longest, model.shape.max_model_len), min(_LENGTHS[1], model.shape.max_model_len)


def _eager(model: Model, tokens: Tensor) -> Tensor:
    """[length, vocab_size] float32 logits by transformers' own eager attention."""
    model.module.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        return model.forward(tokens, torch.arange(len(tokens)), torch.arange(len(tokens)))
    finally:
        model.module.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]


def _plan(
    start: int, rows: list[int], first_block: list[int], block_tokens: int
) -> tuple[AttentionPlan, Tensor, Tensor]:
    """Plan, slots and positions of one chunk of each sequence; blocks of a sequence lie one after another."""
    ids: list[Tensor] = []
    slots: list[Tensor] = []
    positions: list[Tensor] = []
    for count, first in zip(rows, first_block, strict=True):
        ids.append(torch.arange(first, first + -(-(start + count) // block_tokens)))
        positions.append(torch.arange(start, start + count))
        slots.append(positions[-1] + first * block_tokens)
    counts = torch.tensor([len(part) for part in ids])
    plan = AttentionPlan(
        query_start=_starts(torch.tensor(rows)),
        query_pos=torch.full((len(rows),), start, dtype=torch.int32),
        block_start=_starts(counts),
        block_ids=torch.cat(ids).to(torch.int32),
        block_pos=torch.cat([torch.arange(len(part)) * block_tokens for part in ids]).to(torch.int32),
        max_query_len=max(rows),
    )
    return plan, torch.cat(slots), torch.cat(positions)


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.int32)


def _compare(name: str, got: Tensor, expected: Tensor, sequence: int, start: int, dtype: str) -> None:
    """Logits may differ by rounding: measured against their own spread over the vocabulary."""
    tolerance = 2e-3 if dtype == "float32" else 8e-2
    spread = float(expected.std()) or 1.0
    worst = float((got - expected).abs().max()) / spread
    if not worst <= tolerance:  # also catches NaN
        raise UnsupportedModelError(
            f"{name} gives other logits with DistAttention than with eager attention: off by {worst:.3g} of their "
            f"standard deviation in sequence {sequence} at positions {start}-{start + len(got)} (allowed "
            f"{tolerance:g}); something of its attention happens outside transformers' AttentionInterface"
        )
