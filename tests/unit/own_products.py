"""What tests of compiled layers need to know."""

from __future__ import annotations

import torch

from kernels.cpu import find_library
from kernels.cpu.layer_ops import CpuLayerOps


def has_own_products(dtype: torch.dtype = torch.float32) -> bool:
    """Whether matrix products, and so whole layers, are compiled for this processor."""
    return find_library() is not None and CpuLayerOps().panel_columns(dtype) > 0
