"""The way through a model: embedding, angles, layers, norm, output layer.

What lies between these in transformers' Python is looked for in the trace; where there is anything else (a factor of
the embeddings or the logits, say), the model keeps its own. From the last attention on only the rows that are sampled
are computed: of a prompt's chunk that is one, or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from kernels.layer_ops import LayerOps
from kernels.layer_stack import LayerStack, StackedLayer
from services.instance.dist_attention import attention_context
from services.instance.model import Model
from services.instance.passes.attention import Angles
from services.instance.passes.check import TOLERANCE, typical_error
from services.instance.passes.layers import Layer, WholeLayer
from services.instance.passes.trace import Call, Trace, same


@dataclass(frozen=True, slots=True)
class _Rotary:
    """A call of a rotary module: what stands in the place of the hidden states and of the positions."""

    module: nn.Module
    args: tuple[object, ...]
    kwargs: dict[str, object]

    def __call__(self, x: Tensor, positions: Tensor) -> Angles:
        def now(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            return x if value.is_floating_point() else positions

        angles: Angles = self.module(*map(now, self.args), **{key: now(value) for key, value in self.kwargs.items()})
        return angles


class WholeModel:
    """Computes what transformers' model does.

    Args:
        layers: each with the index of its angles in ``rotaries``; None: it needs none. Each is a ``Layer``.
    """

    def __init__(
        self,
        embedding: nn.Module,
        rotaries: Sequence[_Rotary],
        layers: Sequence[tuple[Layer, int | None]],
        norm: nn.Module,
        output: nn.Module,
    ) -> None:
        self._embedding = embedding
        self._rotaries = tuple(rotaries)
        self.layers = tuple(layer for layer, _ in layers)
        self._which = tuple(which for _, which in layers)
        self._norm = norm
        self._output = output
        self.stack: LayerStack | None = None  # all layers but the last, of which some rows may be wanted

    def __call__(self, token_ids: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor:
        """As ``Model.forward``."""
        x, angles = self.begin(token_ids, positions)
        last, count = len(self.layers) - 1, len(logit_rows)
        # Not every module takes no rows at all: one is computed then.
        wanted = None if count == len(token_ids) else logit_rows if count else logit_rows.new_zeros(1)
        through = self._through_stack(x, angles)
        first, x = (0, x) if through is None else (last, through)
        for at, layer in enumerate(self.layers[first:], first):
            x = layer(x, position_embeddings=angles[at], rows=wanted if at == last else None)
        return self.finish(x)[:count]

    def _through_stack(self, x: Tensor, angles: Sequence[Angles | None]) -> Tensor | None:
        """The output of all layers but the last; None: they are called one by one."""
        if self.stack is None:
            return None
        pairs = zip(self.layers[:-1], angles, strict=False)
        return attention_context(self.layers[0].attention).through(
            self.stack, x, [layer.attention.angles(of_layer) for layer, of_layer in pairs]
        )

    def begin(self, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, list[Angles | None]]:
        """All before the layers: the first one's input, [1, rows, hidden], and each one's angles."""
        x: Tensor = self._embedding(token_ids[None])
        angles = [rotary(x, positions[None]) for rotary in self._rotaries]
        return x, [None if which is None else angles[which] for which in self._which]

    def finish(self, x: Tensor) -> Tensor:
        """All behind them: [1, rows, hidden] to logits, [rows, vocab_size]."""
        logits: Tensor = self._output(self._norm(x[0]))
        return logits


def fuse_model(model: Model, traced: Trace) -> int:
    """Lets the model compute as ``WholeModel``, where it can be; answers 1 or 0."""
    whole = _recognised(model, traced)
    if whole is None:
        return 0
    for every in (1, 3):  # all rows, and some of them
        rows = torch.arange(0, len(traced.token_ids), every, device=model.device)
        arguments = (traced.token_ids, traced.positions, rows)
        expected = model.forward(*arguments)
        with torch.inference_mode():
            got = whole(*arguments)
        if not typical_error(got, expected) <= TOLERANCE[expected.dtype]:
            return 0
    model.compute = whole
    return 1


def fuse_stack(model: Model, ops: LayerOps) -> int:
    """Lets all layers but the last be one operation; answers how many."""
    whole = model.compute
    if not isinstance(whole, WholeModel):
        return 0
    layers = [layer for layer in whole.layers[:-1] if isinstance(layer, WholeLayer)]
    stacked = [StackedLayer(layer.op, layer.attention.params) for layer in layers if layer.attention.params is not None]
    heads = {layer.attention.heads_of for layer in layers}
    if len(stacked) < len(whole.layers) - 1 or len(heads) != 1:
        return 0
    whole.stack = ops.stack(stacked, *heads.pop())
    return 0 if whole.stack is None else len(stacked)


def _recognised(model: Model, traced: Trace) -> WholeModel | None:
    layers, outside = [layer.layer for layer in traced.layers], list(traced.outside)
    current = [layer.current for layer in layers if isinstance(layer.current, Layer)]
    if len(current) < len(model.attention_modules) or len(current) < len(layers):
        return None
    if not all(same(a.output, b.input) for a, b in pairwise(layers)):
        return None
    embedding = _only(c for c in outside if same(c.input, traced.token_ids) and same(c.output, layers[0].input))
    norm = _only(call for call in outside if same(call.input, layers[-1].output))
    output = _only(call for call in outside if same(call.output, traced.logits))
    if embedding is None or norm is None or output is None or not torch.equal(output.input, norm.output):
        return None
    rotaries: list[Call] = []
    which: list[int | None] = []
    for layer in layers:
        angles = layer.kwargs.get("position_embeddings")
        call = _origin(outside, angles)
        if call is None and angles is not None:
            return None
        if call is not None and call not in rotaries:
            rotaries.append(call)
        which.append(None if call is None else rotaries.index(call))
    known = [embedding, norm, output, *rotaries]
    if not all(any(_is_part(call, whole) for whole in known) for call in outside):
        return None
    return WholeModel(
        embedding.current,
        [_Rotary(call.current, call.args, dict(call.kwargs)) for call in rotaries],
        list(zip(current, which, strict=True)),
        norm.current,
        output.current,
    )


def _only(calls: Iterable[Call]) -> Call | None:
    found = list(calls)
    return found[0] if len(found) == 1 else None


def _origin(calls: Sequence[Call], angles: object) -> Call | None:
    """The outermost call that answered these."""
    if not isinstance(angles, tuple):
        return None
    return next((call for call in reversed(calls) if not call.bare and call.output is angles[0]), None)


def _is_part(call: Call, whole: Call) -> bool:
    return call.path == whole.path or call.path.startswith(f"{whole.path}.")
