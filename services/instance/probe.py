"""The probe at load: does this checkpoint compute the same with DistAttention as with transformers' eager attention?

transformers knows hundreds of architectures, and some put something into a mask that DistAttention does not see. So
every checkpoint is tried once before it serves: two sequences, longer than any sliding window up to a bound, packed and
computed in chunks, must call the attention function once per layer and chunk, and every layer's attention must give
what eager attention gives. Where a model has two rotary regimes, one sequence is of each.

Each layer is handed on eager's output once its own has been compared. So all layers are compared on the same input:
rounding does not add up (nor send tokens to other experts), and the message can say which layer is wrong.

A window beyond the bound is not reached; there the windows that the layers ask for must be those of the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import AttentionKernels, AttentionPlan
from services.core.errors import UnsupportedModelError
from services.instance.architecture import declared_windows, set_attention
from services.instance.dist_attention import DistAttention, StepTensors
from services.instance.model import TORCH_DTYPES, Model

_LENGTHS = (150, 70)
_CHUNK = 64
_BEYOND = 2 * _CHUNK  # so that in some chunk every row has keys outside the window
_LONGEST = 1280  # positions in the probe; a longer window is not exceeded
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the expected values' own spread


@dataclass(frozen=True, slots=True)
class _Sequence:
    """One of the probe's sequences, in eager attention's hands.

    Attributes:
        tokens: [length].
        attention: of each layer, the attention module's output, [length, hidden].
        logits: [length, vocab_size].
        first_block: in the probe's pool; the others follow it.
    """

    tokens: Tensor
    long_rotary: bool
    attention: tuple[Tensor, ...]
    logits: Tensor
    first_block: int


@torch.inference_mode()
def probe(model: Model, kernels: AttentionKernels, block_tokens: int, dtype: str) -> None:
    """Compares the two and leaves the model set to DistAttention.

    Raises:
        UnsupportedModelError: they differ; the message says where.
    """
    _check_long_windows(model)
    sequences: list[_Sequence] = []
    blocks = 0
    for number, length in enumerate(_lengths(model)):
        sequences.append(_by_eager(model, length, number == 0, blocks))
        blocks += -(-length // block_tokens)
    block_shape = model.shape.geometry(block_tokens, dtype).block_shape
    pool = torch.zeros(blocks, *block_shape, dtype=TORCH_DTYPES[dtype], device=model.device)
    attention = DistAttention(kernels, model.part.of_pool(pool), None)
    attention.attach_to(model.module)
    for start in range(0, max(len(s.tokens) for s in sequences), _CHUNK):
        alive = [s for s in sequences if start < len(s.tokens)]
        _try_chunk(model, attention, alive, start, block_tokens, _TOLERANCE[dtype])


def _try_chunk(
    model: Model, attention: DistAttention, alive: list[_Sequence], start: int, block_tokens: int, tolerance: float
) -> None:
    name = type(model.module).__name__
    chunks = [slice(start, min(start + _CHUNK, len(s.tokens))) for s in alive]
    counts = [chunk.stop - start for chunk in chunks]
    with model.device:  # whatever is made here is made there
        plan, slots, positions = _plan(start, counts, [s.first_block for s in alive], block_tokens)
        long_rows = torch.tensor([s.long_rotary for s in alive]).repeat_interleave(torch.tensor(counts))
        rows = torch.arange(sum(counts))
    expected = [
        [s.attention[layer][chunk] for s, chunk in zip(alive, chunks, strict=True)]
        for layer in range(model.shape.attention.layers)
    ]
    got: list[Tensor] = []
    attention.calls = 0
    attention.begin_step(StepTensors(slots, plan))
    tokens = torch.cat([s.tokens[chunk] for s, chunk in zip(alive, chunks, strict=True)])
    with _attention_outputs(model, got, [torch.cat(parts) for parts in expected]):
        logits = model.forward(tokens, positions, rows, long_rows)
    if attention.calls != model.shape.attention.layers:
        raise UnsupportedModelError(
            f"{name} called the attention function {attention.calls} times for {model.shape.attention.layers} layers; "
            "its attention does not go through transformers' AttentionInterface"
        )
    for layer, parts in enumerate(expected):
        _compare(f"{name}: the attention of layer {layer}", got[layer], parts, start, tolerance)
    by_eager = [s.logits[chunk] for s, chunk in zip(alive, chunks, strict=True)]
    _compare(f"{name}: the logits", logits, by_eager, start, 2 * tolerance)


@contextmanager
def _attention_outputs(model: Model, outputs: list[Tensor], instead: Sequence[Tensor] | None) -> Iterator[None]:
    """Takes down every layer's [rows, hidden] attention output in a forward, and may put another in its place."""

    def hook(_: nn.Module, __: object, output: object) -> object:
        first = output[0] if isinstance(output, tuple) else output
        assert isinstance(first, Tensor)
        outputs.append(first[0].clone())
        if instead is None:
            return None
        replaced = instead[len(outputs) - 1].unsqueeze(0)
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

    handles = [module.register_forward_hook(hook) for module in model.attention_modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_long_windows(model: Model) -> None:
    asked = model.shape.attention.windows
    declared = declared_windows(model.module.config.get_text_config(decoder=True))  # type: ignore[operator,union-attr]
    if asked != declared and max(asked + declared) > _LONGEST - _BEYOND:
        layer = next(i for i, (a, b) in enumerate(zip(asked, declared, strict=True)) if a != b)
        raise UnsupportedModelError(
            f"{type(model.module).__name__} asks for a window of {asked[layer]} tokens in layer {layer}; its "
            f"configuration says {declared[layer]} (0: none). Windows that long are not tried at load, so the two must "
            "agree"
        )


def _lengths(model: Model) -> tuple[int, ...]:
    windows = [window for window in model.shape.attention.windows if window <= _LONGEST - _BEYOND]
    longest = max(_LENGTHS[0], *(window + _BEYOND for window in windows)) if windows else _LENGTHS[0]
    return tuple(min(length, model.shape.max_model_len) for length in (longest, _LENGTHS[1]))


def _by_eager(model: Model, length: int, long_rotary: bool, first_block: int) -> _Sequence:
    """A sequence of random tokens, computed at once by transformers' own eager attention."""
    tokens = torch.randint(0, model.shape.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
    tokens, rows = tokens.to(model.device), torch.arange(length, device=model.device)
    outputs: list[Tensor] = []
    set_attention(model.module, "eager")
    try:
        with _attention_outputs(model, outputs, None):
            logits = model.forward(tokens, rows, rows, torch.full((length,), long_rotary, device=model.device))
    finally:
        set_attention(model.module)
    return _Sequence(tokens, long_rotary, tuple(outputs), logits, first_block)


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


def _compare(what: str, got: Tensor, expected: Sequence[Tensor], start: int, tolerance: float) -> None:
    """``expected``: rows of each sequence. The median row of a sequence counts: a token between two experts may differ
    much by rounding alone, while what is left out of an attention shows in most rows of some chunk."""
    for part, right in zip(torch.split(got, [len(right) for right in expected]), expected, strict=True):
        difference, wanted = (part - right).float(), right.float()
        errors = difference.pow(2).mean(1).sqrt() / wanted.std(1).clamp_min(1e-30)
        typical = float(errors.median())
        if not typical <= tolerance:  # also catches NaN
            raise UnsupportedModelError(
                f"{what} at positions {start}-{start + len(right)} differs from eager attention's, typically by "
                f"{typical:.3g} of its standard deviation (allowed {tolerance:g}); something about it does not go "
                "through transformers' AttentionInterface"
            )
