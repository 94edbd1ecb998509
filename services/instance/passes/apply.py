"""Applies the passes to a model and checks the whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from kernels import layer_ops
from services.core.errors import UnsupportedModelError
from services.instance.model import Model
from services.instance.passes import PASSES, PassName
from services.instance.passes.attention import fuse_attention
from services.instance.passes.check import TOLERANCE, reproduces, typical_error
from services.instance.passes.layers import fuse_layers
from services.instance.passes.linears import fuse, pack
from services.instance.passes.mlp import fuse_mlps
from services.instance.passes.norms import recognised
from services.instance.passes.replace import replace_modules
from services.instance.passes.trace import LayerTrace, Trace, trace
from services.instance.passes.whole_model import fuse_model, fuse_stack

_log = logging.getLogger(__name__)


def apply_passes(model: Model, names: Collection[PassName] = PASSES, num_threads: int = 1) -> dict[PassName, int]:
    """Rewrites the model in place; answers what each pass did: products or modules that are gone or replaced.

    Comes after the probe and before an attention context is attached.

    Args:
        num_threads: of the operations between matrix products.

    Raises:
        UnsupportedModelError: the model does not compute the same afterwards, although every replacement did.
    """
    if not names:
        return {}
    traced = trace(model)
    layers, dtype = traced.layers, traced.logits.dtype
    ops = layer_ops.load(traced.logits.device, dtype, num_threads)
    passes: dict[PassName, Callable[[], int]] = {
        "fuse_linears": lambda: fuse(layers),
        "pack_linears": lambda: pack(model.module, layers, ops),
        "fuse_norms": lambda: replace_modules(model.module, layers, partial(recognised, ops=ops, dtype=dtype)),
        "fuse_mlps": lambda: fuse_mlps(layers, ops),
        "fuse_attention": lambda: fuse_attention(layers, ops),
        "fuse_layers": lambda: fuse_layers(layers, ops),
        "fuse_model": lambda: fuse_model(model, traced),
        "fuse_stack": lambda: fuse_stack(model, ops),
    }
    done = {name: apply() for name, apply in passes.items() if name in names}
    _check(model, traced)
    _log.info("model rewritten", extra={"model": model.shape.name, "layers": len(layers), "passes": done})
    return done


def _check(model: Model, traced: Trace) -> None:
    """Every layer on what it was given when traced, then all that stands before and behind the layers."""
    wrong = [f"layer {layer.attention.params.layer}" for layer in traced.layers if not reproduces(layer)]
    with ExitStack() as hooks:
        for layer in traced.layers:
            handle = layer.layer.current.register_forward_hook(partial(_as_traced, layer))
            hooks.callback(handle.remove)
        rows = torch.arange(len(traced.token_ids), device=model.device)
        logits = model.forward(traced.token_ids, traced.positions, rows)
    error = typical_error(logits, traced.logits)
    if not error <= TOLERANCE[traced.logits.dtype]:  # also catches NaN
        wrong.append(f"the logits (off by {error:.3g} of their spread)")
    if wrong:
        raise UnsupportedModelError(
            f"{model.shape.name}: after the passes over the model these differ: {', '.join(wrong)}; leave out passes "
            f"in the configuration (passes: []) and report this"
        )


def _as_traced(layer: LayerTrace, _: nn.Module, __: object, output: object) -> object:
    if isinstance(output, tuple):
        return (layer.layer.output, *output[1:])
    return layer.layer.output
