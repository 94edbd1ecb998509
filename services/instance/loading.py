"""A process's part of the model, loaded and tried: what leader and ranks do alike, and together."""

from __future__ import annotations

from pathlib import Path

import torch

from services.dataplane.device import Device
from services.instance.config import InstanceConfig
from services.instance.model import Model, load_model
from services.instance.passes.apply import apply_passes
from services.instance.probe import probe
from services.instance.ranks.part import WHOLE, ModelPart
from services.instance.recorded_model import record_steps


def prepare_model(config: InstanceConfig, device: Device) -> Model:
    """The whole model, ready to compute.

    Raises:
        ConfigError, UnsupportedModelError: as ``load_model`` and ``probe``.
    """
    model = _load(config, device, WHOLE)
    apply_passes(model, config.passes, config.num_threads)
    if config.record_steps:
        record_steps(model, device, config.max_num_seqs)
    return model


def prepare_part(config: InstanceConfig, device: Device, rank: int, store: Path) -> Model:
    """One rank's part of it; all ranks do this at the same time, and meet through ``store``.

    The passes know nothing of layers that are divided, so none is applied.

    Raises:
        ConfigError, UnsupportedModelError: as ``load_model`` and ``probe``.
        UnavailableError: the other ranks have not come.
    """
    from services.instance.ranks.group import join_group

    part = ModelPart(rank, config.tensor_parallel)
    join_group(part, store, config.stall_timeout_s)
    return _load(config, device, part)


def _load(config: InstanceConfig, device: Device, part: ModelPart) -> Model:
    torch.set_num_threads(config.num_threads)
    model = load_model(config.model, config.dtype, config.max_model_len, device.tensors, part)
    probe(model, device.load_kernels(config.num_threads), config.block_tokens, config.dtype)
    return model
