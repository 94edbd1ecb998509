"""Small steps without the price of asking: what a model computes between attention calls is recorded, and replayed.

A decode step of a few rows asks a GPU for some thousand small operations; asking takes longer than computing. So all
between two attention calls is one recording (a CUDA graph), made at load for some numbers of rows. A step is padded to
the next of these. Attention itself is called as ever, with the step's own rows: its plan differs from step to step, and
part of it happens on other machines. Padding rows hold what was there before; no row looks at another but by attention.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from services.dataplane.device import Device, Recording
from services.instance.model import Model
from services.instance.passes.attention import Angles
from services.instance.passes.layers import Layer
from services.instance.passes.whole_model import WholeModel

_log = logging.getLogger(__name__)
_SIZES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)  # more rows compute longer than asking takes


def recorded_sizes(most_rows: int) -> tuple[int, ...]:
    """Numbers of rows to record, ascending; the last one suffices for ``most_rows``, or is the largest that gains."""
    return _SIZES[: bisect_left(_SIZES, most_rows) + 1]


def padded_size(rows: int, sizes: tuple[int, ...]) -> int | None:
    """The smallest of the sizes that holds so many rows; None: it is too many, or there are none."""
    at = bisect_left(sizes, rows)
    return sizes[at] if rows and at < len(sizes) else None


@dataclass(frozen=True, slots=True)
class _Recorded:
    """Steps of up to so many rows.

    Attributes:
        token_ids, positions: [size]: where the first piece reads them.
        pieces: up to the first attention call, between each two, and behind the last.
        qkv: [size, all heads * head_dim], of each layer: what the piece before its attention answers.
        attended: [size, q_heads, head_dim], of each layer: where the piece behind its attention reads.
        logits: [size, vocab_size].
    """

    token_ids: Tensor
    positions: Tensor
    pieces: tuple[Recording, ...]
    qkv: tuple[Tensor, ...]
    attended: tuple[Tensor, ...]
    logits: Tensor


class RecordedModel:
    """Computes what the model does; steps that are not small, or need not all rows' logits, as before."""

    def __init__(self, whole: WholeModel, device: Device, sizes: tuple[int, ...]) -> None:
        self._whole = whole
        self._sizes = sizes
        # The largest first: the smaller ones find memory that it has left.
        self._recorded = {size: _record(whole, device, size) for size in reversed(sizes)}

    def __call__(self, token_ids: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor:
        """As ``Model.forward``; the answer is good until the next call."""
        rows = len(token_ids)
        size = padded_size(rows, self._sizes)
        if size is None or len(logit_rows) < rows:
            return self._whole(token_ids, positions, logit_rows)
        recorded = self._recorded[size]
        recorded.token_ids[:rows].copy_(token_ids)
        recorded.positions[:rows].copy_(positions)
        for layer, piece, qkv, attended in zip(
            self._whole.layers, recorded.pieces, recorded.qkv, recorded.attended, strict=False
        ):
            piece.replay()
            attended[:rows].copy_(layer.attention.between(qkv[:rows]))
        recorded.pieces[-1].replay()
        return recorded.logits[:rows]


@torch.inference_mode()
def record_steps(model: Model, device: Device, most_rows: int) -> int:
    """Records steps of up to ``most_rows``; answers for how many numbers of rows.

    Comes after the passes; attention is not called. A model that cannot be recorded stays as it is.
    """
    whole = model.compute
    if not device.records or not isinstance(whole, WholeModel) or model.rotary.several:
        return 0
    sizes = recorded_sizes(most_rows)
    try:
        model.compute = RecordedModel(whole, device, sizes)
    except RuntimeError as error:  # some part waits for the device, to decide by what it computed
        _log.warning("steps are not recorded", extra={"model": model.shape.name, "why": str(error)})
        return 0
    _log.info("steps recorded", extra={"model": model.shape.name, "rows": sizes})
    return len(sizes)


def _record(whole: WholeModel, device: Device, size: int) -> _Recorded:
    token_ids = torch.zeros(size, dtype=torch.int64, device=device.tensors)
    positions = torch.zeros_like(token_ids)
    layers = whole.layers

    def first() -> list[Tensor]:
        x, angles = whole.begin(token_ids, positions)
        return [x, layers[0].begin(x, angles[0]), *(table for pair in angles if pair is not None for table in pair)]

    _, angles = whole.begin(token_ids, positions)
    piece = device.record(first)
    x, qkv, *tables = piece.outputs
    recorded = iter(zip(tables[0::2], tables[1::2], strict=True))
    angles = [None if pair is None else next(recorded) for pair in angles]
    pieces, all_qkv, all_attended = [piece], [qkv], []
    for at, layer in enumerate(layers):
        attended = qkv.new_zeros(layer.attention.attended_shape(qkv))
        if layer is layers[-1]:
            piece = device.record(partial(_last, whole, x, attended))
        else:
            piece = device.record(partial(_between, layer, layers[at + 1], angles[at + 1], x, attended))
            x, qkv = piece.outputs
            all_qkv.append(qkv)
        pieces.append(piece)
        all_attended.append(attended)
    (logits,) = piece.outputs
    return _Recorded(token_ids, positions, tuple(pieces), tuple(all_qkv), tuple(all_attended), logits)


def _between(layer: Layer, following: Layer, angles: Angles | None, x: Tensor, attended: Tensor) -> list[Tensor]:
    y = layer.finish(x, attended)
    return [y, following.begin(y, angles)]


def _last(whole: WholeModel, x: Tensor, attended: Tensor) -> list[Tensor]:
    return [whole.finish(whole.layers[-1].finish(x, attended))]
