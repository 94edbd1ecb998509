"""The way through a decoder layer: attention and MLP, each with a residual and with norms before or behind it.

    x = x + m * norm(attention(norm(x)))
    x = x + m * norm(mlp(norm(x)))

Any of the four norms may be missing; m is 1 but for models with a residual multiplier. The second residual and the norm
behind it are one operation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kernels.layer_ops import LayerOp, LayerOps, LayerParts
from services.instance.passes.attention import Angles, PlainAttention, some_rows
from services.instance.passes.check import agree
from services.instance.passes.linears import PackedLinear
from services.instance.passes.mlp import GatedMlp
from services.instance.passes.norms import RmsNorm
from services.instance.passes.trace import Call, LayerTrace, same


@dataclass(frozen=True, slots=True)
class _Parts:
    """Attributes: the norms are None where there is none."""

    attention: PlainAttention
    mlp: nn.Module
    before_attention: nn.Module | None
    behind_attention: nn.Module | None
    before_mlp: nn.Module | None
    behind_mlp: nn.Module | None


class Layer(nn.Module, ABC):
    """Takes the place of a decoder layer; transformers' contract is kept.

    ``rows`` in ``forward`` says which rows of the last layer are wanted. The others' keys and values are stored;
    nothing else is computed for them, where that can be.

    Args:
        original: plain attributes of it are this one's, too: models look at them.
    """

    def __init__(self, original: nn.Module, attention: PlainAttention) -> None:
        super().__init__()
        for name, value in vars(original).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.attention = attention

    @abstractmethod
    def begin(self, x: Tensor, angles: Angles | None) -> Tensor:
        """All before the attention function: [1, rows, hidden] to [rows, all heads * head_dim]."""

    @abstractmethod
    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """All behind it. x: [1, rows, hidden], as ``begin`` was given; attended: [rows, q_heads, head_dim]."""

    def forward(
        self,
        hidden_states: Tensor,
        *_: object,
        position_embeddings: Angles | None = None,
        rows: Tensor | None = None,
        **__: object,
    ) -> Tensor:
        """hidden_states: [1, rows, hidden]; the answer, too."""
        qkv = self.begin(hidden_states, position_embeddings)
        attended = self.attention.between(qkv, rows)
        return self.finish(some_rows(hidden_states[0], rows)[None], attended)


class PlainLayer(Layer):
    """Part by part.

    Args:
        multiplier: of what is added to the residual.
    """

    def __init__(self, original: nn.Module, parts: _Parts, multiplier: float) -> None:
        super().__init__(original, parts.attention)
        self.mlp = parts.mlp
        self.before_attention = parts.before_attention
        self.behind_attention = parts.behind_attention
        self.before_mlp = parts.before_mlp
        self.behind_mlp = parts.behind_mlp
        self._multiplier = multiplier

    def begin(self, x: Tensor, angles: Angles | None) -> Tensor:
        return self.attention.begin(x if self.before_attention is None else self.before_attention(x), angles)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        y = self._scaled(self.attention.finish(attended), self.behind_attention)
        if isinstance(self.before_mlp, RmsNorm):
            x, y = y, self.before_mlp.op.add(y, x)  # y was computed here: it may be written to
        else:
            x = x + y
            y = x if self.before_mlp is None else self.before_mlp(x)
        return x + self._scaled(self.mlp(y), self.behind_mlp)

    def _scaled(self, y: Tensor, norm: nn.Module | None) -> Tensor:
        y = y if norm is None else norm(y)
        return y if self._multiplier == 1 else y * self._multiplier


class WholeLayer(Layer):
    """In one operation before and one behind the attention function."""

    def __init__(self, original: nn.Module, attention: PlainAttention, op: LayerOp) -> None:
        super().__init__(original, attention)
        self.op = op

    def begin(self, x: Tensor, angles: Angles | None) -> Tensor:
        return self.op.begin(x, *self.attention.angles(angles))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        return self.op.finish(x, attended)


def fuse_layers(layers: Sequence[LayerTrace], ops: LayerOps) -> int:
    """Replaces layers around a ``PlainAttention``; answers how many."""
    count = 0
    for layer in layers:
        parts = _recognised(layer) if layer.layer.bare else None
        if parts is None:
            continue
        original = layer.layer.current
        found = next((c for c in _candidates(original, parts, ops) if agree(original, c, layer.layer)), None)
        if found is not None:
            layer.layer.put(found)
            count += 1
    return count


def _candidates(original: nn.Module, parts: _Parts, ops: LayerOps) -> Iterator[nn.Module]:
    for multiplier in {1.0, float(getattr(original, "residual_multiplier", 1.0))}:
        whole = _whole(parts, multiplier, ops)
        if whole is not None:
            yield WholeLayer(original, parts.attention, whole)
        yield PlainLayer(original, parts, multiplier)


def _whole(parts: _Parts, multiplier: float, ops: LayerOps) -> LayerOp | None:
    """All parts as one operation, where they are operations themselves."""
    mlp, attention = parts.mlp, parts.attention
    norms = [parts.before_attention, parts.behind_attention, parts.before_mlp, parts.behind_mlp]
    if not isinstance(mlp, GatedMlp) or not mlp.gate_first:
        return None
    if not all(norm is None or isinstance(norm, RmsNorm) for norm in norms):
        return None
    products = [attention.qkv, attention.output, mlp.gate_up, mlp.down]
    linears = [product.op for product in products if isinstance(product, PackedLinear)]
    if len(linears) < len(products):
        return None
    before_attention, behind_attention, before_mlp, behind_mlp = (
        norm.op if isinstance(norm, RmsNorm) else None for norm in norms
    )
    qkv, output, gate_up, down = linears
    return ops.layer(
        LayerParts(
            before_attention=before_attention,
            qkv=qkv,
            heads=attention.heads,
            output=output,
            behind_attention=behind_attention,
            before_mlp=before_mlp,
            gate_up=gate_up,
            activation=mlp.activation,
            down=down,
            behind_mlp=behind_mlp,
            multiplier=multiplier,
        )
    )


def _recognised(layer: LayerTrace) -> _Parts | None:
    """By what flows between the layer's parts."""
    calls = layer.children()
    attention = next((call for call in calls if isinstance(call.current, PlainAttention)), None)
    mlps = [call for call in calls if call is not attention and not _is_norm(call)]
    if attention is None or len(mlps) != 1 or calls.index(attention) > calls.index(mlps[0]):
        return None
    (mlp,) = mlps
    at, then = calls.index(attention), calls.index(mlp)
    first, middle, last = calls[:at], calls[at + 1 : then], calls[then + 1 :]
    behind_attention = middle[:1] if middle and same(middle[0].input, attention.output) else []
    before_mlp = middle[len(behind_attention) :]
    chain = [
        (first, layer.layer.input, attention.input),
        (behind_attention, attention.output, None),
        (before_mlp, None, mlp.input),
        (last, mlp.output, None),
    ]
    if not all(_connects(*link) for link in chain):
        return None
    assert isinstance(attention.current, PlainAttention)
    norms = (call[0].current if call else None for call in (first, behind_attention, before_mlp, last))
    return _Parts(attention.current, mlp.current, *norms)


def _is_norm(call: Call) -> bool:
    return next(call.current.children(), None) is None


def _connects(norms: list[Call], begin: Tensor | None, end: Tensor | None) -> bool:
    """Whether there is one norm between two tensors, or none and they are the same; None: not known."""
    if not norms:
        return begin is None or end is None or same(begin, end)
    if len(norms) > 1:
        return False
    return (begin is None or same(norms[0].input, begin)) and (end is None or same(norms[0].output, end))
