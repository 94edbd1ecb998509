"""Which part of a model one process computes, and which degrees a model can be divided by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.core.blocks import HeadRange
from services.core.errors import ConfigError, UnsupportedModelError
from services.instance.transformers_import import PretrainedConfig


@dataclass(frozen=True, slots=True)
class ModelPart:
    """One of ``degree`` equal parts of a model's heads and weights."""

    rank: int = 0
    degree: int = 1

    @property
    def is_whole(self) -> bool:
        return self.degree == 1

    def heads(self, kv_heads: int) -> HeadRange | None:
        """Of a model's KV heads, those of this part; None: all."""
        return None if self.is_whole else HeadRange.of_rank(kv_heads, self.rank, self.degree)

    def of_pool(self, pool: Tensor) -> Tensor:
        """[num_blocks, layers, kv_heads, 2, block_tokens, head_dim], narrowed to the part's heads: a view."""
        heads = self.heads(pool.shape[2])
        return pool if heads is None else pool[:, :, heads.first : heads.end]


WHOLE = ModelPart()


def check_degree(name: str, config: PretrainedConfig, degree: int) -> None:
    """Refuses what the configuration alone shows to be impossible.

    Args:
        config: of the decoder.

    Raises:
        ConfigError: the model's heads cannot be dealt out evenly, or this torch would not compute on CPUs.
        UnsupportedModelError: transformers does not know how to divide this architecture.
    """
    if degree == 1:
        return
    if not getattr(config, "base_model_tp_plan", None):
        raise UnsupportedModelError(
            f"{name}: transformers has no tensor-parallel plan (base_model_tp_plan) for {config.model_type!r}; set "
            "tensor_parallel to 1"
        )
    q_heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or q_heads)
    for what, count in (("query heads", q_heads), ("KV heads", kv_heads)):
        if count % degree:
            raise ConfigError(
                f"instance config: tensor_parallel {degree} does not divide the {count} {what} of {name}; each rank "
                "computes the same number of heads, so set it to a common divisor of "
                f"{q_heads} query heads and {kv_heads} KV heads"
            )
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        raise ConfigError(
            f"instance config: tensor_parallel {degree} computes on CPUs so far, and transformers would put the parts "
            f"of the model on {accelerator.type}; install a torch for CPUs, or set it to 1"
        )


def check_heads(name: str, config: PretrainedConfig, q_heads: int, degree: int) -> None:
    """
    Args:
        q_heads: that a rank's attention was observed to have.

    Raises:
        UnsupportedModelError: transformers' plan leaves the attention whole, on every rank.
    """
    if degree > 1 and q_heads * degree != int(config.num_attention_heads):
        raise UnsupportedModelError(
            f"{name}: transformers' tensor-parallel plan gives each of {degree} ranks {q_heads} of "
            f"{config.num_attention_heads} query heads; a rank's KV cache is its own share of the heads, so set "
            "tensor_parallel to 1"
        )
