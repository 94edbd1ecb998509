"""What a model computes, taken down in one forward: which module got which tensor, layer by layer.

Passes recognise what they replace by this dataflow, not by the names of classes: two projections belong together if
they were given the same tensor, a norm stands before attention if attention got its output. The rows of the forward lie
at positions all over the model's context, so that whatever depends on the position shows when a replacement is compared
with what it replaces. Attention itself is left out: a stand-in without keys takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kernels import LayerParams
from services.instance.dist_attention import AttentionContext
from services.instance.model import Model

_ROWS = 16


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One call of the attention function; tensors as in ``AttentionContext``."""

    q: Tensor
    k: Tensor
    v: Tensor
    params: LayerParams
    sinks: Tensor | None
    output: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a module.

    Attributes:
        parent, name: where the module is, as an attribute; a pass may have put another there since.
        path: from the layer to it, with dots; empty for the layer itself.
        is_leaf: whether it had no parts.
        input: the first tensor among its arguments.
        output: the tensor that it answered, or the first of a tuple.
        bare: whether it answered a tensor and not a tuple.
    """

    parent: nn.Module
    name: str
    path: str
    is_leaf: bool
    module: nn.Module
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    input: Tensor
    output: Tensor
    bare: bool

    @property
    def current(self) -> nn.Module:
        """The module that is in that place now."""
        return self.parent.get_submodule(self.name)

    def put(self, module: nn.Module) -> None:
        """Puts another module into that place."""
        setattr(self.parent, self.name, module)


@dataclass(frozen=True, slots=True, eq=False)
class LayerTrace:
    """One decoder layer's forward.

    Attributes:
        layer: the call of the layer.
        calls: of all modules inside, in the order in which they ended; dropout, which does nothing here, is left out.
        attention: the call of the attention function.
        before: how many of ``calls`` had ended when it was made.
    """

    layer: Call
    calls: tuple[Call, ...]
    attention: AttentionCall
    before: int

    def children(self) -> list[Call]:
        """Calls of the layer's direct parts."""
        return [call for call in self.calls if "." not in call.path]

    def leaves(self, part: Call) -> list[Call]:
        """Calls of the modules in a part of the layer that have no parts themselves."""
        return [call for call in self.calls if call.is_leaf and call.path.startswith(f"{part.path}.")]


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """One forward of a model.

    Attributes:
        token_ids, positions: [rows].
        outside: calls of all modules that neither are in a layer nor hold layers, in the order in which they ended;
            paths are from the model.
        logits: [rows, vocab_size].
    """

    token_ids: Tensor
    positions: Tensor
    layers: tuple[LayerTrace, ...]
    outside: tuple[Call, ...]
    logits: Tensor


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements in memory, in whatever shape."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


class StandIn(AttentionContext):
    """Takes the place of attention: every row sees its own value. Remembers the latest call of each layer."""

    def __init__(self) -> None:
        self.calls: dict[int, AttentionCall] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, params: LayerParams, sinks: Tensor | None) -> Tensor:
        output = v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        self.calls[params.layer] = AttentionCall(q, k, v, params, sinks, output)
        return output


def trace(model: Model) -> Trace:
    """Takes down one forward; a ``StandIn`` is attached afterwards."""
    rows = torch.arange(_ROWS, device=model.device)
    token_ids = torch.randint(0, model.shape.vocab_size, (_ROWS,), generator=torch.Generator().manual_seed(0))
    positions = torch.linspace(0, model.shape.max_model_len - 1, _ROWS, dtype=torch.float64).round().long()
    token_ids, positions = token_ids.to(model.device), positions.to(model.device)
    recorders = [_Recorder(number) for number in range(len(model.attention_modules))]
    stand_in = _Listener(recorders)
    stand_in.attach_to(model.module)
    outside: list[Call] = []
    handles, inside = [], set[nn.Module]()
    for recorder, part in zip(recorders, model.attention_modules, strict=True):
        place = _layer_around(model.module, part)
        if place is not None:
            handles += recorder.listen(*place)
            inside.update(place[0].get_submodule(place[1]).modules())
    for path, module in model.module.named_modules():
        if inside.isdisjoint(module.modules()):
            above, _, name = path.rpartition(".")
            handles.append(_hook(model.module.get_submodule(above), name, path, outside))
    try:
        logits = model.forward(token_ids, positions, rows)
    finally:
        for handle in handles:
            handle.remove()
    layers = (recorder.finish(stand_in) for recorder in recorders)
    return Trace(token_ids, positions, tuple(layer for layer in layers if layer), tuple(outside), logits)


class _Recorder:
    """Takes down one layer."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._layer: list[Call] = []
        self.calls: list[Call] = []
        self.before = 0

    def listen(self, parent: nn.Module, name: str) -> list[RemovableHandle]:
        layer = parent.get_submodule(name)
        handles = [_hook(parent, name, "", self._layer)]
        for path, inner in layer.named_modules():
            if path and not isinstance(inner, nn.Dropout):
                above, _, own = path.rpartition(".")
                handles.append(_hook(layer.get_submodule(above), own, path, self.calls))
        return handles

    def finish(self, stand_in: StandIn) -> LayerTrace | None:
        """None where there is no such layer, or it was called more than once."""
        if len(self._layer) != 1 or self._number not in stand_in.calls:
            return None
        return LayerTrace(self._layer[0], tuple(self.calls), stand_in.calls[self._number], self.before)


class _Listener(StandIn):
    """Tells the recorders when attention is called."""

    def __init__(self, recorders: Sequence[_Recorder]) -> None:
        super().__init__()
        self._recorders = recorders

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, params: LayerParams, sinks: Tensor | None) -> Tensor:
        recorder = self._recorders[params.layer]
        recorder.before = len(recorder.calls)
        return super().__call__(q, k, v, params, sinks)


def _hook(parent: nn.Module, name: str, path: str, calls: list[Call]) -> RemovableHandle:
    module = parent.get_submodule(name)
    is_leaf = next(module.children(), None) is None

    def take(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        first = output[0] if isinstance(output, tuple) else output
        if tensors and isinstance(first, Tensor):
            calls.append(Call(parent, name, path, is_leaf, module, args, kwargs, tensors[0], first, first is output))

    return module.register_forward_hook(take, with_kwargs=True)


def _layer_around(module: nn.Module, part: nn.Module) -> tuple[nn.Module, str] | None:
    """The element of a list of modules that holds this part: the list and the name in it."""
    for parent in module.modules():
        if isinstance(parent, nn.ModuleList):
            for name, child in parent.named_children():
                if any(inner is part for inner in child.modules()):
                    return parent, name
    return None
