"""Requests whose every token is known beforehand: what an undisturbed run answers, whatever shares its batch.

transformers' eager attention computes the logits; a request ends before the first position at which rounding could
decide (two best logits too close, or the drawn number too close to the edge between two tokens). So a whole answer can
be compared, not a beginning of it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from random_llama import VOCAB_SIZE
from torch import Tensor
from transformers import LlamaForCausalLM

from services.core.sequence import SamplingParams
from services.instance.sampler import sample, uniform

LOGIT_MARGIN = 1e-3
PROBABILITY_MARGIN = 1e-4
SHORTEST_ANSWER = 24


@dataclass(frozen=True)
class KnownRequest:
    """One completion and its answer, ``max_tokens`` = len(answer) tokens long.

    Attributes:
        prompt_logprobs: of the prompt's tokens behind the first; empty where they are not asked for.
    """

    name: str
    prompt: tuple[int, ...]
    temperature: float
    seed: int
    answer: tuple[int, ...]
    prompt_logprobs: tuple[float, ...] = ()

    @property
    def parameters(self) -> dict[str, object]:
        """Of the completion API."""
        scoring = {"echo": True, "logprobs": 1} if self.prompt_logprobs else {}
        return {
            "max_tokens": len(self.answer),
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
            **scoring,
        }


class KnownRequests:
    """Makes requests by number, the same ones for the same number; answers are computed when first asked for."""

    def __init__(self, model: Path) -> None:
        torch.set_num_threads(1)
        self._model = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        self.request = cache(self._make)

    def _make(self, number: int) -> KnownRequest:
        """A third of them is short, a third of middle length, a third long; every third one draws with temperature.

        Every fourth one asks for log-probabilities, of its prompt as well.
        """
        for attempt in range(20):
            rng = random.Random(f"request {number} attempt {attempt}")
            length = rng.randint(*((4, 60), (80, 300), (400, 900))[number % 3])
            prompt = tuple(rng.choices(range(VOCAB_SIZE), k=length))
            temperature = 1.0 if number // 3 % 3 == 2 else 0.0
            seed = rng.getrandbits(32)
            answer = self._answer(prompt, rng.randint(150, 500), temperature, seed)
            if len(answer) >= SHORTEST_ANSWER:
                scores = self._scores(prompt) if number % 4 == 2 else ()
                return KnownRequest(f"request {number} ({length} tokens)", prompt, temperature, seed, answer, scores)
        raise AssertionError("twenty prompts in a row with near-ties at once: the model's logits are not spread enough")

    @torch.inference_mode()
    def _scores(self, prompt: tuple[int, ...]) -> tuple[float, ...]:
        tokens = torch.tensor([prompt])
        table = self._model(input_ids=tokens).logits[0, :-1].double().log_softmax(1)
        return tuple(table.gather(1, tokens[0, 1:, None])[:, 0].tolist())

    @torch.inference_mode()
    def _answer(self, prompt: tuple[int, ...], count: int, temperature: float, seed: int) -> tuple[int, ...]:
        tokens: list[int] = []
        past, step = None, torch.tensor([prompt])
        params = SamplingParams(temperature, seed, count)
        while len(tokens) < count:
            output = self._model(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, logits = output.past_key_values, output.logits[0]  # [1, vocab_size]
            if not _clear(logits[0], temperature, uniform(seed, len(tokens))):
                break
            tokens.append(sample(logits, [params], [len(tokens)])[0].token_id)
            step = torch.tensor([tokens[-1:]])
        return tuple(tokens)


def _clear(logits: Tensor, temperature: float, drawn: float) -> bool:
    """Whether rounding cannot change the token. ``drawn``: the number in [0, 1) that chooses it."""
    if temperature == 0:
        best, second = logits.topk(2).values.tolist()
        return bool(best - second >= LOGIT_MARGIN)
    edges = torch.softmax(logits.double() / temperature, dim=-1).cumsum(0)
    return bool((edges[:-1] - drawn).abs().min() >= PROBABILITY_MARGIN)
