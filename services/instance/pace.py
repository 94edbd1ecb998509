"""How large a prompt's chunk may be beside requests that decode, so that those keep their pace."""

from __future__ import annotations

import math

_LEAST = 16  # prompt tokens of a step: a prompt always goes on
_WEIGHT = 0.5  # of the latest step: the cost of a prompt's token grows with the context before it


class Pace:
    """Learns what steps take. Policy only: it is told times and reads no clock.

    Args:
        target_s: how long a step may take that computes prompts beside decoding requests; ``inf``: any time. Where
            decoding alone takes more than half of it, prompts get as long as that: decoding is never slowed down more
            than twofold for the sake of a large batch, nor is the batch kept small for the sake of a pace that it
            could not have anyway.
    """

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s
        self._decode_s = 0.0  # of a step without prompts
        self._token_s: float | None = None  # of each prompt token on top of it

    def took(self, prompt_tokens: int, step_s: float) -> None:
        """A step with so many tokens of prompts among others took ``step_s``."""
        if not prompt_tokens:
            self._decode_s = step_s
        elif prompt_tokens >= _LEAST:
            token_s = max(0.0, step_s - self._decode_s) / prompt_tokens
            before = token_s if self._token_s is None else self._token_s
            self._token_s = before + _WEIGHT * (token_s - before)

    def prompt_tokens(self) -> int | None:
        """How many tokens of prompts fit a step beside those that decode; None: as many as there are."""
        if math.isinf(self._target_s) or not self._token_s:
            return None
        prompts_s = max(self._target_s - self._decode_s, self._decode_s)
        return max(_LEAST, int(prompts_s / self._token_s))
