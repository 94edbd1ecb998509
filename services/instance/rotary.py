"""Rotary embeddings whose frequencies depend on the length of the text (longrope), chosen per request.

transformers looks at the largest position of a forward pass: up to ``original_max_position_embeddings`` the short
factors hold, beyond it the long ones, for the whole batch. Keys that are stored once cannot follow such a switch, and a
packed batch holds short and long requests. So a request is of one regime from its first token on, chosen by the last
position it can reach, and the regime belongs to its blocks' keys. A request that ends within the limit has exactly the
tokens of transformers' ``generate``; one that goes beyond has those of a model that uses the long factors throughout,
which is what ``generate`` does with a prompt beyond the limit.

The model's own module computes both regimes: its choice is steered by the positions that it is shown.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from services.core.errors import UnsupportedModelError
from services.core.sequence import Request
from services.instance.transformers_import import PretrainedConfig

_LONGROPE = "longrope"


class RotaryRegimes:
    """Which regime a request is of, and which rows of the present step are of the long one.

    Args:
        limit: positions of the short regime; None where the model has one regime only.
        max_model_len: no request becomes longer.
    """

    def __init__(self, limit: int | None, max_model_len: int) -> None:
        self._limit = limit
        self._max_model_len = max_model_len
        self.long_rows: Tensor | None = None  # [rows] bool; None: all are short

    @property
    def several(self) -> bool:
        """Whether the model has more than one regime."""
        return self._limit is not None

    def is_long(self, request: Request) -> bool:
        """The last token drawn is never computed, so the last position is two less than the tokens' number."""
        longest = min(request.prompt_tokens + request.sampling.max_tokens, self._max_model_len)
        return self._limit is not None and longest - 1 > self._limit

    def name(self, request: Request) -> str:
        """For the block keys."""
        if self._limit is None:
            return "default"
        return "long" if self.is_long(request) else "short"


def short_positions(name: str, config: PretrainedConfig) -> int | None:
    """How many positions the short factors are for; None where the frequencies do not depend on the length.

    Raises:
        UnsupportedModelError: they depend on it in a way that no choice per request makes exact.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    variants = [rope] if "rope_type" in rope else [value for value in rope.values() if isinstance(value, dict)]
    if any(variant.get("rope_type") == "dynamic" for variant in variants):
        raise UnsupportedModelError(
            f"{name}: rotary type 'dynamic' changes the frequencies with every length, so keys that are stored once "
            "would be wrong later; choose a fixed one (yarn, linear) in config.json's rope_parameters"
        )
    limits = {v["original_max_position_embeddings"] for v in variants if v.get("rope_type") == _LONGROPE}
    if len(limits) > 1:
        raise UnsupportedModelError(f"{name}: its layers change between rotary regimes at different lengths: {limits}")
    return int(limits.pop()) if limits else None


def install(module: nn.Module, limit: int, regimes: RotaryRegimes) -> None:
    """Replaces the model's longrope modules by ones that choose by row."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            kinds = getattr(child, "rope_type", ())
            if _LONGROPE in ([kinds] if isinstance(kinds, str) else dict(kinds).values()):
                setattr(parent, name, _RotaryByRow(child, limit, regimes))


class _RotaryByRow(nn.Module):
    """Both regimes of a rotary module, as far as the step's rows need them."""

    def __init__(self, inner: nn.Module, limit: int, regimes: RotaryRegimes) -> None:
        super().__init__()
        self._inner = inner
        self._limit = limit
        self._regimes = regimes

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, ...]:
        """The signature is transformers' contract. position_ids: [1, rows]; answers cos and sin, [1, rows, dim]."""
        rows = self._regimes.long_rows
        if rows is None:
            return self._short(x, position_ids, layer_type)
        if bool(rows.all()):
            return self._long(x, position_ids, layer_type)
        short = self._short(x, position_ids.masked_fill(rows, 0), layer_type)
        long = self._long(x, position_ids, layer_type)
        return tuple(torch.where(rows[:, None], b, a) for a, b in zip(short, long, strict=True))

    def _short(self, x: Tensor, position_ids: Tensor, layer_type: str | None) -> tuple[Tensor, ...]:
        kind = () if layer_type is None else (layer_type,)
        answer: tuple[Tensor, ...] = self._inner(x, position_ids, *kind)
        return answer

    def _long(self, x: Tensor, position_ids: Tensor, layer_type: str | None) -> tuple[Tensor, ...]:
        """One more position, the first of the long regime, makes the module choose it."""
        beyond = position_ids.new_full((len(position_ids), 1), self._limit)
        answer = self._short(x, torch.cat([position_ids, beyond], dim=1), layer_type)
        return tuple(part[:, :-1] for part in answer)
