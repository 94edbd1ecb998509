"""The compiled choice of tokens: ``choose_tokens`` of ``src/layer_ops.h``."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from kernels.cpu.layer_library import ChoiceCall, load_layer_library
from kernels.cpu.library import find_library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def is_native(logits: Tensor) -> bool:
    """Whether ``choose`` takes these."""
    return logits.is_cpu and logits.dtype in _DTYPES and find_library() is not None


def choose(logits: Tensor, scales: Sequence[float] | None, uniforms: Sequence[float] | None) -> list[int]:
    """One token of each row: the most probable one, or a drawn one where scales and uniforms are given.

    Args:
        logits: [n, vocab_size], float32 or bfloat16.
        scales: of each row; a token's weight is 2 ** (scale * logit).
        uniforms: of each row, in [0, 1).
    """
    rows, dim = logits.shape
    logits = logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64)
    call = ChoiceCall(
        logits=logits.data_ptr(), tokens=tokens.data_ptr(), rows=rows, dim=dim, dtype=_DTYPES[logits.dtype]
    )
    if scales is not None and uniforms is not None:
        if not len(scales) == len(uniforms) == rows:
            raise ValueError(f"{rows} rows need as many scales and uniforms, got {len(scales)} and {len(uniforms)}")
        scale, uniform = torch.tensor(scales, dtype=torch.float32), torch.tensor(uniforms, dtype=torch.float64)
        call.scale, call.uniform = scale.data_ptr(), uniform.data_ptr()
    load_layer_library().choose_tokens(byref(call))
    chosen: list[int] = tokens.tolist()
    return chosen
