"""Whether two servers compute the same: their greedy tokens, apart from ties that bfloat16 cannot decide.

Two right engines add up in different orders, so their logits differ in the last digits of bfloat16. Where the best two
tokens are closer than that, either may come first; from there on the answers are different texts, and nothing more can
be learned from that prompt.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.server import PinnedServer
from services.core.errors import InfiniteLLMError

NEAR_TIE = 0.2  # nats between two tokens that either engine may prefer, and between their opinions of one token
_TOP = 5
_TIMEOUT_S = 300.0


class DisagreementError(InfiniteLLMError):
    """Two servers answer differently: at least one is wrong, so their speeds cannot be compared."""


@dataclass(frozen=True, slots=True)
class Step:
    """One greedy token.

    Attributes:
        logprob: its log-probability.
        top: of the most probable tokens, by their texts.
    """

    token_id: int
    text: str
    logprob: float
    top: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a comparison found.

    Attributes:
        same: tokens that were equal, each with a log-probability that is close enough.
        near_ties: prompts whose answers parted at a near-tie.
    """

    same: int
    near_ties: int

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(self.same + other.same, self.near_ties + other.near_ties)


def greedy_steps(address: str, model: str, prompt: Sequence[int], count: int) -> list[Step]:
    """The first ``count`` greedy tokens after a prompt."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": _TOP,
        "return_token_ids": True,
    }
    connection = http.client.HTTPConnection(address, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    if response.status != 200:
        raise DisagreementError(f"{address}: answered {response.status}: {text[:500]}")
    choice: dict[str, Any] = json.loads(text)["choices"][0]
    logprobs: dict[str, Any] = choice["logprobs"]
    return [
        Step(*step)
        for step in zip(
            choice["token_ids"], logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        )
    ]


def compare_steps(ours: Sequence[Step], theirs: Sequence[Step]) -> Agreement:
    """Compares two answers to one prompt, up to the first different token.

    Raises: DisagreementError where the difference is more than a near-tie.
    """
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our.token_id == their.token_id:
            if abs(our.logprob - their.logprob) > NEAR_TIE:
                raise DisagreementError(
                    f"token {index} is {our.token_id} for both, with log-probability {our.logprob:.3f} and "
                    f"{their.logprob:.3f}"
                )
            continue
        if not (_tied(our, their.text) and _tied(their, our.text)):
            raise DisagreementError(f"token {index}: one says {our}, the other {their}")
        return Agreement(index, 1)
    return Agreement(len(ours), 0)


def compare_servers(
    servers: Sequence[PinnedServer], prompts: Sequence[Sequence[int]], count: int, least_same: float
) -> Agreement:
    """``count`` tokens after each prompt, of the first server against each of the others: a fast wrong one is no peer.

    Args:
        least_same: tokens of an answer, on average, that must be equal: else nothing was compared.

    Raises: DisagreementError.
    """
    total, answers = Agreement(0, 0), 0
    for prompt in prompts:
        ours, *others = (greedy_steps(server.address, server.model, prompt, count) for server in servers)
        for theirs in others:
            total += compare_steps(ours, theirs)
            answers += 1
    if total.same < least_same * answers:
        raise DisagreementError(f"only {total.same} tokens of {answers} answers were the same")
    return total


def _tied(step: Step, other: str) -> bool:
    """Whether another token was nearly as probable as the one drawn."""
    return other in step.top and step.logprob - step.top[other] <= NEAR_TIE
