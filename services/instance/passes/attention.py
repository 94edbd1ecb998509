"""The way through an attention layer: one product for q, k and v, one operation for head norms and rotary embedding,
the attention function, one product for the output.

Which rotary embedding it is, if any, is found by trying. What the layer tells its attention function (scale, window,
soft-cap, sinks) is what it told it when it was traced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kernels import LayerParams
from kernels.layer_ops import HeadNorms, HeadsOp, LayerAngles, LayerOps, Rotation
from services.instance.dist_attention import attention_context
from services.instance.passes.check import agree
from services.instance.passes.linears import whole
from services.instance.passes.norms import RmsNorm
from services.instance.passes.trace import AttentionCall, Call, LayerTrace, same

Angles = tuple[Tensor, Tensor]  # cos and sin, [1, rows, rotary_dim]


class PlainAttention(nn.Module):
    """Takes the place of a layer's attention module; transformers' contract is kept.

    Args:
        qkv: answers q, k and v side by side, [1, rows, all heads * head_dim].
        heads: for those of q and k; None: they stay as they are.
        rotates: whether it is told the angles.
        call: of the attention function, as traced.
    """

    def __init__(
        self, qkv: nn.Module, heads: HeadsOp | None, rotates: bool, call: AttentionCall, output: nn.Module
    ) -> None:
        super().__init__()
        self.layer_idx = call.params.layer
        self.qkv = qkv
        self.heads = heads
        self.output = output
        self._rotates = rotates
        self._params = call.params
        self._sinks = call.sinks
        self._counts = [call.q.shape[1], call.k.shape[1], call.v.shape[1]]
        self._all_heads = sum(self._counts)

    def forward(
        self, hidden_states: Tensor, *_: object, position_embeddings: Angles | None = None, **__: object
    ) -> tuple[Tensor, None]:
        return self.finish(self.between(self.begin(hidden_states, position_embeddings))), None

    def begin(self, x: Tensor, angles: Angles | None) -> Tensor:
        """What the attention function gets: [1, rows, hidden] to [rows, all heads * head_dim]."""
        qkv: Tensor = self.qkv(x)[0]
        if self.heads is not None:
            self.heads(qkv, *self.angles(angles))
        return qkv

    def finish(self, attended: Tensor) -> Tensor:
        """[rows, q_heads, head_dim] to [1, rows, hidden]."""
        answer: Tensor = self.output(attended.view(1, len(attended), -1))
        return answer

    def attended_shape(self, qkv: Tensor) -> tuple[int, int, int]:
        """Of what ``between`` answers for this."""
        return len(qkv), self._counts[0], qkv.shape[1] // self._all_heads

    @property
    def heads_of(self) -> tuple[int, int]:
        """Query heads and KV heads."""
        return self._counts[0], self._counts[1]

    @property
    def params(self) -> LayerParams | None:
        """All that the attention function is told; None: it is told more than this."""
        return self._params if self._sinks is None else None

    def angles(self, angles: Angles | None) -> LayerAngles:
        """What this layer's heads are told of the model's angles."""
        return angles if self._rotates and angles is not None else (None, None)

    def between(self, qkv: Tensor, rows: Tensor | None = None) -> Tensor:
        """The attention function: [rows, all heads * head_dim] to [rows, q_heads, head_dim].

        Args:
            rows: that are wanted, in the last layer (``AttentionContext.of_rows``); None: all of them.
        """
        q, k, v = torch.split(qkv.view(len(qkv), self._all_heads, -1), self._counts, dim=1)
        context = attention_context(self)
        if rows is None:
            return context(q, k, v, self._params, self._sinks)
        return context.of_rows(q, k, v, self._params, self._sinks, rows)


def some_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """[len(rows), ...] of x [all rows, ...]; None: all of them."""
    return x if rows is None else x.index_select(0, rows)


def fuse_attention(layers: Sequence[LayerTrace], ops: LayerOps) -> int:
    """Replaces attention modules whose q, k and v are one matrix product; answers how many."""
    count = 0
    for layer in layers:
        for call in layer.children():
            found = next((c for c in _candidates(layer, call, ops) if agree(call.current, c, call)), None)
            if found is not None:
                call.put(found)
                count += 1
    return count


def _candidates(layer: LayerTrace, part: Call, ops: LayerOps) -> Iterator[PlainAttention]:
    leaves, traced = layer.leaves(part), layer.attention
    before = [call for call in layer.calls[: layer.before] if call in leaves]
    after = [call for call in layer.calls[layer.before :] if call in leaves]
    products = [call for call in before if isinstance(call.module, nn.Linear)]
    others = [call for call in before if call not in products]
    if len(after) != 1 or not isinstance(after[0].module, nn.Linear) or not same(after[0].input, traced.output):
        return
    if not products or not all(same(call.input, part.input) for call in products):
        return
    head_dim, heads = traced.q.shape[2], traced.q.shape[1] + traced.k.shape[1]
    qkv = products[0].current if len(products) == 1 else whole(products)
    norms = _head_norms(others, traced) if others else None
    if qkv is None or traced.v.shape[2] != head_dim or (others and norms is None):
        return
    unrotated = None if norms is None else ops.heads(heads, head_dim, Rotation.HALVES, norms)
    yield PlainAttention(qkv, unrotated, False, traced, after[0].current)
    if part.kwargs.get("position_embeddings") is not None:
        for rotation in Rotation:
            rotated = ops.heads(heads, head_dim, rotation, norms)
            yield PlainAttention(qkv, rotated, True, traced, after[0].current)


def _head_norms(calls: Sequence[Call], traced: AttentionCall) -> HeadNorms | None:
    """A norm for q's heads, then one for k's, with the same constants; None if the calls are something else."""
    norms = [call.current for call in calls]
    if len(norms) != 2 or [call.input.numel() for call in calls] != [traced.q.numel(), traced.k.numel()]:
        return None
    q_norm, k_norm = norms
    if not isinstance(q_norm, RmsNorm) or not isinstance(k_norm, RmsNorm):
        return None
    head_dim = traced.q.shape[2]
    if not len(q_norm.weight) == len(k_norm.weight) == head_dim or (q_norm.eps, q_norm.offset) != (
        k_norm.eps,
        k_norm.offset,
    ):
        return None
    weights = [q_norm.weight.expand(traced.q.shape[1], -1), k_norm.weight.expand(traced.k.shape[1], -1)]
    return HeadNorms(torch.cat(weights), q_norm.eps, q_norm.offset)
