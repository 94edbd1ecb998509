"""How a request changes the model's distribution before a token is drawn from it, temperature apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.core.errors import InvalidRequestError

MOST_BIASED = 1024  # tokens


@dataclass(frozen=True, slots=True)
class LogitShaping:
    """Applied in the order of the attributes; the default values change nothing.

    Attributes:
        logit_bias: (token, bias): added to its logit.
        min_tokens: none of the tokens that end the request is drawn before the answer has so many.
        repetition_penalty: logits of tokens that the prompt or the answer contains are divided by it where they are
            positive, multiplied where they are negative (Keskar et al. 2019, arXiv 1909.05858).
        presence_penalty: taken from the logit of every token that the answer contains.
        frequency_penalty: taken from it once for each time.
        top_k: only the k most probable tokens, and those as probable as the last of them; 0: all.
        top_p: only the most probable tokens that together reach this probability (Holtzman et al. 2019, arXiv
            1904.09751).
        min_p: only tokens at least so probable, relative to the most probable one (Nguyen et al. 2024, arXiv
            2407.01082).
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def penalizes(self) -> bool:
        """Whether the tokens so far matter."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check(self, vocab_size: int, max_tokens: int) -> None:
        """Raises InvalidRequestError, which names the field and its bounds."""
        for name, value, least, most in (
            ("min_tokens", self.min_tokens, 0, max_tokens),
            ("presence_penalty", self.presence_penalty, -2, 2),
            ("frequency_penalty", self.frequency_penalty, -2, 2),
            ("top_k", self.top_k, 0, math.inf),
            ("min_p", self.min_p, 0, 1),
        ):
            if not least <= value <= most:  # NaN is nowhere
                bounds = f"at least {least}" if most == math.inf else f"between {least} and {most}"
                raise InvalidRequestError(f"{name}: must be {bounds}, got {value}")
        if not 0 < self.top_p <= 1:
            raise InvalidRequestError(f"top_p: must be above 0 and at most 1, got {self.top_p}")
        if not 0 < self.repetition_penalty <= 100:
            raise InvalidRequestError(
                f"repetition_penalty: must be above 0 and at most 100, got {self.repetition_penalty}"
            )
        if len(self.logit_bias) > MOST_BIASED:
            raise InvalidRequestError(f"logit_bias: at most {MOST_BIASED} tokens, got {len(self.logit_bias)}")
        for token, bias in self.logit_bias:
            if not 0 <= token < vocab_size:
                raise InvalidRequestError(
                    f"logit_bias: token id {token} is not in the vocabulary of {vocab_size} tokens"
                )
            if not -100 <= bias <= 100:
                raise InvalidRequestError(f"logit_bias: must be between -100 and 100, got {bias} for token {token}")


UNSHAPED = LogitShaping()
