"""Whether a replacement computes what its original does."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from services.instance.passes.trace import AttentionCall, Call, LayerTrace, StandIn

_log = logging.getLogger(__name__)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # of the expected values' own spread
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)
_SCALES = (1.0, 16.0)  # of the inputs: a value that is clipped or capped shows at the larger one


def typical_error(got: Tensor, expected: Tensor) -> float:
    """How far rows are off, as a part of their own spread; the median row's, as in the probe. NaN where shapes differ.

    Args:
        got, expected: [..., dim]; all but the last dimension counts rows.
    """
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("nan")
    difference, wanted = (got.float() - expected.float()).flatten(0, -2), expected.float().flatten(0, -2)
    errors = difference.pow(2).mean(-1).sqrt() / wanted.pow(2).mean(-1).sqrt().clamp_min(1e-30)
    return float(errors.median())


@torch.inference_mode()
def agree(original: nn.Module, replacement: nn.Module, call: Call) -> bool:
    """Runs both on what a traced call was given, and on a multiple of it.

    Where they call the attention function, they must do so with the same queries, keys, values and parameters.
    """
    tolerance = TOLERANCE[call.input.dtype]
    for scale in _SCALES:
        expected, expected_attention = _run(original, call, scale)
        try:
            got, got_attention = _run(replacement, call, scale)
        except _FAILURES as error:
            _log.debug("replacement fails", extra={"original": type(original).__name__, "why": str(error)})
            return False
        if expected_attention.keys() != got_attention.keys():
            return False
        pairs = [(got, expected)]
        for layer, wanted in expected_attention.items():
            if not _same_constants(got_attention[layer], wanted):
                return False
            pairs += zip(_rows(got_attention[layer]), _rows(wanted), strict=True)
        errors = [typical_error(a, b) for a, b in pairs]
        if not all(error <= tolerance for error in errors):  # also catches NaN
            _log.debug("replacement differs", extra={"original": type(original).__name__, "errors": errors})
            return False
    return True


@torch.inference_mode()
def reproduces(layer: LayerTrace) -> bool:
    """Whether the layer, as it is now, computes what it did when it was traced."""
    wanted, tolerance = layer.attention, TOLERANCE[layer.layer.input.dtype]
    try:
        got, calls = _run(layer.layer.current, layer.layer, 1.0)
    except _FAILURES as error:
        _log.debug("changed layer fails", extra={"layer": wanted.params.layer, "why": str(error)})
        return False
    attention = calls.get(wanted.params.layer)
    if attention is None or not _same_constants(attention, wanted):
        return False
    pairs = [(got, layer.layer.output), *zip(_rows(attention), _rows(wanted), strict=True)]
    errors = [typical_error(a, b) for a, b in pairs]
    if not all(error <= tolerance for error in errors):  # also catches NaN
        _log.debug("changed layer differs", extra={"layer": wanted.params.layer, "errors": errors})
        return False
    return True


def _run(module: nn.Module, call: Call, scale: float) -> tuple[Tensor, dict[int, AttentionCall]]:
    stand_in = StandIn()
    stand_in.attach_to(module)

    def scaled(value: object) -> object:
        return call.input * scale if value is call.input else value

    output = module(*map(scaled, call.args), **{key: scaled(value) for key, value in call.kwargs.items()})
    first = output if call.bare else output[0]
    if not isinstance(first, Tensor):
        raise TypeError("answers something else than the original")
    return first, stand_in.calls


def _same_constants(got: AttentionCall, expected: AttentionCall) -> bool:
    return got.params == expected.params and got.sinks is expected.sinks


def _rows(call: AttentionCall) -> Iterator[Tensor]:
    yield from (call.q, call.k, call.v)
