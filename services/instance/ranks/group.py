"""The ranks' group of torch.distributed, and a model's parts in it."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from torch import distributed, nn
from torch.distributed.tensor import DTensor

from services.core.errors import UnavailableError
from services.instance.ranks.part import ModelPart


def join_group(part: ModelPart, store: Path, timeout_s: float) -> None:
    """Makes this process a member of the default group, over loopback: all ranks are on one host.

    Args:
        store: the file through which the ranks meet; in a directory that nobody else can write to.
        timeout_s: for all to come, and for each collective from then on.

    Raises:
        UnavailableError: not all ranks have come.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["LOCAL_RANK"] = str(part.rank)  # transformers asks for it
    try:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=part.rank,
            world_size=part.degree,
            timeout=timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        raise UnavailableError(f"the {part.degree} ranks have not met within {timeout_s:g} s: {error}") from error


def keep_local_weights(module: nn.Module) -> None:
    """Makes a rank's part of each linear layer's weights a plain parameter.

    transformers' forward of such a layer computes with the local part anyway, and unwraps it at every call.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):
                    layer.register_parameter(name, nn.Parameter(parameter.to_local(), requires_grad=False))
