"""What a checkpoint's attention looks like: read from its configuration, then observed in one forward of one token.

Names and conventions in config.json differ between architectures (head sizes, latent attention, per-layer windows), so
the shape of the KV cache is not derived from it: the model is run on one token and its calls of the attention function
are written down. What the configuration alone shows to be impossible is refused before the weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import LayerParams
from services.core.errors import UnsupportedModelError
from services.instance.dist_attention import ATTENTION_NAME, AttentionContext
from services.instance.transformers_import import PretrainedConfig

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Of all layers together.

    Attributes:
        head_dim: of a block: the widest head of any layer, keys and values alike; narrower ones are padded with zeros.
        windows: of each layer, in tokens; 0 sees everything before.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...]

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def reach(self) -> int:
        """How many tokens back any layer sees; 0: some layer sees everything."""
        return 0 if 0 in self.windows else max(self.windows)


@dataclass(frozen=True, slots=True)
class Observed:
    """Attributes: modules: of each layer, the one that calls the attention function."""

    shape: AttentionShape
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True, slots=True)
class _Call:
    module: nn.Module
    q_heads: int
    kv_heads: int
    head_dim: int
    window: int


def refuse_unknown_layers(name: str, config: PretrainedConfig) -> None:
    """Some kinds of layers see or remember what no attention function is told: chunks, recurrent states, convolutions.

    Raises:
        UnsupportedModelError: the configuration names a kind that is neither full nor sliding attention.
    """
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - {_FULL, _SLIDING})
    if unknown:
        raise UnsupportedModelError(
            f"{name}: its layers of type {', '.join(map(repr, unknown))} see or remember something that does not go "
            f"through transformers' AttentionInterface; only {_FULL!r} and {_SLIDING!r} can be served"
        )


def declared_windows(config: PretrainedConfig) -> tuple[int, ...]:
    """Window of each layer according to the configuration."""
    window = int(getattr(config, "sliding_window", None) or 0)
    kinds = getattr(config, "layer_types", None) or [_SLIDING] * int(config.num_hidden_layers)
    return tuple(window if kind == _SLIDING else 0 for kind in kinds)


@torch.inference_mode()
def observe(module: nn.Module, layers: int) -> Observed:
    """Runs one token through the model, which is set to DistAttention already.

    Raises:
        UnsupportedModelError: its attention is not one call per layer, all with the same number of heads.
    """
    name = type(module).__name__
    calls: dict[int, _Call] = {}
    for part in module.modules():  # parents before their parts: in the end each part has its own observer
        _Observer(part, calls).attach_to(part)
    token = torch.zeros(1, 1, dtype=torch.int64, device=next(module.parameters()).device)
    first_row = token[0]
    try:
        module(input_ids=token, position_ids=token, use_cache=False, logits_to_keep=first_row)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{name} cannot compute a packed batch without an attention mask ({error}); its attention does not go "
            "through transformers' AttentionInterface"
        ) from error
    if not calls:
        raise UnsupportedModelError(
            f"{name} never calls the attention function; its attention does not go through transformers' "
            "AttentionInterface"
        )
    if sorted(calls) != list(range(layers)):
        raise UnsupportedModelError(
            f"{name} calls the attention function in layers {sorted(calls)}; one call in each of its {layers} layers "
            "is needed"
        )
    heads = {(call.q_heads, call.kv_heads) for call in calls.values()}
    if len(heads) > 1:
        raise UnsupportedModelError(
            f"{name} has layers with different numbers of heads (queries, keys: {sorted(heads)}); all layers of an "
            "rBlock have one shape"
        )
    q_heads, kv_heads = heads.pop()
    head_dim = max(call.head_dim for call in calls.values())
    in_order = [calls[layer] for layer in range(layers)]
    shape = AttentionShape(q_heads, kv_heads, head_dim, tuple(call.window for call in in_order))
    return Observed(shape, tuple(call.module for call in in_order))


class _Observer(AttentionContext):
    """Writes down one module's calls in one forward; the attention of a single token is its value."""

    def __init__(self, module: nn.Module, calls: dict[int, _Call]) -> None:
        self._module = module
        self._calls = calls

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, params: LayerParams, sinks: Tensor | None) -> Tensor:
        if params.layer in self._calls:
            raise UnsupportedModelError(
                f"{type(self._module).__name__} calls the attention function again for layer {params.layer}; a layer "
                "has one KV cache"
            )
        head_dim = max(k.shape[2], v.shape[2])
        self._calls[params.layer] = _Call(self._module, q.shape[1], k.shape[1], head_dim, params.window)
        return v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def set_attention(module: nn.Module, name: str = ATTENTION_NAME) -> None:
    """Makes transformers call the attention function of this name ("eager": transformers' own)."""
    module.set_attn_implementation(name)  # type: ignore[operator]
