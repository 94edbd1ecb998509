"""What transformers itself answers, with its eager attention: the measure of exactness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

MARGIN = 1e-3  # two best logits closer than this: rounding may decide between them
TOLERANCE = 1e-4  # of a log-probability, unless float32 itself is less exact


@dataclass(frozen=True)
class Answer:
    """A greedy continuation.

    Attributes:
        exact: positions before the first one whose best two logits are too close to tell.
        logprobs: [tokens, vocab_size] float64 at each position, by the same weights in float64.
        prompt_logprobs: [prompt tokens - 1, vocab_size], likewise, of the prompt's tokens behind the first.
        tolerance: what a log-probability may be off by.
    """

    tokens: list[int]
    exact: int
    logprobs: Tensor
    prompt_logprobs: Tensor
    tolerance: float

    def check_tokens(self, tokens: Sequence[int]) -> None:
        assert len(tokens) == len(self.tokens)
        assert self.exact >= min(40, len(self.tokens) // 2), "margins too small to show anything; choose another seed"
        assert list(tokens[: self.exact]) == self.tokens[: self.exact]

    def check_logprobs(self, position: int, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Of some tokens at one position before ``exact``."""
        assert position < self.exact
        error = (torch.tensor(logprobs, dtype=torch.float64) - self.logprobs[position, list(ids)]).abs().max()
        assert error <= self.tolerance, f"log-probability off by {error:.2g} at position {position}"

    def check_prompt(self, ids: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]) -> None:
        """Of some tokens, equally many, at each position of the prompt behind the first."""
        expected = self.prompt_logprobs.gather(1, torch.tensor(ids))
        error = (torch.tensor(logprobs, dtype=torch.float64) - expected).abs().max()
        assert error <= self.tolerance, f"log-probability off by {error:.2g} in the prompt"


class Reference:
    """A checkpoint in transformers' hands.

    Args:
        short_positions: where a longrope model changes its frequencies.
    """

    def __init__(self, path: Path, short_positions: int | None = None) -> None:
        torch.set_num_threads(1)  # others compute beside it, and threads that wait for each other are slower than one
        self._short_positions = short_positions
        self._model, self._precise = (
            AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
            )
            for dtype in (torch.float32, torch.float64)
        )

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], count: int) -> Answer:
        last = len(prompt) + count - 1
        limit = self._short_positions
        crosses = limit is not None and len(prompt) <= limit < last
        logits = self._generate_long(prompt, count) if crosses else self._generate(prompt, count)
        tokens = logits.argmax(1).tolist()
        top = logits.topk(2).values
        exact = next((i for i, margin in enumerate((top[:, 0] - top[:, 1]).tolist()) if margin < MARGIN), count)
        precise = self._at_once(self._precise, [*prompt, *tokens], long=limit is not None and last > limit)
        logprobs = precise.log_softmax(1)
        prompt_logprobs, logprobs = logprobs[: len(prompt) - 1], logprobs[len(prompt) - 1 : last]
        own_error = (logits.log_softmax(1) - logprobs)[: max(exact, 1)].abs().max()
        return Answer(tokens, exact, logprobs, prompt_logprobs, max(TOLERANCE, 2 * float(own_error)))

    def _generate(self, prompt: Sequence[int], count: int) -> Tensor:
        """[count, vocab_size] logits of transformers' own generate."""
        tokens = torch.tensor([list(prompt)])
        answer = self._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.cat(answer.logits).float()

    def _generate_long(self, prompt: Sequence[int], count: int) -> Tensor:
        """The same with the long factors from the first token on; generate would change over at the limit."""
        tokens, logits = list(prompt), []
        for _ in range(count):
            logits.append(self._at_once(self._model, tokens, long=True)[len(tokens) - 1])
            tokens.append(int(logits[-1].argmax()))
        return torch.stack(logits)

    def _at_once(self, model: torch.nn.Module, tokens: list[int], long: bool) -> Tensor:
        """[tokens, vocab_size] logits of one forward; padding after them reaches into the long regime."""
        missing = (self._short_positions or 0) + 1 - len(tokens) if long else 0
        padded = torch.tensor([tokens + [0] * max(0, missing)])
        positions = torch.arange(padded.shape[1]).unsqueeze(0)
        logits: Tensor = model(input_ids=padded, position_ids=positions, use_cache=False).logits[0, : len(tokens)]
        return logits
