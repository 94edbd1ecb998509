"""The ``logprobs`` object of OpenAI's (legacy) completions, token by token: of an answer, and of a prompt before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.gateway.rendering import finite
from services.gateway.requests import PositionLogprobs, PromptLogprobs
from services.gateway.tokenizer import Tokenizer


class CompletionLogprobs:
    """Grows until it is shown.

    Args:
        top: of how many of the most probable tokens at each position.
    """

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._tokens: list[str] = []
        self._own: list[float | None] = []
        self._most: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(self, token_id: int, position: PositionLogprobs | None, offset: int) -> None:
        """The next token, behind ``offset`` characters of the text; ``position`` None: nothing predicts it."""
        self._tokens.append(self._tokenizer.token_text(token_id))
        self._own.append(None if position is None else finite(position.logprob))
        self._most.append(None if position is None else self._most_of(token_id, position))
        self._offsets.append(offset)

    def as_json(self) -> dict[str, Any]:
        return {
            "tokens": self._tokens,
            "token_logprobs": self._own,
            "top_logprobs": self._most,
            "text_offset": self._offsets,
        }

    def _most_of(self, token_id: int, position: PositionLogprobs) -> dict[str, float]:
        """The most probable tokens, and the one that stands there in any case."""
        most: dict[str, float] = {}
        for other, logprob in zip(position.top_ids[: self._top], position.top_logprobs[: self._top], strict=True):
            # Two tokens may look the same; the more probable one comes first.
            most.setdefault(self._tokenizer.token_text(other), finite(logprob))
        most.setdefault(self._tokenizer.token_text(token_id), finite(position.logprob))
        return most


class Echo:
    """A prompt as it stands before an answer.

    Attributes:
        text: the prompt's; "" where the model has no tokenizer.
        logprobs: of its tokens, as far as they have come.
    """

    def __init__(self, text: str, prompt_ids: Sequence[int], tokenizer: Tokenizer, top: int) -> None:
        self.text = text
        self.logprobs = CompletionLogprobs(tokenizer, top)
        self._prompt_ids = prompt_ids
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(())
        self._offset = 0
        self._add(prompt_ids[0], None)

    def take(self, told: PromptLogprobs) -> None:
        """The next part of the prompt."""
        ids = self._prompt_ids[told.first : told.first + len(told.logprobs)]
        for token_id, position in zip(ids, told.logprobs, strict=True):
            self._add(token_id, position)

    def _add(self, token_id: int, position: PositionLogprobs | None) -> None:
        self.logprobs.add(token_id, position, min(self._offset, len(self.text)))
        special = self._tokenizer.token_text(token_id) if self._tokenizer.is_special(token_id) else ""
        # A prompt that came as token ids shows its special tokens, one that came as a text does not have them in it.
        shown = bool(special) and self.text.startswith(special, self._offset)
        self._offset += len(special if shown else self._detokenizer.push(token_id))
