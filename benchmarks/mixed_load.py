"""Requests of mixed lengths, and a fixed number of clients that send them: the next one when the last is answered.

Lengths follow the paper's traces, scaled to what one instance's KV cache holds: most requests are short, a share of
them is long, log-uniform up to the longest, which always occurs.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.checkpoints import CheckpointShape, random_prompt
from benchmarks.http_load import Answered, Ask, RefusedError, complete

_SHORT_MEDIAN, _SHORT_SIGMA = 48, 0.8  # tokens of a short prompt; lognormal
_SHORTEST = 8


@dataclass(frozen=True, slots=True)
class MixedLoad:
    """A mix of lengths.

    Attributes:
        long_share: of the requests.
        long_from, longest: prompt and output of a long request, of what one instance's KV cache holds.
    """

    name: str
    long_share: float
    longest: float
    long_from: float = 0.3

    def draw(
        self, shape: CheckpointShape, count: int, pool_tokens: int, outputs: tuple[int, int], seed: str
    ) -> list[Ask]:
        """``count`` requests; the same lengths in the same order for every seed, other prompts.

        Args:
            pool_tokens: what one instance's KV cache holds.
            outputs: tokens of any output, uniform.
        """
        lengths, tokens = random.Random(self.name), random.Random(f"{self.name} {seed}")
        long_ones = max(1, round(self.long_share * count))
        # From the middle on, evenly: clients have all begun, and none is left alone with a long one in the end.
        totals = {
            int((number + 0.5) * count / long_ones): self._long(lengths, pool_tokens) if number else self.longest
            for number in range(long_ones)
        }
        asks = []
        for number in range(count):
            output = lengths.randint(*outputs)
            if number in totals:
                prompt = max(_SHORTEST, int(totals[number] * pool_tokens) - output)
            else:
                drawn = lengths.lognormvariate(math.log(_SHORT_MEDIAN), _SHORT_SIGMA)
                prompt = max(_SHORTEST, min(int(drawn), int(self.long_from * pool_tokens) - output - 1))
            asks.append(Ask(random_prompt(shape, prompt, tokens), output))
        return asks

    def _long(self, draw: random.Random, pool_tokens: int) -> float:
        return math.exp(draw.uniform(math.log(self.long_from), math.log(self.longest)))


@dataclass(frozen=True, slots=True)
class Target:
    """A server to send to.

    Attributes:
        address: host:port.
        pool_tokens: what its KV cache holds.
    """

    address: str
    model: str
    pool_tokens: int


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of a load.

    Attributes:
        refused: requests that their server could not serve at all.
        wall_s: from the first request to the last token.
    """

    answers: tuple[Answered, ...]
    refused: int
    wall_s: float

    @property
    def output_tokens_per_s(self) -> float:
        return sum(answer.output_tokens for answer in self.answers) / self.wall_s


async def send_mixed(targets: Sequence[Target], asks: Sequence[Ask], clients: int, show: Callable[[int], None]) -> Sent:
    """All requests, ``clients`` at a time; each to the server that has most room, counting what is under way there.

    Args:
        show: is told how many are answered.

    Raises: LoadError.
    """
    waiting: Iterator[Ask] = iter(asks)
    under_way = dict.fromkeys(targets, 0)
    answers: list[Answered] = []
    refused = 0

    async def client() -> None:
        nonlocal refused
        for ask in waiting:
            target = max(targets, key=lambda one: one.pool_tokens - under_way[one])
            tokens = len(ask.prompt) + ask.output_tokens
            under_way[target] += tokens
            try:
                answers.append(await complete(target.address, target.model, ask, may_be_cached=True))
            except RefusedError:
                refused += 1
            finally:
                under_way[target] -= tokens
            show(len(answers))

    started = asyncio.get_running_loop().time()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return Sent(tuple(answers), refused, asyncio.get_running_loop().time() - started)
