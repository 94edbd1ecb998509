"""Sizes of a needle checkpoint and the meaning of every dimension of its residual stream."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from services.core.errors import ConfigError
from services.launcher.needle.positional import MINI_KERNEL, STD_KERNEL, PositionalKernel
from services.launcher.needle.task import MATCH_TOKENS
from services.launcher.needle.vocabulary import MINI_VOCABULARY, STD_VOCABULARY, Vocabulary

Preset = Literal["std", "mini"]

MAX_POSITIONS = 2_097_152
QUERY_HEADS = 4
KV_HEADS = 2
SHIFT_LAYERS = MATCH_TOKENS // QUERY_HEADS  # each head fetches one earlier token
CONSTANT = 4.0  # magnitude of the residual dims `con` and `flag`
OUTPUT_BIT = 2.0**-7  # magnitude of an answer's bits: too small to disturb the norm


@dataclass(frozen=True)
class NeedleSpec:
    """Everything that decides a needle checkpoint, but for its dtype and seed.

    Attributes:
        info_bits: bits of a token id; the vocabulary has 2 ** info_bits tokens.
        parity: codes carry a parity value as well.
        content_gain: raw score (before the factor head_dim ** -0.5) of one matching code value in a retrieve head.
    """

    vocabulary: Vocabulary
    info_bits: int
    parity: bool
    hidden_size: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    positional: PositionalKernel
    content_gain: float
    layers: int

    def __post_init__(self) -> None:
        if self.layers <= SHIFT_LAYERS:
            raise ConfigError(
                f"a needle checkpoint needs at least {SHIFT_LAYERS + 1} layers ({SHIFT_LAYERS} shift layers and a "
                f"retrieve layer), got {self.layers}"
            )

    @property
    def code_dims(self) -> int:
        """Values of a token's code."""
        return self.info_bits + int(self.parity)

    @property
    def code_distance(self) -> int:
        """Values in which two tokens' codes differ at least."""
        return 2 if self.parity else 1

    @property
    def retrieve_layers(self) -> int:
        return self.layers - SHIFT_LAYERS

    @cached_property
    def layout(self) -> ResidualLayout:
        return ResidualLayout(self.code_dims, self.info_bits, self.hidden_size)


def needle_spec(preset: Preset, layers: int = 4) -> NeedleSpec:
    """A preset. ``std`` has bytes as tokens, ``mini`` is the smallest; more layers mean more that share an answer."""
    if preset == "std":
        return NeedleSpec(
            vocabulary=STD_VOCABULARY,
            info_bits=9,
            parity=True,
            hidden_size=256,
            head_dim=128,
            intermediate_size=64,
            rope_theta=1e24,
            positional=STD_KERNEL,
            content_gain=256.0,
            layers=layers,
        )
    return NeedleSpec(
        vocabulary=MINI_VOCABULARY,
        info_bits=5,
        parity=False,
        hidden_size=128,
        head_dim=64,
        intermediate_size=32,
        rope_theta=1e22,
        positional=MINI_KERNEL,
        content_gain=384.0,
        layers=layers,
    )


class ResidualLayout:
    """Where the residual stream holds what.

    ===========  ====================================================================================================
    slot(k)      code of the token k places back, k = 0..8; slot 0 from the embedding, 1-4 from the first shift layer,
                 5-8 from the second
    staging      what a layer's attention fetched; its MLP moves it on and leaves zeros
    output       the answer's bits, +-OUTPUT_BIT, from the retrieve layers
    con          CONSTANT
    flag         CONSTANT at BOS, -CONSTANT elsewhere
    ballast(l)   squares that add up to what shift layer l puts into slots, and that it takes away
    fill         squares that add up to the rest
    ===========  ====================================================================================================

    The sum of squares is the hidden size at every layer's input and after its attention, so that every RMSNorm (of
    weight 1) is the identity and +-1 stays exact in bfloat16. Only the output bits, 2 ** -14 each squared, come on
    top.
    """

    def __init__(self, code_dims: int, info_bits: int, hidden_size: int) -> None:
        self._code_dims = code_dims
        end = (MATCH_TOKENS + 1) * code_dims
        self.staging = range(end, end + max(QUERY_HEADS * code_dims, info_bits))
        self.output = range(self.staging.stop, self.staging.stop + info_bits)
        self.con = self.output.stop
        self.flag = self.con + 1
        self._ballast = self.flag + 1
        self.fill = range(self._ballast + 4 * SHIFT_LAYERS, self._ballast + 4 * SHIFT_LAYERS + 4)
        self.ballast_values = four_squares(QUERY_HEADS * code_dims)
        self.fill_values = four_squares(hidden_size - (MATCH_TOKENS + 1) * code_dims - 2 * int(CONSTANT**2))
        assert self.fill.stop <= hidden_size, (self.fill.stop, hidden_size)

    def slot(self, tokens_back: int) -> range:
        return range(tokens_back * self._code_dims, (tokens_back + 1) * self._code_dims)

    def ballast(self, shift_layer: int) -> range:
        return range(self._ballast + 4 * shift_layer, self._ballast + 4 * shift_layer + 4)


def four_squares(total: int) -> tuple[int, int, int, int]:
    """Four integers, descending, whose squares add up to ``total`` >= 0 (Lagrange: there always are)."""
    for a in range(math.isqrt(total), -1, -1):
        for b in range(min(a, math.isqrt(total - a * a)), -1, -1):
            rest = total - a * a - b * b
            for c in range(min(b, math.isqrt(rest)), -1, -1):
                d = math.isqrt(rest - c * c)
                if d <= c and d * d == rest - c * c:
                    return a, b, c, d
    raise ValueError(f"four_squares needs an integer of at least 0, got {total}")
