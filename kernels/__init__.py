"""Attention kernels over paged rBlocks: one interface, three implementations.

``load(device)`` answers the best one for a device; ``reference`` is the plain torch one the others are tested against.
"""

from kernels.interface import AttentionKernels, AttentionPlan, LayerParams, empty_partial
from kernels.select import load

__all__ = ["AttentionKernels", "AttentionPlan", "LayerParams", "empty_partial", "load"]
